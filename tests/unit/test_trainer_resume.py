"""A run that is resumed ends with the same bits and the same log as one that was never interrupted."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from etude import EarlyStoppingCallback, TrainerCallback
from short_run import Scripted, checkpoints, logged, short_trainer, without_clock
from tiny import ListDataset, StreamDataset, adapter_of, assert_same_bits, language_rows, tiny_llama, with_lora

ROWS = language_rows(10)
EVAL_ROWS = language_rows(4, 50)


def dropped(seed: int = 1) -> Any:
    """Dropout in the attention and in the adapter, so that every step draws random numbers."""
    return with_lora(tiny_llama(attention_dropout=0.1), seed, task_type="CAUSAL_LM", lora_dropout=0.1)


def build(**settings: Any) -> Any:
    arguments: dict[str, Any] = {"save_strategy": "steps", "save_steps": 7, "num_train_epochs": 3}
    rows = settings.pop("rows", ROWS)
    seed = settings.pop("model_seed", 1)
    return short_trainer(dropped(seed), rows, **(arguments | settings))


def resume(step: int | str | bool, **settings: Any) -> Any:
    """A new trainer, with another adapter at first and the global random states astray, goes on from `step`."""
    torch.manual_seed(999)
    random.seed(999)
    np.random.seed(999)
    trainer = build(**({"model_seed": 5} | settings))
    trainer.output = trainer.train(
        resume_from_checkpoint=f"out/checkpoint-{step}" if type(step) is int else step  # True is no step
    )
    return trainer


def whole_run(**settings: Any) -> Any:
    trainer = build(**settings)
    trainer.output = trainer.train()
    return trainer


def assert_same_run(resumed: Any, whole: Any) -> None:
    assert_same_bits(adapter_of(resumed.model), adapter_of(whole.model))
    assert without_clock(resumed.state.log_history) == without_clock(whole.state.log_history)
    assert resumed.output.training_loss == whole.output.training_loss
    assert resumed.output.global_step == whole.output.global_step
    assert resumed.state.epoch == whole.state.epoch


@pytest.fixture(scope="module", params=[True, False], ids=["fast", "general"])
def saved_at_every_step(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("whole")
    return whole_run(save_steps=1, fast_path=request.param, output_dir=str(folder / "out"))


@pytest.mark.parametrize("step", [1, 3, 5, 7, 10, 14])
def test_from_any_step(step: int, saved_at_every_step: Any) -> None:
    """Five steps an epoch: within the first, at its end, within the second, at its end, before the last step."""
    saved = Path(saved_at_every_step.args.output_dir, f"checkpoint-{step}")
    shutil.copytree(saved, f"out/checkpoint-{step}")
    assert_same_run(resume(step, save_steps=1, fast_path=saved_at_every_step.args.fast_path), saved_at_every_step)


VARIATIONS: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 2, "save_steps": 4},
    "sparse-log": {"logging_steps": 4},
    "epoch-log": {"logging_strategy": "epoch"},
    "nothing-logged": {"logging_strategy": "no"},
    "cosine-with-warmup": {"lr_scheduler_type": "cosine", "warmup_ratio": 0.3},
    "by-length": {"train_sampling_strategy": "group_by_length"},
    "in-order": {"train_sampling_strategy": "sequential"},
    "bfloat16": {"bf16": True},
    "sgd": {"optim": "sgd"},
    "no-transformers-files": {"hf_checkpoint_files": False},
    "map-style": {"rows": ListDataset(ROWS)},
    "tokens-counted": {"include_num_input_tokens_seen": "all"},
    "evaluated": {"eval_rows": EVAL_ROWS, "eval_strategy": "steps", "eval_steps": 2},
    "checkpointed-activations": {"gradient_checkpointing": True},
}


@pytest.mark.parametrize("variation", VARIATIONS)
def test_under_other_settings(variation: str) -> None:
    settings = VARIATIONS[variation]
    whole = whole_run(**settings)
    step = 4 if "gradient_accumulation_steps" in settings else 7
    assert_same_run(resume(step, **settings), whole)


@pytest.mark.parametrize("strategy", ["logging_strategy", "eval_strategy"])
def test_from_the_last_step_of_an_epoch_whose_end_was_still_to_come(strategy: str) -> None:
    """The checkpoint of step 5 is written before the log or the evaluation that ends the epoch."""
    settings = {strategy: "epoch", "eval_rows": EVAL_ROWS, "save_steps": 5}
    whole = whole_run(**settings)
    assert_same_run(resume(5, **settings), whole)


@pytest.mark.parametrize("step", [3, 7])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [ListDataset, StreamDataset])
def test_with_loader_workers(kind: Any, workers: int, step: int) -> None:
    if kind is StreamDataset and workers:
        rows: Any = SharedStream(ROWS)
    else:
        rows = kind(ROWS)
    settings = {"rows": rows, "dataloader_num_workers": workers, "max_steps": 10, "save_steps": step}
    whole = whole_run(**settings)
    assert_same_run(resume(step, **settings), whole)


class SharedStream(StreamDataset):
    """Every worker reads its share of the rows, as torch asks of a stream."""

    def __iter__(self) -> Any:
        worker = torch.utils.data.get_worker_info()
        return iter(self.rows[worker.id :: worker.num_workers]) if worker else iter(self.rows)


@pytest.mark.parametrize("step", [3, 7])
def test_a_stream_with_a_shuffle_buffer(step: int) -> None:
    """transformers takes the second epoch of a stream for the first."""
    datasets = pytest.importorskip("datasets")

    def stream() -> Any:
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset().shuffle(seed=3, buffer_size=4)

    whole = whole_run(rows=stream(), max_steps=12, save_steps=step)
    assert_same_run(resume(step, rows=stream(), max_steps=12, save_steps=step), whole)


def test_a_resumed_run_can_be_resumed() -> None:
    whole = whole_run(save_steps=4, output_dir="whole")
    with pytest.raises(PowerCutError):
        build(save_steps=4, callbacks=[PowerCut(6)]).train()
    with pytest.raises(PowerCutError):
        resume(True, save_steps=4, callbacks=[PowerCut(11)])
    assert checkpoints() == [4, 8]
    assert_same_run(resume(True, save_steps=4), whole)


class PowerCutError(Exception):
    """Ends a run where it stands, in place of a kill."""


class PowerCut(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise PowerCutError


class TimeLimit(TrainerCallback):
    """What users write for a queue that gives them an hour at a time: save, stop, resume in the next job."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if state.global_step == self.step:
            control.should_save = control.should_training_stop = True
        return control


