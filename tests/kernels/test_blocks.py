"""Decoder layers with a backward pass of our own against the model's layers: output, every gradient, and back again."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    SeedOssConfig,
    SeedOssForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from etude.kernels.attention import PER_SEQUENCE
from etude.kernels.block import Block, Call
from etude.kernels.layers import block_of, compare, largest
from etude.kernels.plan import KernelPlan, plan_kernels
from etude.model.capabilities import causal_model, decoder_of
from etude.model.packing import PackedBatch, pack
from etude.model.paths import CHUNKED, PackedPath, choose_path
from tiny import (
    DECODER,
    IGNORED,
    Batch,
    Padded,
    adapter_of,
    assert_same_bits,
    language_rows,
    tiny_gemma3,
    tiny_llama,
    tiny_qwen3,
    with_lora,
)

# What peft and transformers say of each other's older names.
pytestmark = pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing(_enable)?. is deprecated:FutureWarning")

FLOAT32_NORMS = 1e-6
"""The models' norms compute in float32 whatever the model's type; ours in float64 for a float64 model."""


def built(model_class: type, config_class: type, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = model_class(config_class(**(DECODER | changes)))
    return model


def with_random_biases(model: PreTrainedModel) -> PreTrainedModel:
    """Models are made with biases of zero, which hide one that is forgotten."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or "norm" in name:
            nn.init.normal_(parameter, mean=float("norm" in name and "gemma" not in model.config.model_type), std=0.3)
    return model


KINDS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "llama, all biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True),
    "qwen2": lambda: built(Qwen2ForCausalLM, Qwen2Config),
    "qwen3": tiny_qwen3,
    "gemma3, window 4": tiny_gemma3,
    "gemma2, window 4, soft caps": lambda: built(
        Gemma2ForCausalLM,
        Gemma2Config,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=4,
        attn_logit_softcapping=0.5,
    ),
    "mistral, window 4": lambda: built(MistralForCausalLM, MistralConfig, sliding_window=4),
}

ADAPTERS: dict[str, dict[str, Any]] = {
    "all-linear": {},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "down and k": {"target_modules": ["down_proj", "k_proj"]},
    "a rank and an alpha each": {
        "rank_pattern": {"q_proj": 4, "v_proj": 16, "up_proj": 1, "down_proj": 40},
        "alpha_pattern": {"k_proj": 1, "o_proj": 3, "down_proj": 80},
    },
    "rslora": {"use_rslora": True},
    "rank 5": {"r": 5},
    "in the second layer alone": {"layers_to_transform": [1], "target_modules": ["q_proj", "o_proj", "up_proj"]},
}


def adapted(kind: str, **lora: Any) -> nn.Module:
    """A random adapter, not the usual zero one, so that both of its matrices have gradients."""
    model = with_random_biases(KINDS[kind]())
    return with_lora(model, task_type="CAUSAL_LM", init_lora_weights=False, **lora).train()


def batches(count: int = 1) -> list[Batch]:
    return [Padded()(language_rows(4, seed=seed, shortest=3, longest=12)) for seed in range(count)]


def packed(batch: Batch) -> PackedBatch:
    found = pack(batch)
    assert found is not None
    return found


def num_items_of(batch: Batch) -> int:
    return int((batch["labels"][:, 1:] != IGNORED).sum())


class Applied(NamedTuple):
    """A model whose layers are computed by blocks, and what each was called with."""

    plan: KernelPlan
    calls: list[Call]

    def pairs(self) -> list[tuple[Block, Call]]:
        return list(zip(self.plan.blocks, self.calls, strict=True))


@contextmanager
def applied(model: nn.Module, dtype: torch.dtype) -> Iterator[Applied]:
    plan = plan_kernels(model, decoder_of(causal_model(model)), dtype)
    assert plan.why_no_block is None
    plan.apply()
    path = PackedPath(model, kernel=PER_SEQUENCE, head=CHUNKED, plan=plan)
    for block in plan.blocks:
        block.calls_seen = []
    with torch.no_grad():
        path.hidden_states(model, packed(batches()[0]))
    calls = [block.calls_seen[0] for block in plan.blocks if block.calls_seen]
    for block in plan.blocks:
        block.calls_seen = None
    with path.switch.packed():
        yield Applied(plan, calls)
    plan.undo()


