"""The LoRA linear layer without copies: y = W x + b + (alpha/r) B A x (Hu et al., arXiv 2106.09685, equation 3).

peft's own layer copies the activations to the adapter's type (float32) and back under autocast. Here they stay in the
type they have, so only x and A x are kept for the backward pass. In bfloat16 on a CPU, where every pass over an activation
costs as much as a tenth of its product, the update is added inside the products of one operation.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
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
    if dropped is x and bias is None and _can_add_in_place(x, base_layer):
        added: Tensor = _Product.apply(x, base_layer.weight, base_layer.bias, A, B, scaling)  # type: ignore[no-untyped-call]
        return added
    result: Tensor = base_layer(x)
    if not torch.is_autocast_enabled(x.device.type) and dropped.dtype != A.dtype:
        A, B = A.to(dropped.dtype), B.to(dropped.dtype)
        bias = None if bias is None else bias.to(dropped.dtype)
    update = functional.linear(functional.linear(dropped, A), B, bias)
    return result + update * scaling


def _can_add_in_place(x: Tensor, base_layer: nn.Module) -> bool:
    """Whether this is a frozen bfloat16 layer on a CPU that nobody watches, and is multiplied in that type."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or type(base_layer) is not nn.Linear:
        return False
    if torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != torch.bfloat16:
        return False
    is_frozen = all(p.dtype == x.dtype and not p.requires_grad for p in base_layer.parameters(recurse=False))
    is_watched = base_layer._forward_hooks or base_layer._forward_pre_hooks or "forward" in vars(base_layer)
    return is_frozen and not is_watched and not base_layer._backward_hooks and not base_layer._backward_pre_hooks


class _Product(torch.autograd.Function):
    """y = x W^T + b + x A^T (s B)^T with W and b frozen; A and B are rounded to the type of x. T rows, I inputs, O outputs."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_OI: Tensor, bias_O: Tensor | None, A: Tensor, B: Tensor, scaling: float
    ) -> Tensor:
        x_TI = x.reshape(-1, x.shape[-1])
        with torch.autocast(x.device.type, enabled=False):
            near_A, near_B = A.to(x.dtype), (B * scaling).to(x.dtype)
            reduced = torch.mm(x_TI, near_A.t())
            y_TO = functional.linear(x_TI, weight_OI, bias_O).addmm_(reduced, near_B.t())
        ctx.save_for_backward(x_TI, weight_OI, near_A, near_B, reduced)
        ctx.scaling, ctx.dtypes = scaling, (A.dtype, B.dtype)
        return y_TO.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, weight_OI, near_A, near_B, reduced = ctx.saved_tensors
        gradient_TO = gradient.reshape(-1, gradient.shape[-1])
        with torch.autocast(gradient.device.type, enabled=False):
            reduced_gradient = torch.mm(gradient_TO, near_B)
            x_gradient = None
            if ctx.needs_input_grad[0]:
                x_gradient = torch.mm(gradient_TO, weight_OI).addmm_(reduced_gradient, near_A)
                x_gradient = x_gradient.view(*gradient.shape[:-1], -1)
            A_gradient = torch.mm(reduced_gradient.t(), x_TI).to(ctx.dtypes[0])
            B_gradient = torch.mm(gradient_TO.t(), reduced).to(ctx.dtypes[1]) * ctx.scaling
        return x_gradient, None, None, A_gradient, B_gradient, None


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
