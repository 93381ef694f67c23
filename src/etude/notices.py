"""What a run tells its user in plain lines, and keeps for the report."""

from __future__ import annotations

import sys
from collections.abc import Callable


class Notices:
    """Says each line on standard error, unless quiet, and remembers it."""

    def __init__(self, *, quiet: bool = False, write: Callable[[str], object] | None = None) -> None:
        self.quiet, self.write = quiet, write or (lambda text: sys.stderr.write(text) and sys.stderr.flush())
        self.lines: list[str] = []

    def say(self, line: str) -> None:
        self.lines.append(line)
        if not self.quiet:
            self.write(f"etude: {line}\n")

    def say_once(self, line: str) -> None:
        if line not in self.lines:
            self.say(line)
