"""Several processes at one output folder: one writes, any number read, and what the dead left is cleared up."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import saves

from etude.checkpoint import Checkpoint, CheckpointStore
from etude.checkpoint.store import host_tag
from etude.errors import CheckpointError


@contextmanager
def python(code: str, root: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process running `code`, which finds `saves`, `store` and `say`; killed at the end."""
    preamble = (
        "import os, sys, time, saves\n"
        "from pathlib import Path\n"
        "from etude.checkpoint import CheckpointStore\n"
        f"store = CheckpointStore({str(root)!r})\n"
        "def say(text): print(text, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    process = subprocess.Popen(
        [sys.executable, "-c", preamble + code],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
        text=True,
        env=environment,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def hear(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


HOLD = "with store.lock():\n    say('locked')\n    sys.stdin.readline()\n"


def test_a_second_writer_is_refused_by_name(fast_dir: Path) -> None:
    store = CheckpointStore(fast_dir / "out")
    with python(HOLD, store.root) as holder:
        assert hear(holder) == "locked"
        with (
            pytest.raises(CheckpointError, match=rf'"pid": {holder.pid}, "host": "{socket.gethostname()}"'),
            store.lock(),
        ):
            pass
    with store.lock():  # killed: the lock went with it
        pass


def test_the_same_process_is_refused_too(fast_dir: Path) -> None:
    with (
        CheckpointStore(fast_dir).lock(),
        pytest.raises(CheckpointError, match=f'"pid": {os.getpid()}'),
        CheckpointStore(fast_dir).lock(),
    ):
        pass


def test_a_forked_worker_does_not_keep_the_lock(fast_dir: Path) -> None:
    """A data-loading worker may outlive its killed parent for a while; the restarted run must not be refused."""
    code = (
        "with store.lock():\n"
        "    if os.fork() == 0:\n        say(os.getpid()); time.sleep(60); os._exit(0)\n"
        "    sys.stdin.readline()\n"
    )
    with python(code, fast_dir) as parent:
        worker = int(hear(parent))
        try:
            with pytest.raises(CheckpointError), CheckpointStore(fast_dir).lock():
                pass
            parent.kill()
            parent.wait()
            os.kill(worker, 0)
            with CheckpointStore(fast_dir).lock():
                pass
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_draft_of_a_dead_process_is_removed_that_of_a_live_one_is_not(fast_dir: Path) -> None:
    code = "draft = store.begin(7)\ndraft.write('x', b'x')\nsay(draft.path.name)\nsys.stdin.readline()\n"
    store = CheckpointStore(fast_dir)
    with python(code, fast_dir) as living:
        draft = fast_dir / hear(living)
        with store.lock():
            assert (draft / "x").exists()
    with store.lock():
        assert not draft.exists()


def test_leftovers_of_an_earlier_life_with_our_process_id_are_removed(fast_dir: Path) -> None:
    """In a restarted container the dead process often had the same id; a draft that is really ours stays."""
    store = CheckpointStore(fast_dir)
    leftover = fast_dir / f".tmp-checkpoint-5-{host_tag()}00000000-{os.getpid()}"
    leftover.mkdir()
    with store.begin(6) as draft, store.lock():
        assert draft.path.exists() and not leftover.exists()


def test_what_another_host_or_anybody_else_left_stays(fast_dir: Path) -> None:
    dead = 2**22 + 1  # above the largest process id of Linux
    kept = [
        f".tmp-checkpoint-5-{'0' * 16}-{dead}",
        ".tmp-checkpoint-5",
        ".tmp-mine",
        f".tmp-other-5-{host_tag()}00000000-{dead}",
        "checkpoint-final",
    ]
    gone = [f".tmp-checkpoint-5-{host_tag()}00000000-{dead}", f".trash-checkpoint-4-{'0' * 16}-{dead}"]
    for name in kept + gone:
        (fast_dir / name).mkdir()
        (fast_dir / name / "file").touch()
    with CheckpointStore(fast_dir).lock():
        assert sorted(path.name for path in fast_dir.iterdir()) == sorted([*kept, ".etude.lock"])


@pytest.mark.parametrize("renames", [1, 2])
def test_an_interrupted_replacement_is_found_and_repaired(fast_dir: Path, renames: int) -> None:
    code = (
        "saves.save(store, 3, 'old')\n"
        f"original, left = Path.rename, [{renames}]\n"
        "def rename(self, target):\n"
        "    original(self, target)\n"
        "    left[0] -= 1\n"
        "    if not left[0]: os._exit(9)\n"
        "Path.rename = rename\n"
        "saves.save(store, 3, 'new')\n"
    )
    with python(code, fast_dir) as writer:
        assert writer.wait() == 9
    version = ["old", "new"][renames - 1]
    store = CheckpointStore(fast_dir)
    assert (fast_dir / "checkpoint-3").exists() == (renames == 2)
    for lock in (False, True):
        if lock:
            with store.lock():
                pass
        newest, rejections = store.newest_valid()
        assert newest is not None and saves.read_back(newest) == saves.contents(3, version) and not rejections
    assert sorted(path.name for path in fast_dir.iterdir()) == [".etude.lock", "checkpoint-3"]


@pytest.mark.parametrize("deleted", [[], ["MANIFEST.json"], ["state.json"]])
def test_a_replacement_that_ends_while_the_replaced_one_is_read(
    fast_dir: Path, monkeypatch: pytest.MonkeyPatch, deleted: list[str]
) -> None:
    """The reader lists between the two renames; then the new one arrives and the replaced one is being deleted."""
    store = CheckpointStore(fast_dir)
    saves.save(store, 3, "old")
    replaced = fast_dir / f".replaced-checkpoint-3-{host_tag()}00000000-{os.getpid()}"
    (fast_dir / "checkpoint-3").rename(replaced)
    verify = store.verify

    def finish_the_replacement_first(path: Path) -> Checkpoint:
        if path == replaced and not (fast_dir / "checkpoint-3").exists():
            saves.save(store, 3, "new")
            for name in deleted:
                (replaced / name).unlink()
        return verify(path)

    monkeypatch.setattr(store, "verify", finish_the_replacement_first)
    newest, rejections = store.newest_valid()
    version = "new" if deleted else "old"
    assert newest is not None and saves.read_back(newest) == saves.contents(3, version) and not rejections


WRITE_ALL_THE_TIME = """
with store.lock():
    for step in range(1, 10_000):
        saves.save(store, step, "new")
        if step == 2:
            say("started")
        if step > 2:
            store.retire(store.committed()[0])
"""


def test_a_reader_during_saves_always_finds_one(fast_dir: Path) -> None:
    store, steps = CheckpointStore(fast_dir), []
    with python(WRITE_ALL_THE_TIME, fast_dir) as writer:
        assert hear(writer) == "started"
        while len(set(steps)) < 50:
            newest, rejections = store.newest_valid()
            assert newest is not None and not rejections
            assert newest.manifest is not None and newest.manifest["step"] == newest.step
            steps.append(newest.step)
            assert writer.poll() is None
    assert steps == sorted(steps)


def test_a_reader_during_replacements_always_finds_one(fast_dir: Path) -> None:
    code = "say('started')\nfor turn in range(10_000): saves.save(store, 3, f'turn {turn}')\n"
    store, versions = CheckpointStore(fast_dir), set()
    saves.save(store, 3, "turn 0")
    with python(code, fast_dir) as writer:
        assert hear(writer) == "started"
        while len(versions) < 50:
            newest, rejections = store.newest_valid()
            assert newest is not None and newest.manifest is not None and not rejections
            versions.add(newest.manifest["version"])
            assert writer.poll() is None
