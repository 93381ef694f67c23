"""A strict YAML reader for recipes: the plain part of YAML 1.2, with the line of every value.

PyYAML's safe loader reads `1e-5` as a string, `no` as False and `12:30:00` as 45000, lets the last of two equal keys
win, and expands aliases into as much memory as a file asks for. Here only the tokenizer and parser of PyYAML work;
what a scalar means is decided by YAML 1.2's core schema, and everything a recipe does not need is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from etude.errors import ConfigError

MAX_BYTES = 64 * 1024
MAX_DEPTH = 8
MAX_ABS_INT = 2**63 - 1  # what a JSON or safetensors reader on the other side can still hold

_INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
_BOOLEANS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_NULLS = frozenset({"", "~", "null", "Null", "NULL"})


@dataclass(frozen=True)
class Value:
    """A value and where it stands. `data` is a scalar, a list of `Value` or a dict of them; `text` a scalar as written."""

    data: Any
    line: int
    text: str | None = None

    def plain(self) -> Any:
        """The value without lines."""
        if isinstance(self.data, dict):
            return {key: value.plain() for key, value in self.data.items()}
        if isinstance(self.data, list):
            return [value.plain() for value in self.data]
        return self.data


def read_file(path: str | Path) -> Value:
    """Read one recipe; the result's `data` is a dict.

    Raises:
        ConfigError: naming the file and the line, for anything but one plain mapping of at most 64 KiB of UTF-8.
    """
    file = Path(path)
    # A pipe or a device would never end; opening one would already block.
    if not file.is_file():
        reason = "is a folder" if file.is_dir() else "is not a file" if file.exists() else "no such recipe"
        raise ConfigError(f"{reason}; a recipe is a YAML file with keys such as model, data, output", field=str(path))
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"cannot be read: {error.strerror}", field=str(path)) from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"larger than {MAX_BYTES // 1024} KiB; a recipe is a page of settings", field=str(path))
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ConfigError(f"byte {error.start} is not UTF-8; save the file as UTF-8", field=f"{path}:{line}") from error
    document = read_text(text, name=str(path))
    if document.data is None:
        raise ConfigError("is empty; a recipe needs at least model and data", field=str(path))
    if not isinstance(document.data, dict):
        raise ConfigError("a recipe is a mapping, `key: value` on every line", field=f"{path}:{document.line}")
    return document


def read_text(text: str, *, name: str) -> Value:
    """Read one YAML document; `name` stands for the file in errors.

    Raises:
        ConfigError: naming `name` and the line.
    """
    try:
        composer = _Composer(text, name)
        node = composer.get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ConfigError(f"not readable as YAML: {error.problem or error.context}", field=where) from error
    except yaml.YAMLError as error:  # a character that YAML does not allow
        raise ConfigError(f"not readable as YAML: {' '.join(str(error).split())}", field=name) from error
    return Value(None, 1, "") if node is None else _value_of(node, name, key="")


def scalar(text: str) -> Any:
    """What an unquoted scalar means in YAML 1.2's core schema: null, a boolean, an integer, a float or a string."""
    if text in _NULLS:
        return None
    if text in _BOOLEANS:
        return _BOOLEANS[text]
    if _INT.fullmatch(text):
        # Python refuses to convert thousands of digits; every such number is out of range anyway.
        return _integer(text) if len(text) <= 64 else MAX_ABS_INT + 1
    if _FLOAT.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


def _integer(text: str) -> int:
    return int(text, 8) if text.startswith("0o") else int(text, 16) if text.startswith("0x") else int(text)


class _Composer(yaml.SafeLoader):
    """PyYAML's parser without anchors, aliases and tags, and with a bound on the depth."""

    def __init__(self, text: str, name: str) -> None:
        super().__init__(text)
        self.recipe_name, self.depth = name, 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        where = f"{self.recipe_name}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"alias '*{event.anchor}': recipes have no aliases; write the value again", field=where)
        if getattr(event, "anchor", None):
            raise ConfigError(f"anchor '&{event.anchor}': recipes have no anchors; remove it", field=where)
        if getattr(event, "tag", None):
            raise ConfigError(f"tag '{event.tag}': recipes have no tags; write the plain value", field=where)
        if self.depth == MAX_DEPTH:
            raise ConfigError(f"nested more than {MAX_DEPTH} levels deep", field=where)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def _value_of(node: yaml.Node, name: str, key: str) -> Value:
    line = node.start_mark.line + 1
    if isinstance(node, yaml.ScalarNode):
        plain = node.style is None
        return Value(scalar(node.value) if plain else node.value, line, node.value)
    if isinstance(node, yaml.SequenceNode):
        return Value([_value_of(item, name, key) for item in node.value], line)
    entries: dict[str, Value] = {}
    for key_node, value_node in node.value:
        where = f"{name}:{key_node.start_mark.line + 1}"
        if not isinstance(key_node, yaml.ScalarNode):
            raise ConfigError("a key must be a word", field=where)
        word = key_node.value
        dotted = f"{key}.{word}" if key else word
        if word in entries:
            raise ConfigError(f"'{dotted}' appears twice, first on line {entries[word].line}; keep one", field=where)
        entries[word] = _value_of(value_node, name, dotted)
    return Value(entries, line)
