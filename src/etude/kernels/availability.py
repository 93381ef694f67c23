"""Whether what the fused kernels are written in is there."""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def triton_is_there() -> bool:
    """With torch for CUDA it comes on Linux only."""
    return importlib.util.find_spec("triton") is not None
