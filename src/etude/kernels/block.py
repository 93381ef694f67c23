"""A decoder layer with LoRA as four operations whose backward passes are written by hand.

    q, k, v = rotate(norm(h) W_qkv^T)        attended = attention(q, k, v)
    m = h + attended W_o^T                   y = m + (f(g) * u) W_down^T,   [g, u] = norm(m) W_gate_up^T

Every W is a frozen weight with its LoRA update (`projection`). Nothing is computed or kept that the gradient of the
adapters and of h does not ask for: norms are undone from their input, the gated product is made again, no activation is
copied to float32. For models of the Llama, Qwen and Gemma kind; which one a layer is, is found by looking at its parts,
and `plan` compares each kind with the model's own layer before it is used.

Legend: T tokens, D hidden size, H query heads, K key/value heads, d head size, F width of the gated layer.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from etude.kernels.projection import Drop, Projection, operations
from etude.kernels.reference import HeadNorm, NormedHeads, Reduction

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""q (T, H, d), k and v (T, K, d) -> (T, H d)."""


class Drops(NamedTuple):
    """The dropout of each projection in one pass; None where nothing is dropped."""

    qkv: Drop | None = None
    output: Drop | None = None
    gate_up: Drop | None = None
    down: Drop | None = None


NO_DROPS = Drops()


class Passing(NamedTuple):
    """What belongs to one pass through a layer, and is the same when the layer is run again in the backward pass."""

    attend: Attend
    drops: Drops
    only_for_backward: bool = False
    """Whether the output is known already."""


@dataclass(frozen=True)
class Norm:
    """An RMS norm: h * s * (offset + weight)."""

    weight: Tensor
    offset: float
    eps: float

    @property
    def numbers(self) -> HeadNorm:
        return HeadNorm(self.weight, self.offset, self.eps)


@dataclass(frozen=True)
class Call:
    """What a layer was called with."""

    hidden: Tensor
    """(T, D)"""
    position_embeddings: Any
    options: dict[str, Any]


