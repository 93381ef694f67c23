"""`Trainer`: what a user constructs and may override. It composes a run and starts the loops."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from etude import loop
from etude.arguments import SaveStrategy, TrainingArguments
from etude.callbacks import CallbackHandler, ExportableState, TrainerControl, TrainerState
from etude.checkpoint import codec, transformers_files
from etude.checkpoint.resume import find_checkpoint
from etude.checkpoint.store import CheckpointStore
from etude.data.batching import StepBatches, count_items
from etude.data.collate import default_collator
from etude.data.columns import ColumnDroppingCollator, accepted_columns, drop_unused_columns
from etude.data.loader import TrainingStream, build_loader, has_length, is_streamed
from etude.data.order import EpochBatches, EpochSampler
from etude.errors import CheckpointError, ConfigError, DataError, Interrupted
from etude.evaluation import Kept, evaluate
from etude.interrupts import Interrupts
from etude.model import adapter
from etude.model import loss as model_loss
from etude.notices import Notices
from etude.observe.console import PrinterCallback, ProgressCallback
from etude.observe.jsonl import JsonlCallback
from etude.observe.trackers import tracker_callbacks
from etude.optim import create_optimizer, create_scheduler, decay_parameter_names, optimizer_class_and_kwargs
from etude.optim.gradient import Gradient
from etude.outputs import EvalLoopOutput, PredictionOutput, TrainOutput
from etude.precision import LossScaler, choose_precision, keep_trainable_in_float32
from etude.recovery import SaveAttempts, describe_run, restore_run, save_checkpoint, set_aside
from etude.run import Run, plan_run

REPLACES_FORWARD = (
    "compute_loss",
    "training_step",
    "compute_loss_context_manager",
    "_prepare_inputs",
    "_prepare_input",
)
"""Overriding one of these means that the user's code sees padded batches or the model's own outputs."""


class Trainer:
    """Trains the adapters of a PEFT model (or the trainable parameters of any module that returns a loss).

    Constructor, methods and overridable hooks are those of `transformers.Trainer`.

    Args:
        model: a `PeftModel`, a transformers model, or any `nn.Module` that returns a loss first.
        args: `TrainingArguments`, ours or transformers'.
        data_collator: list of rows -> batch; default as in transformers (padding by the tokenizer if there is one).
        train_dataset, eval_dataset: map-style, iterable, `datasets.Dataset` or a list; `eval_dataset` also a dict of them.
        processing_class: tokenizer or processor, saved with every checkpoint (`tokenizer=` is its old name).
        model_init: builds the model anew for each `train()`; takes no argument or the trial.
        compute_loss_func: (outputs, labels, num_items_in_batch) -> loss.
        compute_metrics: `EvalPrediction` -> dict of numbers.
        callbacks: instances or classes with any of the events of `TrainerCallback`.
        optimizers: (optimizer, lr_scheduler), either of them None.
        optimizer_cls_and_kwargs: instead of `args.optim`.
        preprocess_logits_for_metrics: (logits, labels) -> what is kept of the logits for `compute_metrics`.

    Raises:
        ConfigError, ModelError, DataError: for settings that cannot work, before anything is written.
    """

    loss_is_scaled_for_ga: bool | None = None

    def __init__(
        self,
        model: nn.Module | None = None,
        args: TrainingArguments | Any = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        model_init: Callable[..., nn.Module] | None = None,
        compute_loss_func: Callable[..., torch.Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        *,
        tokenizer: Any = None,
    ) -> None:
        self.args = _own_arguments(args)
        processing_class = processing_class if processing_class is not None else tokenizer
        _refuse_contradictions(self, model, model_init, optimizers, optimizer_cls_and_kwargs, eval_dataset)
        _seed_everything(self.args)
        self.model_init = model_init
        self.notices = Notices(quiet=not self.args.should_log or self.args.log_level in ("error", "critical"))
        self.model = model if model is not None else self.call_model_init()
        self.model_wrapped = self.model
        self.processing_class = processing_class
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.data_collator = data_collator if data_collator is not None else default_collator(processing_class)
        self.compute_loss_func, self.compute_metrics = compute_loss_func, compute_metrics
        self.preprocess_logits_for_metrics = preprocess_logits_for_metrics
        self.optimizer, self.lr_scheduler = optimizers
        self._given_scheduler = optimizers[1] is not None
        self._given_optimizer = optimizers[0] is not None
        self.optimizer_cls_and_kwargs = optimizer_cls_and_kwargs
        self.precision = choose_precision(fp16=self.args.fp16, bf16=self.args.bf16, device=self.args.device)
        self.is_model_parallel = len(set((getattr(self.model, "hf_device_map", None) or {}).values())) > 1
        self.place_model_on_device = self.args.place_model_on_device and not self.is_model_parallel
        if self.place_model_on_device and not _is_quantized(self.model):
            self._move_model_to_device(self.model, self.args.device)
        self._inspect_model()
        self.path: Any = None
        self.cut: dict[str, Any] = {}
        self.run_record: dict[str, Any] = {}
        self.is_in_train = False
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        self.current_flos, self._flops_per_token = 0.0, 0
        self._run: Run | None = None
        self._save_attempts = SaveAttempts()
        self._signature_columns: list[str] | None = None
        self._tr_loss = torch.zeros((), device=self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged = 0.0, 0
        self.control = TrainerControl()
        self.callback_handler = CallbackHandler(
            [*_default_callbacks(self.args), *(callbacks or [])],
            self.model,
            processing_class,
            self.optimizer,
            self.lr_scheduler,
        )
        self.add_callback(_console_callback(self.args))
        self.state = self._fresh_state()
        self.control = self.callback_handler.on_init_end(self.args, self.state, self.control)

    # -- what the model is ---------------------------------------------------------------------------------------------

    def _inspect_model(self) -> None:
        from transformers.utils import can_return_loss, find_labels

        model_class = type(model_loss.unwrapped(self.model))
        self.can_return_loss = can_return_loss(model_class)
        names = self.args.label_names if self.args.label_names is not None else find_labels(model_class)
        self.label_names = list(names) or (["labels"] if self.args.label_names is None else [])
        self.model_accepts_loss_kwargs = model_loss.accepts_loss_kwargs(self.model)
        self.shifts_labels = model_loss.shifts_labels(self.model)
        self._divides_by_items: bool | None = None if self.model_accepts_loss_kwargs else False
        self.overridden = tuple(name for name in REPLACES_FORWARD if _is_overridden(self, name))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        assert self.model_init is not None
        takes_trial = len(inspect.signature(self.model_init).parameters) > 0
        model = self.model_init(trial) if takes_trial else self.model_init()
        if model is None:
            raise ConfigError("returned None instead of a model", field="model_init")
        return model

    def _move_model_to_device(self, model: nn.Module, device: torch.device) -> None:
        model.to(device)

    @property
    def tokenizer(self) -> Any:
        """The old name of `processing_class`."""
        return self.processing_class

    @property
    def schedule_follows_metric(self) -> bool:
        """Whether the learning rate is stepped at evaluations, not at updates."""
        return isinstance(self.lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or (
            type(self.lr_scheduler).__name__ == "GreedyLR"
        )

    # -- training ------------------------------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
        **old_names: Any,
    ) -> TrainOutput:
        """Train, from the beginning or from a checkpoint.

        Args:
            resume_from_checkpoint: a checkpoint folder; True for the newest valid one in `output_dir` (there must be
                one); "auto" for the newest valid one, or the beginning where there is none. None takes
                `args.resume_from_checkpoint`.

        Raises:
            CheckpointError: the checkpoint is missing, damaged, or of another adapter, base model or dataset.
            NonFiniteError: loss or gradient became NaN or infinite; the weights are those before the step.
            Interrupted: a signal stopped the run; its checkpoint is written.
        """
        if "model_path" in old_names:
            resume_from_checkpoint = resume_from_checkpoint or old_names.pop("model_path")
        if old_names:
            raise TypeError(f"train() got an unexpected keyword argument '{next(iter(old_names))}'")
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        with ExitStack() as until_the_end:
            self.is_in_train = True
            until_the_end.callback(setattr, self, "is_in_train", False)
            run = self._build_run(resume_from_checkpoint, trial, ignore_keys_for_eval, until_the_end)
            self._introduce(run)
            output = loop.train(run)
            if run.interrupts.requested is not None:
                name = run.interrupts.requested.name
                raise Interrupted(
                    f"{name} came when training had finished",
                    exit_code=run.interrupts.exit_code,
                    step=output.global_step,
                )
            return output

    def _build_run(
        self, resume: str | bool | None, trial: Any, ignore_keys: list[str] | None, until_the_end: ExitStack
    ) -> Run:
        """Everything that can be wrong is checked here, before the first step and before anything is written."""
        args = self.args
        if self.model_init is not None:
            _seed_everything(args)
            self.model = self.model_wrapped = self.call_model_init(trial)
            self.optimizer = self.lr_scheduler = None
            self._move_model_to_device(self.model, args.device)
            self._inspect_model()
        if self.train_dataset is None and not _is_overridden(self, "get_train_dataloader"):
            raise DataError("the trainer has no train_dataset")
        adapter.require_trainable(self.model)
        if self.precision.autocast_dtype is not None:
            keep_trainable_in_float32(self.model)
        _use_settings_for_training(self.model, args, until_the_end)
        loader = self.get_train_dataloader()
        plan = plan_run(args, loader, self.num_examples(loader))
        interrupts = until_the_end.enter_context(Interrupts(Path(self._get_output_dir(trial))))
        store = CheckpointStore(self._get_output_dir(trial))
        until_the_end.enter_context(store.lock())
        checkpoint = find_checkpoint(store, resume, self.notices.say)

        self.state = self._fresh_state()
        self.state.is_hyper_param_search = trial is not None
        self.state.compute_steps(args, plan.max_steps)
        self.state.init_training_references(self, plan.max_steps, plan.num_epochs, trial)
        self.control._new_training()
        self._tr_loss = torch.zeros((), device=args.device)
        self._total_loss_scalar, self._globalstep_last_logged = 0.0, 0
        self.create_optimizer_and_scheduler(plan.max_steps)
        self.run_record = describe_run(self)
        self.cut = {
            "micro_batch_samples": args.train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
            "precision": self.precision.name,
        }
        seed = args.data_seed if args.data_seed is not None else args.seed
        batches = StepBatches(
            TrainingStream(loader, seed),
            accumulation=args.gradient_accumulation_steps,
            shifts_labels=self.shifts_labels,
        )
        scaler = self.precision.build_scaler()
        run = Run(
            self,
            plan,
            batches,
            self._build_gradient(batches, scaler),
            scaler,
            interrupts,
            trial=trial,
            ignore_keys_for_eval=ignore_keys,
        )
        self._run = run
        if checkpoint is not None:
            restore_run(self, run, checkpoint)
        if args.save_strategy != "no":
            set_aside(self, store, checkpoint)
        handler = self.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, self.optimizer, self.lr_scheduler
        handler.train_dataloader = loader
        return run

    def _build_gradient(self, batches: StepBatches, scaler: LossScaler) -> Gradient:
        args = self.args
        return Gradient(
            self.model,
            [parameter for group in self.optimizer.param_groups for parameter in group["params"]],
            lambda micro_batch, num_items: cast(Run, self._run).forward_backward(micro_batch, num_items),
            device=args.device,
            scaler=scaler,
            optimizer=self.optimizer,
            max_norm=args.max_grad_norm,
            stops_on_nonfinite=args.on_nonfinite == "stop" and not self._filters_nonfinite_by_request(),
            rows_of=batches.rows_of,
        )

    def _filters_nonfinite_by_request(self) -> bool:
        return "logging_nan_inf_filter" in self.args.explicit and bool(self.args.logging_nan_inf_filter)

    def _introduce(self, run: Run) -> None:
        """The few lines that say what will happen."""
        args, plan = self.args, run.plan
        trainable, total = adapter.count_parameters(self.model)
        self.notices.say(f"trains {trainable:,} of {total:,} parameters ({trainable / max(total, 1):.2%})")
        batch = args.train_batch_size * args.gradient_accumulation_steps
        self.notices.say(
            f"{plan.max_steps:,} steps of {batch} samples ({args.train_batch_size} x {args.gradient_accumulation_steps} "
            f"accumulated), {self.precision.name} on {args.device}, checkpoints in {args.output_dir}"
        )
        if self.precision.note:
            self.notices.say(self.precision.note)

    def run_training_step(self, inputs: Any, num_items: int | None) -> torch.Tensor:
        """One micro-batch through `training_step`, on the path decided on the first one."""
        if self.path is None:
            self._choose_path(inputs)
        share: torch.Tensor = self.call_hook(
            self.training_step, self.model_wrapped, inputs, num_items_in_batch=self._items_tensor(num_items)
        )
        return share

    def _items_tensor(self, num_items: int | None) -> torch.Tensor | int | None:
        return num_items if num_items is None else torch.tensor(num_items, device=self.args.device)

    def _choose_path(self, inputs: Any) -> None:
        from etude.model.paths import choose_path

        overridden = self.overridden + (("compute_loss_func",) if self.compute_loss_func is not None else ())
        overridden += ("label_smoothing_factor",) if self.args.label_smoothing_factor else ()
        on_device = self._prepare_inputs(inputs)
        self.path = choose_path(
            self.model,
            fast_path=self.args.fast_path,
            overridden=overridden,
            sample_inputs=on_device if isinstance(on_device, Mapping) else {},
            training_dtype=self.precision.autocast_dtype,
        )
        self.cut["path"] = self.path.name
        self.notices.say(f"{self.path.name} path: {'; '.join(self.path.reasons)}")
        if self.path.name == "general" and self._divides_by_items is None:
            self._divides_by_items = model_loss.divides_by_num_items(self.model, on_device, self.precision.autocast())

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its share of the step's loss, detached."""
        model.train()
        for_training = getattr(self.optimizer, "train", None)
        if callable(for_training):
            for_training()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            if self.path is not None and self.path.name == "packed" and num_items_in_batch is not None:
                loss = self.path.loss(model, inputs, num_items_in_batch)
            else:
                loss = self._general_loss(model, inputs, num_items_in_batch)
        assert self._run is not None
        self._run.scaler.scale(loss).backward()
        if self.args.torch_empty_cache_steps and self.state.global_step % self.args.torch_empty_cache_steps == 0:
            _empty_device_cache(self.args.device)
        return loss.detach()

    def _general_loss(self, model: nn.Module, inputs: Any, num_items: Any) -> torch.Tensor:
        loss: torch.Tensor = self.call_hook(self.compute_loss, model, inputs, num_items_in_batch=num_items)
        if "compute_loss" not in self.overridden:
            return loss if num_items is not None else loss / self.current_gradient_accumulation_steps
        is_scaled = self.loss_is_scaled_for_ga
        if is_scaled is None:
            sees_items = _accepts(self.compute_loss, "num_items_in_batch")
            is_scaled = self.model_accepts_loss_kwargs and num_items is not None and sees_items
        return loss if is_scaled else loss / self.current_gradient_accumulation_steps

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch: its mean, or with `num_items_in_batch` its sum over items divided by that number."""
        labels = None
        own_loss = self.args.label_smoothing_factor != 0 or self.compute_loss_func is not None
        num_items = count_items(inputs, shifts_labels=self.shifts_labels)
        if own_loss and isinstance(inputs, Mapping) and "labels" in inputs:
            labels = inputs["labels"]
            inputs = {key: value for key, value in inputs.items() if key != "labels"}
        extra = {}
        if num_items_in_batch is not None and self.model_accepts_loss_kwargs and self._divides_by_items is not False:
            extra["num_items_in_batch"] = num_items_in_batch
        outputs = model(**inputs, **extra) if isinstance(inputs, Mapping) else model(*_as_tuple(inputs))
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        elif labels is not None:
            loss = model_loss.smoothed_loss(
                outputs,
                labels,
                epsilon=self.args.label_smoothing_factor,
                shift=self.shifts_labels,
                num_items=num_items_in_batch,
            )
        else:
            loss = model_loss.read_loss(outputs)
            if num_items_in_batch is not None and not extra and num_items is not None:
                loss = loss * (num_items / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        return self.autocast_smart_context_manager()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        return self.precision.autocast()

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Tensors of a batch, however nested, on the device of the run."""
        prepared = self._prepare_input(inputs)
        if isinstance(prepared, Mapping) and len(prepared) == 0:
            raise DataError(
                "the collator returned an empty batch: none of the dataset's columns is an argument of the model's "
                f"forward, which takes {', '.join(self._signature_columns or [])}"
            )
        return prepared

    def _prepare_input(self, data: Any) -> Any:
        if torch.is_tensor(data):
            return data.to(self.args.device, non_blocking=True)
        if isinstance(data, Mapping):
            return type(data)({key: self._prepare_input(value) for key, value in data.items()})  # type: ignore[call-arg]
        if isinstance(data, (tuple, list)):
            return type(data)(self._prepare_input(value) for value in data)
        return data

    # -- optimizer and schedule ----------------------------------------------------------------------------------------

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        if not self._given_scheduler:
            self.lr_scheduler = None
        if not self._given_optimizer:
            self.optimizer = None
        self.create_optimizer()
        self.create_scheduler(num_training_steps=num_training_steps)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            given = self.optimizer_cls_and_kwargs
            if given is None and _is_overridden(self, "get_optimizer_cls_and_kwargs"):
                given = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = create_optimizer(model, self.args, given, self.get_decay_parameter_names(model))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = create_scheduler(
                self.args.lr_scheduler_type,
                self.optimizer if optimizer is None else optimizer,
                self.args.get_warmup_steps(num_training_steps),
                num_training_steps,
                self.args.lr_scheduler_kwargs,
            )
        return self.lr_scheduler

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        return optimizer_class_and_kwargs(args)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decay_parameter_names(model)

    def get_learning_rates(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_num_trainable_parameters(self) -> int:
        return adapter.count_parameters(self.model)[0]

    def _get_learning_rate(self) -> float:
        """The learning rate in force: that of the first parameter group."""
        rate = self.optimizer.param_groups[0]["lr"]
        return float(rate)

    # -- data ----------------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> Any:
        if self.train_dataset is None:
            raise DataError("the trainer has no train_dataset")
        sampler = None if is_streamed(self.train_dataset) else self._train_sampler()
        return self._build_loader(
            self.train_dataset,
            sampler,
            self.args.train_batch_size,
            "training",
            drop_last=self.args.dataloader_drop_last,
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        if isinstance(eval_dataset, str):
            eval_dataset = self.eval_dataset[eval_dataset]
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise DataError("evaluation needs an eval_dataset: give one to the trainer or to evaluate()")
        return self._evaluation_loader(dataset, "evaluation")

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        return self._evaluation_loader(test_dataset, "test")

    def _evaluation_loader(self, dataset: Any, description: str) -> Any:
        sampler = None if is_streamed(dataset) else self._get_eval_sampler(dataset)
        return self._build_loader(dataset, sampler, self.args.eval_batch_size, description, drop_last=False)

    def _build_loader(self, dataset: Any, sampler: Any, batch_size: int, description: str, *, drop_last: bool) -> Any:
        args = self.args
        dataset, collator = self._without_unused_columns(dataset, description)
        return build_loader(
            dataset,
            batches=None if sampler is None else EpochBatches(sampler, batch_size, drop_last),
            batch_size=batch_size,
            collator=collator,
            seed=args.data_seed if args.data_seed is not None else args.seed,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            drop_last=drop_last,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            in_order=args.dataloader_in_order,
        )

    def _train_sampler(self) -> Any:
        sampler = self.call_hook(self._get_train_sampler, train_dataset=self.train_dataset)
        return sampler if sampler is not None else EpochSampler(len(self.train_dataset), strategy="sequential", seed=0)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if dataset is None or not has_length(dataset):
            return None
        strategy = self.args.train_sampling_strategy
        return EpochSampler(
            len(dataset),
            strategy=strategy,
            seed=self.args.data_seed if self.args.data_seed is not None else self.args.seed,
            lengths=sample_lengths(dataset, self.args.length_column_name) if strategy == "group_by_length" else None,
            group_size=self.args.train_batch_size * self.args.gradient_accumulation_steps,
        )

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return EpochSampler(len(eval_dataset), strategy="sequential", seed=0) if has_length(eval_dataset) else None

    def _set_signature_columns_if_needed(self) -> None:
        if self._signature_columns is None:
            self._signature_columns = accepted_columns(self.model, self.label_names)

    def _without_unused_columns(self, dataset: Any, description: str) -> tuple[Any, Any]:
        if not self.args.remove_unused_columns:
            return dataset, self.data_collator
        if hasattr(dataset, "column_names") and hasattr(dataset, "remove_columns") and dataset.column_names:
            return self._remove_unused_columns(dataset, description=description), self.data_collator
        return dataset, self._get_collator_with_removed_columns(self.data_collator, description=description)

    def _remove_unused_columns(self, dataset: Any, description: str | None = None) -> Any:
        self._set_signature_columns_if_needed()
        return drop_unused_columns(dataset, self._signature_columns or [])

    def _get_collator_with_removed_columns(self, data_collator: Any, description: str | None = None) -> Any:
        self._set_signature_columns_if_needed()
        return ColumnDroppingCollator(data_collator, self._signature_columns or [])

    def num_examples(self, dataloader: Any) -> int | None:
        """The number of samples behind a loader; None for a stream."""
        dataset = getattr(dataloader, "dataset", None)
        return len(dataset) if has_length(dataset) else None

    def get_total_train_batch_size(self, args: TrainingArguments) -> int:
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size

    # -- during training -----------------------------------------------------------------------------------------------

    def add_training_loss(self, loss: torch.Tensor) -> None:
        if self.args.on_nonfinite == "continue" or self._filters_nonfinite_by_request():
            since = 1 + self.state.global_step - self._globalstep_last_logged
            loss = (
                torch.where(loss.isfinite(), loss, self._tr_loss / since) if self.args.logging_nan_inf_filter else loss
            )
        self._tr_loss += loss.to(self._tr_loss.device)

    def count_work(self, inputs: Any) -> None:
        """Floating-point operations and input tokens of one micro-batch, for the summary."""
        self.current_flos += self.floating_point_ops(inputs)
        self._track_num_input_tokens(inputs)

    def floating_point_ops(self, inputs: Any) -> float:
        """6 x input elements x parameters, transformers' estimate of one forward and backward."""
        base = model_loss.unwrapped(self.model)
        tokens = inputs.get(getattr(base, "main_input_name", "input_ids")) if isinstance(inputs, Mapping) else None
        if not torch.is_tensor(tokens) or not hasattr(base, "num_parameters"):
            return 0.0
        self._flops_per_token = self._flops_per_token or 6 * base.num_parameters(exclude_embeddings=True)
        return float(self._flops_per_token * tokens.numel())

    def store_flos(self) -> None:
        self.state.total_flos += self.current_flos
        self.current_flos = 0.0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        kind = self.args.include_num_input_tokens_seen
        if kind == "no" or not isinstance(inputs, Mapping):
            return
        tokens = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        mask = inputs.get("attention_mask")
        if torch.is_tensor(mask) and kind == "non_padding":
            self.state.num_input_tokens_seen += int(mask.sum())
        elif torch.is_tensor(tokens):
            self.state.num_input_tokens_seen += tokens.numel()

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: Any,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float,
        learning_rate: float | None = None,
    ) -> None:
        """After a step or an epoch: log, evaluate and save where the control flags ask for it."""
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            loss_sum = float(tr_loss)
            tr_loss.zero_()
            logs = {"loss": loss_sum / (self.state.global_step - self._globalstep_last_logged)}
            if grad_norm is not None:
                logs["grad_norm"] = float(grad_norm)
            logs["learning_rate"] = learning_rate if learning_rate is not None else self._get_learning_rate()
            self._total_loss_scalar += loss_sum
            self._globalstep_last_logged = self.state.global_step
            self.store_flos()
            self.call_hook(self.log, logs, start_time=start_time)
        if self.control.should_evaluate:
            metrics = self.call_hook(self._evaluate, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)
            is_best = self.call_hook(self._determine_best_metric, metrics=metrics, trial=trial)
            if self.args.save_strategy == SaveStrategy.BEST:
                self.control.should_save = is_best
            elif is_best and self._keeps_every_best():
                self.control.should_save = True
        if self.control.should_save:
            self._try_to_save(model, trial)

    def _keeps_every_best(self) -> bool:
        """Whoever names the metric of the best model wants that model, also between two regular saves."""
        asked = "metric_for_best_model" in self.args.explicit or self.args.load_best_model_at_end
        return asked and self.args.save_strategy != "no"

    def _try_to_save(self, model: nn.Module, trial: Any) -> None:
        try:
            self.call_hook(self._save_checkpoint, model, trial=trial)
        except CheckpointError as error:
            is_final = self.state.global_step >= self.state.max_steps or self.control.should_training_stop
            self._save_attempts.failed(error, is_final=is_final, say=self.notices.say)
            self.control.should_save = False
            return
        self._save_attempts.succeeded()
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the epoch, append to `state.log_history` and tell the callbacks."""
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)

    def finish_training(self, run: Run) -> TrainOutput:
        """The summary of the run, the best model where it was asked for, and the last event."""
        total = self._total_loss_scalar + float(self._tr_loss)
        mean_loss = total / max(self.state.global_step, 1)
        steps = self.state.global_step - run.initial_global_step
        samples = run.plan.num_samples * steps / max(self.state.max_steps, 1)
        metrics = speed_metrics("train", time.time() - run.start_time, samples, steps)
        self.store_flos()
        metrics |= {"total_flos": self.state.total_flos, "train_loss": mean_loss}
        self.call_hook(self.log, metrics)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, mean_loss, metrics)

    # -- evaluation ----------------------------------------------------------------------------------------------------

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss (weighted by items) and metrics of an evaluation set, or of each of several (`{prefix}_{name}_...`)."""
        override = eval_dataset is not None
        dataset = eval_dataset if override else self.eval_dataset
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part if override else name, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        started = time.time()
        loader = self.get_eval_dataloader(dataset if override or isinstance(dataset, str) else None)
        loss_only = True if self.compute_metrics is None else None
        output = self.evaluation_loop(loader, "Evaluation", loss_only, ignore_keys, metric_key_prefix)
        metrics = output.metrics or {}
        metrics |= self._evaluation_speed(metric_key_prefix, started, output)
        self.call_hook(self.log, metrics)
        if self.is_in_train and self.state.best_metric is None:
            self.state.best_metric = -math.inf if self.args.greater_is_better else math.inf
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Outputs, labels and metrics of a test set."""
        started = time.time()
        loader = self.get_test_dataloader(test_dataset)
        output = self.evaluation_loop(
            loader, description="Prediction", ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix
        )
        metrics = (output.metrics or {}) | self._evaluation_speed(metric_key_prefix, started, output)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(output.predictions, output.label_ids, metrics)

    def _evaluation_speed(self, prefix: str, started: float, output: EvalLoopOutput) -> dict[str, float]:
        samples = output.num_samples or 0
        return speed_metrics(prefix, time.time() - started, samples, math.ceil(samples / self.args.eval_batch_size))

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        args, model = self.args, self.model_wrapped
        loss_only = prediction_loss_only if prediction_loss_only is not None else args.prediction_loss_only
        if not self.is_in_train and (args.fp16_full_eval or args.bf16_full_eval):
            model.to(dtype=torch.float16 if args.fp16_full_eval else torch.bfloat16)
        was_training = model.training
        model.eval()
        for_evaluation = getattr(self.optimizer, "eval", None)
        if callable(for_evaluation):
            for_evaluation()
        self.callback_handler.eval_dataloader = dataloader
        keep = Kept(
            self.compute_metrics,
            self.preprocess_logits_for_metrics,
            keeps_outputs=not loss_only and not (args.batch_eval_metrics and description != "Prediction"),
            include=args.include_for_metrics,
            main_input=getattr(self.model, "main_input_name", "input_ids"),
            by_batch=args.batch_eval_metrics,
            concatenate=args.eval_do_concat_batches,
            move_every=args.eval_accumulation_steps,
        )

        def on_batch() -> None:
            self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)

        def run_loop() -> EvalLoopOutput:
            return evaluate(
                dataloader,
                predict=lambda inputs: self.prediction_step(model, inputs, loss_only, ignore_keys=ignore_keys),
                count_items=lambda inputs: count_items(inputs, shifts_labels=self.shifts_labels),
                keep=keep,
                on_batch=on_batch,
            )

        if self.is_in_train and self._run is not None:
            with self._run.interrupts.stopping_at_once():
                output = run_loop()
        else:
            output = run_loop()
        model.train(was_training)
        metrics = {
            name if name.startswith(f"{metric_key_prefix}_") else f"{metric_key_prefix}_{name}": _plain_number(value)
            for name, value in (output.metrics or {}).items()
        }
        return EvalLoopOutput(output.predictions, output.label_ids, metrics, output.num_samples)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """(mean loss, outputs, labels) of one batch; each may be None."""
        is_mapping = isinstance(inputs, Mapping)
        has_labels = bool(self.label_names) and is_mapping and all(inputs.get(n) is not None for n in self.label_names)
        returns_loss = not self.label_names and is_mapping and inputs.get("return_loss", self.can_return_loss)
        inputs = self._prepare_inputs(inputs)
        if ignore_keys is None:
            config = getattr(self.model, "config", None)
            ignore_keys = list(getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])) if config else []
        labels = None
        if has_labels:
            parts = tuple(_detached(inputs.get(name)) for name in self.label_names)
            labels = parts[0] if len(parts) == 1 else parts
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = None
            if has_labels or returns_loss:
                num_items = count_items(inputs, shifts_labels=self.shifts_labels)
                if prediction_loss_only and self.path is not None and self.path.name == "packed" and num_items:
                    return self.path.loss(model, inputs, num_items).detach(), None, None
                sees_items = "compute_loss" in self.overridden and num_items is not None
                items = self._items_tensor(num_items) if sees_items else None
                loss, outputs = self.call_hook(
                    self.compute_loss, model, inputs, return_outputs=True, num_items_in_batch=items
                )
                loss = loss.detach().mean()
            else:
                outputs = model(**inputs) if is_mapping else model(*_as_tuple(inputs))
        if prediction_loss_only:
            return loss, None, None
        if isinstance(outputs, Mapping):
            logits = tuple(
                v for k, v in outputs.items() if k not in ignore_keys and not (k == "loss" and loss is not None)
            )
        else:
            logits = tuple(outputs[1:]) if loss is not None else outputs
        logits = _detached(logits)
        if isinstance(logits, tuple) and len(logits) == 1:
            logits = logits[0]
        return loss, logits, labels

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        metrics = self.evaluate(ignore_keys=ignore_keys_for_eval)
        if self.schedule_follows_metric and not skip_scheduler:
            self.lr_scheduler.step(_metric_named(self.args.metric_for_best_model or "loss", metrics))
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether this evaluation is the best so far; `state.best_metric` then holds it."""
        name = self.args.metric_for_best_model
        value = _metric_named(name, metrics) if name is not None else metrics.get("eval_loss")
        if value is None:
            return False
        best = self.state.best_metric
        if best is None:
            best = -math.inf if self.args.greater_is_better else math.inf
        is_best = value > best if self.args.greater_is_better else value < best
        if is_best:
            self.state.best_metric = value
            if self.args.save_strategy != "no" and name is not None:
                self.state.best_global_step = self.state.global_step
        return bool(is_best)

    # -- saving and loading --------------------------------------------------------------------------------------------

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapters (or the whole model where there are none), and the tokenizer."""
        self.call_hook(self._save, output_dir or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        adapter.save_weights(self.model, folder, state_dict)
        processor = (
            self.processing_class
            if self.processing_class is not None
            else getattr(self.data_collator, "tokenizer", None)
        )
        if hasattr(processor, "save_pretrained"):
            processor.save_pretrained(str(folder))
        if self.args.hf_checkpoint_files:
            transformers_files.write_arguments(folder, self.args)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self._run is not None
        self.store_flos()
        save_checkpoint(self, self._run, trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        folder = Path(output_dir)
        codec.save_tree(folder, "optimizer", codec.optimizer_tree(self.optimizer, adapter.parameter_names(self.model)))
        codec.save_tree(folder, "scheduler", self.lr_scheduler.state_dict())
        if self.args.hf_checkpoint_files:
            transformers_files.write_optimizer_and_scheduler(folder, self.optimizer, self.lr_scheduler)

    def _save_scaler(self, output_dir: str) -> None:
        assert self._run is not None
        codec.save_tree(Path(output_dir), "scaler", self._run.scaler.state())
        if self.args.hf_checkpoint_files:
            transformers_files.write_scaler(Path(output_dir), self._run.scaler.state())

    def _save_rng_state(self, output_dir: str) -> None:
        codec.save_tree(Path(output_dir), "rng", codec.random_tree())
        if self.args.hf_checkpoint_files:
            transformers_files.write_random_state(Path(output_dir))

    def collect_callback_states(self) -> None:
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=self._stateful_callbacks()).stateful_callbacks

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapter.load_weights(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint or "")
        CheckpointStore(folder.parent).verify(folder)
        adapter.load_weights(self.model, folder)
        self.notices.say(f"loaded the best model, {folder.name} ({self.state.best_metric})")

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        """Restore the optimizer's state and the place in the schedule; settings come from the arguments of this run.

        A schedule that is a function of the step needs only the step. One that follows a metric, or the user's own, is
        restored whole, with the learning rates that it had set.
        """
        folder = Path(checkpoint)
        if not (folder / "optimizer.json").exists():
            raise CheckpointError(
                "holds weights only (save_only_model=True): training cannot go on from it", path=folder
            )
        fresh = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        names = adapter.parameter_names(self.model)
        codec.load_optimizer_tree(self.optimizer, codec.load_tree(folder, "optimizer"), names, folder)
        schedule = codec.load_tree(folder, "scheduler")
        is_function_of_step = type(self.lr_scheduler) is torch.optim.lr_scheduler.LambdaLR and not self._given_scheduler
        if not is_function_of_step or self._given_optimizer:
            self.lr_scheduler.load_state_dict(schedule)
            return
        base_rates = self.lr_scheduler.base_lrs
        self.lr_scheduler.load_state_dict(schedule)
        self.lr_scheduler.base_lrs = base_rates
        rates = []
        for group, settings, base, factor in zip(
            self.optimizer.param_groups, fresh, base_rates, self.lr_scheduler.lr_lambdas, strict=True
        ):
            group.update(settings)
            group["lr"] = base * factor(self.lr_scheduler.last_epoch)
            rates.append(group["lr"])
        self.lr_scheduler._last_lr = rates

    def _load_scaler(self, checkpoint: str) -> None:
        assert self._run is not None
        self._run.scaler.load_state(codec.load_tree(Path(checkpoint), "scaler"))

    def _load_rng_state(self, checkpoint: str) -> None:
        codec.load_random_tree(codec.load_tree(Path(checkpoint), "rng"))

    def _load_callback_state(self) -> None:
        """Give stateful callbacks what they had when the checkpoint was written; their settings stay those of this run."""
        saved: dict[str, list[dict[str, Any]]] = {
            name: list(states) if isinstance(states, list) else [states]
            for name, states in self.state.stateful_callbacks.items()
        }
        for callback in self.callback_handler.callbacks:
            states = saved.get(type(callback).__name__, [])
            if states and callable(getattr(callback, "state", None)):
                for name, value in states.pop(0)["attributes"].items():
                    setattr(callback, name, value)

    def _stateful_callbacks(self) -> list[Any]:
        candidates = [*self.callback_handler.callbacks, self.control]
        return [c for c in candidates if isinstance(c, ExportableState) or _is_transformers_exportable(c)]

    def _fresh_state(self) -> TrainerState:
        return TrainerState(
            stateful_callbacks=self._stateful_callbacks(),
            train_batch_size=self.args.train_batch_size,
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
        )

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.args.output_dir)

    # -- small things --------------------------------------------------------------------------------------------------

    def add_callback(self, callback: Any) -> None:
        self.callback_handler.add_callback(callback)

    def pop_callback(self, callback: Any) -> Any:
        return self.callback_handler.pop_callback(callback)

    def remove_callback(self, callback: Any) -> None:
        self.callback_handler.remove_callback(callback)

    def is_local_process_zero(self) -> bool:
        return self.args.local_process_index == 0

    def is_world_process_zero(self) -> bool:
        return self.args.process_index == 0

    def call_hook(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method that a subclass may have overridden, with those keyword arguments that it accepts."""
        return method(*args, **{name: value for name, value in kwargs.items() if _accepts(method, name)})


def speed_metrics(prefix: str, seconds: float, num_samples: float, num_steps: int) -> dict[str, float]:
    """`{prefix}_runtime` in seconds, `{prefix}_samples_per_second` and `{prefix}_steps_per_second`."""
    metrics = {f"{prefix}_runtime": round(seconds, 4)}
    if seconds > 0:
        metrics[f"{prefix}_samples_per_second"] = round(num_samples / seconds, 3)
        metrics[f"{prefix}_steps_per_second"] = round(num_steps / seconds, 3)
    return metrics


def sample_lengths(dataset: Any, column: str) -> list[int]:
    """The length of each sample: a column of lengths where the dataset has one, else of its `input_ids`."""
    if hasattr(dataset, "column_names") and column in (dataset.column_names or []):
        return list(dataset[column])
    try:
        return [len(dataset[index]["input_ids"]) for index in range(len(dataset))]
    except (KeyError, TypeError) as error:
        raise DataError(
            f"group_by_length needs rows with input_ids, or a column of lengths named by length_column_name ('{column}')"
        ) from error


def _own_arguments(args: Any) -> TrainingArguments:
    if args is None:
        return TrainingArguments()
    return args if isinstance(args, TrainingArguments) else TrainingArguments.from_transformers(args)


def _refuse_contradictions(
    trainer: Trainer, model: Any, model_init: Any, optimizers: Any, cls_and_kwargs: Any, eval_dataset: Any
) -> None:
    args = trainer.args
    if args.world_size > 1:
        raise ConfigError("etude trains in one process at present; start it without torchrun", field="WORLD_SIZE")
    if _is_overridden(trainer, "_inner_training_loop"):
        raise ConfigError(
            "cannot be overridden: the loop is etude's own. Override training_step, compute_loss or a callback event",
            field="_inner_training_loop",
        )
    if model is None and model_init is None:
        raise ConfigError("give the trainer a model, or model_init", field="model")
    if model is not None and model_init is not None:
        raise ConfigError("give the trainer a model or model_init, not both", field="model_init")
    if model_init is not None and any(part is not None for part in optimizers):
        raise ConfigError("hold parameters of one model, but model_init makes a new one each time", field="optimizers")
    if cls_and_kwargs is not None and optimizers[0] is not None:
        raise ConfigError("give optimizers or optimizer_cls_and_kwargs, not both", field="optimizer_cls_and_kwargs")
    if args.eval_strategy != "no" and eval_dataset is None and not _is_overridden(trainer, "get_eval_dataloader"):
        raise ConfigError(
            f"is '{args.eval_strategy}' but there is no eval_dataset; give one, or set eval_strategy='no'",
            field="eval_strategy",
        )


def _seed_everything(args: TrainingArguments) -> None:
    from transformers import set_seed

    set_seed(args.seed)


def _use_settings_for_training(model: nn.Module, args: TrainingArguments, until_the_end: ExitStack) -> None:
    """Switch the key-value cache off and activation checkpointing on where asked; the cache setting is put back."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "use_cache"):
        until_the_end.callback(setattr, config, "use_cache", config.use_cache)
        config.use_cache = args.use_cache
    if args.activation_checkpointing or args.gradient_checkpointing:
        kwargs = dict(args.activation_checkpointing_kwargs or args.gradient_checkpointing_kwargs or {})
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs or None)  # type: ignore[operator]
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()


def _default_callbacks(args: TrainingArguments) -> list[Any]:
    from etude.callbacks import DefaultFlowCallback

    return [DefaultFlowCallback(), *tracker_callbacks(args), JsonlCallback()]


def _console_callback(args: TrainingArguments) -> Any:
    return PrinterCallback() if args.disable_tqdm else ProgressCallback()


def _is_overridden(trainer: Trainer, name: str) -> bool:
    own = getattr(Trainer, name, None)
    return getattr(type(trainer), name, None) is not own or name in vars(trainer)


def _accepts(method: Callable[..., Any], name: str) -> bool:
    parameters = inspect.signature(method).parameters
    return name in parameters or any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def _is_transformers_exportable(callback: Any) -> bool:
    return any(base.__name__ == "ExportableState" for base in type(callback).__mro__)


def _is_quantized(model: Any) -> bool:
    return bool(getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None))


def _empty_device_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


def _as_tuple(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, (list, tuple)) else (inputs,)


def _detached(value: Any) -> Any:
    if torch.is_tensor(value):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: _detached(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_detached(item) for item in value)
    return value


def _metric_named(name: str, metrics: dict[str, float]) -> float:
    key = name if name.startswith("eval_") else f"eval_{name}"
    if key not in metrics:
        raise ConfigError(
            f"'{key}' is not among the metrics of the evaluation: {', '.join(metrics)}", field="metric_for_best_model"
        )
    return metrics[key]


def _plain_number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) in (1,) else value
