"""What scripts lean on without thinking of it: around a run, not in its numbers."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from etude import EarlyStoppingCallback, Trainer, TrainerCallback, TrainerState, TrainingArguments
from etude.callbacks import CallbackHandler, DefaultFlowCallback, ExportableState
from etude.errors import CheckpointError, ConfigError
from short_run import Scripted, checkpoints, logged, short_trainer
from tiny import language_rows, tiny_bert, tiny_llama, tiny_tokenizer, with_lora

FOR_THE_BEST: dict[str, Any] = {
    "eval_rows": language_rows(4),
    "eval_strategy": "steps",
    "eval_steps": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "load_best_model_at_end": True,
    "max_steps": 4,
}


# -- special tokens ----------------------------------------------------------------------------------------------------


def with_new_end() -> Any:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|end of turn|>", "pad_token": "<|end of turn|>"})
    return tokenizer


def test_special_tokens_of_the_tokenizer_reach_the_model_when_training_begins() -> None:
    """A turn that ends with a token of its own must end what is generated, in evaluations and after saving."""
    tokenizer, model = with_new_end(), tiny_llama()
    model.resize_token_embeddings(len(tokenizer))
    trainer = short_trainer(with_lora(model, target_modules=["q_proj"]), processing_class=tokenizer, max_steps=1)
    assert model.config.eos_token_id != tokenizer.eos_token_id
    trainer.train()
    assert (model.config.eos_token_id, model.config.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    ends = model.generation_config.eos_token_id
    assert tokenizer.eos_token_id in (ends if isinstance(ends, list) else [ends])


def test_a_decoder_classifies_padded_batches_without_being_told_its_padding() -> None:
    """Its head looks for the last token that is none; without the id it refuses more than one row at a time."""
    config = transformers.LlamaConfig(
        **{**tiny_llama().config.to_dict(), "num_labels": 2, "pad_token_id": None, "architectures": None}
    )
    model = transformers.LlamaForSequenceClassification(config)
    rows = [{"input_ids": list(range(5, 5 + n)), "attention_mask": [1] * n, "labels": n % 2} for n in (3, 5, 4, 6)]
    trainer = Trainer(
        with_lora(model, task_type="SEQ_CLS", target_modules=["q_proj"]),
        TrainingArguments("out", max_steps=1, per_device_train_batch_size=4, use_cpu=True, save_strategy="no"),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
    )
    assert trainer.train().global_step == 1


# -- callbacks ---------------------------------------------------------------------------------------------------------


class Labelled(TrainerCallback, ExportableState):
    def __init__(self, label: str = "unlabelled") -> None:
        self.label = label

    def state(self) -> dict[str, Any]:
        return {"args": {"label": self.label}, "attributes": {}}


def test_settings_of_callbacks_come_from_the_checkpoint_where_that_is_asked_for() -> None:
    stopper = EarlyStoppingCallback(early_stopping_patience=5, early_stopping_threshold=0.25)
    short_trainer(callbacks=[stopper, Labelled("first"), Labelled("second")], **FOR_THE_BEST).train()

    def resumed(**settings: Any) -> list[Any]:
        given = [EarlyStoppingCallback(2), Labelled(), Labelled()]
        short_trainer(callbacks=given, **FOR_THE_BEST, **settings).train("out/checkpoint-2")
        return given

    stopper, *labelled = resumed(restore_callback_states_from_checkpoint=True)
    assert (stopper.early_stopping_patience, stopper.early_stopping_threshold) == (5, 0.25)
    assert [callback.label for callback in labelled] == ["first", "second"]
    stopper, *labelled = resumed()
    assert stopper.early_stopping_patience == 2
    assert [callback.label for callback in labelled] == ["unlabelled", "unlabelled"]


def test_the_request_to_stop_comes_from_the_checkpoint_where_that_is_asked_for() -> None:
    short_trainer(save_strategy="steps", save_steps=2, max_steps=2).train()
    for asked in (True, False):
        trainer = short_trainer(max_steps=2, restore_callback_states_from_checkpoint=asked)
        trainer.state = TrainerState.load_from_json("out/checkpoint-2/trainer_state.json")
        trainer._load_callback_state()
        assert trainer.control.should_training_stop is asked


def test_the_state_of_a_callback_that_is_gone_is_said() -> None:
    short_trainer(callbacks=[EarlyStoppingCallback(3)], **FOR_THE_BEST).train()
    trainer = short_trainer(**FOR_THE_BEST)
    trainer.train("out/checkpoint-2")
    assert [line for line in trainer.notices.lines if "EarlyStoppingCallback" in line]


def test_a_handler_without_the_default_flow_warns(caplog: pytest.LogCaptureFixture) -> None:
    CallbackHandler([Labelled()], None, None, None, None)
    assert "DefaultFlowCallback" in caplog.text
    caplog.clear()
    CallbackHandler([Labelled(), DefaultFlowCallback()], None, None, None, None)
    CallbackHandler([transformers.DefaultFlowCallback()], None, None, None, None)
    assert not caplog.text


def test_a_second_callback_of_a_class_warns_with_its_name(caplog: pytest.LogCaptureFixture) -> None:
    short_trainer(callbacks=[Labelled, Labelled])
    assert "Labelled" in caplog.text


# -- arguments ---------------------------------------------------------------------------------------------------------


def test_compilation_is_on_where_its_backend_or_mode_is_named() -> None:
    with pytest.warns(UserWarning, match="torch_compile_mode"):
        assert TrainingArguments(torch_compile_mode="reduce-overhead").torch_compile
    assert TrainingArguments(torch_compile_backend="inductor").torch_compile
    assert TrainingArguments(torch_compile=True).torch_compile_backend == "inductor"
    unasked = TrainingArguments()
    assert (unasked.torch_compile, unasked.torch_compile_backend) == (False, None)


def test_steps_between_releases_of_memory_are_never_a_ratio() -> None:
    assert TrainingArguments(torch_empty_cache_steps=2).torch_empty_cache_steps == 2
    with pytest.raises(ConfigError, match="torch_empty_cache_steps"):
        TrainingArguments(torch_empty_cache_steps=1.0)  # type: ignore[arg-type]


def test_a_kubeflow_job_hears_of_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBEFLOW_TRAINER_SERVER_URL", raising=False)
    assert TrainingArguments().report_to == []
    monkeypatch.setenv("KUBEFLOW_TRAINER_SERVER_URL", "https://127.0.0.1:1")
    assert TrainingArguments(report_to="none").report_to == ["kubeflow"]
    assert TrainingArguments(report_to=["kubeflow", "tensorboard"]).report_to == ["kubeflow", "tensorboard"]
    trainer = short_trainer()
    assert "KubeflowCallback" in trainer.callback_handler.callback_list


@pytest.fixture
def _verbosity_is_put_back() -> Iterator[None]:
    level = transformers.logging.get_verbosity()
    yield
    transformers.logging.set_verbosity(level)


@pytest.mark.usefixtures("_verbosity_is_put_back")
def test_the_log_level_is_that_of_transformers_too() -> None:
    transformers.logging.set_verbosity_warning()
    short_trainer()
    assert transformers.logging.get_verbosity() == logging.WARNING  # "passive" leaves it
    short_trainer(log_level="error")
    assert transformers.logging.get_verbosity() == logging.ERROR


def test_the_batch_size_in_use_can_be_read() -> None:
    assert short_trainer(per_device_train_batch_size=3)._train_batch_size == 3


# -- methods of five years ---------------------------------------------------------------------------------------------


def test_a_training_step_written_for_transformers_4_trains_alike() -> None:
    """It knows no number of items and divides by the accumulation itself; rows are equally long, so that this is right."""

    class Own(Trainer):
        def training_step(self, model: nn.Module, inputs: Any) -> torch.Tensor:
            model.train()
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                loss = self.compute_loss(model, inputs)
            assert not (self.use_apex or self.use_cpu_amp or self.is_tp_enabled)
            loss = loss / self.args.gradient_accumulation_steps
            self.accelerator.backward(loss)
            return loss.detach()

    rows = [
        {"input_ids": [4 + n, *range(5, 12)], "attention_mask": [1] * 8, "labels": [*range(4, 12)]} for n in range(8)
    ]
    losses = []
    for trainer_class in (Own, Trainer):
        trainer = short_trainer(rows=rows, trainer_class=trainer_class, gradient_accumulation_steps=2, max_steps=2)
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_an_evaluate_of_ones_own_over_the_evaluation_loop() -> None:
    """As question answering does it: outputs are kept without compute_metrics, and made into answers afterwards."""

    class Own(Trainer):
        def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> Any:
            self._memory_tracker.start()
            output = self.evaluation_loop(
                self.get_eval_dataloader(eval_dataset),
                description="Evaluation",
                prediction_loss_only=None,
                ignore_keys=ignore_keys,
                metric_key_prefix=metric_key_prefix,
            )
            metrics = {**(output.metrics or {}), "eval_answers": float(len(output.predictions))}
            self.log(metrics)
            self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
            self._memory_tracker.stop_and_update_metrics(metrics)
            return metrics

    settings: dict[str, Any] = {
        "eval_rows": language_rows(5),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "max_steps": 2,
    }
    own, plain = short_trainer(trainer_class=Own, **settings), short_trainer(**settings)
    own.train()
    plain.train()
    assert logged(own, "eval_loss") == pytest.approx(logged(plain, "eval_loss"), rel=1e-6)
    assert logged(own, "eval_answers") == [5.0, 5.0]


def test_what_only_the_main_process_does() -> None:
    accelerator = short_trainer().accelerator

    @accelerator.on_main_process
    def here(number: int) -> int:
        """Said once."""
        return number

    assert (here(2), here.__doc__) == (2, "Said once.")
    assert accelerator.on_local_main_process(here)(3) == 3
    assert (accelerator.multi_device, accelerator.is_fsdp2) == (False, False)
    assert short_trainer().gather_function(torch.ones(2)).tolist() == [1.0, 1.0]
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.tensor([-5.0, 0.5, 5.0])
    accelerator.clip_grad_value_([weight], 1.0)
    assert weight.grad.tolist() == [-1.0, 0.5, 1.0]


# -- the best checkpoint -----------------------------------------------------------------------------------------------

BEST_OF_FOUR: dict[str, Any] = {
    "eval_rows": language_rows(4),
    "eval_strategy": "steps",
    "eval_steps": 1,
    "max_steps": 4,
}


def test_the_best_is_that_of_the_loss_where_no_metric_is_named() -> None:
    trainer = short_trainer(save_strategy="best", **BEST_OF_FOUR)
    assert (trainer.args.metric_for_best_model, trainer.args.greater_is_better) == ("loss", False)
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert trainer.state.best_metric == min(losses)
    assert checkpoints() == [step for step, loss in enumerate(losses, 1) if loss == min(losses[:step])]


def test_the_newest_and_the_best_are_kept_with_a_limit_of_one() -> None:
    trainer = short_trainer(
        save_strategy="steps",
        save_steps=1,
        save_total_limit=1,
        metric_for_best_model="score",
        compute_metrics=Scripted(0.9, 0.8, 0.7, 0.6),
        **BEST_OF_FOUR,
    )
    trainer.train()
    assert (trainer.state.best_global_step, checkpoints()) == (1, [1, 4])


# -- counting ----------------------------------------------------------------------------------------------------------


def ids_alone(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}


def test_all_tokens_are_counted_where_nothing_says_which_are_padding() -> None:
    rows = [{"input_ids": [3, 4, 0, 0], "labels": 0}, {"input_ids": [3, 4, 5, 6], "labels": 1}]
    settings: dict[str, Any] = {"max_steps": 1, "include_num_input_tokens_seen": "non_padding", "collate": ids_alone}

    def trained(**given: Any) -> Any:
        model = with_lora(tiny_bert(pad_token_id=0), task_type="SEQ_CLS", target_modules=["query"])
        trainer = short_trainer(model, rows, **settings, **given)
        trainer.train()
        return trainer

    unknown = trained()
    assert unknown.state.num_input_tokens_seen == 8
    assert [line for line in unknown.notices.lines if "include_num_input_tokens_seen" in line]
    tokenizer = tiny_tokenizer()
    padding = sum(token == tokenizer.pad_token_id for row in rows for token in row["input_ids"])  # type: ignore[attr-defined]
    known = trained(processing_class=tokenizer)
    assert known.state.num_input_tokens_seen == 8 - padding
    assert not [line for line in known.notices.lines if "include_num_input_tokens_seen" in line]


# -- models that load themselves ---------------------------------------------------------------------------------------


class Remembering(nn.Module):
    """Keeps every sample that it has seen in a buffer that grows, and knows how to load one of another length."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: torch.Tensor
        self.register_buffer("seen", torch.empty(0))

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen = torch.cat([self.seen, x])
        return {"loss": ((self.weight * x - labels) ** 2).mean()}

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        self.seen = state_dict["seen"].clone()
        return super().load_state_dict(state_dict, *args, **kwargs)


def remembering(model: nn.Module, folder: str = "out", **settings: Any) -> Any:
    rows = [{"x": float(number), "labels": 1.0} for number in range(8)]
    arguments = {"per_device_train_batch_size": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    return Trainer(
        model,
        TrainingArguments(folder, use_cpu=True, disable_tqdm=True, **(arguments | settings)),  # type: ignore[arg-type]
        train_dataset=rows,
    )


def test_a_model_that_loads_itself_decides_what_fits_it() -> None:
    whole = Remembering()
    remembering(whole).train()
    again = Remembering()
    remembering(again, "again").train("out/checkpoint-2")
    assert again.seen.tolist() == whole.seen.tolist()
    assert len(again.seen) == 8


def test_what_such_a_model_does_not_take_is_an_error_with_the_file() -> None:
    class Renamed(Remembering):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(()))

    remembering(Remembering()).train()
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        remembering(Renamed(), "again").train("out/checkpoint-2")
