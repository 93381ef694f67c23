"""The norm behind the last decoder layer: one pass over memory each way, where the model's own makes float32 copies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from etude.kernels.block import Norm, rows_of
from etude.kernels.projection import operations


@dataclass(eq=False)
class LastNorm:
    """The norm of a decoder and its numbers."""

    layer: Any
    """The model's own module."""
    norm: Norm
    calls_seen: list[Tensor] | None = None
    """A list here receives what the norm is called with, for a comparison with its own forward."""
    is_packed: bool = False
    """Whether the forward under way is one of packed samples: others are the model's own, as in the layers."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Stands in for the norm's forward. What needs no gradient, or is of another type than its weight, goes to its own."""
        takes = self.is_packed and hidden_states.dtype == self.norm.weight.dtype and not self.layer.weight.requires_grad
        if takes and self.calls_seen is not None:
            self.calls_seen.append(hidden_states.detach().clone())
        if takes and torch.is_grad_enabled() and hidden_states.requires_grad:
            return self.run(hidden_states)
        own: Any = type(self.layer).forward
        result: Tensor = own(self.layer, hidden_states)
        return result

    def run(self, hidden_states: Tensor) -> Tensor:
        """The norm of (.., D)."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        normed: Tensor = _Normed.apply(self.norm, rows)  # type: ignore[no-untyped-call]
        return normed.view(hidden_states.shape)

    def compare(self, hidden_states: Tensor) -> float:
        """The largest relative difference of output and gradient from the norm's own forward on the same input."""
        from etude.kernels.layers import distance_of, largest

        own: Any = type(self.layer).forward
        direction = torch.linspace(-1, 1, hidden_states.numel(), device=hidden_states.device)
        direction = direction.view_as(hidden_states).to(hidden_states.dtype)
        results = []
        for run in (lambda h: own(self.layer, h), self.run):
            with torch.enable_grad():
                h = hidden_states.clone().requires_grad_()
                output = run(h)
                results.append((output.detach(), *torch.autograd.grad(output, h, direction)))
        theirs, ours = results
        return largest(distance_of(*pair) for pair in zip(ours, theirs, strict=True))


class _Normed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, norm: Norm, h_TD: Tensor) -> Tensor:
        out_TD = torch.empty_like(h_TD)
        scale_T = operations(h_TD.device).rms_norm(h_TD, norm.weight, norm.offset, norm.eps, out_TD)
        ctx.norm = norm
        ctx.save_for_backward(h_TD, scale_T)
        return out_TD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        norm: Norm = ctx.norm
        h_TD, scale_T = ctx.saved_tensors
        kernels = operations(h_TD.device)
        return None, kernels.rms_norm_backward(rows_of(grad_TD), h_TD, norm.weight, norm.offset, scale_T)
