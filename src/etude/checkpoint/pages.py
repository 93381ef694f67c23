"""Tensors of a GPU, gathered and carried into page-locked memory of the host while training goes on.

Those of one type are put one after another into blocks on the device, which takes a millisecond for half a gigabyte. From
then on training may change them: a stream of its own carries the blocks to the host. There each tensor is a piece of a
page, but has a storage of its own, because `torch.save` writes whole storages.
"""

from __future__ import annotations

import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

PAGE_BYTES = 2**26
"""Host memory is taken in pieces of this size: torch rounds what it locks up to a power of two."""

ALIGNMENT_BYTES = 64

NUMPY_STANDS_IN = {1: torch.uint8, 2: torch.int16}
"""Bytes of an element -> a type for those that NumPy does not know (float8, bfloat16)."""


class Pages:
    """Memory of the host, and the copies that are on their way there.

    `begin` starts to copy and `arrive` waits for the end of it, in whichever thread. What is begun next takes the same memory.
    """

    def __init__(self, *, pinned: bool) -> None:
        self.pinned = pinned
        self._pages: list[Tensor] = []
        self._layout = _Layout([])
        self._under_way: list[tuple[Callable[[], Any], list[Tensor]]] = []
        """What waits for a copy, and the blocks on the device that it is made from."""

    @property
    def hosts(self) -> list[Tensor]:
        """Where the tensors that `fit` are copied to, in their order."""
        return self._layout.hosts

    def reserve(self, num_bytes: int) -> None:
        """Take the memory for so many bytes ahead."""
        while len(self._pages) * PAGE_BYTES < num_bytes:
            self._pages.append(_host_memory(PAGE_BYTES, self.pinned))

    def fit(self, tensors: Sequence[Tensor]) -> bool:
        """Whether `hosts` are for tensors like these. If not, they are others from now on, which are."""
        if self._layout.keys == _keys(tensors):
            return True
        self.arrive()
        self._layout = _Layout([])  # tensors larger than a page have memory of their own: it is free now
        layout = _Layout(tensors)
        layout.fill_pages(tensors, _Places(self._pages, self.pinned))
        self._layout = layout
        return False

    def find(self, tensors: Sequence[Tensor]) -> None:
        """What `fit` and `begin` would look for and keep, without a copy."""
        self.fit(tensors)
        self._layout.rows_of(tensors)

    def begin(self, tensors: Sequence[Tensor]) -> None:
        """Copy tensors that `fit` to `hosts`. They may change as soon as this returns; the copies are there after `arrive`."""
        self.arrive()
        hosts, at_once = self.hosts, list(self._layout.loose)
        rows_of = self._layout.rows_of(tensors)
        for device, blocks in self._layout.blocks.items():
            carrier = _carrier_from(device)
            parts = rows_of[device]
            snapshots = carrier.snapshots(parts, sum(block.memory.nbytes for block in blocks))
            if snapshots is None:
                at_once += [number for block in blocks for number in block.numbers]
            else:
                self._under_way.append((carrier.carry(snapshots, [block.memory for block in blocks]), snapshots))
        if at_once:
            _copy_and_wait([hosts[number] for number in at_once], [tensors[number] for number in at_once])

    def arrive(self) -> None:
        """Wait until everything is copied, and give the memory of the blocks on the device back."""
        for wait, _ in self._under_way:
            wait()
        self._under_way = []


# -- where the copies lie ----------------------------------------------------------------------------------------------


class _Block(NamedTuple):
    """Tensors of one device and type that lie one after another."""

    numbers: list[int]
    memory: Tensor
    """A piece of a page, as elements of that type."""


