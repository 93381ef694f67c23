"""Every hook that subclasses override has its effect, with any signature that was ever valid."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.utils.data import DataLoader

import etude
from etude import Trainer
from short_run import checkpoints, logged, short_trainer
from tiny import Padded, adapter_of, assert_same_bits, classification_rows, language_rows, tiny_bert, with_lora

SHORT: dict[str, Any] = {"max_steps": 2, "gradient_accumulation_steps": 2}


def trained(trainer_class: Any, **settings: Any) -> Any:
    trainer = short_trainer(trainer_class=trainer_class, **(SHORT | settings))
    trainer.train()
    return trainer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return trained(Trainer, output_dir=str(tmp_path_factory.mktemp("plain")))


class Called:
    """A mixin that notes which hooks were called, in order."""

    calls: ClassVar[list[str]] = []

    def note(self, name: str) -> None:
        self.calls.append(name)


def noting(*names: str) -> Any:
    """A Trainer that notes each call of `names` and goes on as usual."""

    def noted(name: str) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return getattr(super(NotingTrainer, self), name)(*args, **kwargs)

        return method

    NotingTrainer = type("NotingTrainer", (Trainer,), {name: noted(name) for name in names})
    NotingTrainer.calls = []
    return NotingTrainer


def test_hooks_are_called_in_the_order_of_transformers() -> None:
    names = (
        *("create_accelerator_and_postprocess", "get_train_dataloader", "_get_train_sampler", "create_optimizer"),
        *("create_scheduler", "get_batch_samples", "_get_num_items_in_batch", "training_step", "_prepare_inputs"),
        *("compute_loss", "_clip_grad_norm", "_get_grad_norm", "_get_learning_rate", "_maybe_log_save_evaluate"),
        *("log", "_evaluate", "evaluate", "get_eval_dataloader", "evaluation_loop", "_report_to_hp_search"),
        *("_determine_best_metric", "_save_checkpoint", "save_model", "_save", "_save_optimizer_and_scheduler"),
        *("_save_scaler", "_save_rng_state"),
    )
    trainer_class = noting(*names)
    trainer = trained(
        trainer_class,
        max_steps=1,
        gradient_accumulation_steps=1,
        eval_rows=language_rows(2),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    first = list(dict.fromkeys(trainer.calls))
    in_order = [
        *("create_accelerator_and_postprocess", "get_train_dataloader", "_get_train_sampler", "create_optimizer"),
        *("create_scheduler", "get_batch_samples", "_get_num_items_in_batch", "training_step", "compute_loss"),
        *("_clip_grad_norm", "_get_grad_norm", "_get_learning_rate", "_maybe_log_save_evaluate", "log", "_evaluate"),
        *("evaluate", "get_eval_dataloader", "evaluation_loop", "_report_to_hp_search", "_determine_best_metric"),
        *(
            "_save_checkpoint",
            "save_model",
            "_save",
            "_save_optimizer_and_scheduler",
            "_save_scaler",
            "_save_rng_state",
        ),
    ]
    assert [name for name in first if name in in_order] == in_order
    assert set(first) == set(names)


class ClipsByValue(Trainer):
    def _clip_grad_norm(self, model: Any) -> None:
        torch.nn.utils.clip_grad_value_(model.parameters(), 1e-4)


class ReportsAnotherNorm(Trainer):
    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        return 3.0


class CountsDouble(Trainer):
    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> Any:
        return 2 * super()._get_num_items_in_batch(batch_samples, device)


class CountsNothing(Trainer):
    def _get_num_items_in_batch(self, batch_samples: Any, device: Any) -> None:
        return None


class FirstBatchTwice(Trainer):
    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: Any) -> Any:
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        return [batches[0]] * 2, self._get_num_items_in_batch([batches[0]] * 2, device)


class OldBatchSamples(Trainer):
    """The signature of 4.46 to 4.48."""

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int) -> Any:
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        return batches, sum((batch["labels"][:, 1:] != -100).sum() for batch in batches)


class OldSignatures(Trainer):
    """transformers 4.40: before num_items_in_batch, start_time, train_dataset and model."""

    def training_step(self, model: Any, inputs: Any) -> Any:
        return super().training_step(model, inputs)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def log(self, logs: dict[str, float]) -> None:
        super().log(logs | {"old": 1.0})

    def _save_checkpoint(self, model: Any, trial: Any, metrics: Any = None) -> None:
        super()._save_checkpoint(model, trial)

    def _maybe_log_save_evaluate(
        self, tr_loss: Any, grad_norm: Any, model: Any, trial: Any, epoch: Any, ignore_keys_for_eval: Any
    ) -> None:
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval)

    def _get_train_sampler(self) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def create_optimizer(self) -> Any:
        return super().create_optimizer()

    def create_scheduler(self, num_training_steps: int, optimizer: Any) -> Any:
        self.lr_scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=100)
        return self.lr_scheduler

    def evaluate(self, eval_dataset: Any = None) -> dict[str, float]:
        return super().evaluate(eval_dataset) | {"eval_own": 1.0}

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool) -> Any:
        return super().prediction_step(model, inputs, prediction_loss_only)

    def set_initial_training_values(self, args: Any, dataloader: Any, total_train_batch_size: int) -> Any:
        assert total_train_batch_size == 4
        return super().set_initial_training_values(args, dataloader, total_train_batch_size)


def test_clipping_by_value_is_what_the_update_sees() -> None:
    seen: list[float] = []

    class Watch(etude.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            seen.extend(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)

    trained(ClipsByValue, callbacks=[Watch()])
    assert max(seen) == pytest.approx(1e-4)


def test_the_reported_norm_is_the_one_that_is_returned(plain: Any) -> None:
    trainer = trained(ReportsAnotherNorm)
    assert logged(trainer, "grad_norm") == [3.0, 3.0]
    assert_same_bits(adapter_of(trainer.model), adapter_of(plain.model))


def test_the_loss_is_divided_by_the_number_that_is_returned(plain: Any) -> None:
    trainer = trained(CountsDouble)
    assert logged(trainer, "loss")[0] == pytest.approx(logged(plain, "loss")[0] / 2, rel=1e-5)
    assert logged(trainer, "grad_norm")[0] == pytest.approx(logged(plain, "grad_norm")[0] / 2, rel=1e-5)


def test_without_a_number_the_means_of_the_batches_are_averaged() -> None:
    trainer = trained(CountsNothing)
    batches = [batch for _, batch in zip(range(2), trainer.get_train_dataloader(), strict=False)]
    fresh = short_trainer()
    with torch.no_grad():
        expected = sum(float(fresh.model(**batch).loss) for batch in batches) / 2
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-5)


def test_the_batches_of_a_step_are_those_that_are_returned(plain: Any) -> None:
    trainer = trained(FirstBatchTwice)
    alone = trained(Trainer, gradient_accumulation_steps=1)
    assert logged(trainer, "loss")[0] == pytest.approx(logged(alone, "loss")[0], rel=1e-5)
    old = trained(OldBatchSamples)
    assert logged(old, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)


def test_signatures_of_4_40() -> None:
    trainer = trained(
        OldSignatures,
        eval_rows=language_rows(2),
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    assert logged(trainer, "old")[0] == 1.0
    assert logged(trainer, "learning_rate") == [5e-4, 5e-4]
    assert checkpoints() == [1, 2]


def test_a_loader_of_the_users_own() -> None:
    class Own(Trainer):
        def get_train_dataloader(self) -> Any:
            return DataLoader(language_rows(4, 9), batch_size=4, collate_fn=Padded(), shuffle=False)

    trainer = trained(Own, gradient_accumulation_steps=1)
    fresh = short_trainer()
    with torch.no_grad():
        expected = float(fresh.model(**Padded()(language_rows(4, 9))).loss)
    assert logged(trainer, "loss")[0] == pytest.approx(expected, rel=1e-5)


def test_what_a_save_writes() -> None:
    class Own(Trainer):
        def _save(self, output_dir: Any = None, state_dict: Any = None) -> None:
            super()._save(output_dir, state_dict)
            Path(output_dir, "mine.txt").write_text("kept", encoding="utf-8")

    trained(Own, save_strategy="steps", save_steps=2)
    assert Path("out/checkpoint-2/mine.txt").read_text(encoding="utf-8") == "kept"


def test_inputs_are_prepared_by_the_override(plain: Any) -> None:
    class Own(Trainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            prepared = super()._prepare_inputs(inputs)
            prepared["attention_mask"][:, 0] = 0  # the first token is not looked at
            return prepared

    trainer = trained(Own)
    assert trainer.path.name == "general"
    assert logged(trainer, "loss") != logged(plain, "loss")


def test_a_wrapped_model_is_the_one_that_is_called() -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.module, self.num_calls = model, 0

        def forward(self, **inputs: Any) -> Any:
            self.num_calls += 1
            return self.module(**inputs)

    class Own(Trainer):
        def _wrap_model(self, model: Any, training: bool = True, dataloader: Any = None) -> Any:
            return Wrapper(model)

    trainer = trained(Own)
    assert trainer.model_wrapped.num_calls == 4


@pytest.mark.parametrize("name", ["_inner_training_loop", "_run_epoch"])
def test_loops_of_the_peer_are_refused_by_name(name: str) -> None:
    own = type("Own", (Trainer,), {name: lambda self, *args, **kwargs: None})
    with pytest.raises(etude.errors.ConfigError, match=f"{name}: cannot be overridden"):
        short_trainer(trainer_class=own)


def test_fewer_steps_by_set_initial_training_values() -> None:
    class Own(Trainer):
        def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
            *others, _ = super().set_initial_training_values(args, dataloader)
            return (*others, 1)

    assert trained(Own).state.global_step == 1


class TestAccelerator:
    """What an overridden training_step, and other people's callbacks, find on `trainer.accelerator`."""

    def test_a_training_step_of_the_users_own(self, plain: Any) -> None:
        synced: list[bool] = []

        class Own(Trainer):
            def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
                model.train()
                inputs = self._prepare_inputs(inputs)
                with self.accelerator.autocast():
                    loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
                synced.append(self.accelerator.sync_gradients)
                self.accelerator.backward(loss)
                return loss.detach()

        trainer = trained(Own)
        assert logged(trainer, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
        assert synced == [False, True, False, True]

    def test_where_it_is_and_what_it_computes_in(self) -> None:
        accelerator = short_trainer(bf16=True).accelerator
        assert (accelerator.device.type, accelerator.num_processes, accelerator.process_index) == ("cpu", 1, 0)
        assert accelerator.is_main_process
        assert accelerator.is_local_main_process
        assert accelerator.mixed_precision == "bf16"
        assert accelerator.distributed_type == "NO"
        with accelerator.autocast():
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16

    def test_values_of_the_config(self) -> None:
        with pytest.warns(UserWarning, match="accelerator_config"):
            accelerator = short_trainer(accelerator_config={"split_batches": True}).accelerator
        assert accelerator.split_batches is True
        assert accelerator.even_batches is True
        with pytest.raises(AttributeError, match=r"trainer\.accelerator has no 'no_such_thing'"):
            _ = accelerator.no_such_thing

    def test_one_process_gathers_what_it_has(self, capsys: pytest.CaptureFixture[str]) -> None:
        trainer = short_trainer()
        accelerator, values = trainer.accelerator, {"a": torch.arange(3)}
        assert torch.equal(accelerator.gather_for_metrics(values)["a"], values["a"])
        assert accelerator.gather(torch.tensor(2)).item() == 2
        assert accelerator.reduce(torch.tensor(2.0)).item() == 2.0
        assert accelerator.unwrap_model(torch.nn.DataParallel(trainer.model)) is trainer.model
        assert accelerator.prepare(trainer.model, 3) == (trainer.model, 3)
        accelerator.wait_for_everyone()
        accelerator.print("said", "once")
        assert "said once\n" in capsys.readouterr().out


def test_names_that_others_read_on_a_trainer() -> None:
    trainer = short_trainer(label_smoothing_factor=0.1)
    assert trainer.label_smoother.epsilon == 0.1
    assert short_trainer().label_smoother is None
    assert (trainer.is_fsdp_enabled, trainer.is_deepspeed_enabled, trainer.deepspeed) == (False, False, None)
    assert (trainer.hp_name, trainer.hp_search_backend, trainer.hub_model_id) == (None, None, None)
    assert (trainer.is_model_parallel, trainer.place_model_on_device) == (False, True)
    assert (trainer.get_sp_size(), trainer.get_cp_size(), trainer.get_tp_size()) == (1, 1, 1)
    assert trainer.model_wrapped is trainer.model
    trainer.end()


def test_every_method_of_transformers_is_there() -> None:
    import transformers

    expected = {name for name in vars(transformers.Trainer) if callable(getattr(transformers.Trainer, name))}
    inner = {  # steps of the peer's own loop, DTensor plumbing and Ray; none of them in the list of documented hooks
        *("_build_accelerator_args", "_defer_fsdp_gradient_reduction", "_finalize_training", "_finish_current_push"),
        *("_has_mixed_mesh_grads", "_init_training_state", "_inner_training_loop", "_issue_warnings_after_load"),
        *("_mixed_mesh_grad_norm", "_prepare_context_parallel_inputs", "_prepare_for_training", "_run_epoch"),
        *(
            "_sync_replicated_trainable_parameters",
            "_tune_save_checkpoint",
            "_update_auto_batch_size",
            "_validate_args",
        ),
    }
    assert expected - inner - set(dir(Trainer)) == set()


def test_uploads_are_refused_with_the_way_out() -> None:
    trainer = short_trainer()
    for upload in (trainer.init_hf_repo, trainer.push_to_hub):
        with pytest.raises(etude.errors.ConfigError, match="hf upload"):
            upload()


class TestReports:
    METRICS: ClassVar = {"train_loss": 1.23456, "train_runtime": 3723.456, "total_flos": 5 << 30, "epoch": 2.0,
                         "train_mem_cpu_alloc_delta": 3 << 20}  # fmt: skip

    def test_metrics_for_people(self, capsys: pytest.CaptureFixture[str]) -> None:
        trainer = short_trainer()
        assert trainer.metrics_format(self.METRICS) == {
            "train_loss": 1.2346,
            "train_runtime": "1:02:03.45",
            "total_flos": "5GF",
            "epoch": 2.0,
            "train_mem_cpu_alloc_delta": "3MB",
        }
        trainer.log_metrics("train", self.METRICS)
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "***** train metrics *****"
        assert "  train_runtime             = 1:02:03.45" in lines

    def test_metrics_for_files(self) -> None:
        import json

        trainer = short_trainer()
        trainer.save_metrics("train", {"train_loss": 1.0})
        trainer.save_metrics("eval", {"eval_loss": 2.0})
        trainer.save_metrics("test", {"test_loss": 3.0}, combined=False)
        read = lambda name: json.loads(Path("out", name).read_text(encoding="utf-8"))  # noqa: E731
        assert read("all_results.json") == {"train_loss": 1.0, "eval_loss": 2.0}
        assert read("test_results.json") == {"test_loss": 3.0}

    def test_the_state_and_the_groups(self, plain: Any) -> None:
        plain.save_state()
        assert etude.TrainerState.load_from_json(Path(plain.args.output_dir, "trainer_state.json")).global_step == 2
        name, parameter = next((n, p) for n, p in plain.model.named_parameters() if p.requires_grad)
        assert any(member is parameter for member in plain.get_optimizer_group(parameter)["params"])
        assert plain.get_optimizer_group(name) is plain.get_optimizer_group(parameter)
        assert len(plain.get_optimizer_group()) == len(plain.get_learning_rates()) == 2
        with pytest.raises(etude.errors.ConfigError, match="create_optimizer"):
            short_trainer().get_learning_rates()


def test_an_overridden_loss_is_told_the_items_only_where_transformers_tells_them() -> None:
    told: dict[str, Any] = {}

    class Own(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            told[type(model.get_base_model()).__name__] = num_items_in_batch
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    trained(Own)
    assert told["LlamaForCausalLM"] is not None
    model = with_lora(tiny_bert(), task_type="SEQ_CLS", target_modules=["query"])
    trainer = short_trainer(model, classification_rows(8), trainer_class=Own, **SHORT)
    trainer.model_accepts_loss_kwargs = False  # as trainers of other packages say it
    trainer.train()
    assert told["BertForSequenceClassification"] is None


class TestWithoutTraining:
    """Methods that scripts call on a trainer that has not trained."""

    def test_a_training_step_and_a_prediction_step(self) -> None:
        trainer = short_trainer()
        batch = next(iter(trainer.get_train_dataloader()))
        items = (batch["labels"][:, 1:] != -100).sum()
        loss = trainer.training_step(trainer.model, dict(batch), items)
        assert any(parameter.grad is not None for parameter in trainer.model.parameters())
        assert torch.isclose(trainer.prediction_step(trainer.model, batch, True)[0], loss, rtol=1e-5)
        norm = trainer._get_grad_norm(trainer.model)
        trainer.args.max_grad_norm = float(norm) / 2
        assert torch.isclose(trainer._clip_grad_norm(trainer.model), norm)
        assert torch.isclose(trainer._get_grad_norm(trainer.model), norm / 2, rtol=1e-4)

    def test_loaders_know_their_batch_size_and_dataset(self) -> None:
        rows, eval_rows = language_rows(9), {"a": language_rows(3), "b": language_rows(4)}
        trainer = short_trainer(rows=rows, eval_rows=eval_rows, dataloader_drop_last=True, per_device_eval_batch_size=2)
        loader = trainer.get_train_dataloader()
        assert (loader.total_batch_size, len(loader)) == (2, 4)
        assert loader.dataset == rows
        assert trainer.get_eval_dataloader("a").dataset == eval_rows["a"] != trainer.get_eval_dataloader("b").dataset
        assert len(trainer.get_eval_dataloader("a")) == 1

    def test_persistent_workers_are_asked_again(self) -> None:
        trainer = short_trainer(
            eval_rows=language_rows(3), dataloader_persistent_workers=True, dataloader_num_workers=1
        )
        assert trainer.get_eval_dataloader() is trainer.get_eval_dataloader(trainer.eval_dataset)
        assert trainer.get_eval_dataloader(language_rows(2)) is not trainer.get_eval_dataloader()

    def test_the_callbacks_are_those_of_transformers(self) -> None:
        names = [type(callback).__name__ for callback in short_trainer(disable_tqdm=False).callback_handler.callbacks]
        assert names == ["DefaultFlowCallback", "ProgressCallback"]


class TestAcceleratorConfig:
    @pytest.fixture(autouse=True)
    def quiet(self) -> Any:
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield

    def test_from_a_file_and_from_accelerates_own_object(self, tmp_path: Path) -> None:
        from transformers.trainer_pt_utils import AcceleratorConfig

        (tmp_path / "config.json").write_text('{"even_batches": false}', encoding="utf-8")
        for given in (tmp_path / "config.json", AcceleratorConfig(even_batches=False), {"even_batches": False}):
            accelerator = short_trainer(accelerator_config=given).accelerator
            assert (accelerator.even_batches, accelerator.split_batches) == (False, False)
            assert "sync_each_batch" not in accelerator.gradient_state.plugin_kwargs

    def test_the_number_of_accumulated_batches(self) -> None:
        config = {"gradient_accumulation_kwargs": {"num_steps": 3}}
        assert short_trainer(accelerator_config=config).args.gradient_accumulation_steps == 3
        with pytest.raises(ValueError, match="The `AcceleratorConfig`'s `num_steps` is set but"):
            short_trainer(accelerator_config=config, gradient_accumulation_steps=2)

    def test_a_class_and_a_state_that_is_not_there(self) -> None:
        from transformers.trainer_pt_utils import AcceleratorConfig

        with pytest.raises(NotImplementedError, match="Tried passing in a callable to `accelerator_config`"):
            etude.TrainingArguments(accelerator_config=AcceleratorConfig)


def test_predictions_are_kept_where_metrics_are_computed_batch_by_batch() -> None:
    trainer = short_trainer(
        batch_eval_metrics=True,
        compute_metrics=lambda prediction, compute_result: {"n": float(len(prediction.predictions))},
        per_device_eval_batch_size=2,
    )
    rows = language_rows(3, longest=4)
    predicted = trainer.predict(rows)
    assert predicted.predictions.shape[0] == predicted.label_ids.shape[0] == 3
    assert predicted.metrics["test_n"] == 1.0


def test_a_loss_function_of_the_user_is_told_the_items_of_an_evaluation() -> None:
    told: list[Any] = []

    def loss(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        told.append(num_items_in_batch)
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch

    rows = language_rows(5, 3)
    own, plain = short_trainer(compute_loss_func=loss), short_trainer()
    assert own.evaluate(rows)["eval_loss"] == pytest.approx(plain.evaluate(rows)["eval_loss"], rel=1e-5)
    assert None not in told
