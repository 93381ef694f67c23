"""The mixture of experts on a CUDA device: in bfloat16 against float32, inside a CUDA graph, and in a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from etude import Trainer, TrainingArguments
from etude.kernels.experts import factors_of, mixture
from etude.kernels.reference import SILU
from tiny import DECODER, Padded, language_rows, with_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following .*_pattern keys:RuntimeWarning"),  # peft's own pattern
]

E, D, F, R, T, K = 16, 256, 96, 8, 200, 4
TOLERANCE = 2e-2


def drawn(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, device="cuda") * scale


@pytest.fixture
def parts() -> dict[str, Tensor]:
    """Weights, factors as peft keeps them, tokens and routing; the last four experts have no rows."""
    torch.manual_seed(0)
    return {
        "gate_up": drawn(E, 2 * F, D, scale=D**-0.5).bfloat16(),
        "down": drawn(E, D, F, scale=F**-0.5).bfloat16(),
        "A1": drawn(E * R, D, scale=D**-0.5),
        "B1": drawn(2 * F, R * E, scale=0.3),
        "A2": drawn(E * R, F, scale=F**-0.5),
        "B2": drawn(D, R * E, scale=0.3),
        "x": drawn(T, D).bfloat16(),
        "score": torch.rand(T, K, device="cuda").bfloat16(),
        "index": torch.stack([torch.randperm(E - 4)[:K] for _ in range(T)]).cuda(),
        "direction": drawn(T, D).bfloat16(),
    }


TRAINED = ("x", "score", "A1", "B1", "A2", "B2")


def ours(parts: dict[str, Tensor]) -> Tensor:
    dtype = parts["down"].dtype
    first = factors_of(parts["A1"], parts["B1"], 2.0, E, dtype)
    second = factors_of(parts["A2"], parts["B2"], 2.0, E, dtype)
    return mixture(
        parts["x"], parts["score"], parts["index"], parts["gate_up"], parts["down"], SILU, first, second
    )  # fmt: skip


def by_expert(parts: dict[str, Tensor]) -> Tensor:
    """In float32, expert by expert, with the weights' updates written out."""
    wide = {name: value if name == "index" else value.float() for name, value in parts.items()}
    output = torch.zeros_like(wide["x"])
    for expert in range(E):
        weights = []
        for weight, A, B in ((wide["gate_up"], wide["A1"], wide["B1"]), (wide["down"], wide["A2"], wide["B2"])):
            update = B.view(B.shape[0], R, E)[:, :, expert] @ A.view(E, R, -1)[expert]
            weights.append(weight[expert] + 2.0 * update)
        gate, up = (wide["x"] @ weights[0].t()).chunk(2, dim=1)
        score = (wide["score"] * (wide["index"] == expert)).sum(dim=1, keepdim=True)
        output = output + score * ((functional.silu(gate) * up) @ weights[1].t())
    return output


def results(forward: Any, parts: dict[str, Tensor]) -> list[Tensor]:
    inputs = {n: v.detach().clone().requires_grad_(n in TRAINED) for n, v in parts.items() if n != "index"}
    output = forward(inputs | {"index": parts["index"]})
    gradients = torch.autograd.grad(
        output, [inputs[name] for name in TRAINED], parts["direction"].to(output.dtype)
    )  # fmt: skip
    return [output.detach(), *gradients]


def test_bfloat16_is_near_float32(parts: dict[str, Tensor]) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    names = ("output", *TRAINED)
    for name, mine, exact in zip(names, results(ours, parts), results(by_expert, parts), strict=True):
        assert float((mine.float() - exact.float()).norm() / exact.float().norm()) < TOLERANCE, name
    A1_grad = results(ours, parts)[1 + TRAINED.index("A1")].view(E, R, D)
    assert bool(A1_grad[: E - 4].any(dim=2).all()) and not bool(A1_grad[E - 4 :].any())


def test_a_graph_replays_the_same_bits_also_for_another_routing(parts: dict[str, Tensor]) -> None:
    fixed = {name: value.clone() for name, value in parts.items()}
    for name in TRAINED:
        fixed[name].requires_grad_()

    def run() -> list[Tensor]:
        output = ours(fixed)
        return [output, *torch.autograd.grad(output, [fixed[name] for name in TRAINED], fixed["direction"])]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    other = parts["index"].flip(0).remainder(3) + torch.arange(0, 12, 3, device="cuda")
    for index in (parts["index"], other):
        fixed["index"].copy_(index)
        graph.replay()
        expected = results(ours, parts | {"index": index})
        for mine, theirs in zip(captured, expected, strict=True):
            assert torch.equal(mine, theirs)


def test_a_mixture_trains_as_with_the_models_own_experts(tmp_path: Path) -> None:
    def losses(fast_path: bool) -> tuple[list[float], Trainer]:
        torch.manual_seed(0)
        shape = {"hidden_size": 64, "head_dim": 16, "num_experts": 8, "num_experts_per_tok": 2}
        base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(DECODER | shape), moe_intermediate_size=32)).bfloat16()
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        arguments = TrainingArguments(
            output_dir=str(tmp_path / str(fast_path)), bf16=True, max_steps=8, per_device_train_batch_size=8,
            logging_steps=1, learning_rate=1e-3, save_strategy="no", disable_tqdm=True, fast_path=fast_path,
        )  # fmt: skip
        trainer = Trainer(
            model=with_lora(base, task_type="CAUSAL_LM", target_parameters=targets),
            args=arguments,
            train_dataset=language_rows(40, seed=1, shortest=5, longest=30),
            data_collator=Padded(),
        )
        trainer.train()
        return [row["loss"] for row in trainer.state.log_history if "loss" in row], trainer

    mine, trainer = losses(fast_path=True)
    assert "2 mixtures of experts as grouped products with their own backward pass" in trainer.path.reasons
    assert mine == pytest.approx(losses(fast_path=False)[0], rel=2e-2)