@dataclass(eq=False)
class Block:
    """The parts of one decoder layer."""

    layer: nn.Module
    attention: nn.Module
    """The model's own attention module: what its attention function wants to see."""
    input_norm: Norm
    qkv: Projection
    output: Projection
    num_heads: int
    num_kv_heads: int
    head_dim: int
    gated_norm: Norm
    gate_up: Projection
    down: Projection
    activation: str
    query_norm: Norm | None = None
    key_norm: Norm | None = None
    attention_norm: Norm | None = None
    """After attention, before the residual sum (Gemma)."""
    down_norm: Norm | None = None
    """After the gated layer, before the residual sum (Gemma)."""
    keeps_gates: bool = True
    """False makes g and u again in the backward pass: two thirds of what a layer keeps, for a fifth of its time."""
    recomputes: bool = False
    """True keeps h alone and runs the layer again in the backward pass."""
    shelve: Callable[[Callable[[], Tensor], tuple[Tensor, ...]], Tensor] | None = None
    """Runs the layer and puts what it keeps, but the tensors given, on the shelf of `offload`; None keeps it here."""
    calls_seen: list[Call] | None = None
    """A list here receives what the layer is called with: what a comparison with the layer's own forward asks for."""
    is_wide: bool = False
    """Whether h and the residual sums are float32 while the products are not (a base prepared for training in few bits)."""
    projections: tuple[Projection, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.projections = (self.qkv, self.output, self.gate_up, self.down)
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
        modules = [module for module in self.layer.modules() if module is not self.layer]
        self._hooks = [
            hooks for module in modules for kind in kinds if (hooks := getattr(module, kind, None)) is not None
        ]

    def is_watched(self) -> bool:
        """Whether somebody has hooked a module inside the layer: hooks are called by the layer's own forward only."""
        return any(self._hooks)

    def bytes_per_token(self, *, keeps_gates: bool) -> tuple[int, int]:
        """What is kept of a token between forward and backward pass, and what the backward pass needs for a moment."""
        width, gates = self.qkv.in_features, self.gate_up.out_features
        queries, keys = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        of_adapters = sum(projection.kept_columns for projection in self.projections)
        made_again = self.gate_up.kept_columns if self.gate_up.keeps_product and not keeps_gates else 0
        of_adapters -= made_again
        kept = 2 * width + (queries + 2 * keys) + queries + of_adapters + (gates if keeps_gates else 0)
        if self.query_norm is not None:
            kept += queries + keys
        kept += width * ((self.attention_norm is not None) + (self.down_norm is not None))
        passing = gates + gates // 2 + 3 * width + queries + (2 * gates if self.gate_up.needs_product else 0)
        passing += made_again
        itemsize, wider = self.qkv.dtype.itemsize, self.width_bytes - width * self.qkv.dtype.itemsize
        scales = 4 * (4 + self.num_heads)
        return kept * itemsize + 2 * wider + scales, passing * itemsize + 3 * wider

    @property
    def width_bytes(self) -> int:
        """Of one token of h."""
        return self.qkv.in_features * (4 if self.is_wide else self.qkv.dtype.itemsize)

    def operations_per_token(self) -> tuple[int, int, int]:
        """Operations of the products of a forward pass, of making the gates again, and of making all but the output again."""
        forward, gates, down = (
            sum(2 * part.in_features * part.out_features for part in parts)
            for parts in (self.projections, (self.gate_up,), (self.down,))
        )
        return forward, gates, forward - down

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        past_key_values: Any = None,
        use_cache: bool | None = False,
        position_embeddings: Any = None,
        **options: Any,
    ) -> Any:
        """Stands in for the layer's forward, in its signature. Padded batches and cached ones go to the layer's own."""
        is_packed = options.get("segments") is not None and hidden_states.shape[0] == 1 and past_key_values is None
        if not is_packed or not self._takes(hidden_states) or self.is_watched():
            own: Any = type(self.layer).forward
            options |= {"attention_mask": attention_mask, "position_ids": position_ids, "use_cache": use_cache}
            options |= {"past_key_values": past_key_values, "position_embeddings": position_embeddings}
            return own(self.layer, hidden_states, **options)
        if self.calls_seen is not None:
            self.calls_seen.append(Call(hidden_states.squeeze(0).detach(), position_embeddings, options))
        # Not `hidden_states[0]`, whose gradient would be written into zeros of its own.
        return self.run(hidden_states.squeeze(0), position_embeddings, **options)[None]

    def _takes(self, hidden_states: Tensor) -> bool:
        """Whether what comes from the layer before is of the type of the products, or wider where autocast rounds it for
        them: then it stays wide, as do the residual sums."""
        device_type, dtype = hidden_states.device.type, self.qkv.dtype
        rounds = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type) == dtype
        self.is_wide = rounds and hidden_states.dtype == torch.float32 != dtype
        return self.is_wide or hidden_states.dtype == dtype

    def run(self, h_TD: Tensor, position_embeddings: Any, **options: Any) -> Tensor:
        """The layer's output (T, D); `options` are for the attention function."""
        cos, sin = (embedding[0] for embedding in position_embeddings)
        attend = self._attention(options)
        passing = Passing(attend, self._drops(h_TD.device))
        run = self._run_twice if self.recomputes and torch.is_grad_enabled() else self._run
        if self.shelve is None or not torch.is_grad_enabled():
            return run(h_TD, cos, sin, passing)
        return self.shelve(lambda: run(h_TD, cos, sin, passing), (cos, sin))

    def _run_twice(self, h_TD: Tensor, cos: Tensor, sin: Tensor, passing: Passing) -> Tensor:
        parameters = [p for projection in self.projections for p in projection.parameters]
        result: Tensor = _Recomputed.apply(self, passing, h_TD, cos, sin, *parameters)  # type: ignore[no-untyped-call]
        return result

    def _run(self, h_TD: Tensor, cos: Tensor, sin: Tensor, passing: Passing) -> Tensor:
        query, key, value, h_TD = _AttentionInput.apply(self, passing, h_TD, cos, sin, *self.qkv.parameters)  # type: ignore[no-untyped-call]
        attended = passing.attend(query, key, value)
        middle_TD = _AttentionOutput.apply(self, passing, attended, h_TD, *self.output.parameters)  # type: ignore[no-untyped-call]
        parameters = (*self.gate_up.parameters, *self.down.parameters)
        output: Tensor = _Gated.apply(self, passing, middle_TD, *parameters)  # type: ignore[no-untyped-call]
        return output

    def _drops(self, device: torch.device) -> Drops:
        """What the adapters of each projection drop in the pass that begins."""
        if not any(projection.drops() for projection in self.projections):
            return NO_DROPS
        seed = torch.randint(0, 2**31, (1,), device=device)
        return Drops(*(Drop(seed, stream) if part.drops() else None for stream, part in enumerate(self.projections)))

    def _attention(self, options: dict[str, Any]) -> Attend:
        """The attention function that the model's config names now; a layer that is run again in the backward pass takes
        the same one, when the config may long name another."""
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        module: Any = self.attention
        function = ALL_ATTENTION_FUNCTIONS[module.config._attn_implementation]
        return functools.partial(self._attend, function, options)

    def _attend(self, function: Any, options: Any, query_THd: Tensor, key_TKd: Tensor, value_TKd: Tensor) -> Tensor:
        module: Any = self.attention
        if (softcap := getattr(module, "attn_logit_softcapping", None)) is not None:
            options = options | {"softcap": softcap}
        attended, _ = function(
            module,
            *(tensor.transpose(0, 1)[None] for tensor in (query_THd, key_TKd, value_TKd)),
            None,
            dropout=0.0,  # layers that have some are no blocks
            scaling=module.scaling,
            sliding_window=window_of(module),
            **options,
        )
        return cast(Tensor, attended).reshape(attended.shape[1], -1)


