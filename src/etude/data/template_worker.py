"""The process in which chat templates are rendered, and the way from a rendered chat to the assistant's share of it.

A template is a program that came with a model. transformers' sandbox keeps it away from Python and from files, but not
from eating all time and memory, so it renders here: per row one second of processor time and 256 MiB, and files cannot
be written. This file is run as a script (`templates.py` starts it); it must not import the rest of the package, which
would make its start slow.

A request is a JSON line, `{"template", "variables", "rows": [{"messages", "tools"}, ...]}`; the replies are a JSON line
for each row: `{"text", "spans"}`, or `{"refused", "by_row"}`.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

MAX_CPU_SECONDS = 1.0
MAX_MEMORY_BYTES = 256 * 2**20
UNTOUCHED_BYTES = 8 * 2**20  # address space from before that a template may be the first to fill
MAX_ADDED_BYTES = 2**20

Message = dict[str, Any]
Span = tuple[int, int]
GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")


def assistant_spans(text: str, messages: list[Message], render: Callable[[list[Message], bool], str]) -> list[Span]:
    """Where the assistant's turns are in a rendered chat: from behind the header to behind the end-of-turn token.

    Derived by rendering prefixes: turn k starts where the chat up to it, with a generation prompt, ends, and ends where
    the chat up to and including it ends. Templates that render old turns differently (they drop thoughts, or move the
    system message) are followed by looking for the content of the turn.

    Args:
        text: the whole chat, `render(messages, False)`.
        render: (messages, add_generation_prompt) -> text.

    Raises:
        ValueError: a turn cannot be found in the text.
    """
    spans: list[Span] = []
    cursor = 0
    for index, message in enumerate(messages):
        spoken = _spoken(message)
        place = text.find(spoken, cursor)
        if message["role"] != "assistant":
            # A system message may stand anywhere; the others are in order.
            cursor = place + len(spoken) if place >= 0 and message["role"] != "system" else cursor
            continue
        start = _turn_start(text, messages[:index], place, render)
        end = len(text) if index == len(messages) - 1 else _turn_end(text, messages[: index + 1], place, render)
        if not cursor <= start < end:
            raise ValueError(f"turn {index + 1} of the chat is not in the rendered text, or changes with what follows")
        spans.append((start, end))
        cursor = end
    return spans


def _spoken(message: Message) -> str:
    """The content of a turn without its thoughts, which templates drop from old turns."""
    return str(message.get("content") or "").rpartition("</think>")[2].strip()


def _turn_start(text: str, before: list[Message], place: int, render: Callable[[list[Message], bool], str]) -> int:
    """Where the turn after `before` starts; -1 where that cannot be told. `place`: where its content was found."""
    if not before:  # a chat that the assistant opens has no prefix that a template could render
        return 0
    prompt = render(before, True)
    agreed = _common_prefix(text, prompt)
    if agreed == len(prompt):
        return agreed
    # The generation prompt ends in more than the turn has (an open thought), or the history reads differently.
    return min(agreed, place) if place >= 0 and agreed >= len(render(before, False)) else place


def _turn_end(text: str, through: list[Message], place: int, render: Callable[[list[Message], bool], str]) -> int:
    """Where the last turn of `through` ends in the longer chat `text`; -1 where that cannot be told."""
    rendered = render(through, False)
    if text.startswith(rendered):
        return len(rendered)
    spoken = _spoken(through[-1])
    if place < 0 or not spoken:
        return -1
    tail = rendered[rendered.rfind(spoken) + len(spoken) :]
    end = place + len(spoken)
    return end + _common_prefix(text[end : end + len(tail)], tail)


def _common_prefix(text: str, prefix: str) -> int:
    if text.startswith(prefix):
        return len(prefix)
    pairs = zip(text, prefix, strict=False)
    return next((index for index, (left, right) in enumerate(pairs) if left != right), min(len(text), len(prefix)))


class _TooMuchTextError(Exception):
    """The template adds more than it may to a row."""


class _Renderer:
    """One template with its variables (`bos_token`, ...), rendered by transformers' own sandbox."""

    def __init__(self, template: str, variables: dict[str, Any]) -> None:
        from transformers.utils.chat_template_utils import render_jinja_template

        self._render_jinja = render_jinja_template
        self._template, self._variables = template, variables
        self._is_marked = bool(GENERATION_MARK.search(template))

    def row(self, messages: list[Message], tools: list[Any] | None) -> dict[str, Any]:
        max_bytes = MAX_ADDED_BYTES + 2 * len(json.dumps([messages, tools]))

        def render(turns: list[Message], opens_turn: bool, with_marks: bool = False) -> tuple[str, list[Span]]:
            texts, marks = self._render_jinja(
                [turns],
                tools=tools,
                chat_template=self._template,
                return_assistant_tokens_mask=with_marks,
                add_generation_prompt=opens_turn,
                **self._variables,
            )
            if len(texts[0]) > max_bytes:
                raise _TooMuchTextError(f"it adds more than {MAX_ADDED_BYTES // 2**20} MiB of text to a row")
            return texts[0], list(marks[0]) if with_marks else []

        text, spans = render(messages, False, self._is_marked)
        if not spans:
            spans = assistant_spans(text, messages, lambda turns, opens_turn: render(turns, opens_turn)[0])
        return {"text": text, "spans": spans}


def _reply(renderer: _Renderer, row: dict[str, Any]) -> dict[str, Any]:
    """Render one row; say whether a failure is the row's fault (a role it does not know) or the template's."""
    import jinja2

    def refused(message: object, by_row: bool) -> dict[str, Any]:
        return {"refused": str(message), "by_row": by_row}

    try:
        return renderer.row(row["messages"], row["tools"])
    except MemoryError:
        return refused(f"it needs more than {MAX_MEMORY_BYTES // 2**20} MiB of memory", False)
    except RecursionError:
        return refused("it nests too deeply", False)
    except _TooMuchTextError as error:
        return refused(error, False)
    except (jinja2.exceptions.SecurityError, jinja2.TemplateSyntaxError, OverflowError) as error:
        return refused(error, False)
    except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
        return refused(error, True)


def _memory_in_use_bytes() -> int | None:
    """The address space of this process, where the system tells."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        return None


def _limit_memory(request_bytes: int) -> None:
    in_use = _memory_in_use_bytes()
    if in_use is not None:
        # The row itself may be large; what the template needs on top of a few copies of it counts.
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        soft = in_use + MAX_MEMORY_BYTES - UNTOUCHED_BYTES + 8 * request_bytes
        resource.setrlimit(resource.RLIMIT_AS, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


def _lift_memory_limit() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (hard, hard))


def _serve(requests: Iterator[bytes], replies: BinaryIO) -> None:
    for line in requests:
        request = json.loads(line)
        renderer = _Renderer(request["template"], request["variables"])
        _limit_memory(len(line))
        for row in request["rows"]:
            # Processor time, so that a busy machine refuses nothing. The default action of SIGPROF ends the process, also inside of C code that no exception reaches.
            signal.setitimer(signal.ITIMER_PROF, MAX_CPU_SECONDS)
            reply = _reply(renderer, row)
            signal.setitimer(signal.ITIMER_PROF, 0)
            replies.write(json.dumps(reply).encode() + b"\n")
            replies.flush()
        _lift_memory_limit()


def main() -> None:
    """Answer requests from stdin on stdout until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what an import prints is no reply
    import transformers.utils.chat_template_utils  # noqa: F401  before files can no longer be written

    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _serve(iter(sys.stdin.buffer.readline, b""), replies)


if __name__ == "__main__":
    main()