def everything_of(layer: nn.Module, run: Callable[[Tensor], Tensor], hidden: Tensor) -> dict[str, Tensor]:
    """The output, the gradient of the input and that of every trained parameter, each by its name."""
    layer.zero_grad()
    hidden = hidden.clone().requires_grad_()
    output = run(hidden)
    direction = torch.randn(output.shape, dtype=output.dtype, generator=torch.Generator().manual_seed(5))
    output.backward(direction)
    assert hidden.grad is not None
    found = {"output": output.detach(), "hidden": hidden.grad}
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            found[name] = parameter.grad
    return found


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float) -> None:
    """Tensor by tensor, relative to the norm of each."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        difference = float((ours[name] - tensor).norm() / tensor.norm())
        assert difference < tolerance, f"{name} is off by {difference:.1e}"


def assert_block_equals_layer(block: Block, call: Call, tolerance: float) -> None:
    layer: Any = block.layer
    options = {"position_embeddings": call.position_embeddings, **call.options}
    theirs = everything_of(layer, lambda h: type(layer).forward(layer, h[None], **options)[0], call.hidden)
    ours = everything_of(layer, lambda h: block.run(h, call.position_embeddings, **call.options), call.hidden)
    assert_equal(ours, theirs, tolerance)


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_block_equals_its_layer(kind: str, adapter: str) -> None:
    model = adapted(kind, **ADAPTERS[adapter]).double()
    with applied(model, torch.float64) as found:
        for block, call in found.pairs():
            assert compare(block, call) < FLOAT32_NORMS
            assert_block_equals_layer(block, call, FLOAT32_NORMS)


@pytest.mark.parametrize(("keeps_gates", "recomputes"), [(False, False), (True, True), (False, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_not_kept_is_made_again(kind: str, keeps_gates: bool, recomputes: bool) -> None:
    model = adapted(kind).double()
    with applied(model, torch.float64) as found:
        for block, call in found.pairs():
            block.keeps_gates, block.recomputes = keeps_gates, recomputes
            assert_block_equals_layer(block, call, FLOAT32_NORMS)
            assert compare(block, call) < FLOAT32_NORMS
            assert block.recomputes == recomputes


@pytest.mark.parametrize("differences", [[math.nan, 0.1], [0.1, math.nan], [0.1, math.nan, 0.2]])
def test_a_comparison_passes_over_no_nan(differences: list[float]) -> None:
    assert math.isnan(largest(differences))
    assert largest([0.1, 0.3, 0.2]) == 0.3


def test_a_comparison_leaves_no_gradient() -> None:
    model = adapted("llama")
    with applied(model, torch.float32) as found:
        for block, call in found.pairs():
            block.recomputes = True
            compare(block, call)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_comparison_sees_a_wrong_layer() -> None:
    model = adapted("qwen3")
    with applied(model, torch.float32) as found:
        block, call = found.pairs()[0]
        assert compare(block, call) < 1e-5
        assert block.query_norm is not None
        block.query_norm.weight[3] *= 1.01
        block.query_norm = copy.deepcopy(block.query_norm)
        block.query_norm.weight[3] /= 1.01
        assert compare(block, call) > 1e-4


@pytest.mark.parametrize("recomputes", [False, True])
def test_an_input_without_gradient(recomputes: bool) -> None:
    """The first layer of a model whose embedding is frozen."""
    model = adapted("qwen2").double()
    with applied(model, torch.float64) as found:
        block, call = found.pairs()[0]
        block.recomputes = recomputes
        parameters = {name: p for name, p in block.layer.named_parameters() if p.requires_grad}
        results = []
        for requires_grad in (True, False):
            block.layer.zero_grad()
            hidden = call.hidden.clone().requires_grad_(requires_grad)
            block.run(hidden, call.position_embeddings, **call.options).square().sum().backward()
            results.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
            assert (hidden.grad is not None) == requires_grad
        assert_equal(results[1], results[0], 1e-12)


# -- whole models -----------------------------------------------------------------------------------------------------


def loss_and_gradients(model: nn.Module, losses: Callable[[], Iterator[Tensor]]) -> dict[str, Tensor]:
    """Of several micro-batches: the sum of the losses and the gradients that add up."""
    model.zero_grad()
    total = torch.zeros(())
    for loss in losses():
        loss.backward()
        total += loss.detach()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return found | {"loss": total}


def chosen(model: nn.Module, batch: Batch) -> PackedPath:
    path = choose_path(model, fast_path=True, overridden=(), sample_inputs=batch, training_dtype=None)
    assert isinstance(path, PackedPath), path.reasons
    return path


def with_blocks(model: nn.Module, batch: Batch) -> PackedPath:
    path = chosen(model, batch)
    assert len(path.plan.blocks) == 2, path.reasons
    return path


def without_blocks(model: nn.Module) -> PackedPath:
    plan = plan_kernels(model, decoder_of(causal_model(model)), torch.float32, why_no_block="asked")
    return PackedPath(model, kernel=PER_SEQUENCE, head=CHUNKED, plan=plan)


def one_by_one(path: PackedPath, model: nn.Module, batch: Batch, num_items: int) -> Iterator[Tensor]:
    for row in range(len(batch["input_ids"])):
        yield path.loss(model, {name: value[row : row + 1] for name, value in batch.items()}, num_items)


@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_a_model_equal_those_without_blocks(kind: str) -> None:
    model = adapted(kind)
    micro_batches = batches(3)
    num_items = sum(num_items_of(batch) for batch in micro_batches)
    path = with_blocks(model, micro_batches[0])
    plain_model = adapted(kind)
    plain = without_blocks(plain_model)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2) for m in (model, plain_model)]
    losses = []
    for _ in range(3):
        ours = loss_and_gradients(model, lambda: (path.loss(model, b, num_items) for b in micro_batches))
        theirs = loss_and_gradients(plain_model, lambda: (plain.loss(plain_model, b, num_items) for b in micro_batches))
        assert_equal(ours, theirs, 1e-5)
        singles = loss_and_gradients(
            model, lambda: (loss for b in micro_batches for loss in one_by_one(path, model, b, num_items))
        )
        assert_equal(singles, ours, 1e-5)
        padded = loss_and_gradients(
            model, lambda: (model(**b, num_items_in_batch=num_items).loss for b in micro_batches)
        )
        assert_equal(ours, padded, 1e-5)
        with torch.no_grad():  # the same update in both, so that what is compared are the gradients
            for mine, other in zip(model.parameters(), plain_model.parameters(), strict=True):
                other.grad = None if mine.grad is None else mine.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        losses.append(float(ours["loss"]))
    assert losses[0] > losses[1] > losses[2]  # the new adapters were taken over


def test_two_forwards_before_their_backwards() -> None:
    model = adapted("qwen3")
    first, second = batches(2)
    path = with_blocks(model, first)
    in_turn = loss_and_gradients(model, lambda: (path.loss(model, b, 10) for b in (first, second)))
    together = loss_and_gradients(model, lambda: iter([path.loss(model, first, 10) + path.loss(model, second, 10)]))
    assert_equal(together, in_turn, 1e-6)


@pytest.mark.parametrize("recomputed", [0, 1, 2])
def test_layers_that_are_run_again_attend_over_the_same_samples(recomputed: int) -> None:
    """In the backward pass, when the model's attention setting has long been put back."""
    model = adapted("gemma3, window 4")
    batch = batches()[0]
    path = with_blocks(model, batch)
    kept = loss_and_gradients(model, lambda: iter([path.loss(model, batch, 10)]))
    path.plan.keep(num_recomputed=recomputed, num_without_gates=1)
    again = loss_and_gradients(model, lambda: iter([path.loss(model, batch, 10)]))
    assert_equal(again, kept, 1e-6)
    for _ in range(2 - recomputed):
        assert path.plan.keep_less()
        assert_equal(loss_and_gradients(model, lambda: iter([path.loss(model, batch, 10)])), kept, 1e-6)
    assert not path.plan.keep_less()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_keeps_the_blocks(reentrant: bool) -> None:
    model = adapted("gemma3, window 4")
    batch = batches()[0]
    path = with_blocks(model, batch)
    kept = loss_and_gradients(model, lambda: iter([path.loss(model, batch, 10)]))
    path.plan.undo()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    settings = [getattr(module, "gradient_checkpointing", None) for module in model.modules()]
    path = with_blocks(model, batch)
    again = loss_and_gradients(model, lambda: iter([path.loss(model, batch, 10)]))
    assert_equal(again, kept, 1e-6)
    path.plan.undo()
    assert [getattr(module, "gradient_checkpointing", None) for module in model.modules()] == settings


