"""The LoRA linear layer without copies: y = W x + b + (alpha/r) B A x (Hu et al., arXiv 2106.09685, equation 3).

peft's own layer copies the activations to the adapter's type (float32) and back under autocast. Here they stay in the
type they have, so only x and A x are kept for the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


def lean_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The forward of a `peft.tuners.lora.Linear` with one active adapter.

    Wherever the layer is used in another way (adapters disabled, merged, several, per-sample), it is peft's own forward
    that runs.
    """
    if args or kwargs or self.disable_adapters or obstacle(self) is not None:
        own: Tensor = type(self).forward(self, x, *args, **kwargs)
        return own
    name = self.active_adapters[0]
    return lora_linear(
        x,
        self.lora_dropout[name](x),
        self.base_layer,
        self.lora_A[name].weight,
        self.lora_B[name].weight,
        self.lora_B[name].bias,
        self.scaling[name],
    )


def lora_linear(
    x: Tensor, dropped: Tensor, base_layer: nn.Module, A: Tensor, B: Tensor, bias: Tensor | None, scaling: float
) -> Tensor:
    """x (..., in) -> (..., out); `dropped` is x after the adapter's dropout; A (r, in), B (r, out), bias (out)."""
    result: Tensor = base_layer(x)
    if not torch.is_autocast_enabled(x.device.type) and dropped.dtype != A.dtype:
        A, B = A.to(dropped.dtype), B.to(dropped.dtype)
        bias = None if bias is None else bias.to(dropped.dtype)
    update = functional.linear(functional.linear(dropped, A), B, bias)
    return result + update * scaling


def obstacle(module: Any) -> str | None:
    """Why `lean_forward` cannot stand in for this LoRA layer; None where it can."""
    adapters = list(module.active_adapters)
    if len(adapters) != 1:
        return f"{len(adapters)} active adapters"
    name = adapters[0]
    if name not in module.lora_A:
        return "the active adapter is not on this layer"
    if name in module.lora_variant:
        return "a variant of LoRA with a forward of its own (DoRA, aLoRA)"
    if module.merged:
        return "the adapter is merged"
    if module.fan_in_fan_out:
        return "transposed weights"
    return None
