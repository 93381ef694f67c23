"""One save as the fault tests see it: what it writes, how a child process runs it, what must hold afterwards."""

from __future__ import annotations

import ctypes
import hashlib
import os
import resource
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etude.checkpoint import Checkpoint, CheckpointStore
from etude.errors import CheckpointError

STEP = 3
SITUATIONS = {  # the (step, version) already committed before the save of (STEP, "new")
    "first": [],
    "overwrite": [(2, "old"), (STEP, "old")],
    "retention": [(1, "old"), (2, "old")],
}
COUNT, KILL, SHORT_KILL, FAIL_ONCE, FAIL_FROM, SHORT_WRITES = range(6)


@dataclass(frozen=True)
class Outcome:
    """How a save in a child ended: `signal` that killed it (0: none) and what it reported before."""

    signal: int
    report: str

    @property
    def saved(self) -> bool:
        return self.report.startswith("saved")

    @property
    def refused(self) -> bool:
        return self.report.startswith("refused")


def contents(step: int, version: str) -> dict[str, bytes]:
    """The files of a checkpoint; every (step, version) has its own bytes."""
    block = hashlib.sha256(f"{step} {version}".encode()).digest()
    return {
        "adapter_model.safetensors": block * 40,
        "state.json": b'{"step": %d, "version": "%s"}' % (step, version.encode()),
        "tokenizer/vocab.txt": block[:20],
    }


def save(store: CheckpointStore, step: int, version: str) -> Checkpoint:
    """A save as the engine does it: two files through the draft, one put there by somebody else."""
    files = contents(step, version)
    with store.begin(step) as draft:
        for name in ("adapter_model.safetensors", "state.json"):
            draft.write(name, files[name])
        (draft.path / "tokenizer").mkdir()
        (draft.path / "tokenizer" / "vocab.txt").write_bytes(files["tokenizer/vocab.txt"])
        return draft.commit(step=step, extra={"version": version})


def prepare(base: Path, situation: str) -> Path:
    """The output folder before the save. In "first" even its parent does not exist."""
    base.mkdir(parents=True, exist_ok=True)
    root = base / "runs" / "out"
    store = CheckpointStore(root)
    if SITUATIONS[situation]:
        with store.lock():
            for step, version in SITUATIONS[situation]:
                save(store, step, version)
    return root


def read_back(checkpoint: Checkpoint) -> dict[str, bytes]:
    return {name: (checkpoint.path / name).read_bytes() for name in (checkpoint.manifest or {})["files"]}


def violations(root: Path, situation: str, *, saved: bool, next_save: bool = True) -> list[str]:
    """What is wrong in `root` after a save of (STEP, "new") ended somehow. `saved`: it had reported success."""
    store = CheckpointStore(root)
    old, new = SITUATIONS[situation], (STEP, "new")
    found = _judge_newest(store, old, new, saved=saved, when="before the lock")
    with store.lock():
        found += _judge_newest(store, old, new, saved=saved, when="under the lock")
        for checkpoint in store.committed():
            try:
                version = (store.verify(checkpoint.path).manifest or {})["version"]
            except CheckpointError as error:
                found.append(f"a visible checkpoint is invalid: {error}")
                continue
            if (checkpoint.step, version) not in [*old, new]:
                found.append(f"{checkpoint.path.name} holds version {version}")
        kept = {checkpoint.step for checkpoint in store.committed()}
        if not saved and not kept >= {step for step, _ in old}:
            found.append(f"an old checkpoint is gone: {sorted(kept)} are left")
        left = [path.name for path in root.iterdir() if path.name.startswith((".tmp", ".replaced", ".trash"))]
        if left:
            found.append(f"left behind: {left}")
        if next_save:
            save(store, STEP + 1, "next")
            newest, _ = store.newest_valid()
            if newest is None or read_back(newest) != contents(STEP + 1, "next"):
                found.append("the next save did not work")
    return found


def _judge_newest(
    store: CheckpointStore, old: list[tuple[int, str]], new: tuple[int, str], *, saved: bool, when: str
) -> list[str]:
    newest, rejections = store.newest_valid()
    found = [f"{when}: {rejection}" for rejection in rejections]
    if newest is None:
        return [*found, f"{when}: no checkpoint"] if saved or old else found
    identity = newest.step, (newest.manifest or {})["version"]
    if read_back(newest) != contents(*identity):
        found.append(f"{when}: {identity} was loaded with wrong bytes")
    allowed = [new] if saved else [new, *old[-1:]]
    if identity not in allowed:
        found.append(f"{when}: found {identity}, expected one of {allowed}")
    return found


def run_child(order: dict[str, Any], report: int) -> None:
    """In a forked child: arm the shim, save, and say "saved" or "refused <message>" into the pipe `report`."""
    shim = ctypes.CDLL(None)
    root = Path(order["root"])
    store = CheckpointStore(root)
    if (size := order.get("file_size_limit")) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    if (spare := order.get("spare_descriptors")) is not None:
        most = max(int(path.name) for path in Path("/proc/self/fd").iterdir()) + 1 + spare
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if order.get("log") else -1
    number = order.get("errno", 0)
    shim.faultio_arm(order["base"].encode(), order["mode"], ctypes.c_long(order.get("at", 0)), number, log)
    try:
        with store.lock():
            save(store, STEP, order.get("version", "new"))
            shim.faultio_mark(b"saved")
            os.write(report, b"saved\n")
            if order["situation"] == "retention":
                store.retire(store.committed()[0])
    except CheckpointError as error:
        os.write(report, f"refused {error}\n".encode())
    except BaseException:
        os.write(report, f"crashed {traceback.format_exc()}\n".encode())
