"""Disks as they really are: too small, files that may not be read, a folder that moves away or is deleted, a clock that jumps.

In each of them the run ends with the same result, or with a message and its old checkpoints; never with a broken one.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training import Ended, Train, build, result_of, steps_in, unsound

from etude import TrainerCallback
from etude.errors import CheckpointError

pytest_plugins = ["training_fixtures"]

MountDisk = Callable[[int], Path]


@pytest.fixture
def mount_disk(tmp_path: Path) -> Iterator[MountDisk]:
    """A file system of so many bytes, all of its own; asked again, the same one with another size."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(num_bytes: int) -> Path:
        options = f"size={num_bytes}" + (",remount" if os.path.ismount(place) else "")
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", place], capture_output=True, text=True)
        if done.returncode and "remount" not in options:
            pytest.skip(f"a file system cannot be mounted here: {done.stderr.strip()}")
        assert not done.returncode, done.stderr
        return place

    yield mount
    if os.path.ismount(place):
        subprocess.run(["umount", place], check=True)


def trains_on_a_disk_of(num_bytes: int, train_in_child: Train, mount_disk: MountDisk, whole: Ended) -> bool:
    """Whether the disk was large enough; if not, it grows, and the run goes on from what is there."""
    disk = mount_disk(num_bytes)
    ended = train_in_child(disk)
    assert not unsound(disk / "out")
    if ended.exit_code == 0:
        assert ended.result == whole.result
    else:
        assert ended.exit_code == 1 and ended.result is None
        assert "ENOSPC" in ended.said or "not enough space" in ended.said, ended.said
        assert "is intact" in ended.said or "there is no earlier checkpoint" in ended.said or not steps_in(disk / "out")
        mount_disk(64 << 20)
        before = steps_in(disk / "out")
        resumed = train_in_child(disk, resume="auto")
        assert resumed.result == whole.result, resumed.said
        assert not before or f"resumed checkpoint-{before[-1]}" in resumed.said
        assert not list((disk / "out").glob(".t*"))
    return ended.exit_code == 0


def space_of(folder: Path) -> int:
    return int(
        subprocess.run(["du", "-s", "-B1", folder], capture_output=True, text=True, check=True).stdout.split()[0]
    )


@pytest.mark.parametrize("share", [0.02, 0.3, 0.7])
def test_a_disk_that_is_too_small(
    train_in_child: Train, mount_disk: MountDisk, fast_dir: Path, whole: Ended, share: float
) -> None:
    """`share` of what the whole run fills."""
    train_in_child(fast_dir)
    size = int(share * space_of(fast_dir))
    assert not trains_on_a_disk_of(size, train_in_child, mount_disk, whole)


