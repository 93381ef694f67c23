"""Causal attention inside the segments of one packed row, never between them.

Samples lie one behind the other in a row of T tokens; `Segments` says where each begins. Four kernels compute the
same thing:

- "fused": our own (`fused_attention`), for segments as short as those of training data are. CUDA, half precision; no
  dropout, heads of at most 256.
- "varlen": torch's variable-length flash attention, where ours cannot be. No logit cap, attention sinks or dropout.
- "flex": torch's flex attention, compiled, for CUDA models that cap their attention logits.
- "per_sequence": scaled dot-product attention, one call per segment. Everywhere, and exact for everything.

Legend: T tokens of the row, L tokens of a segment, H heads, K key/value heads, D head size.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from etude.errors import ModelError
from etude.kernels.availability import triton_is_there

PER_SEQUENCE, FUSED, VARLEN, FLEX = "per_sequence", "fused", "varlen", "flex"

FIXED_SHAPES = (FUSED, VARLEN)
"""Kernels whose work is the same whatever lengths are in a row: what a CUDA graph can be captured of."""

FUSED_SIZE_MAX = 256
"""Head sizes up to which our own kernel's tiles fit the registers of a multiprocessor."""

FUSED_PLACE_MAX = 2**31 - 1
"""Our own kernel counts in 32 bits: rows of 131,072 tokens with 128 heads of 128 go to torch's."""

BATCHED_SIZE_MIN = 65
"""Head size from which torch's kernel for a batch of even samples is faster than ours (an H100, d of 64 and 128)."""

CPU_SCORES_MAX = 2**20
"""H * L * L up to which a CPU attends with two matrix products, which take half the time of its flash kernel (measured at
H=4, K=1, D=256, forward and backward, L of 40 to 512) but keep the weights: 2 MiB of them at most."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Where the samples of a packed row lie, and which kernel attends over them."""

    cu_seqlens: Tensor
    """First token of every segment and the end of the last: N + 1 numbers, int32, on the model's device."""
    lengths: tuple[int, ...]
    max_length: int
    kernel: str = PER_SEQUENCE
    windows_seen: list[int | None] | None = None
    """A list here receives the sliding window of every attention call: what a probe asks for."""
    equal_length: int | None = None
    """The length of all samples, where they are to be attended as a batch: its kernel is faster, and made for each shape."""
    block_masks: dict[int | None, Any] = field(default_factory=dict)
    """The block masks of flex attention by window, shared by the layers of one forward."""
    tiles: Tensor | None = None
    """How our own kernel cuts the row (`fused_attention.cut`)."""


@dataclass(frozen=True)
class AttentionRule:
    """What a layer asks for besides causal attention."""

    scaling: float | None = None
    sliding_window: int | None = None
    """Keys a query sees, itself included."""
    softcap: float | None = None
    """Attention logits become softcap * tanh(logits / softcap)."""
    sinks: Tensor | None = None
    """(H): one learned logit per head that takes part in the softmax and has no value."""
    dropout: float = 0.0


def kernels_for(device: torch.device, dtype: torch.dtype) -> tuple[str, ...]:
    """Kernels worth trying, the fastest first."""
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        return *((FUSED,) if triton_is_there() else ()), VARLEN, FLEX, PER_SEQUENCE
    return (PER_SEQUENCE,)


def segment_attention(query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: AttentionRule) -> Tensor:
    """Attend inside every segment: query (1, H, T, D), key and value (1, K, T, D) -> (1, T, H, D).

    Raises:
        ModelError: the kernel in `segments` cannot do what `rule` asks for.
    """
    query, key, value = as_autocast(query, key, value)
    return _KERNELS[segments.kernel](query, key, value, segments, rule)


