"""Callbacks see the same events in the same order, with the same state, flags and logs, as under transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import transformers
from side_by_side import Run, assert_same_log, ours, theirs

from tiny import causal_lora, language_rows

EVENTS = (
    "on_init_end",
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_step_begin",
    "on_pre_optimizer_step",
    "on_optimizer_step",
    "on_substep_end",
    "on_step_end",
    "on_evaluate",
    "on_predict",
    "on_save",
    "on_log",
    "on_prediction_step",
)
FLAGS = ("should_training_stop", "should_epoch_stop", "should_save", "should_evaluate", "should_log")


class Event(NamedTuple):
    """One call of a callback: its name, where training stood, the flags that were up, and the keys of what it got."""

    name: str
    global_step: int
    epoch: float | None
    flags: tuple[str, ...]
    keys: tuple[str, ...]


def recorder(steer: Callable[[str, Any, Any], None] | None = None) -> Any:
    """A callback that records every event in `.events`; `steer(name, state, control)` may raise flags afterwards."""

    def record(name: str) -> Callable[..., Any]:
        def hook(self: Any, args: Any, state: Any, control: Any, **given: Any) -> Any:
            flags = tuple(flag for flag in FLAGS if getattr(control, flag))
            keys = tuple(sorted(given.get("logs") or given.get("metrics") or ()))
            epoch = None if state.epoch is None else round(state.epoch, 9)
            self.events.append(Event(name, state.global_step, epoch, flags, keys))
            self.given[name] = self.given.get(name, set()) | set(given)
            if steer is not None:
                steer(name, state, control)
            return control

        return hook

    # transformers' own base class under both trainers: callbacks written for it are what users have.
    callback = type("Recorder", (transformers.TrainerCallback,), {name: record(name) for name in EVENTS})()
    callback.events, callback.given = [], {}
    return callback


def both(
    folder: Path,
    settings: dict[str, Any],
    *,
    steer: Callable[[str, Any, Any], None] | None = None,
    eval_rows: Any = None,
) -> tuple[Run, Run]:
    """Train 7 rows in batches of 2 under both; the rows are equally long, so the eval loss does not tell batches apart."""
    rows = language_rows(7, shortest=6, longest=6, masked=False)
    base = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    runs = []
    for train in (ours, theirs):
        callback = recorder(steer)
        run = train(
            causal_lora, rows, base | settings, folder=folder, callbacks=[callback], eval_rows=eval_rows or rows[:3]
        )
        run.recorded = callback
        runs.append(run)
    return runs[0], runs[1]


def assert_same_events(mine: Run, peer: Run) -> None:
    assert mine.recorded.events == peer.recorded.events
    for name, given in peer.recorded.given.items():
        assert given <= mine.recorded.given[name], f"{name} was not given {given - mine.recorded.given[name]}"
    assert_same_log(mine.log, peer.log)


def saved_steps(run: Run) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in Path(run.trainer.args.output_dir).glob("checkpoint-*"))


LOGGING: list[dict[str, Any]] = [
    {"logging_strategy": "steps", "logging_steps": 2},
    {"logging_strategy": "epoch"},
    {"logging_strategy": "steps", "logging_steps": 3, "logging_first_step": True},
]
EVALUATION: list[dict[str, Any]] = [
    {"eval_strategy": "no"},
    {"eval_strategy": "steps", "eval_steps": 3},
    {"eval_strategy": "epoch"},
]
SAVING: list[dict[str, Any]] = [
    {"save_strategy": "no"},
    {"save_strategy": "steps", "save_steps": 3},
    {"save_strategy": "epoch"},
    {"save_strategy": "best", "metric_for_best_model": "loss"},
]

# Every pair of (logging, evaluation, saving) choices meets, with and without accumulation. Saving the best without
# evaluating is refused by ours, so it is not here.
GRID = [
    (LOGGING[(e + s) % len(LOGGING)] | EVALUATION[e] | SAVING[s] | {"gradient_accumulation_steps": accumulation})
    for e in range(len(EVALUATION))
    for s in range(len(SAVING))
    for accumulation in (1, 2)
    if not (e == 0 and s == 3)
]


def label(settings: dict[str, Any]) -> str:
    logging = "first" if settings.get("logging_first_step") else settings["logging_strategy"]
    return (
        f"log-{logging}-eval-{settings['eval_strategy']}-save-{settings['save_strategy']}"
        f"-accumulate-{settings['gradient_accumulation_steps']}"
    )


@pytest.mark.parametrize("settings", GRID, ids=label)
def test_events_of_a_whole_run(settings: dict[str, Any], tmp_path: Path) -> None:
    mine, peer = both(tmp_path, settings)
    assert_same_events(mine, peer)
    assert saved_steps(mine) == saved_steps(peer)


OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "evaluate-first": {"eval_on_start": True, "eval_strategy": "epoch"},
    "evaluate-late": {"eval_delay": 4, "eval_strategy": "steps", "eval_steps": 2},
    "evaluate-late-epochs": {"eval_delay": 1.5, "eval_strategy": "epoch"},
    "fraction-of-an-epoch": {"num_train_epochs": 1.6, "eval_strategy": "epoch", "save_strategy": "epoch"},
    "max-steps-in-mid-epoch": {"max_steps": 5, "eval_strategy": "epoch", "save_strategy": "steps", "save_steps": 2},
    "intervals-as-shares": {"logging_steps": 0.25, "eval_strategy": "steps", "eval_steps": 0.5, "save_steps": 0.5},
    "nothing-logged": {"logging_strategy": "no"},
    "tokens-counted": {"include_num_input_tokens_seen": "all"},
    "tokens-without-padding": {"include_num_input_tokens_seen": "non_padding"},
    "load-best": {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_strategy": "steps",
        "save_steps": 2,
        "load_best_model_at_end": True,
        "save_total_limit": 1,
    },
}


@pytest.mark.parametrize("name", OTHER_SETTINGS)
def test_events_of_other_settings(name: str, tmp_path: Path) -> None:
    assert_same_events(*both(tmp_path, OTHER_SETTINGS[name]))


def test_events_of_several_evaluation_sets(tmp_path: Path) -> None:
    rows = language_rows(4, 5, shortest=6, longest=6, masked=False)
    sets = {"easy": rows[:2], "hard": rows[2:]}
    assert_same_events(*both(tmp_path, {"eval_strategy": "epoch"}, eval_rows=sets))


def raise_flag(event: str, step: int, flag: str) -> Callable[[str, Any, Any], None]:
    def steer(name: str, state: Any, control: Any) -> None:
        if name == event and state.global_step == step:
            setattr(control, flag, True)

    return steer


# Where callbacks ask for something: at the end of a step, of a micro-step, inside a log, an evaluation or a save.
STEERING = [
    ("on_step_end", 2, "should_training_stop"),
    ("on_step_end", 2, "should_epoch_stop"),
    ("on_step_end", 1, "should_log"),
    ("on_step_end", 1, "should_evaluate"),
    ("on_step_end", 1, "should_save"),
    ("on_step_begin", 1, "should_log"),
    ("on_pre_optimizer_step", 1, "should_save"),
    ("on_evaluate", 2, "should_save"),
    ("on_evaluate", 2, "should_training_stop"),
    ("on_evaluate", 2, "should_epoch_stop"),
    ("on_log", 2, "should_evaluate"),
    ("on_save", 2, "should_training_stop"),
    ("on_save", 2, "should_log"),
    ("on_epoch_begin", 2, "should_log"),
    ("on_epoch_end", 2, "should_evaluate"),
    ("on_epoch_end", 2, "should_training_stop"),
    ("on_train_begin", 0, "should_evaluate"),
]


@pytest.mark.parametrize(("event", "step", "flag"), STEERING, ids=lambda part: str(part))
def test_flags_raised_by_a_callback(event: str, step: int, flag: str, tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    mine, peer = both(tmp_path, settings | {"save_strategy": "steps"}, steer=raise_flag(event, step, flag))
    assert_same_events(mine, peer)
    assert saved_steps(mine) == saved_steps(peer)


@pytest.mark.parametrize("flag", ["should_training_stop", "should_epoch_stop"])
@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step"])
def test_a_stop_asked_for_within_a_step_of_one_batch(event: str, flag: str, tmp_path: Path) -> None:
    settings = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2}
    assert_same_events(*both(tmp_path, settings, steer=raise_flag(event, 2, flag)))


@pytest.mark.parametrize("event", ["on_step_begin", "on_substep_end"])
def test_a_stop_asked_for_in_the_middle_of_a_step_completes_it(event: str, tmp_path: Path) -> None:
    """transformers throws away the part of the step that is done, but counts its loss in the mean of the run."""
    settings = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    mine, peer = both(tmp_path, settings, steer=raise_flag(event, 1, "should_training_stop"))
    assert (mine.output.global_step, peer.output.global_step) == (2, 1)
    assert mine.output.training_loss == pytest.approx(sum(mine.steps("loss")) / 2)
    names = [seen.name for seen in mine.recorded.events]
    assert names.count("on_pre_optimizer_step") == names.count("on_step_end") == 2


def test_an_epoch_stop_in_the_middle_of_a_step_leaves_no_gradient_behind(tmp_path: Path) -> None:
    """transformers carries the gradient of the broken step into the next epoch."""
    settings = {"gradient_accumulation_steps": 2}
    mine, _ = both(tmp_path, settings, steer=raise_flag("on_substep_end", 1, "should_epoch_stop"))
    undisturbed, _ = both(tmp_path, settings)
    assert mine.steps("grad_norm") == undisturbed.steps("grad_norm")


def test_a_stop_asked_for_before_training_trains_nothing(tmp_path: Path) -> None:
    """transformers begins the first step all the same, and completes it where it has one batch."""
    mine, _ = both(tmp_path, {}, steer=raise_flag("on_train_begin", 0, "should_training_stop"))
    assert mine.output.global_step == 0
    assert "on_step_begin" not in [seen.name for seen in mine.recorded.events]


def test_evaluate_and_predict_outside_training(tmp_path: Path) -> None:
    mine, peer = both(tmp_path, {"logging_strategy": "no"})
    rows = language_rows(4, 5, shortest=6, longest=6, masked=False)
    for run in (mine, peer):
        run.recorded.events.clear()
        run.metrics = run.trainer.evaluate(rows), run.trainer.predict(rows, metric_key_prefix="held_out").metrics
    assert mine.recorded.events == peer.recorded.events
    assert_same_log(list(mine.metrics), list(peer.metrics))
