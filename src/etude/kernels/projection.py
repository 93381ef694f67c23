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
from etude.kernels.reference import Outer, Update

COLUMN_MULTIPLE = 8
"""Rows of half-precision matrices start at multiples of 16 bytes, or the fast matrix products refuse them."""


@dataclass(frozen=True)
class Adapter:
    """The LoRA factors of one linear layer: A (r, I), B (O, r)."""

    A: nn.Parameter
    B: nn.Parameter
    scaling: float
    dropout: nn.Module | None = None
    """What drops elements of x before A sees them, while it trains."""
    bias: nn.Parameter | None = None
    """What is added to B's output before that is scaled (O)."""
    magnitude: nn.Parameter | None = None
    """The trained norm of each row of W + s B A (O)."""

    @property
    def share_dropped(self) -> float:
        """The share of x's elements that A does not see at this moment."""
        return float(getattr(self.dropout, "p", 0.0)) if self.dropout is not None and self.dropout.training else 0.0


class Drop(NamedTuple):
    """The dropout of one forward pass of a layer: what is dropped is a function of seed and place, so that the backward
    pass drops the same without keeping a mask."""

    seed: Tensor
    """(1), int64, on the device."""
    stream: int = 0
    """Which of the layer's projections."""

    def rows(self, x: Tensor, member: int, share: float) -> Tensor:
        """x without a share of its elements, the others divided by 1 - share; x itself where nothing is dropped."""
        if share == 0.0:
            return x
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        operations(x.device).drop(x, self.seed, STREAMS * self.stream + member, share, out)
        return out


STREAMS = 16
"""No projection has more adapters that drop something else each; `drop` tells four times as many apart."""


@dataclass(frozen=True)
class Member:
    """One of the layers, and where it lies in the product; once for each of its adapters."""

    linear: nn.Linear
    adapter: Adapter | None
    outputs: slice
    ranks: slice
    stage: int = 0
    """How many adapters of the same layer come before this one."""


def operations(device: torch.device) -> ModuleType:
    """The fused kernels on a GPU, plain torch elsewhere: the same functions."""
    return reference if device.type != "cuda" else importlib.import_module("etude.kernels.fused")


