"""The norm behind the last layer: equal to the model's own, only where something is trained, compared before it is used."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from etude.errors import ModelError
from etude.kernels.block import Norm
from etude.kernels.layers import last_norm_of
from etude.kernels.norm import LastNorm
from etude.kernels.plan import KernelPlan, plan_kernels
from etude.model.capabilities import causal_model, decoder_of
from saving import At
from short_run import short_trainer
from tiny import tiny_llama, with_lora


def norm_of(norm_class: type, **options: Any) -> nn.Module:
    norm: nn.Module = norm_class(24, **options).requires_grad_(False)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, 24))
    return norm


def values(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def is_ours(output: Tensor) -> bool:
    """The view of what `_Normed` has made."""
    grad_fn: Any = output.grad_fn
    return grad_fn is not None and "Normed" in repr(grad_fn.next_functions[0][0])


@pytest.mark.parametrize("norm_class", [LlamaRMSNorm, Gemma3RMSNorm])
def test_it_equals_the_model_s_own(norm_class: type) -> None:
    norm = norm_of(norm_class, eps=1e-3)
    found = last_norm_of(norm)
    assert found is not None
    found.is_packed = True
    h = values(2, 5, 24, seed=0).requires_grad_()
    grad = values(2, 5, 24, seed=1)
    ours, theirs = found.forward(h), norm(h)
    torch.testing.assert_close(ours, theirs)
    assert is_ours(ours) and not is_ours(theirs)
    for mine, own in zip(*(torch.autograd.grad(output, h, grad) for output in (ours, theirs)), strict=True):
        torch.testing.assert_close(mine, own)
    assert found.compare(values(1, 7, 24, seed=2)) < 1e-6


@pytest.mark.parametrize("why", ["no gradient", "another type", "not packed", "unfrozen since"])
def test_otherwise_it_is_the_model_s_own(why: str) -> None:
    found = last_norm_of(norm_of(LlamaRMSNorm))
    assert found is not None
    h = values(3, 24, seed=0).to(torch.bfloat16 if why == "another type" else torch.float32)
    h.requires_grad_(why != "no gradient")
    found.is_packed = why != "not packed"
    if why == "unfrozen since":
        found.layer.weight.requires_grad_()
    assert torch.equal(found.forward(h), found.layer(h))
    assert not is_ours(found.forward(h))


def trained_norm() -> nn.Module:
    return norm_of(LlamaRMSNorm).requires_grad_(True)


def replaced_forward() -> nn.Module:
    norm = norm_of(LlamaRMSNorm)
    norm.forward = lambda h: 2 * h
    return norm


@pytest.mark.parametrize(
    "layer", [None, "rms", nn.Identity(), nn.LayerNorm(24).requires_grad_(False), trained_norm(), replaced_forward()]
)
def test_other_norms_stay(layer: Any) -> None:
    assert last_norm_of(layer) is None


def planned() -> tuple[nn.Module, KernelPlan]:
    model = with_lora(tiny_llama(), task_type="CAUSAL_LM")
    plan = plan_kernels(model, decoder_of(causal_model(model)), torch.float32)
    assert plan.last_norm is not None
    return model, plan


def test_a_plan_swaps_it_and_puts_it_back() -> None:
    _, plan = planned()
    assert plan.last_norm is not None
    norm = plan.last_norm.layer
    plan.apply()
    assert "forward" in vars(norm) and ", and the norm behind them" in plan.explain()[0]
    for again in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert getattr(again.forward, "__func__", None) is type(norm).forward
    plan.undo()
    assert "forward" not in vars(norm)


def test_without_blocks_it_stays() -> None:
    model = with_lora(tiny_llama(), task_type="CAUSAL_LM")
    plan = plan_kernels(model, decoder_of(causal_model(model)), torch.float32, why_no_block="asked")
    assert plan.last_norm is None


@pytest.mark.parametrize("offset", [0.25, math.nan])
def test_a_wrong_one_is_not_used(offset: float) -> None:
    _, plan = planned()
    assert plan.last_norm is not None
    numbers = plan.last_norm.norm
    plan.last_norm.norm = Norm(numbers.weight, offset, numbers.eps)
    plan.blocks.clear()  # those would be compared first
    plan.apply()
    hidden = values(1, 6, numbers.weight.numel(), seed=0)
    expected = pytest.raises(ModelError, match="our last norm and the model's own differ by")
    with expected, plan.verifying(torch.float32), plan.packed():
        plan.last_norm.layer(hidden)
    assert plan.last_norm.calls_seen is None


def test_a_packed_step_is_computed_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a forward of padded rows beside it is the model's own."""
    seen: list[bool] = []
    run = LastNorm.run

    def watched(self: LastNorm, hidden_states: Tensor) -> Tensor:
        seen.append(self.is_packed)
        return run(self, hidden_states)

    monkeypatch.setattr(LastNorm, "run", watched)
    trainer = short_trainer(max_steps=2, report_to="none")
    trainer.add_callback(At(step_1=lambda: padded_pass(trainer, seen)))
    trainer.train()
    assert True in seen and "padded" in seen


def padded_pass(trainer: Any, seen: list[Any]) -> None:
    before = len(seen)
    rows = torch.ones(1, 4, dtype=torch.int64)
    trainer.model(input_ids=rows, labels=rows)
    assert len(seen) == before
    seen.append("padded")
