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
from dataclasses import dataclass, fields
from datetime import timedelta
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self, TypeVar

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
from etude.argument_fields import LOG_LEVELS, ArgumentFields
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


SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length")
TOKEN_COUNTS = ("no", "all", "non_padding")
TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")  # what "all" looks for
KUBEFLOW_SERVER = "KUBEFLOW_TRAINER_SERVER_URL"  # set by a Kubeflow TrainJob that wants to be told how far its run is
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


@dataclass(repr=False)
class TrainingArguments(ArgumentFields, GroupedSetters, metaclass=_AcceptsEveryName):
    """The settings of a run. Each field's meaning and unit is in its `help`.

    Old names are accepted as keywords and stay readable as attributes. `explicit` holds the (new) names that the caller
    chose. Attributes may be changed afterwards; `validate()` checks all of them again.

    Raises:
        UnknownArgumentError: a name that never existed; also a TypeError. It suggests the nearest one.
        ConfigError: a wrong value, values that contradict each other, or a setting that etude refuses; a ValueError.
    """

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
        if isinstance(self.torch_empty_cache_steps, float):
            raise ConfigError(
                f"expected a whole number of steps, got {self.torch_empty_cache_steps!r}: it is never a ratio of the run.",
                field="torch_empty_cache_steps",
            )
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
        if self.base_precision is not None:
            self.base_precision = one_of("base_precision", self.base_precision, ("fp8",))
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
        if self.torch_compile_backend is not None or self.torch_compile_mode is not None:
            self.torch_compile = True
        if self.torch_compile and self.torch_compile_backend is None:
            self.torch_compile_backend = "inductor"
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
        own = {"on_nonfinite", "deterministic", "hf_checkpoint_files", "fast_path"}
        own |= {"tokens_per_micro_batch", "gpu_memory_limit_gib", "activation_offloading", "base_precision"}
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
        names = [name for name in TRACKERS if importlib.util.find_spec(name) is not None]
    if os.environ.get(KUBEFLOW_SERVER) and "kubeflow" not in names:
        names.append("kubeflow")
    return names


def _mask(name: str) -> str | None:
    return f"<{name.upper()}>" if name.endswith("_token") else None


def _masked(name: str, value: Any) -> Any:
    return value if value is None else (_mask(name) or value)
