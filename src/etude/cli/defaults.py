"""What the command line sets where nobody said otherwise: the settings that make a LoRA run good.

The drop-in `TrainingArguments` keeps the defaults of transformers; these belong to `etude train` and its recipes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from etude.cli.recipe import Recipe
from etude.errors import ConfigError

# LoRA tolerates large batches badly: Schulman et al., "LoRA Without Regret", Thinking Machines 2025.
GLOBAL_BATCH_SIZE = 16

# Peak learning rate 5e-4 * (2000 / hidden_size)^p, about ten times that of full fine-tuning; p was fitted per family
# (the public copy of the Tinker cookbook). At hidden size 4096 the two give 2.9e-4 and 4.7e-4. The fit says nothing
# about models of a few hundred channels, where it would go on rising.
_LEARNING_RATE_POWERS = {"llama": 0.781, "qwen": 0.0775}
_LEARNING_RATE_ELSEWHERE = 2e-4
_LARGEST_LEARNING_RATE = 1e-3

# A tenth of the run between two evaluations, each with its checkpoint, so that the best one can be kept.
_EVALUATION_INTERVAL = 0.1
# A run of a few updates would spend its time on evaluations and checkpoints: a quarter there.
_SHORT_STEPS, _SHORT_INTERVAL = 30, 0.25

_POINTS_OF_A_CURVE = 30


class Facts(NamedTuple):
    """What the defaults depend on."""

    num_processes: int
    has_bfloat16: bool
    """Whether the device of the run has instructions for products in bfloat16."""
    num_eval_rows: int
    model_type: str
    hidden_size: int | None
    num_train_rows: int | None = None
    """None for a stream."""


def learning_rate(model_type: str, hidden_size: int | None) -> float:
    """The peak learning rate for a model, to two digits."""
    for family, power in _LEARNING_RATE_POWERS.items():
        if model_type.startswith(family) and hidden_size:
            return min(float(f"{5e-4 * (2000 / hidden_size) ** power:.1e}"), _LARGEST_LEARNING_RATE)
    return _LEARNING_RATE_ELSEWHERE


def batch_sizes(
    global_batch_size: int | None, per_device: int | None, accumulation: int | None, num_processes: int
) -> tuple[int, int]:
    """(rows per process and accumulation step, accumulation steps) whose product over all processes is the global batch.

    Raises:
        ConfigError: an explicit `global_batch_size` that the other numbers do not divide.
    """
    if global_batch_size is None and per_device is not None and accumulation is not None:
        return per_device, accumulation
    wanted = global_batch_size or GLOBAL_BATCH_SIZE
    unit = num_processes * (per_device or 1) * (accumulation or 1)
    both_said = per_device is not None and accumulation is not None
    missing = 1 if both_said else max(1, wanted // unit)
    if global_batch_size is not None and missing * unit != global_batch_size:
        raise ConfigError(
            f"{global_batch_size} rows cannot be dealt evenly to {num_processes} processes with "
            f"per_device_train_batch_size={per_device or 1} and gradient_accumulation_steps={accumulation or 1}; "
            f"{missing * unit} can",
            field="global_batch_size",
        )
    if per_device is None:
        return missing, accumulation or 1
    return per_device, accumulation or missing


def training_settings(recipe: Recipe, facts: Facts) -> dict[str, Any]:
    """The training arguments of a recipe together with the defaults of the command line."""
    said = recipe.training
    per_device, accumulation = batch_sizes(
        recipe.global_batch_size,
        said.get("per_device_train_batch_size"),
        said.get("gradient_accumulation_steps"),
        facts.num_processes,
    )
    steps = _steps(said, facts, per_device * accumulation * facts.num_processes)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "logging_steps": _logging_steps(steps),
        "logging_first_step": True,
        "save_total_limit": 2,
    }
    if "learning_rate" not in said:
        settings["learning_rate"] = learning_rate(facts.model_type, facts.hidden_size)
    if "warmup_steps" not in said:
        settings["warmup_ratio"] = 0.03
    if facts.has_bfloat16 and not said.get("fp16"):
        settings["bf16"] = True
    return settings | _evaluation(said, facts.num_eval_rows, steps) | said


def _steps(said: Mapping[str, Any], facts: Facts, global_batch: int) -> float | None:
    """Updates of the run, or about so many; None where it is not known."""
    if said.get("max_steps", -1) > 0:
        return float(said["max_steps"])
    if facts.num_train_rows is None:
        return None
    return math.ceil(facts.num_train_rows / global_batch) * float(said.get("num_train_epochs", 3))


def _logging_steps(steps: float | None) -> int:
    """Updates between two logs: few enough for a curve of about `_POINTS_OF_A_CURVE` points, and at most ten."""
    return 10 if steps is None else int(min(10, max(1, steps // _POINTS_OF_A_CURVE)))


def _evaluation(said: Mapping[str, Any], num_eval_rows: int, steps: float | None) -> dict[str, Any]:
    """Evaluate and save together and keep the best, unless there is nothing to evaluate or the recipe says `no`."""
    share = _SHORT_INTERVAL if steps is not None and steps < _SHORT_STEPS else _EVALUATION_INTERVAL
    saving = said.get("save_strategy", "steps")
    chosen = said.get("eval_strategy", said.get("evaluation_strategy"))
    evaluating = chosen or ("steps" if saving in ("no", "best") else saving)
    if not num_eval_rows or evaluating == "no":
        return {} if "save_steps" in said else {"save_steps": share}
    settings: dict[str, Any] = {"eval_strategy": evaluating}
    if evaluating == "steps":
        interval = said.get("eval_steps", said.get("save_steps", share))
        settings |= {"eval_steps": interval, "save_steps": interval}
    if "save_strategy" not in said:
        saving = settings["save_strategy"] = evaluating
    return settings | {"load_best_model_at_end": saving in ("best", evaluating)}
