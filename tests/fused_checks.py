"""The fused kernels against the reference in float64, on any device: what the interpreter and a GPU both have to pass.

Every check builds its inputs from a seed as views into wider buffers (rows that lie apart, as the model's are), and asks
for a result that is rounded once. Legend as in `etude.kernels.reference`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from etude.kernels import fused, fused_factors, fused_gate, fused_norm, reference, transfer

NOISE = 4e-6
"""Of float32 arithmetic, relative to the largest term: sums of a row, exponentials of numbers up to 30."""

VANISHED = 1e-12
"""Activations far below it are exponentials of numbers so large that float32 cannot give them to `NOISE`."""


@dataclass(frozen=True)
class Inputs:
    """Where the tensors of a check lie and what they are."""

    device: str
    dtype: torch.dtype

    def rows(self, *shape: int, seed: int, apart: int = 16) -> Tensor:
        """Normal values in rows that are wider apart than they are wide, for every seed by another multiple of `apart`."""
        apart *= seed + 1
        generator = torch.Generator(self.device).manual_seed(seed)
        wide = torch.randn((shape[0], *shape[1:-1], shape[-1] + apart), device=self.device, generator=generator)
        return wide.to(self.dtype)[..., apart // 2 : apart // 2 + shape[-1]]

    def vector(self, size: int, *, seed: int) -> Tensor:
        return self.rows(1, size, seed=seed, apart=0)[0]


def assert_rounded_once(ours: Tensor, exact: Tensor, magnitude: Tensor) -> None:
    """`ours` is `exact` to half a step of its type (a whole one where the interpreter cuts bfloat16 off), and noise."""
    limits = torch.finfo(ours.dtype)
    steps = 1.0 if ours.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1" else 0.5
    allowed = steps * limits.eps * exact.abs() + NOISE * magnitude + limits.tiny * limits.eps
    excess = (ours.double() - exact).abs() - allowed
    assert bool((excess <= 0).all()), f"off by {float(excess.max()):.3g} more than rounding allows"


def row_magnitude(exact: Tensor) -> Tensor:
    return exact.abs().amax(dim=-1, keepdim=True)


def check_rms_norm(
    inputs: Inputs, T: int, D: int, *, offset: float, residual: bool, in_place: bool, apart: int
) -> None:
    h, weight = inputs.rows(T, D, seed=0, apart=apart) * 3, inputs.vector(D, seed=1)
    around = inputs.rows(T, D, seed=2, apart=apart) if residual else None
    exact = torch.empty(T, D, dtype=torch.float64, device=h.device)
    exact_scale = reference.rms_norm(
        h.double(), weight.double(), offset, 1e-6, exact, None if around is None else around.double()
    )
    out = (h if around is None else around) if in_place else inputs.rows(T, D, seed=3, apart=apart)
    scale = fused.rms_norm(h, weight, offset, 1e-6, out, around)
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale.double(), exact_scale, rtol=NOISE, atol=0.0)
    assert_rounded_once(out, exact, row_magnitude(exact))


def check_rms_norm_reduced(inputs: Inputs, T: int, D: int, R: int, *, offset: float, room: bool, apart: int) -> None:
    """The norm as it is alone, and what A makes of it as it was rounded, beside the norm's rows as well."""
    h, weight = inputs.rows(T, D, seed=0, apart=apart) * 3, inputs.vector(D, seed=1)
    A = inputs.rows(R, D, seed=2, apart=apart)
    exact = torch.empty(T, D, dtype=torch.float64, device=h.device)
    exact_scale = reference.rms_norm(h.double(), weight.double(), offset, 1e-6, exact)
    wide = inputs.rows(T, D + R + 9, seed=3)
    before, out, beside = wide.clone(), wide[:, :D], wide[:, D : D + R]
    scale, reduced = fused.rms_norm_reduced(h, weight, offset, 1e-6, out, A, beside if room else None)
    assert scale.dtype == torch.float32
    torch.testing.assert_close(scale.double(), exact_scale, rtol=NOISE, atol=0.0)
    assert_rounded_once(out, exact, row_magnitude(exact))
    assert_close_to_sum(reduced, out, A.t(), 1.0)
    assert torch.equal(beside, reduced if room else before[:, D : D + R])
    assert torch.equal(wide[:, D + R :], before[:, D + R :])