def window_of(attention: Any) -> int | None:
    """The sliding window of an attention module: its own, or that of all layers (Mistral)."""
    owner = attention if hasattr(attention, "sliding_window") else attention.config
    window: int | None = getattr(owner, "sliding_window", None)
    return window


def rows_of(gradient: Tensor) -> Tensor:
    """A gradient whose last dimension is contiguous."""
    return gradient if gradient.stride(-1) == 1 else gradient.contiguous()


class _AttentionInput(torch.autograd.Function):
    """h -> q (T, H, d), k and v (T, K, d), and h again, so that the gradient of the residual is added on the way back."""

    @staticmethod
    def forward(
        ctx: Any, block: Block, passing: Passing, h_TD: Tensor, cos: Tensor, sin: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        kernels, norm = operations(h_TD.device), block.input_norm
        with torch.autocast(h_TD.device.type, enabled=False):
            drop = passing.drops.qkv
            x, scale_T, reduced = block.qkv.norm_input(h_TD, norm.weight, norm.offset, norm.eps, drop)
            qkv, reduced = block.qkv.forward(x, drop=drop, reduced=reduced)
            # Heads get tensors of their own: attention kernels give gradients in the layout of what they were given, and
            # one that is a part of wider rows would be copied.
            stacked_query, stacked_key, stacked_value = _split_heads(block, qkv)
            query, key, value = (
                torch.empty_like(heads, memory_format=torch.contiguous_format)
                for heads in (stacked_query, stacked_key, stacked_value)
            )
            query_norm, key_norm = block.query_norm, block.key_norm
            query_scale, key_scale = kernels.rotate_heads(
                qkv, cos, sin, query, key, value, query_norm and query_norm.numbers, key_norm and key_norm.numbers
            )
        ctx.block, ctx.drop = block, drop
        ctx.save_for_backward(
            h_TD, scale_T, reduced, cos, sin,
            stacked_query if query_norm is not None else None, query_scale,
            stacked_key if key_norm is not None else None, key_scale,
        )  # fmt: skip
        return query, key, value, h_TD

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, query_grad: Tensor, key_grad: Tensor, value_grad: Tensor, residual_grad: Tensor
    ) -> tuple[Tensor | None, ...]:
        block: Block = ctx.block
        h_TD, scale_T, reduced, cos, sin, query, query_scale, key, key_scale = ctx.saved_tensors
        kernels = operations(h_TD.device)
        grad = torch.empty(h_TD.shape[0], block.qkv.out_features, dtype=query_grad.dtype, device=h_TD.device)
        normed_query, normed_key = (
            None if norm is None else NormedHeads(heads, norm.weight, norm.offset, scale_TH)
            for heads, norm, scale_TH in ((query, block.query_norm, query_scale), (key, block.key_norm, key_scale))
        )
        gradients_of_heads = (rows_of(gradient) for gradient in (query_grad, key_grad, value_grad))
        kernels.rotate_heads_backward(*gradients_of_heads, cos, sin, grad, normed_query, normed_key)
        norm = block.input_norm
        h_grad = None
        if ctx.needs_input_grad[2]:
            x_grad, reduced_grad, update = _input_gradient(block.qkv, grad, ctx.drop)
            h_grad = kernels.rms_norm_backward(x_grad, h_TD, norm.weight, norm.offset, scale_T, residual_grad, update)
        else:
            reduced_grad = block.qkv.reduced_gradient(grad)
        rows, row_scale = _norm_input_rows(h_TD, scale_T, reduced_grad.dtype)
        gradients = block.qkv.adapter_gradients(
            grad, reduced, reduced_grad, rows, norm.weight, norm.offset, ctx.drop, row_scale=row_scale
        )
        return None, None, h_grad, None, None, *gradients


