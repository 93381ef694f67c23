"""The rows of a recipe from the user's cache, where an earlier run tokenized the same files in the same way.

They are then neither read nor split nor tokenized; a million rows are there in a second.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude.data.cache import fingerprint_of, stamp_of
from etude.data.kept_tokens import KeptTokens, rows_key_of
from etude.data.rows import files_of
from etude.errors import DataError

if TYPE_CHECKING:
    from etude.cli.recipe import Recipe
    from etude.cli.rows import Rows


class KeptRows:
    """`Rows` in the cache, by the content of their files and all that chooses among them.

    Raises:
        DataError: a folder has no data files.
    """

    def __init__(self, chosen: Recipe) -> None:
        from etude.cli.rows import LOOKED_THROUGH_ROWS
        from etude.cli.sources import sources_of

        sources = [source for key in ("data", "eval_data") for source in sources_of(key, getattr(chosen, key))]
        is_kept = chosen.keep_tokens and not chosen.streaming
        self._paths = [source.path for source in sources] if is_kept else []
        self._stamp = self._stamp_now()
        content = fingerprint_of(_files(self._paths)) if is_kept else None
        choices = [chosen.data, chosen.eval_data, chosen.format, chosen.on_bad_row, chosen.eval_fraction]
        choices.append(max(LOOKED_THROUGH_ROWS, chosen.samples))
        self._kept = KeptTokens(None if content is None else rows_key_of(content, choices))

    def are_likely(self) -> bool:
        """Whether an earlier run read these files."""
        return self._kept.are_likely()

    def load(self, tokenizer: Any, options: dict[str, Any]) -> Rows | None:
        """The rows as that run tokenized them; None where it did so otherwise."""
        from etude.cli.rows import Rows

        found = self._kept.load(tokenizer, options)
        if found is None:
            return None
        sets, note = found
        return Rows(sets["train"], sets.get("evaluation"), **note)

    def store(self, rows: Rows, tokenizer: Any, options: dict[str, Any], seconds: float) -> None:
        """Keep them for the next run, unless files were written to, or came, while they were read."""
        if self._stamp_now() != self._stamp:
            return
        note = rows._asdict()
        train, evaluation = note.pop("train"), note.pop("evaluation")
        sets = {"train": train} | ({"evaluation": evaluation} if evaluation is not None else {})
        self._kept.store(sets, note, tokenizer, options, seconds)

    def _stamp_now(self) -> list[Any] | None:
        try:
            return stamp_of(_files(self._paths))
        except DataError:  # a folder is empty by now
            return None


def _files(paths: list[str]) -> list[Path | str]:
    return [file for path in paths for file in files_of(path)]
