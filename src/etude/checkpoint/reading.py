"""Reading what may be damaged or hostile: every size is checked before memory is asked for, nothing is executed.

A checkpoint travels between machines and people, so its files are input, not state. Folders are walked by descriptor and
no symbolic link is ever followed below the folder the caller named.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from etude.errors import CheckpointError

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 1 << 20
MAX_JSON_DEPTH = 64
MAX_WIDE_BYTES = 8 << 20  # one character beyond ASCII makes four bytes of every other one in memory
MAX_TENSORS = 10_000  # of files with no number of their own; a header with 1,000,000 empty tensors takes 19 s to parse
HEADER_BYTES_PER_TENSOR = 512

# A whole string (possessive, so that an unterminated one costs linear time) or one bracket.
_JSON_TOKENS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


@dataclass(frozen=True)
class JsonLimits:
    """How much a JSON text may hold. Its size alone bounds neither time nor memory: three bytes, `{},`, are 70 of memory."""

    num_bytes: int
    values: int
    containers: int

    def problem_of(self, raw: bytes) -> str | None:
        """What is too much in `raw`, told from its bytes before anything is made of them."""
        if len(raw) > self.num_bytes:
            return f"has {len(raw):,} bytes, at most {self.num_bytes:,} are read"
        if len(raw) > MAX_WIDE_BYTES and not raw.isascii():
            return f"has {len(raw):,} bytes that are not all ASCII, at most {MAX_WIDE_BYTES:,} are read"
        if raw.count(b",") >= self.values or raw.count(b"[") + raw.count(b"{") > self.containers:
            return f"holds too much: at most {self.values:,} values and {self.containers:,} lists and objects are read"
        return None


DOCUMENT = JsonLimits(32 << 20, 500_000, 200_000)
"""A manifest or a tree of training state. At its limits, 1 s and 120 MB to read."""

LOG = JsonLimits(32 << 20, 1_000_000, 250_000)
"""A trainer state with more than 150,000 entries in its log. At its limits, 1.5 s and 210 MB to read."""


@contextmanager
def opened_folder(path: Path) -> Iterator[int]:
    """A descriptor of the folder `path`: what is read through it stays one folder, even if it is renamed meanwhile.

    Raises:
        CheckpointError: it is not there, is not a folder, or may not be read.
    """
    try:
        folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(_because(error), path=path) from error
    try:
        yield folder
    finally:
        os.close(folder)


@contextmanager
def opened_file(name: str, *, folder: int, shown: Path) -> Iterator[int]:
    """A descriptor of the regular file `name` ('a' or 'sub/a') below the open `folder`; `shown` is its path in messages.

    Raises:
        CheckpointError: it is missing, not a regular file, or reached through a symbolic link.
    """
    *parents, leaf = name.split("/")
    opened: list[int] = []
    try:
        for parent in parents:
            _require_kind(parent, folder, stat.S_ISDIR, "a folder", shown)
            folder = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=folder)
            opened.append(folder)
        _require_kind(leaf, folder, stat.S_ISREG, "a regular file", shown)
        # O_NONBLOCK: should the file turn into a FIFO between the look and the open, the open returns.
        file = os.open(leaf, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
        opened.append(file)
        yield file
    except OSError as error:
        raise CheckpointError(_because(error), path=shown) from error
    finally:
        for descriptor in reversed(opened):
            os.close(descriptor)


def sha256_of(file: int) -> tuple[int, str]:
    """(bytes, hexadecimal sha256) of an open file, from its start, 1 MiB at a time."""
    digest, num_bytes = hashlib.sha256(), 0
    os.lseek(file, 0, os.SEEK_SET)
    while chunk := os.read(file, CHUNK_BYTES):
        digest.update(chunk)
        num_bytes += len(chunk)
    return num_bytes, digest.hexdigest()


def read_bounded(file: int, max_bytes: int, *, shown: Path) -> bytes:
    """All bytes of an open file that has at most `max_bytes`.

    Raises:
        CheckpointError: it is larger; the size is looked at first, so nothing of that size is allocated.
    """
    num_bytes = os.fstat(file).st_size
    if num_bytes > max_bytes:
        raise CheckpointError(f"has {num_bytes:,} bytes, at most {max_bytes:,} are read", path=shown)
    with open(file, "rb", closefd=False) as whole:
        raw = whole.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise CheckpointError(f"grew past {max_bytes:,} bytes while it was read", path=shown)
    return raw


def parse_json_strict(raw: bytes, *, shown: Path, limits: JsonLimits = DOCUMENT) -> Any:
    """The JSON value in `raw`. Stricter than the standard library: no duplicate keys, no NaN or infinity (also not as
    1e999), no nesting deeper than `MAX_JSON_DEPTH`, no integers of thousands of digits, UTF-8 only.

    Raises:
        CheckpointError: anything else, or more than `limits` allow.
    """
    if problem := limits.problem_of(raw):
        raise CheckpointError(problem, path=shown)
    try:
        text = raw.decode("utf-8")
        _bound_depth(text)
        return json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not valid JSON: {error}", path=shown) from error


def read_json_strict(path: str | Path, max_bytes: int = DOCUMENT.num_bytes) -> Any:
    """The JSON value in the regular file `path` of at most `max_bytes` bytes, read by the rules of `parse_json_strict`.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    path = Path(path)
    with opened_folder(path.parent) as folder, opened_file(path.name, folder=folder, shown=path) as file:
        raw = read_bounded(file, max_bytes, shown=path)
    return parse_json_strict(raw, shown=path)


