"""Hooks for scripts: showing and saving metrics, looking at parameter groups."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from etude.errors import ConfigError
from etude.hooks.base import Composition
from etude.model import adapter
from etude.observe import metric_files


class ReportingHooks(Composition):
    """What example scripts call after `train`, `evaluate` and `predict`."""

    def metrics_format(self, metrics: Mapping[str, float]) -> dict[str, Any]:
        """The metrics with units, for people."""
        return metric_files.readable(metrics)

    def log_metrics(self, split: str, metrics: Mapping[str, float]) -> None:
        """Print the metrics as a table, in the main process."""
        if self.is_world_process_zero():
            sys.stdout.write(metric_files.table(split, metrics) + "\n")

    def save_metrics(self, split: str, metrics: Mapping[str, float], combined: bool = True) -> None:
        """Write `<split>_results.json` into the output folder, and with `combined` add to `all_results.json`."""
        if self.is_world_process_zero():
            metric_files.save(Path(str(self.args.output_dir)), split, metrics, combined=combined)

    def save_state(self) -> None:
        """Write `trainer_state.json` into the output folder."""
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir))
            folder.mkdir(parents=True, exist_ok=True)
            self.state.save_to_json(folder / "trainer_state.json")

    def get_learning_rates(self) -> list[float]:
        """The learning rate of each parameter group."""
        return [group["lr"] for group in self._require_optimizer().param_groups]

    def get_num_trainable_parameters(self) -> int:
        return adapter.count_parameters(self.model)[0]

    def get_optimizer_group(self, param: str | torch.nn.Parameter | None = None) -> Any:
        """The parameter group that holds `param` (the parameter or its name); without one the parameters of all groups."""
        optimizer = self._require_optimizer()
        if isinstance(param, str):
            param = self.model.get_parameter(param)
        if param is not None:
            for group in optimizer.param_groups:
                if any(member is param for member in group["params"]):
                    return group
        return [group["params"] for group in optimizer.param_groups]

    def _require_optimizer(self) -> torch.optim.Optimizer:
        if self.optimizer is None:
            raise ConfigError("there is none yet: call create_optimizer() or train() first", field="optimizer")
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer
