"""Signals: the step in progress is finished, a checkpoint is written, the exit code says why, and the resumed run ends as if
nothing had happened, with every number of its log, also where an evaluation was cut short.
"""

from __future__ import annotations

import itertools
import signal
from pathlib import Path
from typing import Any

import pytest
from training import SETTINGS, Ended, Train, metrics_of, steps_in, unsound

pytest_plugins = ["training_fixtures"]

TERM, INT, USR1, HUP = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP
FINGERPRINTED = 2 * 16  # rows that are looked at before the first step
MOMENTS = {  # what happens -> how often it has happened when the signal comes, and the step after which the run stops
    "on_train_begin": (1, 0),
    "fork": (1, 0),
    "on_epoch_begin": (2, 6),
    "on_step_begin": (4, 4),
    "row": (FINGERPRINTED + 15, 3),
    "on_substep_end": (5, 5),
    "on_pre_optimizer_step": (4, 4),
    "on_optimizer_step": (1, 1),
    "on_step_end": (5, 5),
    "on_log": (4, 3),  # the log of an evaluation is one as well
    "on_prediction_step": (5, 6),
    "on_evaluate": (1, 3),
    "save": (2, 4),
    "on_save": (1, 2),
    "on_epoch_end": (1, 6),
    "on_train_end": (1, 9),
}
NEEDS_WORKERS = {"fork"}
NEXT_SIGNAL = dict(zip(MOMENTS, itertools.cycle([TERM, INT, USR1, HUP]), strict=False))


def stopped_after(folder: Path, moment: str) -> int:
    """The step of the newest checkpoint. Training may have gone on from a save that was being written to the next one."""
    step, newest = MOMENTS[moment][1], (steps_in(folder / "out") or [0])[-1]
    assert newest in (range(step, step + SETTINGS["save_steps"] + 1) if moment == "save" else (step,))
    return newest


def check_stop(
    train_in_child: Train, folder: Path, whole: Ended, moment: str, number: signal.Signals, **settings: Any
) -> None:
    nth, _ = MOMENTS[moment]
    stopped = train_in_child(folder, signals=[{"at": moment, "nth": nth, "signal": number}], **settings)
    assert stopped.exit_code == 128 + number, stopped.said
    assert "was not cut short" not in stopped.said and "Traceback" not in stopped.said, stopped.said
    assert stopped.result is None and not unsound(folder / "out")
    step = stopped_after(folder, moment)
    if moment != "on_train_end":
        assert f"stopped by {number.name} after step {step}" in stopped.said
    resumed = train_in_child(folder, resume=True if step else "auto", **settings)
    assert resumed.result == whole.result, resumed.said


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_stop_at_any_moment(train_in_child: Train, fast_dir: Path, whole: Ended, moment: str) -> None:
    workers = {"dataloader_num_workers": 2} if moment in NEEDS_WORKERS else {}
    check_stop(train_in_child, fast_dir, whole, moment, NEXT_SIGNAL[moment], **workers)


@pytest.mark.nightly
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("number", [TERM, INT, USR1, HUP])
@pytest.mark.parametrize("moment", MOMENTS)
def test_every_signal_at_any_moment(
    train_in_child: Train, fast_dir: Path, whole: Ended, moment: str, number: signal.Signals, workers: int
) -> None:
    if workers and moment == "row":
        pytest.skip("rows are fetched by the workers then, which do not stop the run")
    if not workers and moment in NEEDS_WORKERS:
        pytest.skip("nothing is forked without workers")
    check_stop(train_in_child, fast_dir, whole, moment, number, dataloader_num_workers=workers)


@pytest.mark.parametrize("moment", ["on_step_begin", "on_prediction_step", "save"])
@pytest.mark.parametrize("number", [TERM, INT])
def test_a_signal_to_the_whole_group(
    train_in_child: Train, fast_dir: Path, whole: Ended, moment: str, number: signal.Signals
) -> None:
    """As a terminal, `timeout` and a scheduler send it: the loader's workers get it too, and die of it or not."""
    nth, _ = MOMENTS[moment]
    group = [{"at": moment, "nth": nth, "signal": number, "group": True}]
    stopped = train_in_child(fast_dir, signals=group, dataloader_num_workers=2)
    assert stopped.exit_code == 128 + number, stopped.said
    stopped_after(fast_dir, moment)
    assert train_in_child(fast_dir, resume=True).result == whole.result


@pytest.mark.parametrize("moment", ["on_step_begin", "on_prediction_step", "save", "row"])
def test_a_second_control_c_leaves_at_once(train_in_child: Train, fast_dir: Path, whole: Ended, moment: str) -> None:
    """Without another checkpoint; the ones before are intact."""
    nth, step = MOMENTS[moment]
    twice = [{"at": moment, "nth": nth, "signal": INT}] * 2
    if moment == "row":  # the first ends the wait, the second comes during the save that follows
        twice[1] = {"at": "save", "nth": 2, "signal": INT}
    # Two signals that a thread sends at once are one: there the second has to come while training waits.
    stopped = train_in_child(fast_dir, signals=twice, save_in_background=moment != "save")
    assert stopped.exit_code == 128 + INT, stopped.said
    assert not unsound(fast_dir / "out") and steps_in(fast_dir / "out")[-1] < step + 1
    assert not list((fast_dir / "out").glob(".tmp-*"))
    assert train_in_child(fast_dir, resume=True).result == whole.result


