"""The checkpoint store where nothing fails: names, order, contents, errors that say what to do."""

from __future__ import annotations

import errno
import logging
import os
import stat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import etude.checkpoint.draft as draft_module
import etude.checkpoint.store as store_module
from etude.checkpoint import Checkpoint, CheckpointStore, estimate_free_bytes
from etude.errors import CheckpointError


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(tmp_path / "runs" / "out")


def save(store: CheckpointStore, step: int, content: bytes = b"x") -> Checkpoint:
    with store.begin(step) as draft:
        draft.write("state.json", content)
        return draft.commit(step=step, extra={"world": 1})


def names(store: CheckpointStore) -> list[str]:
    return sorted(path.name for path in store.root.iterdir())


def test_nothing_is_created_before_the_first_write(store: CheckpointStore) -> None:
    assert store.committed() == [] and store.newest_valid() == (None, [])
    assert not store.root.parent.exists()


def test_checkpoints_are_ordered_by_step_not_by_name(store: CheckpointStore) -> None:
    for step in (10, 9, 0, 100):
        save(store, step)
    assert [checkpoint.step for checkpoint in store.committed()] == [0, 9, 10, 100]
    newest, _ = store.newest_valid()
    assert newest is not None and newest.step == 100


def test_only_folders_with_the_exact_name_are_checkpoints(store: CheckpointStore) -> None:
    save(store, 7)
    for name in ("checkpoint-", "checkpoint-07", "checkpoint-8.bak", "checkpoint--1", "checkpoint-x", "xcheckpoint-9"):
        (store.root / name).mkdir()
    (store.root / "checkpoint-٣").mkdir()
    (store.root / "checkpoint-9").write_text("a file")
    assert [checkpoint.step for checkpoint in store.committed()] == [7]


def test_the_prefix_is_taken_literally(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, prefix="best.of")
    save(store, 1)
    (tmp_path / "bestXof-2").mkdir()
    assert [checkpoint.path.name for checkpoint in store.committed()] == ["best.of-1"]
    assert CheckpointStore(tmp_path).committed() == []


def test_a_checkpoint_carries_its_manifest(store: CheckpointStore) -> None:
    written = save(store, 3)
    assert written == store.verify(written.path) == store.newest_valid()[0]
    assert written.manifest is not None and written.manifest["world"] == 1
    assert store.committed() == [Checkpoint(written.path, 3, None)]


def test_any_folder_can_be_verified(store: CheckpointStore, tmp_path: Path) -> None:
    moved = tmp_path / "the best one"
    save(store, 3).path.rename(moved)
    link = tmp_path / "link"
    link.symlink_to(moved)
    assert store.verify(moved).step == store.verify(str(link)).step == 3
    with pytest.raises(CheckpointError, match="nowhere: is missing"):
        store.verify(tmp_path / "nowhere")


def test_a_checkpoint_without_manifest_says_what_to_do(store: CheckpointStore) -> None:
    (store.root / "checkpoint-5").mkdir(parents=True)
    (store.root / "checkpoint-5" / "trainer_state.json").write_text("{}")
    newest, rejections = store.newest_valid()
    assert newest is None and "checkpoint-5: MANIFEST.json: is missing" in str(rejections[0])
    assert "etude import-checkpoint" in rejections[0].reason


def test_others_may_write_files_before_and_after_the_commit(store: CheckpointStore) -> None:
    with store.begin(1) as draft:
        (draft.path / "tokenizer" / "deep").mkdir(parents=True)
        (draft.path / "tokenizer" / "deep" / "vocab.txt").write_text("a b c")
        (draft.path / "empty").mkdir()
        (draft.path / "link").symlink_to("/etc/passwd")
        draft.write("state/own.json", memoryview(b"{}"))
        checkpoint = draft.commit(step=1, extra={})
    assert checkpoint.manifest is not None
    assert sorted(checkpoint.manifest["files"]) == ["state/own.json", "tokenizer/deep/vocab.txt"]
    (checkpoint.path / "added later.txt").write_text("by a hook")
    assert store.verify(checkpoint.path).manifest == checkpoint.manifest
    (checkpoint.path / "tokenizer" / "deep" / "vocab.txt").write_text("a b d")
    with pytest.raises(CheckpointError, match=r"vocab\.txt: sha256 mismatch"):
        store.verify(checkpoint.path)


def test_checkpoints_have_ordinary_permissions(store: CheckpointStore) -> None:
    """A private temporary folder must not become a private checkpoint: others read it."""
    checkpoint, mask = save(store, 1), os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(checkpoint.path.stat().st_mode) == 0o777 & ~mask
    assert stat.S_IMODE((checkpoint.path / "state.json").stat().st_mode) == 0o666 & ~mask


