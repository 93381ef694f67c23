"""Which path a model gets and why: what is admitted, what the probe rejects, and what neither may leave behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, LoHaConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from etude.model import paths
from etude.model.capabilities import head_obstacle, missing_capabilities, read_head
from etude.model.paths import PROBE_LENGTHS, GeneralPath, PackedPath, choose_path, probe_batch, relative_difference
from tiny import IGNORED, Batch, Padded, causal_lora, language_rows, tiny_bert, tiny_gemma3, tiny_llama, tiny_t5

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def batch_of(num_rows: int = 4, **options: Any) -> Batch:
    return Padded(**options)(language_rows(num_rows, seed=3))


def decide(model: nn.Module, batch: Batch | None = None, **changes: Any) -> GeneralPath | PackedPath:
    settings: dict[str, Any] = {"fast_path": True, "overridden": (), "training_dtype": None} | changes
    return choose_path(model, sample_inputs=batch_of() if batch is None else batch, **settings)


def reason_against(model: nn.Module, batch: Batch | None = None, **changes: Any) -> str:
    path = decide(model, batch, **changes)
    assert isinstance(path, GeneralPath), path.reasons
    assert path.name == "general"
    return "; ".join(path.reasons)


def test_a_lora_model_is_packed_and_says_how() -> None:
    path = decide(causal_lora())
    assert path.name == "packed"
    assert path.reasons == (
        "padding removed, samples packed",
        "attention: per sequence",
        "loss head: chunked cross entropy on labelled tokens",
        "2 decoder layers with their own forward and backward pass, and the norm behind them",
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_model_is_packed_under_autocast_and_in_bfloat16(dtype: torch.dtype) -> None:
    assert decide(causal_lora().to(dtype), training_dtype=torch.bfloat16).name == "packed"
    assert decide(causal_lora().to(dtype)).name == "packed"


def test_in_bfloat16_a_cpu_keeps_the_layers_of_the_model() -> None:
    path = decide(causal_lora().to(torch.bfloat16))
    assert isinstance(path, PackedPath) and path.plan.blocks == []
    assert "decoder layers as the model computes them: in half precision a CPU is faster so" in path.reasons


def test_equal_to_the_attention_that_the_model_writes_out_is_equal_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the model's own attention functions round further apart than is admitted, one of them must be met."""
    model = causal_lora().to(torch.bfloat16)
    compared: list[float] = []

    def far_from_the_first(values: Tensor, reference: Tensor) -> float:
        compared.append(relative_difference(values, reference))
        return 1.0 if len(compared) == 1 else compared[-1]

    monkeypatch.setattr("etude.model.paths.relative_difference", far_from_the_first)
    before = model.config._attn_implementation
    assert decide(model).name == "packed"
    assert compared[2] <= compared[0]
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(("times", "is_packed"), [(1.25, True), (0.1, False)])
def test_as_near_as_the_models_own_ways_are_to_each_other_is_near_enough(
    monkeypatch: pytest.MonkeyPatch, times: float, is_packed: bool
) -> None:
    """Deep models with large residuals round so much that nothing is nearer."""
    monkeypatch.setattr(paths, "ROUNDED", paths.ROUNDED._replace(logits=1e-4))
    monkeypatch.setattr(paths, "TIMES_ITS_OWN", times)
    path = decide(causal_lora().to(torch.bfloat16))
    assert (path.name == "packed") == is_packed
    if not is_packed:
        assert "packed and padded logits differ" in "; ".join(path.reasons)


def test_what_a_model_may_be_apart_from_itself_ends_somewhere() -> None:
    assert paths.ROUNDED.allowing_for(0.01) == paths.ROUNDED
    assert paths.ROUNDED.allowing_for(0.08).logits == pytest.approx(0.1)
    assert paths.ROUNDED.allowing_for(3.0).logits == 0.2


def test_in_float32_a_model_is_not_apart_from_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "EXACT", paths.EXACT._replace(logits=1e-12))
    assert "packed and padded logits differ" in reason_against(causal_lora())


def test_one_row_without_padding_is_enough_to_decide() -> None:
    assert decide(causal_lora(), batch_of(1)).name == "packed"
    assert decide(causal_lora(), batch_of(1, multiple=64)).name == "packed"


# -- what is turned away before anything runs -------------------------------------------------------------------------


def test_the_user_can_turn_it_off() -> None:
    assert "fast_path=False" in reason_against(causal_lora(), fast_path=False)