def test_stops_in_a_row(train_in_child: Train, fast_dir: Path, whole: Ended) -> None:
    """Stopped again in the evaluation that is being repeated, in the save that follows it, and a step later."""
    settings = {"eval_steps": 2, "save_steps": 2}
    undisturbed = train_in_child(fast_dir / "whole", **settings)
    folder = fast_dir / "stopped"
    for at, nth, resume in [
        ("on_prediction_step", 4, None),
        ("on_prediction_step", 2, True),
        ("save", 1, True),
        ("on_step_begin", 1, True),
        ("on_prediction_step", 3, True),
    ]:
        stopped = train_in_child(folder, resume=resume, signals=[{"at": at, "nth": nth, "signal": TERM}], **settings)
        assert stopped.exit_code == 128 + TERM, stopped.said
    assert train_in_child(folder, resume=True, **settings).result == undisturbed.result


def test_a_stop_and_a_kill_after_an_epoch(train_in_child: Train, fast_dir: Path) -> None:
    """The evaluation that ends the epoch is cut short, repeated by the next run, and saved; then that run is killed."""
    settings = {"eval_strategy": "epoch", "save_strategy": "epoch", "logging_strategy": "epoch"}
    undisturbed = train_in_child(fast_dir / "whole", **settings)
    folder = fast_dir / "stopped"
    stop = {"at": "on_prediction_step", "nth": 2, "signal": TERM}
    assert train_in_child(folder, signals=[stop], **settings).exit_code == 128 + TERM
    kill = {"at": "on_save", "nth": 1, "signal": signal.SIGKILL}
    assert train_in_child(folder, resume=True, signals=[kill], **settings).exit_code == 128 + signal.SIGKILL
    assert train_in_child(folder, resume=True, **settings).result == undisturbed.result


@pytest.mark.parametrize("nth", range(1, 7))
def test_a_stop_within_several_evaluations(train_in_child: Train, fast_dir: Path, nth: int) -> None:
    """Two sets of three batches each: what was reported is not reported again, what was not is made up for."""
    settings = {"several_eval_sets": True, "max_steps": 4, "logging_steps": 2}
    undisturbed = train_in_child(fast_dir / "whole", **settings)
    folder = fast_dir / "stopped"
    stopped = train_in_child(folder, signals=[{"at": "on_prediction_step", "nth": nth, "signal": TERM}], **settings)
    assert stopped.exit_code == 128 + TERM, stopped.said
    assert train_in_child(folder, resume=True, **settings).result == undisturbed.result


def test_a_stop_within_an_evaluation_of_the_users(train_in_child: Train, fast_dir: Path, whole: Ended) -> None:
    """A callback that calls `trainer.evaluate()` between two steps: nobody could repeat that one, so it is finished."""
    settings = {"evaluates_itself_at_step": 4}
    undisturbed = train_in_child(fast_dir / "whole", **settings)
    folder = fast_dir / "stopped"
    stopped = train_in_child(folder, signals=[{"at": "on_prediction_step", "nth": 5, "signal": TERM}], **settings)
    assert stopped.exit_code == 128 + TERM, stopped.said
    assert steps_in(folder / "out")[-1] == 4
    assert train_in_child(folder, resume=True, **settings).result == undisturbed.result


@pytest.mark.parametrize("resumes", [False, True])
def test_the_metrics_file_has_every_log_once(train_in_child: Train, fast_dir: Path, resumes: bool) -> None:
    settings = {"eval_strategy": "epoch", "save_in_background": False}
    stop = [{"at": "on_evaluate", "nth": 1, "signal": signal.SIGKILL}]  # after the epoch that checkpoint-6 lies before
    ended = train_in_child(fast_dir, signals=stop if resumes else [], **settings)
    if resumes:
        assert steps_in(fast_dir / "out")[-1] == 6
        ended = train_in_child(fast_dir, resume=True, **settings)
    assert ended.result is not None, ended.said
    assert metrics_of(fast_dir / "out", ended.result["log"]) == ended.result["log"]


def test_a_checkpoint_on_request(train_in_child: Train, fast_dir: Path, whole: Ended) -> None:
    """`SAVE` appears during the fifth step; the run writes checkpoint-5 and goes on."""
    ended = train_in_child(fast_dir, touch_at_step=5)
    assert ended.exit_code == 0 and ended.result == whole.result, ended.said
    assert steps_in(fast_dir / "out") == [2, 4, 5, 6, 8, 9]
    assert not (fast_dir / "out" / "SAVE").exists()


def test_a_request_that_cannot_be_taken_away_is_ignored(train_in_child: Train, fast_dir: Path, whole: Ended) -> None:
    """A folder of that name, or a disk that has become read-only, must not end a run."""
    (fast_dir / "out" / "SAVE").mkdir(parents=True)
    ended = train_in_child(fast_dir)
    assert ended.exit_code == 0 and ended.result == whole.result, ended.said
    assert steps_in(fast_dir / "out") == [2, 4, 6, 8, SETTINGS["max_steps"]]
