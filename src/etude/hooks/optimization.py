"""Hooks around the optimizer and the schedule."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from etude.arguments import TrainingArguments
from etude.hooks.base import Composition, is_overridden
from etude.optim import (
    clip_gradients,
    create_optimizer,
    create_scheduler,
    decay_parameter_names,
    optimizer_class_and_kwargs,
)


class OptimizationHooks(Composition):
    """Which optimizer moves which parameters, and at which rate."""

    def create_optimizer_and_scheduler(self, num_training_steps: int) -> None:
        if not self._given_scheduler:
            self.lr_scheduler = None
        if not self._given_optimizer:
            self.optimizer = None
        self.create_optimizer()
        self.call_hook(self.create_scheduler, num_training_steps=num_training_steps, optimizer=self.optimizer)

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

    def _clip_grad_norm(self, model: nn.Module) -> torch.Tensor:
        """Clip the gradient to `max_grad_norm`; its norm before that. Called where `max_grad_norm` is above 0."""
        return clip_gradients(self._gradient_of(model), self.args.max_grad_norm)

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """The norm to be logged: that of `_clip_grad_norm`, or measured here where nothing was clipped."""
        return clip_gradients(self._gradient_of(model), 0.0) if grad_norm is None else grad_norm

    def _gradient_of(self, model: nn.Module) -> list[nn.Parameter]:
        return list(model.parameters()) if self._run is None else self._run.gradient.parameters

    def clip_by_hooks(self, parameters: list[nn.Parameter], max_norm: float) -> torch.Tensor:
        """Clipping as the gradient of a step asks for it."""
        norm = self._clip_grad_norm(self.model_wrapped) if max_norm > 0 else None
        norm = self.call_hook(self._get_grad_norm, self.model_wrapped, grad_norm=norm)
        return norm if torch.is_tensor(norm) else torch.tensor(float(norm))

    def _get_learning_rate(self) -> float:
        """The learning rate in force: that of the first parameter group."""
        rate = self.optimizer.param_groups[0]["lr"]
        return float(rate)
