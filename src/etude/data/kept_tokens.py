"""Tokens of an earlier run on the same rows: found again by what they were made from, so that nothing is tokenized twice.

    key = (what the rows are) + (what turns them into tokens: tokenizer, template, settings, versions)

The first part is known before a tokenizer is loaded, and tells whether it is likely that there is something. Small data
is tokenized faster than it is looked up, and is not kept.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
from collections.abc import Mapping
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from etude import __version__
from etude.data.cache import FORMAT, TokenCache, digest_of
from etude.data.rows import RowSet
from etude.data.token_workers import facts_of
from etude.data.tokens import TokenizedRows, encode_rows
from etude.errors import ConfigError, DataError
from etude.private_cache import default_cache_dir

logger = logging.getLogger(__name__)

WORTH_KEEPING_SECONDS = 1.0
FOLDER = "tokens"
CLOCK = "strftime_now"
"""What a chat template calls for the time."""
Sets = dict[str, TokenizedRows]


def token_cache_dir() -> Path:
    return default_cache_dir() / FOLDER


class KeptTokens:
    """The tokens of some rows, in the user's cache.

    Args:
        rows_key: a digest of the rows, and of what chooses among them; None: nothing is looked up or kept.
    """

    def __init__(self, rows_key: str | None) -> None:
        self._rows_key = rows_key
        self._cache = None
        if rows_key is not None:
            try:
                self._cache = TokenCache(token_cache_dir())
            except (OSError, ConfigError) as error:
                logger.warning("tokens are not kept for the next run: %s", error)

    def are_likely(self) -> bool:
        """Whether these rows were tokenized before, if perhaps with another tokenizer or other settings."""
        return self._cache is not None and self._cache.has_any(str(self._rows_key))

    def load(self, tokenizer: Any, options: Mapping[str, Any]) -> tuple[Sets, Any] | None:
        """The data sets by name and the note that were stored, or None. A damaged entry is removed."""
        if self._cache is None or not self.are_likely():
            return None
        key = self._key(tokenizer, options)
        try:
            found = self._cache.load(key) if key is not None else None
        except DataError as error:
            logger.warning("%s; the rows are tokenized again", error)
            return None
        if found is not None:
            logger.info("tokens of an earlier run are used, kept in %s", self._cache.folder)
        return found

    def store(self, sets: Sets, note: Any, tokenizer: Any, options: Mapping[str, Any], seconds: float) -> None:
        """Keep data sets, where making them took long enough; a cache that cannot be written to costs no run.

        Of the processes of a machine that train together, the first one does it.
        """
        if self._cache is None or seconds < WORTH_KEEPING_SECONDS or os.environ.get("LOCAL_RANK", "0") != "0":
            return
        key = self._key(tokenizer, options)
        if key is None:
            return
        try:
            self._cache.store(key, sets, note)
        except OSError as error:
            logger.warning("tokens are not kept for the next run: %s", error)
        except TypeError:  # rows in the note that JSON has no word for
            logger.info("tokens are not kept for the next run: their rows are no JSON")

    def _key(self, tokenizer: Any, options: Mapping[str, Any]) -> str | None:
        facts = facts_of(tokenizer)
        if facts is None:
            return None
        versions = [FORMAT, __version__, *(metadata.version(name) for name in ("transformers", "tokenizers"))]
        templates = [getattr(tokenizer, "chat_template", None), dict(options)]
        # Some templates write the date of the day into every row.
        today = date.today().isoformat() if CLOCK in json.dumps(templates) else None
        return f"{self._rows_key}-{digest_of(facts, templates, today, versions)[:32]}"


def rows_key_of(*parts: Any) -> str:
    """The first part of a key."""
    return digest_of(*parts)[:32]


def encode_rows_once(rows: RowSet, tokenizer: Any, num_processes: int | None = None, **options: Any) -> TokenizedRows:
    """As `encode_rows`; rows that were tokenized before, in this or another run, are taken from the cache."""
    kept = KeptTokens(_key_of_rows(rows))
    found = kept.load(tokenizer, options)
    if found is not None:
        return found[0]["rows"]
    started = time.monotonic()
    encoded = encode_rows(rows, tokenizer, num_processes=num_processes, **options)
    kept.store({"rows": encoded}, None, tokenizer, options, time.monotonic() - started)
    return encoded


def _key_of_rows(rows: RowSet) -> str | None:
    """None for rows with values that JSON has no word for."""
    content = hashlib.sha256()
    try:
        for start in range(0, len(rows), 1000):
            content.update(rows.as_json(range(start, min(start + 1000, len(rows)))))
    except (TypeError, ValueError):
        return None
    files, lines = (column.tobytes() for column in rows.origins.columns())
    rejected = [str(error) for error in rows.rejected]
    return rows_key_of(rows.format, rows.origins.files, rejected, content.digest(), files, lines)
