"""The fault injector: a shim built by the C compiler and a fork server that runs saves under it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from saves import Outcome

HERE = Path(__file__).parent


@pytest.fixture
def fast_dir() -> Iterator[Path]:
    """A fresh folder in memory where there is one: thousands of saves sync thousands of files."""
    memory = Path("/dev/shm")
    folder = Path(tempfile.mkdtemp(dir=memory if os.access(memory, os.W_OK) else None, prefix="etude-test-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def run_save(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Outcome]]:
    """`run_save(root=..., base=..., situation=..., mode=..., at=..., errno=..., log=...)` in a fresh child process."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("the fault injector needs Linux and a C compiler")
    shim = tmp_path_factory.mktemp("faultio") / "faultio.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", shim, HERE / "faultio.c", "-ldl"], check=True)
    environment = {**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])}
    server = subprocess.Popen(
        [sys.executable, HERE / "forkserver.py"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert server.stdin and server.stdout

    def run(**order: Any) -> Outcome:
        server.stdin.write(json.dumps({key: str(v) if isinstance(v, Path) else v for key, v in order.items()}) + "\n")
        server.stdin.flush()
        outcome = Outcome(**json.loads(server.stdout.readline()))
        assert not outcome.report.startswith("crashed"), outcome.report
        return outcome

    yield run
    server.stdin.close()
    server.wait(timeout=10)
    server.stdout.close()
