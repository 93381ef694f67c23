"""Checkpoints of `transformers.Trainer` made into ours, on request.

Their optimizer, schedule and random state are pickles. They are opened here and nowhere else, with `weights_only=True`,
which builds tensors and plain containers and calls nothing. What the original does not record (the base model, the data,
the arguments, the cut) is not recorded in the import either, so it cannot be compared when the run goes on.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from etude.checkpoint.codec import STATE_TENSORS_PER_PARAMETER, save_tree
from etude.checkpoint.draft import Checkpoint
from etude.checkpoint.manifest import MANIFEST
from etude.checkpoint.reading import MAX_TENSORS, read_json_strict
from etude.checkpoint.resume import PROGRESS, TRAINER_STATE, read_trainer_state
from etude.checkpoint.store import CheckpointStore
from etude.errors import CheckpointError


def import_checkpoint(folder: str | Path, output_dir: str | Path | None = None) -> Checkpoint:
    """Take over a checkpoint of `transformers.Trainer`; its files are kept, so that it still is one of theirs too.

    Args:
        folder: the checkpoint (`.../checkpoint-500`), or an output folder, of which the newest is taken.
        output_dir: where the checkpoint goes; by default it replaces the original, in one rename.

    Raises:
        CheckpointError: it is none of theirs, is not complete, or was written by several processes.
    """
    source = _newest_in(Path(folder))
    if (source / MANIFEST).exists():
        raise CheckpointError("was written by etude; resume_from_checkpoint takes it as it is", path=source)
    state = _read_state(source)
    step = int(state["global_step"])
    optimizer, schedule = _load(source / "optimizer.pt"), _load(source / "scheduler.pt")
    randomness, scaler = _load_random_state(source), _load_if_there(source / "scaler.pt")
    store = CheckpointStore(output_dir if output_dir is not None else source.parent)
    with store.lock(), store.begin(step) as draft:
        with draft.failures_named():
            shutil.copytree(source, draft.path, dirs_exist_ok=True)
        numbered = _numbered(optimizer, source)
        save_tree(draft.path, "optimizer", numbered, MAX_TENSORS + STATE_TENSORS_PER_PARAMETER * len(numbered["state"]))
        save_tree(draft.path, "scheduler", schedule)
        save_tree(draft.path, "scaler", scaler)
        save_tree(draft.path, "rng", randomness)
        save_tree(draft.path, PROGRESS, _progress(state, _adapters(source)))
        return draft.commit(step=step, extra={"imported_from": "transformers"})


def _newest_in(folder: Path) -> Path:
    if (folder / TRAINER_STATE).is_file():
        return folder
    inside = CheckpointStore(folder).committed() if folder.is_dir() else []
    complete = [each.path for each in inside if (each.path / TRAINER_STATE).is_file()]
    if not complete:
        raise CheckpointError(f"is no checkpoint of transformers.Trainer: it has no {TRAINER_STATE}", path=folder)
    return complete[-1]


def _read_state(source: Path) -> dict[str, Any]:
    state = read_trainer_state(source / TRAINER_STATE)
    if not isinstance(state, dict) or not isinstance(state.get("global_step"), int):
        raise CheckpointError("is not the state of a trainer", path=source / TRAINER_STATE)
    return state


def _load(file: Path) -> Any:
    if not file.is_file():
        raise CheckpointError(
            "is missing: training cannot go on without it (a run with save_only_model=True does not write it)",
            path=file,
        )
    try:
        with torch.serialization.safe_globals(_number_types()):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch names neither the classes of its own errors nor those of a broken archive
        raise CheckpointError(
            f"cannot be read as plain tensors and numbers: {_first_line(error)}", path=file
        ) from error


def _load_if_there(file: Path) -> Any:
    return _load(file) if file.is_file() else {}


def _number_types() -> list[Any]:
    """What the state of NumPy's generator is made of: arrays of numbers, which call nothing when they are built."""
    kinds = {type(np.dtype(name)) for name in ("uint32", "uint64", "int64", "float64")}
    return [np._core.multiarray._reconstruct, np.ndarray, np.dtype, *kinds]  # type: ignore[attr-defined]


def _load_random_state(source: Path) -> dict[str, Any]:
    """In the form of `codec.random_tree`.

    Raises:
        CheckpointError: it is that of several processes.
    """
    if not (source / "rng_state.pth").is_file() and list(source.glob("rng_state_*.pth")):
        raise CheckpointError(
            "was written by several processes, whose data order was another one; only the adapter can be used",
            path=source,
        )
    states = _load(source / "rng_state.pth")
    name, keys, *rest = states["numpy"]
    tree = {
        "python": states["python"],
        "numpy": (name, np.asarray(keys).astype(np.int64), *rest),
        "torch": states["cpu"],
    }
    if "cuda" in states:
        tree["cuda"] = states["cuda"] if isinstance(states["cuda"], list) else [states["cuda"]]
    return tree


def _numbered(optimizer: Any, source: Path) -> dict[str, Any]:
    """In the form of `codec.optimizer_tree`, but with the numbers of parameters: their names are not recorded."""
    if not isinstance(optimizer, dict) or not {"state", "param_groups"} <= optimizer.keys():
        raise CheckpointError("is not the state of an optimizer", path=source / "optimizer.pt")
    groups = [
        {key: value for key, value in group.items() if key != "param_names"} for group in optimizer["param_groups"]
    ]
    extra = {key: value for key, value in optimizer.items() if key not in ("state", "param_groups")}
    return {"state": optimizer["state"], "param_groups": groups, "extra": extra}


def _adapters(source: Path) -> dict[str, Any] | None:
    """Adapter name -> its settings; None for a model without adapters."""
    files = [source / "adapter_config.json", *sorted(source.glob("*/adapter_config.json"))]
    found = {
        "default" if file.parent == source else file.parent.name: read_json_strict(file)
        for file in files
        if file.is_file()
    }
    return found or None


def _progress(state: dict[str, Any], adapters: dict[str, Any] | None) -> dict[str, Any]:
    """What `recovery.progress_of` records, as far as it can be read off the state."""
    step, epoch = int(state["global_step"]), float(state.get("epoch") or 0.0)
    losses = [(entry["step"], entry["loss"]) for entry in state.get("log_history", []) if "loss" in entry]
    total, before = 0.0, 0
    for logged_at, mean_loss in losses:
        total, before = total + mean_loss * (logged_at - before), logged_at
    rates = [entry["learning_rate"] for entry in state.get("log_history", []) if "learning_rate" in entry]
    return {
        "position": {
            "epoch": int(epoch),
            "batches_done": None,
            "share_of_epoch": epoch - int(epoch),
            "samples_per_batch": state.get("train_batch_size"),
            "epoch_ended": False,
            "stream_state": None,
        },
        "pending": {},
        "learning_rate": rates[-1] if rates else None,
        "grad_norm": None,
        "loss_since_log": 0.0,
        "loss_total": total,
        "step_last_logged": step,
        "cut": {},
        "run": {} if adapters is None else {"adapters": adapters},
    }


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
