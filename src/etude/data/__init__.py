"""Files -> rows -> tokens -> batches. Names are imported on first use: processes that only tokenize need no torch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "FORMATS": "formats",
    "CausalLMCollator": "collate",
    "RowSet": "rows",
    "Statistics": "tokens",
    "TokenizedRows": "tokens",
    "default_collator": "collate",
    "detect_format": "formats",
    "encode_row": "tokens",
    "encode_rows": "tokens",
    "read_rows": "rows",
    "repeat_by_weight": "rows",
    "split_by_hash": "rows",
}

__all__ = [*_HOMES]

if TYPE_CHECKING:
    from etude.data.collate import CausalLMCollator as CausalLMCollator
    from etude.data.collate import default_collator as default_collator
    from etude.data.formats import FORMATS as FORMATS
    from etude.data.formats import detect_format as detect_format
    from etude.data.rows import RowSet as RowSet
    from etude.data.rows import read_rows as read_rows
    from etude.data.rows import repeat_by_weight as repeat_by_weight
    from etude.data.rows import split_by_hash as split_by_hash
    from etude.data.tokens import Statistics as Statistics
    from etude.data.tokens import TokenizedRows as TokenizedRows
    from etude.data.tokens import encode_row as encode_row
    from etude.data.tokens import encode_rows as encode_rows


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'etude.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"etude.data.{_HOMES[name]}"), name)
