"""Text from outside (rows, templates, what a model wrote) on the terminal: shown as it is, never obeyed."""

from __future__ import annotations


def visible(text: str) -> str:
    """`text` over as many lines as it has, with every other character that a terminal would obey as an escape."""
    from etude.observe.console import printable

    return "\n".join(printable(line) for line in text.split("\n"))


def one_line(text: str, max_length: int = 60) -> str:
    """`text` on one line, its middle left out where it is longer than `max_length` characters."""
    from etude.observe.console import printable

    shown = printable(text)
    if len(shown) <= max_length:
        return shown
    half = (max_length - 3) // 2
    return f"{shown[:half]}...{shown[-half:]}"
