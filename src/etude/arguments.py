"""`TrainingArguments`: every setting of a run, under the names of `transformers.TrainingArguments`.

Names from transformers 4.40 on are accepted; `etude.argument_names` is the table that says what becomes of each.
Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import logging
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, TypeVar

from etude.argument_checks import (
    NUMBERS,
    IntervalStrategy,
    SaveStrategy,
    accelerator_settings,
    boolean,
    choice,
    dictionary,
    jsonable,
    name_list,
    number,
    one_of,
    plain_text,
    step_interval,
)
from etude.argument_names import (
    FIELDS,
    OLD_NAMES,
    UNSET,
    asks_for_something,
    ignored,
    refuse,
    require_agreement,
    translate,
)
from etude.argument_setters import GroupedSetters
from etude.errors import ConfigError, UnknownArgumentError, nearest

if TYPE_CHECKING:
    import torch

Made = TypeVar("Made")

__all__ = [
    "Classification",
    "IntervalStrategy",
    "ParallelMode",
    "SaveStrategy",
    "TrainingArguments",
    "classification",
]


class ParallelMode(StrEnum):
    """Whether one process trains or several do."""

    NOT_PARALLEL = "not_parallel"
    DISTRIBUTED = "distributed"


LOG_LEVELS = {
    "detail": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "passive": None,  # as transformers' own logger is set
}
SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length")
TOKEN_COUNTS = ("no", "all", "non_padding")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")  # what "all" looks for
PLANS_THAT_NEED_A_METRIC = ("reduce_lr_on_plateau", "greedy")

# A setting that has two names and two fields: whichever is set, both hold it.
_TWINS = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
_TWIN_OF = _TWINS | {new: old for old, new in _TWINS.items()}
_DICTIONARIES = (
    "lr_scheduler_kwargs",
    "activation_checkpointing_kwargs",
    "gradient_checkpointing_kwargs",
    "liger_kernel_config",
)


class _AcceptsEveryName(type):
    """Translates old names before `__init__`, so that subclasses decorated with `@dataclass` accept them too."""

    def __call__(cls: type[Made], *args: Any, **kwargs: Any) -> Made:
        parameters = _parameters(cls)
        places = [name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
        given = dict(zip(places, args, strict=False)) | kwargs
        if not _names_every_field(cls, given):  # a copy with one of two twins changed may disagree: the new name wins
            for old in _TWINS:
                require_agreement(FIELDS[old], given)
        translation = translate(given, parameters)
        settings = translation.settings
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            _require_known(cls.__name__, settings, parameters)
        explicit = _explicit_names(cls, settings)
        if "logging_nan_inf_filter" in explicit and "on_nonfinite" not in settings and "on_nonfinite" in parameters:
            settings["on_nonfinite"] = "continue"  # asked for transformers' treatment of a non-finite loss

        made = cls.__new__(cls)
        made.__dict__.update(translation.leftovers, _explicit=explicit)
        rest = {name: value for name, value in settings.items() if name not in places[: len(args)]}
        made.__init__(*args, **rest)  # type: ignore[misc]
        made.__dict__["_constructed"] = True

        for message in (*translation.warnings, *_settings_without_effect(made)):
            warnings.warn(message, UserWarning, stacklevel=2)
        return made

    @property
    def __signature__(cls) -> inspect.Signature:
        """What `inspect.signature` reports: the fields, not the `*args, **kwargs` of the translation."""
        return inspect.Signature(list(_parameters(cls).values()))


def _parameters(cls: type) -> dict[str, inspect.Parameter]:
    """The constructor's parameters without `self`."""
    declared = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    return dict(list(declared.items())[1:])


def _require_known(owner: str, settings: Mapping[str, Any], parameters: Mapping[str, Any]) -> None:
    for name in settings:
        if name not in parameters:
            near = nearest(name, [*parameters, *OLD_NAMES])
            hint = f"; did you mean '{near}'?" if near else "."
            raise UnknownArgumentError(f"{owner} has no such argument{hint}", field=name)


def _names_every_field(cls: type, settings: Mapping[str, Any]) -> bool:
    return all(item.name in settings for item in fields(cls) if item.init)


def _explicit_names(cls: type, settings: Mapping[str, Any]) -> frozenset[str]:
    """The names a caller chose. A parser, `dataclasses.replace` or `from_dict` passes every field: then those off default."""
    chosen = set(settings)
    if _names_every_field(cls, settings):
        resolved = _defaults()
        for item in fields(cls):
            value = settings.get(item.name)
            if value is None or value == _raw_default(item) or (item.name in resolved and value == resolved[item.name]):
                chosen.discard(item.name)
    return frozenset(_TWINS.get(name, name) for name in chosen)


