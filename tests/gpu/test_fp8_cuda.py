"""A frozen base in fp8 on a CUDA device that has it: kernels, products, layers, graphs and a run beside one in bfloat16."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

if not torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
    pytest.skip("needs a CUDA device and Triton", allow_module_level=True)

from etude import Trainer, TrainingArguments
from etude.kernels import fp8, fused_fp8
from etude.kernels.fp8 import FP8, ROUNDING, Fp8Projection, scaled_product
from etude.kernels.layers import compare
from etude.kernels.plan import plan_kernels
from etude.kernels.projection import Adapter
from etude.model.capabilities import causal_model, decoder_of
from etude.model.packing import pack
from etude.model.paths import CHUNKED, PackedPath
from fp8_checks import check_nearest_codes, check_rms_norm, check_zero_rows
from fused_checks import Inputs
from tiny import Padded, language_rows, tiny_gemma3, tiny_llama, tiny_qwen3, with_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        fp8.device_obstacle(torch.device("cuda")) is not None, reason=str(fp8.device_obstacle(torch.device("cuda")))
    ),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
]

BFLOAT16 = Inputs("cuda", torch.bfloat16)
ROWS = [(1, 96, 0), (7, 1104, 16), (513, 1024, 32), (4096, 4096, 64), (300, 14336, 0), (65, 28672, 16)]
WIDE = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "initializer_range": 0.02}
KINDS: dict[str, Any] = {"llama": tiny_llama, "qwen3": tiny_qwen3, "gemma3": tiny_gemma3}


def relative(ours: torch.Tensor, exact: torch.Tensor) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm())


# -- kernels -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("T", "D", "apart"), ROWS)
def test_nearest_codes(dtype: torch.dtype, T: int, D: int, apart: int) -> None:
    check_nearest_codes(Inputs("cuda", dtype), T, D, apart=apart)


@pytest.mark.parametrize(("T", "D", "apart"), ROWS)
def test_random_numbers_are_rounded_to_the_nearest_code(T: int, D: int, apart: int) -> None:
    x = BFLOAT16.rows(T, D, seed=0, apart=apart)
    quantised = fused_fp8.quantise_rows(x)
    scales = quantised.scales[:T].double()
    half_step = (x.double().abs() / 16).maximum(scales / 1024)
    error = (quantised.codes[:T].double() * scales - x.double()).abs()
    assert bool((error <= half_step * (1 + 1e-5)).all())


def test_zero_rows() -> None:
    check_zero_rows(BFLOAT16)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize(("T", "D", "apart"), ROWS)
def test_rms_norm(T: int, D: int, apart: int, offset: float) -> None:
    check_rms_norm(BFLOAT16, T, D, offset=offset, apart=apart)


# -- products ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [1, 15, 17, 300, 4096])
@pytest.mark.parametrize(("in_features", "out_features"), [(64, 48), (1024, 3072), (4096, 6144), (14336, 4096)])
def test_a_product_against_float64(T: int, in_features: int, out_features: int) -> None:
    x, weight = BFLOAT16.rows(T, in_features, seed=0), BFLOAT16.rows(out_features, in_features, seed=1)
    exact = x.double() @ weight.double().t()
    codes, weight_codes = fused_fp8.quantise_rows(x), fused_fp8.quantise_rows(weight)
    ours = scaled_product(codes, weight_codes, T, torch.bfloat16)
    assert ours.shape == (T, out_features)
    assert 1e-3 < relative(ours, exact) < 0.06
    # The hardware's sums, of the very codes: what is left is bfloat16 and the precision of its accumulators.
    restored = [q.codes[:n].double() * q.scales[:n].double() for q, n in ((codes, T), (weight_codes, out_features))]
    assert relative(ours, restored[0] @ restored[1].t()) < 1e-2


def test_a_product_with_a_row_that_is_not_finite_is_not_finite() -> None:
    x, weight = BFLOAT16.rows(4, 64, seed=0), fused_fp8.quantise_rows(BFLOAT16.rows(32, 64, seed=1))
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    finite = scaled_product(fused_fp8.quantise_rows(x), weight, 4, torch.bfloat16).isfinite().all(dim=1)
    assert finite.tolist() == [True, False, False, True]


@pytest.mark.parametrize("T", [1, 37, 2048])
def test_a_projection_forwards_and_backwards(T: int) -> None:
    options: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
    torch.manual_seed(0)
    linears = [nn.Linear(1024, 2048, bias=True, **options), nn.Linear(1024, 512, bias=False, **options)]
    A, B = torch.randn(16, 1024, device="cuda") / 32, torch.randn(512, 16, device="cuda") / 32
    projection = Fp8Projection(linears, [None, Adapter(nn.Parameter(A), nn.Parameter(B), 0.5)], torch.bfloat16)
    projection.install()
    x, residual = BFLOAT16.rows(T, 1024, seed=0), BFLOAT16.rows(T, 2560, seed=1)
    grad = BFLOAT16.rows(T, 2560, seed=2)
    weight = torch.cat((linears[0].weight.double(), linears[1].weight.double() + 0.5 * B.double() @ A.double()))
    bias = torch.cat((linears[0].bias.double(), torch.zeros(512, device="cuda").double()))
    y, _ = projection.forward(x, residual)
    assert relative(y, residual.double() + x.double() @ weight.detach().t() + bias.detach()) < 0.06
    x_grad, _ = projection.backward(grad)
    assert relative(x_grad, grad.double() @ weight.detach()) < 0.06


def test_a_graph_of_products_replays() -> None:
    """Nothing in a call waits for the device or depends on what is there."""
    linear = nn.Linear(512, 1024, bias=False, device="cuda", dtype=torch.bfloat16)
    projection = Fp8Projection([linear], [None], torch.bfloat16)
    projection.install()
    h, weight = BFLOAT16.rows(250, 512, seed=0, apart=0), BFLOAT16.vector(512, seed=1)

    def run() -> torch.Tensor:
        x, _, _ = projection.norm_input(h, weight, 0.0, 1e-6)
        y, _ = projection.forward(x)
        return projection.backward(y)[0]

    run()  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = run()
    h.copy_(torch.randn_like(h))
    graph.replay()
    assert torch.equal(replayed, run())


# -- layers and runs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_that_in_bfloat16_to_its_declared_tolerance(kind: str) -> None:
    model = with_lora(KINDS[kind](**WIDE).bfloat16(), task_type="CAUSAL_LM", init_lora_weights=False).cuda().train()
    plan = plan_kernels(model, decoder_of(causal_model(model)), torch.bfloat16, base_precision=FP8)
    assert plan.why_no_block is None
    plan.apply()
    path = PackedPath(model, kernel="varlen", head=CHUNKED, plan=plan)
    for block in plan.blocks:
        block.calls_seen = []
    batch = pack(Padded()(language_rows(30, seed=1, shortest=5, longest=60)))
    assert batch is not None
    with torch.no_grad():
        path.hidden_states(model, batch.to("cuda"))
    with path.switch.packed():
        differences = [compare(block, block.calls_seen[0]) for block in plan.blocks if block.calls_seen]
    print(f"{kind}: layers differ by {differences}")
    assert len(differences) == len(plan.blocks)
    assert 1e-3 < max(differences) < ROUNDING


@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_thirty_steps_stay_within_one_percent_of_bfloat16(tmp_path: Path, cuda_graphs: bool) -> None:
    losses = []
    for base_precision in (None, FP8):
        base = tiny_llama(**(WIDE | {"num_hidden_layers": 4, "num_attention_heads": 8})).bfloat16()
        settings: dict[str, Any] = {
            "output_dir": str(tmp_path), "per_device_train_batch_size": 16, "max_steps": 30, "logging_steps": 1,
            "learning_rate": 2e-3, "bf16": True, "save_strategy": "no", "disable_tqdm": True, "cuda_graphs": cuda_graphs,
            "base_precision": base_precision,
        }  # fmt: skip
        rows = language_rows(64, seed=1, shortest=8, longest=60)
        trainer = Trainer(
            model=with_lora(base, task_type="CAUSAL_LM"),
            args=TrainingArguments(**settings),
            train_dataset=rows,
            data_collator=Padded(),
        )
        trainer.train()
        assert any("fp8" in reason for reason in trainer.path.reasons) is (base_precision == FP8)
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    exact, ours = losses
    largest = max(abs(a - b) / b for a, b in zip(ours, exact, strict=True))
    print(f"bfloat16 {exact[0]:.4f} -> {exact[-1]:.4f}, fp8 -> {ours[-1]:.4f}, largest difference {largest:.2%}")
    assert ours != exact
    assert largest < 1e-2
    assert exact[-1] < 0.97 * exact[0]  # it learned
