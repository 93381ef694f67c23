"""How many tokens a micro-batch may have, and what its layers keep: planned from their parts or measured on the first
micro-batches, and halved when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

CPU_TOKENS = 1024
"""On a CPU matrix products are efficient from about 1,000 rows on, and more only takes memory."""

GPU_TOKENS = 16384
"""On a GPU nothing is gained beyond this."""

FIRST_GPU_TOKENS = 2048
"""What the first step is cut to, before the memory of a token is known."""

SMALLEST_TOKENS = 16
SHARE_OF_FREE_MEMORY = 0.8


EFFICIENT_TOKENS = 2048
"""With fewer rows the matrix products of a GPU lose more than making a layer's activations again costs."""

CANDIDATE_TOKENS = (GPU_TOKENS, 12288, 8192, 6144, 4096, 3072, EFFICIENT_TOKENS)
SHARE_FOR_LAYERS = 0.8
"""Of the memory that is free; the rest is for what is not counted and for gaps between blocks."""


@dataclass(frozen=True)
class LayerBytes:
    """What one layer keeps of one token until its backward pass, in each way of running it, and needs for a moment."""

    everything: int
    without_gates: int
    recomputed: int
    passing: int


@dataclass(frozen=True)
class MemoryPlan:
    """A token budget, and how many layers, counted from the first, make their gates or everything again."""

    tokens: int
    num_recomputed: int = 0
    num_without_gates: int = 0

    def describe(self, num_layers: int) -> str:
        ways = [(self.num_recomputed, "are run again"), (self.num_without_gates, "make their gates again")]
        parts = [f"{count} of {num_layers} layers {what}" for count, what in ways if count]
        return f"micro-batches of up to {self.tokens:,} tokens; in the backward pass " + (
            " and ".join(parts) if parts else "nothing is computed twice"
        )


@dataclass(frozen=True)
class HeadBytes:
    """What is needed outside the layers: for every token, and while the logits of a chunk are there."""

    per_token: int
    chunk: int


def _passing(tokens: int, layer: LayerBytes, head: HeadBytes) -> int:
    """Bytes beside what is kept. The head has done its work before the backward pass of a layer begins."""
    return tokens * head.per_token + max(tokens * layer.passing, head.chunk)


def plan_memory(
    room: int,
    layer: LayerBytes,
    num_layers: int,
    head: HeadBytes,
    wanted_tokens: int | None,
    longest: int = 1,
) -> MemoryPlan:
    """The fastest way of running `num_layers` layers in `room` bytes.

    Without `wanted_tokens` the micro-batch is first made smaller, down to
    what keeps a GPU efficient, and only then are activations made again. A sample of `longest` tokens is never split.
    """
    kept = int(SHARE_FOR_LAYERS * room)
    for tokens in CANDIDATE_TOKENS if wanted_tokens is None else (wanted_tokens,):
        actual = max(tokens, longest)
        if actual * num_layers * layer.everything + _passing(actual, layer, head) <= kept:
            return MemoryPlan(tokens)
    tokens = max(wanted_tokens or EFFICIENT_TOKENS, longest)
    while True:
        left = kept - _passing(tokens, layer, head)
        if (excess := num_layers * layer.everything * tokens - left) <= 0:
            return MemoryPlan(tokens)
        saving = (layer.everything - layer.without_gates) * tokens
        if excess <= num_layers * saving:
            return MemoryPlan(tokens, num_without_gates=-(-excess // saving))
        left -= layer.everything * tokens  # what a layer that is run again keeps while its backward pass lasts
        excess = num_layers * layer.without_gates * tokens - left
        saving = (layer.without_gates - layer.recomputed) * tokens
        if excess <= num_layers * saving or tokens <= max(SMALLEST_TOKENS, longest) or wanted_tokens is not None:
            num_recomputed = min(num_layers, max(0, -(-excess // saving)))
            return MemoryPlan(tokens, num_recomputed, num_layers - num_recomputed)
        tokens = max(tokens // 2, longest)


def free_memory(device: torch.device) -> int:
    """Bytes that this process may still allocate on a GPU: what is free there, within the limit that was set."""
    free, total = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    held = torch.cuda.memory_reserved(device) - allocated
    limit = int(torch.cuda.get_per_process_memory_fraction(device) * total)
    return min(free + held, limit - allocated)


@contextmanager
def memory_limit(device: torch.device, limit_gib: float | None) -> Iterator[None]:
    """Inside, the process allocates at most so much on the GPU."""
    if limit_gib is None or device.type != "cuda":
        yield
        return
    before = torch.cuda.get_per_process_memory_fraction(device)
    total = torch.cuda.mem_get_info(device)[1]
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(min(1.0, limit_gib * 2**30 / total), device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(before, device)


class TokenBudget:
    """The token budget of a micro-batch.

    `given` is the user's (or the checkpoint's) number; otherwise the first micro-batches are measured and the budget
    grows to what the device has room for.
    """

    def __init__(self, device: torch.device, given: int | None) -> None:
        self.device = device
        self.is_fixed = given is not None or device.type != "cuda"
        self.tokens = given if given is not None else (FIRST_GPU_TOKENS if device.type == "cuda" else CPU_TOKENS)
        self._allocated_before = 0

    def before_micro_batch(self) -> None:
        if not self.is_fixed:
            torch.cuda.reset_peak_memory_stats(self.device)
            self._allocated_before = torch.cuda.memory_allocated(self.device)

    def after_micro_batch(self, tokens: int) -> str | None:
        """Learn from a micro-batch of `tokens`; returns a line to say when the budget has been decided."""
        if self.is_fixed or tokens < 256:
            return None
        self.is_fixed = True
        peak = torch.cuda.max_memory_allocated(self.device) - self._allocated_before
        bytes_per_token = max(1, peak // tokens)
        affordable = int(SHARE_OF_FREE_MEMORY * free_memory(self.device) / bytes_per_token)
        self.tokens = max(SMALLEST_TOKENS, min(GPU_TOKENS, affordable // 256 * 256))
        return f"a token takes {bytes_per_token / 2**10:,.0f} KiB: micro-batches of up to {self.tokens:,} tokens"

    def halve(self, tokens: int) -> bool:
        """After running out of memory on `tokens` tokens; False where they cannot be fewer."""
        self.is_fixed = True
        smaller = min(self.tokens, tokens) // 2
        if smaller < SMALLEST_TOKENS:
            return False
        self.tokens = smaller
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return True
