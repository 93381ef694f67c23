"""Projections that train a number for each of their rows: its norm (DoRA) or an offset (LoRA with a bias).

    y = g * (x W^T) + (x A^T) (g s B)^T + b + s c,        g = m / ||W + s B A||, norms of rows

The norm counts as a constant in the backward pass (Liu et al., DoRA, arXiv 2402.09353, section 4.3), so the gradient of m is
that of g over the norm. It is known without the updated weight, whose size is that of the base:

    ||W + s B A||^2 = ||W||^2 + 2 s rows(B * (W A^T)) + s^2 rows((B A A^T) * B)

in float32, of the factors as they are multiplied. With g inside B the update is that of plain LoRA, and whoever adds it
need not know of g.

Adapters of one layer act in turn: what DoRA scales is all that came before it, but the base's bias. With dropout peft has
DoRA drop elements of what W sees as well, but only of what DoRA adds to it:

    y = x W^T + (g - 1) * (d W^T) + (d A^T) (g s B)^T + b,        d = x without the elements dropped

Legend: T tokens, O output size (all layers together), R the ranks of all layers together, S the most adapters of a layer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from etude.kernels.fp8 import Fp8Projection
from etude.kernels.projection import COLUMN_MULTIPLE, Adapter, Drop, Member, Projection, operations
from etude.kernels.quantized import QuantizedProjection
from etude.kernels.reference import Update

SMALLEST_FACTOR = 2.0**-40
"""What a factor of zero counts as where x W^T has to be found again in its product with the factor: next to what other rows
give it is nothing, and types with eight bits of exponent hold it as exactly as any other number."""


class Magnitudes:
    """The magnitudes of a projection's adapters, and what its rows are multiplied by because of them."""

    def __init__(self, members: list[Member], wide: torch.dtype) -> None:
        self.members = [(member, member.adapter) for member in members if member.adapter is not None]
        self.wide = wide
        self.num_stages = 1 + max(member.stage for member, _ in self.members)
        self.scaled_layers = {m.outputs.start for m, adapter in self.members if adapter.magnitude is not None}

    def install(self, weight: Tensor, *, is_undone: bool) -> None:
        """Get ready for the frozen weight (O, I); `is_undone` where products with the factor are divided by it."""
        self.is_undone = is_undone
        self.squares = torch.linalg.vector_norm(weight, dim=1, dtype=self.wide).square()
        shape = self.num_stages, weight.shape[0]
        self.norms, self.ratios = (torch.ones(shape, dtype=self.wide, device=weight.device) for _ in range(2))
        # Of what each adapter gives: its own ratio times those of the adapters after it (S, O).
        self.factors = self.ratios if self.num_stages == 1 else torch.ones_like(self.ratios)
        stages = [m.stage for m, _ in self.members for _ in range(m.ranks.start, m.ranks.stop)]
        self.stage_of_rank = torch.tensor(stages, device=weight.device)

    @property
    def factor(self) -> Tensor:
        """What x W^T is multiplied by (O)."""
        return self.factors[0]

    def of_update(self) -> Tensor:
        """What the rows of B are multiplied by: (O, 1), or (O, R) where the ranks differ."""
        if self.num_stages == 1:
            return self.factor[:, None]
        return self.factors.t().index_select(1, self.stage_of_rank)

    def renew(self, weight: Tensor, A: Tensor, B: Tensor) -> None:
        """Take over the magnitudes as they are now, for the factors A (R, I) and B (O, R), which becomes g B."""
        wide_A, wide_B = A.to(self.wide), B.to(self.wide)
        crossed, gram = torch.mm(weight, A.t()).to(self.wide), torch.mm(wide_A, wide_A.t())
        for stage in range(self.num_stages):
            own_B = wide_B if self.num_stages == 1 else wide_B * (self.stage_of_rank == stage)
            squares = self.squares + ((2 * crossed + torch.mm(own_B, gram)) * own_B).sum(dim=1)
            torch.sqrt(squares.clamp_min_(0.0), out=self.norms[stage])
        for member, adapter in self.members:
            if adapter.magnitude is not None:
                place = member.stage, member.outputs
                torch.div(adapter.magnitude, self.norms[place], out=self.ratios[place])
        if self.num_stages > 1:
            self.factors[-1].copy_(self.ratios[-1])
            for stage in reversed(range(self.num_stages - 1)):
                torch.mul(self.ratios[stage], self.factors[stage + 1], out=self.factors[stage])
        if self.is_undone:
            torch.copysign(self.factor.abs().clamp_min_(SMALLEST_FACTOR), self.factor, out=self.factor)
        B.mul_(self.of_update())

    def gradients(self, frozen: Tensor, all_B: Tensor, rows: Tensor | None) -> list[Tensor | None]:
        """Of every magnitude: the sum over tokens of grad * what it scales, over the norm.

        `frozen` is that sum for x W^T (O), `all_B` = grad^T (x A^T) (O, R), `rows` the sum of grad itself (O), for biases.
        """
        gradients: list[Tensor | None] = []
        scaled: dict[int, Tensor] = {}
        for member, adapter in self.members:
            outputs, stage = member.outputs, member.stage
            if outputs.start not in self.scaled_layers:
                continue
            own = (all_B[outputs, member.ranks] * adapter.B.detach()).sum(dim=1, dtype=self.wide)
            if adapter.bias is not None:
                assert rows is not None
                own += adapter.bias.detach() * rows[outputs]
            before = frozen[outputs] if stage == 0 else scaled[outputs.start] * self.ratios[stage - 1, outputs]
            scaled[outputs.start] = total = before + adapter.scaling * own
            if adapter.magnitude is not None:
                gradient = total / self.norms[stage, outputs]
                if stage + 1 < self.num_stages:
                    gradient *= self.factors[stage + 1, outputs]
                gradients.append(gradient.to(adapter.magnitude.dtype))
        return gradients


