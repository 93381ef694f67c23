"""Whether the training data is still the same: its length and a digest of a few of its rows."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from etude.data.loader import has_length, load_row
from etude.data.randomness import undisturbed_generators

SAMPLED_ROWS = 16


def data_fingerprint(dataset: Any) -> dict[str, Any]:
    """`{"samples": length or None, "rows": digest or None}`.

    The digest is over 16 evenly spaced rows. It is None for streams, and for datasets whose rows are drawn anew at
    every access.
    """
    if not has_length(dataset) or not hasattr(dataset, "__getitem__") or len(dataset) == 0:
        return {"samples": len(dataset) if has_length(dataset) else None, "rows": None}
    size = len(dataset)
    numbers = sorted({round(i * (size - 1) / (SAMPLED_ROWS - 1)) for i in range(SAMPLED_ROWS)})
    with undisturbed_generators():
        once, again = (_digest(dataset, numbers) for _ in range(2))
    return {"samples": size, "rows": once if once == again else None}


def _digest(dataset: Any, numbers: list[int]) -> str:
    digest = hashlib.sha256()
    for number in numbers:
        _feed(digest, load_row(dataset, number))
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            digest.update(str(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        digest.update(f"[{len(value)}".encode())
        for item in value:
            _feed(digest, item)
    elif torch.is_tensor(value):
        _feed(digest, value.detach().cpu().float().numpy() if value.dtype == torch.bfloat16 else value.cpu().numpy())
    elif isinstance(value, np.ndarray):
        digest.update(np.ascontiguousarray(value).tobytes())
    elif value is None or isinstance(value, (str, bytes, bool, int, float)):
        digest.update(repr(value).encode())
