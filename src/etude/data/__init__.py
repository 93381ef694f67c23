"""Files -> rows -> tokens -> batches."""

from etude.data.collate import CausalLMCollator, default_collator
from etude.data.formats import FORMATS, detect_format
from etude.data.rows import RowSet, read_rows, repeat_by_weight, split_by_hash
from etude.data.tokens import Statistics, TokenizedRows, encode_row, encode_rows

__all__ = [
    "FORMATS",
    "CausalLMCollator",
    "RowSet",
    "Statistics",
    "TokenizedRows",
    "default_collator",
    "detect_format",
    "encode_row",
    "encode_rows",
    "read_rows",
    "repeat_by_weight",
    "split_by_hash",
]
