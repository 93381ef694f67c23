"""Python's garbage collector, kept out of the way where it has much to look through and nothing to find.

Imports, a vocabulary and a model are millions of objects that stay. The collector goes through all of them again and
again while they are made (a third of the time that a large tokenizer takes to load), and again in the middle of a step.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def paused() -> Iterator[None]:
    """Collect nothing meanwhile; what was made counts as old afterwards, so that it is not gone through at once."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            with frozen():
                gc.enable()


_holders: set[object] = set()
"""Who wants objects to be frozen at this moment. Counted here: Python's own count includes what the program around us has
frozen, and from 3.12 on objects that are immortal, so that it is never 0."""

_has_trained = False


@contextmanager
def frozen() -> Iterator[None]:
    """Leave out of every collection what is there already; what is made meanwhile is collected as ever.

    Afterwards nothing is frozen, also not what somebody else froze: Python cannot take back one without the other, and a
    model that was left out of every collection would never leave memory.
    """
    holder = object()
    _holders.add(holder)
    try:
        gc.freeze()
        yield
    finally:
        _holders.discard(holder)
        if not _holders:
            gc.unfreeze()


@contextmanager
def frozen_for_training() -> Iterator[None]:
    """As `frozen`; but a model that a training before this one has left behind goes first, or it would stay for all of it."""
    global _has_trained
    if _has_trained and not _holders:
        gc.unfreeze()
        gc.collect()
    _has_trained = True
    with frozen():
        yield
