"""Frozen products in 8-bit floating point (e4m3: 4 bits of exponent, 3 of mantissa), at twice the rate of bfloat16.

    x W^T ~ diag(s_x) (codes(x) codes(W)^T) diag(s_W),        codes(x) = round(x / s_x), s_x = max |x| / 448 of each row

A frozen weight is rounded once, and its transpose too, as the hardware multiplies rows with rows only; activations and
gradients are rounded row by row on their way, so no sample sees another's scale. Sums are float32. Rounding to three bits
of mantissa is 2 to 3% of every number, independent of its neighbours: about 4% of a product's norm. The adapters stay as
they are: x A^T and the update are computed in bfloat16 from the activations before they were rounded.

Source: Micikevicius et al., FP8 formats for deep learning, arXiv 2209.05433. Functions without a class are the reference
of `fused_fp8`. Legend: T tokens, I input size, O output size, D row length, F width of the gated layer.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from etude.kernels import reference
from etude.kernels.projection import Adapter, Drop, Projection
from etude.kernels.reference import Update

FP8 = "fp8"
LARGEST = 448.0
"""The largest number of e4m3."""

SMALLEST_ROW = 1e-30
"""A row whose largest number is below this counts as zero: its scale stays a normal float32."""

MULTIPLE = 16
"""Sizes of the products are multiples of 16, as the hardware's are."""

ROUNDING = 0.2
"""Largest difference of a layer from the one in bfloat16, of output and gradients, relative to their norm.

Three bits of mantissa round a number by 2.6% in the root mean square, two operands by 3.7%, and a gradient comes through
up to eight products in a row: 10%, twice as much where few large numbers carry the norm. Seen so far: 12%, on random
weights and on those of a Gemma 3. A wrong scale or a wrong operand is off by all of it."""