def read_safetensors_checked(path: str | Path, max_tensors: int = MAX_TENSORS) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, by name, on the CPU.

    The library rejects headers that lie about offsets, shapes or types; what a header may hold is bounded here first,
    because the library spends minutes on large ones.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    path = Path(path)
    with opened_folder(path.parent) as folder, opened_file(path.name, folder=folder, shown=path) as file:
        check_safetensors_header(file, max_tensors, shown=path)
    # Here, so that the store, which commits and verifies without tensors, does not need torch.
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"is not a valid safetensors file: {error}", path=path) from error
    return tensors


def check_safetensors_header(file: int, max_tensors: int, *, shown: Path) -> None:
    """Refuse an open safetensors file whose header is larger than one of `max_tensors` tensors can be.

    Raises:
        CheckpointError: naming what is too much.
    """
    num_bytes = os.fstat(file).st_size
    length = os.read(file, 8)
    if len(length) < 8:
        raise CheckpointError(f"has {num_bytes} bytes: too short for a safetensors file", path=shown)
    header_bytes, max_header_bytes = int.from_bytes(length, "little"), (max_tensors + 8) * HEADER_BYTES_PER_TENSOR
    if header_bytes > min(max_header_bytes, num_bytes - 8):
        raise CheckpointError(
            f"says its header has {header_bytes:,} bytes; the file has {num_bytes:,} and at most {max_header_bytes:,} "
            "are read",
            path=shown,
        )
    raw = os.pread(file, header_bytes, 8)
    num_tensors = raw.count(b'"data_offsets"')
    if num_tensors > max_tensors:
        raise CheckpointError(f"holds {num_tensors:,} tensors, at most {max_tensors:,} are read", path=shown)
    # Each tensor is an object with two lists and, where its shape has a few dimensions, less than a dozen values.
    limits = JsonLimits(max_header_bytes, 12 * max_tensors + 256, 3 * max_tensors + 8)
    if not isinstance(parse_json_strict(raw, shown=shown, limits=limits), dict):  # the library takes a name twice
        raise CheckpointError("its header is not a JSON object", path=shown)


def _require_kind(name: str, folder: int, is_kind: Any, wanted: str, shown: Path) -> None:
    """Look before opening: opening a device may already do something."""
    mode = os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode
    if stat.S_ISLNK(mode):
        raise CheckpointError("is or lies behind a symbolic link: put the file itself there", path=shown)
    if not is_kind(mode):
        found = "a folder" if stat.S_ISDIR(mode) else "a file" if stat.S_ISREG(mode) else "a device, pipe or socket"
        raise CheckpointError(f"is {found}, not {wanted}" if wanted != "a folder" else "is missing", path=shown)


def _because(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return "is missing"
    return f"cannot be read: {error.strerror or error}"


def _bound_depth(text: str) -> None:
    depth = 0
    for token in _JSON_TOKENS.finditer(text):
        first = token.group()[0]
        depth += (first in "[{") - (first in "]}")
        if depth > MAX_JSON_DEPTH:
            raise ValueError(f"nested deeper than {MAX_JSON_DEPTH} levels")


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen: set[str] = set()
        duplicate = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"key {duplicate!r} appears twice")
    return value


def _refuse_constant(literal: str) -> NoReturn:
    raise ValueError(f"{literal} is not a JSON number")


def _finite_float(literal: str) -> float:
    number = float(literal)
    if not math.isfinite(number):
        raise ValueError(f"{literal} is too large for a number")
    return number
