"""Runs a file of tests in Triton's interpreter, on a CPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton")


def run_interpreted(file: Path) -> None:
    """One process for all: the variable that turns Triton into an interpreter has to be there before its first import."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider", str(file)]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=file.parents[2])
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
