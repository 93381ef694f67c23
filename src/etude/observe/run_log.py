"""`run.log`: what was said during a run, with the time, over all of its starts.

A run that was killed says nothing any more; the next start says from where it goes on. So the file is the history of what
went wrong on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from pathlib import Path

from etude.observe.console import printable

FILE_NAME = "run.log"
LONGEST_READ_BYTES = 200_000


class RunLog:
    """Appends lines to `run.log` in `folder`, and says them as well.

    Args:
        say: where a line is also shown, as it is.
        now: the time of a line.
    """

    def __init__(
        self, folder: str | Path, say: Callable[[str], object], now: Callable[[], datetime] = datetime.now
    ) -> None:
        self.path = Path(folder) / FILE_NAME
        self._say, self._now = say, now

    def write(self, text: str) -> None:
        """Show `text` (lines that end with a line break) and keep it."""
        self._say(text)
        self.keep(text)

    def keep(self, text: str) -> None:
        """Keep `text` without showing it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            for line in text.splitlines():
                file.write(f"{self._now():%Y-%m-%d %H:%M:%S}  {printable(line.removeprefix('etude: '))}\n")


def read(folder: str | Path) -> list[str]:
    """The lines of the run's log, the oldest first; the last ones of a very long file."""
    path = Path(folder) / FILE_NAME
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(0, 2)
        start = max(0, file.tell() - LONGEST_READ_BYTES)
        file.seek(start)
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    return lines[1:] if start else lines
