"""The fused cross entropy, interpreted."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

INTERPRETED = Path(__file__).with_name("interpreted_fused_cross_entropy.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")
def test_the_kernel_in_the_interpreter() -> None:
    """In a process of its own: the variable that turns Triton into an interpreter has to be there before its first import."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(INTERPRETED)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=INTERPRETED.parents[2])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
