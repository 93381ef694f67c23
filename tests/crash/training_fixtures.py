"""Fixtures of the training tests, for `pytest_plugins`: the fault injector, and training in a fresh child process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import training
from training import LAST_STEP, Ended, Train


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fault injector as a library to preload."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("the fault injector needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("faultio") / "faultio.so"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", library, Path(training.__file__).with_name("faultio.c"), "-ldl"],
        check=True,
    )
    return library


@pytest.fixture(scope="session")
def train_in_child(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """`train_in_child(folder, resume=..., signals=[...], fault={...}, cpu_seconds=..., **settings)`."""
    scratch = tmp_path_factory.mktemp("orders")
    environment = {**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": os.pathsep.join(sys.path)}
    server = subprocess.Popen(
        [sys.executable, training.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert server.stdin and server.stdout

    def run(
        folder: Path,
        *,
        resume: Any = None,
        signals: Any = (),
        fault: dict[str, Any] | None = None,
        cpu_seconds: float | None = None,
        **settings: Any,
    ) -> Ended:
        folder.mkdir(parents=True, exist_ok=True)
        result, said = scratch / "result.json", scratch / "said.txt"
        result.unlink(missing_ok=True)
        order = {"folder": str(folder), "resume": resume, "signals": list(signals), "settings": settings}
        order |= {"fault": fault and {"until": -1} | fault, "cpu_seconds": cpu_seconds}
        server.stdin.write(json.dumps(order | {"result": str(result), "said": str(said)}) + "\n")
        server.stdin.flush()
        code, used = json.loads(server.stdout.readline())
        content = json.loads(result.read_text()) if result.exists() else None
        return Ended(code, said.read_text(errors="replace"), content, used)

    yield run
    server.stdin.close()
    server.wait(timeout=10)
    server.stdout.close()


@pytest.fixture(scope="session")
def whole(train_in_child: Train, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The run that nothing disturbs."""
    ended = train_in_child(tmp_path_factory.mktemp("whole"))
    assert ended.exit_code == 0 and ended.result is not None, ended.said
    assert ended.result["step"] == LAST_STEP
    return ended
