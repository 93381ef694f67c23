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
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from etude.errors import CheckpointError

if TYPE_CHECKING:
    import torch

CHUNK_BYTES = 1 << 20
MAX_JSON_DEPTH = 64
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000  # a safetensors header with 1,000,000 empty tensors takes 19 s to parse

# A whole string (possessive, so that an unterminated one costs linear time) or one bracket.
_JSON_TOKENS = re.compile(r'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)


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
    parts, missing = [], max_bytes + 1
    while missing > 0 and (part := os.read(file, min(missing, CHUNK_BYTES))):
        parts.append(part)
        missing -= len(part)
    if missing <= 0:
        raise CheckpointError(f"grew past {max_bytes:,} bytes while it was read", path=shown)
    return b"".join(parts)


def parse_json_strict(raw: bytes, *, shown: Path) -> Any:
    """The JSON value in `raw`. Stricter than the standard library: no duplicate keys, no NaN or infinity (also not as
    1e999), no nesting deeper than `MAX_JSON_DEPTH`, no integers of thousands of digits, UTF-8 only.

    Raises:
        CheckpointError: anything else.
    """
    try:
        text = raw.decode("utf-8")
        _bound_depth(text)
        return json.loads(
            text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant, parse_float=_finite_float
        )
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"is not valid JSON: {error}", path=shown) from error


def read_json_strict(path: str | Path, max_bytes: int) -> Any:
    """The JSON value in the regular file `path` of at most `max_bytes` bytes, read by the rules of `parse_json_strict`.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    path = Path(path)
    with opened_folder(path.parent) as folder, opened_file(path.name, folder=folder, shown=path) as file:
        raw = read_bounded(file, max_bytes, shown=path)
    return parse_json_strict(raw, shown=path)


def read_safetensors_checked(
    path: str | Path, max_header_bytes: int = MAX_HEADER_BYTES, max_tensors: int = MAX_TENSORS
) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, by name, on the CPU.

    The library rejects headers that lie about offsets, shapes or types; the number of tensors and the size of the header
    are bounded here first, because it spends minutes on large ones.

    Raises:
        CheckpointError: naming the file and what is wrong with it.
    """
    path = Path(path)
    with opened_folder(path.parent) as folder, opened_file(path.name, folder=folder, shown=path) as file:
        _check_safetensors_header(file, max_header_bytes, max_tensors, shown=path)
    # Here, so that the store, which commits and verifies without tensors, does not need torch.
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"is not a valid safetensors file: {error}", path=path) from error
    return tensors


def _check_safetensors_header(file: int, max_header_bytes: int, max_tensors: int, *, shown: Path) -> None:
    num_bytes = os.fstat(file).st_size
    length = os.read(file, 8)
    if len(length) < 8:
        raise CheckpointError(f"has {num_bytes} bytes: too short for a safetensors file", path=shown)
    header_bytes = int.from_bytes(length, "little")
    if header_bytes > min(max_header_bytes, num_bytes - 8):
        raise CheckpointError(
            f"says its header has {header_bytes:,} bytes; the file has {num_bytes:,} and at most {max_header_bytes:,} "
            "are read",
            path=shown,
        )
    raw = b""
    while len(raw) < header_bytes and (part := os.read(file, header_bytes - len(raw))):
        raw += part
    header = parse_json_strict(raw, shown=shown)
    if not isinstance(header, dict):
        raise CheckpointError("its header is not a JSON object", path=shown)
    if len(header) > max_tensors:
        raise CheckpointError(f"holds {len(header):,} tensors, at most {max_tensors:,} are read", path=shown)


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
