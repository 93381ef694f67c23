"""Frozen linear layers that share their input, as one matrix product, with the LoRA update of each inside it.

    y = x W^T + (x A^T) (s B)^T + b = [x, x A^T, 1] [W, s B, b]^T,        s = alpha / r  (Hu et al., arXiv 2106.09685)

The product on the right reads and writes nothing twice: the update costs a few columns more of the frozen product, not
passes over its output. The gradient of x and that of x A^T fall out of one product again, dy [W, s B].

Legend: T tokens, I input size, O output size (all layers together), R the ranks of all layers together.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from etude.kernels import reference

COLUMN_MULTIPLE = 8
"""Rows of half-precision matrices start at multiples of 16 bytes, or the fast matrix products refuse them."""


@dataclass(frozen=True)
class Adapter:
    """The LoRA factors of one linear layer: A (r, I), B (O, r)."""

    A: nn.Parameter
    B: nn.Parameter
    scaling: float


@dataclass(frozen=True)
class Member:
    """One of the layers, and where it lies in the product."""

    linear: nn.Linear
    adapter: Adapter | None
    outputs: slice
    ranks: slice


def operations(device: torch.device) -> ModuleType:
    """The fused kernels on a GPU, plain torch elsewhere: the same functions."""
    return reference if device.type != "cuda" else importlib.import_module("etude.kernels.fused")


class Copy(NamedTuple):
    """A factor of an adapter as it is trained, and its place in the products."""

    source: nn.Parameter
    place: Tensor
    scaling: float


def refresh(copies: list[Copy]) -> None:
    """Take over the adapters as they are now; needed after every update, by whoever makes it."""
    if copies:
        sources = [copy.source.detach() for copy in copies]
        scaled = torch._foreach_mul(sources, [copy.scaling for copy in copies])
        torch._foreach_copy_([copy.place for copy in copies], scaled)


class Projection:
    """The layers `linears`, whose inputs are the same, each with its adapter or None.

    With `extends_input` the update lies inside the product and the caller provides the input in a buffer with room for
    x A^T (`input_buffer`); otherwise it is added to the output.
    """

    def __init__(
        self, linears: list[nn.Linear], adapters: list[Adapter | None], dtype: torch.dtype, *, extends_input: bool
    ) -> None:
        self.members: list[Member] = []
        output, rank = 0, 0
        for linear, adapter in zip(linears, adapters, strict=True):
            ranks = adapter.A.shape[0] if adapter is not None else 0
            outputs = slice(output, output + linear.out_features)
            self.members.append(Member(linear, adapter, outputs, slice(rank, rank + ranks)))
            output, rank = outputs.stop, rank + ranks
        self.in_features, self.out_features, self.rank = linears[0].in_features, output, rank
        self.dtype, self.device = dtype, linears[0].weight.device
        self.extends_input = extends_input
        self.has_bias = any(linear.bias is not None for linear in linears)
        extra = self.rank + self.has_bias if extends_input else 0
        self.columns = self.in_features + -(-extra // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
        self.parameters = [p for m in self.members if m.adapter is not None for p in (m.adapter.A, m.adapter.B)]
        self._accumulate: Any = None
        self._is_installed = False

    # -- storage -------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Move the frozen weights into one buffer with room for the updates; the layers keep seeing theirs, as views."""
        if self._is_installed:
            return
        members = self.members
        self.A = torch.zeros(self.rank, self.in_features, dtype=self.dtype, device=self.device)
        if len(members) == 1 and not self.extends_input and members[0].linear.weight.dtype == self.dtype:
            self.weight = members[0].linear.weight.detach()
            self.B = torch.zeros(self.out_features, self.rank, dtype=self.dtype, device=self.device)
        else:
            self.weight = torch.zeros(self.out_features, self.columns, dtype=self.dtype, device=self.device)
            self.B = self.weight[:, self.in_features : self.in_features + self.rank]
            if not self.extends_input:
                self.B = torch.zeros(self.out_features, self.rank, dtype=self.dtype, device=self.device)
            for member in members:
                place = self.weight[member.outputs, : self.in_features]
                place.copy_(member.linear.weight.detach())
                if member.linear.weight.dtype == self.dtype:
                    member.linear.weight.data = place
                if self.extends_input and member.linear.bias is not None:
                    self.weight[member.outputs, self.in_features + self.rank] = member.linear.bias.detach().to(
                        self.dtype
                    )
        self.bias = None if self.extends_input or not self.has_bias else self._stacked_bias()
        self._is_installed = True
        refresh(self.copies())

    def remove(self) -> None:
        """Give every layer a weight of its own again."""
        if not self._is_installed:
            return
        for member in self.members:
            if not member.linear.weight.is_contiguous():
                member.linear.weight.data = member.linear.weight.detach().clone(memory_format=torch.contiguous_format)
        del self.weight, self.A, self.B, self.bias
        self._accumulate, self._is_installed = None, False

    def copies(self) -> list[Copy]:
        """Where the factors of every adapter go."""
        return [
            copy
            for member in self.members
            if (adapter := member.adapter) is not None
            for copy in (
                Copy(adapter.A, self.A[member.ranks], 1.0),
                Copy(adapter.B, self.B[member.outputs, member.ranks], adapter.scaling),
            )
        ]

    def _stacked_bias(self) -> Tensor:
        bias = torch.zeros(self.out_features, dtype=self.dtype, device=self.device)
        for member in self.members:
            if member.linear.bias is not None:
                bias[member.outputs] = member.linear.bias.detach().to(self.dtype)
        return bias

    # -- arithmetic ----------------------------------------------------------------------------------------------------

    def input_buffer(self, num_tokens: int) -> Tensor:
        """(T, columns): the first I columns are for x; those after the update's are filled in here."""
        buffer = torch.empty(num_tokens, self.columns, dtype=self.dtype, device=self.device)
        used = self.in_features + self.rank
        if self.columns > used and self.extends_input:
            buffer[:, used:].zero_()
            if self.has_bias:
                buffer[:, used] = 1.0
        return buffer

    def down(self, buffer: Tensor) -> Tensor:
        """x A^T (T, R); a copy goes into the buffer where it has room for it."""
        reduced = torch.mm(buffer[:, : self.in_features], self.A.t())
        if self.extends_input and self.rank:
            operations(buffer.device).copy_rows(reduced, buffer[:, self.in_features : self.in_features + self.rank])
        return reduced

    def forward(self, buffer: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[residual +] y (T, O), and x A^T (T, R) for the backward pass."""
        reduced = self.down(buffer)
        weight = self.weight.t()
        y = torch.mm(buffer, weight) if residual is None else torch.addmm(residual, buffer, weight)
        if not self.extends_input:
            if self.rank:
                y.addmm_(reduced, self.B.t())
            if self.bias is not None:
                y.add_(self.bias)
        return y, reduced

    def backward(self, grad: Tensor, *, adds_update: bool = True) -> tuple[Tensor, Tensor]:
        """The gradients of x (T, I) and of x A^T (T, R); `grad` is that of y.

        Without `adds_update` the caller still has to add (gradient of x A^T) A to that of x.
        """
        if self.extends_input:
            both = torch.mm(grad, self.weight)
            grad_x = both[:, : self.in_features]
            grad_reduced = both[:, self.in_features : self.in_features + self.rank]
        else:
            grad_x, grad_reduced = torch.mm(grad, self.weight), torch.mm(grad, self.B)
        if self.rank and adds_update:
            grad_x.addmm_(grad_reduced, self.A)
        return grad_x, grad_reduced

    def reduced_gradient(self, grad: Tensor) -> Tensor:
        """The gradient of x A^T (T, R) alone, where x needs none."""
        return torch.mm(grad, self.B)

    def adapter_gradients(
        self,
        grad: Tensor,
        reduced: Tensor,
        grad_reduced: Tensor,
        x: Tensor,
        column_factor: Tensor | None = None,
        offset: float = 0.0,
    ) -> list[Tensor | None]:
        """Gradients of A and B of every adapter, in the order of `parameters`; None where they were added to `p.grad`.

        `x` is the input (T, I); or, where the input is a norm's output n * s * (offset + w), the norm's own input n with w
        as `column_factor` and `grad_reduced` already multiplied by s: the norm's output need not be kept or made again.
        """
        if not self.rank:
            return []
        all_A, all_B = torch.mm(grad_reduced.t(), x), torch.mm(grad.t(), reduced)
        if self._accumulate is not None:
            self._accumulate.add(all_A, all_B, column_factor, offset)
            return [None] * len(self.parameters)
        if column_factor is not None:
            all_A = all_A * (offset + column_factor)
        gradients: list[Tensor | None] = []
        for member in self.members:
            if member.adapter is not None:
                A, B, scaling = member.adapter.A, member.adapter.B, member.adapter.scaling
                gradients.append(all_A[member.ranks].to(A.dtype))
                block = all_B[member.outputs, member.ranks].to(B.dtype)
                gradients.append(block if scaling == 1.0 else block * scaling)
        return gradients

    def accumulate_in_place(self) -> None:
        """Add the adapters' gradients to `p.grad`, which must be there and stay where it is, instead of returning them.

        Autograd's own accumulation is left out, so hooks on the parameters would not be called: those who have some keep it.
        """
        has_hooks = any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in self.parameters)
        if not self.rank or has_hooks or any(p.grad is None or p.grad.dtype != torch.float32 for p in self.parameters):
            return
        from etude.kernels.transfer import Accumulate, Share

        shares = []
        for member in self.members:
            if (adapter := member.adapter) is not None:
                assert adapter.A.grad is not None and adapter.B.grad is not None
                start_A = member.ranks.start * self.in_features
                start_B = member.outputs.start * self.rank + member.ranks.start
                shares.append(Share(True, start_A, self.in_features, adapter.A.grad, 1.0))
                shares.append(Share(False, start_B, self.rank, adapter.B.grad, adapter.scaling))
        self._accumulate = Accumulate(shares)


def lora_parts(module: Any) -> tuple[nn.Linear, Adapter | None] | str:
    """The linear layer and adapter of a module that is one; otherwise, why it cannot be part of a projection."""
    from peft.tuners.lora import Linear

    from etude.kernels.lora import obstacle

    if type(module) is nn.Linear:
        return (module, None) if not module.weight.requires_grad else "a trainable weight"
    if type(module) is not Linear:
        return f"{type(module).__name__} layers"
    if (reason := obstacle(module)) is not None:
        return reason
    name, base = module.active_adapters[0], module.base_layer
    if type(base) is not nn.Linear:
        return f"{type(base).__name__} layers"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "a trainable weight"
    if module.lora_B[name].bias is not None:
        return "LoRA with a bias"
    if getattr(module.lora_dropout[name], "p", 0.0) > 0.0:
        return "LoRA dropout"
    if module.disable_adapters:
        return "adapters are disabled"
    return base, Adapter(module.lora_A[name].weight, module.lora_B[name].weight, module.scaling[name])