@pytest.mark.nightly
@pytest.mark.parametrize("twelfths", range(1, 15))
def test_disks_of_many_sizes(
    train_in_child: Train, mount_disk: MountDisk, fast_dir: Path, whole: Ended, twelfths: int
) -> None:
    train_in_child(fast_dir)
    fits = trains_on_a_disk_of(space_of(fast_dir) * twelfths // 12, train_in_child, mount_disk, whole)
    assert fits == (twelfths >= 12) or twelfths in (11, 12, 13)  # where one page decides


def test_a_real_read_only_disk(train_in_child: Train, mount_disk: MountDisk, whole: Ended) -> None:
    """The run before it has left checkpoints; they can be read, and nothing is trained into the void."""
    disk = mount_disk(64 << 20)
    kill = {"at": "on_step_begin", "nth": 5, "signal": 9}
    train_in_child(disk, signals=[kill], save_in_background=False)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    ended = train_in_child(disk, resume=True)
    assert ended.exit_code == 1 and "EROFS" in ended.said and f"{disk}/out" in ended.said
    assert "step 5/" not in ended.said
    subprocess.run(["mount", "-o", "remount,rw", disk], check=True)
    assert train_in_child(disk, resume=True).result == whole.result


# Rights


@pytest.fixture
def as_nobody() -> Iterator[None]:
    """For root no file is closed: take another identity, and go back to root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    yield
    os.seteuid(0)


@pytest.mark.parametrize("name", ["state.json", "MANIFEST.json"])
def test_a_file_that_may_not_be_read(fast_dir: Path, name: str, request: pytest.FixtureRequest) -> None:
    """It is named and the checkpoint before it is taken; so it is with a whole checkpoint."""
    import saves

    from etude.checkpoint import CheckpointStore

    store = CheckpointStore(fast_dir / "out")
    for step in (1, 2, 3):
        saves.save(store, step, "old")
    fast_dir.chmod(0o755)
    (store.root / "checkpoint-3" / name).chmod(0)
    (store.root / "checkpoint-2").chmod(0)
    request.getfixturevalue("as_nobody")
    newest, rejections = store.newest_valid()
    assert newest is not None and newest.step == 1 and saves.read_back(newest) == saves.contents(1, "old")
    assert [str(each) for each in rejections] == [
        f"checkpoint-3: {name}: cannot be read: Permission denied",
        "checkpoint-2: cannot be read: Permission denied",
    ]


# The folder goes away


class Happens(TrainerCallback):
    """Something happens to the output folder at the end of a step."""

    def __init__(self, step: int, action: Callable[[], Any]) -> None:
        self.step, self.action = step, action

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.action()


def as_json(result: dict[str, Any]) -> Any:
    return json.loads(json.dumps(result))


@pytest.mark.parametrize("in_background", [False, True])
def test_the_folder_is_deleted_while_training_goes_on(fast_dir: Path, whole: Ended, in_background: bool) -> None:
    """It is made again, and what is saved from then on can be resumed. Of a checkpoint that is being written at that moment
    anything may be left."""
    trainer = build(fast_dir / "out", save_in_background=in_background)
    trainer.add_callback(Happens(5, lambda: shutil.rmtree(fast_dir / "out", ignore_errors=in_background)))
    output = trainer.train()
    assert as_json(result_of(trainer, output)) == whole.result
    assert [step for step in steps_in(fast_dir / "out") if step != 4 or not in_background] == [6, 8, 9]
    assert in_background or not unsound(fast_dir / "out")


@pytest.mark.parametrize("in_background", [False, True])
def test_the_folder_is_moved_while_training_goes_on(fast_dir: Path, whole: Ended, in_background: bool) -> None:
    """The run goes on where it was told to write; what was moved is whole, and is resumed from there. A checkpoint that is
    being written at that moment may end in either folder, or be lost, and that is said."""
    trainer = build(fast_dir / "out", save_in_background=in_background)
    trainer.add_callback(Happens(5, lambda: (fast_dir / "out").rename(fast_dir / "moved")))
    output = trainer.train()
    assert as_json(result_of(trainer, output)) == whole.result
    is_lost = any("checkpoint not written" in line and "checkpoint-4" in line for line in trainer.notices.lines)
    moved, made = steps_in(fast_dir / "moved"), steps_in(fast_dir / "out")
    assert (moved, made) in [([2, 4], [6, 8, 9]), ([2], [4, 6, 8, 9]), ([2], [6, 8, 9])]
    assert is_lost == (4 not in moved + made) and (in_background or moved == [2, 4])
    assert not unsound(fast_dir / "out") and not unsound(fast_dir / "moved")
    again = build(fast_dir / "moved", model_seed=5)
    output = again.train(resume_from_checkpoint=True)
    assert as_json(result_of(again, output)) == whole.result


def test_a_folder_that_cannot_be_made_again(fast_dir: Path) -> None:
    """A file has taken its place: training goes on, and ends with a message and without a claim."""
    out = fast_dir / "out"

    def replace_by_a_file() -> None:
        out.rename(fast_dir / "moved")
        out.write_text("not a folder")

    trainer = build(out)
    trainer.add_callback(Happens(5, replace_by_a_file))
    with pytest.raises(CheckpointError, match=r"This was the final save|saves in a row failed|ENOTDIR|EEXIST"):
        trainer.train()
    assert steps_in(fast_dir / "moved") in ([2, 4], [2]) and out.read_text() == "not a folder"


# The clock


@pytest.mark.parametrize("jump_hours", [-24 * 365, 24 * 365])
def test_the_clock_jumps(fast_dir: Path, whole: Ended, monkeypatch: pytest.MonkeyPatch, jump_hours: int) -> None:
    """Neither what is newest nor what is kept depends on a time: not on that of files, and not on the program's."""
    now = time.time
    trainer = build(fast_dir / "out", save_total_limit=2)
    jump = Happens(5, lambda: monkeypatch.setattr(time, "time", lambda: now() + jump_hours * 3600))
    trainer.add_callback(jump)
    output = trainer.train()
    assert as_json(result_of(trainer, output)) == whole.result
    assert steps_in(fast_dir / "out") == [8, 9]
    for number, folder in enumerate(sorted((fast_dir / "out").glob("checkpoint-*"))):  # the newest is the oldest file
        moment = now() - number * 86400
        for path in [folder, *folder.rglob("*")]:
            os.utime(path, (moment, moment))
    again = build(fast_dir / "out", model_seed=5)
    output = again.train(resume_from_checkpoint=True)
    assert as_json(result_of(again, output)) == whole.result
    assert any("resumed checkpoint-9" in line for line in again.notices.lines)