def check_rms_norm_backward(
    inputs: Inputs, T: int, D: int, *, offset: float, residual: bool, apart: int, rank: int = 0
) -> None:
    """With a rank: of a gradient to which an adapter adds."""
    h, grad = inputs.rows(T, D, seed=0, apart=apart) * 3, inputs.rows(T, D, seed=1, apart=apart)
    weight = inputs.vector(D, seed=2)
    around = inputs.rows(T, D, seed=3, apart=apart) if residual else None
    scale = torch.rsqrt(h.double().square().mean(dim=1) + 1e-6).float()
    update, exact_update = None, None
    if rank:
        update = reference.Reduction(inputs.rows(T, rank, seed=4), inputs.rows(rank, D, seed=5, apart=apart))
        exact_update = reference.Reduction(*(part.double() for part in update))
    exact_around = None if around is None else around.double()
    exact = reference.rms_norm_backward(
        grad.double(), h.double(), weight.double(), offset, scale.double(), exact_around, exact_update
    )
    before = grad.clone()
    ours = fused.rms_norm_backward(grad, h, weight, offset, scale, around, update)
    assert ours.dtype == h.dtype
    is_high = rank > fused_norm.MOST_RANKS  # there the sum is rounded on the way
    assert torch.equal(grad, before) == (not is_high)
    slack = 1.0 + (torch.finfo(h.dtype).eps / NOISE if is_high else 0.0)
    assert_rounded_once(ours, exact, slack * row_magnitude(exact))


def check_rotate_heads(
    inputs: Inputs, T: int, counts: tuple[int, int], d: int, *, query_norm: bool, key_norm: bool, table: torch.dtype
) -> None:
    """Forward and backward, of rows that are wider than their heads; what is beside them stays as it is.

    Every tensor of heads has strides of its own.
    """
    H, K = counts
    width = (H + 2 * K) * d
    wide, wide_out = inputs.rows(T, width + 24, seed=0), inputs.rows(T, width + 24, seed=1)
    qkv, into = wide[:, 8:-16], wide_out[:, 8:-16]
    cos, sin = (Inputs(inputs.device, table).rows(T, d, seed=seed) for seed in (2, 3))
    norms = [
        reference.HeadNorm(inputs.vector(d, seed=seed), offset, 1e-6) if is_normed else None
        for seed, offset, is_normed in ((4, 1.0, query_norm), (5, 0.0, key_norm))
    ]
    exact_norms = [None if norm is None else norm._replace(weight=norm.weight.double()) for norm in norms]
    exact = [torch.empty(T, heads, d, dtype=torch.float64, device=qkv.device) for heads in (H, K, K)]
    exact_scales = reference.rotate_heads(qkv.double(), cos.double(), sin.double(), *exact, *exact_norms)
    outputs = [inputs.rows(T, heads, d, seed=9 + place) for place, heads in enumerate((H, K, K))]
    scales = fused.rotate_heads(qkv, cos, sin, *outputs, *norms)
    assert_rounded_once(outputs[0], exact[0], row_magnitude(exact[0]))
    assert_rounded_once(outputs[1], exact[1], row_magnitude(exact[1]))
    assert torch.equal(outputs[2].double(), exact[2])
    for scale, exact_scale, norm in zip(scales, exact_scales, norms, strict=True):
        assert (scale is None) == (norm is None)
        if scale is not None and exact_scale is not None:
            assert scale.dtype == torch.float32
            torch.testing.assert_close(scale.double(), exact_scale, rtol=NOISE, atol=0.0)

    # Gradients come with heads first in memory, as some attention kernels hand them back.
    gradients = [inputs.rows(heads, T, d, seed=6 + place).transpose(0, 1) for place, heads in enumerate((H, K, K))]
    of_query, of_key, _ = qkv.unflatten(1, (-1, d)).split([H, K, K], dim=1)
    of_key = of_key.transpose(0, 1).contiguous().transpose(0, 1)
    undone, exact_undone = [], []
    for heads, norm, scale in zip((of_query, of_key), norms, scales, strict=True):
        is_normed = norm is not None and scale is not None
        undone.append(reference.NormedHeads(heads, norm.weight, norm.offset, scale) if is_normed else None)
        exact_undone.append(
            reference.NormedHeads(heads.double(), norm.weight.double(), norm.offset, scale.double())
            if is_normed
            else None
        )
    exact_rows = torch.empty(T, width, dtype=torch.float64, device=qkv.device)
    wides = (gradient.double() for gradient in gradients)
    reference.rotate_heads_backward(*wides, cos.double(), sin.double(), exact_rows, *exact_undone)
    before = wide_out.clone()
    fused.rotate_heads_backward(*gradients, cos, sin, into, *undone)
    exact_heads = exact_rows.unflatten(1, (-1, d))
    assert_rounded_once(into.unflatten(1, (-1, d)), exact_heads, row_magnitude(exact_heads))
    assert torch.equal(wide_out[:, :8], before[:, :8]) and torch.equal(wide_out[:, -16:], before[:, -16:])


