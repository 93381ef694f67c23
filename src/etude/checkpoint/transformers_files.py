"""The way back: files that `transformers.Trainer` resumes from, written beside ours. etude itself never opens them."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


def write_optimizer_and_scheduler(folder: Path, optimizer: Any, lr_scheduler: Any) -> None:
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(lr_scheduler.state_dict(), folder / "scheduler.pt")


def write_scaler(folder: Path, scaler_state: dict[str, Any]) -> None:
    state = {key: value for key, value in scaler_state.items() if key != "skipped_steps"}
    if state:
        torch.save(state, folder / "scaler.pt")


def write_random_state(folder: Path) -> None:
    states: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "cpu": torch.random.get_rng_state(),
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.random.get_rng_state()
    torch.save(states, folder / "rng_state.pth")


def write_arguments(folder: Path, args: Any) -> None:
    """`training_args.bin`, which tools look for; it holds the plain settings, not an object of ours."""
    torch.save(args.to_dict(), folder / "training_args.bin")
