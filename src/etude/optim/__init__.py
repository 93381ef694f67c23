"""Optimizers, parameter groups, learning-rate schedules and clipping: what happens between a gradient and a weight."""

from __future__ import annotations

from etude.optim.clipping import clip_gradients
from etude.optim.groups import decay_parameter_names, parameter_groups
from etude.optim.optimizers import OPTIMIZER_NAMES, create_optimizer, optimizer_class_and_kwargs
from etude.optim.schedules import SCHEDULE_NAMES, create_scheduler, factor

__all__ = [
    "OPTIMIZER_NAMES",
    "SCHEDULE_NAMES",
    "clip_gradients",
    "create_optimizer",
    "create_scheduler",
    "decay_parameter_names",
    "factor",
    "optimizer_class_and_kwargs",
    "parameter_groups",
]
