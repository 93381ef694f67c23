"""MANIFEST.json: what makes a folder a complete checkpoint.

    {"format": 1, "step": 9, "files": {"state.json": {"bytes": 812, "sha256": "..."}}, ..., "digest": "..."}

It is written last. `digest` is the sha256 of the document without it, and the bytes on disk must be exactly those that
encoding the document gives: a single changed bit anywhere is noticed. Files that the manifest does not list are nobody's
business here: hooks may add some to a checkpoint at any time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from etude.checkpoint.reading import opened_file, parse_json_strict, read_bounded, sha256_of
from etude.errors import CheckpointError

MANIFEST = "MANIFEST.json"
FORMAT = 1
MAX_MANIFEST_BYTES = 16 << 20
MAX_FILES = 10_000
MAX_FILE_BYTES = 1 << 50
MAX_STEP = 10**18 - 1
MAX_NAME_LENGTH = 1024
RESERVED_KEYS = ("format", "step", "files", "digest")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_DRIVE = re.compile(r"[A-Za-z]:")
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")


def encode_manifest(document: Mapping[str, Any]) -> bytes:
    """The bytes of MANIFEST.json for a document without its `digest`, which is added as the last key."""
    bare = json.dumps(document, allow_nan=False, separators=(",", ":")).encode()
    signed = {**document, "digest": hashlib.sha256(bare).hexdigest()}
    return json.dumps(signed, allow_nan=False, indent=1).encode() + b"\n"


def read_manifest(folder: int, *, shown: Path) -> dict[str, Any]:
    """The manifest of the checkpoint open as `folder`, checked in itself (`check_files` compares it with the files).

    Raises:
        CheckpointError: there is none, it is damaged, it is from a newer etude, or its contents make no sense.
    """
    shown = shown / MANIFEST
    if not _has_manifest(folder):
        raise CheckpointError(
            "is missing: this is no complete checkpoint of etude "
            "(one of transformers.Trainer is taken over by `etude import-checkpoint`)",
            path=shown,
        )
    with opened_file(MANIFEST, folder=folder, shown=shown) as file:
        raw = read_bounded(file, MAX_MANIFEST_BYTES, shown=shown)
    return parse_manifest(raw, shown=shown)


def parse_manifest(raw: bytes, *, shown: Path) -> dict[str, Any]:
    """The manifest in `raw`, with its `digest`.

    Raises:
        CheckpointError: `raw` is not exactly what `encode_manifest` writes for a sensible document.
    """
    manifest = parse_json_strict(raw, shown=shown)
    if not isinstance(manifest, dict):
        raise CheckpointError("is not a JSON object", path=shown)
    _check_format(manifest.get("format"), shown)
    document = {key: value for key, value in manifest.items() if key != "digest"}
    if encode_manifest(document) != raw:
        raise CheckpointError("does not match its own digest: it was changed or damaged", path=shown)
    if not _is_count(manifest.get("step"), MAX_STEP):
        raise CheckpointError(f"field 'step': {manifest.get('step')!r} is not a step", path=shown)
    _check_entries(manifest.get("files"), shown)
    return manifest


def check_files(folder: int, manifest: Mapping[str, Any], *, digests: bool, shown: Path) -> None:
    """Compare every file that the manifest lists with what lies in the checkpoint open as `folder`.

    Raises:
        CheckpointError: naming the first file that is missing, of another size or (with `digests`) changed.
    """
    for name, entry in manifest["files"].items():
        path = shown / name
        with opened_file(name, folder=folder, shown=path) as file:
            num_bytes, wanted = os.fstat(file).st_size, entry["bytes"]
            if num_bytes != wanted:
                raise CheckpointError(f"has {num_bytes:,} bytes, the manifest says {wanted:,}", path=path)
            if digests and sha256_of(file)[1] != entry["sha256"]:
                raise CheckpointError("sha256 mismatch: it was changed or damaged after it was written", path=path)


def check_names(names: Iterable[str], *, shown: Path) -> None:
    """Refuse names that are not plain relative components, or that are one file on some file systems and two on others.

    Raises:
        CheckpointError: naming the offending name.
    """
    seen: dict[str, str] = {}
    for name in names:
        if problem := _problem_of_name(name):
            raise CheckpointError(f"file name {name!r}: {problem}", path=shown)
        folded = unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())
        if folded in seen:
            raise CheckpointError(
                f"file names {seen[folded]!r} and {name!r} are the same file where case does not count", path=shown
            )
        seen[folded] = name


def _has_manifest(folder: int) -> bool:
    try:
        os.stat(MANIFEST, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # opening it says what is wrong
    return True


def _problem_of_name(name: str) -> str | None:
    if not 0 < len(name) <= MAX_NAME_LENGTH:
        return f"must have 1 to {MAX_NAME_LENGTH} characters"
    if name.startswith("/") or _DRIVE.match(name):
        return "must be relative to the checkpoint"
    if any(component in ("", ".", "..") for component in name.split("/")):
        return "must not have empty, '.' or '..' components"
    if _CONTROL.search(name):
        return "must not have backslashes or control characters"
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return "cannot be a file name"
    return None


def _check_format(number: Any, shown: Path) -> None:
    if not _is_count(number, MAX_STEP) or number < 1:
        raise CheckpointError(f"field 'format': {number!r} is not a format number", path=shown)
    if number > FORMAT:
        raise CheckpointError(
            f"field 'format': {number} is from a newer etude (this one reads up to {FORMAT}): pip install -U etude",
            path=shown,
        )


def _check_entries(files: Any, shown: Path) -> None:
    if not isinstance(files, dict) or not 0 < len(files) <= MAX_FILES:
        raise CheckpointError(f"field 'files': must list 1 to {MAX_FILES:,} files", path=shown)
    check_names(files, shown=shown)
    for name, entry in files.items():
        where = f"field 'files.{name}'"
        if name.casefold() == MANIFEST.casefold():
            raise CheckpointError(f"{where}: the manifest cannot list itself", path=shown)
        if not isinstance(entry, dict) or entry.keys() != {"bytes", "sha256"}:
            raise CheckpointError(f"{where}: must have 'bytes' and 'sha256'", path=shown)
        if not _is_count(entry["bytes"], MAX_FILE_BYTES):
            raise CheckpointError(f"{where}: {entry['bytes']!r} is not a number of bytes", path=shown)
        if not isinstance(entry["sha256"], str) or not _SHA256.fullmatch(entry["sha256"]):
            raise CheckpointError(f"{where}: not a sha256", path=shown)


def _is_count(number: Any, largest: int) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and 0 <= number <= largest
