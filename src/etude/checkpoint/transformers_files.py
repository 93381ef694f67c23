"""The way back: files that `transformers.Trainer` resumes from, written beside ours. etude itself never opens them."""

from __future__ import annotations

import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from etude.checkpoint.copies import on_host


def write_optimizer_and_scheduler(folder: Path, optimizer_state: Any, schedule: Any) -> None:
    """Tensors are written as ones of the host: they can be read where there is no such GPU."""
    _write(on_host(optimizer_state), folder / "optimizer.pt")
    _write(schedule, folder / "scheduler.pt")


def _write(content: Any, file: Path) -> None:
    """Through memory: on a full disk `torch.save` to a path raises an error that does not say so."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    file.write_bytes(buffer.getbuffer())


def write_scaler(folder: Path, scaler_state: dict[str, Any]) -> None:
    state = {key: value for key, value in scaler_state.items() if key != "skipped_steps"}
    if state:
        _write(state, folder / "scaler.pt")


def random_states() -> dict[str, Any]:
    """The states of the global generators as `transformers` names them."""
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.random.get_rng_state()
    return states


def write_random_states(folder: Path, states: dict[str, Any]) -> None:
    _write(states, folder / "rng_state.pth")


def write_arguments(folder: Path, settings: dict[str, Any]) -> None:
    """`training_args.bin`, which tools look for; it holds the plain settings, not an object of ours."""
    _write(settings, folder / "training_args.bin")
