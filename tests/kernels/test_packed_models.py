"""The packed path against the model's own padded forward and against its samples one by one: loss and every gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from etude.errors import DataError
from etude.model.packing import pack
from etude.model.paths import PackedPath, choose_path
from tiny import DECODER, IGNORED, Batch, Padded, Row, V, language_rows, tiny_gemma3, tiny_llama, tiny_qwen3, with_lora

# What peft and transformers say of each other's older names; nothing of it is about packing.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing(_enable)?. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]


def built(model_class: type, config_class: type, **changes: Any) -> Callable[[], PreTrainedModel]:
    def build() -> PreTrainedModel:
        torch.manual_seed(0)
        model: PreTrainedModel = model_class(config_class(**(DECODER | changes)))
        return model

    return build


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "qwen3": tiny_qwen3,
    "gemma3, window 4": tiny_gemma3,
    "gemma2, window 4, soft caps": built(
        Gemma2ForCausalLM,
        Gemma2Config,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=3.0,
    ),
    "mistral, window 4": built(MistralForCausalLM, MistralConfig, sliding_window=4),
    "mixtral": built(MixtralForCausalLM, MixtralConfig, num_local_experts=4, num_experts_per_tok=2),
    "qwen3 moe": built(
        Qwen3MoeForCausalLM, Qwen3MoeConfig, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "cohere, logits scaled": built(CohereForCausalLM, CohereConfig, logit_scale=0.25),
    "granite, logits divided": built(GraniteForCausalLM, GraniteConfig, logits_scaling=4.0, embedding_multiplier=2.0),
    "gpt-oss, sinks": built(
        GptOssForCausalLM, GptOssConfig, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=4
    ),
    "gpt2, learned positions": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.2, attn_pdrop=0.0)
    ),
}


def adapted(name: str) -> nn.Module:
    """A random adapter, not the usual zero one, so that both of its matrices have gradients."""
    torch.manual_seed(0)
    gpt2 = {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True} if name.startswith("gpt2") else {}
    model = with_lora(MODELS[name](), task_type="CAUSAL_LM", init_lora_weights=False, **gpt2)
    return model.eval()  # GPT-2 drops out by default; what is compared here has no dropout


def ragged_rows() -> list[Row]:
    """Masked prompts, a row of two tokens, a row without labels."""
    rows = language_rows(4, seed=3, shortest=5, longest=14)
    rows.append({"input_ids": [5, 6], "attention_mask": [1, 1], "labels": [IGNORED, 6]})
    rows.insert(2, {"input_ids": [7, 8, 9], "attention_mask": [1, 1, 1], "labels": [IGNORED] * 3})
    return rows


def num_items_of(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def loss_and_gradients(model: nn.Module, loss: Tensor) -> tuple[Tensor, Tensor]:
    """The loss and all gradients of trainable parameters as one vector."""
    model.zero_grad()
    loss.backward()
    gradients = [
        torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for parameter in model.parameters()
        if parameter.requires_grad
    ]
    return loss.detach(), torch.cat([gradient.flatten() for gradient in gradients])


def one_by_one(model: nn.Module, batch: Batch, num_items: int) -> Tensor:
    """Every sample in a forward of its own, at the positions it has in the padded batch."""
    losses = []
    for row in range(len(batch["input_ids"])):
        columns = batch["attention_mask"][row].nonzero()[:, 0]
        sample = {name: batch[name][row, columns][None] for name in ("input_ids", "attention_mask", "labels")}
        losses.append(model(**sample, position_ids=columns[None], num_items_in_batch=num_items).loss)
    return torch.stack(losses).sum()


def chosen(model: nn.Module, batch: Batch) -> PackedPath:
    path = choose_path(model, fast_path=True, overridden=(), sample_inputs=batch, training_dtype=None)
    assert isinstance(path, PackedPath), path.reasons
    return path


def assert_same(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], *, gradient: float = 1e-5) -> None:
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=0)
    assert float((ours[1] - theirs[1]).norm() / theirs[1].norm()) < gradient


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_the_padded_model_and_its_samples_one_by_one(name: str, side: str) -> None:
    model = adapted(name)
    batch = Padded(side=side, multiple=4)(ragged_rows())
    num_items = num_items_of(batch)
    path = chosen(model, batch)
    ours = loss_and_gradients(model, path.loss(model, batch, num_items))
    assert "chunked" in path.reasons[2]
    assert_same(ours, loss_and_gradients(model, model(**batch, num_items_in_batch=num_items).loss))
    assert_same(ours, loss_and_gradients(model, one_by_one(model, batch, num_items)))


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3, window 4", "mistral, window 4"])
def test_float64_leaves_no_room_for_a_leak(name: str) -> None:
    model = adapted(name).double()
    batch = Padded()(ragged_rows())
    path = chosen(model, batch)
    with torch.no_grad():
        packed = pack(batch)
        assert packed is not None
        ours = path.logits(model, packed)
        theirs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    # Norms and rotary tables are float32 in both; what is left between the two is the order of additions.
    torch.testing.assert_close(ours, theirs[batch["attention_mask"] != 0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma3, window 4", "mixtral"])
def test_gradient_checkpointing_recomputes_the_packed_layers(name: str, reentrant: bool) -> None:
    model = adapted(name)
    batch = Padded()(ragged_rows())
    num_items = num_items_of(batch)
    path = chosen(model, batch)
    plain = loss_and_gradients(model, path.loss(model, batch, num_items))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    attention = model.config._attn_implementation
    functions = [vars(module).get("_gradient_checkpointing_func") for module in model.modules()]
    loss = chosen(model, batch).loss(model, batch, num_items)
    assert model.config._attn_implementation == attention
    recomputed = loss_and_gradients(model, loss)
    assert_same(recomputed, plain, gradient=1e-6)
    assert model.config._attn_implementation == attention
    assert [vars(module).get("_gradient_checkpointing_func") for module in model.modules()] == functions


def test_model_logits_head_equals_the_chunked_one() -> None:
    model = adapted("gemma2, window 4, soft caps")
    batch = Padded()(ragged_rows())
    num_items = num_items_of(batch)
    exact = PackedPath(model, kernel="per_sequence", head="logits_to_keep")
    ours = loss_and_gradients(model, chosen(model, batch).loss(model, batch, num_items))
    assert_same(ours, loss_and_gradients(model, exact.loss(model, batch, num_items)))


def test_a_trainable_head_and_embedding_get_their_gradients() -> None:
    torch.manual_seed(0)
    model = with_lora(tiny_llama(), task_type="CAUSAL_LM", modules_to_save=["lm_head", "embed_tokens"])
    batch = Padded()(ragged_rows())
    num_items = num_items_of(batch)
    path = chosen(model, batch)
    assert "the model's own logits" in path.reasons[2]
    ours = loss_and_gradients(model, path.loss(model, batch, num_items))
    assert model.get_output_embeddings().modules_to_save["default"].weight.grad.norm() > 0
    assert_same(ours, loss_and_gradients(model, model(**batch, num_items_in_batch=num_items).loss))


def test_full_fine_tuning_of_a_tied_model() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    batch = Padded()(ragged_rows())
    num_items = num_items_of(batch)
    path = chosen(model, batch)
    assert "the head is trainable" in path.reasons[2]
    ours = loss_and_gradients(model, path.loss(model, batch, num_items))
    assert_same(ours, loss_and_gradients(model, model(**batch, num_items_in_batch=num_items).loss))


def test_a_batch_without_labels_has_zero_loss_and_zero_gradients() -> None:
    model = adapted("llama")
    batch = Padded()(ragged_rows())
    path = chosen(model, batch)
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    loss, gradients = loss_and_gradients(model, path.loss(model, batch, 7))
    assert loss.item() == 0.0
    assert gradients.abs().max().item() == 0.0


def test_positions_of_the_collator_are_kept() -> None:
    model = adapted("llama")
    batch = Padded(side="left")(ragged_rows())
    batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp_min(0) * 3  # the left padding does not count
    num_items = num_items_of(batch)
    ours = loss_and_gradients(model, chosen(model, batch).loss(model, batch, num_items))
    assert_same(ours, loss_and_gradients(model, model(**batch, num_items_in_batch=num_items).loss))


def test_packing_before_the_copy_to_the_device_is_the_same() -> None:
    model = adapted("llama")
    batch = Padded()(ragged_rows())
    path = chosen(model, batch)
    packed = pack(batch)
    assert packed is not None
    assert path.loss(model, packed.to("cpu"), torch.tensor(9)).item() == path.loss(model, batch, 9).item()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.bfloat16])
def test_a_mask_of_any_type_says_which_tokens_are_real(dtype: torch.dtype) -> None:
    batch = Padded()(ragged_rows())
    ours, theirs = pack({**batch, "attention_mask": batch["attention_mask"].to(dtype)}), pack(batch)
    assert ours is not None and theirs is not None and ours.lengths == theirs.lengths
    for name, value in vars(theirs).items():
        if isinstance(value, Tensor):
            assert torch.equal(getattr(ours, name), value), name


def test_a_first_token_predicted_from_padding_keeps_its_padded_loss() -> None:
    model = adapted("llama")
    path = chosen(model, Padded(side="right")(ragged_rows()))
    batch = Padded(side="left")(language_rows(3, seed=1, masked=False))
    assert pack(batch) is None
    num_items = num_items_of(batch)
    ours = loss_and_gradients(model, path.loss(model, batch, num_items))
    assert_same(ours, loss_and_gradients(model, model(**batch, num_items_in_batch=num_items).loss))


def test_the_first_label_of_a_sample_is_not_predicted_from_the_sample_before() -> None:
    batch = Padded()(language_rows(3, seed=1, masked=False))  # every token labelled, the first ones too
    packed = pack(batch)
    assert packed is not None
    ends = [int(end) - 1 for end in packed.cu_seqlens[1:]]
    assert set(packed.predicting.tolist()).isdisjoint(ends)
    assert len(packed.predicting) == sum(packed.lengths) - len(packed.lengths) == num_items_of(batch)
    assert torch.equal(packed.targets, packed.input_ids[0, packed.predicting + 1])


def test_a_later_batch_with_other_fields_is_an_error_that_names_them() -> None:
    model = adapted("llama")
    batch = Padded()(ragged_rows())
    path = chosen(model, batch)
    with pytest.raises(DataError, match=r"also returns token_type_ids.*fast_path=False"):
        path.loss(model, batch | {"token_type_ids": batch["labels"]}, 3)


@pytest.fixture
def exploding_layer() -> Iterator[nn.Module]:
    class Exploding(nn.Module):
        def forward(self, *args: Any, **options: Any) -> Tensor:
            raise RuntimeError("out of memory, say")

    yield Exploding()


def test_the_attention_setting_is_put_back_after_an_exception(exploding_layer: nn.Module) -> None:
    model = adapted("llama")
    batch = Padded()(ragged_rows())
    path = chosen(model, batch)
    before = model.config._attn_implementation
    layers = model.get_base_model().model.layers
    layer, layers[1] = layers[1], exploding_layer
    with pytest.raises(RuntimeError, match="out of memory"):
        path.loss(model, batch, 3)
    layers[1] = layer
    assert model.config._attn_implementation == before == "sdpa"


def test_the_setting_outside_of_a_forward_still_honours_ordinary_masks() -> None:
    """Were the setting left on, a padded forward must still see its mask: the name has a mask function."""
    model = adapted("llama")
    batch = Padded(side="left")(ragged_rows())
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    path = chosen(model, batch)
    with torch.no_grad():
        expected = model(**inputs).logits
        with path.switch.packed():
            switched = model(**inputs).logits
    is_real = batch["attention_mask"] != 0
    assert torch.equal(switched[is_real], expected[is_real])
