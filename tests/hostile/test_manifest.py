"""Checkpoints made by an attacker: refused before anything is allocated, followed or executed, naming file and field.

The attacker can compute digests, so every hostile manifest here is signed.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from etude.checkpoint import CheckpointStore, read_json_strict, read_safetensors_checked
from etude.checkpoint.manifest import FORMAT, check_names, encode_manifest, parse_manifest
from etude.errors import CheckpointError

SECRET = b"the file outside of the checkpoint"
MAX_PEAK_BYTES = 64 << 20


class Canary:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A sound checkpoint, and beside it a file it must never reach."""
    (tmp_path / "outside").write_bytes(SECRET)
    store = CheckpointStore(tmp_path / "out")
    with store.begin(1) as draft:
        draft.write("state.json", b"{}")
        draft.write("sub/data.bin", b"12")
        return draft.commit(step=1, extra={}).path


def entry(content: bytes) -> dict[str, Any]:
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def sign(checkpoint: Path, **changes: Any) -> None:
    """Rewrite the manifest with changed fields (None removes one) and a right digest."""
    manifest = json.loads((checkpoint / "MANIFEST.json").read_bytes())
    del manifest["digest"]
    manifest |= changes
    document = {key: value for key, value in manifest.items() if value is not None}
    (checkpoint / "MANIFEST.json").write_bytes(encode_manifest(document))


def refused(checkpoint: Path, words: str, file: str = "MANIFEST.json") -> None:
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=words) as caught:
            CheckpointStore(checkpoint.parent).verify(checkpoint)
        assert tracemalloc.get_traced_memory()[1] < MAX_PEAK_BYTES
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(str(checkpoint / file))
    assert SECRET.decode() not in str(caught.value)
    newest, rejections = CheckpointStore(checkpoint.parent).newest_valid()
    assert newest is None and len(rejections) == 1


def test_the_signature_of_these_tests_is_right(checkpoint: Path) -> None:
    sign(checkpoint, note="changed")
    assert (CheckpointStore(checkpoint.parent).verify(checkpoint).manifest or {})["note"] == "changed"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("../outside", "'..'"),
        ("sub/../../outside", "'..'"),
        ("./state.json", "'.'"),
        ("sub//data.bin", "empty"),
        ("sub/", "empty"),
        ("", "characters"),
        ("..", "'..'"),
        ("/etc/passwd", "relative"),
        ("C:outside", "relative"),
        ("..\\outside", "backslashes"),
        ("state.json\0", "control"),
        ("state\n.json", "control"),
        ("x" * 2000, "characters"),
        ("\ud800", "cannot be a file name"),
    ],
)
def test_names(checkpoint: Path, name: str, words: str) -> None:
    sign(checkpoint, files={name: entry(SECRET)})
    refused(checkpoint, words)


@pytest.mark.parametrize(("one", "other"), [("a.txt", "A.txt"), ("straße", "STRASSE"), ("\u00e9", "e\u0301")])
def test_twins(checkpoint: Path, one: str, other: str) -> None:
    for name in (one, other):
        (checkpoint / name).write_bytes(SECRET)
    sign(checkpoint, files={one: entry(SECRET), other: entry(SECRET)})
    refused(checkpoint, "the same file where case does not count")


def test_a_duplicate_name(checkpoint: Path) -> None:
    path = checkpoint / "MANIFEST.json"
    raw = path.read_bytes().replace(b'"sub/data.bin"', b'"state.json"')
    path.write_bytes(raw)
    refused(checkpoint, "'state.json' appears twice")


@pytest.mark.parametrize("name", ["MANIFEST.json", "manifest.JSON"])
def test_the_manifest_lists_itself(checkpoint: Path, name: str) -> None:
    sign(checkpoint, files={name: entry(SECRET)})
    refused(checkpoint, "cannot list itself")


@pytest.mark.parametrize("folder", ["sub", "."])
def test_a_symbolic_link_is_not_followed(checkpoint: Path, folder: str) -> None:
    (checkpoint / folder / "link").symlink_to(checkpoint.parents[1] / "outside")
    name = "link" if folder == "." else f"{folder}/link"
    sign(checkpoint, files={name: entry(SECRET)})
    refused(checkpoint, "symbolic link", file=name)