def test_hooks_on_parameters_are_called() -> None:
    model = adapted("llama")
    batch = batches()[0]
    path = with_blocks(model, batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    plain = loss_and_gradients(model, lambda: iter([path.loss(model, batch, 10)]))
    arrived: list[Tensor] = []
    for parameter in trained:
        parameter.register_hook(lambda gradient: 2 * gradient)
        parameter.register_post_accumulate_grad_hook(arrived.append)
    doubled = loss_and_gradients(model, lambda: iter([path.loss(model, batch, 10)]))
    assert {id(parameter) for parameter in arrived} == {id(parameter) for parameter in trained}
    loss = doubled.pop("loss")
    assert float(loss) == pytest.approx(float(plain.pop("loss")))
    assert_equal(doubled, {name: 2 * gradient for name, gradient in plain.items()}, 1e-6)


def test_a_frozen_half_of_the_adapter_gets_no_gradient() -> None:
    model = adapted("llama")
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    batch = batches()[0]
    path = with_blocks(model, batch)
    ours = loss_and_gradients(model, lambda: iter([path.loss(model, batch, num_items_of(batch))]))
    theirs = loss_and_gradients(model, lambda: iter([model(**batch).loss]))
    assert not any("lora_A" in name for name in ours)
    assert_equal(ours, theirs, 1e-5)


# -- the way back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["all-linear", "q and v", "in the second layer alone"])
@pytest.mark.parametrize("kind", ["llama, all biases", "qwen2", "gemma3, window 4"])
def test_undo_restores_the_model(kind: str, adapter: str) -> None:
    model = adapted(kind, **ADAPTERS[adapter])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    batch = batches()[0]
    path = with_blocks(model, batch)
    assert_same_bits(dict(model.state_dict()), before)  # a checkpoint in the middle of a run
    path.loss(model, batch, 10).backward()
    path.plan.undo()
    after = dict(model.state_dict())
    assert list(after) == list(before)
    assert_same_bits(after, before)
    for name, parameter in model.named_parameters():
        assert parameter is parameters[name]
        assert parameter.is_contiguous(), name
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, f"{name} holds on to the memory of others"
    assert not any("forward" in vars(module) for module in model.modules())
    with torch.no_grad():
        expected = model(**batch).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-4, atol=1e-4)


