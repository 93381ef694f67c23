"""Frozen products of a base in 4 or 8 bits (bitsandbytes): the weights are made for each product, in a place all share.

    W = codebook[4 bits] * absmax of each 64 (Dettmers et al., QLoRA, arXiv 2305.14314), or int8 * row maximum / 127

Unpacking is bound by memory and its cost is the same for any number of tokens, so it pays to train on many at a time. The
products and the adapters are those of an unquantised base in the run's type. What bitsandbytes computes for 8-bit layers
rounds the activations to 8 bits as well; here they are not rounded.

bitsandbytes is not imported here: whoever has such layers has it already.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from etude.kernels.projection import Adapter, Projection

FOUR_BIT, EIGHT_BIT = "4-bit", "8-bit"
LARGEST_INT8 = 127.0

ROUNDING_OF_ACTIVATIONS = 5e-2
"""Largest difference of a layer from bitsandbytes' own 8-bit one, relative to the norm: that one rounds activations."""


def quantized_kind(linear: Any) -> str | None:
    """ "4-bit" or "8-bit" for a linear layer of bitsandbytes, None for any other."""
    package: Any = sys.modules.get("bitsandbytes")
    if package is None:
        return None
    if isinstance(linear, package.nn.Linear4bit):
        return FOUR_BIT
    return EIGHT_BIT if isinstance(linear, package.nn.Linear8bitLt) else None


def is_quantized_lora(module: Any) -> bool:
    """Whether a module is peft's LoRA layer around a layer of bitsandbytes."""
    peft_layers: Any = sys.modules.get("peft.tuners.lora.bnb")
    names = ("Linear4bit", "Linear8bitLt")
    return any(type(module) is getattr(peft_layers, name, None) for name in names)


def quantized_obstacle(linear: Any, dtype: torch.dtype) -> str | None:
    """Why the weights of a layer of bitsandbytes cannot be made in `dtype`; None where they can."""
    kind = quantized_kind(linear)
    if kind == FOUR_BIT:
        if getattr(linear.weight, "quant_state", None) is None:
            return "4-bit weights that have not been quantised yet"
        if linear.compute_dtype not in (None, dtype):
            return f"4-bit weights that compute in {str(linear.compute_dtype).removeprefix('torch.')}"
        if linear.weight.device.type == "cpu" and getattr(linear, "support_avx512bf16_for_cpu", False):
            return "4-bit weights that change their format when they are evaluated on this processor"
    elif kind == EIGHT_BIT:
        if linear.state.has_fp16_weights or linear.weight.dtype != torch.int8:
            return "8-bit weights that have not been quantised yet"
        if linear.index is not None:
            return "8-bit weights in another order"
    return None


def unpacking_obstacle(linear: Any) -> str | None:
    """Why the weights of a layer of bitsandbytes cannot be made at all; None where they can."""
    return quantized_obstacle(linear, getattr(linear, "compute_dtype", None) or torch.float32)


class Workspace:
    """Memory for the weights of one projection at a time, shared by all projections of a model."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None
        self._users = 0

    def reserve(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        """Make sure of room for `size` elements; once for each user."""
        self._users += 1
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = None  # before the larger one, not beside it
            self._buffer = torch.empty(size, dtype=dtype, device=device)

    def view(self, rows: int, columns: int) -> Tensor:
        """The place of a matrix; whatever was there before is lost."""
        assert self._buffer is not None
        return self._buffer[: rows * columns].view(rows, columns)

    def release(self) -> None:
        """One user less; without any the memory is given back."""
        self._users -= 1
        if self._users == 0:
            self._buffer = None


class QuantizedProjection(Projection):
    """A projection some of whose layers are those of bitsandbytes. Nothing of them is changed."""

    def __init__(
        self,
        linears: list[nn.Linear],
        adapters: list[Adapter | None],
        dtype: torch.dtype,
        workspace: Workspace,
        *,
        defers_update: bool = False,
    ) -> None:
        super().__init__(linears, adapters, dtype, defers_update=defers_update)
        self.workspace = workspace
        kinds = [kind for linear in linears if (kind := quantized_kind(linear)) is not None]
        self.rounding = ROUNDING_OF_ACTIVATIONS if EIGHT_BIT in kinds else 0.0
        self.note = f"weights in {' and '.join(sorted(set(kinds)))} (bitsandbytes), made anew for each product"

    def _store(self) -> Tensor:
        self.workspace.reserve(self.out_features * self.in_features, self.dtype, self.device)
        return self._separate_factor()

    def _release(self) -> None:
        self.workspace.release()

    def _product(self, x: Any, out: Tensor | None = None) -> Tensor:
        return torch.mm(x, self.matrix().t(), out=out)

    def _product_gradient(self, grad: Tensor) -> Tensor:
        return torch.mm(grad, self.matrix())

    def matrix(self) -> Tensor:
        """W (O, I) in the workspace, until another projection needs it."""
        weight = self.workspace.view(self.out_features, self.in_features)
        for linear, outputs in self.layers.items():
            _unpack(linear, weight[outputs])
        return weight


def unpacked(linear: Any) -> nn.Linear:
    """A layer of bitsandbytes that has no `unpacking_obstacle` as one in float32, with the weights of its products."""
    rows, columns = linear.out_features, linear.in_features
    made = nn.Linear(columns, rows, bias=linear.bias is not None, device="meta")
    weight_OI = torch.empty(rows, columns, device=linear.weight.device)
    _unpack(linear, weight_OI)
    made.weight = nn.Parameter(weight_OI, requires_grad=False)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.detach().float(), requires_grad=False)
    return made


def _unpack(linear: Any, out: Tensor) -> None:
    """Write the weight of a layer (O, I) into `out`, whose rows lie side by side."""
    kind = quantized_kind(linear)
    if kind == FOUR_BIT:
        functional: Any = sys.modules["bitsandbytes.functional"]
        packed, state = linear.weight.data, linear.weight.quant_state
        if state.dtype == out.dtype and out.device.type == "cuda":  # elsewhere it cannot write where it is told
            functional.dequantize_4bit(packed, state, out=out)
        else:
            out.copy_(functional.dequantize_4bit(packed, state))
    elif kind == EIGHT_BIT:
        # The row maxima move from the weight to the layer's state when it first runs.
        maxima = linear.state.SCB if linear.state.SCB is not None else linear.weight.SCB
        codes = linear.state.CB if linear.state.CB is not None else linear.weight.data
        torch.mul(codes, (maxima / LARGEST_INT8)[:, None], out=out)
    else:
        out.copy_(linear.weight.detach())