def test_a_linked_folder_is_not_entered(checkpoint: Path) -> None:
    (checkpoint / "up").symlink_to(checkpoint.parents[1])
    sign(checkpoint, files={"up/outside": entry(SECRET)})
    refused(checkpoint, "symbolic link", file="up/outside")


def test_a_linked_manifest_is_not_read(checkpoint: Path) -> None:
    moved = checkpoint.parents[1] / "manifest"
    (checkpoint / "MANIFEST.json").rename(moved)
    (checkpoint / "MANIFEST.json").symlink_to(moved)
    refused(checkpoint, "symbolic link")


def test_pipes_and_devices_are_not_opened(checkpoint: Path) -> None:
    os.mkfifo(checkpoint / "pipe")
    sign(checkpoint, files={"pipe": entry(b"")})
    refused(checkpoint, "pipe", file="pipe")
    try:
        os.mknod(checkpoint / "zero", 0o600 | 0o020000, os.makedev(1, 5))
    except PermissionError:
        return  # only root may make a device
    sign(checkpoint, files={"zero": entry(b"")})
    refused(checkpoint, "device", file="zero")


@pytest.mark.parametrize(
    "changes",
    [
        *({"bytes": wrong} for wrong in (2**63, 10**4000, -1, 2.0, True, "2", None)),
        *({"sha256": wrong} for wrong in ("0" * 63, "A" * 64, 0, None)),
        {"more": 1},
    ],
)
def test_entries(checkpoint: Path, changes: dict[str, Any]) -> None:
    sign(checkpoint, files={"state.json": entry(b"{}") | changes})
    refused(checkpoint, r"field 'files\.state\.json'")


@pytest.mark.parametrize(
    "files", [None, {}, [], "state.json", {"state.json": None}, {f"{n}": {} for n in range(10_001)}]
)
def test_files(checkpoint: Path, files: Any) -> None:
    sign(checkpoint, files=files)
    refused(checkpoint, "field 'files")


@pytest.mark.parametrize("step", [None, -1, 1.0, True, "1", 10**18, [1]])
def test_steps(checkpoint: Path, step: Any) -> None:
    sign(checkpoint, step=step)
    refused(checkpoint, "field 'step'")


@pytest.mark.parametrize("number", [None, 0, -1, 1.0, True, "1", [1], 10**30])
def test_formats_that_are_none(checkpoint: Path, number: Any) -> None:
    sign(checkpoint, format=number)
    refused(checkpoint, "field 'format'")


def test_a_future_format_is_refused_by_name(checkpoint: Path) -> None:
    sign(checkpoint, format=FORMAT + 1)
    refused(checkpoint, f"field 'format': {FORMAT + 1} is from a newer etude .* pip install -U etude")


def test_a_size_that_is_believed_would_be_allocated(checkpoint: Path) -> None:
    """A file of a tebibyte (sparse) that the manifest lists with its true size is only streamed, and first compared."""
    with open(checkpoint / "state.json", "wb") as file:
        file.truncate(1 << 40)
    refused(checkpoint, "1,099,511,627,776 bytes, the manifest says 2", file="state.json")