def _raw_default(item: dataclasses.Field[Any]) -> Any:
    return item.default if item.default_factory is dataclasses.MISSING else item.default_factory()


def _defaults() -> dict[str, Any]:
    """Every field as an object made without arguments holds it."""
    return vars(TrainingArguments())


def _settings_without_effect(made: Any) -> Iterator[str]:
    for name, row in FIELDS.items():
        if (
            row.kind == "accepted"
            and not row.quiet
            and asks_for_something(name, getattr(made, name), _default_of(name))
        ):
            yield ignored(row, getattr(made, name))
    if made.load_best_model_at_end and made.eval_strategy == IntervalStrategy.NO:
        yield "load_best_model_at_end=True has no effect: eval_strategy is 'no', so no checkpoint is known to be the best."


def _default_of(name: str) -> Any:
    return _raw_default(TrainingArguments.__dataclass_fields__[name])


def _help(text: str, **parser_options: Any) -> dict[str, Any]:
    """A field's metadata; `HfArgumentParser` hands all of it to argparse."""
    return {"help": text, **parser_options}


def _formerly(*names: str) -> list[str]:
    """Command-line spellings of old names that only were renamed."""
    return [f"--{spelling}" for name in names for spelling in dict.fromkeys((name, name.replace("_", "-")))]


