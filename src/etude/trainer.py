"""`Trainer`: what a user constructs and may override. It composes a run and starts the loops."""

from __future__ import annotations

import inspect
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from etude import loop
from etude.arguments import TrainingArguments
from etude.callbacks import CallbackHandler, DefaultFlowCallback, TrainerControl
from etude.checkpoint.resume import find_checkpoint
from etude.checkpoint.store import CheckpointStore
from etude.collection import frozen_for_training
from etude.cut import AsCollated
from etude.data.batching import StepBatches
from etude.data.collate import default_collator
from etude.data.loader import TrainingStream, has_length
from etude.errors import ConfigError, DataError, Interrupted
from etude.hooked_batches import HookedBatches
from etude.hooks.base import is_overridden, speed_metrics
from etude.hooks.checkpoints import CheckpointHooks
from etude.hooks.data import DataHooks
from etude.hooks.evaluation import EvaluationHooks
from etude.hooks.forward import ForwardHooks
from etude.hooks.names import REFUSED_OVERRIDES, NamedHooks
from etude.hooks.optimization import OptimizationHooks
from etude.hooks.progress import ProgressHooks
from etude.hooks.reporting import ReportingHooks
from etude.hooks.search import SearchHooks
from etude.interrupts import Interrupts
from etude.model import adapter
from etude.model import loss as model_loss
from etude.model.memory import memory_limit
from etude.model.neftune import add_embedding_noise
from etude.notices import Notices
from etude.observe.concerns import starvation
from etude.observe.console import PrinterCallback, ProgressCallback
from etude.observe.jsonl import JsonlCallback
from etude.observe.memory import MemoryUse
from etude.observe.throughput import ThroughputCallback
from etude.observe.trackers import tracker_callbacks
from etude.optim.gradient import Gradient
from etude.outputs import TrainOutput
from etude.precision import LossScaler, choose_precision, keep_trainable_in_float32, use_number_settings
from etude.recovery import describe_run, restore_run, set_aside
from etude.run import Plan, Run, plan_run
from etude.summary import introduction

if TYPE_CHECKING:
    from etude.check_report import StepCheck

REPLACES_FORWARD = (
    "compute_loss",
    "training_step",
    "compute_loss_context_manager",
    "_prepare_inputs",
    "_prepare_input",
    "get_batch_samples",
    "_get_num_items_in_batch",
    "_wrap_model",
)
"""Overriding one of these means that the user's code sees padded batches or the model's own outputs."""