BOMBS = {
    "deep lists": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 100_000,
    "deep and closed": b"[" * 65 + b"]" * 65,
    "NaN": b'{"a": NaN}',
    "infinity": b'{"a": -Infinity}',
    "infinity by exponent": b'{"a": 1e999}',
    "an integer of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "duplicate key": b'{"a": 1, "b": {"c": 1, "c": 2}}',
    "not UTF-8": b'{"a": "\xff"}',
    "UTF-16": '{"a": 1}'.encode("utf-16"),
    "byte order mark": b"\xef\xbb\xbf{}",
    "nothing": b"",
    "half": b'{"a": ',
    "two values": b"{} {}",
    "many unterminated strings": b'"\\' * 500_000,
    "a raw NUL": b'{"a": "\0"}',
    "pickle": pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_json_bombs(checkpoint: Path, bomb: str) -> None:
    (checkpoint / "MANIFEST.json").write_bytes(BOMBS[bomb])
    refused(checkpoint, "holds too much" if bomb == "deep lists" else "is not valid JSON")
    with pytest.raises(CheckpointError, match=r"MANIFEST\.json: (is not valid JSON|holds too much)"):
        read_json_strict(checkpoint / "MANIFEST.json", 1 << 20)


def test_depth_is_counted_outside_of_strings(tmp_path: Path) -> None:
    value = {"a": "[" * 100 + '\\"{' * 100, "b": [[]] * 1000}
    (tmp_path / "deep.json").write_text(json.dumps(value))
    assert read_json_strict(tmp_path / "deep.json", 1 << 20) == value


def test_json_of_a_tebibyte_is_not_read(checkpoint: Path) -> None:
    with open(checkpoint / "MANIFEST.json", "r+b") as file:
        file.truncate(1 << 40)
    refused(checkpoint, "1,099,511,627,776 bytes, at most")


def test_json_size_is_bounded_exactly(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"[1,2]")
    assert read_json_strict(path, 5) == [1, 2]
    with pytest.raises(CheckpointError, match="has 5 bytes, at most 4 are read"):
        read_json_strict(path, 4)


@pytest.mark.parametrize("name", ["MANIFEST.json", "state.json", "sub/data.bin", "optimizer.pt", "rng_state.pth"])
def test_a_pickle_is_never_opened(checkpoint: Path, name: str) -> None:
    """Whether listed or not, damaged or signed: verifying and reading never run it."""
    canary = checkpoint.parents[1] / "canary"
    raw = pickle.dumps(Canary(canary))
    (checkpoint / name).write_bytes(raw)
    store = CheckpointStore(checkpoint.parent)
    store.newest_valid()
    if name != "MANIFEST.json":
        sign(checkpoint, files={name: entry(raw)})
        assert store.verify(checkpoint)
    for read in (read_safetensors_checked, lambda path: read_json_strict(path, 1 << 20)):
        with pytest.raises(CheckpointError, match=name):
            read(checkpoint / name)
    assert not canary.exists()
    pickle.loads(raw)
    assert canary.exists()  # it would have worked


def tensors_file(path: Path, header: bytes, data: bytes = b"", *, claim: int | None = None) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if claim is None else claim) + header + data)
    return path


def header_of(**tensors: tuple[str, list[int], int, int]) -> bytes:
    names = ("dtype", "shape", "data_offsets")
    return json.dumps(
        {k: dict(zip(names, (d, s, [a, b]), strict=True)) for k, (d, s, a, b) in tensors.items()}
    ).encode()


HOSTILE_TENSORS: dict[str, Callable[[Path], Path]] = {
    "header of 2^63 bytes": lambda p: tensors_file(p, b"{}", claim=2**63),
    "header past the end": lambda p: tensors_file(p, b"{}", claim=3),
    "header of 17 MB": lambda p: tensors_file(p, b"{" + b" " * (17 << 20) + b"}"),
    "100,001 tensors": lambda p: tensors_file(
        p, header_of(**{f"t{n}": ("F32", [0], 0, 0) for n in range(100_001)})
    ),
    "duplicate tensor": lambda p: tensors_file(
        p, b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"0000"
    ),
    "no header": lambda p: tensors_file(p, b""),
    "seven bytes": lambda p: p.write_bytes(b"1234567") and p,
    "header is a list": lambda p: tensors_file(p, b"[]"),
    "header is deep": lambda p: tensors_file(p, b"[" * 1000),
    "overlap": lambda p: tensors_file(p, header_of(a=("F32", [1], 0, 4), b=("F32", [1], 2, 6)), b"000000"),
    "past the end": lambda p: tensors_file(p, header_of(a=("F32", [1], 0, 4)), b"00"),
    "trailing bytes": lambda p: tensors_file(p, header_of(a=("F32", [1], 0, 4)), b"00000000"),
    "shape that overflows": lambda p: tensors_file(p, header_of(a=("F32", [2**62, 2**62], 0, 4)), b"0000"),
    "shape that lies": lambda p: tensors_file(p, header_of(a=("F32", [2], 0, 4)), b"0000"),
    "negative shape": lambda p: tensors_file(p, header_of(a=("F32", [-1], 0, 4)), b"0000"),
    "unknown type": lambda p: tensors_file(p, header_of(a=("PICKLE", [1], 0, 4)), b"0000"),
    "type that lies": lambda p: tensors_file(p, header_of(a=("F64", [1], 0, 4)), b"0000"),
}  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE_TENSORS)
def test_hostile_tensors(tmp_path: Path, attack: str) -> None:
    path = HOSTILE_TENSORS[attack](tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"a\.safetensors: "):
        read_safetensors_checked(path)