class _AttentionOutput(torch.autograd.Function):
    """h + attended W_o^T."""

    @staticmethod
    def forward(
        ctx: Any, block: Block, passing: Passing, attended: Tensor, h_TD: Tensor, *parameters: Tensor
    ) -> Tensor:
        with torch.autocast(h_TD.device.type, enabled=False):
            attended = attended.to(block.output.dtype)
            output, *saved = _with_residual(block.output, attended, h_TD, block.attention_norm, passing.drops.output)
        ctx.block, ctx.drop = block, passing.drops.output
        ctx.save_for_backward(attended, *saved)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block: Block = ctx.block
        attended, reduced, product, scale_T = ctx.saved_tensors
        product_grad = _undo_norm(block.output, grad, block.attention_norm, product, scale_T)
        attended_grad, reduced_grad = block.output.backward(product_grad, ctx.drop)
        # A whole product is contiguous already. cuDNN's attention must never see a part of one: its plan is kept without the
        # strides of this gradient, and reads where the first one lay.
        attended_grad = attended_grad.contiguous()
        gradients = block.output.adapter_gradients(product_grad, reduced, reduced_grad, attended, drop=ctx.drop)
        return None, None, attended_grad, grad, *gradients


class _Gated(torch.autograd.Function):
    """m + (f(g) * u) W_down^T with [g, u] = norm(m) W_gate_up^T."""

    @staticmethod
    def forward(ctx: Any, block: Block, passing: Passing, middle_TD: Tensor, *parameters: Tensor) -> Tensor:
        with torch.autocast(middle_TD.device.type, enabled=False):
            drop = passing.drops.down
            gates, scale_T, reduced = _gates(block, middle_TD, passing.drops.gate_up)
            update = block.gate_up.update(reduced)
            x, reduced_down = block.down.gate_input(gates, update, block.activation, drop)
            if passing.only_for_backward and block.down_norm is None and not block.down.needs_product:
                output, saved = torch.empty_like(middle_TD), [reduced_down, None, None]
            else:
                output, *saved = _with_residual(block.down, x, middle_TD, block.down_norm, drop, reduced_down)
        ctx.block, ctx.drops, ctx.only_for_backward = block, passing.drops, passing.only_for_backward
        kept = reduced if block.keeps_gates or not block.gate_up.keeps_product else None
        ctx.save_for_backward(middle_TD, scale_T, kept, gates if block.keeps_gates else None, *saved)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block: Block = ctx.block
        middle_TD, scale_T, reduced, gates, reduced_down, product, product_scale_T = ctx.saved_tensors
        kernels, norm = operations(grad.device), block.gated_norm
        is_last_use = (gates is None or ctx.only_for_backward) and not block.gate_up.needs_product
        if gates is None:
            gates, _, again = _gates(block, middle_TD, ctx.drops.gate_up)
            reduced = again if reduced is None else reduced
        down_grad = _undo_norm(block.down, grad, block.down_norm, product, product_scale_T)
        drop = ctx.drops.down
        is_fused = drop is None and block.down.rank > 0
        gated_grad, reduced_down_grad = block.down.backward(down_grad, drop, adds_update=not is_fused)
        gates_grad = gates if is_last_use else torch.empty_like(gates)
        reduction, x = (Reduction(reduced_down_grad, block.down.A), None) if is_fused else (None, gated_grad)
        all_B, all_A = kernels.gate_updated_backward(
            gated_grad, gates, block.gate_up.update(reduced), block.activation, gates_grad, reduction, x
        )
        # Where it is asked for, `gated_grad` holds the gated product from here on, the input of the last projection.
        of_down = block.down.adapter_gradients(
            down_grad, reduced_down, reduced_down_grad, gated_grad, drop=drop, all_A=all_A
        )
        x_grad, reduced_grad, update = _input_gradient(block.gate_up, gates_grad, ctx.drops.gate_up)
        rows, row_scale = _norm_input_rows(middle_TD, scale_T, reduced_grad.dtype)
        of_gates = block.gate_up.adapter_gradients(
            gates_grad, reduced, reduced_grad, rows, norm.weight, norm.offset, ctx.drops.gate_up, all_B=all_B,
            product=gates, row_scale=row_scale,
        )  # fmt: skip
        middle_grad = kernels.rms_norm_backward(x_grad, middle_TD, norm.weight, norm.offset, scale_T, grad, update)
        return None, None, middle_grad, *of_gates, *of_down