class Trainer(
    DataHooks,
    OptimizationHooks,
    ForwardHooks,
    ProgressHooks,
    EvaluationHooks,
    CheckpointHooks,
    ReportingHooks,
    SearchHooks,
    NamedHooks,
):
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
        self.args.validate()
        _refuse_contradictions(self, model, model_init, optimizers, optimizer_cls_and_kwargs, eval_dataset)
        _seed_everything(self.args)
        _use_log_level(self.args)
        self.model_init = model_init
        self.notices = Notices(quiet=not self.args.should_log or self.args.log_level in ("error", "critical"))
        self.create_accelerator_and_postprocess()
        self.memory = MemoryUse(enabled=not self.args.skip_memory_metrics, device=self.args.device)
        with self.memory.stage("init"):
            self._take_model(model)
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
        self._inspect_model()
        self.path: Any = None
        self.cutter = AsCollated(self.shifts_labels)
        self.graphs = None
        self.cut: dict[str, Any] = {}
        self.run_record: dict[str, Any] = {}
        self.is_in_train = False
        self.current_gradient_accumulation_steps = self.args.gradient_accumulation_steps
        self.current_flos, self._flops_per_token = 0.0, 0
        self.is_last_micro_batch = True
        self.neftune_noise_alpha = self.args.neftune_noise_alpha
        self._initial_num_input_tokens_seen = 0
        self._run: Run | None = None
        self._signature_columns: list[str] | None = None
        self._persistent_loaders: list[tuple[Any, Any]] = []
        self._tr_loss = torch.zeros((), device=self.args.device)
        self._total_loss_scalar, self._globalstep_last_logged = 0.0, 0
        self.control = TrainerControl()
        self.throughput = ThroughputCallback()
        self.callback_handler = CallbackHandler(
            [DefaultFlowCallback(), *tracker_callbacks(self.args), *(callbacks or [])],
            self.model,
            processing_class,
            self.optimizer,
            self.lr_scheduler,
        )
        self.callback_handler.first = [self.throughput]
        self.callback_handler.last = [JsonlCallback(throughput=self.throughput)]
        self.add_callback(_console_callback(self.args, self.throughput))
        self.state = self._fresh_state()
        self.control = self.callback_handler.on_init_end(self.args, self.state, self.control)

    # -- what the model is ---------------------------------------------------------------------------------------------

    def _take_model(self, model: nn.Module | None) -> None:
        self.model = model if model is not None else self.call_model_init()
        self.is_model_parallel = len(set((getattr(self.model, "hf_device_map", None) or {}).values())) > 1
        self.place_model_on_device = self.args.place_model_on_device and not self.is_model_parallel
        if self.place_model_on_device and not _is_quantized(self.model):
            self._move_model_to_device(self.model, self.args.device)
        self.model_wrapped = self.model

    def _inspect_model(self) -> None:
        from transformers.utils import can_return_loss, find_labels

        model_class = type(model_loss.unwrapped(self.model))
        self.can_return_loss = can_return_loss(model_class)
        names = self.args.label_names if self.args.label_names is not None else find_labels(model_class)
        self.label_names = list(names) or (["labels"] if self.args.label_names is None else [])
        self.model_accepts_loss_kwargs = model_loss.accepts_loss_kwargs(self.model)
        self.shifts_labels = model_loss.shifts_labels(self.model)
        self.label_smoother = model_loss.label_smoother(self.model, self.args.label_smoothing_factor)
        self._divides_by_items: bool | None = None if self.model_accepts_loss_kwargs else False
        self.overridden = tuple(name for name in REPLACES_FORWARD if is_overridden(self, name))

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
            until_the_end.enter_context(frozen_for_training())
            self.is_in_train = True
            until_the_end.callback(setattr, self, "is_in_train", False)
            self._memory_of_training = until_the_end.enter_context(self.memory.stage("train"))
            self._hp_search_setup(trial)
            run = self._build_run(resume_from_checkpoint, trial, ignore_keys_for_eval, until_the_end)
            self._introduce(run)
            until_the_end.callback(self._undo_swaps)
            output = loop.train(run)
            if run.interrupts.requested is not None:
                name = run.interrupts.requested.name
                raise Interrupted(
                    f"{name} came when training had finished",
                    exit_code=run.interrupts.exit_code,
                    step=output.global_step,
                )
            return output

    def check(self, reference_dtype: Any = None) -> StepCheck:
        """Compute the first step of the run on the path in force and through stock peft, and compare the gradients.

        The rows are those that `train()` would begin with, from the weights as they are; stock peft sees the padded batches
        and the model's own forward, in the same precision. Dropout is off in both. Nothing is updated or written: weights,
        gradients, random numbers and the trainer are left as they were.

        Args:
            reference_dtype: "float32" compares both with a float32 copy of the model as well, where memory allows.

        Returns:
            Losses and errors of every tensor, worst first; `is_fine` judges them, printing it shows a table.

        Raises:
            ConfigError, ModelError, DataError: as `train()` does for settings, models and data that cannot be trained.
        """
        from etude.check import check_step

        return check_step(self, reference_dtype)

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
        if self.train_dataset is None and not is_overridden(self, "get_train_dataloader"):
            raise DataError("the trainer has no train_dataset")
        adapter.require_trainable(self.model)
        if self.precision.autocast_dtype is not None:
            keep_trainable_in_float32(self.model)
        _use_settings_for_training(self.model, args, until_the_end)
        _align_special_tokens(self.model, self.processing_class)
        if self.neftune_noise_alpha is not None:
            until_the_end.callback(add_embedding_noise(self.model, self.neftune_noise_alpha))
        self.model_wrapped = self._wrap_model(self.model)
        use_number_settings(args, until_the_end)
        until_the_end.enter_context(memory_limit(args.device, args.gpu_memory_limit_gib))
        loader = self.get_train_dataloader()
        plan = self._plan(loader)
        interrupts = until_the_end.enter_context(Interrupts(Path(self._get_output_dir(trial))))
        if self._run is not None:
            self._run.saves.close()  # of the run before, where Ctrl-C would not wait for it
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
        self.path = self.graphs = None
        self.cut = {
            "micro_batch_samples": args.train_batch_size,
            "accumulation": args.gradient_accumulation_steps,
            "precision": self.precision.name,
        }
        seed = args.data_seed if args.data_seed is not None else args.seed
        batches = self._build_batches(TrainingStream(loader, seed))
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
        until_the_end.callback(batches.stream.close)
        until_the_end.callback(run.saves.close)
        if checkpoint is not None:
            restore_run(self, run, checkpoint)
        self._initial_num_input_tokens_seen = self.state.num_input_tokens_seen
        if run.first_epoch < plan.num_epochs:
            run.load_first_step()
        if args.save_strategy != "no":
            set_aside(self, store, checkpoint)
        handler = self.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, self.optimizer, self.lr_scheduler
        handler.train_dataloader = loader
        return run

    def set_initial_training_values(
        self, args: TrainingArguments, dataloader: Any, total_train_batch_size: int | None = None
    ) -> tuple[int, int, int | None, float, int, int, int]:
        """The arithmetic of a run: epochs, updates of an epoch, samples of the dataset, samples of the whole run, global
        batch, batches of an epoch, updates of the whole run."""
        plan, num_examples = plan_run(args, dataloader, self.num_examples(dataloader)), self.num_examples(dataloader)
        batch = self.get_total_train_batch_size(args)
        return (
            *(plan.num_epochs, plan.steps_per_epoch, num_examples, plan.num_samples),
            *(batch, plan.batches_per_epoch, plan.max_steps),
        )

    def _plan(self, loader: Any) -> Plan:
        plan = plan_run(self.args, loader, self.num_examples(loader))
        if not is_overridden(self, "set_initial_training_values"):
            return plan
        batch = self.get_total_train_batch_size(self.args)
        epochs, updates, _, samples, _, batches, steps = self.call_hook(
            self.set_initial_training_values, self.args, loader, total_train_batch_size=batch
        )
        return Plan(batches, updates, epochs, steps, samples, plan.streamed)

    def _build_batches(self, stream: TrainingStream) -> StepBatches:
        accumulation = self.args.gradient_accumulation_steps
        if any(is_overridden(self, name) for name in ("get_batch_samples", "_get_num_items_in_batch")):
            return HookedBatches(self, stream, accumulation=accumulation, shifts_labels=self.shifts_labels)
        return StepBatches(stream, accumulation=accumulation, shifts_labels=self.shifts_labels)

    def _build_gradient(self, batches: StepBatches, scaler: LossScaler) -> Gradient:
        args = self.args
        return Gradient(
            trained_parameters(self.model, self.optimizer),
            lambda micro_batch, num_items: cast(Run, self._run).forward_backward(micro_batch, num_items),
            device=args.device,
            scaler=scaler,
            optimizer=self.optimizer,
            max_norm=args.max_grad_norm,
            stops_on_nonfinite=args.on_nonfinite == "stop",
            rows_of=batches.rows_of,
            recover=lambda error, micro_batch: cast(Run, self._run).recover(error, micro_batch),
            before_stopping=lambda: cast(Run, self._run).saves.settle(),  # it may hold weights gone wrong before
            clip=self.clip_by_hooks,
        )

    def _undo_swaps(self) -> None:
        self.graphs = None  # first, as its memory may be needed to give the layers their weights back
        plan = getattr(self.path, "plan", None)
        if plan is not None:
            plan.undo()

    def _introduce(self, run: Run) -> None:
        """The few lines that say what will happen."""
        for line in introduction(self, run):
            self.notices.say(line)
        if run.saves.why_in_place:
            self.notices.say(f"training waits for every checkpoint: {run.saves.why_in_place}")

    def finish_training(self, run: Run) -> TrainOutput:
        """The summary of the run, the best model where it was asked for, and the last event."""
        total = self._total_loss_scalar + float(self._tr_loss)
        mean_loss = total / max(self.state.global_step, 1)
        steps = self.state.global_step - run.initial_global_step
        samples = run.plan.num_samples * steps / max(self.state.max_steps, 1)
        metrics = speed_metrics("train", time.time() - run.start_time, samples, steps)
        self.store_flos()
        metrics |= {"total_flos": self.state.total_flos, "train_loss": mean_loss} | self._memory_of_training.finish()
        self.call_hook(self.log, metrics)
        starved = starvation(
            self.throughput,
            num_workers=self.args.dataloader_num_workers,
            is_on_gpu=self.args.device.type == "cuda",
        )
        if starved is not None:
            self.notices.say(starved)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
        return TrainOutput(self.state.global_step, mean_loss, metrics)

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


