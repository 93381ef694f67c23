"""What layers keep, and where, for the memory there is: counted and timed from numbers, on no GPU."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from etude import Trainer, TrainingArguments
from etude.hooks import forward
from etude.kernels.offload import Rates, Shelf
from etude.kernels.plan import plan_kernels
from etude.model.capabilities import causal_model, decoder_of
from etude.model.memory import (
    CANDIDATE_TOKENS,
    EFFICIENT_TOKENS,
    SHARE_FOR_LAYERS,
    HeadBytes,
    LayerBytes,
    LayerSeconds,
    MemoryPlan,
    Rows,
    peak_bytes,
    plan_memory,
    seconds_of,
    seconds_per_token,
)
from tiny import Padded, language_rows, tiny_llama, with_lora

GIB = 2**30
NUM_LAYERS = 32
LAYER = LayerBytes(everything=94_576, without_gates=37_232, recomputed=8_192, passing=176_128, passing_forward=102_400)
"""Of an 8B Llama in bfloat16, with LoRA of rank 16."""
HEAD = HeadBytes(per_token=65_536, chunk=525_336_576)
OPERATIONS = (436_207_616, 234_881_024, 318_767_104)
QUANTIZED = (*OPERATIONS, 218_103_808_000, 117_440_512_000)
ROWS = Rows(4, 2048.0)


def seconds(*, copies: float = 50e9, quantized: bool = False) -> LayerSeconds:
    return seconds_of(QUANTIZED if quantized else (*OPERATIONS, 0, 0), 7e14, copies)


def planned(
    gib: float,
    wanted: int | None = None,
    *,
    host_gib: float = 100.0,
    timing: LayerSeconds | None = None,
    longest: int = 2048,
    rows: Rows = ROWS,
) -> MemoryPlan:
    return plan_memory(
        int(gib * GIB), LAYER, NUM_LAYERS, HEAD, wanted, longest,
        seconds=timing or seconds(), rows=rows, host_room=int(host_gib * GIB),
    )  # fmt: skip


def peak(plan: MemoryPlan) -> int:
    return peak_bytes(plan, LAYER, NUM_LAYERS, HEAD)


def cost(plan: MemoryPlan, timing: LayerSeconds) -> float:
    return seconds_per_token(plan, LAYER, NUM_LAYERS, timing, ROWS)


def test_with_room_for_everything_nothing_is_computed_twice() -> None:
    assert planned(70) == MemoryPlan(CANDIDATE_TOKENS[0])
    assert planned(8.2) == MemoryPlan(EFFICIENT_TOKENS)
    assert planned(70, wanted=700, longest=500) == MemoryPlan(700)


def test_less_room_is_met_by_the_host_where_copies_are_fast() -> None:
    plan = planned(1.85)
    assert plan.tokens == EFFICIENT_TOKENS
    assert plan.num_offloaded > NUM_LAYERS / 2
    without = planned(1.85, host_gib=0)
    assert without.num_offloaded == 0 and without.num_recomputed > NUM_LAYERS / 2
    assert cost(plan, seconds()) < cost(without, seconds())


def test_copies_that_no_layer_hides_are_not_made() -> None:
    slow = planned(1.85, timing=seconds(copies=5e9))
    assert slow == planned(1.85, host_gib=0, timing=seconds(copies=5e9))
    assert planned(1.85, timing=seconds(copies=0)).num_offloaded == 0


def test_quantised_layers_are_unpacked_for_few_large_micro_batches() -> None:
    plan, without = (planned(1.58, host_gib=host, timing=seconds(quantized=True)) for host in (100.0, 0.0))
    assert plan.tokens == 2 * without.tokens == 4096
    assert plan.num_offloaded > NUM_LAYERS / 2
    assert planned(1.58).tokens == 2048  # unpacked they are as fast in small ones


def test_the_host_is_asked_for_half_of_what_it_has() -> None:
    plan = planned(1.85, host_gib=1.0)
    assert 0 < plan.host_bytes(LAYER) <= GIB / 2
    assert plan.host_bytes(LAYER) == plan.num_offloaded * plan.tokens * (
        LAYER.recomputed if plan.recomputes_offloaded else LAYER.without_gates
    )
    assert plan.num_offloaded < planned(1.85).num_offloaded


@pytest.mark.parametrize("host_gib", [0.0, 2.0, 100.0])
@pytest.mark.parametrize("quantized", [False, True])
def test_every_plan_fits_and_more_room_never_costs_time(host_gib: float, quantized: bool) -> None:
    timing = seconds(quantized=quantized)
    before = float("inf")
    for gib in (1.5, 2.0, 3.0, 4.5, 7.0, 10.0, 15.0, 30.0):
        plan = planned(gib, host_gib=host_gib, timing=timing)
        assert peak(plan) <= SHARE_FOR_LAYERS * gib * GIB
        assert cost(plan, timing) <= before
        before = cost(plan, timing)
        assert plan.num_offloaded + plan.num_recomputed + plan.num_without_gates <= NUM_LAYERS
        assert plan.num_offloaded <= NUM_LAYERS - 2


def test_no_other_way_that_fits_is_faster() -> None:
    """Against ways drawn at random."""
    draw, timing, limit = random.Random(0), seconds(), SHARE_FOR_LAYERS * 2.5 * GIB
    best = cost(planned(2.5), timing)
    fitting = 0
    for _ in range(20_000):
        offloaded = draw.choice([0, draw.randint(0, NUM_LAYERS - 2)])
        recomputed = draw.randint(0, NUM_LAYERS - offloaded)
        gates = draw.randint(0, NUM_LAYERS - offloaded - recomputed)
        again = offloaded > 0 and draw.random() < 0.5
        plan = MemoryPlan(draw.choice(CANDIDATE_TOKENS), recomputed, gates, offloaded, again, draw.randint(2, 8))
        if plan.in_flight <= max(2, NUM_LAYERS - offloaded) and peak(plan) <= limit:
            fitting += 1
            assert cost(plan, timing) >= best - 1e-15
    assert fitting > 1000


def test_a_long_sample_is_not_split_and_little_room_makes_small_micro_batches() -> None:
    assert planned(30, longest=5000, rows=Rows(2, 5000.0)).tokens >= 5000
    assert planned(0.7, longest=100, rows=Rows(8, 100.0)).tokens < EFFICIENT_TOKENS
    nothing = planned(0.0)
    assert nothing.tokens == 2048 and nothing.num_run_again == NUM_LAYERS
    assert planned(0.0, host_gib=0.0) == MemoryPlan(2048, num_recomputed=NUM_LAYERS)


def test_micro_batches_are_counted_in_whole_rows() -> None:
    assert [ROWS.num_micro_batches(budget) for budget in (1024, 2048, 4095, 4096, 6144, 8192)] == [4, 4, 4, 2, 2, 1]
    assert Rows(8, 270.0).num_micro_batches(2048) == 2


def test_peaks_of_the_head_and_of_the_backward_pass() -> None:
    tokens = 2048
    head = tokens * HEAD.per_token + HEAD.chunk
    assert peak(MemoryPlan(tokens)) == tokens * NUM_LAYERS * LAYER.everything + head
    assert peak(MemoryPlan(tokens, 0, NUM_LAYERS)) == tokens * NUM_LAYERS * LAYER.without_gates + head
    large = MemoryPlan(16384, num_recomputed=NUM_LAYERS)
    assert peak(large) == 16384 * (NUM_LAYERS * LAYER.recomputed + LAYER.without_gates + LAYER.passing)
    offloaded = MemoryPlan(16384, 0, 2, 30)
    assert peak(offloaded) == 16384 * (2 * LAYER.without_gates + LAYER.passing)
    assert peak(replace(offloaded, in_flight=8)) == 16384 * (8 * LAYER.without_gates + LAYER.passing_forward)


def test_a_plan_says_what_it_does() -> None:
    assert MemoryPlan(4096).describe(32).endswith("nothing is computed twice")
    text = MemoryPlan(4096, 2, 3, 20).describe(32)
    assert "2 of 32 layers are run again and 23 of 32 layers make their gates again" in text
    assert text.endswith("; 20 of 32 layers keep theirs in host memory")
    assert "22 of 32 layers are run again" in MemoryPlan(4096, 2, 0, 20, True).describe(32)


def test_operations_are_those_of_the_layer_s_products() -> None:
    model = with_lora(tiny_llama(), task_type="CAUSAL_LM")
    layer = decoder_of(causal_model(model)).layers[0]
    plan = plan_kernels(model, decoder_of(causal_model(model)), torch.float32)
    sizes = {name: module.weight.numel() for name, module in layer.named_modules() if name.endswith("base_layer")}
    assert len(sizes) == 7
    gates = sum(size for name, size in sizes.items() if "gate_proj" in name or "up_proj" in name)
    down = next(size for name, size in sizes.items() if "down_proj" in name)
    total = sum(sizes.values())
    assert plan.layer_operations() == (2 * total, 2 * gates, 2 * (total - down), 0, 0)


class Planned(NamedTuple):
    trainer: Trainer
    inputs: dict[str, Tensor]
    said: list[str]

    def keeps(self) -> list[tuple[bool, bool, bool]]:
        """For each layer: whether it is offloaded, is run again, keeps its gates."""
        plan = self.trainer.path.plan
        shelved = 0 if plan._shelf is None else plan._shelf.offload.num_layers
        return [(i < shelved, block.recomputes, block.keeps_gates) for i, block in enumerate(plan.blocks)]


@pytest.fixture
def on_a_small_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Planned]:
    """A run's own planning, for a device with slow products, fast copies and less memory than everything needs."""
    trainer = Trainer(
        model=with_lora(tiny_llama(num_hidden_layers=6), task_type="CAUSAL_LM"),
        args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, save_strategy="no"),
        train_dataset=language_rows(8),
        data_collator=Padded(),
    )
    inputs = Padded()(language_rows(4, shortest=8, longest=12))
    trainer.choose_path(inputs)
    layer = LayerBytes(*trainer.path.plan.layer_bytes())
    head = HeadBytes(
        forward.OUTSIDE_BYTES_PER_WIDTH * trainer.model.config.hidden_size,
        2 * forward.GPU_ROWS * trainer.model.config.vocab_size,
    )
    room = peak_bytes(MemoryPlan(100, 0, 2, 2), layer, 6, head) / SHARE_FOR_LAYERS + 1000
    monkeypatch.setattr(forward, "free_memory", lambda device: room + trainer._bytes_to_come())
    monkeypatch.setattr(forward, "measured_rates", lambda device, dtype: Rates(1e9, 1e12))
    monkeypatch.setattr(forward, "free_memory_bytes", lambda: GIB)
    said: list[str] = []
    monkeypatch.setattr(trainer.notices, "say", said.append)
    yield Planned(trainer, inputs, said)
    trainer.path.plan.undo()


