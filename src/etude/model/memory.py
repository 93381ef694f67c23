"""How many tokens a micro-batch may have: measured on the first ones, halved when memory runs out."""

from __future__ import annotations

import torch

CPU_TOKENS = 1024
"""On a CPU matrix products are efficient from about 1,000 rows on, and more only takes memory."""

GPU_TOKENS = 16384
"""On a GPU nothing is gained beyond this."""

FIRST_GPU_TOKENS = 2048
"""What the first step is cut to, before the memory of a token is known."""

SMALLEST_TOKENS = 16
SHARE_OF_FREE_MEMORY = 0.8


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
        free, _ = torch.cuda.mem_get_info(self.device)
        held = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        fraction = torch.cuda.get_per_process_memory_fraction(self.device)
        limit = fraction * torch.cuda.get_device_properties(self.device).total_memory
        room = min(free + held, limit - torch.cuda.memory_allocated(self.device))
        affordable = int(SHARE_OF_FREE_MEMORY * room / bytes_per_token)
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
