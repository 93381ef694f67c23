"""Adapters go out as stock PEFT reads them, one or several, and nothing but them is changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, set_peft_model_state_dict
from safetensors.torch import load_file

from short_run import Scripted, checkpoints, short_trainer
from tiny import (
    Padded,
    adapter_of,
    assert_same_bits,
    causal_lora,
    classification_rows,
    language_rows,
    same_bits,
    tiny_bert,
    tiny_llama,
    tiny_tokenizer,
    with_lora,
)

BATCH = Padded()(language_rows(3, 60))


def logits_of(model: Any) -> torch.Tensor:
    model.eval()
    with torch.no_grad():
        return model(input_ids=BATCH["input_ids"], attention_mask=BATCH["attention_mask"]).logits


@pytest.mark.parametrize("fast_path", [True, False])
def test_the_adapter_loads_in_stock_peft_and_gives_the_same_logits(fast_path: bool) -> None:
    trainer = short_trainer(save_strategy="epoch", fast_path=fast_path)
    trainer.train()
    trainer.model.save_pretrained("final")
    trainer.save_model("saved")
    expected = logits_of(trainer.model)
    for folder in ("final", "saved", "out/checkpoint-10"):
        assert torch.equal(logits_of(PeftModel.from_pretrained(tiny_llama(), folder)), expected), folder
    earlier = logits_of(PeftModel.from_pretrained(tiny_llama(), "out/checkpoint-5"))
    assert not torch.equal(earlier, expected)


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_frozen_bit_for_bit(dtype: torch.dtype, fast_path: bool) -> None:
    model = causal_lora().to(dtype)
    frozen = {
        name: (parameter.dtype, parameter.detach().clone())
        for name, parameter in model.named_parameters()
        if not parameter.requires_grad
    }
    before = adapter_of(model)
    short_trainer(model, fast_path=fast_path).train()
    assert frozen
    for name, parameter in model.named_parameters():
        if name in frozen:
            assert parameter.dtype == frozen[name][0]
            assert torch.equal(parameter, frozen[name][1]), name
    changed = [
        name for name, value in adapter_of(model).items() if not torch.equal(value.float(), before[name].float())
    ]
    assert len(changed) == len(before)


def test_a_named_adapter_lies_in_a_folder_of_its_name() -> None:
    model = with_named_adapter()
    trainer = short_trainer(model, save_strategy="epoch")
    trainer.train()
    folder = Path("out/checkpoint-10/poet")
    assert (folder / "adapter_model.safetensors").exists()
    assert torch.equal(logits_of(PeftModel.from_pretrained(tiny_llama(), str(folder))), logits_of(trainer.model))


def with_named_adapter() -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return PeftModel(tiny_llama(), config, adapter_name="poet")


def test_the_best_of_a_named_adapter_is_loaded_at_the_end() -> None:
    """transformers leaves such a model at its last step."""
    trainer = short_trainer(
        with_named_adapter(),
        eval_rows=language_rows(3, 60),
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="score",
        compute_metrics=Scripted(0.9, 0.1),
    )
    trainer.train()
    best = with_named_adapter()
    set_peft_model_state_dict(best, load_file("out/checkpoint-5/poet/adapter_model.safetensors"), adapter_name="poet")
    assert torch.equal(logits_of(trainer.model), logits_of(best))


def two_adapters() -> PeftModel:
    model = causal_lora()
    torch.manual_seed(2)
    model.add_adapter("second", LoraConfig(r=4, target_modules=["k_proj"], task_type="CAUSAL_LM"))
    return model


def weights_of(model: PeftModel, adapter: str) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if f".{adapter}." in name}


@pytest.mark.parametrize("active", ["default", "second"])
def test_of_several_adapters_the_active_one_is_trained_and_all_are_saved(active: str) -> None:
    model = two_adapters()
    model.set_adapter(active)
    idle = "second" if active == "default" else "default"
    before, idle_before = weights_of(model, active), weights_of(model, idle)
    trainer = short_trainer(model, save_strategy="epoch")
    trainer.train()
    assert_same_bits(weights_of(model, idle), idle_before)
    assert not same_bits(weights_of(model, active), before)

    loaded = PeftModel.from_pretrained(tiny_llama(), "out/checkpoint-10")
    loaded.load_adapter("out/checkpoint-10/second", adapter_name="second")
    for adapter in ("default", "second"):
        assert_same_bits(weights_of(loaded, adapter), weights_of(model, adapter))


def test_several_adapters_resume() -> None:
    whole = short_trainer(two_adapters(), save_strategy="epoch")
    whole.train()
    resumed = short_trainer(two_adapters(), save_strategy="epoch")
    resumed.train(resume_from_checkpoint="out/checkpoint-5")
    assert_same_bits(weights_of(resumed.model, "default"), weights_of(whole.model, "default"))
    assert_same_bits(weights_of(resumed.model, "second"), weights_of(whole.model, "second"))


def test_a_classifier_head_is_trained_and_saved_with_the_adapter() -> None:
    def build() -> PeftModel:
        return with_lora(tiny_bert(), task_type="SEQ_CLS", target_modules=["query", "value"])

    trainer = short_trainer(build(), classification_rows(10), save_strategy="epoch")
    trainer.train()
    saved = load_file("out/checkpoint-10/adapter_model.safetensors")
    assert any("classifier" in name for name in saved)
    assert_same_bits(saved, adapter_of(trainer.model))
    assert not same_bits(saved, adapter_of(build()))


def test_save_model_writes_the_tokenizer_beside_the_adapter() -> None:
    trainer = short_trainer(processing_class=tiny_tokenizer(), save_strategy="epoch")
    trainer.train()
    trainer.save_model("saved")
    trainer.save_model()
    for folder in ("saved", "out", "out/checkpoint-10"):
        names = {path.name for path in Path(folder).iterdir()}
        assert names >= {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "tokenizer_config.json"}


def test_transformers_files_are_written_unless_turned_off() -> None:
    short_trainer(save_strategy="epoch", output_dir="with").train()
    short_trainer(save_strategy="epoch", output_dir="without", hf_checkpoint_files=False).train()
    theirs = {"optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"}
    assert theirs <= {path.name for path in Path("with/checkpoint-10").iterdir()}
    assert not theirs & {path.name for path in Path("without/checkpoint-10").iterdir()}
    assert not list(Path("without").rglob("*.pt")) + list(Path("without").rglob("*.bin"))


def test_only_the_adapter_where_the_state_is_not_wanted() -> None:
    short_trainer(save_strategy="epoch", save_only_model=True).train()
    names = {path.name for path in Path("out/checkpoint-10").iterdir()}
    assert "adapter_model.safetensors" in names
    assert "optimizer.pt" not in names
    assert checkpoints() == [5, 10]


def test_the_model_is_left_as_it_was_found() -> None:
    """Generation and further use see the attention and the cache setting of before."""
    model = causal_lora()
    attention, cache = model.config._attn_implementation, model.config.use_cache
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
    short_trainer(model).train()
    assert model.config._attn_implementation == attention
    assert sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()) == hooks
    assert not any("forward" in vars(module) for module in model.modules())
    tokens = model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, use_cache=cache)
    assert tokens.shape[1] > 3
