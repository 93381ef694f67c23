"""Copies of what a checkpoint will hold: equal, with memory of their own, and in pages where they come from a GPU.

Tensors of the CPU take the part of those on a GPU here, and are carried at once or when they are waited for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from etude.checkpoint import pages
from etude.checkpoint.copies import Copies, on_host

TYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool,
    torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page has room for 64 numbers."""
    monkeypatch.setattr("etude.checkpoint.pages.PAGE_BYTES", 256)
    monkeypatch.setattr("etude.checkpoint.copies.PAGE_BYTES", 256)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Blocks arrive when they are waited for. How many each time."""
    waited: list[int] = []

    def carry(carrier: Any, snapshots: list[torch.Tensor], memory: list[torch.Tensor]) -> Callable[[], None]:
        def wait() -> None:
            waited.append(len(snapshots))
            for snapshot, target in zip(snapshots, memory, strict=True):
                target.copy_(snapshot)

        return wait

    monkeypatch.setattr(pages._AtOnce, "carry", carry)
    return waited


def numbered(*sizes: int) -> list[torch.Tensor]:
    return [torch.arange(size, dtype=torch.float32) + 1000 * number for number, size in enumerate(sizes)]


def assert_equal(copied: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
    assert len(copied) == len(tensors)
    for copy, tensor in zip(copied, tensors, strict=True):
        assert (copy.dtype, copy.shape, copy.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
        assert copy.tolist() == tensor.tolist()
        assert copy.data_ptr() != tensor.data_ptr() or not tensor.numel()


# Trees


@pytest.mark.parametrize("gathered", ["cuda", "cpu"])
def test_copies_are_equal_and_their_own(gathered: str) -> None:
    shared, betas = torch.arange(6.0).reshape(2, 3), (0.9, 0.999)
    tree = {"a": [shared, shared.t()], "b": {"again": shared, "plain": (1, "x", None)}, "groups": [betas, betas]}
    copied = Copies(gathered).take(tree)
    assert copied["a"][0] is copied["b"]["again"] and copied["a"][0] is not shared
    assert copied["groups"][0] is copied["groups"][1] is betas
    assert copied["a"][1].stride() == shared.t().stride()
    before = shared.clone()
    shared.add_(1)
    assert torch.equal(copied["a"][0], before) and torch.equal(copied["a"][1], before.t())


@pytest.mark.parametrize("gathered", ["cuda", "cpu"])
def test_memory_is_used_again(gathered: str) -> None:
    copies, tensors = Copies(gathered), [torch.zeros(4), torch.zeros(4), torch.zeros(2, dtype=torch.bfloat16)]
    first = [tensor.data_ptr() for tensor in copies.take(tensors)]
    tensors[1].fill_(5)
    second = copies.take(tensors)
    assert [tensor.data_ptr() for tensor in second] == first and second[1].tolist() == [5.0] * 4
    third = copies.take(tensors[:1])
    assert third[0].data_ptr() == first[0]


def test_parameters_lose_their_gradients_and_objects_are_copied_whole() -> None:
    class Kept:
        def __init__(self) -> None:
            self.numbers = [1, 2]

    parameter, kept = torch.nn.Parameter(torch.ones(2)), Kept()
    marked = torch.zeros(2)
    marked.note = "a tensor that says more"  # type: ignore[attr-defined]
    copied = Copies("cpu").take({"parameter": parameter, "kept": kept, "marked": marked})
    kept.numbers.append(3)
    assert copied["kept"].numbers == [1, 2]
    assert not copied["parameter"].requires_grad and type(copied["parameter"]) is torch.Tensor
    assert copied["marked"].note == "a tensor that says more"


def test_what_is_on_the_host_stays_the_same_object() -> None:
    tree = {"state": [torch.zeros(2)], "betas": (0.9, 0.999)}
    assert on_host(tree)["state"][0] is tree["state"][0] and on_host(tree)["betas"] is tree["betas"]


# Pages


def test_tensors_of_every_type_and_form() -> None:
    dense = [(torch.arange(6.0) + number).reshape(2, 3).to(dtype) for number, dtype in enumerate(TYPES)]
    dense += [torch.tensor(7.5), torch.zeros(0, 3), torch.arange(6.0).reshape(2, 3).t()]
    dense += [torch.arange(4.0).as_strided((1, 4), (9, 1))]
    with_gaps = [torch.arange(9.0)[::2], torch.arange(3.0).expand(2, 3)]
    copied = Copies("cpu").take([dense, with_gaps])
    assert_equal(copied[0], dense)
    assert [copy.tolist() for copy in copied[1]] == [tensor.tolist() for tensor in with_gaps]
    assert all(copy.is_contiguous() for copy in copied[1])


def test_each_copy_has_a_storage_of_its_own() -> None:
    """`torch.save` writes whole storages, and safetensors refuses those that are shared."""
    copied = Copies("cpu").take([*numbered(5, 7), torch.ones(3, dtype=torch.bfloat16)])
    assert [copy.untyped_storage().nbytes() for copy in copied] == [20, 28, 6]
    assert len({copy.untyped_storage().data_ptr() for copy in copied}) == 3


@pytest.mark.parametrize(
    ("sizes", "num_pages"),
    [
        ([64], 1),  # to the last byte
        ([40, 24, 1], 2),
        ([40, 25], 2),
        ([30, 30, 30, 30, 30], 3),
        ([65], 0),  # larger than a page
        ([10, 200, 10, 64, 3], 3),
        ([200, 64, 65, 64], 2),
    ],
)
def test_page_borders(sizes: list[int], num_pages: int, small_pages: None, waits: list[int]) -> None:
    copies, tensors = Copies("cpu"), numbered(*sizes)
    copied, expected = copies.take(tensors), [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.fill_(-1)
    copies.arrive()
    assert_equal(copied, expected)
    assert len(copies._pages._pages) == num_pages


def test_types_share_a_page(small_pages: None) -> None:
    tensors = [torch.full((3,), float(number), dtype=dtype) for number, dtype in enumerate(TYPES[:4])]
    copies = Copies("cpu")
    assert_equal(copies.take(tensors), tensors)
    assert len(copies._pages._pages) == 1


def test_tensors_may_change_before_they_arrive(small_pages: None, waits: list[int]) -> None:
    copies, tensors = Copies("cpu"), numbered(20, 50, 100)
    copied = copies.take(tensors)
    assert waits == [] and copied[0].tolist() != tensors[0].tolist()
    expected = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.add_(7)
    copies.arrive()
    assert_equal(copied, expected)
    assert waits == [3] and copies._pages._under_way == []
    copies.arrive()
    assert waits == [3]


def test_what_is_under_way_arrives_before_its_memory_is_used_again(waits: list[int]) -> None:
    copies, tensors = Copies("cpu"), numbered(5, 6)
    for number in range(3):
        tensors[0].fill_(number)
        copied = copies.take(tensors)
        assert waits == [1] * number
    copies.arrive()
    assert_equal(copied, tensors)
    other = copies.take(tensors[:1])
    copies.take(tensors)
    assert waits == [1] * 4 and other[0].tolist() == tensors[0].tolist()


def test_a_rehearsal_finds_the_places_and_copies_nothing(waits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    copies, tensors = Copies("cpu"), [torch.nn.Parameter(tensor) for tensor in numbered(20, 100)]
    for _ in range(2):
        copies.rehearse({"weights": tensors, "alone": "text"})
    layout = copies._pages._layout
    kept = [row for blocks in layout._rows.values() for block in blocks for row in block]
    assert len(kept) == 2 and not copies._pages._under_way
    assert all(row.grad_fn is None for row in kept)  # a CUDA graph must not meet nodes of another stream
    monkeypatch.setattr(pages, "_Layout", lambda tensors: pytest.fail("the places are known"))
    copied = copies.take(tensors)
    copies.arrive()
    assert_equal(copied, tensors)
    assert copies._pages._layout is layout and waits == [1]


@pytest.mark.parametrize("change", ["more", "fewer", "shape", "type", "order", "stride"])
def test_other_tensors_than_before(change: str, small_pages: None) -> None:
    copies, tensors = Copies("cpu"), [tensor.reshape(2, -1) for tensor in numbered(20, 20, 100)]
    copies.take(tensors)
    num_pages = len(copies._pages._pages)
    changed: dict[str, Callable[[], list[torch.Tensor]]] = {
        "more": lambda: [*tensors, torch.full((70,), 3.0)],
        "fewer": lambda: tensors[1:],
        "shape": lambda: [tensors[0].reshape(4, 5), *tensors[1:]],
        "type": lambda: [tensors[0].bfloat16(), *tensors[1:]],
        "order": lambda: tensors[::-1],
        "stride": lambda: [tensors[0], tensors[1].t().contiguous().t(), tensors[2]],
    }
    other = changed[change]()
    for _ in range(2):
        assert_equal(copies.take(other), other)
        other[0].add_(1)
    assert_equal(copies.take(tensors), tensors)
    assert len(copies._pages._pages) == num_pages


def test_one_object_in_several_places_takes_one_place() -> None:
    copies, (tensor,) = Copies("cpu"), numbered(6)
    copied = copies.take({"weights": tensor, "state": [tensor, {"again": tensor}]})
    assert copied["weights"] is copied["state"][0] is copied["state"][1]["again"]
    assert len(copies._pages.hosts) == 1


def test_no_room_on_the_device(waits: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are copied before `take` returns then."""
    monkeypatch.setattr(pages._AtOnce, "snapshots", lambda *arguments: None)
    tensors = [*numbered(20, 50), torch.tensor(2.5), torch.ones(3, dtype=torch.bfloat16)]
    copied = Copies("cpu").take(tensors)
    assert_equal(copied, tensors)
    assert waits == []


def test_memory_is_taken_ahead(small_pages: None) -> None:
    copies, tensors = Copies("cpu"), numbered(30, 30, 40, 100)
    copies.reserve(tensor.nbytes for tensor in tensors)
    reserved = list(copies._pages._pages)
    assert len(reserved) == 2  # what is larger than a page is no part of one
    copies.take(tensors)
    assert len(copies._pages._pages) == 2
    assert all(now is then for now, then in zip(copies._pages._pages, reserved, strict=True))
    copies.reserve([8])
    assert len(copies._pages._pages) == 2


def test_locked_memory_that_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty

    def refuse(*sizes: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        if pin_memory:
            raise RuntimeError("out of memory")
        return empty(*sizes, **options)

    monkeypatch.setattr(torch, "empty", refuse)
    assert pages._host_memory(100, pinned=True).nbytes == 100


def test_a_failure_on_the_way_hands_out_nothing_that_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    """No place was found the first time: the second time may not take the tensors themselves for their copies."""
    copies, tensors = Copies("cpu"), numbered(20)

    def no_memory(*arguments: Any) -> torch.Tensor:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(pages, "_host_memory", no_memory)
        copies.take(tensors)
    assert_equal(copies.take(tensors), tensors)
