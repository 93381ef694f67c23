"""Randomness as a function of the place in training, so that it need not be replayed to resume.

Everything random in a micro-batch (augmentation in a dataset or collator, dropout in the model) is drawn from
generators seeded with a hash of (seed, purpose, place). Python's, NumPy's and torch's global generators are put back
after data loading, so a user's own use of them is undisturbed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*place: int | str) -> int:
    """A 63-bit seed from a place such as `(seed, "dropout", epoch, step, micro_batch)`; equal on every machine."""
    digest = hashlib.blake2b("/".join(map(str, place)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(seed: int) -> None:
    """Seed Python's, NumPy's and torch's global CPU generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


class RandomState:
    """The states of Python's, NumPy's and torch's global CPU generators."""

    def __init__(self) -> None:
        self.python, self.numpy, self.torch = random.getstate(), np.random.get_state(), torch.get_rng_state()

    def restore(self) -> None:
        random.setstate(self.python)
        np.random.set_state(self.numpy)
        torch.set_rng_state(self.torch)


@contextmanager
def undisturbed_generators() -> Iterator[None]:
    """Put the global CPU generators back when the block ends, whatever it drew."""
    state = RandomState()
    try:
        yield
    finally:
        state.restore()
