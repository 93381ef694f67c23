"""A frozen base in fp8: its arithmetic on a CPU, the layers and a run that use it, and who is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from etude.errors import ConfigError
from etude.kernels import fp8
from etude.kernels.fp8 import FP8, ROUNDING, Fp8Projection, quantise_rows, scaled_product
from etude.kernels.layers import TOLERANCES, block_of, compare
from etude.kernels.plan import plan_kernels
from etude.kernels.projection import Adapter
from etude.model import paths
from etude.model.capabilities import causal_model, decoder_of
from etude.model.packing import pack
from etude.model.paths import CHUNKED, PackedPath
from interpreted import needs_triton, run_interpreted
from short_run import short_trainer
from tiny import Padded, language_rows, tiny_gemma3, tiny_llama, tiny_qwen3, with_lora

# Weights as models are made with, not those of the other tests: wide ones saturate the attention, whose gradient then
# multiplies every rounding.
WIDE = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "initializer_range": 0.05}
KINDS = {"llama": tiny_llama, "qwen3": tiny_qwen3, "gemma3": tiny_gemma3}


def values(*shape: int, seed: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(ours: Tensor, exact: Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


def adapted(kind: str = "llama", **lora: Any) -> nn.Module:
    biased = {"attention_bias": True, "mlp_bias": True} if "biases" in kind else {}
    base = KINDS[kind.partition(",")[0]](**WIDE, **biased).bfloat16()
    model = with_lora(base, task_type="CAUSAL_LM", **({"init_lora_weights": False} | lora))
    return model.train()


@pytest.fixture
def fp8_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch multiplies e4m3 on a CPU, too: what a GPU computes can be followed here."""
    monkeypatch.setattr(paths, "device_obstacle", lambda device: None)


# -- the arithmetic ------------------------------------------------------------------------------------------------------


def test_every_number_is_rounded_to_the_nearest_code_of_its_row() -> None:
    x = values(50, 333, seed=0) * torch.logspace(-20, 20, 50)[:, None].bfloat16()
    quantised = quantise_rows(x[:, ::1])
    restored = quantised.codes[:50].double() * quantised.scales[:50].double()
    half_step = (x.double().abs() / 16).maximum(quantised.scales[:50].double() / 1024)
    assert bool(((restored - x.double()).abs() <= half_step * (1 + 1e-6)).all())
    assert bool((quantised.codes[:50].float().abs().amax(dim=1) == fp8.LARGEST).all())


def test_products_with_a_row_that_is_not_finite_are_not_finite() -> None:
    x, weight = values(4, 32, seed=0), quantise_rows(values(16, 32, seed=1))
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    finite = scaled_product(quantise_rows(x), weight, 4, torch.bfloat16).isfinite().all(dim=1)
    assert finite.tolist() == [True, False, False, True]


@pytest.mark.parametrize("T", [1, 15, 16, 37])
def test_a_projection_multiplies_to_four_percent(T: int) -> None:
    """Bias, residual and both factors of two adapters, one layer without; any number of tokens."""
    linears = [nn.Linear(64, size, bias=bias, dtype=torch.bfloat16) for size, bias in ((32, True), (16, False))]
    adapters = [None, Adapter(*(nn.Parameter(values(*shape, seed=8)) for shape in ((4, 64), (16, 4))), 0.5)]
    projection = Fp8Projection(linears, adapters, torch.bfloat16)
    projection.install()
    x, residual, grad = values(T, 64, seed=0), values(T, 48, seed=1), values(T, 48, seed=2)
    weights = [linear.weight.detach().double() for linear in linears]
    update = 0.5 * adapters[1].B.double() @ adapters[1].A.double() if adapters[1] is not None else 0.0
    exact_weight = torch.cat((weights[0], weights[1] + update)).detach()
    bias = torch.cat((linears[0].bias.double(), torch.zeros(16).double())).detach()

    y, reduced = projection.forward(x, residual.clone())
    assert relative(y - residual, x.double() @ exact_weight.t() + bias) < 0.06
    x_grad, reduced_grad = projection.backward(grad)
    assert relative(x_grad, grad.double() @ exact_weight) < 0.06
    # The adapter sees the activations and gradients as they were.
    torch.testing.assert_close(reduced, x @ adapters[1].A.detach().t() if adapters[1] is not None else reduced)
    assert reduced_grad.shape == (T, 4)


