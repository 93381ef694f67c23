"""What layers keep for their backward pass, put on a shelf in host memory until that pass comes near.

A layer's tensors are copied while the layers after it compute, and come back while the layer after it is in its backward
pass, on a stream of their own. Bytes are copied, so no result changes. What is small, or shared by all layers, stays.

Under capture the copies become part of the graph: memory on the host never moves, and the streams are joined by events
alone. Batches that have one size take the same places, and a graph is captured only after its size has run without.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

SMALLEST_BYTES = 2**20
"""What is smaller stays on the device: a copy costs as much as its start."""

PAGE_BYTES = 2**26
"""Host memory is taken in pieces of this size: torch rounds what it pins up to a power of two."""


@dataclass(frozen=True)
class Offload:
    """How many layers, counted from the first, put what they keep on the shelf, and how many may do so at a time."""

    num_layers: int
    in_flight: int = 2


class _Place(NamedTuple):
    """A tensor in the storages of a parcel."""

    storage: int
    dtype: torch.dtype
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


@dataclass(eq=False)
class _Parcel:
    """What one layer keeps in one forward pass. It lives as long as something of it is still asked for."""

    on_device: list[Tensor] = field(default_factory=list)
    """The storages as bytes; empty while they are on the host alone."""
    on_host: list[list[Tensor]] = field(default_factory=list)
    """The pieces of each storage, in order."""
    index_of: dict[int, int] = field(default_factory=dict)
    """The number of the storage at an address, while the layer runs."""
    event: Any = None
    """When the copy that was begun last will have ended."""
    is_leaving: bool = False

    def tensor(self, place: _Place) -> Tensor:
        storage = self.on_device[place.storage]
        empty = torch.empty(0, dtype=place.dtype, device=storage.device)
        return empty.set_(storage.untyped_storage(), place.offset, place.size, place.stride)


class Shelf:
    """Host memory for the first layers of a model, and the stream that carries to and from it.

    `reserve` takes the memory; where a batch needs more than that, more is taken on its way.
    """

    def __init__(self, device: torch.device, offload: Offload) -> None:
        self.device, self.offload = device, offload
        self._pages: list[Tensor] = []
        self._used = 0
        self._carrier: _Carrier | _AtOnce = _Carrier(device) if device.type == "cuda" else _AtOnce()
        self._parcels: weakref.WeakSet[_Parcel] = weakref.WeakSet()
        self._leaving: deque[tuple[int, _Parcel]] = deque()
        self._arriving: _Parcel | None = None  # held until the main stream has waited for it
        self._last: Callable[[], _Parcel | None] = lambda: None

    def reserve(self, num_bytes: int) -> None:
        """Take host memory for so many bytes.

        Raises:
            RuntimeError: the host does not give it.
        """
        while len(self._pages) * PAGE_BYTES < num_bytes:
            pinned = self.device.type == "cuda"
            self._pages.append(torch.empty(PAGE_BYTES, dtype=torch.uint8, pin_memory=pinned))

    def release(self) -> None:
        """Give the host memory back; graphs that were captured with it must not run any more."""
        self._carrier.finish()
        self._leaving.clear()
        self._arriving = None
        self._pages.clear()
        give_back = getattr(torch._C, "_host_emptyCache", None)
        if self.device.type == "cuda" and give_back is not None:
            give_back()

    def run(self, number: int, layer: Callable[[], Tensor], spared: tuple[Tensor, ...]) -> Tensor:
        """The output of the layer with this number; what it keeps goes to the host, but `spared`.

        Also called for the layers after those, whose passes the last copies are hidden behind.
        """
        if number == 0:
            self._begin()
        while self._leaving and self._leaving[0][0] <= number - self.offload.in_flight:
            self._take_leave(self._leaving[0][1])
        before = self._last
        if number < self.offload.num_layers:
            output = self._run(number, layer, spared)
        else:
            output, self._last = layer(), lambda: None
        if output.requires_grad and before() is not None:
            # As the backward pass of this layer begins.
            output.register_hook(lambda gradient: self._fetch(before()))  # type: ignore[no-untyped-call]
        return output

    def _run(self, number: int, layer: Callable[[], Tensor], spared: tuple[Tensor, ...]) -> Tensor:
        parcel = _Parcel()
        shared = {tensor.untyped_storage().data_ptr() for tensor in spared}

        def pack(tensor: Tensor) -> Any:
            storage = tensor.untyped_storage()
            address = storage.data_ptr()
            is_kept = tensor.device != self.device or storage.nbytes() < SMALLEST_BYTES or address in shared
            if is_kept or isinstance(tensor, torch.nn.Parameter):
                return tensor.detach()
            if address not in parcel.index_of:
                parcel.index_of[address] = len(parcel.on_device)
                parcel.on_device.append(torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage))
            index = parcel.index_of[address]
            return parcel, _Place(index, tensor.dtype, tensor.shape, tensor.stride(), int(tensor.storage_offset()))

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            owner, place = packed
            self._fetch(owner)
            self._arrive(owner)
            tensor: Tensor = owner.tensor(place)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            output = layer()
        parcel.index_of.clear()
        self._last = weakref.ref(parcel)
        if parcel.on_device:
            parcel.on_host = [self._room_for(storage.numel()) for storage in parcel.on_device]
            parcel.event = self._carrier.copy(parcel.on_device, parcel.on_host, to_host=True)
            parcel.is_leaving = True
            self._leaving.append((number, parcel))
            self._parcels.add(parcel)
        return output

    def _begin(self) -> None:
        """A forward pass begins. Places are free again, unless another pass still waits for its backward pass."""
        if (
            self._leaving or self._arriving is not None
        ):  # of a pass that failed, or whose backward pass is still to come
            self._carrier.finish()
        for _, parcel in self._leaving:
            parcel.on_device, parcel.event, parcel.is_leaving = [], None, False
        self._leaving.clear()
        self._arriving = None
        self._last = lambda: None
        if not self._parcels:
            self._used = 0

    def _room_for(self, num_bytes: int) -> list[Tensor]:
        """The next so many bytes of the pages."""
        start, self._used = self._used, self._used + num_bytes
        self.reserve(self._used)
        pieces = []
        while num_bytes:
            page, first = divmod(start, PAGE_BYTES)
            size = min(num_bytes, PAGE_BYTES - first)
            pieces.append(self._pages[page][first : first + size])
            start, num_bytes = start + size, num_bytes - size
        return pieces

    def _take_leave(self, parcel: _Parcel) -> None:
        """The copy to the host ends before the main stream goes on; then the memory on the device is free."""
        self._stop_leaving(parcel)
        parcel.on_device = []

    def _stop_leaving(self, parcel: _Parcel) -> None:
        self._carrier.wait(parcel.event)
        parcel.event, parcel.is_leaving = None, False
        self._leaving = deque(entry for entry in self._leaving if entry[1] is not parcel)

    def _fetch(self, parcel: _Parcel | None) -> None:
        """Begin to copy a parcel back, unless it is there or on its way."""
        if parcel is None or not parcel.on_host:
            return
        if parcel.is_leaving:
            self._stop_leaving(parcel)  # it need not come back
        if parcel.on_device:
            return
        sizes = [sum(piece.numel() for piece in pieces) for pieces in parcel.on_host]
        parcel.on_device = [torch.empty(size, dtype=torch.uint8, device=self.device) for size in sizes]
        parcel.event = self._carrier.copy(parcel.on_device, parcel.on_host, to_host=False)
        if self._arriving is not None:
            self._arrive(self._arriving)
        self._arriving = parcel

    def _arrive(self, parcel: _Parcel) -> None:
        if parcel.event is not None:
            self._carrier.wait(parcel.event)
            parcel.event = None
        if self._arriving is parcel:
            self._arriving = None


class _Carrier:
    """Copies on a stream of its own. Memory on the device belongs to the stream that is current when it is asked for; it is
    held until that stream has waited for the copy, so that nothing else is put there meanwhile."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream: Any = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, on_device: list[Tensor], on_host: list[list[Tensor]], *, to_host: bool) -> Any:
        """Begin to copy after all that the current stream has been given so far; returns when it will have ended."""
        self.stream.wait_event(torch.cuda.current_stream(self.device).record_event())
        with torch.cuda.stream(self.stream):
            _copy(on_device, on_host, to_host)
            return self.stream.record_event()

    def wait(self, event: Any) -> None:
        torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self) -> None:
        """Wait for all copies. A capture begins with a device that has nothing left to do."""
        if not torch.cuda.is_current_stream_capturing():
            torch.cuda.current_stream(self.device).wait_stream(self.stream)