def test_every_override_is_named() -> None:
    reasons = reason_against(causal_lora(), overridden=("compute_loss", "training_step"))
    assert "compute_loss is overridden" in reasons
    assert "training_step is overridden" in reasons


@pytest.mark.parametrize("build", [tiny_bert, tiny_t5])
def test_other_kinds_of_model(build: Any) -> None:
    assert "not a decoder language model" in reason_against(build())


def test_a_plain_module() -> None:
    assert "Linear is not a decoder language model" in reason_against(nn.Linear(2, 2))


@pytest.mark.parametrize(
    "config",
    [
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ],
    ids=["prompt", "prefix"],
)
def test_adapters_that_add_tokens(config: Any) -> None:
    assert "adds tokens of its own" in reason_against(get_peft_model(tiny_llama(), config))


def test_other_adapters_are_welcome() -> None:
    config = LoHaConfig(task_type="CAUSAL_LM", target_modules=["q_proj"])
    assert decide(get_peft_model(tiny_llama(), config)).name == "packed"
    assert decide(causal_lora(use_dora=True)).name == "packed"


def test_hooks_of_the_user_but_not_those_of_checkpointing() -> None:
    model = causal_lora()
    model.enable_input_require_grads()
    assert decide(model).name == "packed"
    model.get_base_model().model.layers[1].register_forward_hook(lambda *_: None)
    assert "forward hook on base_model.model.model.layers.1" in reason_against(model)


def test_a_replaced_forward() -> None:
    model = causal_lora()
    base = model.get_base_model()
    base.forward = base.forward
    assert "forward of this LlamaForCausalLM object was replaced" in reason_against(model)


def test_a_router_loss() -> None:
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, output_router_logits=True,
    )  # fmt: skip
    assert "auxiliary loss" in reason_against(MixtralForCausalLM(config))


def test_layers_that_carry_state() -> None:
    model = tiny_gemma3()
    model.config.layer_types[0] = "linear_attention"
    assert "linear_attention may carry state" in "; ".join(missing_capabilities(model, batch_of()))


def test_batches_of_another_form() -> None:
    model, batch = causal_lora(), batch_of()
    without_labels = {name: value for name, value in batch.items() if name != "labels"}
    assert "returns no labels" in reason_against(model, without_labels)
    assert "also returns weights" in reason_against(model, batch | {"weights": batch["labels"]})
    four_dimensions = batch["attention_mask"][:, None, None, :]
    assert "mask of its own" in reason_against(model, batch | {"attention_mask": four_dimensions})
    assert "different shapes" in reason_against(model, batch | {"labels": batch["labels"][:, 1:]})


def test_left_padding_with_a_labelled_first_token() -> None:
    batch = Padded(side="left")(language_rows(4, seed=3, masked=False))
    assert "predicts it from the padding" in reason_against(causal_lora(), batch)


def test_an_empty_batch() -> None:
    batch = batch_of()
    batch["attention_mask"] = torch.zeros_like(batch["attention_mask"])
    batch["labels"] = torch.full_like(batch["labels"], IGNORED)
    assert "no real token" in reason_against(causal_lora(), batch)


# -- what the probe finds ---------------------------------------------------------------------------------------------


class Leaking(nn.Module):
    """A layer that mixes a token with the token before it in the row, whoever's that is."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Tensor:
        hidden_states = hidden_states + 0.1 * hidden_states.roll(1, dims=1)
        mixed: Tensor = self.layer(hidden_states, *args, **options)
        return mixed


def test_a_model_that_leaks_between_neighbours() -> None:
    model = causal_lora()
    layers = model.get_base_model().model.layers
    layers[0] = Leaking(layers[0])
    assert "packed and padded logits differ" in reason_against(model)


class SummingLlama(LlamaForCausalLM):
    """Adds the mean over the whole batch to every logit: equal with and without padding only by accident."""

    def forward(self, *args: Any, **options: Any) -> Any:
        outputs = super().forward(*args, **options)
        outputs.logits = outputs.logits + outputs.logits.mean()
        return outputs


def test_a_model_whose_samples_see_each_other() -> None:
    assert "logits" in reason_against(SummingLlama(tiny_llama().config))


class SmoothedLlama(LlamaForCausalLM):
    """The logits are Llama's, the loss is its own."""

    def forward(self, *args: Any, **options: Any) -> Any:
        outputs = super().forward(*args, **options)
        if outputs.loss is not None:
            outputs.loss = 0.9 * outputs.loss
        return outputs


