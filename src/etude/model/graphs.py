"""Forward and backward of a packed micro-batch as one CUDA graph: a small model's step then waits for no Python.

A graph replays the kernels of one shape, so a batch is copied into buffers with a fixed number of slots for tokens,
samples and labels; what is left over is a sample of its own that has no label. The first batch of a size runs without a
graph, the next is captured, so that a size seen once costs nothing more.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from etude.model.packing import PackedBatch

TOKEN_STEP, TOKEN_STEPS = 256, 16
"""Token slots come in multiples of 256, and of a sixteenth of the next power of two."""

SAMPLE_STEP, LONGEST_MIN = 4, 2048
"""Slots for samples come in multiples of this; how long a sample may be, in powers of two from this on."""

LABEL_SHARES = 4
"""Label slots come in quarters of the token slots."""

MOST_GRAPHS = 32
"""Sizes beyond these run without a graph."""


class Slots(NamedTuple):
    """The shape that a graph is captured for."""

    tokens: int
    samples: int
    labels: int
    longest: int
    even_length: int | None
    """The length of all samples, where they fill all slots: they are attended as a batch."""


def slots_of(batch: PackedBatch) -> Slots:
    """The smallest shape a batch fits in."""
    real_tokens, num_samples = sum(batch.lengths), len(batch.lengths)
    step = max(TOKEN_STEP, (1 << real_tokens.bit_length()) // TOKEN_STEPS)
    tokens = _rounded_up(real_tokens, step)
    share = _rounded_up(tokens, LABEL_SHARES) // LABEL_SHARES
    labels = _rounded_up(max(1, batch.targets.numel()), share)
    if batch.is_even and real_tokens == tokens:
        return Slots(tokens, num_samples, labels, batch.lengths[0], batch.lengths[0])
    # What is left over is less than a step, but a sample like the others: rows that a kernel skips hold anything, NaN too.
    longest = max(LONGEST_MIN, step, 1 << (max(batch.lengths) - 1).bit_length())
    return Slots(tokens, _rounded_up(num_samples + 1, SAMPLE_STEP), labels, longest, None)


def _rounded_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def fill_slots(batch: PackedBatch, slots: Slots) -> PackedBatch:
    """The batch (on the host) with every tensor extended to its slots; surplus labels have the weight 0."""
    real_tokens, real_labels = sum(batch.lengths), batch.targets.numel()
    input_ids = torch.zeros(1, slots.tokens, dtype=torch.int64)
    position_ids = torch.zeros(1, slots.tokens, dtype=torch.int64)
    input_ids[0, :real_tokens] = batch.input_ids[0]
    position_ids[0, :real_tokens] = batch.position_ids[0]
    num_offsets = slots.samples + 1
    cu_seqlens = torch.full((num_offsets,), slots.tokens, dtype=torch.int32)
    cu_seqlens[: batch.cu_seqlens.numel()] = batch.cu_seqlens
    predicting, targets = torch.zeros(2, slots.labels, dtype=torch.int64)
    predicting[:real_labels], targets[:real_labels] = batch.predicting, batch.targets
    weights = torch.zeros(slots.labels)
    weights[:real_labels] = 1.0
    tensors = (predicting, targets, weights)
    if slots.even_length is not None:
        return PackedBatch(input_ids, position_ids, cu_seqlens, batch.lengths, *tensors)
    return PackedBatch(input_ids, position_ids, cu_seqlens, (slots.tokens,), *tensors, longest=slots.longest)


@dataclass
class _Captured:
    inputs: PackedBatch
    graph: torch.cuda.CUDAGraph
    loss: Tensor


GPU_FLOPS = 6e14
"""What a GPU of this kind reaches; only the order of magnitude matters here."""

LAUNCH_BOUND_SECONDS = 0.6
"""A forward and backward pass of less GPU time than this may have to wait for Python."""


def launch_bound_tokens(num_parameters: int) -> int:
    """The micro-batch size up to which a graph pays: 4 operations per frozen parameter and token."""
    return int(LAUNCH_BOUND_SECONDS * GPU_FLOPS / (4 * num_parameters))


def graph_obstacle(path: Any, device: torch.device, *, scales_loss: bool) -> str | None:
    """Why a run is not computed by graphs; None where it can be."""
    if device.type != "cuda":
        return "graphs are for GPUs"
    if path.name != "packed" or not path.has_fixed_shapes:
        return "only the packed path with attention for any lengths and the chunked head has fixed shapes"
    if scales_loss:
        return "float16 scales its loss by a factor that changes"
    return None


class GraphedLoss:
    """Computes loss and gradients of packed micro-batches, by graph where their size has been seen before.

    Batches of more than `most_tokens` keep the GPU busy long enough by themselves. `loss(batch)` is the summed loss of a batch
    on the device, with its autograd graph. The gradients must be tensors that stay where they are (`p.grad` is added to,
    never replaced).
    """

    def __init__(
        self,
        loss: Callable[[PackedBatch], Tensor],
        autocast: Callable[[], AbstractContextManager[Any]],
        device: torch.device,
        most_tokens: int,
    ) -> None:
        self.loss, self.autocast, self.device, self.most_tokens = loss, autocast, device, most_tokens
        self.inverse_items = torch.ones((), device=device)
        self.stream = _capture_stream(device)
        self._seen: Counter[Slots] = Counter()
        self._captured: dict[Slots, _Captured] = {}
        self._pool: Any = None
        self.failure: str | None = None
        """Why nothing is recorded any more, where that did not work."""

    def __call__(self, batch: PackedBatch, num_items: int) -> Tensor:
        """Add the gradient of sum(loss) / `num_items` and return that loss, a float32 scalar on the device."""
        self.inverse_items.fill_(1.0 / num_items)
        slots = slots_of(batch)
        if slots.tokens > self.most_tokens:
            return self._run(batch.to(self.device, non_blocking=True))
        filled = fill_slots(batch, slots)
        captured = self._captured.get(slots)
        # A batch of even samples first meets the kernel made for it in its second run.
        is_warm = self._seen[slots] > (slots.even_length is not None)
        if captured is None and is_warm and len(self._captured) < MOST_GRAPHS:
            captured = self._capture_or_give_up(slots, filled)
        if captured is None:
            self._seen[slots] += 1
            return self._run(filled.to(self.device, non_blocking=True))
        _copy_into(captured.inputs, filled)
        captured.graph.replay()
        return captured.loss.clone()

    @property
    def num_graphs(self) -> int:
        return len(self._captured)

    def _run(self, batch: PackedBatch) -> Tensor:
        with self.autocast():
            loss = self.loss(batch) * self.inverse_items
        torch.autograd.backward(loss)
        return loss.detach()

    def _capture_or_give_up(self, slots: Slots, filled: PackedBatch) -> _Captured | None:
        try:
            self._captured[slots] = self._capture(filled)
        except RuntimeError as error:  # something in this model's forward cannot be recorded
            self.most_tokens = 0
            self.failure = str(error).strip().splitlines()[0]
            torch.cuda.synchronize(self.device)
            _leave_recording(self.device)
        return self._captured.get(slots)

    def _capture(self, filled: PackedBatch) -> _Captured:
        inputs = filled.to(self.device)
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()  # what the same size took without a graph is needed for the graph now
        graph = torch.cuda.CUDAGraph()
        # Other threads may call the driver meanwhile: one that writes a checkpoint, or that pins memory for a loader.
        mode = "thread_local"
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream, capture_error_mode=mode):
            loss = self._run(inputs)
        self._pool = self._pool or graph.pool()
        return _Captured(inputs, graph, loss)


def _leave_recording(device: torch.device) -> None:
    """Give the generator a state that knows nothing of a recording that failed: torch leaves it in the middle of it, where
    it refuses to draw."""
    generator: Any = torch.cuda.default_generators[
        torch.cuda.current_device() if device.index is None else device.index
    ]
    generator.graphsafe_set_state(generator.clone_state())


@functools.cache
def _capture_stream(device: torch.device) -> Any:
    """One for all trainings: cuBLAS keeps a workspace for every stream that it has been used on."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _copy_into(target: PackedBatch, source: PackedBatch) -> None:
    for name, value in vars(source).items():
        if isinstance(value, Tensor):
            getattr(target, name).copy_(value.pin_memory(), non_blocking=True)
