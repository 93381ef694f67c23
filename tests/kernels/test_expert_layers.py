"""Experts of our own in a model: the swap, what it refuses, and what peft does with adapters on stacked weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from etude.kernels import expert_layers, plan
from etude.kernels.expert_layers import mixture_forward
from etude.model.paths import PackedPath, choose_path
from tiny import DECODER, IGNORED, Batch, Padded, language_rows, with_lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing(_enable)?. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SAID = "2 mixtures of experts as grouped products with their own backward pass"


def qwen3_moe(**changes: Any) -> Qwen3MoeForCausalLM:
    torch.manual_seed(0)
    shape = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(DECODER | shape | changes)))


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**DECODER, num_local_experts=4, num_experts_per_tok=2))


def gpt_oss() -> GptOssForCausalLM:
    torch.manual_seed(0)
    return GptOssForCausalLM(GptOssConfig(**DECODER, head_dim=8, num_local_experts=4, num_experts_per_tok=2))


def adapted(base: Any = None, targets: list[str] | None = None, **lora: Any) -> PeftModel:
    targets = BOTH if targets is None else targets
    settings = {"task_type": "CAUSAL_LM", "target_parameters": targets or None, "init_lora_weights": False, "r": 4}
    return with_lora(qwen3_moe() if base is None else base, **(settings | lora))


def batch_of_rows() -> Batch:
    return Padded()(language_rows(4, seed=3, shortest=5, longest=14))


def packed_path(model: nn.Module) -> PackedPath:
    path = choose_path(model, fast_path=True, overridden=(), sample_inputs=batch_of_rows(), training_dtype=None)
    assert isinstance(path, PackedPath), path.reasons
    return path


def experts_of(model: nn.Module) -> list[Any]:
    return expert_layers.expert_layers(model)


def has_ours(layer: Any) -> bool:
    return getattr(layer.forward, "__func__", None) is mixture_forward


def loss_and_gradients(model: nn.Module, loss: Tensor) -> list[Tensor]:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, trained)]


def one_by_one(model: nn.Module, batch: Batch, num_items: int) -> Tensor:
    losses = []
    for row in range(len(batch["input_ids"])):
        columns = batch["attention_mask"][row].nonzero()[:, 0]
        sample = {name: batch[name][row, columns][None] for name in ("input_ids", "attention_mask", "labels")}
        losses.append(model(**sample, num_items_in_batch=num_items).loss)
    return torch.stack(losses).sum()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", [BOTH, BOTH[:1], []], ids=["both", "gate_up", "frozen"])
@pytest.mark.parametrize("build", [qwen3_moe, mixtral])
def test_a_packed_model_equals_its_samples_one_by_one(build: Any, targets: list[str], checkpointing: bool) -> None:
    model, batch = adapted(build(), targets), batch_of_rows()
    num_items = int((batch["labels"][:, 1:] != IGNORED).sum())
    expected = loss_and_gradients(model, one_by_one(model, batch, num_items))
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    path = packed_path(model)
    assert SAID in path.reasons
    assert all(has_ours(layer) for layer in experts_of(model))
    found = loss_and_gradients(model, path.loss(model, batch, num_items))
    assert len(found) == len(expected) > 2 * len(targets)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=0)
    for mine, other in zip(found[1:], expected[1:], strict=True):
        assert float((mine - other).norm()) <= 1e-5 * float(other.norm())
    path.plan.undo()
    assert not any("forward" in vars(module) for module in model.modules())


def test_saving_merging_disabling_and_copies_are_those_of_peft(tmp_path: Path) -> None:
    model, tokens = adapted().eval(), torch.arange(4, 20)[None]
    expected_state = {name: value.clone() for name, value in get_peft_model_state_dict(model).items()}
    with torch.no_grad():
        with model.disable_adapter():
            disabled = model(tokens).logits
        expected = model(tokens).logits
        packed_path(model)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        with model.disable_adapter():
            assert torch.equal(model(tokens).logits, disabled)
        torch.testing.assert_close(copy.deepcopy(model)(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        found_state = get_peft_model_state_dict(model)
        assert found_state.keys() == expected_state.keys()
        assert all(torch.equal(found_state[name], value) for name, value in expected_state.items())
        model.save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(qwen3_moe(), str(tmp_path)).eval()
        torch.testing.assert_close(loaded(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        model.merge_adapter()
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-4)
        model.unmerge_adapter()
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any("forward" in vars(module) for module in merged.modules())


def spoiled(name: str) -> tuple[PeftModel, torch.dtype]:
    """A model whose experts must be left alone."""
    if name == "gpt-oss":
        return adapted(gpt_oss(), []), torch.float32
    if name == "gelu":
        return adapted(qwen3_moe(hidden_act="gelu")), torch.float32
    model = adapted()
    layer = experts_of(model)[0]
    inner: Any = layer.get_base_layer()
    if name == "two adapters":
        model.add_adapter("other", model.peft_config["default"])
        for wrapper in expert_layers.unwrapped(layer)[0]:
            wrapper._active_adapter = ["default", "other"]
    elif name == "merged":
        layer.merge()
    elif name == "disabled":
        layer.enable_adapters(False)
    elif name == "hook":
        inner.register_forward_hook(lambda *_: None)
    elif name == "replaced":
        inner.forward = inner.forward
    elif name == "trainable":
        inner.down_proj.requires_grad_(True)
    return model, torch.bfloat16 if name == "type" else torch.float32


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt-oss", "stacked weights of another layout"),
        ("gelu", "an activation other than SiLU"),
        ("two adapters", "2 active adapters"),
        ("merged", "the adapter is merged"),
        ("disabled", "adapters are disabled"),
        ("hook", "hooks on its Qwen3MoeExperts"),
        ("replaced", "the forward of its Qwen3MoeExperts was replaced"),
        ("trainable", "a trainable weight"),
        ("type", "weights in another type than bfloat16, in which it computes"),
    ],
)
def test_others_are_left_alone_and_the_plan_says_why(name: str, reason: str) -> None:
    model, dtype = spoiled(name)
    found = plan.plan_kernels(model, None, dtype)
    assert reason in found.mixture_obstacles
    assert len(found.mixtures) + found.mixture_obstacles[reason] == 2
    count = found.mixture_obstacles[reason]
    assert f"{count} mixtures of experts as the model computes them: {reason}" in found.explain()


@pytest.mark.parametrize("failure", ["differs", "raises"])
def test_experts_that_fail_the_comparison_stay_the_models_own(monkeypatch: Any, failure: str) -> None:
    right = expert_layers.mixture

    def wrong(*arguments: Any) -> Tensor:
        if failure == "raises":
            raise RuntimeError("no such product")
        return right(*arguments) * 1.001

    monkeypatch.setattr(expert_layers, "mixture", wrong)
    model = adapted()
    reason = "no such product" if failure == "raises" else "our experts and the model's own differ by 1.0e-03"
    said = f"2 mixtures of experts as the model computes them: {reason}"
    assert any(line.startswith(said) for line in packed_path(model).reasons), packed_path(model).reasons
    assert not any(has_ours(layer) for layer in experts_of(model))
