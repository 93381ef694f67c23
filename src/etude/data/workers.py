"""Data-loading workers that die or are left alone: noticed only where a run waits for data.

torch notices them in a handler of SIGCHLD that raises wherever the program stands, in the middle of an update or of a
save. A scheduler that sends SIGTERM to all processes of a job kills the workers, and would so end the run before it could
save. Here the error is kept until the next wait for data, where the place to go on from is known.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType


class WorkerWatch:
    """Stands before torch's handler of SIGCHLD. There is one per process, as there is one such handler."""

    def __init__(self) -> None:
        self._theirs: Callable[[int, FrameType | None], object] | None = None
        self._is_waiting = False
        self._death: RuntimeError | None = None

    def install(self) -> None:
        """Take over from torch, which installs its handler when the first workers are started."""
        if threading.current_thread() is not threading.main_thread():
            return
        present = signal.getsignal(signal.SIGCHLD)
        if callable(present) and present != self._on_child:
            self._theirs = present
            signal.signal(signal.SIGCHLD, self._on_child)

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """
        Raises:
            RuntimeError: torch's, for a worker that died before or dies meanwhile.
        """
        self._is_waiting = True
        try:
            death, self._death = self._death, None
            if death is not None:
                raise death
            yield
        finally:
            self._is_waiting = False

    def _on_child(self, number: int, frame: FrameType | None) -> None:
        assert self._theirs is not None
        try:
            self._theirs(number, frame)
        except RuntimeError as error:
            if self._is_waiting:
                raise
            self._death = error


worker_watch = WorkerWatch()


def expect_cut_connections(worker: int) -> None:
    """For a worker as it starts (`worker_init_fn`): a run that is stopped while it fetches a batch may cut the connection
    that it receives it on, which a thread of Python's would print in the worker as if something had failed."""
    report = sys.excepthook

    def report_others(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        is_cut = isinstance(error, (ConnectionError, EOFError))
        if not is_cut or threading.current_thread() is threading.main_thread():
            report(kind, error, traceback)

    sys.excepthook = report_others


def is_dead_worker(error: RuntimeError) -> bool:
    """Whether torch says with `error` that a worker process is gone; what a worker raises has another text."""
    return str(error).startswith("DataLoader worker (pid")
