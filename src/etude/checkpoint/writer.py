"""Who writes a checkpoint: whoever asks, and waits for it, or a thread, while training goes on.

    write(save)      in place: written when this returns. In the background: begun; the save before it is finished first
    finished(wait)   the save that has become durable since this was asked last, or its error

One save at a time is written, in the order in which they were asked for. A fork waits for the thread: a child of it would
inherit its locks, but not the thread that opens them again.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from etude.checkpoint.draft import Checkpoint
from etude.checkpoint.policy import steps_to_retire
from etude.checkpoint.store import CheckpointStore


@dataclass(frozen=True)
class Save:
    """One checkpoint to be written, and which of those before it are kept."""

    store: CheckpointStore
    step: int
    fill: Callable[[Path], list[str]]
    """Writes the files into a folder. Returns what is to be said about them."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What the manifest records beside the files."""
    limit: int | None = None
    best: int | None = None
    check: Callable[[], None] = field(default=lambda: None)
    """Raises an error where the contents are not fit to be saved, before a folder is made."""

    def make(self) -> list[str]:
        """Write and commit it, and only then retire those that `limit` has no room for. Returns what is to be said.

        Raises:
            CheckpointError: it could not be written; older checkpoints are intact.
        """
        self.check()
        with self.store.begin(self.step) as draft:
            with draft.failures_named():
                said = self.fill(draft.path)
            draft.commit(step=self.step, extra=self.extra)
        for old in self._superseded():
            self.store.retire(old)
        return said

    def _superseded(self) -> list[Checkpoint]:
        committed = self.store.committed()
        steps = set(steps_to_retire([checkpoint.step for checkpoint in committed], self.limit, self.best))
        return [checkpoint for checkpoint in committed if checkpoint.step in steps]


@dataclass(frozen=True)
class Done:
    """A save that is durable, and what is to be said about it."""

    step: int
    said: list[str]


class InPlace:
    """Writes at once. What is saved may be the live objects of the run."""

    needs_copies = False

    def __init__(self) -> None:
        self._done: Done | None = None

    def write(self, save: Save) -> None:
        """
        Raises:
            CheckpointError: it could not be written; older checkpoints are intact.
        """
        self._done = Done(save.step, save.make())

    def finished(self, *, wait: bool) -> Done | None:
        """The save that became durable since this was asked last."""
        done, self._done = self._done, None
        return done


class InBackground:
    """Writes in a thread, which lives as long as the save. What is saved must not change until it is finished."""

    needs_copies = True

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._ended = threading.Event()  # a join that Ctrl-C interrupts takes the thread for ended
        self._done: Done | None = None
        self._error: BaseException | None = None
        _writers.add(self)

    def write(self, save: Save) -> None:
        """Begin to write; where no thread can be had, it is written when this returns.

        Raises:
            RuntimeError: how the save before ended has not been asked for by `finished`.
        """
        if self._thread is not None:
            raise RuntimeError(f"step {save.step} is to be saved before the save before it is finished")
        self._ended.clear()
        self._thread = threading.Thread(target=self._make, args=(save,), name="etude-checkpoint", daemon=True)
        try:
            self._thread.start()
        except RuntimeError:  # the system has no room for another one
            self._make(save)

    def finished(self, *, wait: bool) -> Done | None:
        """The save that became durable since this was asked last; None where none did, or one is still being written.

        Args:
            wait: whether to wait for one that is being written.

        Raises:
            CheckpointError: it could not be written; older checkpoints are intact.
        """
        if self._thread is None or not (wait or self._ended.is_set()):
            return None
        self.wait()
        done, error = self._done, self._error
        self._thread = self._done = self._error = None
        if error is not None:
            raise error
        return done

    def wait(self) -> None:
        """Until nothing is being written any more; how it ended is still to be asked for."""
        thread = self._thread
        if thread is None or thread is threading.current_thread():
            return
        if thread.ident is not None:  # None where Ctrl-C came before it was started: it never ends then
            self._ended.wait()
            thread.join()

    def _make(self, save: Save) -> None:
        try:
            with torch.no_grad():
                self._done = Done(save.step, save.make())
        except BaseException as error:
            if getattr(error, "step", None) is None:
                error.add_note(f"This happened while the checkpoint of step {save.step} was written.")
            self._error = error
        finally:
            self._ended.set()


_writers: weakref.WeakSet[InBackground] = weakref.WeakSet()


def _wait_for_writers() -> None:
    """Before a fork. What a signal raises here Python would print and drop, and fork while a thread still writes: whoever
    handles the signal has to look again afterwards, as `Interrupts` does."""
    for writer in list(_writers):
        while True:
            with contextlib.suppress(BaseException):
                writer.wait()
                break


os.register_at_fork(before=_wait_for_writers)
