"""`fused_attention` as an operator of torch: with a gradient, and a shape that the compiler can ask for without running it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from etude.kernels import fused_attention, fused_attention_backward
from etude.kernels.fused_attention import Rule

_INPUTS = "Tensor query_THd, Tensor key_TKd, Tensor value_TKd"
_RULE = "float scaling, int window, float softcap"


@torch.library.custom_op(
    "etude::attend",
    mutates_args=(),
    schema=f"({_INPUTS}, Tensor tiles_N3, Tensor? sinks_H, {_RULE}) -> (Tensor, Tensor)",
)
def attend(
    query_THd: Tensor,
    key_TKd: Tensor,
    value_TKd: Tensor,
    tiles_N3: Tensor,
    sinks_H: Tensor | None,
    scaling: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """`fused_attention.attend`."""
    query_THd, key_TKd, value_TKd = map(_with_dense_heads, (query_THd, key_TKd, value_TKd))
    rule = Rule(scaling, window, softcap)
    return fused_attention.attend(query_THd, key_TKd, value_TKd, tiles_N3, rule, sinks_H)


@torch.library.custom_op(
    "etude::attend_backward",
    mutates_args=(),
    schema=f"(Tensor grad_THd, {_INPUTS}, Tensor attended_THd, Tensor lse_HT, Tensor tiles_N3, {_RULE})"
    " -> (Tensor, Tensor, Tensor)",
)
def attend_backward(
    grad_THd: Tensor,
    query_THd: Tensor,
    key_TKd: Tensor,
    value_TKd: Tensor,
    attended_THd: Tensor,
    lse_HT: Tensor,
    tiles_N3: Tensor,
    scaling: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`fused_attention_backward.attend_backward`."""
    grad_THd, query_THd, key_TKd, value_TKd = map(_with_dense_heads, (grad_THd, query_THd, key_TKd, value_TKd))
    rule = Rule(scaling, window, softcap)
    return fused_attention_backward.attend_backward(
        grad_THd, query_THd, key_TKd, value_TKd, attended_THd, lse_HT, tiles_N3, rule
    )


def _with_dense_heads(heads: Tensor) -> Tensor:
    return heads if heads.stride(2) == 1 else heads.contiguous()


@attend.register_fake
def _(query_THd: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    T, H, _ = query_THd.shape
    return query_THd.new_empty(query_THd.shape), query_THd.new_empty((H, T), dtype=torch.float32)


@attend_backward.register_fake
def _(grad_THd: Tensor, query_THd: Tensor, key_TKd: Tensor, value_TKd: Tensor, *others: Any) -> tuple[Tensor, ...]:
    return tuple(heads.new_empty(heads.shape) for heads in (query_THd, key_TKd, value_TKd))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query_THd, key_TKd, value_TKd, tiles_N3, _, *ctx.rule = inputs
    ctx.save_for_backward(query_THd, key_TKd, value_TKd, *output, tiles_N3)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_THd: Tensor, lse_grad: None) -> tuple[Tensor | None, ...]:
    gradients = attend_backward(grad_THd, *ctx.saved_tensors, *ctx.rule)
    return (*gradients, *(None,) * 5)


attend.register_autograd(_backward, setup_context=_keep)
