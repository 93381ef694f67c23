"""How many tokens a micro-batch may have, and what its layers keep: planned from their parts or measured on the first
micro-batches, and halved when memory runs out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

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
"""Fewer only where nothing else fits."""

CANDIDATE_TOKENS = (GPU_TOKENS, 12288, 8192, 6144, 4096, 3072, EFFICIENT_TOKENS)
SHARE_FOR_LAYERS = 0.85
"""Of the memory that is free; the rest is for what is not counted and for gaps between blocks."""

SHARE_OF_HOST_MEMORY = 0.5
"""Of what the host has left: pinned memory is taken from everybody else for good."""

TOKENS_LOST = 48
"""A micro-batch costs as much time as so many tokens, whatever its size: small products are slower."""

FEWEST_IN_FLIGHT, MOST_IN_FLIGHT = 2, 8
"""Layers whose copies to the host may be under way: one that ends and one that begins, or more where copies lag behind."""


@dataclass(frozen=True)
class LayerBytes:
    """What one layer keeps of one token until its backward pass, in each way of running it, and needs for a moment there,
    with its gates, and in its forward pass."""

    everything: int
    without_gates: int
    recomputed: int
    passing: int
    passing_forward: int

    @property
    def gates(self) -> int:
        return self.everything - self.without_gates


@dataclass(frozen=True)
class LayerSeconds:
    """How long one layer takes for one token: its forward pass (the backward pass takes as long), to make its gates or
    everything again, to copy a byte to the host; and for any number of tokens each time, to unpack the weights of all
    and of the gates."""

    forward: float
    gates: float
    again: float
    copied_byte: float = float("inf")
    unpacked: float = 0.0
    unpacked_gates: float = 0.0


def seconds_of(operations: tuple[int, int, int, int, int], products: float, copies: float) -> LayerSeconds:
    """From the operations of a layer (`KernelPlan.layer_operations`), at `products` of them and `copies` bytes a second."""
    forward, gates, again, unpacked, unpacked_gates = (each / products for each in operations)
    copied_byte = 1.0 / copies if copies else float("inf")
    return LayerSeconds(forward, gates, again, copied_byte, unpacked, unpacked_gates)


@dataclass(frozen=True)
class MemoryPlan:
    """A token budget, and what the layers do. Counted from the first: `num_offloaded` keep theirs in host memory (and are
    run again, or make their gates again), `num_recomputed` are run again, `num_without_gates` make their gates again."""

    tokens: int
    num_recomputed: int = 0
    num_without_gates: int = 0
    num_offloaded: int = 0
    recomputes_offloaded: bool = False
    in_flight: int = FEWEST_IN_FLIGHT
    """How many layers may be on their way to the host at a time."""

    @property
    def num_run_again(self) -> int:
        return self.num_recomputed + (self.num_offloaded if self.recomputes_offloaded else 0)

    @property
    def num_making_gates(self) -> int:
        return self.num_without_gates + (0 if self.recomputes_offloaded else self.num_offloaded)

    def describe(self, num_layers: int) -> str:
        ways = [(self.num_run_again, "are run again"), (self.num_making_gates, "make their gates again")]
        parts = [f"{count} of {num_layers} layers {what}" for count, what in ways if count]
        text = f"micro-batches of up to {self.tokens:,} tokens; in the backward pass " + (
            " and ".join(parts) if parts else "nothing is computed twice"
        )
        return text + (
            f"; {self.num_offloaded} of {num_layers} layers keep theirs in host memory" * bool(self.num_offloaded)
        )

    def host_bytes(self, layer: LayerBytes) -> int:
        """What the offloaded layers keep of a whole micro-batch."""
        return self.num_offloaded * self.tokens * _offloaded(self, layer)


@dataclass(frozen=True)
class HeadBytes:
    """What is needed outside the layers: for every token, and while the logits of a chunk are there."""

    per_token: int
    chunk: int


def _offloaded(plan: MemoryPlan, layer: LayerBytes) -> int:
    return layer.recomputed if plan.recomputes_offloaded else layer.without_gates


def peak_bytes(plan: MemoryPlan, layer: LayerBytes, num_layers: int, head: HeadBytes) -> int:
    """The most that a micro-batch of `plan` needs at a time, beside weights, gradients and the optimizer.

    Everything that is kept is there when the head computes; in the backward pass it becomes less with every layer, the last
    one first.
    """
    recomputed = plan.num_recomputed * layer.recomputed
    without_gates = recomputed + plan.num_without_gates * layer.without_gates
    num_whole = num_layers - plan.num_offloaded - plan.num_recomputed - plan.num_without_gates
    kept = without_gates + num_whole * layer.everything
    moments = [head.per_token + kept]
    if num_whole:
        moments.append(kept + layer.passing - layer.gates)
    if plan.num_without_gates:
        moments.append(without_gates + layer.passing)
    run_again = layer.without_gates + layer.passing
    if plan.num_recomputed:
        moments.append(recomputed + run_again)
    if plan.num_offloaded:
        offloaded = _offloaded(plan, layer)
        moments.append(2 * offloaded + (run_again if plan.recomputes_offloaded else layer.passing))
        moments.append(plan.in_flight * offloaded + layer.passing_forward)
    return max(plan.tokens * max(moments), plan.tokens * moments[0] + head.chunk)


@dataclass(frozen=True)
class Rows:
    """The samples of an update, as far as they are known before it."""

    count: int
    tokens: float
    """Of one of them, on average."""

    def num_micro_batches(self, budget: int) -> int:
        return -(-self.count // max(1, int(budget / self.tokens)))


def seconds_per_token(plan: MemoryPlan, layer: LayerBytes, num_layers: int, seconds: LayerSeconds, rows: Rows) -> float:
    """What a token of `plan` takes beyond one forward and one backward pass of all layers."""
    added = plan.num_run_again * seconds.again + plan.num_making_gates * seconds.gates
    if plan.num_offloaded:
        copy = _offloaded(plan, layer) * seconds.copied_byte
        # Forwards a copy may lag behind; backwards each hides behind one layer.
        hidden = (plan.num_offloaded + plan.in_flight - 2) * seconds.forward
        backward = seconds.forward + (seconds.again if plan.recomputes_offloaded else seconds.gates)
        added += max(0.0, plan.num_offloaded * copy - hidden) + plan.num_offloaded * max(0.0, copy - backward)
    once = num_layers * (2 * TOKENS_LOST * seconds.forward + 2 * seconds.unpacked)
    once += plan.num_run_again * seconds.unpacked + plan.num_making_gates * seconds.unpacked_gates
    return added + once * rows.num_micro_batches(plan.tokens) / (rows.count * rows.tokens)


def plan_memory(
    room: int,
    layer: LayerBytes,
    num_layers: int,
    head: HeadBytes,
    wanted_tokens: int | None,
    longest: int = 1,
    *,
    seconds: LayerSeconds,
    rows: Rows,
    host_room: int = 0,
) -> MemoryPlan:
    """The fastest way of running `num_layers` layers in `room` bytes, with `host_room` bytes of the host.

    Without `wanted_tokens` the micro-batch may be smaller, down to what keeps a GPU efficient; even smaller only where
    nothing else fits. A sample of `longest` tokens is never split.
    """
    limit, host_limit = int(SHARE_FOR_LAYERS * room), int(SHARE_OF_HOST_MEMORY * host_room)

    def cost(plan: MemoryPlan) -> tuple[float, int]:
        return seconds_per_token(plan, layer, num_layers, seconds, rows), -plan.tokens

    def fastest(*budgets: int) -> MemoryPlan | None:
        plans = (plan for tokens in budgets for plan in _plans(tokens, layer, num_layers, head, limit, host_limit > 0))
        return min((plan for plan in plans if plan.host_bytes(layer) <= host_limit), key=cost, default=None)

    candidates = CANDIDATE_TOKENS if wanted_tokens is None else (wanted_tokens,)
    plan = fastest(*dict.fromkeys(max(each, longest) for each in candidates))
    tokens = max(candidates[-1], longest)
    while plan is None and wanted_tokens is None and tokens > max(SMALLEST_TOKENS, longest):
        tokens = max(tokens // 2, longest)
        plan = fastest(tokens)
    return plan or min(
        _smallest(tokens, num_layers, layer, host_limit), key=lambda p: peak_bytes(p, layer, num_layers, head)
    )


def _smallest(tokens: int, num_layers: int, layer: LayerBytes, host_limit: int) -> list[MemoryPlan]:
    """What is left where nothing fits: it may still run, in what is set aside for gaps."""
    most = max(0, num_layers - 2)
    plans = [MemoryPlan(tokens, num_layers), MemoryPlan(tokens, num_layers - most, 0, most, most > 0)]
    return [plan for plan in plans if plan.host_bytes(layer) <= host_limit]


def _plans(
    tokens: int, layer: LayerBytes, num_layers: int, head: HeadBytes, limit: int, may_offload: bool
) -> Iterator[MemoryPlan]:
    """For every number of layers that are offloaded and run again, the fewest that make their gates again to fit `limit`."""
    most_offloaded = max(0, num_layers - 2) if may_offload else 0  # the last are asked for at once
    for recomputes_offloaded in (False, True):
        for num_offloaded in range(int(recomputes_offloaded), most_offloaded + 1):
            for num_recomputed in range(num_layers - num_offloaded + 1):
                plan = MemoryPlan(tokens, num_recomputed, 0, num_offloaded, recomputes_offloaded)
                fitting = _fitting(_with_more_in_flight(plan, layer, num_layers, limit), layer, num_layers, head, limit)
                if fitting is not None:
                    yield fitting
                    if fitting.num_without_gates == 0:
                        break  # with more layers that are run again it only takes longer


def _with_more_in_flight(plan: MemoryPlan, layer: LayerBytes, num_layers: int, limit: int) -> MemoryPlan:
    """As many as there is room for while little is kept, and all of them back before the last layer."""
    if not plan.num_offloaded:
        return plan
    most = (limit // plan.tokens - layer.passing_forward) // _offloaded(plan, layer)
    most = min(most, MOST_IN_FLIGHT, num_layers - plan.num_offloaded)
    return replace(plan, in_flight=max(FEWEST_IN_FLIGHT, most))


def _fitting(plan: MemoryPlan, layer: LayerBytes, num_layers: int, head: HeadBytes, limit: int) -> MemoryPlan | None:
    """`plan` with as many layers that make their gates again as it needs, or None where that does not do."""
    others = num_layers - plan.num_offloaded - plan.num_recomputed
    excess = peak_bytes(plan, layer, num_layers, head) - limit
    needed = max(0, -(-excess // (plan.tokens * layer.gates)))
    for num_without_gates in dict.fromkeys((min(needed, others), min(needed + 1, others), others)):
        found = replace(plan, num_without_gates=num_without_gates)
        if peak_bytes(found, layer, num_layers, head) <= limit:
            return found
    return None


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
