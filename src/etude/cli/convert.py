"""A written value -> the type of the field it is for. What `no` or `12:30:00` means depends on the field alone."""

from __future__ import annotations

import math
import types
from typing import Any, Literal, Union, get_args, get_origin

from etude.cli.strict_yaml import MAX_ABS_INT, Value


class Mismatch(Exception):  # noqa: N818 - not an error to a user: the caller adds the field and who said it
    """What was expected and what was found."""


def convert(value: Value, hint: Any) -> Any:
    """`value` as `hint` wants it.

    Raises:
        Mismatch: where no member of the type fits, for numbers that are not finite, and for integers over 63 bits.
    """
    members = _members(hint)
    if Any in members:
        return _finite_everywhere(value)
    reasons = []
    # An int given for `float | int` stays an int, and text comes after them: every scalar is also text.
    for member in sorted(members, key=_precedence):
        try:
            return _as_member(value, member)
        except Mismatch as mismatch:
            reasons.append(str(mismatch))
    raise Mismatch(reasons[0] if len(members) == 1 or _is_number(value) else _expected(value, members))


def accepts(hint: Any, kind: type) -> bool:
    """Whether a field of this type can hold a `kind`."""
    return any(member is kind or get_origin(member) is kind for member in _members(hint))


def type_name(hint: Any) -> str:
    """How a type is called in help and errors."""
    if get_origin(hint) is Literal:
        return "|".join(str(choice) for choice in get_args(hint))
    plain = get_origin(hint) or hint
    names = {bool: "true|false", int: "integer", float: "number", str: "text", list: "list", dict: "mapping"}
    return names.get(plain, getattr(plain, "__name__", str(plain)))


def type_names(hint: Any) -> str:
    return " or ".join(type_name(member) for member in _members(hint) if member is not type(None))


def _members(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _precedence(member: Any) -> int:
    order = [type(None), bool, int, float, Literal, str, list, dict]
    plain = get_origin(member) or member
    return order.index(plain) if plain in order else len(order)


def _as_member(value: Value, member: Any) -> Any:
    data = value.data
    if member is type(None):
        if data is None:
            return None
    elif member is bool:
        if isinstance(data, bool):
            return data
    elif member is int:
        if _is_int(data):
            return _bounded(data)
    elif member is float:
        if _is_int(data) or isinstance(data, float):
            return _finite(float(_bounded(data)) if _is_int(data) else data)
    elif member is str:
        if value.text is not None and data is not None:
            return _printable(value.text)
    elif get_origin(member) is Literal:
        for choice in get_args(member):
            if value.text == str(choice):
                return choice
    elif (get_origin(member) or member) is list:
        return _as_list(value, member)
    elif (get_origin(member) or member) is dict and isinstance(data, dict):
        return {key: _finite_everywhere(entry) for key, entry in data.items()}
    raise Mismatch(_expected(value, (member,)))


def _as_list(value: Value, member: Any) -> list[Any]:
    element = (get_args(member) or (Any,))[0]
    if isinstance(value.data, list):
        return [convert(entry, element) for entry in value.data]
    if value.text is not None and "," in value.text:
        parts = [part.strip() for part in value.text.split(",")]
        return [convert(Value(part, value.line, part), element) for part in parts if part]
    raise Mismatch(_expected(value, (member,)))


def _finite_everywhere(value: Value) -> Any:
    if isinstance(value.data, dict):
        return {key: _finite_everywhere(entry) for key, entry in value.data.items()}
    if isinstance(value.data, list):
        return [_finite_everywhere(entry) for entry in value.data]
    return _finite(value.data) if isinstance(value.data, float) else _bounded(value.data)


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise Mismatch(f"expected a finite number, got {number}")
    return number


def _bounded(data: Any) -> Any:
    if _is_int(data) and abs(data) > MAX_ABS_INT:
        raise Mismatch("expected an integer of at most 63 bits, got a larger one")
    return data


def _printable(text: str) -> str:
    if "\0" in text:
        raise Mismatch("expected text, got a NUL character in it")
    return text


def _is_int(data: Any) -> bool:
    return isinstance(data, int) and not isinstance(data, bool)


def _is_number(value: Value) -> bool:
    return _is_int(value.data) or isinstance(value.data, float)


def _expected(value: Value, members: tuple[Any, ...]) -> str:
    expected = " or ".join(type_name(member) for member in members if member is not type(None))
    return f"expected {expected or 'null'}, got {_found(value)}"


def _found(value: Value) -> str:
    if isinstance(value.data, dict):
        return "a mapping"
    if isinstance(value.data, list):
        return "a list"
    if value.data is None:
        return "nothing"
    text = value.text or str(value.data)
    return repr(text if len(text) <= 60 else text[:57] + "...")
