"""The README.md beside an adapter: what it was made from, with which numbers, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from etude.observe.console import printable
from etude.observe.report import public, without_secrets, write_atomically

CARD_NAME = "README.md"


@dataclass(frozen=True)
class Card:
    """What the card says. `base_model` is a Hub name or a folder."""

    base_model: str
    pipeline_tag: str | None
    folder: str
    adapter: str
    method: str
    facts: Sequence[tuple[str, Sequence[str]]]
    results: Sequence[tuple[str, str]]
    settings: Mapping[str, Any]
    environment: Mapping[str, str]
    usage: Sequence[tuple[str, str]]


def write_card(card: Card, folder: str | Path, secrets: Sequence[str] = ()) -> Path:
    """Write the card into `folder`; returns its path."""
    file = Path(folder) / CARD_NAME
    write_atomically(file, without_secrets(card_text(card), secrets).encode())
    return file


def card_text(card: Card) -> str:
    """The card in Markdown, with the front matter that the Hub reads."""
    front = {
        "base_model": card.base_model,
        "library_name": "peft",
        **({"pipeline_tag": card.pipeline_tag} if card.pipeline_tag else {}),
        "tags": [f"base_model:adapter:{card.base_model}", card.method.lower(), "etude"],
    }
    lines = [
        "---",
        yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip(),
        "---",
        "",
        f"# {_inline(card.folder)}",
        "",
        f"A {_inline(card.adapter)} adapter for {_code(card.base_model)}, trained with etude.",
        "",
        "## Results",
        "",
        *_table(("", ""), card.results),
        "",
        "## Data and training",
        "",
        *_table(("", ""), [(label, "; ".join(texts)) for label, texts in card.facts]),
        "",
        "## Use",
        "",
    ]
    for caption, code in card.usage:
        lines += [caption, "", _block(code), ""]
    lines += ["## Settings", "", *_table(("setting", "value"), list(public(card.settings).items())), ""]
    lines += ["## Environment", "", *_table(("", ""), list(card.environment.items())), ""]
    return "\n".join(lines)


def _table(head: tuple[str, str], rows: Sequence[tuple[Any, Any]]) -> list[str]:
    if not rows:
        return ["(nothing recorded)"]
    return [f"| {head[0]} | {head[1]} |", "|---|---|", *(f"| {_inline(a)} | {_inline(b)} |" for a, b in rows)]


_MARKUP = str.maketrans({character: f"\\{character}" for character in "\\`*_[]<>|#~!$"})


def _inline(value: Any) -> str:
    """Text that Markdown shows as it is, on one line."""
    return printable(str(value).replace("\n", " ")).translate(_MARKUP)


def _code(value: Any) -> str:
    text = printable(str(value).replace("\n", " "))
    return f"`{text}`" if "`" not in text else _inline(text)


def _block(code: str) -> str:
    fence = "```" if "```" not in code else "~~~~"
    language = "python" if code.startswith(("from ", "import ")) else "sh"
    return f"{fence}{language}\n{code}\n{fence}"
