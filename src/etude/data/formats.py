"""The five shapes a row of training data can have, and what is wrong with a row that has none of them.

    alpaca             instruction, output, optional input              text
    prompt_completion  prompt, completion                               text
    messages           messages: [{role, content}, ...], optional tools
    sharegpt           conversations: [{from, value}, ...], optional system
    text               text

Optional fields may be missing or null. Fields that the format does not know are kept in the row and not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

Row = dict[str, Any]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


class Problem(NamedTuple):
    """What is wrong with a row: what was expected and found, and the field (`messages[2].content`) where it is."""

    message: str
    field: str | None = None


class Format(NamedTuple):
    """A shape of rows: its required fields, and a check that yields every problem of a row that has them."""

    required: tuple[str, ...]
    problems: Callable[[Mapping[str, Any]], Iterator[Problem]]


def json_type(value: object) -> str:
    """The name of a value's type as JSON calls it."""
    if value is None:
        return "null"
    names = {bool: "boolean", int: "number", float: "number", str: "string", list: "list", dict: "object"}
    return names.get(type(value), type(value).__name__)


def text_problem(value: object, field: str, *, may_be_empty: bool = False) -> Problem | None:
    """What keeps `value` from being trainable text, or None."""
    if not isinstance(value, str):
        return Problem(f"expected string, got {json_type(value)}", field)
    if not value and not may_be_empty:
        return Problem("expected a string with text, got an empty string", field)
    if "\0" in value:
        return Problem("expected text, got a NUL character in it", field)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        return Problem(f"expected Unicode text, got a lone surrogate \\u{code:04x} (half of a character)", field)
    return None


def _texts(row: Mapping[str, Any], *fields: str) -> Iterator[Problem]:
    for field in fields:
        if problem := text_problem(row[field], field):
            yield problem


def _optional_text(row: Mapping[str, Any], field: str) -> Iterator[Problem]:
    if row.get(field) is not None and (problem := text_problem(row[field], field, may_be_empty=True)):
        yield problem


def _alpaca_problems(row: Mapping[str, Any]) -> Iterator[Problem]:
    yield from _texts(row, "instruction")
    yield from _optional_text(row, "input")
    yield from _texts(row, "output")


def _turns(row: Mapping[str, Any], field: str) -> Iterator[tuple[str, Any]]:
    for index, turn in enumerate(row[field]):
        yield f"{field}[{index}]", turn


def _list_problem(row: Mapping[str, Any], field: str, keys: tuple[str, str]) -> Problem | None:
    """The first problem of a list of turns that is not about their text."""
    if not isinstance(row[field], list):
        return Problem(f"expected list of {{{keys[0]}, {keys[1]}}}, got {json_type(row[field])}", field)
    if not row[field]:
        return Problem("expected at least one turn, got an empty list", field)
    for where, turn in _turns(row, field):
        if not isinstance(turn, dict):
            return Problem(f"expected object with {keys[0]} and {keys[1]}, got {json_type(turn)}", where)
        for key in keys:
            # An assistant that only calls tools has nothing to say.
            if key not in turn and not (key == "content" and turn.get("tool_calls")):
                return Problem("expected string, the field is missing", f"{where}.{key}")
    return None


def _messages_problems(row: Mapping[str, Any]) -> Iterator[Problem]:
    if problem := _list_problem(row, "messages", ("role", "content")):
        yield problem
        return
    for where, message in _turns(row, "messages"):
        if problem := text_problem(message["role"], f"{where}.role"):
            yield problem
        elif message.get("content") is not None or not message.get("tool_calls"):
            may_be_empty = message["role"] not in ("user", "assistant") or bool(message.get("tool_calls"))
            if problem := text_problem(message["content"], f"{where}.content", may_be_empty=may_be_empty):
                yield problem
    if not any(message["role"] == "assistant" for message in row["messages"]):
        yield Problem("expected at least one message with role 'assistant' to learn from, got none", "messages")
    if row.get("tools") is not None and not isinstance(row["tools"], list):
        yield Problem(f"expected list, got {json_type(row['tools'])}", "tools")


def _sharegpt_problems(row: Mapping[str, Any]) -> Iterator[Problem]:
    if problem := _list_problem(row, "conversations", ("from", "value")):
        yield problem
        return
    speakers = []
    for where, turn in _turns(row, "conversations"):
        if problem := text_problem(turn["from"], f"{where}.from"):
            yield problem
        elif turn["from"] not in SHAREGPT_ROLES:
            yield Problem(f"expected one of {', '.join(SHAREGPT_ROLES)}, got '{turn['from']}'", f"{where}.from")
        else:
            speakers.append(SHAREGPT_ROLES[turn["from"]])
            may_be_empty = speakers[-1] not in ("user", "assistant")
            if problem := text_problem(turn["value"], f"{where}.value", may_be_empty=may_be_empty):
                yield problem
    if "assistant" not in speakers:
        yield Problem("expected at least one turn from 'gpt' to learn from, got none", "conversations")
    yield from _optional_text(row, "system")


# In the order in which a row that fits several is read: rows of the original Alpaca file also carry `text`.
FORMATS: dict[str, Format] = {
    "messages": Format(("messages",), _messages_problems),
    "sharegpt": Format(("conversations",), _sharegpt_problems),
    "alpaca": Format(("instruction", "output"), _alpaca_problems),
    "prompt_completion": Format(("prompt", "completion"), lambda row: _texts(row, "prompt", "completion")),
    "text": Format(("text",), lambda row: _texts(row, "text")),
}


def detect_format(row: Mapping[str, Any]) -> str | None:
    """The format whose required fields the row has, else the first of which it has at least one, else None."""
    for name, format in FORMATS.items():
        if all(field in row for field in format.required):
            return name
    for name, format in FORMATS.items():
        if any(field in row for field in format.required):
            return name
    return None


def expected_fields() -> str:
    """All formats in one phrase, for messages."""
    return "; ".join(f"{name}: {' + '.join(format.required)}" for name, format in FORMATS.items())


def row_problem(row: object, format: str) -> Problem | None:
    """The first problem of a row that should have `format`, or None."""
    if not isinstance(row, dict):
        return Problem(
            f"expected object with the fields {' and '.join(FORMATS[format].required)}, got {json_type(row)}"
        )
    missing = [field for field in FORMATS[format].required if field not in row]
    if missing:
        other = detect_format(row)
        if other not in (None, format) and all(field in row for field in FORMATS[str(other)].required):
            return Problem(f"expected format '{format}' like the rows before, got format '{other}'", missing[0])
        expected = "list" if missing[0] in ("messages", "conversations") else "string"
        return Problem(f"expected {expected}, the field is missing", missing[0])
    return next(FORMATS[format].problems(row), None)
