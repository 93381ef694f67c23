"""Chat templates, rendered within limits. A template came with a model, from a file: it is never run in this process.

One worker process (`template_worker.py`) renders all rows. It starts on first use (about a second), renders the next
rows while the caller tokenizes the last ones, and is kept for the next call: the split for evaluation, another template.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import weakref
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from etude.data import child, template_worker
from etude.data.template_worker import MAX_CPU_SECONDS, Message, Span


class Chat(NamedTuple):
    """What a template is given for one row."""

    messages: list[Message]
    tools: list[Any] | None = None


class Rendered(NamedTuple):
    """A row as text, with the character spans that the model is trained on."""

    text: str
    spans: list[Span]


class Refused(NamedTuple):
    """Why a row could not be rendered, and whether the row is to blame or the template."""

    reason: str
    by_row: bool


class BoundedRenderer:
    """Renders chats in a worker process: per row one second of processor time, 256 MiB and one MiB of added text."""

    def __init__(self) -> None:
        self._worker: child.Child | None = None
        self._session: object | None = None  # the call of `render` whose replies the worker is writing
        self._at_exit: weakref.finalize[..., BoundedRenderer] | None = None

    def render(
        self, template: str, variables: Mapping[str, Any], chunks: Iterable[list[Chat]]
    ) -> Iterator[list[Rendered | Refused]]:
        """The chats of each chunk, rendered. While the caller works on a chunk, the next one is being rendered.

        Args:
            template: a Jinja chat template.
            variables: what it may name beside the messages: the texts of the special tokens.

        After a row that the template is to blame for, the worker may be gone: the rest of its chunk is refused likewise.
        """
        if self._session is not None:  # its caller left early; what is still under way belongs to nobody
            self.close()
        session = self._session = object()
        try:
            replies: list[Rendered | Refused] | None = None
            for chunk in chunks:
                rows = [chat._asdict() for chat in chunk]
                self._send({"template": template, "variables": variables, "rows": rows})
                if replies is not None:
                    yield replies
                replies = self._receive(len(chunk))
            self._session = None
            if replies is not None:
                yield replies
        finally:
            if self._session is session:
                self.close()

    def close(self) -> None:
        """End the worker; the next use starts another."""
        self._stop()
        self._session = None

    def _stop(self) -> None:
        if self._at_exit is not None:
            self._at_exit()
        self._worker = None

    def forget(self) -> None:
        """In a forked process: the worker, and the pipes to it, are the parent's."""
        if self._worker is not None and self._at_exit is not None:
            self._at_exit.detach()
            self._worker.returncode = 0  # nothing to wait for here
        self._worker = self._session = None

    def _start(self) -> child.Child:
        worker = child.start(template_worker)
        self._at_exit = weakref.finalize(self, child.end, worker)
        return worker

    def _send(self, request: dict[str, Any]) -> None:
        if self._worker is None or self._worker.poll() is not None:
            self._stop()
            self._worker = self._start()
        stdin = self._worker.stdin
        assert stdin is not None
        with contextlib.suppress(BrokenPipeError):  # the worker is gone, which is told where its reply is missed
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()

    def _receive(self, num_rows: int) -> list[Rendered | Refused]:
        assert self._worker is not None and self._worker.stdout is not None
        replies: list[Rendered | Refused] = []
        while len(replies) < num_rows:
            line = self._worker.stdout.readline()
            if not line.endswith(b"\n"):  # the worker is gone; the row that it was working on is to blame
                replies += [Refused(_cause_of_death(self._worker.wait()), by_row=False)] * (num_rows - len(replies))
                self._stop()
                break
            reply = json.loads(line)
            if "refused" in reply:
                replies.append(Refused(reply["refused"], reply["by_row"]))
            else:
                replies.append(Rendered(reply["text"], [(start, end) for start, end in reply["spans"]]))
        return replies


def _cause_of_death(exit_code: int) -> str:
    if exit_code == -signal.SIGPROF:
        return f"it needs more than {MAX_CPU_SECONDS:g} s for one row"
    return f"the process that renders it ended with code {exit_code}"


renderer = BoundedRenderer()
os.register_at_fork(after_in_child=renderer.forget)