class _Recomputed(torch.autograd.Function):
    """The whole layer, of which only h is kept. Gradients of the adapters are accumulated by the inner backward pass."""

    @staticmethod
    def forward(
        ctx: Any, block: Block, passing: Passing, h_TD: Tensor, cos: Tensor, sin: Tensor, *parameters: Tensor
    ) -> Tensor:
        ctx.block, ctx.passing, ctx.needs_h = block, passing, h_TD.requires_grad
        ctx.save_for_backward(h_TD, cos, sin)
        return block._run(h_TD, cos, sin, passing)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h_TD, cos, sin = ctx.saved_tensors
        with torch.enable_grad():
            h_TD = h_TD.detach().requires_grad_(ctx.needs_h)
            output = ctx.block._run(h_TD, cos, sin, ctx.passing._replace(only_for_backward=True))
        torch.autograd.backward(output, grad)
        return None, None, h_TD.grad, None, None, *(None for _ in ctx.needs_input_grad[5:])


def _gates(block: Block, middle_TD: Tensor, drop: Drop | None) -> tuple[Tensor, Tensor, Tensor]:
    """[g, u] (T, 2F) without their update, the scales of the norm (T) and what `forward` keeps, norm(m) A^T (T, R)."""
    norm = block.gated_norm
    x, scale_T, reduced = block.gate_up.norm_input(middle_TD, norm.weight, norm.offset, norm.eps, drop)
    gates, reduced = block.gate_up.forward(x, drop=drop, reduced=reduced)
    return gates, scale_T, reduced


def _with_residual(
    projection: Projection,
    x: Any,
    residual: Tensor,
    norm: Norm | None,
    drop: Drop | None,
    reduced: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """residual + [norm](x W^T), x A^T, and what undoing the norm needs."""
    if norm is None and residual.dtype == projection.dtype:
        output, reduced = projection.forward(x, residual, drop, reduced)
        return output, reduced, None, None
    if norm is None:
        product, reduced = projection.forward(x, drop=drop, reduced=reduced)
        return residual + product, reduced, None, None
    product, reduced = projection.forward(x, drop=drop, reduced=reduced)
    output = torch.empty_like(residual)
    scale_T = operations(product.device).rms_norm(product, norm.weight, norm.offset, norm.eps, output, residual)
    return output, reduced, product, scale_T


def _undo_norm(projection: Projection, grad: Tensor, norm: Norm | None, product: Tensor, scale_T: Tensor) -> Tensor:
    """The gradient of a product from that of the residual sum, in the product's type."""
    if norm is None:
        return grad.to(projection.dtype).contiguous()
    return cast(Tensor, operations(grad.device).rms_norm_backward(grad, product, norm.weight, norm.offset, scale_T))


def _input_gradient(projection: Projection, grad: Tensor, drop: Drop | None) -> tuple[Tensor, Tensor, Reduction | None]:
    """The gradients of a norm's output and of that times A^T, and what is still to be added to the first."""
    has_update = drop is None and projection.rank > 0
    x_grad, reduced_grad = projection.backward(grad, drop, adds_update=not has_update)
    return x_grad, reduced_grad, Reduction(reduced_grad, projection.A) if has_update else None


def _norm_input_rows(h_TD: Tensor, scale_T: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The norm's input for the gradient of A, and the scales (T) that the other factor is still to be multiplied by; where
    h is wider than the products, whose type may not hold it, h is multiplied instead."""
    return (h_TD, scale_T) if h_TD.dtype == dtype else ((h_TD * scale_T[:, None]).to(dtype), None)


def _split_heads(block: Block, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Views (T, H, d), (T, K, d), (T, K, d) of the rows of a stacked product."""
    sizes = [block.num_heads * block.head_dim] + 2 * [block.num_kv_heads * block.head_dim]
    query, key, value = (part.view(part.shape[0], -1, block.head_dim) for part in torch.split(qkv, sizes, dim=1))
    return query, key, value
