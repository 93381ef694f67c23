"""Checkpoints whose tensors are copied while training goes on, as those of a GPU are: here tensors of the CPU take their part."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from etude import contents
from etude import run as run_module
from etude.checkpoint import pages
from etude.checkpoint.copies import Copies
from etude.checkpoint.writer import InBackground, Save
from etude.errors import CheckpointError
from saving import MODELS, SAVING, At, contents_of
from short_run import checkpoints, short_trainer


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Afterwards:
    """Carries what is copied as a GPU does, while training goes on: here as late as when it is waited for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.waited_in: list[str] = []
        monkeypatch.setattr("etude.saves.Copies", lambda: Copies("cpu"))
        monkeypatch.setattr(pages._AtOnce, "carry", lambda carrier, *pieces: lambda: self.wait(*pieces))

    def wait(self, snapshots: list[torch.Tensor], memory: list[torch.Tensor]) -> None:
        for snapshot, target in zip(snapshots, memory, strict=True):
            target.copy_(snapshot)
        self.waited_in.append(threading.current_thread().name)


@pytest.mark.parametrize("kind", MODELS)
def test_the_same_bytes_where_they_are_copied_while_training_goes_on(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each is written after the next step has been made, by a thread that waits for the copies first."""
    settings: dict[str, Any] = SAVING | {"save_steps": 1}
    short_trainer(MODELS[kind](), output_dir="in-place", save_in_background=False, **settings).train()
    afterwards, make = Afterwards(monkeypatch), InBackground._make
    ended = {step: threading.Event() for step in range(2, 7)}

    def make_later(writer: InBackground, save: Save) -> None:
        assert save.step == 6 or ended[save.step + 1].wait(30)  # the last one is waited for
        make(writer, save)

    monkeypatch.setattr(InBackground, "_make", make_later)
    callback = At(**{f"step_{step}": event.set for step, event in ended.items()})
    short_trainer(MODELS[kind](), output_dir="afterwards", callbacks=[callback], **settings).train()
    assert checkpoints("afterwards") == list(range(1, 7))
    assert contents_of("afterwards") == contents_of("in-place")
    assert afterwards.waited_in == ["etude-checkpoint"] * 6


@pytest.mark.parametrize("every", [1, 2, 5])
def test_the_first_save_finds_the_places_of_its_copies(every: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are looked for once, before there is anything to be saved."""
    settings: dict[str, Any] = SAVING | {"save_steps": every}
    short_trainer(output_dir="in-place", save_in_background=False, **settings).train()
    Afterwards(monkeypatch)
    found: list[tuple[int, int]] = []
    layout = pages._Layout

    def find(tensors: Any) -> Any:
        found.append((trainer.state.global_step, len(tensors)))
        return layout(tensors)

    trainer = short_trainer(output_dir="rehearsed", **settings)
    monkeypatch.setattr(pages, "_Layout", find)
    trainer.train()
    num_tensors = 4 * len([p for p in trainer.model.parameters() if p.requires_grad])  # with AdamW's state
    assert [(step, count >= num_tensors) for step, count in found if count] == [(0, True)]  # when the first step ends
    assert contents_of("rehearsed") == contents_of("in-place")


def test_a_rehearsal_waits_for_the_first_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under loss scaling the first updates may be left out: then there is no state of the optimizer yet."""
    Afterwards(monkeypatch)
    rehearsed: list[tuple[int, bool]] = []
    rehearse = Copies.rehearse

    def watched(copies: Copies, tree: Any) -> None:
        rehearsed.append((trainer.state.global_step, bool(tree["optimizer"]["tree"]["state"])))
        rehearse(copies, tree)

    monkeypatch.setattr(Copies, "rehearse", watched)
    trainer = short_trainer(**(SAVING | {"save_steps": 6}))
    update = run_module.Update.apply

    def apply(self: Any, at: Any) -> None:
        if at.number > 2:
            update(self, at)

    monkeypatch.setattr(run_module.Update, "apply", apply)
    trainer.train()
    assert rehearsed == [(2, True), (3, True)]


def test_a_rehearsal_that_fails_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    Afterwards(monkeypatch)
    optimizer_tree, calls = contents.optimizer_of, []

    def not_yet(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise ValueError("no state yet")
        return optimizer_tree(*arguments)

    monkeypatch.setattr(contents, "optimizer_of", not_yet)
    short_trainer(**(SAVING | {"save_steps": 3})).train()
    assert checkpoints() == [3, 6] and len(calls) == 3


def test_a_save_that_never_waits_for_its_copies_gives_their_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    Afterwards(monkeypatch)
    make, go_on, under_way = Save.make, threading.Event(), []

    def make_or_fail(save: Save) -> list[str]:
        if save.step == 2:
            assert go_on.wait(30)
            raise CheckpointError("no such disk", path=save.store.root)
        return make(save)

    monkeypatch.setattr(Save, "make", make_or_fail)

    def look() -> None:
        under_way.append(len(trainer._run.saves._copies._pages._under_way))
        go_on.set()
        trainer._run.saves.writer.wait()

    trainer = short_trainer(callbacks=[At(step_3=look, step_4=look)], **SAVING)
    trainer.train()
    assert under_way == [1, 0] and checkpoints() == [4, 6]
