"""The garbage collector: still while a run starts, and blind to what was there before its loop."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from contextlib import nullcontext
from typing import Any

import pytest

from etude import TrainerCallback
from etude.collection import frozen, paused
from short_run import short_trainer
from tiny import causal_lora


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


class Fails(TrainerCallback):
    def on_step_end(self, *_: Any, **__: Any) -> None:
        raise ValueError("as asked")


def weights_after(*, fails: bool = False, trainings: int = 1) -> list[weakref.ref[Any]]:
    """The base weights of a model that was trained by layers of our own, and let go of; nothing was collected since."""
    model = causal_lora()
    weights = [weakref.ref(parameter) for parameter in model.parameters() if not parameter.requires_grad]
    trainer = short_trainer(model, max_steps=2, callbacks=[Fails()] if fails else [])
    del model
    for _ in range(trainings):
        with pytest.raises(ValueError, match="as asked") if fails else nullcontext():
            trainer.train()
        assert trainer.path.plan.blocks
    return weights


@pytest.mark.parametrize("is_frozen_before", [False, True], ids=["nothing frozen before", "frozen before"])
@pytest.mark.parametrize("how", [{}, {"fails": True}, {"trainings": 2}], ids=["trained", "failed", "trained twice"])
def test_a_model_that_was_trained_leaves_memory(how: dict[str, Any], is_frozen_before: bool) -> None:
    if is_frozen_before:  # by the program around us; on Python 3.12 some objects always are
        gc.freeze()
    weights = weights_after(**how)
    gc.collect()
    assert weights and all(weight() is None for weight in weights)


def test_a_model_of_a_training_before_does_not_stay_for_the_next_one() -> None:
    gc.collect()
    gc.disable()  # chance would collect it, or not
    try:
        weights = weights_after()
        left: list[int] = []

        class Watcher(TrainerCallback):
            def on_step_end(self, *_: Any, **__: Any) -> None:
                left.append(sum(weight() is not None for weight in weights))

        short_trainer(max_steps=1, callbacks=[Watcher()]).train()
    finally:
        gc.enable()
    assert left == [0]


def test_public_names_are_imported_without_it() -> None:
    check = (
        "import gc, etude; collections = []; gc.callbacks.append(lambda phase, info: collections.append(phase)); "
        "etude.TrainingArguments; print(len(collections), gc.isenabled(), gc.get_freeze_count())"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["0", "True", "0"]