def check_gate(inputs: Inputs, T: int, F: int, *, activation: str, in_place: bool, apart: int) -> None:
    """Forward and backward, with gates from -100 to 100 in every row that has room for them."""
    gate_up, grad = inputs.rows(T, 2 * F, seed=0, apart=apart), inputs.rows(T, F, seed=1, apart=apart)
    extremes = torch.tensor([-100.0, 100.0, -30.0, 30.0, -9.0, 9.0, 0.0, -0.0], device=grad.device)[:F]
    gate_up[:, : len(extremes)] = extremes.to(inputs.dtype)
    gates, up = gate_up.double().chunk(2, dim=1)
    exact = torch.empty(T, F, dtype=torch.float64, device=grad.device)
    exact_gradients = torch.empty(T, 2 * F, dtype=torch.float64, device=grad.device)
    reference.gate(gate_up.double(), activation, exact)
    out = inputs.rows(T, F, seed=2, apart=apart)
    fused.gate(gate_up, activation, out)
    assert_rounded_once(out, exact, exact.abs() + VANISHED)

    exact_product = torch.empty_like(exact)
    reference.gate_backward(grad.double(), gate_up.double(), activation, exact_gradients, exact_product)
    sizes = torch.cat((grad.double() * up, grad.double() * gates), dim=1).abs()
    gradients = gate_up if in_place else inputs.rows(T, 2 * F, seed=3, apart=apart)
    product = grad if in_place else inputs.rows(T, F, seed=4, apart=apart)
    fused.gate_backward(grad, gate_up, activation, gradients, product)
    assert_rounded_once(gradients, exact_gradients, sizes)
    assert_rounded_once(product, exact_product, exact_product.abs() + VANISHED)