@dataclass(repr=False)
class TrainingArguments(GroupedSetters, metaclass=_AcceptsEveryName):
    """The settings of a run. Each field's meaning and unit is in its `help`.

    Old names are accepted as keywords and stay readable as attributes. `explicit` holds the (new) names that the caller
    chose. Attributes may be changed afterwards; `validate()` checks all of them again.

    Raises:
        UnknownArgumentError: a name that never existed; also a TypeError. It suggests the nearest one.
        ConfigError: a wrong value, values that contradict each other, or a setting that etude refuses; a ValueError.
    """

    # Where a union names `str | None` first: HfArgumentParser takes the type of a command-line value from there.

    # Output, duration, batch
    output_dir: str | None = field(
        default=None, metadata=_help("Folder for checkpoints and results; 'trainer_output' if not given.")
    )
    per_device_train_batch_size: int = field(
        default=8,
        metadata=_help(
            "Training samples per accumulation step and process.", aliases=_formerly("per_gpu_train_batch_size")
        ),
    )
    num_train_epochs: float = field(
        default=3.0, metadata=_help("Passes over the training data; a fraction ends the last one early.")
    )
    max_steps: int = field(
        default=-1, metadata=_help("Optimizer steps to train for, instead of num_train_epochs, if positive.")
    )

    # Learning rate and schedule
    learning_rate: float = field(default=5e-5, metadata=_help("Peak learning rate."))
    lr_scheduler_type: str = field(
        default="linear", metadata=_help("Shape of the learning rate over the steps, after warmup.")
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata=_help("Extra options of the schedule (JSON).")
    )
    warmup_steps: float = field(
        default=0,
        metadata=_help("Steps over which the learning rate rises from 0; a value below 1 is a fraction of all steps."),
    )

    # Optimizer
    optim: str = field(default="adamw_torch_fused", metadata=_help("Name of the optimizer."))
    optim_args: str | None = field(
        default=None, metadata=_help("Extra options of the optimizer, as 'name=value,name=value'.")
    )
    weight_decay: float = field(
        default=0.0, metadata=_help("Decoupled weight decay of all trained weights except biases and norms.")
    )
    adam_beta1: float = field(default=0.9, metadata=_help("Decay rate of Adam's mean of gradients."))
    adam_beta2: float = field(default=0.999, metadata=_help("Decay rate of Adam's mean of squared gradients."))
    adam_epsilon: float = field(default=1e-8, metadata=_help("Term added to Adam's denominator."))
    optim_target_modules: str | None | list[str] = field(  # noqa: RUF036
        default=None, metadata=_help("Modules of GaLore and APOLLO; refused.")
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata=_help("Batches that are added up for one optimizer step.")
    )
    average_tokens_across_devices: bool = field(
        default=True, metadata=_help("Divide the loss by the tokens of all processes; always done.")
    )
    max_grad_norm: float = field(
        default=1.0, metadata=_help("Largest norm of the gradient, longer ones are scaled down; 0 turns it off.")
    )

    # Regularisation
    label_smoothing_factor: float = field(
        default=0.0, metadata=_help("Probability spread evenly over all labels, from 0 to 1.")
    )

    # Precision
    bf16: bool = field(default=False, metadata=_help("Train in bfloat16 mixed precision."))
    fp16: bool = field(
        default=False, metadata=_help("Train in float16 mixed precision (bfloat16 where there is no GPU).")
    )
    bf16_full_eval: bool = field(default=False, metadata=_help("Hold the whole model in bfloat16 for evaluation."))
    fp16_full_eval: bool = field(default=False, metadata=_help("Hold the whole model in float16 for evaluation."))
    tf32: bool | None = field(
        default=None, metadata=_help("Allow TF32 in float32 products on a GPU; None leaves torch's setting.")
    )

    # Memory and speed
    activation_checkpointing: bool | None = field(
        default=None,
        metadata=_help(
            "Keep fewer activations and compute them again in the backward pass: less memory, more time.",
            nargs="?",
            const=True,
        ),
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata=_help("Options of activation checkpointing (JSON).")
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata=_help("Another name of activation_checkpointing.", nargs="?", const=True)
    )
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata=_help("Another name of activation_checkpointing_kwargs.")
    )
    torch_compile: bool = field(
        default=False, metadata=_help("No effect: the decoder layers are compiled where it pays.")
    )
    torch_compile_backend: str | None = field(
        default=None,
        metadata=_help("No effect: the decoder layers are compiled where it pays.", aliases=_formerly("torchdynamo")),
    )
    torch_compile_mode: str | None = field(
        default=None, metadata=_help("No effect: the decoder layers are compiled where it pays.")
    )
    use_liger_kernel: bool = field(default=False, metadata=_help("No effect: etude has kernels of its own."))
    liger_kernel_config: dict[str, bool] | None = field(
        default=None, metadata=_help("No effect: etude has kernels of its own.")
    )
    use_cache: bool = field(default=False, metadata=_help("Keep the model's key-value cache on during training."))
    neftune_noise_alpha: float | None = field(
        default=None, metadata=_help("Scale of the NEFTune noise added to input embeddings.")
    )
    torch_empty_cache_steps: int | None = field(
        default=None, metadata=_help("Optimizer steps between two releases of cached GPU memory.")
    )
    auto_find_batch_size: bool = field(
        default=False, metadata=_help("Cut batches smaller when memory runs out; the global batch stays.")
    )

    # Logging
    logging_strategy: IntervalStrategy | str = field(default="steps", metadata=_help("When metrics are logged."))
    logging_steps: float = field(
        default=500, metadata=_help("Optimizer steps between two logs; below 1 a fraction of all steps.")
    )
    logging_first_step: bool = field(default=False, metadata=_help("Log the first step too."))
    log_on_each_node: bool = field(
        default=True, metadata=_help("Let one process of every machine log, not only one in all.")
    )
    logging_nan_inf_filter: bool = field(
        default=True,
        metadata=_help("Leave non-finite losses out of the logged mean; if given, training goes on after one."),
    )
    include_num_input_tokens_seen: str = field(
        default="no",
        metadata=_help(
            "Count the input tokens seen: 'all', 'non_padding' or 'no'.",
            nargs="?",
            const="all",
            aliases=_formerly("include_tokens_per_second"),
        ),
    )
    log_level: str = field(
        default="passive", metadata=_help("Log level of the main process.", choices=list(LOG_LEVELS))
    )
    log_level_replica: str = field(
        default="warning", metadata=_help("Log level of the other processes.", choices=list(LOG_LEVELS))
    )
    disable_tqdm: bool | None = field(
        default=None, metadata=_help("Show no progress bar; by default it follows the log level.")
    )
    report_to: str | None | list[str] = field(  # noqa: RUF036
        default="none", metadata=_help("Trackers that receive the logs: names, 'all' or 'none'.")
    )
    run_name: str | None = field(default=None, metadata=_help("Name of the run in the trackers."))
    project: str = field(default="huggingface", metadata=_help("Project of the run in Trackio."))
    trackio_space_id: str | None = field(default=None, metadata=_help("Space that Trackio writes to."))
    trackio_bucket_id: str | None = field(default=None, metadata=_help("Bucket that Trackio writes to."))
    trackio_static_space_id: str | None | Literal[False] = field(  # noqa: RUF036
        default=None, metadata=_help("Static Space that Trackio publishes to.")
    )

    # Evaluation
    eval_strategy: IntervalStrategy | str = field(
        default="no",
        metadata=_help("When the model is evaluated during training.", aliases=_formerly("evaluation_strategy")),
    )
    eval_steps: float | None = field(
        default=None,
        metadata=_help(
            "Optimizer steps between two evaluations, logging_steps if not given; below 1 a fraction of all steps."
        ),
    )
    eval_delay: float = field(
        default=0, metadata=_help("Steps or epochs (as eval_strategy counts) before the first evaluation.")
    )
    per_device_eval_batch_size: int = field(
        default=8,
        metadata=_help("Evaluation samples per batch and process.", aliases=_formerly("per_gpu_eval_batch_size")),
    )
    prediction_loss_only: bool = field(
        default=False, metadata=_help("Return only the loss from evaluation and prediction.")
    )
    eval_on_start: bool = field(default=False, metadata=_help("Evaluate once before the first step."))
    eval_do_concat_batches: bool = field(
        default=True, metadata=_help("Join the batches of predictions into one array.")
    )
    eval_use_gather_object: bool = field(default=False, metadata=_help("No effect: results of any type are gathered."))
    eval_accumulation_steps: int | None = field(
        default=None, metadata=_help("Batches of predictions kept on the GPU before they are moved.")
    )
    include_for_metrics: list[str] = field(
        default_factory=list, metadata=_help("What compute_metrics receives besides: 'inputs', 'loss'.")
    )
    batch_eval_metrics: bool = field(
        default=False, metadata=_help("Call compute_metrics after every batch instead of once.")
    )

    # Checkpoints
    save_only_model: bool = field(
        default=False, metadata=_help("Save the adapter alone; such a checkpoint cannot be resumed from.")
    )
    save_strategy: SaveStrategy | str = field(default="steps", metadata=_help("When a checkpoint is written."))
    save_steps: float = field(
        default=500, metadata=_help("Optimizer steps between two checkpoints; below 1 a fraction of all steps.")
    )
    save_on_each_node: bool = field(
        default=False, metadata=_help("Let one process of every machine save, not only one in all.")
    )
    save_total_limit: int | None = field(
        default=None,
        metadata=_help("Checkpoints kept, older ones are deleted but never the best; None or 0 keeps all."),
    )
    enable_jit_checkpoint: bool = field(default=False, metadata=_help("No effect: a signal always saves a checkpoint."))

    # Hub
    push_to_hub: bool = field(default=False, metadata=_help("Upload the result; refused."))
    hub_token: str | None = field(
        default=None, repr=False, metadata=_help("Not read.", aliases=_formerly("push_to_hub_token"))
    )
    hub_private_repo: bool | None = field(default=None, metadata=_help("Not read."))
    hub_model_id: str | None = field(
        default=None, metadata=_help("Not read.", aliases=_formerly("push_to_hub_model_id"))
    )
    hub_strategy: str = field(default="every_save", metadata=_help("Not read."))
    hub_always_push: bool = field(default=False, metadata=_help("Not read."))
    hub_revision: str | None = field(default=None, metadata=_help("Not read."))

    # Best model
    load_best_model_at_end: bool = field(
        default=False, metadata=_help("Put the best checkpoint's adapter into the model when training ends.")
    )
    metric_for_best_model: str | None = field(
        default=None, metadata=_help("Evaluation metric that says which checkpoint is the best.")
    )
    greater_is_better: bool | None = field(
        default=None, metadata=_help("Whether that metric should rise; by default unless it ends in 'loss'.")
    )

    # Resume and reproducibility
    ignore_data_skip: bool = field(default=False, metadata=_help("Start the data from the beginning when resuming."))
    restore_callback_states_from_checkpoint: bool = field(
        default=False, metadata=_help("Give callbacks their saved state when resuming.")
    )
    full_determinism: bool = field(default=False, metadata=_help("Another way to ask for deterministic."))
    seed: int = field(default=42, metadata=_help("Seed of everything random in training."))
    data_seed: int | None = field(default=None, metadata=_help("Seed of the sample order; seed if not given."))
    use_cpu: bool = field(
        default=False, metadata=_help("Train on the CPU even where there is a GPU.", aliases=_formerly("no_cuda"))
    )

    # Taken over from accelerate
    accelerator_config: dict[str, Any] | str | None = field(
        default=None, metadata=_help("No effect: batches are cut and dealt by etude.")
    )
    parallelism_config: Any = field(default=None, metadata=_help("Tensor, context and sequence parallelism; refused."))

    # Data loader
    dataloader_drop_last: bool = field(
        default=False, metadata=_help("Leave out the last batch of an epoch if it is not full.")
    )
    dataloader_num_workers: int = field(
        default=0, metadata=_help("Processes that prepare data; 0 prepares it in the training process.")
    )
    dataloader_pin_memory: bool = field(default=True, metadata=_help("Copy batches through pinned memory."))
    dataloader_persistent_workers: bool = field(
        default=False, metadata=_help("Keep the data processes from one epoch to the next.")
    )
    dataloader_prefetch_factor: int | None = field(
        default=None, metadata=_help("Batches each data process prepares ahead.")
    )
    dataloader_multiprocessing_context: str | None = field(
        default=None, metadata=_help("How data processes start: fork, spawn, forkserver.")
    )
    dataloader_in_order: bool = field(default=True, metadata=_help("Take batches in the order they were asked for."))
    remove_unused_columns: bool = field(
        default=True, metadata=_help("Drop the columns of the data that the model's forward does not take.")
    )
    label_names: list[str] | None = field(default=None, metadata=_help("Names of the inputs that are labels."))
    train_sampling_strategy: str = field(
        default="random", metadata=_help("Order of samples: 'random', 'sequential', 'group_by_length'.")
    )
    length_column_name: str = field(
        default="length", metadata=_help("Column with the sample lengths, for group_by_length.")
    )

    # Several processes
    ddp_find_unused_parameters: bool | None = field(
        default=None, metadata=_help("No effect: gradients are summed without DDP.")
    )
    ddp_bucket_cap_mb: int | None = field(default=None, metadata=_help("No effect: gradients are summed without DDP."))
    ddp_broadcast_buffers: bool | None = field(
        default=None, metadata=_help("No effect: gradients are summed without DDP.")
    )
    ddp_static_graph: bool | None = field(default=None, metadata=_help("No effect: gradients are summed without DDP."))
    ddp_backend: str | None = field(default=None, metadata=_help("No effect: the backend follows the device."))
    ddp_timeout: int = field(
        default=1800, metadata=_help("No effect: the time limit is that of the process group (seconds).")
    )
    fsdp: str | None = field(default=None, metadata=_help("Sharded training; refused."))
    fsdp_config: dict[str, Any] | str | None = field(default=None, metadata=_help("Not read."))
    deepspeed: dict[str, Any] | str | None = field(default=None, metadata=_help("DeepSpeed; refused."))

    # Debugging
    debug: list[str] | str = field(
        default="", metadata=_help("No effect: a non-finite loss always stops and is explained.")
    )
    skip_memory_metrics: bool = field(default=True, metadata=_help("Leave memory use out of the metrics."))

    # For scripts; training does not depend on them
    do_train: bool = field(default=False, metadata=_help("A flag that scripts read."))
    do_eval: bool = field(default=False, metadata=_help("A flag that scripts read; True if eval_strategy is not 'no'."))
    do_predict: bool = field(default=False, metadata=_help("A flag that scripts read."))
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata=_help(
            "Checkpoint to go on from: a folder, True for the newest, 'auto' for the newest if there is one."
        ),
    )
    local_rank: int = field(
        default=-1, metadata=_help("Not read: the place of a process comes from torch.distributed.")
    )

    # Left out by newer versions of transformers
    warmup_ratio: float | None = field(
        default=None, metadata=_help("Warmup as a fraction of all steps, where warmup_steps is 0.")
    )
    logging_dir: str | None = field(
        default=None, metadata=_help("Folder of TensorBoard's files; 'runs' in output_dir if not given.")
    )
    overwrite_output_dir: bool = field(
        default=False, metadata=_help("Start anew in an output_dir that already holds a run.")
    )

    # Etude's own
    on_nonfinite: str = field(
        default="stop",
        metadata=_help("What to do at a NaN or infinite loss or gradient.", choices=["stop", "continue"]),
    )
    deterministic: bool = field(
        default=False, metadata=_help("Use only deterministic kernels: bit-identical runs on one kind of GPU, slower.")
    )
    hf_checkpoint_files: bool = field(
        default=True, metadata=_help("Also write the files that transformers.Trainer resumes from.")
    )
    tokens_per_micro_batch: int | None = field(
        default=None,
        metadata=_help("Upper bound on token slots of one micro-batch on the fast path; chosen by etude if not given."),
    )
    fast_path: bool = field(
        default=True, metadata=_help("Train padding-free where the model allows; False always takes the general path.")
    )

    # Before and outside of construction (copies, unpickled objects); real values are set by the metaclass.
    _explicit = frozenset[str]()
    _constructed = False

    def __post_init__(self) -> None:
        self.validate()

    @property
    def explicit(self) -> frozenset[str]:
        """The names the caller chose, old ones under their new name."""
        return self._explicit

    # -- Old names as attributes ---------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        row = OLD_NAMES.get(name)
        if row is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if row.target is None:
            return row.default
        target, _, key = row.target.partition(".")
        value = getattr(self, target)
        return row.read((value or {}).get(key) if key else value)

    def __setattr__(self, name: str, value: Any) -> None:
        row = None if name in self.__dataclass_fields__ else OLD_NAMES.get(name)  # a subclass may have it as a field
        if row is not None and row.kind == "alias" and row.target is not None:
            self._set_alias(row.target, row.write(value))
            return
        object.__setattr__(self, name, value)
        if self._constructed and name in _TWIN_OF:
            object.__setattr__(self, _TWIN_OF[name], value)

    def _set_alias(self, target: str, value: Any) -> None:
        target, _, key = target.partition(".")
        if key:
            setattr(self, target, {**(getattr(self, target) or {}), key: value})
        else:
            setattr(self, target, _default_of(target) if value is UNSET else value)

    # -- Validation ----------------------------------------------------------------------------------------------------

    def validate(self) -> None:
        """Bring every field into its form, derive what was not given, and check the fields against each other.

        Raises:
            ConfigError: names the field and the way out.
        """
        self._normalise()
        self._derive()
        self._check_steps()
        self._check_best_model()
        self._check_combinations()

    def _normalise(self) -> None:
        """Each field by itself: its type, its form, its bounds."""
        self.output_dir = str(Path(os.fspath(self.output_dir or "trainer_output")).expanduser())
        if self.logging_dir is not None:
            self.logging_dir = str(Path(os.fspath(self.logging_dir)).expanduser())
        for item in fields(TrainingArguments):
            if isinstance(item.default, bool):
                setattr(self, item.name, boolean(item.name, getattr(self, item.name)))
        for name in ("tf32", "disable_tqdm", "greater_is_better"):
            setattr(self, name, None if getattr(self, name) is None else boolean(name, getattr(self, name)))
        for name, bounds in NUMBERS.items():
            setattr(self, name, number(name, getattr(self, name), bounds))
        for name in _DICTIONARIES:
            setattr(self, name, dictionary(name, getattr(self, name)))
        self.accelerator_config = accelerator_settings(self.accelerator_config)

        self.logging_strategy = choice("logging_strategy", self.logging_strategy, IntervalStrategy)
        self.eval_strategy = choice("eval_strategy", self.eval_strategy, IntervalStrategy)
        self.save_strategy = choice("save_strategy", self.save_strategy, SaveStrategy)
        for name in ("lr_scheduler_type", "optim", "hub_strategy"):
            setattr(self, name, plain_text(getattr(self, name)))
        self.log_level = one_of("log_level", self.log_level, LOG_LEVELS)
        self.log_level_replica = one_of("log_level_replica", self.log_level_replica, LOG_LEVELS)
        self.on_nonfinite = one_of("on_nonfinite", self.on_nonfinite, ("stop", "continue"))
        self.include_num_input_tokens_seen = _token_count(self.include_num_input_tokens_seen)
        self.include_for_metrics = name_list(self.include_for_metrics)
        for part in self.include_for_metrics:
            one_of("include_for_metrics", part, ("inputs", "loss"))
        self.debug = self.debug.split() if isinstance(self.debug, str) else name_list(self.debug)
        self.report_to = _tracker_names(self.report_to)
        self.label_names = None if self.label_names is None else name_list(self.label_names)
        if self.save_total_limit is not None:
            limit = number("save_total_limit", self.save_total_limit, NUMBERS["max_steps"])
            self.save_total_limit = int(limit) if limit and limit > 0 else None
        if str(self.resume_from_checkpoint).lower() in ("true", "false"):  # as a command line gives it
            self.resume_from_checkpoint = True if str(self.resume_from_checkpoint).lower() == "true" else None  # type: ignore[assignment]

    def _derive(self) -> None:
        """Fields that follow from others where they were not given."""
        self.max_grad_norm = self.max_grad_norm or 0.0
        self.eval_delay = self.eval_delay or 0
        for old, new in _TWINS.items():
            value = getattr(self, old) if getattr(self, new) is None else getattr(self, new)
            if "kwargs" not in new:
                value = boolean(new, value)
            object.__setattr__(self, new, value)
            object.__setattr__(self, old, value)
        if self.disable_tqdm is None:
            self.disable_tqdm = logging.getLogger("transformers").getEffectiveLevel() > logging.WARNING
        if self.full_determinism:
            self.deterministic = True
        if self.use_cpu:
            self.dataloader_pin_memory = False
        if self.eval_strategy != IntervalStrategy.NO:
            self.do_eval = True
        if self.eval_strategy == IntervalStrategy.STEPS and not self.eval_steps:
            self.eval_steps = self.logging_steps
        needs_metric = (
            self.load_best_model_at_end
            or self.save_strategy == SaveStrategy.BEST
            or self.lr_scheduler_type in PLANS_THAT_NEED_A_METRIC
        )
        if needs_metric and self.metric_for_best_model is None:
            self.metric_for_best_model = "loss"
        if self.greater_is_better is None and self.metric_for_best_model is not None:
            self.greater_is_better = not self.metric_for_best_model.endswith("loss")

    def _check_steps(self) -> None:
        """The intervals that are in use; the others may hold anything, as in transformers."""
        if self.logging_strategy == IntervalStrategy.STEPS:
            self.logging_steps = step_interval("logging_steps", self.logging_steps)
        if self.eval_strategy == IntervalStrategy.STEPS:
            self.eval_steps = step_interval("eval_steps", self.eval_steps)
        if self.save_strategy == SaveStrategy.STEPS:
            self.save_steps = step_interval("save_steps", self.save_steps)

    def _check_best_model(self) -> None:
        evaluates = self.eval_strategy != IntervalStrategy.NO
        if self.save_strategy == SaveStrategy.BEST and not evaluates:
            raise ConfigError(
                "'best' needs evaluations to compare, and eval_strategy is 'no'; set eval_strategy to 'steps' or 'epoch'.",
                field="save_strategy",
            )
        if self.lr_scheduler_type in PLANS_THAT_NEED_A_METRIC and not evaluates:
            raise ConfigError(
                f"{self.lr_scheduler_type!r} follows the evaluation metric, and eval_strategy is 'no'; "
                "set eval_strategy to 'steps' or 'epoch'.",
                field="lr_scheduler_type",
            )
        if not self.load_best_model_at_end or self.save_strategy == SaveStrategy.BEST:
            return
        if str(self.save_strategy) != str(self.eval_strategy):
            raise ConfigError(
                f"needs a checkpoint at every evaluation, but save_strategy is '{self.save_strategy}' and eval_strategy "
                f"'{self.eval_strategy}'; give both the same value, or set save_strategy='best'.",
                field="load_best_model_at_end",
            )
        if self.eval_strategy == IntervalStrategy.STEPS and not _is_multiple(self.save_steps, self.eval_steps or 1):
            raise ConfigError(
                f"needs an evaluation at every checkpoint, but save_steps={self.save_steps} is not a multiple of "
                f"eval_steps={self.eval_steps} (and a ratio never is one of a number of steps); change one of them.",
                field="load_best_model_at_end",
            )

    def _check_combinations(self) -> None:
        for first, second in (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval")):
            if getattr(self, first) and getattr(self, second):
                raise ConfigError(f"cannot be combined with {second}; turn one of them off.", field=first)
        if self.dataloader_prefetch_factor is not None and self.dataloader_num_workers == 0:
            raise ConfigError(
                "needs data processes; set dataloader_num_workers to 1 or more, or leave it out.",
                field="dataloader_prefetch_factor",
            )
        if self.train_sampling_strategy == "batch_rebalance":
            raise ConfigError(
                "'batch_rebalance' is refused: every step is dealt to the processes by its tokens already; use 'random'.",
                field="train_sampling_strategy",
            )
        self.train_sampling_strategy = one_of(
            "train_sampling_strategy", self.train_sampling_strategy, SAMPLING_STRATEGIES
        )
        for name, row in FIELDS.items():
            if row.kind == "refused" and asks_for_something(name, getattr(self, name), _default_of(name)):
                raise refuse(row, getattr(self, name))

    # -- Where this process is -----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """The device this process trains on."""
        import torch

        if self.use_cpu:
            return torch.device("cpu")
        if torch.cuda.is_available():
            return torch.device("cuda", self.local_process_index)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")

    @property
    def n_gpu(self) -> int:
        """GPUs used by this process: one or none."""
        return 1 if self.device.type == "cuda" else 0

    @property
    def train_batch_size(self) -> int:
        """Training samples per accumulation step of this process."""
        return self.per_device_train_batch_size

    @property
    def eval_batch_size(self) -> int:
        """Evaluation samples per batch of this process."""
        return self.per_device_eval_batch_size

    @property
    def world_size(self) -> int:
        """Number of processes that train together."""
        return _distributed("get_world_size", alone=1)

    @property
    def process_index(self) -> int:
        """Place of this process among all, from 0."""
        return _distributed("get_rank", alone=0)

    @property
    def local_process_index(self) -> int:
        """Place of this process among those of its machine, from 0; torchrun says it in LOCAL_RANK."""
        index = self.process_index
        return int(os.environ.get("LOCAL_RANK", index)) if self.world_size > 1 else index

    @property
    def parallel_mode(self) -> ParallelMode:
        """Whether several processes train."""
        return ParallelMode.DISTRIBUTED if self.world_size > 1 else ParallelMode.NOT_PARALLEL

    @property
    def ddp_timeout_delta(self) -> timedelta:
        """`ddp_timeout` as a timedelta."""
        return timedelta(seconds=self.ddp_timeout)

    @property
    def should_log(self) -> bool:
        """Whether this process logs."""
        return (self.local_process_index if self.log_on_each_node else self.process_index) == 0

    @property
    def should_save(self) -> bool:
        """Whether this process writes files."""
        return (self.local_process_index if self.save_on_each_node else self.process_index) == 0

    @property
    def place_model_on_device(self) -> bool:
        """Whether the trainer moves the model to `device`. Subclasses may override it."""
        return True

    def get_process_log_level(self) -> int:
        """The level of Python's `logging` for this process; 'passive' is what transformers' logger is set to."""
        level = LOG_LEVELS[self.log_level if self.should_log else self.log_level_replica]
        return logging.getLogger("transformers").getEffectiveLevel() if level is None else level

    @contextmanager
    def main_process_first(self, local: bool = True, desc: str = "work") -> Iterator[None]:
        """Let the first process (of each machine if `local`) do the block before the others, which then find it done."""
        if self.world_size == 1:
            yield
            return
        import torch.distributed

        is_first = (self.local_process_index if local else self.process_index) == 0
        if not is_first:
            torch.distributed.barrier()
        try:
            yield
        finally:
            if is_first:  # also after an error: the others would wait for ever
                torch.distributed.barrier()

    def get_warmup_steps(self, num_training_steps: int) -> int:
        """Steps of warmup in a run of `num_training_steps`: warmup_steps (below 1 a ratio), else warmup_ratio of them."""
        if self.warmup_steps >= 1:
            return int(self.warmup_steps)
        return math.ceil(num_training_steps * (self.warmup_steps or self.warmup_ratio or 0))

    # -- In and out ----------------------------------------------------------------------------------------------------

    def to_dict(self) -> dict[str, Any]:
        """Every field in terms of JSON; fields whose names end in `_token` are masked."""
        return {item.name: _masked(item.name, jsonable(getattr(self, item.name))) for item in fields(self) if item.init}

    def to_json_string(self) -> str:
        """`to_dict` as indented JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def to_sanitized_dict(self) -> dict[str, Any]:
        """`to_dict` and the batch sizes, with text for everything that is no plain value (trackers' hyper-parameters)."""
        settings = {
            **self.to_dict(),
            "train_batch_size": self.train_batch_size,
            "eval_batch_size": self.eval_batch_size,
        }
        return {
            name: value if type(value) in (bool, int, float, str) else str(value) for name, value in settings.items()
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Self:
        """The arguments of a dictionary such as `to_dict` gives, old names included. Masked tokens are left out.

        Raises:
            UnknownArgumentError, ConfigError: as the constructor.
        """
        return cls(**{name: value for name, value in settings.items() if value is None or value != _mask(name)})

    @classmethod
    def from_transformers(cls, theirs: Any) -> Self:
        """The same settings from a `transformers.TrainingArguments` or a subclass; attributes etude has not are left out.

        Raises:
            ConfigError: `theirs` uses something that etude refuses (deepspeed, fsdp, push_to_hub, ...).
        """
        own = {"on_nonfinite", "deterministic", "hf_checkpoint_files", "tokens_per_micro_batch", "fast_path"}
        settings = {}
        for name in (
            item.name for item in fields(TrainingArguments) if item.name not in own and hasattr(theirs, item.name)
        ):
            value = getattr(theirs, name)
            if name == "output_dir" or (value != _default_of(name) and value != _defaults()[name]):
                settings[name] = value
        return cls(**settings)

    def __repr__(self) -> str:
        lines = "".join(f"    {name}={value!r},\n" for name, value in self.to_dict().items())
        return f"{type(self).__name__}(\n{lines})"


class Classification(NamedTuple):
    """One row of the documentation's table of argument names."""

    name: str
    kind: str
    target: str | None
    default: Any
    note: str


def classification() -> list[Classification]:
    """Every field in the order of the constructor, then every old name, with what etude does with it."""
    current = [
        Classification(item.name, FIELDS[item.name].kind, FIELDS[item.name].target, _raw_default(item),
                       FIELDS[item.name].note or item.metadata["help"])
        for item in fields(TrainingArguments)
    ]  # fmt: skip
    old = [Classification(row.name, row.kind, row.target, row.default, row.note) for row in OLD_NAMES.values()]
    return current + old


def _distributed(question: str, *, alone: int) -> int:
    """What torch.distributed answers, or `alone` where no process group has been started."""
    import torch.distributed as group

    if not (group.is_available() and group.is_initialized()):
        return alone
    return int(getattr(group, question)())


def _is_multiple(save_steps: float, eval_steps: float) -> bool:
    if (save_steps < 1) != (eval_steps < 1):
        return False
    quotient = save_steps / eval_steps
    return round(quotient) >= 1 and math.isclose(quotient, round(quotient), rel_tol=1e-9)


def _token_count(value: Any) -> str:
    words = {True: "all", "true": "all", False: "no", "false": "no", None: "no"}
    value = value.lower() if isinstance(value, str) else value
    return one_of("include_num_input_tokens_seen", words.get(value, value), TOKEN_COUNTS)


def _tracker_names(value: str | list[str] | None) -> list[str]:
    names = [name for name in name_list(value) if name != "none"]
    if "all" in names:
        return [name for name in TRACKERS if importlib.util.find_spec(name) is not None]
    return names


def _mask(name: str) -> str | None:
    return f"<{name.upper()}>" if name.endswith("_token") else None


def _masked(name: str, value: Any) -> Any:
    return value if value is None else (_mask(name) or value)
