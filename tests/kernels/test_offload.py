"""What layers keep, put in host memory and fetched from there: the same bits, and less of it on the device."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from etude.kernels import offload
from etude.kernels.offload import Offload, Shelf
from etude.kernels.plan import KernelPlan
from etude.model.paths import PackedPath, choose_path
from tiny import Batch, Padded, assert_same_bits, language_rows, tiny_gemma3, tiny_llama, tiny_qwen3, with_lora

CPU = torch.device("cpu")
LAYERS = 6
KINDS: dict[str, Callable[[], nn.Module]] = {
    "llama": lambda: tiny_llama(num_hidden_layers=LAYERS),
    "qwen3": lambda: tiny_qwen3(num_hidden_layers=LAYERS),
    "gemma3": lambda: tiny_gemma3(num_hidden_layers=LAYERS, layer_types=["sliding_attention", "full_attention"] * 3),
}


WAYS: list[dict[str, Any]] = [
    {"num_offloaded": 4, "num_recomputed": 0, "num_without_gates": 1},
    {"num_offloaded": 2, "num_recomputed": 2, "num_without_gates": 2, "in_flight": 4},
    {"num_offloaded": 3, "num_recomputed": 1, "num_without_gates": 0, "recomputes_offloaded": True},
    {"num_offloaded": LAYERS, "num_recomputed": 0, "num_without_gates": 0},
]
WAY_NAMES = ["gates again", "both", "run again", "all layers"]


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but a few numbers is copied, over pages of which a tensor needs several."""
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 256)
    monkeypatch.setattr(offload, "PAGE_BYTES", 1000)


def batches(count: int = 1) -> list[Batch]:
    return [Padded()(language_rows(4, seed=seed, shortest=3, longest=12 + 8 * seed)) for seed in range(count)]


def path_of(kind: str, **lora: Any) -> tuple[nn.Module, PackedPath]:
    model = with_lora(KINDS[kind](), task_type="CAUSAL_LM", init_lora_weights=False, **lora).train()
    path = choose_path(model, fast_path=True, overridden=(), sample_inputs=batches()[0], training_dtype=None)
    assert isinstance(path, PackedPath) and len(path.plan.blocks) == LAYERS
    return model, path


def shelf_of(plan: KernelPlan) -> Shelf:
    assert plan._shelf is not None
    return plan._shelf


