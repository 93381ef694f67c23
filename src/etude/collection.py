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


@contextmanager
def frozen() -> Iterator[None]:
    """Leave out of every collection what is there already; what is made meanwhile is collected as ever."""
    is_outermost = gc.get_freeze_count() == 0
    gc.freeze()
    try:
        yield
    finally:
        if is_outermost:
            gc.unfreeze()
