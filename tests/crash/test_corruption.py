"""Every file of the newest checkpoint is damaged in every way: always noticed, named with the reason, never loaded."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import saves

from etude.checkpoint import CheckpointStore

FILES = ("adapter_model.safetensors", "state.json", "tokenizer/vocab.txt", "MANIFEST.json")


def damage_missing(path: Path, other: Path) -> None:
    path.unlink()


def damage_empty(path: Path, other: Path) -> None:
    path.write_bytes(b"")


def damage_half(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_one_byte_less(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def damage_one_byte_more(path: Path, other: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\n")


def damage_swapped_with_another_step(path: Path, other: Path) -> None:
    ours = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(ours)


def damage_folder_instead(path: Path, other: Path) -> None:
    path.unlink()
    path.mkdir()


def damage_link_out(path: Path, other: Path) -> None:
    """Even to the very same bytes."""
    outside = other.parents[1] / "outside"
    path.rename(outside)
    path.symlink_to(outside)


def damage_dangling_link(path: Path, other: Path) -> None:
    path.unlink()
    path.symlink_to("/nowhere")


def damage_pipe_instead(path: Path, other: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def damage_zeros(path: Path, other: Path) -> None:
    path.write_bytes(b"\0" * path.stat().st_size)


# What is said of a file that the manifest lists, and of the manifest itself.
DAMAGES: dict[str, tuple[Callable[[Path, Path], None], str, str]] = {
    "missing": (damage_missing, "is missing", "is missing"),
    "empty": (damage_empty, "has 0 bytes, the manifest says", "is not valid JSON"),
    "half": (damage_half, "the manifest says", "is not valid JSON"),
    "one byte less": (damage_one_byte_less, "the manifest says", "does not match its own digest"),
    "one byte more": (damage_one_byte_more, "the manifest says", "does not match its own digest"),
    "swapped with another step": (damage_swapped_with_another_step, "sha256 mismatch", "is of step 2"),
    "folder instead": (damage_folder_instead, "is a folder, not a regular file", "is a folder, not a regular file"),
    "link out": (damage_link_out, "symbolic link", "symbolic link"),
    "dangling link": (damage_dangling_link, "symbolic link", "symbolic link"),
    "pipe instead": (damage_pipe_instead, "pipe", "pipe"),
    "zeros": (damage_zeros, "sha256 mismatch", "is not valid JSON"),
}


@pytest.fixture
def root(fast_dir: Path) -> Path:
    """Checkpoints 1, 2 and 3; the swaps below may damage 3 and 2 together, 1 stays valid."""
    store = CheckpointStore(fast_dir / "out")
    for step in (1, 2, 3):
        saves.save(store, step, "old")
    return store.root


def rejected_reason(root: Path, name: str) -> str:
    """The reason why checkpoint-3 is rejected; an older one must be found, with its right bytes."""
    newest, rejections = CheckpointStore(root).newest_valid()
    assert newest is not None and newest.step < 3
    assert saves.read_back(newest) == saves.contents(newest.step, "old")
    assert str(rejections[0]).startswith(f"checkpoint-3: {name}: ")
    return rejections[0].reason


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(root: Path, damage: str, name: str) -> None:
    apply, said_of_file, said_of_manifest = DAMAGES[damage]
    apply(root / "checkpoint-3" / name, root / "checkpoint-2" / name)
    assert (said_of_manifest if name == "MANIFEST.json" else said_of_file) in rejected_reason(root, name)


@pytest.mark.parametrize("name", FILES)
def test_bit_flips(root: Path, name: str, num_flips: int = 50) -> None:
    path = root / "checkpoint-3" / name
    sound = path.read_bytes()
    generator = random.Random(name)
    for bit in generator.sample(range(8 * len(sound)), min(num_flips, 8 * len(sound))):
        flipped = bytearray(sound)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        rejected_reason(root, name)
    path.write_bytes(sound)
    newest, rejections = CheckpointStore(root).newest_valid()
    assert newest is not None and newest.step == 3 and not rejections


@pytest.mark.nightly
@pytest.mark.parametrize("name", FILES)
def test_a_thousand_bit_flips(root: Path, name: str) -> None:
    test_bit_flips(root, name, num_flips=1000)


def test_every_bit_of_the_manifest(root: Path) -> None:
    """Also those that change no value: the case of an exponent, of an escape, a space."""
    store = CheckpointStore(root)
    with store.begin(4) as draft:
        draft.write("ä E.txt", b"x")
        draft.commit(step=4, extra={"loss": 1e-30, "note": "é\n"})
    test = root / "checkpoint-4" / "MANIFEST.json"
    sound = test.read_bytes()
    assert b"e-30" in sound and b"\\u00e9" in sound
    for bit in range(8 * len(sound)):
        flipped = bytearray(sound)
        flipped[bit // 8] ^= 1 << bit % 8
        test.write_bytes(flipped)
        newest, rejections = store.newest_valid()
        assert newest is not None and newest.step == 3 and rejections[0].reason.startswith("MANIFEST.json: ")


def test_all_damaged_means_none_but_not_silence(root: Path) -> None:
    for step in (1, 2, 3):
        damage_half(root / f"checkpoint-{step}" / "state.json", root)
    newest, rejections = CheckpointStore(root).newest_valid()
    assert newest is None
    assert [rejection.path.name for rejection in rejections] == ["checkpoint-3", "checkpoint-2", "checkpoint-1"]


def test_a_folder_of_another_step_is_not_taken_for_this_one(root: Path) -> None:
    shutil.rmtree(root / "checkpoint-3")
    shutil.copytree(root / "checkpoint-1", root / "checkpoint-3")
    assert "is of step 1" in rejected_reason(root, "MANIFEST.json")


def test_without_digests_sizes_are_still_compared(root: Path) -> None:
    store = CheckpointStore(root)
    (root / "checkpoint-3" / "state.json").write_bytes(b"?" * (root / "checkpoint-3" / "state.json").stat().st_size)
    assert store.verify(root / "checkpoint-3", digests=False).step == 3
    damage_one_byte_less(root / "checkpoint-3" / "state.json", root)
    with pytest.raises(ValueError, match=r"state\.json: has .* bytes, the manifest says"):
        store.verify(root / "checkpoint-3", digests=False)
