"""The shapes that CUDA graphs are captured for, and batches extended to them: nothing of it needs a GPU."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from etude.model.graphs import LONGEST_MIN, Slots, fill_slots, graph_obstacle, slots_of
from etude.model.packing import PackedBatch, pack
from etude.model.paths import PackedPath
from tiny import Padded, causal_lora, language_rows


def batch_of(lengths: list[int], num_labels: int | None = None) -> PackedBatch:
    """Tokens that count from 1, so that every place can be told from a filled one."""
    T = sum(lengths)
    N = T - len(lengths) if num_labels is None else num_labels
    ends = torch.tensor([0, *lengths]).cumsum(0).int()
    tokens = torch.arange(1, T + 1)[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    return PackedBatch(tokens, positions, ends, tuple(lengths), torch.arange(N), torch.arange(N) + 2)


def test_a_ragged_batch_gets_room_for_a_sample_of_padding() -> None:
    assert slots_of(batch_of([100, 30, 7])) == Slots(256, 4, 192, LONGEST_MIN, None)
    assert slots_of(batch_of([50, 40, 30, 20])) == Slots(256, 8, 192, LONGEST_MIN, None)
    assert slots_of(batch_of([128, 127, 1])).samples == 4  # full, and still one sample of no length


def test_even_samples_that_fill_their_slots_are_a_batch() -> None:
    assert slots_of(batch_of([128, 128])) == Slots(256, 2, 256, 128, 128)
    assert slots_of(batch_of([100, 100])) == Slots(256, 4, 256, LONGEST_MIN, None)  # 56 slots are left over
    assert slots_of(batch_of([256])) == Slots(256, 1, 256, 256, 256)


@pytest.mark.parametrize(
    ("tokens", "slots"), [(1, 256), (256, 256), (257, 512), (4096, 4096), (4097, 4608), (9000, 9216), (33000, 36864)]
)
def test_token_slots_waste_at_most_a_sixteenth(tokens: int, slots: int) -> None:
    found = slots_of(batch_of([tokens - 1, 1] if tokens > 1 else [1]))
    assert found.tokens == slots
    assert slots - tokens < max(256, tokens / 8)


@pytest.mark.parametrize(
    ("labels", "slots"), [(0, 64), (1, 64), (64, 64), (65, 128), (128, 128), (193, 256), (255, 256)]
)
def test_label_slots_come_in_quarters(labels: int, slots: int) -> None:
    assert slots_of(batch_of([100, 155], num_labels=labels)).labels == slots


def test_no_sample_is_longer_than_the_slots_say() -> None:
    """The sample of padding included: of 33,000 tokens in short samples it is one of 3,864."""
    draw = random.Random(0)
    for _ in range(60):
        lengths = [draw.randint(1, draw.choice([20, 3000])) for _ in range(draw.choice([1, 3, 60]))]
        batch = batch_of(lengths)
        slots = slots_of(batch)
        assert int(fill_slots(batch, slots).cu_seqlens.diff().max()) <= slots.longest
    short = batch_of([1000] * 33)
    slots = slots_of(short)
    assert int(fill_slots(short, slots).cu_seqlens.diff().max()) == 3864 <= slots.longest


@pytest.mark.parametrize("lengths", [[100, 30, 7], [50, 40, 30, 20], [128, 127, 1], [128, 128], [100, 100], [5]])
def test_a_filled_batch_says_the_same_and_no_more(lengths: list[int]) -> None:
    batch = batch_of(lengths)
    slots = slots_of(batch)
    filled = fill_slots(batch, slots)
    T, N, samples = sum(lengths), batch.targets.numel(), len(lengths)
    assert filled.input_ids.shape == filled.position_ids.shape == (1, slots.tokens)
    assert filled.cu_seqlens.shape == (slots.samples + 1,) and filled.cu_seqlens.dtype == torch.int32
    assert filled.predicting.shape == filled.targets.shape == (slots.labels,)
    assert torch.equal(filled.input_ids[:, :T], batch.input_ids) and not filled.input_ids[:, T:].any()
    assert torch.equal(filled.position_ids[:, :T], batch.position_ids) and not filled.position_ids[:, T:].any()
    assert torch.equal(filled.cu_seqlens[: samples + 1], batch.cu_seqlens)
    assert bool((filled.cu_seqlens[samples + 1 :] == slots.tokens).all()) and filled.cu_seqlens[-1] == slots.tokens
    assert torch.equal(filled.predicting[:N], batch.predicting) and torch.equal(filled.targets[:N], batch.targets)
    assert filled.weights is not None
    assert bool((filled.weights[:N] == 1).all()) and not filled.weights[N:].any()
    is_even = slots.even_length is not None
    assert filled.lengths == (tuple(lengths) if is_even else (slots.tokens,))
    assert filled.is_even == is_even and filled.longest == (None if is_even else slots.longest)
    assert slots_of(batch) == slots  # the batch itself is as it was


def test_batches_of_one_shape_share_a_graph() -> None:
    """All that a graph's shape and its kernels' arguments depend on is in the slots."""
    one, other = (fill_slots(batch, slots_of(batch)) for batch in (batch_of([100, 37]), batch_of([60, 60, 20])))
    assert [shape_of(value) for value in vars(one).values()] == [shape_of(value) for value in vars(other).values()]


def shape_of(value: object) -> object:
    return (value.shape, value.dtype) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("masked", [True, False])
def test_the_loss_of_a_filled_batch_is_that_of_the_batch(masked: bool) -> None:
    model = causal_lora(init_lora_weights=False)
    packed = pack(Padded()(language_rows(5, seed=2, masked=masked)))
    assert packed is not None
    filled = fill_slots(packed, slots_of(packed))
    # Attention over samples one by one reads their lengths, which a graph must not: they are given back here.
    lengths = tuple(filled.cu_seqlens.diff().tolist())
    told = PackedBatch(**(vars(filled) | {"lengths": lengths, "longest": None}))
    path = PackedPath(model, kernel="per_sequence", head="chunked")
    results = []
    for batch in (packed, told):
        model.zero_grad()
        loss = path.loss(model, batch, 7)
        loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        results.append((loss.detach(), torch.cat(gradients)))
    (loss, gradient), (filled_loss, filled_gradient) = results
    torch.testing.assert_close(filled_loss, loss, rtol=1e-6, atol=0.0)
    assert float((filled_gradient - gradient).norm() / gradient.norm()) < 1e-6


def test_where_there_are_no_graphs() -> None:
    path = PackedPath(causal_lora(), kernel="per_sequence", head="chunked")
    assert graph_obstacle(path, torch.device("cpu"), scales_loss=False) == "graphs are for GPUs"
    assert "fixed shapes" in str(graph_obstacle(path, torch.device("cuda"), scales_loss=False))
    path.kernel = "varlen"
    assert "float16" in str(graph_obstacle(path, torch.device("cuda"), scales_loss=True))
    assert graph_obstacle(path, torch.device("cuda"), scales_loss=False) is None
