"""NEFTune: noise on the input embeddings while training (Jain et al., arXiv 2310.05914)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from etude.errors import ModelError


def add_embedding_noise(model: nn.Module, alpha: float) -> Callable[[], None]:
    """Add uniform noise of at most alpha / sqrt(T D) to embeddings (B, T, D), in training mode; returns how to stop it.

    Raises:
        ModelError: the model has no input embeddings.
    """
    wrapped: Any = model
    base = wrapped.get_base_model() if hasattr(wrapped, "get_base_model") else wrapped
    embeddings = base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None
    if embeddings is None:
        raise ModelError("neftune_noise_alpha: the model has no input embeddings to add noise to")

    def add_noise(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        if not module.training:
            return output
        bound = alpha / math.sqrt(output.shape[1] * output.shape[2])
        return output + torch.zeros_like(output).uniform_(-bound, bound)

    handle = embeddings.register_forward_hook(add_noise)
    return lambda: handle.remove()
