"""The mixture of experts of our own against the model's, with peft's LoRA on the stacked weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import MixtralConfig, Qwen3MoeConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from etude.kernels.experts import factors_of, mixture, sorted_rows
from etude.kernels.reference import SILU

E, D, F = 5, 12, 7
BOTH = ["experts.gate_up_proj", "experts.down_proj"]


def experts_of(kind: str, targets: list[str], rank: int) -> Any:
    torch.manual_seed(0)
    if kind == "qwen3":
        experts: Any = Qwen3MoeExperts(Qwen3MoeConfig(hidden_size=D, moe_intermediate_size=F, num_experts=E))
    else:
        experts = MixtralExperts(MixtralConfig(hidden_size=D, intermediate_size=F, num_local_experts=E))
    experts.config._experts_implementation = "eager"
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3).requires_grad_(False)
    holder: Any = nn.Module()
    holder.experts = experts
    if targets:
        config = LoraConfig(r=rank, lora_alpha=3, target_modules=[], target_parameters=targets, init_lora_weights=False)
        inject_adapter_in_model(config, holder)
    return holder.double().experts


def ours(experts: Any, x: Tensor, score: Tensor, index: Tensor) -> Tensor:
    factors: dict[str, Any] = {}
    inner = experts
    while hasattr(inner, "parameter_name"):
        A, B = inner.lora_A["default"].weight, inner.lora_B["default"].weight
        factors[f"{inner.parameter_name.removesuffix('_proj')}_factors"] = factors_of(
            A, B, inner.scaling["default"], E, x.dtype
        )
        inner = inner.base_layer
    return mixture(x, score, index, inner.gate_up_proj, inner.down_proj, SILU, **factors)


ROUTES = {
    "spread": lambda: torch.stack([torch.randperm(E)[:2] for _ in range(11)]),
    "empty experts": lambda: torch.tensor([[1, 3], [3, 1], [1, 3]]),
    "one token": lambda: torch.tensor([[4, 0]]),
    "all to one": lambda: torch.full((6, 1), 2),
}


@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], BOTH[1:], []], ids=["both", "gate_up", "down", "frozen"])
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["qwen3", "mixtral"])
def test_a_mixture_equals_the_models_own(kind: str, route: str, targets: list[str]) -> None:
    experts = experts_of(kind, targets, rank=3)
    index = ROUTES[route]()
    x = torch.randn(len(index), D, dtype=torch.float64, requires_grad=True)
    score = torch.rand(index.shape, dtype=torch.float64, requires_grad=True)
    trained = [p for p in experts.parameters() if p.requires_grad]
    assert len(trained) == 2 * len(targets)
    direction = torch.randn(x.shape, dtype=torch.float64)
    results = []
    for output in (ours(experts, x, score, index), experts(x, index, score)):
        results.append([output.detach(), *torch.autograd.grad(output, [x, score, *trained], direction)])
    for mine, theirs in zip(*results, strict=True):
        assert float((mine - theirs).norm()) <= 1e-12 * float(theirs.norm())


def test_rows_are_sorted_and_found_again() -> None:
    rows = sorted_rows(torch.tensor([[3, 1], [1, 0]]), E)
    assert rows.ends.tolist() == [1, 3, 3, 4, 4]
    assert rows.token.tolist() == [1, 0, 1, 0]
    assert rows.order[rows.place].tolist() == [0, 1, 2, 3]