class RowProjection(Projection):
    """A projection some of whose adapters have a magnitude or a bias. Its update is added to the output or deferred."""

    def __init__(
        self,
        linears: list[nn.Linear],
        adapters: list[Adapter | None],
        dtype: torch.dtype,
        *storage: Any,
        defers_update: bool = False,
    ) -> None:
        super().__init__(linears, adapters, dtype, *storage, defers_update=defers_update)
        self.wide = torch.promote_types(dtype, torch.float32)
        magnitudes = [p for m in self.members if m.adapter is not None and (p := m.adapter.magnitude) is not None]
        self.biases = [(m, p) for m in self.members if m.adapter is not None and (p := m.adapter.bias) is not None]
        self.magnitudes = Magnitudes(self.members, self.wide) if magnitudes else None
        self.parameters += [*magnitudes, *(parameter for _, parameter in self.biases)]
        self.has_bias = self.has_bias or bool(self.biases)
        self.needs_product = bool(magnitudes)
        # Whoever gets y without its update keeps it anyway, and x W^T is y / g, unless something else has been added to it
        # or a g near zero leaves nothing of it.
        is_narrow = torch.finfo(dtype).tiny > SMALLEST_FACTOR
        self.keeps_product = self.needs_product and (
            not defers_update or self.has_bias or is_narrow or any(drops_base(m.adapter) for m in self.members)
        )

    def install(self) -> None:
        if self._is_installed:
            return
        super().install()
        if self.magnitudes is not None:
            self.magnitudes.install(self.matrix(), is_undone=not self.keeps_product)
        if self.biases:
            assert self.bias is not None
            self.frozen_bias, self.bias = self.bias, self.bias.to(self.wide, copy=True)
        self.renew()

    def remove(self) -> None:
        super().remove()
        if self.magnitudes is not None:
            self.magnitudes = Magnitudes(self.members, self.wide)
        self.__dict__.pop("frozen_bias", None)

    @property
    def _stores_factor(self) -> bool:
        return False

    def renew(self) -> None:
        """Take over magnitudes and biases as they are now, right after `refresh` has done so for the factors."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            if self.magnitudes is not None:
                self.magnitudes.renew(self.matrix(), self.A, self.B)
            if self.biases:
                assert self.bias is not None
                self.bias.copy_(self.frozen_bias)
                for member, bias in self.biases:
                    assert member.adapter is not None
                    self.bias[member.outputs].add_(self._scaled(bias, member), alpha=member.adapter.scaling)

    def _scaled(self, rows: Tensor, member: Member) -> Tensor:
        """A number for each row of a layer, multiplied by what all that its adapter gives is multiplied by."""
        return rows if self.magnitudes is None else rows * self.magnitudes.factors[member.stage, member.outputs]

    @property
    def kept_columns(self) -> int:
        return self._kept_columns if self.keeps_product else self.rank

    @property
    def _kept_columns(self) -> int:
        """Rows are as far apart as the fast matrix products ask for."""
        return -(-(self.out_features + self.rank) // COLUMN_MULTIPLE) * COLUMN_MULTIPLE

    def forward(
        self, x: Any, residual: Tensor | None = None, drop: Drop | None = None, reduced: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if reduced is None:
            reduced = self.reduce(x, drop)
        if self.keeps_product:
            kept = torch.empty(reduced.shape[0], self._kept_columns, dtype=self.dtype, device=self.device)
            product, beside = self._parts(kept)
            beside.copy_(reduced)
            y = self._scaled_product(x, product, drop)
        else:
            y, kept = self._product(x), reduced
            if self.magnitudes is not None:
                y.mul_(self.magnitudes.factor)
        if not self.defers_update:
            operations(y.device).add_product(y, reduced, self.B.t(), residual)
        if self.bias is not None:
            y.add_(self.bias)
        return y, kept

    def _scaled_product(self, x: Any, product: Tensor, drop: Drop | None) -> Tensor:
        """What the frozen weights give to y (T, O); what its magnitudes multiply goes into `product`."""
        assert self.magnitudes is not None
        factor, dropping = self.magnitudes.factor, self._dropping(drop)
        if not dropping:
            self._product(x, out=product)
            return torch.mul(product, factor, out=torch.empty(product.shape, dtype=self.dtype, device=self.device))
        assert drop is not None
        weight = self.matrix()
        y = torch.mm(x, weight.t())
        for outputs in self.layers.values():
            rows, of_product = y[:, outputs], product[:, outputs]
            if outputs.start in dropping:
                dropped = drop.rows(x, *dropping[outputs.start])
                torch.mm(dropped, weight[outputs].t(), out=of_product)
                rows.addcmul_(of_product, factor[outputs] - 1)
            else:
                of_product.copy_(rows)
                rows.mul_(factor[outputs])
        return y

    def _dropping(self, drop: Drop | None) -> dict[int, tuple[int, float]]:
        """By their first row the layers whose DoRA drops elements in this pass: (number, share) of their adapter."""
        if drop is None:
            return {}
        return {
            member.outputs.start: (number, member.adapter.share_dropped)
            for number, member in enumerate(self.members)
            if member.adapter is not None and drops_base(member.adapter) and member.adapter.share_dropped > 0.0
        }

    def _parts(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """x W^T (T, O) and x A^T (T, R)."""
        return kept[:, : self.out_features], kept[:, self.out_features : self.out_features + self.rank]

    def update(self, reduced: Tensor) -> Update:
        return super().update(self._parts(reduced)[1] if self.keeps_product else reduced)

    def backward(self, grad: Tensor, drop: Drop | None = None, *, adds_update: bool = True) -> tuple[Tensor, Tensor]:
        dropping = self._dropping(drop)
        if not dropping:
            return super().backward(grad, drop, adds_update=adds_update)
        assert drop is not None and self.magnitudes is not None and adds_update
        weight, factor = self.matrix(), self.magnitudes.factor
        direct = grad
        if len(dropping) < len(self.magnitudes.scaled_layers):
            direct_factor = factor.clone()
            for outputs in self.layers.values():
                if outputs.start in dropping:
                    direct_factor[outputs] = 1.0
            direct = torch.mul(grad, direct_factor, out=torch.empty_like(grad))
        grad_x, grad_reduced = torch.mm(direct, weight), torch.mm(grad, self.B)
        for number, member in enumerate(self.members):
            if member.adapter is None:
                continue
            of_dropped = torch.mm(grad_reduced[:, member.ranks], self.A[member.ranks])
            if member.outputs.start in dropping:
                of_member = grad[:, member.outputs]
                excess = torch.mul(of_member, factor[member.outputs] - 1, out=torch.empty_like(of_member))
                of_dropped.addmm_(excess, weight[member.outputs])
            grad_x += drop.rows(of_dropped, number, member.adapter.share_dropped)
        return grad_x, grad_reduced

    def _product_gradient(self, grad: Tensor) -> Tensor:
        if self.magnitudes is not None:
            grad = torch.mul(grad, self.magnitudes.factor, out=torch.empty_like(grad))
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
        row_scale: Tensor | None = None,
    ) -> list[Tensor | None]:
        if self.keeps_product:
            product, reduced = self._parts(reduced)
        if all_B is None:
            all_B = torch.mm(grad.t(), reduced)
        elif all_B.dim() == 3:
            all_B = all_B.sum(dim=0)
        scaled_B = all_B if self.magnitudes is None else all_B * self.magnitudes.of_update()
        gradients = super().adapter_gradients(
            grad, reduced, grad_reduced, x, column_factor, offset, drop, all_A, scaled_B, row_scale=row_scale
        )
        rows = grad.sum(dim=0, dtype=self.wide) if self.biases else None
        if self.magnitudes is not None:
            assert product is not None
            frozen = (grad * product).sum(dim=0, dtype=self.wide)
            if not self.keeps_product:  # it came with g
                frozen /= self.magnitudes.factor
            gradients += self.magnitudes.gradients(frozen, all_B, rows)
        for member, bias in self.biases:
            assert rows is not None and member.adapter is not None
            gradients.append((member.adapter.scaling * self._scaled(rows[member.outputs], member)).to(bias.dtype))
        return gradients

    def accumulate_in_place(self) -> None:
        """Nothing: autograd adds to the gradients where they lie, too, one by one."""


class QuantizedRowProjection(RowProjection, QuantizedProjection):
    """The same on layers of bitsandbytes: norms are those of the weights as they are unpacked, once more for each pass."""


class Fp8RowProjection(RowProjection, Fp8Projection):
    """The same with frozen products in fp8: norms are those of the weights before they were rounded."""


def drops_base(adapter: Adapter | None) -> bool:
    """Whether an adapter, when it drops elements, drops them of what the frozen weight sees as well."""
    return adapter is not None and adapter.magnitude is not None and getattr(adapter.dropout, "p", 0.0) > 0.0
