"""Hooks around the optimizer and the schedule."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from etude.arguments import TrainingArguments
from etude.hooks.base import Composition, is_overridden
from etude.model import adapter
from etude.optim import create_optimizer, create_scheduler, decay_parameter_names, optimizer_class_and_kwargs


class OptimizationHooks(Composition):
    """Which optimizer moves which parameters, and at which rate."""

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        if not self._given_scheduler:
            self.lr_scheduler = None
        if not self._given_optimizer:
            self.optimizer = None
        self.create_optimizer()
        self.create_scheduler(num_training_steps=num_training_steps)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            model = self.model if model is None else model
            given = self.optimizer_cls_and_kwargs
            if given is None and is_overridden(self, "get_optimizer_cls_and_kwargs"):
                given = self.get_optimizer_cls_and_kwargs(self.args, model)
            self.optimizer = create_optimizer(model, self.args, given, self.get_decay_parameter_names(model))
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> Any:
        if self.lr_scheduler is None:
            self.lr_scheduler = create_scheduler(
                self.args.lr_scheduler_type,
                self.optimizer if optimizer is None else optimizer,
                self.args.get_warmup_steps(num_training_steps),
                num_training_steps,
                cast(dict[str, Any] | None, self.args.lr_scheduler_kwargs),
            )
        return self.lr_scheduler

    @staticmethod
    def get_optimizer_cls_and_kwargs(args: TrainingArguments, model: nn.Module | None = None) -> tuple[Any, Any]:
        return optimizer_class_and_kwargs(args)

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return decay_parameter_names(model)

    def get_learning_rates(self) -> list[float]:
        return [group["lr"] for group in self.optimizer.param_groups]

    def get_num_trainable_parameters(self) -> int:
        return adapter.count_parameters(self.model)[0]

    def _get_learning_rate(self) -> float:
        """The learning rate in force: that of the first parameter group."""
        rate = self.optimizer.param_groups[0]["lr"]
        return float(rate)
