"""Settings and arguments of the constructor that meet in few scripts, each beside transformers.

Events, logs, tokens per second and label smoothing of language models are in tests/parity; evaluation in
tests/unit/test_trainer_evaluation.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from side_by_side import STEP_TOLERANCE, assert_same_numbers, largest_difference, ours, theirs, train
from torch.nn import functional

import etude
from short_run import logged, short_trainer, without_clock
from tiny import (
    adapter_of,
    assert_same_bits,
    causal_lora,
    classification_rows,
    language_rows,
    tiny_bert,
    tiny_t5,
    tiny_tokenizer,
    translation_rows,
    with_lora,
)

SETTINGS: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
ROWS = language_rows(12)

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own


def bert() -> Any:
    return with_lora(tiny_bert(), task_type="SEQ_CLS", target_modules=["query", "value"])


def t5() -> Any:
    return with_lora(tiny_t5(), task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])


def with_trainer(world: Any, trainer_class: type) -> Any:
    """A world that trains with a subclass of its Trainer."""
    names = {name: getattr(world, name) for name in ("TrainingArguments", "PrinterCallback")}
    return SimpleNamespace(__name__=world.__name__, Trainer=trainer_class, **names)


def test_neftune_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same noise in both, in place of their own draws: of embeddings (B, T, D) half the largest noise."""
    draw = torch.Tensor.uniform_

    def half_the_bound(tensor: torch.Tensor, low: float = 0.0, high: float = 1.0, **other: Any) -> torch.Tensor:
        return tensor.fill_(high / 2) if tensor.dim() == 3 else draw(tensor, low, high, **other)

    monkeypatch.setattr(torch.Tensor, "uniform_", half_the_bound)
    settings = SETTINGS | {"neftune_noise_alpha": 5.0}
    peer, mine = (run(causal_lora, ROWS, settings, folder=tmp_path) for run in (theirs, ours))
    assert_same_numbers(mine, peer)
    without = ours(causal_lora, ROWS, SETTINGS, folder=tmp_path)
    assert largest_difference(without.steps("loss"), mine.steps("loss")) > 1e-3
    embeddings = mine.trainer.model.get_base_model().get_input_embeddings()
    assert not embeddings._forward_hooks  # taken out again


@pytest.mark.parametrize("model", ["bert", "t5"])
def test_smoothed_labels_of_classifiers_and_encoder_decoders(model: str, tmp_path: Path) -> None:
    build, rows = (bert, classification_rows(12)) if model == "bert" else (t5, translation_rows(12))
    collate = transformers.DataCollatorForSeq2Seq(tiny_tokenizer(), model=tiny_t5()) if model == "t5" else None
    settings = SETTINGS | {"label_smoothing_factor": 0.2, "eval_strategy": "steps", "eval_steps": 2}
    peer, mine = (
        run(build, rows, settings, folder=tmp_path, collate=collate, eval_rows=rows[:4]) for run in (theirs, ours)
    )
    assert_same_numbers(mine, peer)


def test_several_classes_at_once_are_not_smoothed() -> None:
    model = with_lora(
        tiny_bert(problem_type="multi_label_classification"), task_type="SEQ_CLS", target_modules=["query"]
    )
    with pytest.warns(UserWarning, match="Label smoothing is not compatible with multi-label classification"):
        assert short_trainer(model, label_smoothing_factor=0.1).label_smoother is None


def sum_over_items(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    logits = outputs["logits"][:, :-1].flatten(0, 1)
    return functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


def test_compute_loss_func(tmp_path: Path) -> None:
    peer, mine = (
        run(causal_lora, ROWS, SETTINGS, folder=tmp_path, compute_loss_func=sum_over_items) for run in (theirs, ours)
    )
    assert_same_numbers(mine, peer)


def test_compute_loss_func_of_a_classifier(tmp_path: Path) -> None:
    def loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
        return functional.cross_entropy(outputs.logits, labels, reduction="sum") / num_items_in_batch

    peer, mine = (
        run(bert, classification_rows(13), SETTINGS | {"max_steps": 5}, folder=tmp_path, compute_loss_func=loss)
        for run in (theirs, ours)
    )
    assert_same_numbers(mine, peer)


def weighted(trainer_class: Any) -> type:
    class Weighted(trainer_class):
        """The classifier of the documentation: classes have weights, the loss is a mean of the batch."""

        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            labels = inputs.pop("labels")
            outputs = model(**inputs)
            loss = functional.cross_entropy(outputs.logits, labels, weight=torch.tensor([1.0, 2.0, 3.0]))
            return (loss, outputs) if return_outputs else loss

    return Weighted


def doubled(trainer_class: Any) -> type:
    class Doubled(trainer_class):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(model, inputs, *args, **kwargs)

    return Doubled


@pytest.mark.parametrize("kind", [weighted, doubled])
def test_an_overridden_compute_loss(kind: Callable[[Any], type], tmp_path: Path) -> None:
    build, rows = (bert, classification_rows(12)) if kind is weighted else (causal_lora, ROWS)
    peer, mine = (
        train(with_trainer(world, kind(world.Trainer)), build, rows, SETTINGS, folder=tmp_path)
        for world in (transformers, etude)
    )
    assert_same_numbers(mine, peer)


@pytest.mark.parametrize("is_scaled", [True, False])
def test_loss_is_scaled_for_ga_says_whether_to_divide(is_scaled: bool, tmp_path: Path) -> None:
    def scaled(trainer_class: Any) -> type:
        return type("Scaled", (weighted(trainer_class),), {"loss_is_scaled_for_ga": is_scaled})

    peer, mine = (
        train(with_trainer(world, scaled(world.Trainer)), bert, classification_rows(12), SETTINGS, folder=tmp_path)
        for world in (transformers, etude)
    )
    assert_same_numbers(mine, peer)


def test_optimizer_cls_and_kwargs(tmp_path: Path) -> None:
    given = (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True})
    peer, mine = (
        run(causal_lora, ROWS, SETTINGS, folder=tmp_path, optimizer_cls_and_kwargs=given) for run in (theirs, ours)
    )
    assert_same_numbers(mine, peer)


def test_an_optimizer_of_a_part_of_the_weights(tmp_path: Path) -> None:
    """What it does not move counts in the norm and is not added up from step to step."""

    def run_in(world: Any) -> Any:
        model = causal_lora()
        optimizer = torch.optim.AdamW([p for name, p in model.named_parameters() if "lora_B" in name], lr=1e-3)
        return train(world, lambda: model, ROWS, SETTINGS, folder=tmp_path, optimizers=(optimizer, None))

    assert_same_numbers(run_in(etude), run_in(transformers))


def metrics_of(world: Any, folder: Path, compute: Callable[..., Any], **settings: Any) -> Any:
    settings = {"max_steps": 1, "per_device_eval_batch_size": 2, "eval_strategy": "steps", "eval_steps": 1} | settings
    rows = language_rows(5, 3)
    return train(world, causal_lora, ROWS, settings, folder=folder, eval_rows=rows, compute_metrics=compute)


def test_inputs_and_losses_for_the_metrics(tmp_path: Path) -> None:
    seen: dict[str, Any] = {}
    for world in (transformers, etude):

        def compute(prediction: Any, world: Any = world) -> dict[str, float]:
            seen[world.__name__] = prediction
            return {}

        metrics_of(world, tmp_path, compute, include_for_metrics=["inputs", "loss"])
    mine, peer = seen["etude"], seen["transformers"]
    np.testing.assert_array_equal(mine.inputs, peer.inputs)
    np.testing.assert_array_equal(mine.label_ids, peer.label_ids)
    np.testing.assert_allclose(mine.losses, peer.losses, rtol=1e-5)
    np.testing.assert_allclose(mine.predictions, peer.predictions, rtol=1e-3, atol=1e-5)
    assert len(list(mine)) == len(list(peer)) == 4


def test_metrics_batch_by_batch(tmp_path: Path) -> None:
    calls: dict[str, list[Any]] = {"transformers": [], "etude": []}
    for world in (transformers, etude):

        def compute(prediction: Any, compute_result: bool = False, world: Any = world) -> dict[str, float]:
            logits, labels = prediction.predictions, prediction.label_ids
            calls[world.__name__].append(
                (tuple(logits.shape), labels.tolist(), compute_result, torch.is_tensor(logits))
            )
            return {"count": float(len(calls[world.__name__]))} if compute_result else {}

        run = metrics_of(world, tmp_path, compute, batch_eval_metrics=True)
        assert run.evaluations("eval_count") == [3.0]
    assert calls["etude"] == calls["transformers"]