def test_the_adapter_is_not_rounded_to_eight_bits() -> None:
    """With a base of zeros only the update is left, to bfloat16's precision."""
    linear = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(linear.weight)
    A, B = values(4, 64, seed=1), values(32, 4, seed=2)
    projection = Fp8Projection([linear], [Adapter(nn.Parameter(A), nn.Parameter(B), 1.0)], torch.bfloat16)
    projection.install()
    x, grad = values(20, 64, seed=0), values(20, 32, seed=3)
    update = B.double() @ A.double()
    assert relative(projection.forward(x)[0], x.double() @ update.t()) < 5e-3
    assert relative(projection.backward(grad)[0], grad.double() @ update) < 5e-3


@needs_triton
def test_the_kernels_in_the_interpreter() -> None:
    run_interpreted(Path(__file__).with_name("interpreted_fp8.py"))


# -- layers and runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        *((kind, {}) for kind in KINDS),
        *((kind, {"use_dora": True}) for kind in KINDS),
        ("llama, all biases", {"use_dora": True}),
        ("llama, all biases", {"lora_bias": True, "lora_dropout": 0.1}),
    ],
)
def test_a_layer_is_that_in_bfloat16_to_its_declared_tolerance(kind: str, lora: dict[str, Any]) -> None:
    model = adapted(kind, **lora).eval()
    decoder = decoder_of(causal_model(model))
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    plan = plan_kernels(model, decoder, torch.bfloat16, base_precision=FP8)
    assert plan.why_no_block is None and plan.rounding == ROUNDING
    assert any("fp8" in line for line in plan.explain())
    plan.apply()
    path = PackedPath(model, kernel="per_sequence", head=CHUNKED, plan=plan)
    for block in plan.blocks:
        block.calls_seen = []
    batch = pack(Padded()(language_rows(4, seed=1)))
    assert batch is not None
    with torch.no_grad():
        path.hidden_states(model, batch)
    with path.switch.packed():
        differences = [compare(block, block.calls_seen[0]) for block in plan.blocks if block.calls_seen]
    assert len(differences) == len(plan.blocks)
    assert TOLERANCES[torch.bfloat16] / 3 < max(differences) < ROUNDING  # it is fp8 that was computed, and well
    state = model.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    plan.undo()
    assert not any("forward" in vars(layer) for layer in decoder.layers)


@pytest.mark.usefixtures("fp8_everywhere")
def test_a_run_follows_the_one_in_bfloat16() -> None:
    losses = []
    for base_precision in (None, FP8):
        trainer = short_trainer(
            adapted(init_lora_weights=True), language_rows(40, seed=2), bf16=True, base_precision=base_precision,
            per_device_train_batch_size=8, max_steps=12, learning_rate=5e-3,
        )  # fmt: skip
        trainer.train()
        assert any("fp8" in reason for reason in trainer.path.reasons) is (base_precision == FP8)
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    exact, ours = losses
    assert ours != exact
    assert ours == pytest.approx(exact, rel=1e-2)
    assert exact[-1] < 0.95 * exact[0]  # it learned


# -- who is refused ------------------------------------------------------------------------------------------------------


def test_a_cpu_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"base_precision: fp8 products need an NVIDIA GPU, this run is on cpu"):
        short_trainer(adapted(), bf16=True, base_precision=FP8, max_steps=1).train()


def test_a_gpu_without_fp8_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    reason = fp8.device_obstacle(torch.device("cuda"))
    assert reason is not None and "NVIDIA A100" in reason and "8.9" in reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert fp8.device_obstacle(torch.device("cuda")) is None


@pytest.mark.usefixtures("fp8_everywhere")
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"bf16": False}, "bf16=True"),
        ({"fast_path": False}, "fast_path=False"),
    ],
)
def test_what_stands_in_the_way_is_said(settings: dict[str, Any], reason: str) -> None:
    model = adapted()
    if not settings.get("bf16", True):
        model.float()
    trainer = short_trainer(model, **({"bf16": True, "base_precision": FP8, "max_steps": 1} | settings))
    with pytest.raises(ConfigError, match=f"base_precision: .*{reason}"):
        trainer.train()
    assert not any("forward" in vars(module) for module in model.modules())


def test_dora_that_drops_what_the_base_sees_is_refused() -> None:
    found = block_of(
        decoder_of(causal_model(adapted(use_dora=True, lora_dropout=0.1))).layers[0], torch.bfloat16, base_precision=FP8
    )
    assert found == "DoRA with dropout on a base in fp8"


def test_sizes_that_the_hardware_cannot_multiply_are_refused() -> None:
    model = with_lora(tiny_llama(intermediate_size=72).bfloat16(), task_type="CAUSAL_LM")
    found = block_of(decoder_of(causal_model(model)).layers[0], torch.bfloat16, base_precision=FP8)
    assert found == "sizes that are no multiples of 16 (72)"