def test_a_draft_that_is_not_committed_leaves_nothing(store: CheckpointStore) -> None:
    save(store, 1)
    with store.begin(2) as draft:
        draft.write("state.json", b"x")
    with pytest.raises(ZeroDivisionError), store.begin(2) as draft:
        draft.write("state.json", b"x")
        raise ZeroDivisionError
    with pytest.raises(KeyboardInterrupt), store.begin(2) as draft:
        raise KeyboardInterrupt
    assert names(store) == ["checkpoint-1"]


def test_a_draft_that_was_moved_away_is_not_committed_in_part(store: CheckpointStore, tmp_path: Path) -> None:
    """Whoever writes by name makes the folder anew, and what came before is missing there."""
    save(store, 1)
    with pytest.raises(CheckpointError, match="step 2"), store.begin(2) as draft:
        draft.write("state.json", b"x")
        draft.path.rename(tmp_path / "moved")
        draft.path.mkdir()
        draft.write("adapter.safetensors", b"y")
        draft.commit(step=2, extra={})
    assert names(store) == ["checkpoint-1"]


def test_an_error_after_the_commit_does_not_undo_it(store: CheckpointStore) -> None:
    with pytest.raises(OSError, match="disk"), store.begin(2) as draft:
        draft.write("state.json", b"x")
        draft.commit(step=2, extra={})
        raise OSError(errno.EIO, "another disk")
    assert names(store) == ["checkpoint-2"] and store.newest_valid()[0]


def test_a_step_is_saved_again(store: CheckpointStore) -> None:
    save(store, 4, b"old")
    save(store, 4, b"new")
    assert (store.root / "checkpoint-4" / "state.json").read_bytes() == b"new"
    assert names(store) == ["checkpoint-4"] and store.newest_valid()[1] == []


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_whatever_is_in_the_place_of_a_checkpoint_is_replaced(
    store: CheckpointStore, tmp_path: Path, kind: str
) -> None:
    place, target = store.root / "checkpoint-4", tmp_path / "elsewhere"
    store.root.mkdir(parents=True)
    target.mkdir()
    (target / "precious").touch()
    {"file": place.touch, "link": lambda: place.symlink_to(target), "folder": place.mkdir}[kind]()
    save(store, 4)
    assert names(store) == ["checkpoint-4"] and store.newest_valid()[0] and (target / "precious").exists()


def test_retiring(store: CheckpointStore, tmp_path: Path) -> None:
    for step in (1, 2):
        save(store, step)
    store.retire(store.committed()[0])
    assert names(store) == ["checkpoint-2"]
    (tmp_path / "checkpoint-9").mkdir()
    for path in (tmp_path / "checkpoint-9", store.root / "important", store.root):
        with pytest.raises(CheckpointError, match="not deleted"):
            store.retire(Checkpoint(path, 9))
    assert (tmp_path / "checkpoint-9").exists()


def test_what_cannot_be_retired_is_reported(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    store.root.mkdir(parents=True)
    with caplog.at_level(logging.WARNING):
        store.retire(Checkpoint(store.root / "checkpoint-1", 1))
    assert "checkpoint-1: could not be retired: ENOENT" in caplog.text


def test_space_is_checked_first(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    save(store, 6, b"x" * 1_000_000)
    monkeypatch.setattr(store_module, "estimate_free_bytes", lambda path: 1_900_000)
    message = r"checkpoint-9: not enough space to save step 9: needs 2\.0 MB, free 1\.9 MB; checkpoint-6 is intact"
    with pytest.raises(CheckpointError, match=message):
        store.begin(9)
    with pytest.raises(CheckpointError, match=r"needs 5\.0 MB, free 1\.9 MB"):
        store.begin(9, expected_bytes=5_000_000)
    with store.begin(9, expected_bytes=1_000_000):
        pass
    assert names(store) == ["checkpoint-6"]


def test_free_space_of_a_folder_to_be(tmp_path: Path) -> None:
    assert estimate_free_bytes(tmp_path / "not" / "yet") > 0


@pytest.mark.parametrize("name", ["../x", "/x", "a/../b", "", "MANIFEST.json", "a\\b"])
def test_a_draft_refuses_names(store: CheckpointStore, name: str) -> None:
    with store.begin(1) as draft, pytest.raises(CheckpointError, match="checkpoint-1"):
        draft.write(name, b"x")
    assert names(store) == []


def test_a_draft_never_overwrites(store: CheckpointStore) -> None:
    with pytest.raises(CheckpointError, match=r"state\.json: EEXIST"), store.begin(1) as draft:
        draft.write("state.json", b"x")
        draft.write("state.json", b"y")


def test_names_that_cannot_be_read_back_are_not_committed(store: CheckpointStore) -> None:
    with pytest.raises(CheckpointError, match="where case does not count"), store.begin(1) as draft:
        (draft.path / "a").touch()
        (draft.path / "A").touch()
        draft.commit(step=1, extra={})
    assert names(store) == []


def test_a_draft_is_committed_once_and_as_its_own_step(store: CheckpointStore) -> None:
    with store.begin(1) as draft:
        draft.write("state.json", b"x")
        with pytest.raises(CheckpointError, match="step=2"):
            draft.commit(step=2, extra={})
        with pytest.raises(CheckpointError, match="digest"):
            draft.commit(step=1, extra={"digest": "mine"})
        draft.commit(step=1, extra={})
        with pytest.raises(CheckpointError, match="committed or given up"):
            draft.commit(step=1, extra={})
        with pytest.raises(CheckpointError, match=r"late\.json: cannot be written"):
            draft.write("late.json", b"x")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), object(), b"bytes"])