def test_sound_tensors_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    wanted = {"w": numpy.arange(6, dtype=numpy.float32).reshape(2, 3), "empty": numpy.zeros((0, 4), numpy.int64)}
    save_file(wanted, path, metadata={"format": "pt"})
    tensors = read_safetensors_checked(path)
    assert {name: tensor.numpy().tolist() for name, tensor in tensors.items()} == {
        name: array.tolist() for name, array in wanted.items()
    }
    with pytest.raises(CheckpointError, match="holds 2 tensors, at most 1 are read"):
        read_safetensors_checked(path, max_tensors=1)


def test_a_linked_tensor_file_is_not_read(tmp_path: Path) -> None:
    save_file({"w": numpy.zeros(1)}, tmp_path / "real")
    (tmp_path / "link").symlink_to("real")
    with pytest.raises(CheckpointError, match="symbolic link"):
        read_safetensors_checked(tmp_path / "link")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
sensible_names = st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=8), min_size=1, max_size=3).map(
    "/".join
)


def accepted(name: str) -> bool:
    try:
        check_names([name], shown=Path("checkpoint-1"))
    except CheckpointError:
        return False
    return True


@settings(deadline=None)
@given(extra=st.dictionaries(st.text(), json_values, max_size=4), names=st.sets(sensible_names, min_size=1, max_size=4))
def test_what_is_encoded_is_read_back(extra: dict[str, Any], names: set[str]) -> None:
    extra = {f"x{key}": value for key, value in extra.items()}
    files = {name: entry(name.encode()) for name in names if accepted(name) and name.casefold() != "manifest.json"}
    document = {"format": FORMAT, "step": 3, "files": files, **extra}
    try:
        manifest = parse_manifest(encode_manifest(document), shown=Path("checkpoint-3"))
    except CheckpointError as error:
        assert "the same file" in str(error) or not files
    else:
        assert {key: value for key, value in manifest.items() if key != "digest"} == document


@settings(deadline=None)
@given(name=st.text(st.characters(codec="utf-8"), max_size=30) | st.text("./\\a:\0", max_size=12))
def test_an_accepted_name_stays_inside(name: str) -> None:
    root = "/root/of/checkpoint"
    if accepted(name):
        path = os.path.normpath(os.path.join(root, name))  # noqa: PTH118
        assert path == f"{root}/{name}"  # nothing to normalise: one spelling, strictly below


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=200)
@given(data=st.data())
def test_random_bytes_are_refused_by_name(checkpoint: Path, data: st.DataObject) -> None:
    """Any edit of a manifest is a CheckpointError that names it, never another exception."""
    path = checkpoint / "MANIFEST.json"
    backup = checkpoint.parents[1] / "manifest"
    if not backup.exists():
        backup.write_bytes(path.read_bytes())
    sound = backup.read_bytes()
    start = data.draw(st.integers(0, len(sound)))
    end = data.draw(st.integers(start, min(len(sound), start + 8)))
    path.write_bytes(sound[:start] + data.draw(st.binary(max_size=8)) + sound[end:])
    if path.read_bytes() != sound:
        with pytest.raises(CheckpointError, match=r"MANIFEST\.json: "):
            CheckpointStore(checkpoint.parent).verify(checkpoint)


@pytest.mark.nightly
@settings(deadline=None, max_examples=10_000)
@given(
    header=st.binary(max_size=64) | json_values.map(lambda value: json.dumps(value).encode()),
    data=st.binary(max_size=64),
)
def test_fuzzed_tensors(tmp_path_factory: pytest.TempPathFactory, header: bytes, data: bytes) -> None:
    path = tensors_file(tmp_path_factory.getbasetemp() / "fuzz.safetensors", header, data)
    try:
        read_safetensors_checked(path)
    except CheckpointError as error:
        assert str(error).startswith(f"{path}: ")
