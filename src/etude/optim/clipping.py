"""Gradient norm and clipping."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale the gradients so that their total L2 norm is at most `max_norm`; 0 leaves them as they are.

    Returns the norm *before* clipping, () float32 on the device of the gradients. It is not read here: a read would make
    the host wait for the device at every step. A non-finite norm is returned like any other.
    """
    parameters = [parameter for parameter in parameters if parameter.grad is not None]
    if max_norm > 0:
        norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    else:
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # The norm of sharded gradients is itself a sharded value: one reduction makes it a plain tensor.
    whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
    return whole.detach().to(torch.float32)
