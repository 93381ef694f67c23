"""The garbage collector: still while a run starts, and blind to what was there before its loop."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from typing import Any

import pytest

from etude import TrainerCallback
from etude.collection import frozen, paused
from short_run import short_trainer


@pytest.fixture(autouse=True)
def nothing_is_frozen() -> None:
    """Other tests of the same process freeze what they need for themselves."""
    gc.unfreeze()


class Cycle:
    def __init__(self) -> None:
        self.itself = self


def test_nothing_is_collected_meanwhile_and_everything_afterwards() -> None:
    with paused():
        assert not gc.isenabled()
        cycle = weakref.ref(Cycle())
        assert cycle() is not None
    assert gc.isenabled() and gc.get_freeze_count() == 0
    gc.collect()
    assert cycle() is None


def test_whoever_switched_it_off_finds_it_off() -> None:
    gc.disable()
    try:
        with paused(), paused():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_an_error_switches_it_on_again() -> None:
    with pytest.raises(ValueError, match="no"), paused():
        raise ValueError("no")
    assert gc.isenabled()


def test_the_frozen_are_left_alone_and_the_new_ones_are_not() -> None:
    old = weakref.ref(Cycle())
    with frozen(), frozen():
        new = weakref.ref(Cycle())
        gc.collect()
        assert old() is not None and new() is None
    assert gc.get_freeze_count() == 0
    gc.collect()
    assert old() is None


def test_the_loop_runs_over_frozen_objects() -> None:
    frozen_at: list[int] = []

    class Watcher(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            frozen_at.append(gc.get_freeze_count())

    trainer = short_trainer(max_steps=2, callbacks=[Watcher()])
    trainer.train()
    assert len(frozen_at) == 2 and min(frozen_at) > 10_000
    assert gc.get_freeze_count() == 0 and gc.isenabled()


def test_public_names_are_imported_without_it() -> None:
    check = (
        "import gc, etude; collections = []; gc.callbacks.append(lambda phase, info: collections.append(phase)); "
        "etude.TrainingArguments; print(len(collections), gc.isenabled(), gc.get_freeze_count())"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True", "0"]