def check_gate_updated(
    inputs: Inputs,
    T: int,
    F: int,
    ranks: tuple[int, int],
    next_rank: int,
    *,
    activation: str,
    in_place: bool,
    is_updated: bool = False,
) -> None:
    """Forward and backward, with LoRA around the gates: either half, both, or neither, and with or without what follows."""
    gate_up, grad = inputs.rows(T, 2 * F, seed=0), inputs.rows(T, F, seed=1)
    R = sum(ranks)
    B = inputs.rows(2 * F, R, seed=3)
    B[:F, ranks[0] :] = 0
    B[F:, : ranks[0]] = 0
    update = reference.Update(inputs.rows(T, R, seed=2), B, ranks)
    reduction = (
        reference.Reduction(inputs.rows(T, next_rank, seed=4), inputs.rows(next_rank, F, seed=5)) if next_rank else None
    )
    A = None if reduction is None else reduction.A
    exact_update = reference.Update(update.reduced.double(), B.double(), ranks)
    exact = torch.empty(T, F, dtype=torch.float64, device=grad.device)
    if is_updated:  # the gates hold their update
        update, exact_update = update._replace(B=None), exact_update._replace(B=None)
    reference.gate_updated(gate_up.double(), exact_update, activation, exact)
    sizes = gate_up.double().abs()
    if not is_updated:
        sizes += update.reduced.double().abs() @ B.double().abs().t()
    gate_size, up_size = sizes.chunk(2, dim=1)
    out = inputs.rows(T, F, seed=6)
    wide = inputs.rows(T, next_rank + 3, seed=9)
    room, beside = (None if A is None else wide[:, :next_rank]), wide[:, next_rank:].clone()
    reduced = fused.gate_updated(gate_up, update, activation, out, A, room)
    is_high = max(*ranks, next_rank) > fused_gate.MOST_RANKS  # there the updated gates are rounded on the way
    slack = 1.0 + (torch.finfo(grad.dtype).eps / NOISE if is_high else 0.0)
    assert_rounded_once(out, exact, slack * gate_size * up_size)
    assert (reduced is None) == (A is None)
    if reduced is not None and A is not None:  # of the product as it was rounded
        assert_close_to_sum(reduced, out, A.t(), slack)
        assert torch.equal(wide[:, :next_rank], reduced)
    assert torch.equal(wide[:, next_rank:], beside)

    exact_gradients = torch.empty(T, 2 * F, dtype=torch.float64, device=grad.device)
    exact_reduction = None if reduction is None else reference.Reduction(*(part.double() for part in reduction))
    reference.gate_updated_backward(
        grad.double(), gate_up.double(), exact_update, activation, exact_gradients, exact_reduction
    )
    grad_size = grad.double().abs()
    if reduction is not None:
        grad_size = grad_size + reduction.grad_reduced.double().abs() @ reduction.A.double().abs()
    magnitude = torch.cat((grad_size * up_size * (1 + gate_size), grad_size * (1 + gate_size)), dim=1)
    gradients = gate_up if in_place else inputs.rows(T, 2 * F, seed=7)
    product = grad if in_place else inputs.rows(T, F, seed=8)
    all_B, all_A = fused.gate_updated_backward(grad, gate_up, update, activation, gradients, reduction, product)
    assert_rounded_once(gradients, exact_gradients, slack * magnitude)
    assert torch.equal(product, out)
    all_B, all_A = (parts.sum(dim=0) if parts is not None and parts.dim() == 3 else parts for parts in (all_B, all_A))
    assert all_B is not None and all_B.shape == B.shape and (all_A is None) == (reduction is None)
    gate_rank = ranks[0]
    assert_close_to_sum(all_B[:F, :gate_rank], gradients[:, :F].t(), update.reduced[:, :gate_rank], slack)
    assert_close_to_sum(all_B[F:, gate_rank:], gradients[:, F:].t(), update.reduced[:, gate_rank:], slack)
    assert not bool(all_B[:F, gate_rank:].any()) and not bool(all_B[F:, :gate_rank].any())
    if all_A is not None and reduction is not None:
        assert_close_to_sum(all_A, reduction.grad_reduced.t(), out, slack)


def assert_close_to_sum(ours: Tensor, left: Tensor, right: Tensor, slack: float) -> None:
    """`ours` is left right, summed in float32 and rounded once."""
    exact = left.double() @ right.double()
    assert_rounded_once(ours, exact, slack * (left.double().abs() @ right.double().abs()))


def check_add_product(inputs: Inputs, T: int, columns: int, R: int, *, apart: int) -> None:
    """Added to columns of wider rows; the factors are slices of wider matrices, too."""
    wide = inputs.rows(T, columns + 9, seed=0, apart=apart)
    left, right = inputs.rows(T, R, seed=1, apart=apart), inputs.rows(R, columns, seed=2, apart=apart)
    before = wide.clone()
    exact = before[:, 4:-5].double()
    reference.add_product(exact, left.double(), right.double())
    terms = before[:, 4:-5].double().abs() + left.double().abs() @ right.double().abs()
    fused.add_product(wide[:, 4:-5], left, right)
    assert_rounded_once(wide[:, 4:-5], exact, terms)
    assert torch.equal(wide[:, :4], before[:, :4]) and torch.equal(wide[:, -5:], before[:, -5:])
    residual = inputs.rows(T, columns, seed=3)
    again = before[:, 4:-5].clone()
    fused.add_product(again, left, right.t().contiguous().t(), residual)
    assert_rounded_once(again, exact + residual.double(), terms + residual.double().abs())


