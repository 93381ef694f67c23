"""Padding removal: a padded batch becomes one row of real tokens, and a model attends over it segment by segment.

Packing reaches the model through transformers' attention interface. For the length of one forward the model's configs
name our attention function; the segments travel to it as a keyword argument, and afterwards the configs read as before,
so evaluation, generation and saving never see the difference.

Legend: B rows, S columns of the padded batch, T real tokens, N labelled tokens.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from etude.errors import ModelError
from etude.kernels.attention import (
    FUSED,
    PER_SEQUENCE,
    VARLEN,
    AttentionRule,
    Segments,
    as_autocast,
    fused_segments,
    segment_attention,
    varlen_attention,
)

ATTENTION_NAME = "etude_segments"
IGNORED_LABEL = -100
PACKED_COLUMNS = ("input_ids", "attention_mask", "labels", "position_ids")


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """The real tokens of a padded batch, one sample behind the other, and what is to be predicted."""

    input_ids: Tensor
    """(1, T)"""
    position_ids: Tensor
    """(1, T): the positions the model would have used, the column in the padded batch unless the collator gave others."""
    cu_seqlens: Tensor
    """(samples + 1), int32"""
    lengths: tuple[int, ...]
    predicting: Tensor
    """(N): tokens of the row whose next token is labelled."""
    targets: Tensor
    """(N): those labels."""
    weights: Tensor | None = None
    """(N) float32: what each label counts; None where each counts 1."""
    longest: int | None = None
    """What no sample is longer than, where `lengths` does not say how long they are."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> PackedBatch:
        """A copy on `device`; to a GPU through pinned memory, so that the host does not wait for it."""
        pins = non_blocking and torch.device(device).type == "cuda"
        moved: dict[str, Any] = {
            name: (value.pin_memory() if pins else value).to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def segments(
        self, kernel: str = PER_SEQUENCE, *, batched: bool = False, windows_seen: list[int | None] | None = None
    ) -> Segments:
        """What the attention function needs to know about this batch; `batched` where all samples are equally long."""
        # A power of two: what is compiled for it serves other batches too. Kernels take it as an upper bound.
        longest = self.longest or 1 << (max(self.lengths, default=1) - 1).bit_length()
        equal_length = self.lengths[0] if batched else None
        given: dict[str, Any] = {"windows_seen": windows_seen, "equal_length": equal_length}
        if kernel == FUSED:
            return fused_segments(self.cu_seqlens, self.lengths, self.input_ids.numel(), longest, **given)
        return Segments(self.cu_seqlens, self.lengths, longest, kernel, **given)

    @property
    def is_even(self) -> bool:
        """Whether all samples are equally long."""
        return self.longest is None and len(set(self.lengths)) == 1


def pack(inputs: dict[str, Tensor]) -> PackedBatch | None:
    """Remove the padding of `input_ids`, `attention_mask`, `labels` and, if given, `position_ids`, all (B, S).

    None where a label would be predicted from a padding token (a left-padded row whose first token is labelled): that
    prediction exists only in the padded batch. Reads sizes back to the host: on a GPU cheaper before the copy there.
    """
    # Not torch: these few elements would be shared out among all its threads, which a container with fewer cores than
    # the machine has makes wait for each other, for longer than a step of a small model takes.
    mask = inputs["attention_mask"]
    given = {**inputs, "attention_mask": mask != 0 if mask.is_floating_point() else mask}  # numpy has no bfloat16
    columns = {key: given[key].numpy(force=True) for key in PACKED_COLUMNS if key in given}
    is_real = columns["attention_mask"] != 0
    next_label = np.full_like(columns["labels"], IGNORED_LABEL)
    next_label[:, :-1] = columns["labels"][:, 1:]
    is_predicting = next_label != IGNORED_LABEL
    if (is_predicting & ~is_real).any():
        return None
    row, column = is_real.nonzero()
    positions = column if "position_ids" not in columns else columns["position_ids"][row, column]
    lengths = tuple(length for length in is_real.sum(axis=1).tolist() if length > 0)
    (predicting,) = is_predicting[row, column].nonzero()
    device = inputs["input_ids"].device

    def tensor(values: Any) -> Tensor:
        return torch.from_numpy(values).to(device)

    return PackedBatch(
        input_ids=tensor(columns["input_ids"][row, column][None]),
        position_ids=tensor(positions[None]),
        cu_seqlens=tensor(np.cumsum((0, *lengths), dtype=np.int32)),
        lengths=lengths,
        predicting=tensor(predicting),
        targets=tensor(next_label[row, column][predicting]),
    )


def packed_forward(module: nn.Module, batch: PackedBatch, segments: Segments, **options: Any) -> Any:
    """Run a decoder, or a model around it, over a packed row. Its attention must be switched (`AttentionSwitch`)."""
    # A mask of four dimensions is handed on to the attention function as it is. None would have every forward look for
    # sample borders in the positions (a wait for the GPU) and build a T x T mask that nobody reads.
    unread_mask = torch.ones((1, 1, 1, 1), dtype=torch.bool, device=batch.input_ids.device)
    return module(
        input_ids=batch.input_ids,
        attention_mask=unread_mask,
        position_ids=batch.position_ids,
        use_cache=False,
        segments=segments,
        **options,
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    segments: Segments | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls, in its signature; without segments it is the library's SDPA.

    Raises:
        ModelError: the layer is not causal, or wants a position bias.
    """
    if segments is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap, **options
        )
        return output, None
    if not options.get("is_causal", getattr(module, "is_causal", True)):
        raise ModelError(f"{type(module).__name__} is not causal: samples packed in one row would need another mask")
    if options.get("position_bias") is not None:
        raise ModelError(f"{type(module).__name__} adds a position bias to its attention")
    if segments.windows_seen is not None:
        segments.windows_seen.append(sliding_window)
    if segments.kernel == VARLEN and softcap is None and s_aux is None and dropout == 0.0:
        return varlen_attention(*as_autocast(query, key, value), segments, scaling, sliding_window), None
    rule = AttentionRule(scaling, sliding_window, softcap, s_aux, dropout)
    return segment_attention(query, key, value, segments, rule), None


class AttentionSwitch:
    """Turns a model's attention to `attend` for one forward and puts its own setting back, also after an exception."""

    def __init__(self, model: nn.Module) -> None:
        self._configs: list[Any] = []
        self._recomputing: list[Any] = []
        # A name without a mask function would drop the mask of an ordinary padded forward, so both are registered.
        AttentionInterface.register(ATTENTION_NAME, attend)
        AttentionMaskInterface.register(ATTENTION_NAME, sdpa_mask)
        for module in model.modules():
            config = getattr(module, "config", None)
            if isinstance(config, PretrainedConfig) and all(config is not known for known in self._configs):
                self._configs.append(config)
            # An adapter's wrapper only answers for the model inside it, so attributes are looked up on the object itself.
            if hasattr(type(module), "gradient_checkpointing") or "gradient_checkpointing" in vars(module):
                self._recomputing.append(module)

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Inside, forwards take segments; layers under gradient checkpointing take them again when they are recomputed."""
        checkpointed = [
            module
            for module in self._recomputing
            if module.gradient_checkpointing and "_gradient_checkpointing_func" in vars(module)
        ]
        functions = [module._gradient_checkpointing_func for module in checkpointed]
        try:
            for module, function in zip(checkpointed, functions, strict=True):
                module._gradient_checkpointing_func = functools.partial(self._checkpoint, function)
            with self._attention():
                yield
        finally:
            for module, function in zip(checkpointed, functions, strict=True):
                module._gradient_checkpointing_func = function

    def written_out(self) -> AbstractContextManager[None]:
        """The attention that transformers writes out in plain products, for padded batches."""
        return self._attention("eager")

    def _checkpoint(self, checkpoint: Callable[..., Any], layer: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """The recomputation runs in the backward pass, long after the forward has put the attention setting back."""

        def packed_layer(*layer_args: Any, **layer_options: Any) -> Any:
            with self._attention():
                return layer(*layer_args, **layer_options)

        return checkpoint(packed_layer, *args, **options)

    @contextmanager
    def _attention(self, name: str = ATTENTION_NAME) -> Iterator[None]:
        # The property would write through to sub-configs, which are in the list themselves.
        before = [config._attn_implementation_internal for config in self._configs]
        try:
            for config in self._configs:
                config._attn_implementation_internal = name
            yield
        finally:
            for config, implementation in zip(self._configs, before, strict=True):
                config._attn_implementation_internal = implementation
