"""The fused cross entropy, interpreted."""

from __future__ import annotations

from pathlib import Path

from interpreted import needs_triton, run_interpreted


@needs_triton
def test_the_kernel_in_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_fused_cross_entropy.py"))
