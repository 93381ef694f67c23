"""Greedy generation in batches, with the adapter folded into the base weights while it lasts.

A LoRA layer costs two extra matrix products per token. During training they are the point; while answers are
generated, W + (alpha/r) B A is one matrix, so the adapter is merged first and the base weights put back afterwards,
bit for bit: subtracting B A again would leave rounding behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from etude.errors import ModelError


def generate(
    model: nn.Module, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int = 64
) -> list[str]:
    """What the model continues each prompt with, choosing the likeliest token each time, until EOS or the limit.

    Args:
        model: a causal language model of transformers, or a PEFT model around one.
        tokenizer: its tokenizer; prompts are encoded with its special tokens, replies decoded without.
        prompts: the texts to continue, any number of them.
        max_new_tokens: the limit for each reply, in tokens.
        batch_size: prompts generated side by side.

    Raises:
        ModelError: the tokenizer has no end-of-sequence token, so nothing would ever stop.
    """
    if tokenizer.eos_token_id is None:
        raise ModelError("the tokenizer has no eos_token, so a reply has no end; set tokenizer.eos_token")
    encoded: list[list[int]] = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    # Neighbours of one length share a batch: less padding is computed.
    by_length = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
    replies = [""] * len(encoded)
    with evaluation_mode(model), merged_adapter(model):
        for start in range(0, len(by_length), batch_size):
            rows = by_length[start : start + batch_size]
            new_tokens = continue_greedily(
                model,
                [encoded[row] for row in rows],
                eos_token_id=tokenizer.eos_token_id,
                max_new_tokens=max_new_tokens,
            )
            for row, tokens in zip(rows, new_tokens, strict=True):
                replies[row] = tokenizer.decode(tokens, skip_special_tokens=True)
    return replies


@torch.no_grad()
def continue_greedily(
    model: nn.Module, prompts: Sequence[Sequence[int]], *, eos_token_id: int, max_new_tokens: int
) -> list[list[int]]:
    """The new tokens of each prompt, without the end-of-sequence token. B prompts, T the longest of them."""
    device = next(model.parameters()).device
    input_ids, attention_mask = (part.to(device) for part in _left_padded(prompts, eos_token_id))  # (B, T) each
    positions = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)  # (B, T)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    cache: Any = None
    produced: list[Tensor] = []
    for _ in range(max_new_tokens):
        # The index of the last column, not the number 1: an index copies the hidden states, a slice of them is not
        # contiguous, and torch then multiplies a frozen head row by row, copying it for each row of the batch.
        last_column = torch.tensor([input_ids.shape[1] - 1], device=device)
        outputs = model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last_column,
        )
        cache = outputs.past_key_values
        chosen = outputs.logits[:, -1].argmax(dim=-1).masked_fill(finished, eos_token_id)  # (B,)
        produced.append(chosen)
        finished |= chosen == eos_token_id
        if bool(finished.all()):
            break
        input_ids = chosen[:, None]
        attention_mask = torch.cat([attention_mask, attention_mask.new_ones(len(prompts), 1)], dim=1)
        positions = positions[:, -1:] + 1
    if not produced:
        return [[] for _ in prompts]
    return [_until(row, eos_token_id) for row in torch.stack(produced, dim=1).tolist()]


@contextmanager
def merged_adapter(model: nn.Module) -> Iterator[None]:
    """Fold the active adapters into the base weights for a while, then restore those weights bit for bit."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [part for part in model.modules() if isinstance(part, BaseTunerLayer) and not part.merged]
    originals = [
        {name: weight.detach().clone() for name, weight in layer.get_base_layer().named_parameters()}
        for layer in layers
    ]
    try:
        for layer in layers:
            layer.merge()
        yield
    finally:
        for layer, original in zip(layers, originals, strict=True):
            layer.unmerge()
            for name, weight in layer.get_base_layer().named_parameters():
                weight.data.copy_(original[name])


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off for a while; afterwards every module is in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _left_padded(prompts: Sequence[Sequence[int]], padding: int) -> tuple[Tensor, Tensor]:
    """Prompts and mask, aligned at their ends, where the next token is predicted; masked padding may be any token."""
    width = max(map(len, prompts))
    input_ids = [[padding] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    attention_mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return torch.tensor(input_ids), torch.tensor(attention_mask)


def _until(tokens: list[int], end: int) -> list[int]:
    return tokens[: tokens.index(end)] if end in tokens else tokens
