"""Two processes at the folder of a run: one trains, the other is refused by name or only reads."""

from __future__ import annotations

import hashlib
import json
import os
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from training import LAST_STEP, Ended, Train, build, result_of, steps_in, unsound

from etude import TrainerCallback
from etude.checkpoint import CheckpointStore
from etude.checkpoint.resume import read_progress

pytest_plugins = ["training_fixtures"]


class Intruder(TrainerCallback):
    """Starts another run in the same folder while this one is in its fourth step."""

    def __init__(self, start: Any) -> None:
        self.start = start

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 3:
            self.ended = self.start()


@pytest.mark.parametrize("resume", [None, True, "auto"])
def test_a_second_trainer_is_refused_by_name(train_in_child: Train, fast_dir: Path, whole: Ended, resume: Any) -> None:
    """Before it touches anything; the first does not notice."""
    trainer = build(fast_dir / "out")
    intruder = Intruder(lambda: train_in_child(fast_dir, resume=resume))
    trainer.add_callback(intruder)
    output = trainer.train()
    assert intruder.ended.exit_code == 1 and intruder.ended.result is None
    assert "another process is writing checkpoints here" in intruder.ended.said
    assert f'"pid": {os.getpid()}, "host": "{socket.gethostname()}"' in intruder.ended.said
    assert "step 1/" not in intruder.ended.said
    assert json.loads(json.dumps(result_of(trainer, output))) == whole.result
    assert steps_in(fast_dir / "out") == [2, 4, 6, 8, 9] and not list((fast_dir / "out").glob("previous-*"))


def test_a_second_trainer_in_another_folder_is_none_of_its_business(
    train_in_child: Train, fast_dir: Path, whole: Ended
) -> None:
    trainer = build(fast_dir / "out")
    intruder = Intruder(lambda: train_in_child(fast_dir / "elsewhere"))
    trainer.add_callback(intruder)
    trainer.train()
    assert intruder.ended.result == whole.result


def test_when_the_first_is_gone_the_second_may_go_on(train_in_child: Train, fast_dir: Path, whole: Ended) -> None:
    """Killed with loader workers, which may live on for a while and must not keep the folder locked."""
    kill = {"at": "on_step_begin", "nth": 5, "signal": 9}
    train_in_child(fast_dir, signals=[kill], dataloader_num_workers=2)
    assert train_in_child(fast_dir, resume=True).result == whole.result


def adapter_bytes(folder: Path) -> str:
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


def test_a_reader_always_finds_a_complete_checkpoint(train_in_child: Train, fast_dir: Path) -> None:
    """While every step is saved and all but the newest checkpoint are deleted."""
    settings = {"save_steps": 1, "max_steps": 4 * LAST_STEP, "eval_strategy": "no"}
    undisturbed = train_in_child(fast_dir / "whole", **settings)
    assert undisturbed.exit_code == 0
    wanted = {step: adapter_bytes(fast_dir / "whole" / "out" / f"checkpoint-{step}") for step in range(1, 37)}

    out, seen = fast_dir / "run" / "out", []
    store = CheckpointStore(out)
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(train_in_child, fast_dir / "run", save_total_limit=1, **settings)
        while not run.done():
            newest, rejections = store.newest_valid()
            assert not rejections
            if newest is None:
                assert not seen
                continue
            try:
                found = adapter_bytes(newest.path)
                assert read_progress(newest)["step_last_logged"] == newest.step
            except (OSError, ValueError):
                assert not newest.path.exists()  # retired after it was found; a reader looks again
                continue
            assert found == wanted[newest.step]
            seen.append(newest.step)
    assert run.result().result == undisturbed.result
    assert seen == sorted(seen) and len(set(seen)) > 5
    assert steps_in(out) == [4 * LAST_STEP] and not unsound(out)