def _rounded_up(columns: int) -> int:
    return -(-columns // COLUMN_MULTIPLE) * COLUMN_MULTIPLE


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
    """The layers `linears`, whose inputs are the same, each with its adapter or None. One with several adapters, which are
    summed, comes several times in a row.

    With `extends_input` the update lies inside the product and the caller provides the input in a buffer with room for
    x A^T (`input_buffer`); otherwise it is added to the output, or, with `defers_update`, left to whoever reads the output.
    Subclasses store the weights in other ways (`_store`,
    `_release`) and multiply by them accordingly (`_product`, `_product_gradient`).
    """

    rounding = 0.0
    """What the products are known to differ from the layers' own by, relative to their norm, beyond that of the type."""

    note: str | None = None
    """What the start screen says of these products; None where they are as the layers' own."""

    needs_product = False
    """Whether the gradients of the adapters need what the frozen weights gave."""

    keeps_product = False
    """Whether `forward` keeps that itself, beside x A^T; otherwise it is found in the output."""

    def __init__(
        self,
        linears: list[nn.Linear],
        adapters: list[Adapter | None],
        dtype: torch.dtype,
        *,
        extends_input: bool = False,
        defers_update: bool = False,
    ) -> None:
        self.members: list[Member] = []
        self.layers: dict[nn.Linear, slice] = {}
        output, rank = 0, 0
        for linear, adapter in zip(linears, adapters, strict=True):
            ranks = adapter.A.shape[0] if adapter is not None else 0
            outputs = self.layers.setdefault(linear, slice(output, output + linear.out_features))
            stage = sum(member.linear is linear for member in self.members)
            self.members.append(Member(linear, adapter, outputs, slice(rank, rank + ranks), stage))
            output, rank = outputs.stop, rank + ranks
        self.in_features, self.out_features, self.rank = linears[0].in_features, output, rank
        self.dtype, self.device = dtype, linears[0].weight.device
        self.extends_input, self.defers_update = extends_input, defers_update
        self.has_bias = any(linear.bias is not None for linear in linears)
        self.columns = self.in_features + (_rounded_up(self.rank + self.has_bias) if extends_input else 0)
        self.parameters = [p for m in self.members if m.adapter is not None for p in (m.adapter.A, m.adapter.B)]
        self._accumulate: Any = None
        self._is_installed = False

    # -- storage -------------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Make the frozen weights and the adapters ready for the products."""
        if self._is_installed:
            return
        self.A = torch.zeros(self.rank, self.in_features, dtype=self.dtype, device=self.device)
        self.B = self._store()
        self.bias = None if self.extends_input or not self.has_bias else self._stacked_bias()
        self._is_installed = True
        refresh(self.copies())

    def remove(self) -> None:
        """Take everything back; the layers are as they were."""
        if not self._is_installed:
            return
        self._release()
        for name in ("A", "B", "bias"):
            self.__dict__.pop(name, None)
        self._accumulate, self._is_installed = None, False

    def _store(self) -> Tensor:
        """Store the frozen weights; returns the place of B (O, R).

        Here they move into one buffer with room for the updates; the layers keep seeing theirs, as views.
        """
        first = next(iter(self.layers))
        if len(self.layers) == 1 and not self._stores_factor and first.weight.dtype == self.dtype:
            self.weight = first.weight.detach()
            return self._separate_factor()
        columns = self.in_features + _rounded_up(self.rank + self.has_bias) if self._stores_factor else self.columns
        self.weight = torch.zeros(self.out_features, columns, dtype=self.dtype, device=self.device)
        for linear, outputs in self.layers.items():
            place = self.weight[outputs, : self.in_features]
            place.copy_(linear.weight.detach())
            if linear.weight.dtype == self.dtype:
                linear.weight.data = place
            if self.extends_input and linear.bias is not None:
                self.weight[outputs, self.in_features + self.rank] = linear.bias.detach().to(self.dtype)
        if self._stores_factor:
            return self.weight[:, self.in_features : self.in_features + self.rank]
        return self._separate_factor()

    @property
    def _stores_factor(self) -> bool:
        """Whether B lies beside the weights, so that dy [W, s B] is one product."""
        return self.extends_input or (self.defers_update and self.rank > 0)

    def _release(self) -> None:
        """Undo `_store`: every layer has a weight of its own again."""
        views = [linear for linear in self.layers if linear.weight.shape != self.weight.shape]
        try:
            copies = [linear.weight.detach().clone(memory_format=torch.contiguous_format) for linear in views]
        except torch.OutOfMemoryError:  # the buffer has to go first, so its contents wait on the host
            copies = [linear.weight.detach().cpu() for linear in views]
        for linear, copy in zip(views, copies, strict=True):
            linear.weight.data = copy
        del self.weight, self.A, self.B
        for linear in views:
            if linear.weight.device != self.device:
                linear.weight.data = linear.weight.detach().to(self.device)

    def _separate_factor(self) -> Tensor:
        """A place for B (O, R) beside the weights."""
        return torch.zeros(self.out_features, self.rank, dtype=self.dtype, device=self.device)

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
        for linear, outputs in self.layers.items():
            if linear.bias is not None:
                bias[outputs] = linear.bias.detach().to(self.dtype)
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

    @property
    def kept_columns(self) -> int:
        """Numbers that `forward` has kept of each token, beside its input."""
        return self.rank

    def drops(self) -> bool:
        """Whether adapters drop elements of their input at this moment."""
        return any(member.adapter is not None and member.adapter.share_dropped > 0.0 for member in self.members)

    def reduce(self, x: Any, drop: Drop | None = None) -> Tensor:
        """x A^T (T, R)."""
        x = x[:, : self.in_features]
        if drop is None:
            return torch.mm(x, self.A.t())
        parts = [torch.mm(drop.rows(x, *place), self.A[ranks].t()) for place, ranks in self._places()]
        return torch.cat(parts, dim=1)

    def norm_input(
        self, h: Tensor, weight: Tensor, offset: float, eps: float, drop: Drop | None = None
    ) -> tuple[Any, Tensor, Tensor | None]:
        """The RMS norm of h as input of `forward`, its scales (T), and x A^T (T, R) where that comes with it."""
        buffer, kernels = self.input_buffer(h.shape[0]), operations(h.device)
        x = buffer[:, : self.in_features]
        if drop is not None or not self.rank:
            return buffer, kernels.rms_norm(h, weight, offset, eps, x), None
        return buffer, *kernels.rms_norm_reduced(h, weight, offset, eps, x, self.A, self._room_in(buffer))

    def gate_input(
        self, gate_up: Tensor, update: Update, activation: str, drop: Drop | None = None
    ) -> tuple[Any, Tensor]:
        """The gated product of [g, u] with its update as input of `forward`, and x A^T (T, R)."""
        buffer = self.input_buffer(gate_up.shape[0])
        x, room = buffer[:, : self.in_features], self._room_in(buffer)
        gate_updated = operations(gate_up.device).gate_updated
        if drop is None and self.rank:
            return buffer, gate_updated(gate_up, update, activation, x, self.A, room)
        gate_updated(gate_up, update, activation, x)
        reduced = self.reduce(x, drop)
        if room is not None:
            operations(x.device).copy_rows(reduced, room)
        return buffer, reduced

    def _room_in(self, buffer: Tensor) -> Tensor | None:
        """Where x A^T (T, R) lies in an input that holds it."""
        has_room = self.extends_input and self.rank > 0
        return buffer[:, self.in_features : self.in_features + self.rank] if has_room else None

    def forward(
        self, x: Any, residual: Tensor | None = None, drop: Drop | None = None, reduced: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """[residual +] y (T, O), and x A^T (T, R) for the backward pass, unless it came with the input."""
        if reduced is None:
            reduced = self.reduce(x, drop)
            if self.extends_input and self.rank:
                operations(x.device).copy_rows(reduced, self._room_in(x))
        # The residual is added afterwards: a product that adds it copies it first, and is slower than both together.
        y = self._product(x)
        if self.rank and not self.extends_input and not self.defers_update:
            operations(y.device).add_product(y, reduced, self.B.t(), residual)
        elif residual is not None:
            y.add_(residual)
        if self.bias is not None:
            y.add_(self.bias)
        return y, reduced

    def update(self, reduced: Tensor) -> Update:
        """What the gates owe to LoRA, for the two layers of a gate; B only where `forward` has not added it."""
        of_gate = sum(m.ranks.stop - m.ranks.start for m in self.members if m.outputs.start == 0)
        ranks = of_gate, self.rank - of_gate
        return Update(reduced, self.B if self.defers_update and self.rank else None, ranks)

    def backward(self, grad: Tensor, drop: Drop | None = None, *, adds_update: bool = True) -> tuple[Tensor, Tensor]:
        """The gradients of x (T, I) and of x A^T (T, R); `grad` is that of y.

        Without `adds_update` the first lacks what comes through the adapters, the second times A.
        """
        product = self._product_gradient(grad)
        grad_x = product[:, : self.in_features]
        if product.shape[1] > self.in_features:
            grad_reduced = product[:, self.in_features : self.in_features + self.rank]
        else:
            grad_reduced = torch.mm(grad, self.B)
        if not adds_update:
            return grad_x, grad_reduced
        if drop is not None:
            for place, ranks in self._places():
                grad_x += drop.rows(torch.mm(grad_reduced[:, ranks], self.A[ranks]), *place)
        elif self.rank:
            operations(grad.device).add_product(grad_x, grad_reduced, self.A)
        return grad_x, grad_reduced

    def matrix(self) -> Tensor:
        """W (O, I) as it is multiplied by, until another projection asks for its own."""
        return self.weight[:, : self.in_features]

    def _product(self, x: Any, out: Tensor | None = None) -> Tensor:
        """x W^T (T, O) of the stored weights, in `out` or memory of its own."""
        return torch.mm(x, self.weight[:, : self.columns].t(), out=out)

    def _product_gradient(self, grad: Tensor) -> Tensor:
        """grad W (T, I), or grad [W, s B] where that is stored, in memory of its own."""
        return torch.mm(grad, self.weight)

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
        drop: Drop | None = None,
        all_A: Tensor | None = None,
        all_B: Tensor | None = None,
        product: Tensor | None = None,
        row_scale: Tensor | None = None,
    ) -> list[Tensor | None]:
        """Gradients of A and B of every adapter, in the order of `parameters`; None where they were added to `p.grad`.

        `x` is the input (T, I); or, where the input is a norm's output n * s * (offset + w), the norm's own input n with w
        as `column_factor` and s as `row_scale`, by which `grad_reduced` is still to be multiplied: the norm's output need
        not be kept or made again. `all_A` = grad_reduced^T x and `all_B` = grad^T reduced, or parts (S, ..) that add up to
        them, are computed where they are not known already. `product` is what `forward` gave, where the projection needs it
        and keeps none itself.
        """
        if not self.rank:
            return []
        of_A, of_B = Outer(grad_reduced, x, row_scale), Outer(reduced, grad)
        if all_A is None and drop is not None:
            all_A = self._gradient_of_dropped(of_A, drop)
        made_A, made_B = operations(grad.device).factor_gradients(
            of_A if all_A is None else None, of_B if all_B is None else None
        )
        all_A, all_B = (made if known is None else known for known, made in ((all_A, made_A), (all_B, made_B)))
        if self._accumulate is not None and not self.has_hooks():
            self._accumulate.add(all_A, all_B, column_factor, offset)
            return [None] * len(self.parameters)
        all_A, all_B = (parts if parts.dim() == 2 else parts.sum(dim=0) for parts in (all_A, all_B))
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

    def _gradient_of_dropped(self, of_A: Outer, drop: Drop) -> Tensor:
        """The gradients of A (R, I) where every adapter has seen another part of x."""
        of_all = operations(of_A.many.device).factor_gradients
        parts = []
        for place, ranks in self._places():
            few, dropped = of_A.few[:, ranks], drop.rows(of_A.many, *place)
            all_A, _ = of_all(Outer(few, dropped, of_A.scale), None)
            parts.append(all_A if all_A.dim() == 2 else all_A.sum(dim=0))
        return torch.cat(parts)

    def _places(self) -> list[tuple[tuple[int, float], slice]]:
        """((number, share dropped), ranks) of every member with an adapter."""
        return [
            ((number, member.adapter.share_dropped), member.ranks)
            for number, member in enumerate(self.members)
            if member.adapter is not None
        ]

    def has_hooks(self) -> bool:
        """Whether somebody wants to be called with the gradients of the adapters."""
        return any(p._backward_hooks or getattr(p, "_post_accumulate_grad_hooks", None) for p in self.parameters)

    def accumulate_in_place(self) -> None:
        """Add the adapters' gradients to `p.grad`, which must be there and stay where it is, instead of returning them.

        Autograd's own accumulation is left out, and with it hooks on the parameters: while there are any, it is taken.
        """
        if not self.rank or any(p.grad is None or p.grad.dtype != torch.float32 for p in self.parameters):
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