class _Layout:
    """The places of the copies of tensors. It is made once for all that are alike."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.keys = _keys(tensors)
        self.hosts: list[Tensor] = list(tensors)
        self.blocks: dict[torch.device, list[_Block]] = defaultdict(list)
        self.loose: list[int] = []
        """The numbers of tensors with gaps or with nothing in them, which are no part of a block."""
        self._rows: dict[torch.device, list[list[Tensor]]] = {}
        self._places: list[int] = []

    def rows_of(self, tensors: Sequence[Tensor]) -> dict[torch.device, list[list[Tensor]]]:
        """The tensors of each block of each device, in one dimension. Kept for tensors that have stayed where they are since
        the last time: for thousands of small ones this takes longer than to copy them."""
        places = list(map(Tensor.data_ptr, tensors))
        if places == self._places and self._rows:
            return self._rows
        rows = {
            device: [[tensors[number].view(-1) for number in block.numbers] for block in blocks]
            for device, blocks in self.blocks.items()
        }
        has_stayed = places == self._places
        self._rows = rows if has_stayed else {}  # what may be replaced again is not to be kept alive
        self._places = places
        return rows

    def fill_pages(self, tensors: Sequence[Tensor], places: _Places) -> None:
        alike: dict[tuple[torch.device, torch.dtype], list[int]] = defaultdict(list)
        for number, tensor in enumerate(tensors):
            if tensor.is_contiguous() and tensor.numel():
                alike[tensor.device, tensor.dtype].append(number)
            else:
                self.loose.append(number)
                self.hosts[number] = empty_copy(tensor, pinned=places.pinned)
        for (device, dtype), numbers in alike.items():
            for run in _runs(numbers, tensors, places.left):
                parts = [tensors[number] for number in run]
                memory = places.take(sum(part.nbytes for part in parts)).view(dtype)
                self.blocks[device].append(_Block(run, memory))
                for number, piece in zip(run, _pieces(memory, parts), strict=True):
                    self.hosts[number] = piece


def _keys(tensors: Sequence[Tensor]) -> tuple[list[Any], ...]:
    """Sizes, strides, types and devices: column by column, a tenth of the time that rows take."""
    ways = (Tensor.size, Tensor.stride, operator.attrgetter("dtype"), operator.attrgetter("device"))
    return tuple(list(map(way, tensors)) for way in ways)


def _runs(numbers: list[int], tensors: Sequence[Tensor], left: int) -> list[list[int]]:
    """Cut so that the first run fits into what is left of a page and each other one into a page; what is larger is alone."""
    runs: list[list[int]] = [[]]
    for number in numbers:
        if tensors[number].nbytes > left:
            runs.append([])
            left = PAGE_BYTES
        runs[-1].append(number)
        left -= tensors[number].nbytes
    return [run for run in runs if run]


class _Places:
    """Goes through the pages, and takes new ones after the last."""

    def __init__(self, pages: list[Tensor], pinned: bool) -> None:
        self.pages, self.pinned = pages, pinned
        self._page, self._used = -1, PAGE_BYTES

    @property
    def left(self) -> int:
        """Bytes of the current page."""
        return PAGE_BYTES - self._used

    def take(self, num_bytes: int) -> Tensor:
        """The next so many bytes; memory of their own where they are more than a page."""
        if num_bytes > PAGE_BYTES:
            return _host_memory(num_bytes, self.pinned)
        if num_bytes > self.left:
            self._page, self._used = self._page + 1, 0
            if self._page == len(self.pages):
                self.pages.append(_host_memory(PAGE_BYTES, self.pinned))
        start = self._used
        self._used += -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        return self.pages[self._page][start : start + num_bytes]


def _pieces(memory: Tensor, parts: list[Tensor]) -> Iterator[Tensor]:
    """For each part a tensor of the same shape: views of the memory, but through NumPy, which gives each its own storage."""
    try:
        array: Any = memory.numpy()
    except TypeError:  # a type that NumPy does not know
        array = memory.view(NUMPY_STANDS_IN[memory.itemsize]).numpy()
    start = 0
    for part in parts:
        end = start + part.numel()
        piece = torch.from_numpy(array[start:end].reshape(part.shape))
        if piece.dtype != memory.dtype:
            piece = piece.view(memory.dtype)
        # Where a dimension has the size 1, any stride is contiguous.
        yield piece if piece.stride() == part.stride() else piece.as_strided(part.shape, part.stride())
        start = end


def empty_copy(tensor: Tensor, *, pinned: bool) -> Tensor:
    """Memory on the host for a copy, in the same order as far as it has no gaps."""
    options: Any = {"device": "cpu", "requires_grad": False, "memory_format": torch.preserve_format}
    try:
        return torch.empty_like(tensor, pin_memory=pinned, **options)
    except RuntimeError:  # as below
        return torch.empty_like(tensor, **options)


def _host_memory(num_bytes: int, pinned: bool) -> Tensor:
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=pinned)
    except RuntimeError:  # locked memory is limited or refused: copies to other memory are slower, but as good
        return torch.empty(num_bytes, dtype=torch.uint8)


# -- how they get there ------------------------------------------------------------------------------------------------


class _SideStream:
    """Carries blocks from a GPU on a stream of its own."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def snapshots(self, parts: list[list[Tensor]], num_bytes: int) -> list[Tensor] | None:
        """Each of the parts as one tensor; None where the device has no room for them."""
        if num_bytes > self._unused_bytes():
            return None
        try:
            return [_gathered(part) for part in parts]
        except torch.OutOfMemoryError:
            return None

    def _unused_bytes(self) -> int:
        """What training has not needed at its peak: the next step begins before the snapshots are given back."""
        free, total = torch.cuda.mem_get_info(self.device)
        limit = int(torch.cuda.get_per_process_memory_fraction(self.device) * total)
        ours = min(limit, free + torch.cuda.memory_reserved(self.device))
        return ours - torch.cuda.max_memory_allocated(self.device)

    def carry(self, snapshots: list[Tensor], memory: list[Tensor]) -> Callable[[], Any]:
        """Begin to copy after all that the current stream has been given so far. Returns what waits for the end of it.

        The memory of the snapshots is the current stream's, so they have to be held until then.
        """
        self.stream.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self.stream):
            for snapshot, target in zip(snapshots, memory, strict=True):
                target.copy_(snapshot, non_blocking=True)
            ended = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            ended.record(self.stream)
        return ended.synchronize


class _AtOnce:
    """Carries blocks of the host itself, at once."""

    def snapshots(self, parts: list[list[Tensor]], num_bytes: int) -> list[Tensor] | None:
        return [_gathered(part) for part in parts]

    def carry(self, snapshots: list[Tensor], memory: list[Tensor]) -> Callable[[], Any]:
        for snapshot, target in zip(snapshots, memory, strict=True):
            target.copy_(snapshot)
        return lambda: None


@functools.cache
def _carrier_from(device: torch.device) -> _SideStream | _AtOnce:
    """One for all trainings."""
    return _SideStream(device) if device.type == "cuda" else _AtOnce()


def _gathered(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows)


def _copy_and_wait(hosts: list[Tensor], tensors: list[Tensor]) -> None:
    torch._foreach_copy_(hosts, tensors, non_blocking=True)
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()