def test_a_run_plans_what_its_layers_keep(on_a_small_gpu: Planned) -> None:
    trainer, inputs, said = on_a_small_gpu
    trainer._plan_memory(100, inputs)
    assert (
        not any(shelved for shelved, _, _ in on_a_small_gpu.keeps()) and "host memory" not in said[-1]
    )  # not asked for
    trainer.args.activation_offloading = True
    assert trainer._plan_memory(100, inputs) == 100
    keeps = on_a_small_gpu.keeps()
    assert keeps[0] == (True, False, False) and keeps[-1] == (False, False, True)
    assert said[-1].endswith(f"{sum(shelved for shelved, _, _ in keeps)} of 6 layers keep theirs in host memory")


def test_a_run_goes_on_where_host_memory_is_refused(on_a_small_gpu: Planned, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Shelf, num_bytes: int) -> None:
        raise RuntimeError("CUDA error: out of memory\nand much more")

    monkeypatch.setattr(Shelf, "reserve", refuse)
    trainer, inputs, said = on_a_small_gpu
    trainer.args.activation_offloading = True
    assert trainer._plan_memory(100, inputs) == 100
    keeps = on_a_small_gpu.keeps()
    assert not any(shelved for shelved, _, _ in keeps) and keeps[0][1]
    assert said[0] == "nothing is kept in host memory: CUDA error: out of memory"
    assert "host memory" not in said[1]


def test_checkpointing_that_was_asked_for_runs_every_layer_again(on_a_small_gpu: Planned) -> None:
    trainer, inputs, said = on_a_small_gpu
    trainer.args.activation_checkpointing = True
    trainer._plan_memory(100, inputs)
    assert on_a_small_gpu.keeps() == [(False, True, True)] * 6
    assert "6 of 6 layers are run again" in said[-1]
