"""Every PEFT method trains as under transformers, resumes bit for bit, and loads in stock peft."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import (
    IA3Config,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from side_by_side import assert_same_numbers, ours, theirs
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from short_run import short_trainer
from tiny import DECODER, Padded, adapter_of, assert_same_bits, causal_lora, language_rows, tiny_llama

SETTINGS: dict[str, Any] = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
QUERY_VALUE = ["q_proj", "v_proj"]


def tiny_moe(seed: int = 0) -> Qwen3MoeForCausalLM:
    """Four experts in fused parameters, two of them for each token."""
    torch.manual_seed(seed)
    experts = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**(DECODER | experts)))


def lora(**settings: Any) -> Callable[[], Any]:
    base = {"task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": QUERY_VALUE}
    return lambda: LoraConfig(**(base | settings))


class Method(NamedTuple):
    config: Callable[[], Any]
    base: Callable[[], Any] = tiny_llama
    learning_rate: float = 1e-3
    is_random: bool = False
    """Whether training draws random numbers, which the two trainers draw from different generators."""


METHODS: dict[str, Method] = {
    "lora": Method(lora()),
    "lora-dropout": Method(lora(lora_dropout=0.3), is_random=True),
    "lora-bias": Method(lora(bias="lora_only"), lambda: tiny_llama(attention_bias=True)),
    "lora-all-biases": Method(lora(bias="all"), lambda: tiny_llama(attention_bias=True)),
    "rslora": Method(lora(use_rslora=True)),
    "dora": Method(lora(use_dora=True)),
    "lora-patterns": Method(lora(rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 16})),
    "modules-to-save": Method(lora(modules_to_save=["lm_head", "embed_tokens"])),
    "trainable-tokens": Method(lora(trainable_token_indices=[5, 9, 11])),
    "fused-experts": Method(lora(target_parameters=["experts.gate_up_proj", "experts.down_proj"]), tiny_moe),
    "ia3": Method(
        lambda: IA3Config(
            task_type="CAUSAL_LM", target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]
        )
    ),
    "vera": Method(lambda: VeraConfig(task_type="CAUSAL_LM", r=8, target_modules=QUERY_VALUE)),
    "loha": Method(lambda: LoHaConfig(task_type="CAUSAL_LM", r=4, alpha=8, target_modules=QUERY_VALUE)),
    "prompt": Method(lambda: PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "prefix": Method(lambda: PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)),
    "p-tuning": Method(
        lambda: PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3, encoder_hidden_size=16)
    ),
}


def build(name: str) -> Any:
    method = METHODS[name]
    model = method.base()
    torch.manual_seed(1)
    return get_peft_model(model, method.config())


def train_ours(name: str, folder: str, **settings: Any) -> Any:
    trainer = short_trainer(
        build(name), language_rows(12), **(SETTINGS | {"output_dir": folder, "save_strategy": "steps", "save_steps": 2})
    )
    trainer.train(**settings)
    return trainer


@pytest.mark.filterwarnings("ignore::UserWarning")  # peft's, about the tiny models
@pytest.mark.parametrize("name", METHODS)
def test_method(name: str, tmp_path: Path) -> None:
    whole = train_ours(name, "whole")
    if not METHODS[name].is_random:
        peer = theirs(lambda: build(name), language_rows(12), SETTINGS, folder=tmp_path)
        mine = ours(lambda: build(name), language_rows(12), SETTINGS, folder=tmp_path)
        assert_same_numbers(mine, peer)

    resumed = train_ours(name, "resumed", resume_from_checkpoint=str(Path("whole/checkpoint-2")))
    assert resumed.state.global_step == 4
    assert_same_bits(adapter_of(resumed.model), adapter_of(whole.model))

    batch = Padded()(language_rows(2, 8))
    with torch.no_grad():
        expected = whole.model.eval()(**batch).logits
        loaded = PeftModel.from_pretrained(METHODS[name].base(), "whole/checkpoint-4").eval()
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-5, atol=1e-6)
        untrained = build(name).eval()(**batch).logits
    assert not torch.allclose(untrained, expected, atol=1e-4)
    gc.collect()


def mixed() -> Any:
    torch.manual_seed(1)
    model = get_peft_model(tiny_llama(), LoraConfig(r=4, target_modules=["q_proj"]), mixed=True)
    model.add_adapter("hada", LoHaConfig(r=4, target_modules=["v_proj"]))
    model.set_adapter(["default", "hada"])
    return model


def test_a_mixed_model_trains_saves_and_resumes(tmp_path: Path) -> None:
    """transformers trains it but fails to save it, because peft has no file format for it."""

    def trained(folder: str, **resume: Any) -> Any:
        settings = SETTINGS | {"output_dir": folder, "save_strategy": "steps", "save_steps": 2}
        trainer = short_trainer(mixed(), language_rows(12), **settings)
        trainer.train(**resume)
        return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}

    whole = trained("whole")
    assert any("lora_A.default" in name for name in whole)
    assert any("hada_w1_a.hada" in name for name in whole)
    assert_same_bits(trained("resumed", resume_from_checkpoint="whole/checkpoint-2"), whole)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_two_adapters_of_one_model_are_trained_in_turn() -> None:
    model = causal_lora()
    model.add_adapter("second", lora()())
    model.set_adapter("second")
    trainer = short_trainer(model, language_rows(12), **(SETTINGS | {"save_strategy": "steps", "save_steps": 4}))
    trainer.train()
    loaded = PeftModel.from_pretrained(tiny_llama(), "out/checkpoint-4/second")
    assert_same_bits(adapter_of(loaded), get_peft_model_state_dict(model, adapter_name="second"))