def check_factor_gradients(
    inputs: Inputs, T: int, of_A: tuple[int, int] | None, of_B: tuple[int, int] | None, *, scaled: bool, apart: int
) -> None:
    """With ranks and columns of each; parts add up to the sums over tokens of the factors as they were rounded."""

    def outer(sizes: tuple[int, int] | None, seed: int, scale: Tensor | None) -> reference.Outer | None:
        if sizes is None:
            return None
        few, many = (inputs.rows(T, size, seed=seed + place, apart=apart) for place, size in enumerate(sizes))
        return reference.Outer(few, many, scale)

    scale = Inputs(inputs.device, torch.float32).vector(T, seed=4) if scaled else None
    outers = outer(of_A, 0, scale), outer(of_B, 2, None)
    is_high = any(outer is not None and outer.few.shape[1] > fused_factors.MOST_RANKS for outer in outers)
    slack = 1.0 + (torch.finfo(inputs.dtype).eps / NOISE if is_high else 0.0)  # there sums may be rounded on the way
    found = fused.factor_gradients(*outers)
    with patch.object(fused_factors, "PROGRAMS", 2):  # several tiles for each
        for made, again in zip(found, fused.factor_gradients(*outers), strict=True):
            if made is not None and again is not None:
                totals = [parts.sum(dim=0) if parts.dim() == 3 else parts for parts in (made, again)]
                torch.testing.assert_close(*totals, rtol=1e-4, atol=1e-4 * float(totals[0].abs().max()))
    turned = [outer and outer._replace(many=outer.many.t().contiguous().t()) for outer in outers]
    for made, again in zip(found, fused.factor_gradients(*turned), strict=True):
        assert made is again is None or is_high or torch.equal(made, again)
    for made, asked, is_A in zip(found, outers, (True, False), strict=True):
        assert (made is None) == (asked is None)
        if made is None or asked is None:
            continue
        few = asked.few if asked.scale is None else (asked.few.float() * asked.scale[:, None]).to(inputs.dtype)
        total = made.sum(dim=0) if made.dim() == 3 else made
        assert_close_to_sum(total, *((few.t(), asked.many) if is_A else (asked.many.t(), few)), slack)


def check_copy_rows(inputs: Inputs, T: int, R: int) -> None:
    """A few columns of wide rows; those beside them stay as they are."""
    source, wide = inputs.rows(T, R, seed=0), inputs.rows(T, R + 9, seed=1)
    before = wide.clone()
    fused.copy_rows(source, wide[:, 4 : 4 + R])
    assert torch.equal(wide[:, 4 : 4 + R], source)
    assert torch.equal(wide[:, :4], before[:, :4]) and torch.equal(wide[:, 4 + R :], before[:, 4 + R :])


FACTORS = [(1, 33), (8, 100), (3, 4100), (200, 7)]
"""Shapes of factors, one of more than a program's block."""


def check_gather(inputs: Inputs) -> None:
    """Factors in float32, wherever they lie, into columns of wider matrices of `inputs.dtype`, each times a number."""
    sources = [Inputs(inputs.device, torch.float32).rows(*shape, seed=seed) for seed, shape in enumerate(FACTORS)]
    wide = [inputs.rows(rows, columns + 24, seed=seed) for seed, (rows, columns) in enumerate(FACTORS)]
    scalings = [1.0, 2.0, 0.3, -7.0]
    places = [place[:, 8:-16] for place in wide]
    gather = transfer.Gather([transfer.Piece(*piece) for piece in zip(sources, places, scalings, strict=True)])
    for _ in range(2):
        before = [place.clone() for place in wide]
        gather.copy()
        for source, place, whole, old, scaling in zip(sources, places, wide, before, scalings, strict=True):
            exact = source.double() * scaling
            assert_rounded_once(place, exact, exact.abs())
            assert torch.equal(whole[:, :8], old[:, :8]) and torch.equal(whole[:, -16:], old[:, -16:])
        for source in sources:  # an optimizer's step changes them where they are
            source.mul_(-1.5)
    assert gather.is_current()
    sources[1].data = sources[1].clone()
    assert not gather.is_current()