def test_memory_metrics(tmp_path: Path) -> None:
    settings = {"max_steps": 1, "skip_memory_metrics": False}
    mine, peer = (run(causal_lora, ROWS, settings, folder=tmp_path) for run in (ours, theirs))
    of = lambda metrics: {name for name in metrics if "_mem_" in name}  # noqa: E731
    assert of(mine.output.metrics) == of(peer.output.metrics) != set()
    assert all(isinstance(mine.output.metrics[name], int) for name in of(mine.output.metrics))
    for run in (mine, peer):
        run.evaluated = run.trainer.evaluate(language_rows(2))
    assert of(mine.evaluated) == of(peer.evaluated) != set()


def test_the_cache_of_the_device_is_emptied_every_so_many_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[int] = []
    trainer = short_trainer(max_steps=5, torch_empty_cache_steps=2)
    monkeypatch.setattr("etude.hooks.forward._empty_device_cache", lambda _: emptied.append(trainer.state.global_step))
    trainer.train()
    assert emptied == [0, 2, 4]


def test_lengths_come_from_a_column() -> None:
    """The column says the opposite of the truth, and is believed: the shortest row comes first."""
    rows = [row | {"minus": 99 - len(row["input_ids"])} for row in language_rows(12)]
    trainer = short_trainer(
        rows=datasets.Dataset.from_list(rows), group_by_length=True, length_column_name="minus", max_steps=1
    )
    first = next(iter(trainer.get_train_dataloader()))
    assert int(first["attention_mask"].sum(1).min()) == min(len(row["input_ids"]) for row in rows)


def one_cycle(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=12)


def sequence(optimizer: Any) -> Any:
    schedules = torch.optim.lr_scheduler
    parts = [schedules.ConstantLR(optimizer, factor=0.5, total_iters=2), schedules.ExponentialLR(optimizer, gamma=0.8)]
    return schedules.SequentialLR(optimizer, parts, milestones=[2])


def plateau(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=10.0)


@pytest.mark.parametrize("schedule", [None, one_cycle, sequence, plateau], ids=lambda s: getattr(s, "__name__", "none"))
def test_an_optimizer_and_schedule_of_the_user_resume_exactly(schedule: Any) -> None:
    def trained(folder: str, **resume: Any) -> Any:
        model = causal_lora()
        optimizer = torch.optim.NAdam([p for p in model.parameters() if p.requires_grad], lr=2e-3)
        trainer = short_trainer(
            model,
            output_dir=folder,
            max_steps=6,
            save_strategy="steps",
            save_steps=3,
            eval_rows=language_rows(2),
            eval_strategy="steps",
            eval_steps=1,
            optimizers=(optimizer, None if schedule is None else schedule(optimizer)),
        )
        trainer.train(**resume)
        return trainer

    whole = trained("whole")
    resumed = trained("resumed", resume_from_checkpoint="whole/checkpoint-3")
    assert_same_bits(adapter_of(resumed.model), adapter_of(whole.model))
    assert without_clock(resumed.state.log_history) == without_clock(whole.state.log_history)
    rates = logged(whole, "learning_rate")
    assert len(set(rates)) > 2  # a schedule that stands still would prove nothing


@pytest.mark.parametrize("name", ["reduce_lr_on_plateau", "greedy"])
def test_schedules_that_follow_a_metric_resume_exactly(name: str) -> None:
    def trained(folder: str, **resume: Any) -> Any:
        trainer = short_trainer(
            output_dir=folder,
            max_steps=6,
            lr_scheduler_type=name,
            lr_scheduler_kwargs={"patience": 0, "factor": 0.5},
            learning_rate=1e-2,
            save_strategy="steps",
            save_steps=3,
            eval_rows=language_rows(2, 7),
            eval_strategy="steps",
            eval_steps=1,
        )
        trainer.train(**resume)
        return trainer

    whole = trained("whole")
    resumed = trained("resumed", resume_from_checkpoint="whole/checkpoint-3")
    assert_same_bits(adapter_of(resumed.model), adapter_of(whole.model))
    assert logged(resumed, "learning_rate") == logged(whole, "learning_rate")


def test_tokens_seen_go_on_counting_after_a_resume() -> None:
    settings = {
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "include_num_input_tokens_seen": "non_padding",
    }
    whole = short_trainer(output_dir="whole", **settings)
    whole.train()
    resumed = short_trainer(output_dir="resumed", **settings)
    resumed.train(resume_from_checkpoint="whole/checkpoint-2")
    assert logged(resumed, "num_input_tokens_seen") == logged(whole, "num_input_tokens_seen")
    assert len(logged(whole, "train_tokens_per_second")) == 4
    assert largest_difference(logged(resumed, "loss"), logged(whole, "loss")) <= STEP_TOLERANCE
