"""What a run tells its user in plain lines, and keeps for the report."""

from __future__ import annotations

import sys
from collections.abc import Callable

CONTROL_CHARACTERS = {code: f"\\x{code:02x}" for code in [*range(9), *range(11, 32), *range(127, 160)]}
"""Text of files and data may be in a line: what would steer the terminal is shown, not obeyed."""


class Notices:
    """Says each line on standard error, unless quiet, and remembers it."""

    def __init__(self, *, quiet: bool = False, write: Callable[[str], object] | None = None) -> None:
        self.quiet, self.write = quiet, write or (lambda text: sys.stderr.write(text) and sys.stderr.flush())
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)
        if not self.quiet:
            self.write(f"etude: {line.translate(CONTROL_CHARACTERS)}\n")

    def say_once(self, line: str) -> None:
        if line not in self.lines:
            self.say(line)
