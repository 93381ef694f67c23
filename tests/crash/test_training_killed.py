"""A training process is killed, at every call of a save and at any other moment; the resumed run ends with the same bits.

`resume_from_checkpoint=True` (a checkpoint must be there) after a kill within a save, "auto" after a kill at any time.
"""

from __future__ import annotations

import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
from saves import COUNT, KILL
from training import LAST_STEP, Ended, Train, steps_in, unsound

pytest_plugins = ["training_fixtures"]

SAVED_STEP = 4
KILLED = 128 + signal.SIGKILL
OUT_OF_TIME = 128 + signal.SIGPROF


@pytest.fixture
def before_the_save(train_in_child: Train, fast_dir: Path) -> Path:
    """The folder of a run that was killed in its third step: checkpoint-2 is there."""
    folder = fast_dir / "prepared"
    kill = {"at": "on_step_begin", "nth": 3, "signal": signal.SIGKILL}
    assert train_in_child(folder, signals=[kill], save_in_background=False).exit_code == KILLED
    assert steps_in(folder / "out") == [2]
    return folder


def calls_of_the_save(train_in_child: Train, prepared: Path, **settings: Any) -> list[str]:
    """The write-side calls of the save of `SAVED_STEP` and of everything else until the step after it begins."""
    folder, log = prepared.with_name("counted"), prepared.with_name("log")
    shutil.copytree(prepared, folder)
    fault = {"step": SAVED_STEP, "until": SAVED_STEP + 1, "mode": COUNT, "log": str(log)}
    assert train_in_child(folder, resume=True, fault=fault, **settings).exit_code == 0
    calls = [line.split("\t")[0] for line in log.read_text().splitlines()]
    assert {"mkdir", "write", "fsync", "rename"} <= set(calls) and len(calls) > 80
    return calls


def kill_at_calls(train_in_child: Train, prepared: Path, whole: Ended, *, every: int, **settings: Any) -> None:
    calls = calls_of_the_save(train_in_child, prepared, **settings)
    wrong, trials = [], 0
    renames = {at for at, call in enumerate(calls) if call == "rename"}
    around = {at + offset for at in renames for offset in (0, 1)}
    for at in sorted({*range(0, len(calls), every), *around}):
        folder = prepared.with_name("trial")
        shutil.copytree(prepared, folder)
        fault = {"step": SAVED_STEP, "mode": KILL, "at": at}
        killed = train_in_child(folder, resume=True, fault=fault, **settings)
        problems = unsound(folder / "out") + ([] if killed.exit_code == KILLED else ["was not killed"])
        resumed = train_in_child(folder, resume=True, **settings)
        if resumed.result != whole.result:
            problems.append(f"resumed with exit code {resumed.exit_code} to another result: {resumed.said}")
        problems += [f"left behind: {path.name}" for path in (folder / "out").glob(".t*")]
        wrong += [f"kill at call {at} ({calls[at]}): {problem}" for problem in problems]
        shutil.rmtree(folder)
        trials += 1
    print(f"{trials} kills over {len(calls)} calls")
    assert not wrong, "\n".join(wrong)


def test_a_kill_within_a_save(train_in_child: Train, before_the_save: Path, whole: Ended) -> None:
    """The save is written in a thread, while the next step is made. transformers, which waits for its saves, fails to resume
    in 23 of 24 such places."""
    kill_at_calls(train_in_child, before_the_save, whole, every=7, save_total_limit=1)


def test_a_kill_within_a_save_that_training_waits_for(
    train_in_child: Train, before_the_save: Path, whole: Ended
) -> None:
    kill_at_calls(train_in_child, before_the_save, whole, every=21, save_total_limit=1, save_in_background=False)


@pytest.mark.nightly
@pytest.mark.parametrize("limit", [None, 1])
@pytest.mark.parametrize("in_background", [True, False])
def test_a_kill_at_every_call_of_a_save(
    train_in_child: Train, before_the_save: Path, whole: Ended, in_background: bool, limit: int | None
) -> None:
    settings = {"save_in_background": in_background, "save_total_limit": limit}
    kill_at_calls(train_in_child, before_the_save, whole, every=1, **settings)


def killed_times(train_in_child: Train, folder: Path, whole: Ended, times: list[float], **settings: Any) -> int:
    """Kill the run after each of `times` (shares of the processor time of the whole run), then let it finish.

    Returns how often it was killed; a run may be through before its time is up.
    """
    num_kills = 0
    for share in times:
        killed = train_in_child(folder, resume="auto", cpu_seconds=share * whole.cpu_seconds, **settings)
        assert killed.exit_code in (OUT_OF_TIME, 0), killed.said
        assert not unsound(folder / "out")
        num_kills += killed.exit_code == OUT_OF_TIME
    finished = train_in_child(folder, resume="auto", **settings)
    assert finished.exit_code == 0, finished.said
    assert finished.result == whole.result, f"killed after {times} of {whole.cpu_seconds} s\n{finished.said}"
    return num_kills


@pytest.mark.parametrize("seed", range(4))
def test_kills_at_any_time(train_in_child: Train, fast_dir: Path, whole: Ended, seed: int) -> None:
    draw = random.Random(seed)
    kills = sum(
        killed_times(train_in_child, fast_dir / str(trial), whole, [draw.uniform(0.05, 1)]) for trial in range(6)
    )
    print(f"{kills} of 6 runs were killed")
    assert kills >= 2


@pytest.mark.nightly
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("seed", range(10))
def test_two_hundred_kills_at_any_time(
    train_in_child: Train, fast_dir: Path, whole: Ended, seed: int, workers: int
) -> None:
    draw = random.Random(f"{seed} {workers}")
    kills = 0
    for trial in range(10):
        share = [draw.uniform(0.05, 1)]
        kills += killed_times(train_in_child, fast_dir / str(trial), whole, share, dataloader_num_workers=workers)
    print(f"{kills} of 10 runs were killed")
    assert kills >= 4


@pytest.mark.parametrize(
    "seed", [0, pytest.param(1, marks=pytest.mark.nightly), pytest.param(2, marks=pytest.mark.nightly)]
)
def test_a_chain_of_five_kills(train_in_child: Train, fast_dir: Path, seed: int) -> None:
    """Each long enough to get somewhere, all together too short to get to the end."""
    settings = {"max_steps": 4 * LAST_STEP, "save_steps": 1, "eval_strategy": "no"}
    whole = train_in_child(fast_dir / "whole", **settings)
    assert whole.exit_code == 0, whole.said
    draw = random.Random(f"chain {seed}")
    times = [draw.uniform(0.1, 0.2) for _ in range(5)]
    assert killed_times(train_in_child, fast_dir / "killed", whole, times, **settings) >= 4