def test_a_model_with_a_loss_of_its_own() -> None:
    assert "packed and padded loss differ" in reason_against(SmoothedLlama(tiny_llama().config))


def test_an_adapter_with_a_term_of_its_own_in_the_loss() -> None:
    config = AdaLoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], total_step=10, tinit=1, tfinal=1)
    assert "packed and padded loss differ" in reason_against(get_peft_model(tiny_llama(), config))


class ScaledLlama(LlamaForCausalLM):
    """Scales its logits without a word in its config."""

    def forward(self, *args: Any, logits_to_keep: Any = 0, labels: Tensor | None = None, **options: Any) -> Any:
        outputs = super().forward(*args, logits_to_keep=logits_to_keep, **options)
        outputs.logits = outputs.logits * 0.5
        if labels is not None:
            outputs.loss = self.loss_function(outputs.logits, labels, vocab_size=self.config.vocab_size, **options)
        return outputs


def test_a_head_that_is_not_ours_falls_back_to_the_models_logits() -> None:
    model, batch = ScaledLlama(tiny_llama().config).requires_grad_(False), batch_of()
    path = decide(model, batch)
    assert isinstance(path, PackedPath)
    assert path.head == "logits_to_keep"
    assert "does more to its logits" in path.reasons[2]
    expected = model(**batch, num_items_in_batch=5).loss
    torch.testing.assert_close(path.loss(model, batch, 5), expected, rtol=1e-6, atol=0)


class OldLlama(ScaledLlama):
    """A class from before `logits_to_keep`."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **options)


def test_a_model_that_cannot_keep_chosen_logits_computes_them_all() -> None:
    model, batch = OldLlama(tiny_llama().config).requires_grad_(False), batch_of()
    path = decide(model, batch)
    assert isinstance(path, PackedPath)
    expected = model(**batch, num_items_in_batch=5).loss
    torch.testing.assert_close(path.loss(model, batch, 5), expected, rtol=1e-6, atol=0)


def test_layers_whose_windows_are_not_those_of_the_config() -> None:
    """Shorter rows than the window hide the difference from the probe's numbers, not from its record."""
    model = tiny_gemma3(sliding_window=60)
    model.model.layers[0].self_attn.sliding_window = 50
    assert "attended with the windows [50, None], the config says [60, None]" in reason_against(model)


def test_attention_that_is_not_causal() -> None:
    model = tiny_llama()
    model.model.layers[1].self_attn.is_causal = False
    assert "not causal" in reason_against(model)


def test_any_failure_of_the_model_is_a_reason_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_lora()

    class Breaking(nn.Module):
        def forward(self, *args: Any, **options: Any) -> Tensor:
            raise KeyError("segments")

    model.get_base_model().model.layers[1].mlp = Breaking()
    assert "probe of per sequence attention: 'segments'" in reason_against(model)


# -- what a decision may not change -----------------------------------------------------------------------------------


def test_deciding_leaves_randomness_modes_gradients_and_attention_alone() -> None:
    model = causal_lora(lora_dropout=0.3)
    model.train()
    model.get_base_model().model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    assert decide(model).name == "packed"
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("num_rows", [1, 4])
def test_the_probe_is_ragged_on_both_sides_and_made_of_real_tokens(num_rows: int) -> None:
    batch = batch_of(num_rows)
    batch["position_ids"] = batch["attention_mask"].cumsum(1) + 4
    probe = probe_batch(batch)
    is_real = probe["attention_mask"] != 0
    assert tuple(is_real.sum(1).tolist()) == PROBE_LENGTHS
    assert not is_real[:3, -1].all()
    assert not is_real[3, 0]
    assert set(probe["input_ids"][is_real].tolist()) <= set(batch["input_ids"][batch["attention_mask"] != 0].tolist())
    assert probe["position_ids"][is_real].min() >= 5


def test_obstacles_to_the_chunked_head() -> None:
    assert head_obstacle(causal_lora()) is None
    assert "trainable" in str(head_obstacle(tiny_llama()))
    assert "Linear" in str(head_obstacle(causal_lora(target_modules=["q_proj", "lm_head"])))


def test_the_head_is_read_from_the_config() -> None:
    model = tiny_gemma3(final_logit_softcapping=7.0)
    head = read_head(model)
    assert (head.softcap, head.scale, head.bias) == (7.0, 1.0, None)
    assert head.weight is model.lm_head.weight