def _own_arguments(args: Any) -> TrainingArguments:
    if args is None:
        return TrainingArguments()
    return args if isinstance(args, TrainingArguments) else TrainingArguments.from_transformers(args)


def _refuse_contradictions(
    trainer: Trainer, model: Any, model_init: Any, optimizers: Any, cls_and_kwargs: Any, eval_dataset: Any
) -> None:
    args = trainer.args
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("etude trains in one process at present; start it without torchrun", field="WORLD_SIZE")
    for name, reason in REFUSED_OVERRIDES.items():
        if is_overridden(trainer, name):
            raise ConfigError(f"cannot be overridden: {reason}", field=name)
    if model is None and model_init is None:
        raise ConfigError("give the trainer a model, or model_init", field="model")
    if model is not None and model_init is not None:
        raise ConfigError("give the trainer a model or model_init, not both", field="model_init")
    if model_init is not None and any(part is not None for part in optimizers):
        raise ConfigError("hold parameters of one model, but model_init makes a new one each time", field="optimizers")
    if cls_and_kwargs is not None and optimizers[0] is not None:
        raise ConfigError("give optimizers or optimizer_cls_and_kwargs, not both", field="optimizer_cls_and_kwargs")
    for name, dataset in eval_dataset.items() if isinstance(eval_dataset, dict) else [("eval_dataset", eval_dataset)]:
        if dataset is not None and has_length(dataset) and len(dataset) == 0:
            raise DataError(f"the evaluation dataset '{name}' is empty")
    if args.eval_strategy != "no" and eval_dataset is None and not is_overridden(trainer, "get_eval_dataloader"):
        raise ConfigError(
            f"is '{args.eval_strategy}' but there is no eval_dataset; give one, or set eval_strategy='no'",
            field="eval_strategy",
        )


