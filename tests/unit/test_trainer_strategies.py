"""When a run logs, evaluates and saves, and which checkpoints it keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from short_run import Scripted, checkpoints, logged, short_trainer
from tiny import adapter_of, assert_same_bits, language_rows

EVAL_ROWS = language_rows(4, 50)


def steps_with(trainer: Any, key: str) -> list[int]:
    return [entry["step"] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"logging_strategy": "no"}, []),
        ({"logging_strategy": "epoch"}, [5, 10]),
        ({"logging_steps": 4}, [4, 8]),
        ({"logging_steps": 4, "logging_first_step": True}, [1, 4, 8]),
        ({"logging_steps": 0.3}, [3, 6, 9]),
        ({"logging_steps": 500}, []),
    ],
    ids=str,
)
def test_steps_that_are_logged(settings: dict[str, Any], steps: list[int]) -> None:
    trainer = short_trainer(**settings)
    trainer.train()
    assert steps_with(trainer, "loss") == steps


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"eval_strategy": "no"}, []),
        ({"eval_strategy": "epoch"}, [5, 10]),
        ({"eval_strategy": "steps", "eval_steps": 4}, [4, 8, 10]),
        ({"eval_strategy": "steps", "logging_steps": 5}, [5, 10]),
        ({"eval_strategy": "steps", "eval_steps": 0.5}, [5, 10]),
        ({"eval_strategy": "epoch", "eval_delay": 2}, [10]),
        ({"eval_strategy": "steps", "eval_steps": 2, "eval_delay": 5}, [6, 8, 10]),
        ({"eval_strategy": "epoch", "eval_on_start": True}, [0, 5, 10]),
        ({"evaluation_strategy": "epoch"}, [5, 10]),
    ],
    ids=str,
)
def test_steps_that_are_evaluated(settings: dict[str, Any], steps: list[int]) -> None:
    trainer = short_trainer(eval_rows=EVAL_ROWS, **settings)
    trainer.train()
    assert steps_with(trainer, "eval_loss") == steps


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"save_strategy": "no"}, []),
        ({"save_strategy": "epoch"}, [5, 10]),
        ({"save_strategy": "steps", "save_steps": 4}, [4, 8, 10]),
        ({"save_strategy": "steps", "save_steps": 0.5}, [5, 10]),
        ({"save_strategy": "steps", "save_steps": 500}, [10]),
        ({"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2}, [9, 10]),
        ({"save_strategy": "epoch", "save_total_limit": 1}, [10]),
    ],
    ids=str,
)
def test_checkpoints_that_are_left(settings: dict[str, Any], steps: list[int]) -> None:
    short_trainer(**settings).train()
    assert checkpoints() == steps


def judged(*scores: float, **settings: Any) -> Any:
    """A run that is evaluated at every second step and judged by the given scores."""
    arguments: dict[str, Any] = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "metric_for_best_model": "score",
        "greater_is_better": True,
    }
    return short_trainer(eval_rows=EVAL_ROWS, compute_metrics=Scripted(*scores), **(arguments | settings))


def test_the_best_checkpoint_outlives_the_limit() -> None:
    trainer = judged(0.1, 0.9, 0.3, 0.2, 0.4, save_total_limit=2)
    trainer.train()
    assert checkpoints() == [4, 10]
    assert trainer.state.best_global_step == 4
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-4"


@pytest.mark.parametrize("limit", [None, 1, 2])
def test_the_best_model_is_loaded_at_the_end(limit: int | None) -> None:
    trainer = judged(0.1, 0.9, 0.3, 0.2, 0.4, load_best_model_at_end=True, save_total_limit=limit)
    trainer.train()
    saved = load_file("out/checkpoint-4/adapter_model.safetensors")
    assert_same_bits(adapter_of(trainer.model), saved)
    assert trainer.state.best_metric == 0.9


def test_the_smallest_loss_is_the_best_by_default() -> None:
    trainer = short_trainer(
        eval_rows=EVAL_ROWS, eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True
    )
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert trainer.state.best_metric == min(losses)
    assert trainer.state.best_global_step == [5, 10][losses.index(min(losses))]


def test_saving_only_new_bests() -> None:
    judged(0.1, 0.9, 0.3, 0.95, 0.4, save_strategy="best").train()
    assert checkpoints() == [2, 4, 8]


def test_the_best_that_no_checkpoint_falls_on_is_not_lost() -> None:
    """Best at step 3, saved every 4: under transformers the best weights are gone."""
    trainer = judged(0.9, 0.2, 0.3, 0.1, eval_steps=3, save_steps=4)
    trainer.train()
    assert trainer.state.best_global_step == 3
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-3"
    assert Path(trainer.state.best_model_checkpoint, "adapter_model.safetensors").exists()


def test_trainer_state_is_valid_json_for_every_reader() -> None:
    """No Infinity or NaN, which JSON does not have; an unknown best metric is null."""
    short_trainer(save_strategy="epoch").train()

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} in trainer_state.json")

    text = Path("out/checkpoint-5/trainer_state.json").read_text()
    state = json.loads(text, parse_constant=refuse)
    assert (state["global_step"], state["epoch"], state["max_steps"]) == (5, 1.0, 10)
    assert state["best_metric"] is None
    assert [entry["step"] for entry in state["log_history"]] == [1, 2, 3, 4, 5]
