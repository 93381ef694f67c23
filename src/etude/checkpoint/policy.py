"""Which checkpoints are kept."""

from __future__ import annotations


def steps_to_retire(committed: list[int], limit: int | None, best: int | None) -> list[int]:
    """Steps of the checkpoints that `save_total_limit` no longer has room for, oldest first.

    The newest checkpoint and the best one are never among them, even where the limit is 1.
    """
    if limit is None or limit <= 0 or len(committed) <= limit:
        return []
    newest = max(committed)
    kept = {newest} | ({best} if best in committed else set())
    expendable = [step for step in sorted(committed) if step not in kept]
    return expendable[: max(0, len(committed) - max(limit, len(kept)))]