def as_autocast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What autocast does to the operands of SDPA it does not do for custom operators."""
    device_type = query.device.type
    if not torch.is_autocast_enabled(device_type):
        return query, key, value
    dtype = torch.get_autocast_dtype(device_type)
    return query.to(dtype), key.to(dtype), value.to(dtype)


# -- fused ------------------------------------------------------------------------------------------------------------


def fused_segments(
    cu_seqlens: Tensor, lengths: tuple[int, ...], num_tokens: int, max_length: int, **given: Any
) -> Segments:
    """Segments for our own kernel."""
    from etude.kernels.fused_attention import cut

    return Segments(cu_seqlens, lengths, max_length, FUSED, tiles=cut(cu_seqlens, num_tokens), **given)


def _fused(query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: AttentionRule) -> Tensor:
    size = query.shape[3]
    if rule.dropout > 0.0 or size > FUSED_SIZE_MAX:
        raise ModelError(f"fused attention is without dropout, and for heads of at most {FUSED_SIZE_MAX}")
    if rule.sinks is not None and rule.sinks.requires_grad:
        raise ModelError("fused attention is without a gradient for attention sinks")
    if segments.windows_seen is not None and segments.windows_seen.count(rule.sliding_window) <= 1:
        _rehearse(query, key, value, segments, rule)
    window = rule.sliding_window if rule.sliding_window is not None and rule.sliding_window < segments.max_length else 0
    is_plain = rule.softcap is None and rule.sinks is None and not window
    if segments.equal_length is not None and is_plain and size >= BATCHED_SIZE_MIN:
        return _batched(query, key, value, segments.equal_length, rule.scaling)
    if max(map(_last_place, (query, key, value))) > FUSED_PLACE_MAX:
        return _varlen(query, key, value, segments, rule)
    return _attended((query, key, value), segments, rule, window)


def _attended(heads: Sequence[Tensor], segments: Segments, rule: AttentionRule, window: int) -> Tensor:
    from etude.kernels.attention_operator import attend

    scaling = 1.0 / math.sqrt(heads[0].shape[3]) if rule.scaling is None else rule.scaling
    inputs = (tensor.squeeze(0).transpose(0, 1) for tensor in heads)
    attended_THd, _ = attend(*inputs, segments.tiles, rule.sinks, scaling, window, rule.softcap or 0.0)
    return cast(Tensor, attended_THd)[None]


def _rehearse(query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: AttentionRule) -> None:
    """Forwards and backwards, with the window that long samples meet, for the first layer of each window: a probe has
    neither, and a kernel that this GPU has no room for is to be found before the first step."""
    with torch.enable_grad(), torch.autocast(query.device.type, enabled=False):
        inputs = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        for window in sorted({0, rule.sliding_window or 0}):
            torch.autograd.grad(_attended(inputs, segments, rule, window).sum(), inputs)


def _last_place(tensor: Tensor) -> int:
    """How far its last number lies from its first."""
    return sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))


# -- varlen -----------------------------------------------------------------------------------------------------------


def _varlen(query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: AttentionRule) -> Tensor:
    if rule.softcap is not None or rule.sinks is not None or rule.dropout > 0.0:
        raise ModelError("varlen attention has no logit cap, no attention sinks and no dropout")
    return varlen_attention(query, key, value, segments, rule.scaling, rule.sliding_window)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scaling: float | None, window: int | None
) -> Tensor:
    """Flash attention over segments of any length. Of `segments` it reads only what is the same from step to step, and a
    tensor: compiled layers are not compiled anew for other lengths."""
    if segments.equal_length is not None and (window is None or window >= segments.equal_length):
        return _batched(query, key, value, segments.equal_length, scaling)
    hides_keys = window is not None and window < segments.max_length
    offsets = segments.cu_seqlens
    query_THD, key_TKD, value_TKD = (tensor.squeeze(0).transpose(0, 1) for tensor in (query, key, value))
    attended_THD = _varlen_attention()(
        query_THD,
        key_TKD,
        value_TKD,
        offsets,
        offsets,
        segments.max_length,
        segments.max_length,
        scale=scaling,
        window_size=(window - 1, 0) if window is not None and hides_keys else (-1, 0),
    )
    return attended_THD[None]


def _batched(query: Tensor, key: Tensor, value: Tensor, length: int, scaling: float | None) -> Tensor:
    """Samples of one length as a batch, by the fastest kernel that torch has for this GPU."""
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    query, key, value = (
        x.squeeze(0).view(x.shape[1], -1, length, x.shape[3]).transpose(0, 1) for x in (query, key, value)
    )
    has_groups = query.shape[1] != key.shape[1]
    with sdpa_kernel(backends, set_priority=True):
        attended_NHLd = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=has_groups
        )
    return attended_NHLd.transpose(1, 2).flatten(0, 1)[None]


@functools.cache
def _varlen_attention() -> Callable[..., Tensor]:
    """torch's function with grouped heads allowed: newer torch wants that announced, older takes them without a word."""
    from torch.nn.attention.varlen import varlen_attn

    announced = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
    return functools.partial(cast(Callable[..., Tensor], varlen_attn), **announced)