def loss_and_gradients(model: nn.Module, losses: Iterator[Tensor]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(7)
    total = torch.zeros(())
    for loss in losses:
        loss.backward()
        total += loss.detach()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": total, **gradients}


@pytest.mark.parametrize("ways", WAYS, ids=WAY_NAMES)
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_same_bits(kind: str, ways: dict[str, Any]) -> None:
    model, path = path_of(kind)
    data = batches(3)
    run = functools.partial(loss_and_gradients, model)
    expected = run(path.loss(model, batch, 10) for batch in data)
    path.plan.keep(**ways)
    for _ in range(2):
        assert_same_bits(run(path.loss(model, batch, 10) for batch in data), expected)
    path.plan.keep(num_recomputed=0, num_without_gates=0)
    assert path.plan._shelf is None
    assert_same_bits(run(path.loss(model, batch, 10) for batch in data), expected)


class Late:
    """A stream that copies nothing before somebody waits for it, and leaves what has not been waited for spoilt."""

    def __init__(self) -> None:
        self.pending: list[Callable[[], None]] = []
        self.num_begun = self.num_ended = 0

    def copy(self, on_device: list[Tensor], on_host: list[list[Tensor]], *, to_host: bool) -> int:
        for spoilt in [piece for pieces in on_host for piece in pieces] if to_host else on_device:
            spoilt.fill_(255)  # NaN
        storages = [weakref.ref(storage) for storage in on_device]

        def copy_now() -> None:
            there = [storage for reference in storages if (storage := reference()) is not None]
            assert len(there) == len(storages), "freed before its copy had been waited for"
            offload._copy(there, on_host, to_host)

        self.pending.append(copy_now)
        self.num_begun += 1
        return self.num_begun

    def wait(self, event: int) -> None:
        while self.num_ended < event:
            self.pending.pop(0)()
            self.num_ended += 1

    def finish(self) -> None:
        self.wait(self.num_begun)


@pytest.mark.parametrize("ways", WAYS, ids=WAY_NAMES)
def test_nothing_is_read_or_freed_before_its_copy_has_been_waited_for(ways: dict[str, Any]) -> None:
    """And when the backward pass ends, all copies have been: a graph could not be captured otherwise."""
    model, path = path_of("qwen3")
    data = batches(3)
    expected = loss_and_gradients(model, (path.loss(model, batch, 10) for batch in data))
    path.plan.keep(**ways)
    late = shelf_of(path.plan)._carrier = Late()  # type: ignore[assignment]
    for batch in data:
        path.loss(model, batch, 10).backward()
        assert late.pending == [] and late.num_begun > 0
    assert_same_bits(loss_and_gradients(model, (path.loss(model, batch, 10) for batch in data)), expected)


def test_the_same_dropout() -> None:
    model, path = path_of("llama", lora_dropout=0.3)
    batch = batches()[0]
    expected = loss_and_gradients(model, (path.loss(model, batch, 10) for _ in range(1)))
    path.plan.keep(num_offloaded=4, num_recomputed=0, num_without_gates=0)
    assert_same_bits(loss_and_gradients(model, (path.loss(model, batch, 10) for _ in range(1))), expected)


@pytest.mark.parametrize("recomputes", [False, True])
def test_a_shelf_holds_what_the_first_layers_keep(recomputes: bool) -> None:
    model, path = path_of("llama")
    path.plan.keep(num_offloaded=3, num_recomputed=0, num_without_gates=0, recomputes_offloaded=recomputes)
    shelf = shelf_of(path.plan)
    loss = path.loss(model, batches()[0], 10)
    parcels = sorted(shelf._parcels, key=lambda parcel: parcel.on_host[0][0].data_ptr())
    assert len(parcels) == 3
    assert all(not parcel.on_device for parcel in parcels)
    if recomputes:
        assert all(len(parcel.on_host) == 1 for parcel in parcels)  # h alone
    else:
        assert all(len(parcel.on_host) >= 5 for parcel in parcels)  # h, q, k, v, attended, m: each of them once
    loss.backward()
    del parcels
    gc.collect()
    assert not shelf._parcels


def test_the_backward_pass_reads_the_shelf() -> None:
    model, path = path_of("llama")
    batch = batches()[0]
    path.plan.keep(num_offloaded=3, num_recomputed=0, num_without_gates=0)
    expected = loss_and_gradients(model, iter([path.loss(model, batch, 10)]))
    loss = path.loss(model, batch, 10)
    for page in shelf_of(path.plan)._pages:
        page.zero_()
    found = loss_and_gradients(model, iter([loss]))
    differ = {
        int(name.split(".layers.")[1].split(".")[0]) for name in found if not torch.equal(found[name], expected[name])
    }
    assert differ == {0, 1, 2}


def test_at_most_two_layers_come_back_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = path_of("qwen3")
    path.plan.keep(num_offloaded=5, num_recomputed=0, num_without_gates=1)
    shelf = shelf_of(path.plan)
    counts: list[int] = []

    def counted(name: str) -> None:
        original = getattr(shelf, name)

        def wrapper(*arguments: Any) -> Any:
            result = original(*arguments)
            counts.append(sum(bool(parcel.on_device) for parcel in shelf._parcels))
            return result

        monkeypatch.setattr(shelf, name, wrapper)

    counted("_fetch")
    counted("_run")
    path.loss(model, batches()[0], 10).backward()
    assert max(counts) == 2
    assert counts[-1] == 1


def test_places_are_used_again_by_every_micro_batch() -> None:
    model, path = path_of("llama")
    path.plan.keep(num_offloaded=3, num_recomputed=0, num_without_gates=0)
    shelf = shelf_of(path.plan)
    batch = batches()[0]
    used, first_places = set(), set()
    for _ in range(3):
        loss = path.loss(model, batch, 10)
        used.add(shelf._used)
        first_places.add(min(parcel.on_host[0][0].data_ptr() for parcel in shelf._parcels))
        loss.backward()
    assert len(used) == len(first_places) == 1


def test_two_forwards_before_their_backwards() -> None:
    model, path = path_of("qwen3")
    first, second = batches(2)
    path.plan.keep(num_offloaded=4, num_recomputed=0, num_without_gates=0)
    in_turn = loss_and_gradients(model, (path.loss(model, batch, 10) for batch in (first, second)))
    losses = [path.loss(model, batch, 10) for batch in (first, second)]
    assert_same_bits(loss_and_gradients(model, iter(losses)), in_turn)
    losses = [path.loss(model, batch, 10) for batch in (first, second)]
    backwards = loss_and_gradients(model, reversed(losses))
    for name, gradient in in_turn.items():
        torch.testing.assert_close(backwards[name], gradient)


def test_a_forward_that_failed_leaves_nothing_behind() -> None:
    model, path = path_of("llama")
    batch = batches()[0]
    path.plan.keep(num_offloaded=4, num_recomputed=0, num_without_gates=0)
    expected = loss_and_gradients(model, iter([path.loss(model, batch, 10)]))
    block: Any = path.plan.blocks[2]
    run, block._run = block._run, lambda *inputs: (_ for _ in ()).throw(torch.OutOfMemoryError("out of memory"))
    with pytest.raises(torch.OutOfMemoryError):
        path.loss(model, batch, 10)
    block._run = run
    used = shelf_of(path.plan)._used
    gc.collect()
    assert_same_bits(loss_and_gradients(model, iter([path.loss(model, batch, 10)])), expected)
    assert shelf_of(path.plan)._used > used


def test_a_forward_without_gradients_needs_no_shelf() -> None:
    model, path = path_of("llama")
    path.plan.keep(num_offloaded=4, num_recomputed=0, num_without_gates=0)
    with torch.no_grad():
        path.loss(model, batches()[0], 10)
    assert shelf_of(path.plan)._used == 0


def test_layers_below_the_first_adapter_keep_nothing() -> None:
    model, path = path_of("llama", layers_to_transform=[4, 5], target_modules=["q_proj", "down_proj"])
    batch = batches()[0]
    expected = loss_and_gradients(model, iter([path.loss(model, batch, 10)]))
    path.plan.keep(num_offloaded=5, num_recomputed=0, num_without_gates=0)
    assert_same_bits(loss_and_gradients(model, iter([path.loss(model, batch, 10)])), expected)


def test_keeping_less_begins_with_what_is_on_the_device() -> None:
    model, path = path_of("llama")
    batch = batches()[0]
    expected = loss_and_gradients(model, iter([path.loss(model, batch, 10)]))
    path.plan.keep(num_offloaded=2, num_recomputed=0, num_without_gates=2)
    run_again = []
    while path.plan.keep_less():
        run_again.append([index for index, block in enumerate(path.plan.blocks) if block.recomputes])
        assert_same_bits(loss_and_gradients(model, iter([path.loss(model, batch, 10)])), expected)
    assert run_again == [[2, 3], [2, 3, 4, 5], [0, 1, 2, 3, 4, 5]]


def test_undo_gives_the_memory_back() -> None:
    model, path = path_of("llama")
    path.plan.keep(num_offloaded=3, num_recomputed=0, num_without_gates=0, host_bytes=10_000)
    shelf = shelf_of(path.plan)
    assert len(shelf._pages) == 10
    path.loss(model, batches()[0], 10).backward()
    path.plan.undo()
    assert shelf._pages == [] and path.plan._shelf is None
    assert all(block.shelve is None for block in path.plan.blocks)


def test_memory_that_is_refused_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, path = path_of("llama")

    def refuse(self: Shelf, num_bytes: int) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(Shelf, "reserve", refuse)
    with pytest.raises(RuntimeError, match="out of memory"):
        path.plan.keep(num_offloaded=3, num_recomputed=0, num_without_gates=0, host_bytes=10_000)
    assert all(block.shelve is None and block.keeps_gates for block in path.plan.blocks)


def test_views_and_shared_tensors_come_back_as_they_were() -> None:
    """Whole storages are copied, each once, however many views are kept; what is spared and what is small is not."""
    shelf = Shelf(CPU, Offload(1))
    wide = torch.randn(40, 30)
    spared = torch.randn(100)

    def layer() -> Tensor:
        x = wide.clone().requires_grad_() * 1.0
        left, right = x[:, :10], x.t()[5:15].t()
        products = (left * right).sum() + (left * left).sum() + (spared * x.sum()).sum()
        return products + (x[0, :3] * x[0, 3:6]).sum()

    plain = layer()
    plain.backward()
    output = shelf.run(0, layer, (spared,))
    shelf.run(1, lambda: torch.ones(2, requires_grad=True) * 1.0, ())
    shelf.run(2, lambda: torch.ones(2, requires_grad=True) * 1.0, ())
    (parcel,) = shelf._parcels
    assert [sum(piece.numel() for piece in pieces) for pieces in parcel.on_host] == [wide.nbytes]
    assert not parcel.on_device
    assert torch.equal(output, plain)
    output.backward()
