"""The logs as TensorBoard curves: `train/loss`, `eval/loss`, one point per log."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from etude.errors import require

logger = logging.getLogger(__name__)


class TensorBoardCallback:
    """Writes the logs of the main process as event files.

    They go to `args.logging_dir`, else to the folder that the environment variable TENSORBOARD_LOGGING_DIR names, else to
    a new folder in `<output_dir>/runs`.

    Args:
        tb_writer: a `SummaryWriter` to use instead of one of our own.

    Raises:
        MissingDependencyError: tensorboard is not installed.
    """

    def __init__(self, tb_writer: Any = None) -> None:
        if tb_writer is None:
            require("tensorboard", purpose="report_to='tensorboard'")
        self.tb_writer = tb_writer
        self._folder: Path | None = None
        self._left_out: set[str] = set()

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero:
            return
        self._folder = event_folder(args, state)
        writer = self._writer(args, state)
        for title, described in (("args", args), ("model_config", getattr(model, "config", None))):
            to_json = getattr(described, "to_json_string", None)
            if to_json is not None:
                writer.add_text(title, to_json())

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        writer = self._writer(args, state)
        for name, value in logs.items():
            if isinstance(value, (int, float)):
                writer.add_scalar(tag(name), value, state.global_step)
            elif isinstance(value, str):
                writer.add_text(tag(name), value, state.global_step)
            elif name not in self._left_out:
                self._left_out.add(name)
                logger.warning("TensorBoard cannot show '%s' of type %s", name, type(value).__name__)
        writer.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.tb_writer is not None:
            self.tb_writer.close()
            self.tb_writer = None

    def _writer(self, args: Any, state: Any) -> Any:
        if self.tb_writer is None:
            from torch.utils.tensorboard import SummaryWriter

            # An evaluation after training goes on in the folder of that training.
            self._folder = self._folder or event_folder(args, state)
            # Points after the step that a run resumes from are hidden: they will be written again.
            resumed = state.global_step + 1 if state.global_step else None
            self.tb_writer = SummaryWriter(str(self._folder), purge_step=resumed)
        return self.tb_writer


def event_folder(args: Any, state: Any) -> Path:
    """Where the event files of this run go. Each trial of a hyper-parameter search has a folder of its own."""
    chosen = getattr(args, "logging_dir", None) or os.environ.get("TENSORBOARD_LOGGING_DIR")
    if chosen:
        folder = Path(chosen).expanduser()
    else:
        folder = Path(args.output_dir) / "runs"
        if state.trial_name is None:
            folder /= f"{datetime.now():%b%d_%H-%M-%S}_{socket.gethostname()}"
    return folder / state.trial_name if state.trial_name is not None else folder


def tag(name: str) -> str:
    """`eval_loss` -> `eval/loss`, `test_f1` -> `test/f1`, `loss` -> `train/loss`."""
    prefix, underscore, rest = name.partition("_")
    return f"{prefix}/{rest}" if underscore and prefix in ("eval", "test") else f"train/{name}"
