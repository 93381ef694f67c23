"""Base models from folders: what loads, what is refused and what the refusal says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from etude.errors import ConfigError, MissingDependencyError, ModelError
from etude.model.load import attach_lora, ensure_pad_token, load_base_model
from tiny import DECODER, V, tiny_bert, tiny_llama, tiny_qwen3, tiny_tokenizer


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    folder = tmp_path / "llama"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def edit(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_loads_with_its_weights_in_float32_on_a_cpu(llama: Path) -> None:
    model, tokenizer = load_base_model(llama, device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight)
    assert len(tokenizer) == V
    assert not model.training


def test_dtype_is_what_was_asked(llama: Path) -> None:
    model, _ = load_base_model(llama, dtype="bfloat16", device="cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    with pytest.raises(ConfigError, match="dtype: must be float32, float16 or bfloat16, got 'int8'"):
        load_base_model(llama, dtype="int8", device="cpu")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./missing", "./missing: there is no such folder"),
        ("a/b/c", "a/b/c: there is no such folder"),
        ("nobody/nothing-here", "nobody/nothing-here: not a folder here, not in the local cache"),
    ],
)
def test_a_model_that_is_nowhere_says_where_it_was_looked_for(name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_base_model(name)


def _remove_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": ')


def _remove_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _truncate_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def _remove_tokenizer(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


def _break_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def _add_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_remove_config, "no config.json in this folder"),
        (_break_config, "config.json cannot be read"),
        (_remove_weights, "the weights cannot be loaded"),
        (_pickle_weights, r"pickled weights \(.bin\) are not opened here"),
        (_truncate_weights, "the weights cannot be loaded"),
        (_remove_tokenizer, "no usable tokenizer"),
        (_break_tokenizer, "no usable tokenizer"),
        (_add_adapter, "give the folder or name of its base model"),
    ],
)
def test_a_damaged_folder_is_named_with_what_is_missing(
    llama: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(llama)
    with pytest.raises(ModelError, match=message) as refused:
        load_base_model(llama, device="cpu")
    assert str(llama) in str(refused.value)


def test_a_file_is_not_a_model(tmp_path: Path) -> None:
    file = tmp_path / "base.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(ModelError, match=r"give its folder and gguf_file='base.gguf'"):
        load_base_model(file)


def test_a_model_without_causal_head_is_refused(tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config().save_pretrained(tmp_path / "t5")
    with pytest.raises(ModelError, match="'t5' has no causal language model"):
        load_base_model(tmp_path / "t5")


def test_an_unknown_model_type_is_refused_and_says_that_it_brings_code(llama: Path) -> None:
    edit(llama, "config.json", model_type="mystery", auto_map={"AutoConfig": "evil.Config"})
    with pytest.raises(ModelError, match="only trust_remote_code=True executes"):
        load_base_model(llama)


def test_code_beside_a_known_model_is_never_imported(llama: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (llama / "evil.py").write_text(f"open({str(canary)!r}, 'w')\n")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model", "AutoTokenizer": ["evil.T", None]}
    edit(llama, "config.json", auto_map=names, trust_remote_code=True)
    edit(llama, "tokenizer_config.json", auto_map=names, trust_remote_code=True)
    model, _ = load_base_model(llama, device="cpu")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not canary.exists()


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("value", ["evil/kernel", "flash_attention_2", "eager"])
def test_a_config_does_not_choose_the_attention(llama: Path, key: str, value: str) -> None:
    edit(llama, "config.json", **{key: value})
    model, _ = load_base_model(llama, device="cpu")
    assert model.config._attn_implementation == "sdpa"


def test_a_config_does_not_choose_the_experts_code(llama: Path) -> None:
    edit(llama, "config.json", _experts_implementation="evil/kernel")
    with pytest.raises(ModelError, match="files do not choose code"):
        load_base_model(llama)


def test_quantization_says_what_to_install_or_which_values_there_are(llama: Path) -> None:
    with pytest.raises(ConfigError, match="must be 4bit or 8bit, got '3bit'"):
        load_base_model(llama, quantization="3bit", device="cpu")
    with pytest.raises(MissingDependencyError, match=r"pip install 'etude\[bitsandbytes\]'"):
        load_base_model(llama, quantization="4bit", device="cpu")


def test_a_tokenizer_with_more_tokens_than_embedding_rows_is_refused(llama: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["one", "two"])
    tokenizer.save_pretrained(llama)
    with pytest.raises(ModelError, match=f"has {V + 2} tokens, the model's embedding {V} rows"):
        load_base_model(llama, device="cpu")


def test_a_missing_pad_token_is_taken_from_the_vocabulary() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token == "<pad>"
    assert len(tokenizer) == V


def test_without_a_reserved_entry_the_end_of_sequence_pads() -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({"</s>": 0, "a": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
    ensure_pad_token(tokenizer)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 0
    bare = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0}, unk_token="a")))
    with pytest.raises(ModelError, match="no pad, end-of-sequence or unknown token"):
        ensure_pad_token(bare)


def adapted(model: Any) -> set[str]:
    names = (name for name, parameter in model.named_parameters() if parameter.requires_grad and "lora_A" in name)
    return {name.split(".lora_A")[0].rsplit(".", 1)[-1] for name in names}


def test_all_linear_adapts_every_linear_layer_but_the_head() -> None:
    model = attach_lora(tiny_llama().bfloat16(), r=4, alpha=8, dropout=0.0)
    assert adapted(model) == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert {parameter.dtype for parameter in trainable} == {torch.float32}
    assert model.peft_config["default"].lora_alpha == 8


def test_targets_can_be_named() -> None:
    assert adapted(attach_lora(tiny_qwen3(), 4, 8, 0.0, "q_proj, v_proj")) == {"q_proj", "v_proj"}
    assert adapted(attach_lora(tiny_qwen3(), 4, 8, 0.0, ["mlp.down_proj"])) == {"down_proj"}


@pytest.mark.parametrize("kind", ["qwen2_moe", "qwen3_moe", "mixtral"])
def test_all_linear_reaches_every_expert_and_leaves_the_router_alone(kind: str) -> None:
    shape = DECODER | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
    experts = "num_local_experts" if kind == "mixtral" else "num_experts"
    config = AutoConfig.for_model(kind, **shape, **{experts: 4})
    model = attach_lora(AutoModelForCausalLM.from_config(config), 4, 8, 0.0)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {name.split(".")[5] for name in trainable} >= {"self_attn", "mlp"}
    for layer in range(2):
        assert sum(f"layers.{layer}.mlp.experts" in name for name in trainable) == 4  # A and B of two parameters
        shared = {name.split(".")[7] for name in trainable if f"layers.{layer}.mlp.shared_expert" in name}
        assert shared == ({"gate_proj", "up_proj", "down_proj"} if kind == "qwen2_moe" else set())
    assert not any(".gate." in name or "shared_expert_gate" in name or "lm_head" in name for name in trainable)


def test_dropout_on_fused_experts_is_refused() -> None:
    config = AutoConfig.for_model("mixtral", **DECODER, num_local_experts=4)
    with pytest.raises(ConfigError, match=r"lora.dropout: must be 0 where experts are fused"):
        attach_lora(AutoModelForCausalLM.from_config(config), 4, 8, 0.1)


def test_an_unknown_target_lists_near_names() -> None:
    with pytest.raises(ModelError, match=r"no module 'q_prj'; did you mean 'q_proj'\?.*down_proj, gate_proj"):
        attach_lora(tiny_llama(), 4, 8, 0.0, ["q_prj"])
    with pytest.raises(ModelError, match="LoRA cannot be attached to mlp"):
        attach_lora(tiny_llama(), 4, 8, 0.0, ["mlp"])


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ((0, 8, 0.0), "lora.r"),
        ((4, 0, 0.0), "lora.alpha"),
        ((4, 8, 1.0), "lora.dropout"),
        ((4, 8, -0.1), "lora.dropout"),
    ],
)
def test_settings_out_of_range_are_named(settings: tuple[int, float, float], field: str) -> None:
    with pytest.raises(ConfigError) as refused:
        attach_lora(tiny_llama(), *settings)
    assert refused.value.field == field


def test_encoders_are_left_alone() -> None:
    model = tiny_bert()
    with pytest.raises(ConfigError, match=r"lora\.targets: names no module"):
        attach_lora(model, 4, 8, 0.0, " , ")
