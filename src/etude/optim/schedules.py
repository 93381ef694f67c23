"""Learning-rate schedules as pure functions of the step.

The learning rate of optimizer step k (counted from 0) is `lr_init * factor(name, k, ...)`. Nothing here has state, so a
resumed run needs only its step number. The arithmetic keeps the order of operations of the peer's formulas: the learning
rates are equal bit for bit, not only to rounding.

Two schedules react to a metric instead of the step, `reduce_lr_on_plateau` and `greedy`; `create_scheduler` builds them,
`factor` does not know them.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, cast

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from etude.errors import ConfigError, UnknownArgumentError, nearest

Curve = Callable[..., float]


def _warmup(step: int, num_warmup_steps: int) -> float:
    return float(step) / float(max(1, num_warmup_steps))


def _progress(step: int, num_warmup_steps: int, num_training_steps: int) -> float:
    """Share of the steps after warm-up that are done: 0 at its end, 1 at the end of training."""
    return float(step - num_warmup_steps) / float(max(1, num_training_steps - num_warmup_steps))


def _linear(step: int, num_warmup_steps: int, num_training_steps: int) -> float:
    if step < num_warmup_steps:
        return _warmup(step, num_warmup_steps)
    return max(0.0, float(num_training_steps - step) / float(max(1, num_training_steps - num_warmup_steps)))


def _cosine(step: int, num_warmup_steps: int, num_training_steps: int, *, num_cycles: float = 0.5) -> float:
    return _cosine_to_floor(step, num_warmup_steps, num_training_steps, num_cycles=num_cycles, floor=0.0)


def _cosine_to_floor(
    step: int, num_warmup_steps: int, num_training_steps: int, *, num_cycles: float, floor: float
) -> float:
    if step < num_warmup_steps:
        return _warmup(step, num_warmup_steps)
    progress = _progress(step, num_warmup_steps, num_training_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * float(num_cycles) * 2.0 * progress))
    return max(0.0, cosine * (1 - floor) + floor)


def _cosine_with_restarts(step: int, num_warmup_steps: int, num_training_steps: int, *, num_cycles: float = 1) -> float:
    if step < num_warmup_steps:
        return _warmup(step, num_warmup_steps)
    progress = _progress(step, num_warmup_steps, num_training_steps)
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((float(num_cycles) * progress) % 1.0))))


def _polynomial(
    step: int,
    num_warmup_steps: int,
    num_training_steps: int,
    *,
    lr_init: float,
    lr_end: float = 1e-7,
    power: float = 1.0,
) -> float:
    if not lr_init > lr_end:
        raise ConfigError(f"lr_end={lr_end} must be below learning_rate={lr_init}", field="lr_scheduler_kwargs")
    if step < num_warmup_steps:
        return _warmup(step, num_warmup_steps)
    if step > num_training_steps:
        return lr_end / lr_init
    # A run that is all warm-up has no decay steps; its last value is the peak.
    remaining = 1 - (step - num_warmup_steps) / max(1, num_training_steps - num_warmup_steps)
    decayed = (lr_init - lr_end) * remaining**power + lr_end
    return float(decayed / lr_init)


def _constant(step: int, num_warmup_steps: int, num_training_steps: int) -> float:
    return 1.0


def _constant_with_warmup(step: int, num_warmup_steps: int, num_training_steps: int) -> float:
    return _warmup(step, num_warmup_steps) if step < num_warmup_steps else 1.0


def _inverse_sqrt(step: int, num_warmup_steps: int, num_training_steps: int, *, timescale: int | None = None) -> float:
    if timescale is None:
        timescale = num_warmup_steps or 10_000
    if step < num_warmup_steps:
        return _warmup(step, num_warmup_steps)
    return 1.0 / math.sqrt((step + timescale - num_warmup_steps) / timescale)


def _floor(min_lr: float | None, min_lr_rate: float | None, lr_init: float) -> float:
    """The lowest factor, from either of its two spellings."""
    if (min_lr is None) == (min_lr_rate is None):
        raise ConfigError("give exactly one of min_lr and min_lr_rate", field="lr_scheduler_kwargs")
    return min_lr / lr_init if min_lr is not None else cast(float, min_lr_rate)


def _cosine_with_min_lr(
    step: int,
    num_warmup_steps: int,
    num_training_steps: int,
    *,
    lr_init: float,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
) -> float:
    floor = _floor(min_lr, min_lr_rate, lr_init)
    return _cosine_to_floor(step, num_warmup_steps, num_training_steps, num_cycles=num_cycles, floor=floor)


def _cosine_warmup_with_min_lr(
    step: int,
    num_warmup_steps: int,
    num_training_steps: int,
    *,
    lr_init: float,
    num_cycles: float = 0.5,
    min_lr: float | None = None,
    min_lr_rate: float | None = None,
    warmup_lr_rate: float | None = None,
) -> float:
    """Unlike the other curves this one never starts at 0: step k has the value that they reach at step k + 1."""
    floor = _floor(min_lr, min_lr_rate, lr_init)
    if step < num_warmup_steps:
        if warmup_lr_rate is None:
            return (step + 1.0) / max(1.0, float(num_warmup_steps))
        start = float(warmup_lr_rate)
        return start + (1.0 - start) * float(step) / max(1, num_warmup_steps - 1)
    progress = (float(step) - num_warmup_steps + 1.0) / max(1.0, float(num_training_steps) - num_warmup_steps)
    cosine = 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress))
    return max(0.0, cosine * (1 - floor) + floor)


# How far a ramp has climbed when it is `progress` (0 to 1) through, and how much of a fall is left.
_RISE: dict[str, Callable[[float, float], float]] = {
    "linear": lambda progress, _: progress,
    "cosine": lambda progress, _: 0.5 * (1.0 - math.cos(math.pi * progress)),
    "1-sqrt": lambda progress, _: 1.0 - math.sqrt(1.0 - progress),
}
_FALL: dict[str, Callable[[float, float], float]] = {
    "linear": lambda progress, _: 1.0 - progress,
    "cosine": lambda progress, cycles: 0.5 * (1.0 + math.cos(math.pi * float(cycles) * 2.0 * progress)),
    "1-sqrt": lambda progress, _: 1.0 - math.sqrt(progress),
}


def _warmup_stable_decay(
    step: int,
    num_warmup_steps: int,
    num_training_steps: int,
    *,
    num_decay_steps: int,
    num_stable_steps: int | None = None,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
    min_lr_ratio: float = 0.0,
    num_cycles: float = 0.5,
) -> float:
    for field, shape, known in (("warmup_type", warmup_type, _RISE), ("decay_type", decay_type, _FALL)):
        if shape not in known:
            raise ConfigError(f"{field}={shape!r} is not one of {', '.join(known)}", field="lr_scheduler_kwargs")
    if num_stable_steps is None:
        num_stable_steps = num_training_steps - num_warmup_steps - num_decay_steps
    if step < num_warmup_steps:
        ramp = _RISE[warmup_type](_warmup(step, num_warmup_steps), num_cycles)
        return max(0.0, ramp * (1.0 - min_lr_ratio) + min_lr_ratio)
    if step < num_warmup_steps + num_stable_steps:
        return 1.0
    if step < num_warmup_steps + num_stable_steps + num_decay_steps:
        progress = float(step - num_warmup_steps - num_stable_steps) / float(max(1, num_decay_steps))
        ramp = _FALL[decay_type](progress, num_cycles)
        return max(0.0, ramp * (1.0 - min_lr_ratio) + min_lr_ratio)
    return min_lr_ratio


CURVES: Mapping[str, Curve] = {
    "linear": _linear,
    "cosine": _cosine,
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": _polynomial,
    "constant": _constant,
    "constant_with_warmup": _constant_with_warmup,
    "inverse_sqrt": _inverse_sqrt,
    "cosine_with_min_lr": _cosine_with_min_lr,
    "cosine_warmup_with_min_lr": _cosine_warmup_with_min_lr,
    "warmup_stable_decay": _warmup_stable_decay,
}
_WITHOUT_OPTIONS = ("constant", "constant_with_warmup")  # transformers accepts and ignores options of these two
METRIC_SCHEDULES = ("reduce_lr_on_plateau", "greedy")
SCHEDULE_NAMES: tuple[str, ...] = (*CURVES, *METRIC_SCHEDULES)


def factor(name: str, step: int, num_warmup_steps: int, num_training_steps: int, **kwargs: Any) -> float:
    """What the base learning rate is multiplied with at optimizer step `step`, counted from 0.

    Args:
        name: a name of `CURVES`, or an enum member whose value is one.
        num_warmup_steps: optimizer steps of warm-up.
        num_training_steps: optimizer steps of the whole run.
        kwargs: what the curve takes besides (`num_cycles`, `power`, `min_lr`, ...); curves with an absolute end also
            need `lr_init`.

    Raises:
        ConfigError: unknown name, or an option that the curve does not have or cannot use.
    """
    return _curve(_plain(name), kwargs)(step, num_warmup_steps, num_training_steps, **kwargs)


def create_scheduler(
    name: str,
    optimizer: Optimizer,
    num_warmup_steps: int,
    num_training_steps: int,
    kwargs: Mapping[str, Any] | None = None,
) -> LRScheduler:
    """A torch scheduler over the schedule called `name`; callbacks and user code see a real torch object.

    `reduce_lr_on_plateau` gives torch's own class. `greedy` gives the class of transformers that has the same methods
    (its `step` takes the metric) but no common base with torch's.

    Raises:
        ConfigError: as `factor`; also where this transformers has no greedy schedule.
    """
    name, options = _plain(name), dict(kwargs or {})
    if name == "reduce_lr_on_plateau":
        return _metric_scheduler(ReduceLROnPlateau, optimizer, options)
    if name == "greedy":
        return _metric_scheduler(_greedy_class(), optimizer, options)
    if options and name in _WITHOUT_OPTIONS:
        warnings.warn(f"lr_scheduler_kwargs: {sorted(options)} are not used by '{name}'", stacklevel=2)
        options = {}
    curve = _curve(name, options)
    if "lr_init" in _options(curve):
        options.setdefault("lr_init", optimizer.defaults["lr"])
    multiply = partial(curve, num_warmup_steps=num_warmup_steps, num_training_steps=num_training_steps, **options)
    return LambdaLR(optimizer, multiply)


def _plain(name: str) -> str:
    """The text of a name given as a text or as a member of an enum of texts."""
    return str(getattr(name, "value", name))


def _options(function: Callable[..., Any]) -> dict[str, bool]:
    """Options that a curve or a scheduler class takes by name -> whether it must be given."""
    positional = ("step", "num_warmup_steps", "num_training_steps", "optimizer")
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.name not in positional}


def _curve(name: str, options: Mapping[str, Any]) -> Curve:
    if name not in CURVES:
        if name in METRIC_SCHEDULES:
            raise ConfigError(f"'{name}' follows a metric and is no function of the step", field="lr_scheduler_type")
        near = nearest(name, SCHEDULE_NAMES)
        hint = f"did you mean '{near}'?" if near else f"known: {', '.join(SCHEDULE_NAMES)}"
        raise ConfigError(f"unknown schedule '{name}'; {hint}", field="lr_scheduler_type")
    _check_options(name, CURVES[name], options)
    return CURVES[name]


def _check_options(name: str, function: Callable[..., Any], options: Mapping[str, Any]) -> None:
    known = _options(function)
    for option in options:
        if option not in known:
            near = nearest(option, tuple(known))
            public = [option_name for option_name in known if option_name != "lr_init"]
            hint = f"did you mean '{near}'?" if near else f"it takes {', '.join(public) or 'none'}"
            raise UnknownArgumentError(f"'{name}' has no option '{option}'; {hint}", field="lr_scheduler_kwargs")
    for option, required in known.items():
        if required and option not in options and option != "lr_init":
            raise ConfigError(f"'{name}' needs '{option}'", field="lr_scheduler_kwargs")


def _metric_scheduler(scheduler_class: type[Any], optimizer: Optimizer, options: dict[str, Any]) -> LRScheduler:
    _check_options(scheduler_class.__name__, scheduler_class, options)
    return cast(LRScheduler, scheduler_class(optimizer, **options))


def _greedy_class() -> type[Any]:
    import transformers.optimization

    greedy = getattr(transformers.optimization, "GreedyLR", None)
    if greedy is None:
        raise ConfigError(
            "'greedy' needs a newer transformers: pip install --upgrade transformers", field="lr_scheduler_type"
        )
    return cast(type[Any], greedy)
