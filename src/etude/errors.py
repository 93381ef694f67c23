"""Every exception of etude.

Each one names the thing that is wrong (a file, a row, a field, a step) and the way out. User-facing errors also derive
from the built-in type that scripts written for `transformers.Trainer` already catch (`ValueError`, `TypeError`, ...).
"""

from __future__ import annotations

from pathlib import Path


class EtudeError(Exception):
    """Base of all errors raised on purpose by etude."""


class ConfigError(EtudeError, ValueError):
    """A setting is wrong. `field` names it, as the user writes it (`learning_rate`, `lora.r`, `--data`)."""

    def __init__(self, message: str, *, field: str | None = None) -> None:
        self.field = field
        super().__init__(f"{field}: {message}" if field else message)


class UnknownArgumentError(ConfigError, TypeError):
    """An argument that does not exist; the message suggests the nearest name."""


class NotAnInstanceError(ConfigError, NotImplementedError):
    """A class was given where one of its instances is meant."""


class DataError(EtudeError, ValueError):
    """A row or a file of data is wrong: `train.jsonl:500 field 'completion': expected string, got null`."""

    def __init__(
        self, message: str, *, file: str | Path | None = None, line: int | None = None, field: str | None = None
    ) -> None:
        self.file, self.line, self.field = (str(file) if file is not None else None), line, field
        where = "" if self.file is None else (self.file if line is None else f"{self.file}:{line}")
        what = f"field '{field}'" if field else ""
        prefix = " ".join(part for part in (where, what) if part)
        super().__init__(f"{prefix}: {message}" if prefix else message)


class ModelError(EtudeError, ValueError):
    """The model or its adapter cannot be trained as given."""


class CheckpointError(EtudeError, ValueError):
    """A checkpoint cannot be written or read. `path` is the file or folder at fault, `step` its optimizer step."""

    def __init__(self, message: str, *, path: str | Path | None = None, step: int | None = None) -> None:
        self.path, self.step = (str(path) if path is not None else None), step
        super().__init__(f"{self.path}: {message}" if self.path else message)


class NonFiniteError(EtudeError, FloatingPointError):
    """A loss or gradient norm is NaN or infinite; raised before the update. `rows` are the samples of the step."""

    def __init__(self, message: str, *, step: int, micro_batch: int | None = None, rows: str | None = None) -> None:
        self.step, self.micro_batch, self.rows = step, micro_batch, rows
        where = f"step {step}" + (f", micro-batch {micro_batch}" if micro_batch is not None else "")
        where += f", rows {rows}" if rows else ""
        super().__init__(f"{where}: {message}")


class MissingDependencyError(EtudeError, ImportError):
    """An optional package is not installed; the message gives the `pip install` command."""


class Interrupted(SystemExit):
    """Training was stopped by a signal after its checkpoint was written.

    A script that does not catch it exits with `exit_code`, 128 + the signal's number, so that a scheduler can tell a
    stopped run from a finished one.
    """

    def __init__(self, message: str, *, exit_code: int, step: int) -> None:
        super().__init__(exit_code)
        self.message, self.exit_code, self.step = message, exit_code, step

    def __str__(self) -> str:
        return self.message


def require(package: str, *, purpose: str, install: str | None = None) -> object:
    """Import an optional package, or say what to install.

    Raises:
        MissingDependencyError: with the `pip install` command.
    """
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        command = install or f"pip install {package.split('.')[0]}"
        raise MissingDependencyError(f"{purpose} needs the package '{package.split('.')[0]}': {command}") from error


def nearest(name: str, known: list[str] | tuple[str, ...]) -> str | None:
    """The known name closest to `name`, or None where nothing is near."""
    import difflib

    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return matches[0] if matches else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` means that the device, or the host, has no more memory."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text or "not enough memory" in text
    )