def test_a_run_that_a_callback_stopped_goes_on_when_it_is_resumed() -> None:
    """As under transformers, where a request to stop lasts until training begins again."""
    whole = whole_run(output_dir="whole")
    build(callbacks=[TimeLimit(4)]).train()
    goes_on = resume(True, callbacks=[TimeLimit(9)])
    assert goes_on.state.global_step == 9
    last = resume(True)
    assert_same_bits(adapter_of(last.model), adapter_of(whole.model))
    assert logged(last, "loss") == logged(whole, "loss")


@pytest.mark.parametrize("request_", [True, "auto", "true", "out/checkpoint-7", Path("out/checkpoint-7")], ids=str)
def test_every_way_to_ask(request_: Any) -> None:
    whole = whole_run()
    for step in checkpoints():
        if step > 7:
            shutil.rmtree(f"out/checkpoint-{step}")
    trainer = build(model_seed=5)
    trainer.output = trainer.train(resume_from_checkpoint=request_)
    assert_same_run(trainer, whole)


def test_the_argument_in_training_arguments_is_honoured() -> None:
    whole = whole_run()
    trainer = build(model_seed=5, resume_from_checkpoint="out/checkpoint-7")
    trainer.output = trainer.train()
    assert_same_run(trainer, whole)


def test_auto_begins_afresh_where_there_is_nothing() -> None:
    whole = whole_run(output_dir="elsewhere")
    fresh = build()
    fresh.output = fresh.train(resume_from_checkpoint="auto")
    assert_same_run(fresh, whole)


def test_false_begins_afresh() -> None:
    whole = whole_run()
    fresh = build(resume_from_checkpoint="out/checkpoint-7")
    fresh.output = fresh.train(resume_from_checkpoint=False)
    assert without_clock(fresh.state.log_history) == without_clock(whole.state.log_history)


def test_a_finished_run_reports_what_it_was() -> None:
    """transformers reports a training loss of 0.0 here."""
    whole = whole_run()
    again = resume(True)
    assert again.output.global_step == 15
    assert again.output.training_loss == whole.output.training_loss
    assert_same_bits(adapter_of(again.model), adapter_of(whole.model))


def test_the_patience_of_early_stopping_is_kept() -> None:
    """Scores fall from the second evaluation on: a patience of 3 ends the run at the fifth, resumed or not."""
    scores = [0.5, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3]
    settings: dict[str, Any] = {
        "eval_rows": EVAL_ROWS,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "metric_for_best_model": "score",
        "load_best_model_at_end": True,
    }
    whole = whole_run(compute_metrics=Scripted(*scores), callbacks=[EarlyStoppingCallback(3)], **settings)
    assert whole.output.global_step == 5
    resumed = resume(4, compute_metrics=Scripted(*scores[4:]), callbacks=[EarlyStoppingCallback(3)], **settings)
    assert_same_run(resumed, whole)
    assert resumed.state.best_global_step == 2


def test_the_best_so_far_is_remembered() -> None:
    settings: dict[str, Any] = {
        "eval_rows": EVAL_ROWS,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "metric_for_best_model": "score",
        "max_steps": 4,
    }
    whole_run(compute_metrics=Scripted(0.9, 0.1, 0.2, 0.3), **settings)
    resumed = resume(2, compute_metrics=Scripted(0.2, 0.3), **settings)
    assert (resumed.state.best_metric, resumed.state.best_global_step) == (0.9, 1)


def test_a_longer_run_goes_on_from_a_finished_one() -> None:
    whole_run(num_train_epochs=1)
    longer = resume(True, num_train_epochs=2)
    assert longer.output.global_step == 10
    assert len(logged(longer, "loss")) == 10


def test_resuming_leaves_older_checkpoints_in_place() -> None:
    whole_run(save_steps=5)
    before = Path("out/checkpoint-5/adapter_model.safetensors").read_bytes()
    resume(5, save_steps=5)
    assert checkpoints() == [5, 10, 15]
    assert Path("out/checkpoint-5/adapter_model.safetensors").read_bytes() == before