class _AtOnce:
    """Copies that have ended when they return."""

    def copy(self, on_device: list[Tensor], on_host: list[list[Tensor]], *, to_host: bool) -> Any:
        _copy(on_device, on_host, to_host)

    def wait(self, event: Any) -> None:
        pass

    def finish(self) -> None:
        pass


def _copy(on_device: list[Tensor], on_host: list[list[Tensor]], to_host: bool) -> None:
    for storage, pieces in zip(on_device, on_host, strict=True):
        start = 0
        for piece in pieces:
            part = storage[start : start + piece.numel()]
            start += piece.numel()
            target, source = (piece, part) if to_host else (part, piece)
            target.copy_(source, non_blocking=True)


# -- what the machine can do -------------------------------------------------------------------------------------------

SAMPLE_BYTES, SAMPLE_ROWS, SAMPLE_WIDTH = 2**26, 2048, 4096


class Rates(NamedTuple):
    """What was measured of a GPU and its connection to the host."""

    products: float
    """Operations per second of a matrix product."""
    copies: float
    """Bytes per second to or from pinned memory, whichever is slower; 0 where none can be had."""


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """A few milliseconds of matrix products and of copies. The memory this takes is free again."""
    x = torch.zeros(SAMPLE_ROWS, SAMPLE_WIDTH, dtype=dtype, device=device)
    weight = torch.zeros(SAMPLE_WIDTH, SAMPLE_WIDTH, dtype=dtype, device=device)
    product = torch.empty_like(x)
    products = 2 * x.numel() * SAMPLE_WIDTH / _seconds(lambda: torch.mm(x, weight, out=product))
    try:
        host = torch.empty(SAMPLE_BYTES, dtype=torch.uint8, pin_memory=True)
    except RuntimeError:  # pinned memory is limited or refused
        return Rates(products, 0.0)
    there = torch.empty(SAMPLE_BYTES, dtype=torch.uint8, device=device)
    seconds = max(
        _seconds(lambda: host.copy_(there, non_blocking=True)), _seconds(lambda: there.copy_(host, non_blocking=True))
    )
    return Rates(products, SAMPLE_BYTES / seconds)


def _seconds(work: Callable[[], Any]) -> float:
    """The shorter of two runs after a first one."""
    work()
    found: list[float] = []
    for _ in range(2):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        work()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1000.0)
    return min(found)