def test_padded_and_generating_forwards_are_the_model_s_own() -> None:
    model = adapted("qwen3").eval()
    batch = batches()[0]
    with torch.no_grad():
        logits = model(**batch).logits
        written = model.generate(input_ids=batch["input_ids"][:, :3], max_new_tokens=5, do_sample=False)
    with_blocks(model, batch)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, logits)
        again = model.generate(input_ids=batch["input_ids"][:, :3], max_new_tokens=5, do_sample=False)
    assert torch.equal(again, written)


def test_a_copy_made_during_a_run_is_independent() -> None:
    model = adapted("qwen2")
    batch = batches()[0]
    path = with_blocks(model, batch)
    path.loss(model, batch, 10).backward()
    other = copy.deepcopy(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ours = loss_and_gradients(model, lambda: iter([path.loss(model, batch, num_items_of(batch))]))
    theirs = loss_and_gradients(other, lambda: iter([other(**batch).loss]))
    assert_equal(ours, theirs, 1e-5)

    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert_same_bits(dict(model.state_dict()), before)
    again = loss_and_gradients(model, lambda: iter([path.loss(model, batch, num_items_of(batch))]))
    assert_equal(again, ours, 1e-12)

    copied = adapter_of(other)
    path.plan.undo()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    assert_same_bits(adapter_of(other), copied)
    assert bool((other(**batch).logits == 0).all())


def test_a_copy_trains_on_a_path_of_its_own() -> None:
    model = adapted("llama")
    batch = batches()[0]
    path = with_blocks(model, batch)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.mul_(1.5)
    own = chosen(other, batch)
    ours = loss_and_gradients(other, lambda: iter([own.loss(other, batch, num_items_of(batch))]))
    theirs = loss_and_gradients(other, lambda: iter([other(**batch).loss]))
    assert_equal(ours, theirs, 1e-5)
    path.plan.undo()
    own.plan.undo()


# -- layers that stay as they are -------------------------------------------------------------------------------------


def why_not(model: nn.Module, dtype: torch.dtype = torch.float32) -> str:
    found = block_of(decoder_of(causal_model(model)).layers[0], dtype)
    assert isinstance(found, str)
    assert plan_kernels(model, decoder_of(causal_model(model)), dtype).why_no_block == found
    return found


def trainable_norm() -> nn.Module:
    return with_lora(tiny_llama(), task_type="CAUSAL_LM", modules_to_save=["input_layernorm"])


def trainable_bias() -> nn.Module:
    return with_lora(tiny_llama(attention_bias=True), task_type="CAUSAL_LM", target_modules=["down_proj"], bias="all")


def disabled() -> nn.Module:
    model = with_lora(tiny_llama(), task_type="CAUSAL_LM")
    model.base_model.disable_adapter_layers()
    return model


def merged() -> nn.Module:
    model = with_lora(tiny_llama(), task_type="CAUSAL_LM")
    model.merge_adapter()
    return model


def replaced_forward() -> nn.Module:
    model = adapted("llama")
    attention = decoder_of(causal_model(model)).layers[0].self_attn
    own = attention.forward
    attention.forward = lambda *inputs, **options: own(*inputs, **options)
    return model


def a_weight_of_its_own() -> nn.Module:
    """Frozen by nobody, and used by nobody in the forward that a probe compares, yet not for a block to leave out."""
    model = adapted("llama")
    decoder_of(causal_model(model)).layers[0].register_parameter("gain", nn.Parameter(torch.zeros(1)))
    return model


def backward_hook() -> nn.Module:
    model = adapted("llama")
    decoder_of(causal_model(model)).layers[0].mlp.register_full_backward_hook(lambda *seen: None)
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a trainable norm": (trainable_norm, "norms other than frozen RMS norms"),
    "a trainable bias": (trainable_bias, "a trainable weight (q_proj)"),
    "a trainable layer": (
        lambda: with_lora(tiny_llama(), target_modules=["q_proj"], modules_to_save=["up_proj"]),
        "ModulesToSaveWrapper layers (up_proj)",
    ),
    "disabled adapters": (disabled, "adapters are disabled"),
    "a merged adapter": (merged, "the adapter is merged"),
    "another activation": (lambda: with_lora(tiny_llama(hidden_act="relu")), "an activation other than SiLU and GELU"),
    "exact GELU": (lambda: with_lora(tiny_llama(hidden_act="gelu")), "an activation other than SiLU and GELU"),
    "fused projections": (lambda: with_lora(built(Phi3ForCausalLM, Phi3Config)), "its parts are other ones"),
    "norms after": (lambda: with_lora(built(Olmo2ForCausalLM, Olmo2Config)), "its parts are other ones"),
    "dropout in the layer": (
        lambda: with_lora(
            built(SeedOssForCausalLM, SeedOssConfig, head_dim=8, attention_dropout=0.0, residual_dropout=0.1)
        ),
        "dropout (residual_dropout)",
    ),
    "a replaced forward": (replaced_forward, "the forward of its LlamaAttention was replaced"),
    "attention dropout": (lambda: with_lora(tiny_llama(attention_dropout=0.1)), "dropout (attention_dropout)"),
    "another weight": (a_weight_of_its_own, "a trainable weight (gain)"),
    "a hook": (backward_hook, "hooks on its LlamaMLP"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_layer_that_is_no_block_says_why(name: str) -> None:
    build, reason = REFUSED[name]
    assert reason in why_not(build())


def test_weights_in_another_type_than_the_arithmetic() -> None:
    assert "weights in another type than bfloat16" in why_not(adapted("llama"), torch.bfloat16)


OTHERWISE: dict[str, Callable[[], PreTrainedModel]] = {
    "granite, residuals multiplied": lambda: built(
        GraniteForCausalLM, GraniteConfig, residual_multiplier=0.5, attention_multiplier=0.3, logits_scaling=4.0
    ),
    "smollm3, no positions in the first layer": lambda: built(
        SmolLM3ForCausalLM, SmolLM3Config, no_rope_layers=[0, 1], use_sliding_window=False
    ),
}


@pytest.mark.parametrize("name", OTHERWISE)
def test_layers_that_only_look_alike_are_found_by_the_probe(name: str) -> None:
    model = with_lora(OTHERWISE[name](), task_type="CAUSAL_LM", init_lora_weights=False)
    batch = batches()[0]
    layer = decoder_of(causal_model(model)).layers[0]
    assert isinstance(block_of(layer, torch.float32), Block)
    path = chosen(model, batch)
    assert path.plan.blocks == [] and "differ" in str(path.plan.why_no_block)
    assert not any("forward" in vars(layer) for layer in decoder_of(causal_model(model)).layers)
    ours = loss_and_gradients(model, lambda: iter([path.loss(model, batch, num_items_of(batch))]))
    theirs = loss_and_gradients(model, lambda: iter([model(**batch).loss]))
    assert_equal(ours, theirs, 1e-5)