def trained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    """What the optimizer moves, and what else of the model gets a gradient: it counts in the norm, as in transformers."""
    of_optimizer = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    known = {id(parameter) for parameter in of_optimizer}
    return of_optimizer + [p for p in model.parameters() if p.requires_grad and id(p) not in known]


def _seed_everything(args: TrainingArguments) -> None:
    from transformers import set_seed

    set_seed(args.seed)


def _use_log_level(args: TrainingArguments) -> None:
    """Set the level of transformers' logger where one was asked for."""
    from transformers.utils import logging

    if (args.log_level if args.should_log else args.log_level_replica) != "passive":
        logging.set_verbosity(args.get_process_log_level())


def _use_settings_for_training(model: nn.Module, args: TrainingArguments, until_the_end: ExitStack) -> None:
    """Switch the key-value cache off and activation checkpointing on where asked; the cache setting is put back."""
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "use_cache"):
        until_the_end.callback(setattr, config, "use_cache", config.use_cache)
        config.use_cache = args.use_cache
    if args.activation_checkpointing or args.gradient_checkpointing:
        kwargs: Any = args.activation_checkpointing_kwargs or args.gradient_checkpointing_kwargs
        _checkpoint_activations(model, kwargs)


def _checkpoint_activations(model: Any, kwargs: dict[str, Any] | None) -> None:
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=kwargs or None)
    else:  # models outside transformers, and transformers before 5.20
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs or None)
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()


def _align_special_tokens(model: nn.Module, processing_class: Any) -> None:
    """Write the tokenizer's ids of padding, beginning and end into the model's configurations, as transformers does: a
    classifier pads by them, and what is generated ends at them."""
    from transformers import PreTrainedTokenizerBase, ProcessorMixin
    from transformers.trainer_utils import align_special_tokens

    is_tokenizer = isinstance(processing_class, (PreTrainedTokenizerBase, ProcessorMixin))
    if is_tokenizer and hasattr(getattr(model, "config", None), "get_text_config"):
        align_special_tokens(model, processing_class)


def _console_callback(args: TrainingArguments, throughput: ThroughputCallback) -> Any:
    return PrinterCallback(throughput=throughput) if args.disable_tqdm else ProgressCallback(throughput=throughput)


def _is_quantized(model: Any) -> bool:
    return bool(getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None))
