"""Projections that train a number for each of their rows: its norm (DoRA) or an offset (LoRA with a bias).

    y = g * (x W^T) + (x A^T) (g s B)^T + b + s c,        g = m / ||W + s B A||, norms of rows

The norm counts as a constant in the backward pass (Liu et al., DoRA, arXiv 2402.09353, section 4.3), so the gradient of m is
that of g over the norm. It is known without the updated weight, whose size is that of the base:

    ||W + s B A||^2 = ||W||^2 + 2 s rows(B * (W A^T)) + s^2 rows((B A A^T) * B)

in float32, of the factors as they are multiplied. With g inside B the update is that of plain LoRA, and whoever adds it
need not know of g.

Legend: T tokens, O output size (all layers together), R the ranks of all layers together.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from etude.kernels.projection import COLUMN_MULTIPLE, Adapter, Drop, Projection, operations


class RowProjection(Projection):
    """A projection some of whose adapters have a magnitude or a bias. Its update is added to the output or deferred."""

    def __init__(
        self,
        linears: list[nn.Linear],
        adapters: list[Adapter | None],
        dtype: torch.dtype,
        *,
        defers_update: bool = False,
    ) -> None:
        super().__init__(linears, adapters, dtype, defers_update=defers_update)
        self.wide = torch.promote_types(dtype, torch.float32)
        self.magnitudes = [
            (m.outputs, p) for m in self.members if m.adapter is not None and (p := m.adapter.magnitude) is not None
        ]
        self.biases = [
            (m.outputs, p, m.adapter.scaling)
            for m in self.members
            if m.adapter is not None and (p := m.adapter.bias) is not None
        ]
        self.parameters += [parameter for _, parameter in self.magnitudes]
        self.parameters += [parameter for _, parameter, _ in self.biases]
        self.needs_product = bool(self.magnitudes)
        self.has_bias = self.has_bias or bool(self.biases)

    def install(self) -> None:
        if self._is_installed:
            return
        super().install()
        if self.magnitudes:
            self.squares = torch.linalg.vector_norm(self.weight, dim=1, dtype=self.wide).square()
            self.norms, self.factor = torch.empty_like(self.squares), torch.ones_like(self.squares)
        if self.biases:
            assert self.bias is not None
            self.frozen_bias, self.bias = self.bias, self.bias.to(self.wide, copy=True)
        self.renew()

    def remove(self) -> None:
        super().remove()
        for name in ("squares", "norms", "factor", "frozen_bias"):
            self.__dict__.pop(name, None)

    @property
    def _stores_factor(self) -> bool:
        return False

    def renew(self) -> None:
        """Take over magnitudes and biases as they are now, right after `refresh` has done so for the factors."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self.biases:
                assert self.bias is not None
                self.bias.copy_(self.frozen_bias)
                for outputs, bias, scaling in self.biases:
                    self.bias[outputs].add_(bias, alpha=scaling)
            if self.magnitudes:
                A, B = self.A.to(self.wide), self.B.to(self.wide)
                crossed = torch.mm(self.weight, self.A.t()).to(self.wide)
                squares = self.squares + ((2 * crossed + torch.mm(B, torch.mm(A, A.t()))) * B).sum(dim=1)
                torch.sqrt(squares.clamp_min_(0.0), out=self.norms)
                for outputs, magnitude in self.magnitudes:
                    torch.div(magnitude, self.norms[outputs], out=self.factor[outputs])
                self.B.mul_(self.factor[:, None])

    @property
    def kept_columns(self) -> int:
        return self._kept_columns if self._keeps_product else self.rank

    @property
    def _keeps_product(self) -> bool:
        """Whether `forward` keeps x W^T beside x A^T; whoever gets it without its update keeps it anyway."""
        return self.needs_product and not self.defers_update

    @property
    def _kept_columns(self) -> int:
        """Rows are as far apart as the fast matrix products ask for."""
        return -(-(self.out_features + self.rank) // COLUMN_MULTIPLE) * COLUMN_MULTIPLE

    def forward(
        self, x: Any, residual: Tensor | None = None, drop: Drop | None = None, reduced: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if reduced is None:
            reduced = self.reduce(x, drop)
        if not self._keeps_product:
            y, kept = self._product(x), reduced
            if self.needs_product:
                y.mul_(self.factor)
        else:
            kept = x.new_empty(x.shape[0], self._kept_columns)
            product, beside = self._parts(kept)
            torch.mm(x, self.weight.t(), out=product)
            beside.copy_(reduced)
            y = torch.mul(product, self.factor, out=x.new_empty(product.shape))
        if not self.defers_update:
            operations(y.device).add_product(y, reduced, self.B.t(), residual)
        if self.bias is not None:
            y.add_(self.bias)
        return y, kept

    def _parts(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """x W^T (T, O) and x A^T (T, R)."""
        return kept[:, : self.out_features], kept[:, self.out_features : self.out_features + self.rank]

    def _product_gradient(self, grad: Tensor) -> Tensor:
        if self.needs_product:
            grad = torch.mul(grad, self.factor, out=torch.empty_like(grad))
        return super()._product_gradient(grad)

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
    ) -> list[Tensor | None]:
        if self._keeps_product:
            product, reduced = self._parts(reduced)
        if all_B is None:
            all_B = torch.mm(grad.t(), reduced)
        elif all_B.dim() == 3:
            all_B = all_B.sum(dim=0)
        scaled_B = all_B * self.factor[:, None] if self.needs_product else all_B
        gradients = super().adapter_gradients(
            grad, reduced, grad_reduced, x, column_factor, offset, drop, all_A, scaled_B
        )
        if self.needs_product:
            assert product is not None
            gradients += self._magnitude_gradients(grad, product, all_B)
        if self.biases:
            all_rows = grad.sum(dim=0, dtype=self.wide)
            gradients += [(scaling * all_rows[outputs]).to(bias.dtype) for outputs, bias, scaling in self.biases]
        return gradients

    def _magnitude_gradients(self, grad: Tensor, product: Tensor, all_B: Tensor) -> list[Tensor | None]:
        """Of every magnitude: the sum over tokens of grad * x (W + s B A)^T, over the norm."""
        frozen = (grad * product).sum(dim=0, dtype=self.wide)
        if self.defers_update:  # the product came with g and the bias
            if self.bias is not None:
                frozen -= self.bias * grad.sum(dim=0, dtype=self.wide)
            frozen /= self.factor
        gradients: list[Tensor | None] = []
        for member in self.members:
            if member.adapter is not None and (magnitude := member.adapter.magnitude) is not None:
                of_B = (all_B[member.outputs, member.ranks] * member.adapter.B.detach()).sum(dim=1, dtype=self.wide)
                total = frozen[member.outputs] + member.adapter.scaling * of_B
                gradients.append((total / self.norms[member.outputs]).to(magnitude.dtype))
        return gradients

    def accumulate_in_place(self) -> None:
        """Nothing: autograd adds to the gradients where they lie, too, one by one."""
