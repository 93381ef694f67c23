"""Layers that keep theirs in pinned host memory, on a CUDA device: the same bits, in graphs too, and less memory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic products ask for

from etude import Trainer, TrainingArguments
from etude.hooks import forward as forward_hooks
from etude.kernels import offload
from etude.kernels.offload import measured_rates
from etude.model.graphs import GraphedLoss
from etude.model.memory import MemoryPlan
from etude.model.packing import PackedBatch, pack
from etude.model.paths import PackedPath, choose_path
from tiny import Batch, Padded, adapter_of, assert_same_bits, language_rows, tiny_llama, with_lora

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]  # torch warns of its own deprecated parts

LAYERS = 8
SHAPE: dict[str, Any] = {
    "hidden_size": 512, "intermediate_size": 1536, "head_dim": 64, "num_attention_heads": 8,
    "num_key_value_heads": 2, "num_hidden_layers": LAYERS, "max_position_embeddings": 4096,
    "initializer_range": 0.03,  # wider ones drown eight layers in their own rounding
}  # fmt: skip
WAYS: dict[str, dict[str, Any]] = {
    "gates again": {"num_offloaded": 6, "num_recomputed": 0, "num_without_gates": 2},
    "many in flight": {"num_offloaded": 4, "num_recomputed": 0, "num_without_gates": 4, "in_flight": 4},
    "run again": {"num_offloaded": 6, "num_recomputed": 0, "num_without_gates": 2, "recomputes_offloaded": True},
    "beside layers run again": {"num_offloaded": 3, "num_recomputed": 3, "num_without_gates": 2},
    "all": {"num_offloaded": LAYERS, "num_recomputed": 0, "num_without_gates": 0},
}


def model_of(**lora: Any) -> nn.Module:
    model = with_lora(tiny_llama(**SHAPE).bfloat16(), task_type="CAUSAL_LM", init_lora_weights=False, **lora)
    with torch.no_grad():  # as small as in training
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(0.1)
    return model.cuda().train()


def batch_of(tokens: int, seed: int = 0) -> Batch:
    rows = language_rows(8, seed=seed, shortest=tokens // 8, longest=tokens // 8, masked=False)
    return {key: value.cuda() for key, value in Padded()(rows).items()}


def path_of(model: nn.Module, batch: Batch) -> PackedPath:
    path = choose_path(model, fast_path=True, overridden=(), sample_inputs=batch, training_dtype=torch.bfloat16)
    assert isinstance(path, PackedPath) and len(path.plan.blocks) == LAYERS, path.reasons
    return path


def gradients(model: nn.Module, path: PackedPath, batches: list[Batch]) -> dict[str, Tensor]:
    model.zero_grad()
    torch.manual_seed(3)
    total = torch.zeros((), device="cuda")
    for batch in batches:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = path.loss(model, batch, 100)
        loss.backward()
        total += loss.detach()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": total, **found}


@pytest.fixture
def deterministic() -> Any:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "SMALLEST_BYTES", 2**12)


@pytest.mark.usefixtures("deterministic", "small_sizes")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("way", WAYS)
def test_the_same_bits(way: str, dropout: float) -> None:
    """Batches follow each other without a pause, and memory is filled with NaN beside them where it is free."""
    batches = [batch_of(tokens, seed) for seed, tokens in enumerate((2048, 8192, 4096, 8192))]
    model = model_of(lora_dropout=dropout)
    path = path_of(model, batches[0])
    expected = gradients(model, path, batches)
    path.plan.keep(**WAYS[way])
    for _ in range(3):
        assert_same_bits(gradients(model, path, batches), expected)
        junk = [torch.full((2**22,), float("nan"), device="cuda") for _ in range(8)]
        del junk
    path.plan.undo()


def steps_in_graphs(way: str | None, batches: list[PackedBatch]) -> list[dict[str, Tensor]]:
    """Loss and gradients of every batch, the first ones without a graph, which is then captured and replayed."""
    model = model_of()
    path = path_of(model, batch_of(2048))
    if way is not None:
        path.plan.keep(**WAYS[way])
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in trained.values():
        parameter.grad = torch.zeros_like(parameter)
    path.plan.accumulate_in_place()
    graphs = GraphedLoss(
        lambda batch: path.loss(model, batch, 1),
        lambda: torch.autocast("cuda", dtype=torch.bfloat16),
        torch.device("cuda"),
        most_tokens=10**6,
    )
    results = []
    for batch in batches:
        for parameter in trained.values():
            assert parameter.grad is not None
            parameter.grad.zero_()
        loss = graphs(batch, 100)
        results.append({"loss": loss, **{name: p.grad.clone() for name, p in trained.items() if p.grad is not None}})
    assert graphs.failure is None and graphs.num_graphs == 2
    torch.cuda.synchronize()
    path.plan.undo()
    return results


@pytest.mark.usefixtures("deterministic", "small_sizes")
@pytest.mark.parametrize("way", WAYS)
def test_a_graph_gives_the_same_bits(way: str) -> None:
    """Two sizes in turn: what a graph reads and writes on the host stays where it was, and others may use it meanwhile."""
    packed = []
    for seed in range(12):
        found = pack({key: value.cpu() for key, value in batch_of((4096, 2048)[seed % 2], seed).items()})
        assert found is not None
        packed.append(found)
    for ours, expected in zip(steps_in_graphs(way, packed), steps_in_graphs(None, packed), strict=True):
        assert_same_bits(ours, expected)


@pytest.mark.parametrize("recomputes", [False, True])
def test_the_device_holds_less(recomputes: bool) -> None:
    model, batch = model_of(), batch_of(16384)
    path = path_of(model, batch)
    peaks = []
    for num_offloaded in (0, 6):
        path.plan.keep(
            num_recomputed=0,
            num_without_gates=LAYERS - num_offloaded,
            num_offloaded=num_offloaded,
            recomputes_offloaded=recomputes and num_offloaded > 0,
        )
        gradients(model, path, [batch])
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = path.loss(model, batch, 100)
        kept = torch.cuda.memory_allocated() - before
        loss.backward()
        peaks.append((kept, torch.cuda.max_memory_allocated() - before))
    (kept, peak), (kept_less, lower_peak) = peaks
    _, without_gates, *_ = path.plan.layer_bytes()
    print(
        f"kept {kept / 2**20:.0f} -> {kept_less / 2**20:.0f} MiB, peak {peak / 2**20:.0f} -> {lower_peak / 2**20:.0f} MiB"
    )
    assert kept - kept_less > 0.9 * 6 * 16384 * without_gates
    assert lower_peak < peak - 2 * 16384 * without_gates
    path.plan.undo()


def test_rates_are_those_of_a_gpu() -> None:
    rates = measured_rates(torch.device("cuda"), torch.bfloat16)
    print(f"{rates.products / 1e12:.0f} TFLOP/s, {rates.copies / 1e9:.1f} GB/s")
    assert 1e12 < rates.products < 1e16
    assert 1e8 < rates.copies < 1e12


@pytest.mark.usefixtures("small_sizes")
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_a_run_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cuda_graphs: bool) -> None:
    adapters, said = [], []
    plans = (MemoryPlan(1024), MemoryPlan(1024, 0, 2, 6), MemoryPlan(1024, 0, 2, 6, True))
    for number, memory_plan in enumerate(plans):
        monkeypatch.setattr(forward_hooks, "plan_memory", lambda *a, plan=memory_plan, **k: plan)
        trainer = Trainer(
            model=model_of(),
            args=TrainingArguments(
                output_dir=str(tmp_path / str(number)), per_device_train_batch_size=16, max_steps=8, logging_steps=1,
                learning_rate=1e-4, bf16=True, save_strategy="no", disable_tqdm=True, cuda_graphs=cuda_graphs,
                deterministic=True,
            ),
            train_dataset=language_rows(64, seed=1, shortest=100, longest=128),
            data_collator=Padded(),
        )  # fmt: skip
        notices: list[str] = []
        monkeypatch.setattr(trainer.notices, "say", notices.append)
        trainer.train()
        if trainer.graphs is not None:
            assert trainer.graphs.failure is None
        adapters.append(adapter_of(trainer.model))
        said.append(notices)
    assert not any("host memory" in line for line in said[0])
    assert any("6 of 8 layers keep theirs in host memory" in line for line in said[1])
    for other in adapters[1:]:
        assert_same_bits(other, adapters[0])


def test_a_tight_limit_uses_the_host(tmp_path: Path) -> None:
    """The plan as a run makes it; whether the host is worth it depends on the machine, that it runs does not."""
    trainer = Trainer(
        model=model_of(),
        args=TrainingArguments(
            output_dir=str(tmp_path), per_device_train_batch_size=32, max_steps=4, logging_steps=1, bf16=True,
            save_strategy="no", disable_tqdm=True, gpu_memory_limit_gib=1.0, activation_offloading=True,
        ),
        train_dataset=language_rows(128, seed=1, shortest=500, longest=512),
        data_collator=Padded(),
    )  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    assert trainer.state.global_step == 4
    assert torch.cuda.max_memory_allocated() < 2**30