def check_accumulate(inputs: Inputs, I: int, members: list[tuple[int, int]], *, column_factor: bool) -> None:  # noqa: E741
    """Gradients of layers with (outputs, rank) each, cut out of the two products of all of them, added to what is there."""
    R, O = sum(rank for _, rank in members), sum(outputs for outputs, _ in members)  # noqa: E741
    all_A, all_B = (inputs.rows(*shape, seed=seed).contiguous() for seed, shape in enumerate([(R, I), (O, R)]))
    factor = inputs.vector(I, seed=2) if column_factor else None
    offset, scalings = 1.0, [2.0, 0.3, -1.0]
    whole_A = all_A.double() if factor is None else all_A.double() * (offset + factor.double())
    as_float32 = Inputs(inputs.device, torch.float32)
    shares, exact, output, start = [], [], 0, 0
    for number, ((outputs, rank), scaling) in enumerate(zip(members, scalings, strict=False)):
        if rank:
            of_A, of_B = (
                as_float32.rows(*shape, seed=3 + number).contiguous() for shape in ((rank, I), (outputs, rank))
            )
            exact.append(of_A.double() + whole_A[start : start + rank])
            exact.append(of_B.double() + scaling * all_B.double()[output : output + outputs, start : start + rank])
            shares.append(transfer.Share(True, start * I, I, of_A, 1.0))
            shares.append(transfer.Share(False, output * R + start, R, of_B, scaling))
        output, start = output + outputs, start + rank
    before = [share.total.clone() for share in shares]
    accumulate = transfer.Accumulate(shares)
    accumulate.add(all_A, all_B, factor, offset)
    for share, expected in zip(shares, exact, strict=True):
        assert_rounded_once(share.total, expected, expected.abs() + 10.0)
    for share, total in zip(shares, before, strict=True):
        share.total.copy_(total)
    more = [1.0, 2.0, -2.0, 0.5, -0.5, 4.0, -4.0]  # than are under way at a time
    parts_A, parts_B = (torch.stack([part * product for part in more]) for product in (all_A, all_B))
    accumulate.add(parts_A, parts_B[:1], factor, offset)
    for share, expected in zip(shares, exact, strict=True):
        assert_rounded_once(share.total, expected, 14 * expected.abs() + 10.0)
    for share, total in zip(shares, before, strict=True):
        share.total.copy_(total)
    accumulate.add(parts_A[:3], parts_B, factor, offset)
    for share, expected in zip(shares, exact, strict=True):
        assert_rounded_once(share.total, expected, 14 * expected.abs() + 10.0)


def check_drop(inputs: Inputs, T: int, F: int) -> None:
    """As many as asked for are dropped, the others grow; the same seed and stream drop the same, others do not."""
    x, wide = inputs.rows(T, F, seed=0) + 3.0, inputs.rows(T, F + 8, seed=1)
    seed, out = torch.tensor([12345], device=inputs.device), wide[:, :F]
    fused.drop(x, seed, 2, 0.25, out)
    is_dropped = out == 0
    assert abs(float(is_dropped.float().mean()) - 0.25) < 4 * (0.1875 / (T * F)) ** 0.5
    torch.testing.assert_close(out[~is_dropped], (x.float() / 0.75).to(x.dtype)[~is_dropped], rtol=1e-2, atol=0)
    again, other, later = (torch.empty_like(x) for _ in range(3))
    fused.drop(x, seed, 2, 0.25, again)
    fused.drop(x, seed, 3, 0.25, other)
    fused.drop(x, seed + 1, 2, 0.25, later)
    assert torch.equal(again, out)
    for different in (other, later):
        agreement = float(((different == 0) & is_dropped).float().mean())
        assert abs(agreement - 0.0625) < 5 * (0.06 / (T * F)) ** 0.5