def test_extra_must_be_json(store: CheckpointStore, value: object) -> None:
    with (
        pytest.raises(CheckpointError, match=r"checkpoint-1/MANIFEST\.json: extra is not plain JSON"),
        store.begin(1) as draft,
    ):
        draft.write("state.json", b"x")
        draft.commit(step=1, extra={"value": value})
    assert names(store) == []


def test_fsync_is_never_retried(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a failed fsync the kernel may have dropped the data, and the next call would report success."""
    calls: list[int] = []

    def fail_once(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    save(store, 1)
    monkeypatch.setattr(draft_module.os, "fsync", fail_once)
    with store.begin(2) as draft:
        draft.write("state.json", b"x")
        for _ in range(2):
            with pytest.raises(CheckpointError, match=r"EIO|given up"):
                draft.commit(step=2, extra={})
    assert len(calls) == 1 and names(store) == ["checkpoint-1"]


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "ENOSPC"),
        (RuntimeError("Error while serializing: I/O error: File too large (os error 27)"), "EFBIG"),
        (RuntimeError("not about storage (os error 111)"), None),
        (ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"), None),
    ],
)
def test_a_full_disk_met_by_somebody_else_is_named_too(
    store: CheckpointStore, error: Exception, words: str | None
) -> None:
    """A hook or another library wrote into the draft; what is not about storage passes unchanged."""
    save(store, 1)
    with pytest.raises(Exception) as caught, store.begin(2):
        raise error
    if words is None:
        assert caught.value is error
    else:
        assert isinstance(caught.value, CheckpointError) and caught.value.step == 2
        assert words in str(caught.value) and "checkpoint-1 is intact" in str(caught.value)
    assert names(store) == ["checkpoint-1"]


def test_a_file_system_without_locks_warns(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(store_module.fcntl, "flock", no_locks)
    with pytest.warns(UserWarning, match="do not start two runs in this folder"), store.lock():
        save(store, 1)


def test_a_link_in_place_of_the_lock_is_not_followed(store: CheckpointStore, tmp_path: Path) -> None:
    store.root.mkdir(parents=True)
    (tmp_path / "victim").write_text("precious")
    (store.root / ".etude.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(CheckpointError, match=r"\.etude\.lock: cannot be written"), store.lock():
        pass
    assert (tmp_path / "victim").read_text() == "precious"


def test_an_unreadable_root_is_not_an_empty_one(tmp_path: Path) -> None:
    """Or a run would start from scratch over its own checkpoints."""
    (tmp_path / "out").write_text("a file")
    with pytest.raises(CheckpointError, match="out: cannot be listed: ENOTDIR"):
        CheckpointStore(tmp_path / "out").newest_valid()


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_history_of_saves_and_retirements(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """The folder always equals a dictionary from steps to contents."""
    store, expected = CheckpointStore(tmp_path_factory.mktemp("history")), dict[int, bytes]()
    for _ in range(data.draw(st.integers(1, 8))):
        step = data.draw(st.integers(0, 5))
        if data.draw(st.booleans()) and step in expected:
            store.retire(Checkpoint(store.root / f"checkpoint-{step}", step))
            del expected[step]
        else:
            expected[step] = data.draw(st.binary(max_size=20))
            save(store, step, expected[step])
        assert {each.step: (each.path / "state.json").read_bytes() for each in store.committed()} == expected
        newest, rejections = store.newest_valid()
        assert (newest.step if newest else None) == max(expected, default=None) and not rejections
        assert names(store) == sorted(f"checkpoint-{step}" for step in expected)
