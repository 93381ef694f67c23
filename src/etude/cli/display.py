"""What is shown on the terminal: text from outside as it is, never obeyed, and bars only where somebody is watching."""

from __future__ import annotations

import sys


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


def bars_for_people_only() -> None:
    """No progress bars of transformers (loading weights) in the log file of a job."""
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
