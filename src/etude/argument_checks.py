"""Pure checks of single training arguments: value in, value of the right type out, or an error that names the field."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Iterable, Mapping
from enum import Enum, StrEnum
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar

from etude.argument_names import ACCELERATOR_DEFAULTS
from etude.errors import ConfigError, NotAnInstanceError, nearest

Choice = TypeVar("Choice", bound=StrEnum)


class IntervalStrategy(StrEnum):
    """When something happens during training: never, every so many optimizer steps, or at the end of each epoch."""

    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"


class SaveStrategy(StrEnum):
    """When a checkpoint is written: as `IntervalStrategy`, or whenever an evaluation is the best so far."""

    NO = "no"
    STEPS = "steps"
    EPOCH = "epoch"
    BEST = "best"


class Bounds(NamedTuple):
    """What a number may be. `optional` fields may be None."""

    minimum: float
    maximum: float = math.inf
    whole: bool = False
    optional: bool = False

    def __str__(self) -> str:
        kind = "a whole number" if self.whole else "a finite number"
        upper = "" if math.isinf(self.maximum) else f" and <= {self.maximum:g}"
        return f"{kind} >= {self.minimum:g}{upper}" + (" or None" if self.optional else "")


_COUNT = Bounds(1, whole=True)
_OPTIONAL_COUNT = Bounds(1, whole=True, optional=True)
_AMOUNT = Bounds(0)
_SHARE = Bounds(0, 1)

NUMBERS: Final[dict[str, Bounds]] = {
    "per_device_train_batch_size": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "gradient_accumulation_steps": _COUNT,
    "num_train_epochs": _AMOUNT,
    "max_steps": Bounds(-1, whole=True),
    "tokens_per_micro_batch": _OPTIONAL_COUNT,
    "gpu_memory_limit_gib": Bounds(0.25, optional=True),
    "learning_rate": _AMOUNT,
    "warmup_steps": _AMOUNT,
    "warmup_ratio": Bounds(0, 1, optional=True),
    "weight_decay": _AMOUNT,
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": _AMOUNT,
    "max_grad_norm": Bounds(0, optional=True),
    "label_smoothing_factor": _SHARE,
    "neftune_noise_alpha": Bounds(0, optional=True),
    "torch_empty_cache_steps": _OPTIONAL_COUNT,
    "eval_delay": Bounds(0, optional=True),
    "eval_accumulation_steps": _OPTIONAL_COUNT,
    "dataloader_num_workers": Bounds(0, whole=True),
    "dataloader_prefetch_factor": _OPTIONAL_COUNT,
    "seed": Bounds(0, 2**32 - 1, whole=True),
    "data_seed": Bounds(0, 2**63 - 1, whole=True, optional=True),
}


def number(name: str, value: Any, bounds: Bounds) -> int | float | None:
    """`value` as a plain Python number within `bounds`. Text is read as a number: YAML takes `5e-5` for a string.

    Raises:
        ConfigError: it is not a number, or out of bounds.
    """
    if value is None and bounds.optional:
        return None
    result = _as_number(value)
    if result is None or not bounds.minimum <= result <= bounds.maximum or math.isinf(result):
        raise ConfigError(f"expected {bounds}, got {value!r}.", field=name)
    if not bounds.whole:
        return result
    if result != int(result):
        raise ConfigError(f"expected {bounds}, got {value!r}.", field=name)
    return int(result)


def step_interval(name: str, value: Any) -> int | float:
    """Optimizer steps between two events: a whole number, or a fraction in (0, 1) of all steps of the run.

    Raises:
        ConfigError: zero, negative, not finite, or a fraction above one.
    """
    steps = _as_number(value)
    if steps is None or not 0 < steps < math.inf:
        raise ConfigError(f"expected a number of steps > 0 or a ratio of the run < 1, got {value!r}.", field=name)
    if steps < 1:
        return steps
    if steps != int(steps):
        raise ConfigError(f"must be a whole number of steps if it is bigger than 1, got {value!r}.", field=name)
    return int(steps)


def _as_number(value: Any) -> int | float | None:
    """A Python number of the same value (also of numpy's scalars and of text), or None. NaN is no number here."""
    if isinstance(value, bool):
        return None
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if not isinstance(value, Real):
        return None
    result = int(value) if isinstance(value, Integral) else float(value)
    return None if math.isnan(result) else result


def boolean(name: str, value: Any) -> bool:
    """`value` as True or False; None is False, as it is for scripts that test the field.

    Raises:
        ConfigError: it is neither; the text "false" would otherwise count as true.
    """
    if value is None:
        return False
    if isinstance(value, str):
        words = {"true": True, "false": False}
        if value.lower() not in words:
            raise ConfigError(f"expected True or False, got the text {value!r}.", field=name)
        return words[value.lower()]
    if value not in (True, False):
        raise ConfigError(f"expected True or False, got {value!r}.", field=name)
    return bool(value)


def plain_text(value: Any) -> Any:
    """The value of an enum member (transformers' names are enums), anything else as it is."""
    return value.value if isinstance(value, Enum) else value


def choice(name: str, value: Any, choices: type[Choice]) -> Choice:
    """The member of `choices` with this value.

    Raises:
        ConfigError: there is none; the message names the nearest.
    """
    text = plain_text(value)
    if text is False or text is None:  # YAML 1.1 reads `no` as false
        text = "no"
    return choices(one_of(name, text, [member.value for member in choices]))


def one_of(name: str, value: Any, known: Iterable[str]) -> str:
    """`value`, if it is among `known`.

    Raises:
        ConfigError: it is not; the message names the nearest.
    """
    text, known = plain_text(value), list(known)
    if text not in known:
        near = nearest(str(text), known)
        hint = f"; did you mean {near!r}?" if near else "."
        raise ConfigError(f"{value!r} is none of {', '.join(known)}{hint}", field=name)
    return str(text)


def dictionary(name: str, value: Any) -> dict[str, Any] | None:
    """A dictionary, also from its JSON text.

    Raises:
        ConfigError: it is something else, or the JSON cannot be read.
    """
    if value is None or value == "":
        return None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ConfigError(f"expected a dictionary or its JSON text, got {value!r} ({error}).", field=name) from None
        value = _typed_words(value)
    if not isinstance(value, Mapping):
        raise ConfigError(f"expected a dictionary or its JSON text, got {value!r}.", field=name)
    return dict(value)


def _typed_words(value: Any) -> Any:
    """JSON typed into a shell often quotes too much: "true" and "3" become what they say, at any depth."""
    if isinstance(value, dict):
        return {key: _typed_words(item) for key, item in value.items()}
    if isinstance(value, str):
        if value.lower() in ("true", "false"):
            return value.lower() == "true"
        parsed = _as_number(value)
        if parsed is not None and value.lstrip("+-").isdigit():
            return int(parsed)
        return value if parsed is None or math.isinf(parsed) else parsed
    return value


def accelerator_settings(value: Any) -> dict[str, Any] | None:
    """`accelerator_config` as a dictionary, from a dictionary, JSON text, a JSON file or accelerate's own object.

    Raises:
        ConfigError: a key that accelerate's configuration does not have, or a file that cannot be read.
    """
    name = "accelerator_config"
    if isinstance(value, type):
        raise NotAnInstanceError(
            "Tried passing in a callable to `accelerator_config`: give an instance or a dictionary"
        )
    if isinstance(value, str | os.PathLike) and not str(value).startswith("{"):
        try:
            value = Path(value).read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"cannot read the file {str(value)!r}: {error.strerror}.", field=name) from error
    elif not isinstance(value, type) and callable(getattr(value, "to_dict", None)):
        value = value.to_dict()
    settings = dictionary(name, value)
    for key in settings or ():
        one_of(name, key, ACCELERATOR_DEFAULTS)
    state = getattr(sys.modules.get("accelerate.state"), "PartialState", None)
    if (settings or {}).get("use_configured_state") and not getattr(state, "_shared_state", None):
        raise ConfigError(
            "asks for the state of accelerate, and there is none. Please define this beforehand.", field=name
        )
    return settings


def name_list(value: Any) -> list[str]:
    """A list of names from a list, one name, or nothing."""
    if value is None or value == "":
        return []
    return [plain_text(value)] if isinstance(value, str) else [plain_text(item) for item in value]


def jsonable(value: Any) -> Any:
    """`value` made of what JSON holds: enums by value, paths and torch types by name, configuration objects as dictionaries."""
    if isinstance(value, Enum):
        return jsonable(value.value)
    if isinstance(value, Mapping):
        return {str(plain_text(key)): jsonable(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [jsonable(item) for item in value]
    if value is None or isinstance(value, str | int | float):
        return value
    if not isinstance(value, type) and callable(getattr(value, "to_dict", None)):
        return jsonable(value.to_dict())
    return str(value).removeprefix("torch.")  # torch.float32 is written "float32", a path as its text