class Quantised(NamedTuple):
    """Rows of e4m3 numbers with a scale each. Rows beyond those asked for fill up to 16 and hold anything."""

    codes: Tensor
    """(T, D), float8_e4m3fn"""
    scales: Tensor
    """(T, 1), float32"""

    @classmethod
    def empty(cls, num_rows: int, size: int, device: torch.device) -> Quantised:
        num_rows = -(-num_rows // MULTIPLE) * MULTIPLE
        return cls(
            torch.empty(num_rows, size, dtype=torch.float8_e4m3fn, device=device),
            torch.empty(num_rows, 1, dtype=torch.float32, device=device),
        )


def quantise_rows(x_TD: Tensor) -> Quantised:
    """x in e4m3, with the scale of each row. Rows with a NaN or an infinity give products that are NaN."""
    quantised = Quantised.empty(x_TD.shape[0], x_TD.shape[1], x_TD.device)
    wide = x_TD.float()
    largest = wide.abs().amax(dim=1, keepdim=True).clamp_min(SMALLEST_ROW)
    quantised.codes[: x_TD.shape[0]] = (wide * (LARGEST / largest)).to(torch.float8_e4m3fn)
    quantised.scales[: x_TD.shape[0]] = largest / LARGEST
    return quantised


def rms_norm_quantised(
    h_TD: Tensor, weight_D: Tensor, offset: float, eps: float, out_TD: Tensor
) -> tuple[Quantised, Tensor]:
    """`reference.rms_norm`, and `quantise_rows` of what it wrote."""
    scale_T = reference.rms_norm(h_TD, weight_D, offset, eps, out_TD)
    return quantise_rows(out_TD), scale_T


def scaled_product(x: Quantised, weight: Quantised, num_rows: int, dtype: torch.dtype) -> Tensor:
    """x W^T (T, O) in `dtype`."""
    y: Tensor = torch._scaled_mm(
        x.codes, weight.codes.t(), scale_a=x.scales, scale_b=weight.scales.t(), out_dtype=dtype, use_fast_accum=True
    )
    return y[:num_rows]


def operations(device: torch.device) -> ModuleType:
    """The fused kernels on a GPU, plain torch elsewhere: the same functions."""
    return importlib.import_module("etude.kernels.fused_fp8" if device.type == "cuda" else "etude.kernels.fp8")


def device_obstacle(device: torch.device) -> str | None:
    """Why this device has no products in fp8; None where it has."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"fp8 products need an NVIDIA GPU, this run is on {device.type if torch.version.hip is None else 'ROCm'}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < (8, 9):
        name = torch.cuda.get_device_name(device)
        return f"{name} has no fp8 products: compute capability {major}.{minor}, they need 8.9 (Ada, Hopper or later)"
    return None


def layer_obstacle(linears: list[nn.Linear], dtype: torch.dtype) -> str | None:
    """Why linear layers that compute in `dtype` cannot have a base in fp8; None where they can."""
    if dtype != torch.bfloat16:
        return f"an fp8 base trains in bfloat16 (bf16=True), not in {str(dtype).removeprefix('torch.')}"
    odd = {size for linear in linears for size in (linear.in_features, linear.out_features) if size % MULTIPLE}
    return f"sizes that are no multiples of {MULTIPLE} ({', '.join(map(str, sorted(odd)))})" if odd else None


class Input(NamedTuple):
    """What a projection multiplies: for the adapter as it is, for the frozen product in e4m3."""

    wide: Tensor
    quantised: Quantised


class Fp8Projection(Projection):
    """A projection whose frozen products are in fp8.

    The layers keep their weights as they are: evaluation, generation and saving use those.
    """

    rounding = ROUNDING
    note = "frozen products in fp8; the weights in bfloat16 stay beside them, for evaluation and saving"

    def __init__(
        self,
        linears: list[nn.Linear],
        adapters: list[Adapter | None],
        dtype: torch.dtype,
        *,
        defers_update: bool = False,
    ) -> None:
        super().__init__(linears, adapters, dtype, defers_update=defers_update)

    def _store(self) -> Tensor:
        weight = self.matrix()
        quantise = operations(self.device).quantise_rows
        self.weight_codes: Quantised = quantise(weight)
        self.transposed_codes: Quantised = quantise(weight.t().contiguous())
        return self._separate_factor()

    def _release(self) -> None:
        del self.weight_codes, self.transposed_codes

    def norm_input(
        self, h: Tensor, weight: Tensor, offset: float, eps: float, drop: Drop | None = None
    ) -> tuple[Any, Tensor, Tensor | None]:
        wide = self.input_buffer(h.shape[0])
        quantised, scale_T = operations(h.device).rms_norm_quantised(h, weight, offset, eps, wide)
        return Input(wide, quantised), scale_T, None

    def gate_input(
        self, gate_up: Tensor, update: Update, activation: str, drop: Drop | None = None
    ) -> tuple[Any, Tensor]:
        wide, reduced = super().gate_input(gate_up, update, activation, drop)
        return Input(wide, operations(wide.device).quantise_rows(wide)), reduced

    def reduce(self, x: Any, drop: Drop | None = None) -> Tensor:
        return super().reduce(x.wide if isinstance(x, Input) else x, drop)

    def matrix(self) -> Tensor:
        """W (O, I) in the type it is in elsewhere, before it was rounded."""
        return torch.cat([linear.weight.detach() for linear in self.layers])

    def _product(self, x: Any, out: Tensor | None = None) -> Tensor:
        quantised = x.quantised if isinstance(x, Input) else operations(x.device).quantise_rows(x)
        num_rows = x.wide.shape[0] if isinstance(x, Input) else x.shape[0]
        y = scaled_product(quantised, self.weight_codes, num_rows, self.dtype)
        return y if out is None else out.copy_(y)

    def _product_gradient(self, grad: Tensor) -> Tensor:
        quantised = operations(grad.device).quantise_rows(grad)
        return scaled_product(quantised, self.transposed_codes, grad.shape[0], self.dtype)