# -- flex -------------------------------------------------------------------------------------------------------------


def _flex(query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: AttentionRule) -> Tensor:
    if rule.sinks is not None or rule.dropout > 0.0:
        raise ModelError("flex attention is used here without attention sinks and without dropout")
    softcap = rule.softcap

    def cap(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return score if softcap is None else softcap * torch.tanh(score / softcap)

    attended_HTD: Tensor = _compiled_flex_attention()(
        query,
        key,
        value,
        score_mod=None if softcap is None else cap,
        block_mask=_block_mask(segments, rule.sliding_window, query.device),
        scale=rule.scaling,
        enable_gqa=key.shape[1] != query.shape[1],
    )
    return attended_HTD.transpose(1, 2)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)  # eager flex attention would materialise T x T scores


def _block_mask(segments: Segments, window: int | None, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    if window is not None and window >= segments.max_length:
        window = None
    if window not in segments.block_masks:
        num_tokens = sum(segments.lengths)
        lengths = segments.cu_seqlens.diff().to(device)
        segment_of_T = torch.arange(len(segments.lengths), device=device).repeat_interleave(
            lengths, output_size=num_tokens
        )

        def visible(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
            seen = (segment_of_T[q] == segment_of_T[k]) & (k <= q)
            return seen if window is None else seen & (q - k < window)

        segments.block_masks[window] = create_block_mask(visible, None, None, num_tokens, num_tokens, device=device)
    return segments.block_masks[window]


# -- per sequence -----------------------------------------------------------------------------------------------------


def _per_sequence(query: Tensor, key: Tensor, value: Tensor, segments: Segments, rule: AttentionRule) -> Tensor:
    # `split_with_sizes` has one backward for all segments; slicing would fill a zero row of T tokens for each of them.
    lengths = list(segments.lengths)
    parts = zip(
        query.split_with_sizes(lengths, 2),
        key.split_with_sizes(lengths, 2),
        value.split_with_sizes(lengths, 2),
        strict=True,
    )
    return torch.cat([_kernel_of(q, rule)(q, k, v, rule).transpose(1, 2) for q, k, v in parts], dim=1)


def _kernel_of(query: Tensor, rule: AttentionRule) -> Callable[[Tensor, Tensor, Tensor, AttentionRule], Tensor]:
    if rule.softcap is not None or rule.sinks is not None:
        return _explicit_attention
    num_scores = query.shape[1] * query.shape[2] ** 2
    in_bfloat16 = query.device.type == "cpu" and query.dtype == torch.bfloat16
    return _products if in_bfloat16 and rule.dropout == 0.0 and num_scores <= CPU_SCORES_MAX else _sdpa


def _sdpa(query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
    length, window = query.shape[2], rule.sliding_window
    mask = _band(length, window, query.device) if window is not None and window < length else None
    # With `enable_gqa` the CPU leaves its flash kernel: 3.6 times slower, measured at H=4, K=1, L=200, D=256.
    on_cpu = query.device.type == "cpu"
    if on_cpu:
        key, value = _repeat_heads(key, query.shape[1]), _repeat_heads(value, query.shape[1])
    return functional.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=mask,
        dropout_p=rule.dropout,
        is_causal=mask is None,
        scale=rule.scaling,
        enable_gqa=not on_cpu and key.shape[1] != query.shape[1],
    )


def _products(query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
    scaling = 1.0 / math.sqrt(query.shape[3]) if rule.scaling is None else rule.scaling
    attended: Tensor = _Products.apply(query, key, value, scaling, rule.sliding_window)  # type: ignore[no-untyped-call]
    return attended


class _Products(torch.autograd.Function):
    """softmax(q k^T * scaling + band) v, the query heads of a key head stacked: G heads of L rows are one product.

    Its gradients (Vaswani et al., arXiv 1706.03762, equation 1): with p the weights and dp = do v^T,
    ds = p * (dp - sum(p * dp)) * scaling, dq = ds k, dk = ds^T q, dv = p^T do.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, window: int | None) -> Tensor:
        (_, num_heads, length, size), num_kv_heads = query.shape, key.shape[1]
        with torch.autocast(query.device.type, enabled=False):
            query_KRd = query.reshape(num_kv_heads, -1, size)
            scores_HLL = torch.matmul(query_KRd, key[0].transpose(1, 2)).view(num_heads, length, length)
            hidden = ~_band(length, length if window is None else window, query.device)
            band = torch.zeros(length, length, dtype=query.dtype).masked_fill_(hidden, float("-inf"))
            weights_HLL = torch.softmax(torch.add(band, scores_HLL, alpha=scaling, out=scores_HLL), dim=-1)
            attended_KRd = torch.matmul(weights_HLL.view(num_kv_heads, -1, length), value[0])
        ctx.save_for_backward(query_KRd, key, value, weights_HLL)
        ctx.scaling = scaling
        return attended_KRd.view(query.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query_KRd, key, value, weights_HLL = ctx.saved_tensors
        gradient_KRd, weights_KRL = gradient.reshape(query_KRd.shape), weights_HLL.view(*query_KRd.shape[:2], -1)
        with torch.autocast(gradient.device.type, enabled=False):
            value_gradient = torch.matmul(weights_KRL.transpose(1, 2), gradient_KRd)
            weights_gradient = torch.matmul(gradient_KRd, value[0].transpose(1, 2))
            scores_gradient = torch._softmax_backward_data(weights_gradient, weights_KRL, -1, weights_KRL.dtype)
            scores_gradient.mul_(ctx.scaling)
            query_gradient = torch.matmul(scores_gradient, key[0]).view(gradient.shape)
            key_gradient = torch.matmul(scores_gradient.transpose(1, 2), query_KRd)
        return query_gradient, key_gradient[None], value_gradient[None], None, None


def _explicit_attention(query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule) -> Tensor:
    """Attention written out, with its softmax in float32, for what SDPA cannot express."""
    num_heads, length = query.shape[1], query.shape[2]
    key, value = _repeat_heads(key, num_heads), _repeat_heads(value, num_heads)
    scaling = 1.0 / math.sqrt(query.shape[3]) if rule.scaling is None else rule.scaling
    scores = query @ key.transpose(2, 3) * scaling
    if rule.softcap is not None:
        scores = torch.tanh(scores / rule.softcap) * rule.softcap
    window = length if rule.sliding_window is None else rule.sliding_window
    scores = scores.masked_fill(~_band(length, window, query.device), float("-inf"))
    softmax_dtype = torch.promote_types(scores.dtype, torch.float32)
    if rule.sinks is not None:
        sinks = rule.sinks.to(scores.dtype).view(1, num_heads, 1, 1).expand(1, num_heads, length, 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = torch.softmax(scores, dim=-1, dtype=softmax_dtype)[..., :length].to(value.dtype)
    return functional.dropout(weights, p=rule.dropout) @ value


def _band(length: int, window: int, device: torch.device) -> Tensor:
    """(L, L), True where a query sees a key: not after it, and fewer than `window` tokens before it."""
    position = torch.arange(length, device=device)
    distance = position[:, None] - position[None, :]
    return (distance >= 0) & (distance < window)


def _repeat_heads(tensor: Tensor, num_heads: int) -> Tensor:
    """(1, K, L, D) -> (1, H, L, D): every key/value head serves H / K query heads, neighbours first."""
    batch, num_kv_heads, length, size = tensor.shape
    if num_kv_heads == num_heads:
        return tensor
    repeated = tensor[:, :, None].expand(batch, num_kv_heads, num_heads // num_kv_heads, length, size)
    return repeated.reshape(batch, num_heads, length, size)


_Kernel = Callable[[Tensor, Tensor, Tensor, Segments, AttentionRule], Tensor]
_KERNELS: dict[str, _Kernel] = {PER_SEQUENCE: _per_sequence, FUSED: _fused, VARLEN: _varlen, FLEX: _flex}
