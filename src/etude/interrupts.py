"""Stop requests from outside: signals, and a file that asks for a checkpoint.

A signal lets the step in progress finish; the run then saves and leaves with exit code 128 + its number. While a run
only waits for data or evaluates, where stopping half-way loses nothing, it stops at once.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

CHECKPOINT_REQUEST_FILE = "SAVE"
"""Touch this file in the output folder to have a checkpoint written after the step in progress."""

STOP_SIGNALS = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP")


class StopNow(BaseException):
    """Raised in a wait that a signal cuts short."""


class Interrupts:
    """Listens for stop requests while it is entered; a second Ctrl-C leaves at once.

    Handlers that the user's program installed for these signals are respected: only default ones are replaced.
    """

    def __init__(self, output_dir: Path) -> None:
        self.request_file = output_dir / CHECKPOINT_REQUEST_FILE
        self.requested: signal.Signals | None = None
        self._process = os.getpid()
        self._may_stop_now = False
        self._replaced: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        if threading.current_thread() is threading.main_thread():
            for name in STOP_SIGNALS:
                number = getattr(signal, name, None)
                if number is not None and signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                    self._replaced[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._replaced.items():
            signal.signal(number, handler)
        self._replaced.clear()

    @property
    def exit_code(self) -> int:
        return 0 if self.requested is None else 128 + int(self.requested)

    @contextmanager
    def stopping_at_once(self) -> Iterator[None]:
        """A wait in which a stop request raises `StopNow` where it stands.

        Raises:
            StopNow: also on entry, where a stop was requested before.
        """
        self.stop_if_requested()
        self._may_stop_now = True
        try:
            yield
        finally:
            self._may_stop_now = False

    def stop_if_requested(self) -> None:
        """Within such a wait, now and then: Python drops what a signal raises in a finalizer, or before a fork.

        Raises:
            StopNow: a stop was requested.
        """
        if self.requested is not None:
            raise StopNow

    def checkpoint_requested(self) -> bool:
        """Whether the request file is there; it is taken away. What cannot be taken away is no request."""
        try:
            self.request_file.unlink()
        except OSError:
            return False
        return True

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a data-loading worker, which inherited the handler
            if number == signal.SIGTERM:
                os._exit(128 + number)
            return
        is_second = self.requested is not None
        self.requested = signal.Signals(number)
        if is_second and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._may_stop_now:
            self._may_stop_now = False
            raise StopNow
