"""A base of bitsandbytes on the packed path, on a CPU: the numbers of the general path, nothing changed, little memory.

Where the package is not installed (it brings 120 MB of GPU libraries), what needs none of it is still tested.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import PreTrainedModel

from etude import TrainerCallback
from etude.kernels.attention import PER_SEQUENCE
from etude.kernels.plan import plan_kernels
from etude.kernels.quantized import (
    EIGHT_BIT,
    FOUR_BIT,
    QuantizedProjection,
    Workspace,
    is_quantized_lora,
    quantized_kind,
)
from etude.model.capabilities import causal_model, decoder_of
from etude.model.paths import CHUNKED, PackedPath, choose_path
from short_run import short_trainer
from tiny import IGNORED, Padded, language_rows, tiny_llama, tiny_qwen3, with_lora

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes (pip install bitsandbytes)"
)
pytestmark = pytest.mark.filterwarnings("ignore:MatMul8bitLt. inputs will be cast:UserWarning")

MODELS: dict[str, Any] = {
    "llama, biases": lambda **shape: tiny_llama(attention_bias=True, **shape),
    "qwen3": tiny_qwen3,
}
WIDE = {"hidden_size": 64, "intermediate_size": 128}


def loss_and_gradients(model: nn.Module, loss: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    loss.backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.requires_grad and p.grad is not None]
    return loss.detach(), torch.cat(gradients)


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


@needs_bitsandbytes
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_four_bits_give_the_numbers_of_the_general_path(name: str, nested: bool) -> None:
    from quantized_models import quantised_lora

    model = quantised_lora(MODELS[name](**WIDE), "nf4", nested=nested)
    check_against_the_general_path(model, loss=1e-6, gradients=1e-5, kind=FOUR_BIT)


@needs_bitsandbytes
def test_eight_bits_give_the_numbers_of_the_general_path() -> None:
    """bitsandbytes rounds the activations of an evaluation only, on a CPU: in training both multiply the same weights."""
    from quantized_models import quantised_lora

    model = quantised_lora(tiny_llama(attention_bias=True, **WIDE), "int8")
    check_against_the_general_path(model, loss=1e-6, gradients=1e-5, kind=EIGHT_BIT)


def check_against_the_general_path(model: nn.Module, *, loss: float, gradients: float, kind: str) -> None:
    batch = Padded()(language_rows(4, seed=3, shortest=5, longest=14))
    num_items = int((batch["labels"][:, 1:] != IGNORED).sum())
    theirs = loss_and_gradients(model, model(**batch, num_items_in_batch=num_items).loss)
    weights = {key: value.clone() for key, value in model.state_dict().items() if isinstance(value, Tensor)}
    path = choose_path(model, fast_path=True, overridden=(), sample_inputs=batch, training_dtype=None)
    assert isinstance(path, PackedPath), path.reasons
    assert any(kind in reason for reason in path.reasons), path.reasons
    projections = [projection for block in path.plan.blocks for projection in block.projections]
    assert all(isinstance(projection, QuantizedProjection) for projection in projections)
    assert len({projection.workspace._buffer.data_ptr() for projection in projections}) == 1

    ours = loss_and_gradients(model, path.loss(model, batch, num_items))
    assert relative(ours[0], theirs[0]) < loss
    assert relative(ours[1], theirs[1]) < gradients
    assert all(torch.equal(model.state_dict()[key], value) for key, value in weights.items())

    path.plan.undo()
    assert projections[0].workspace._buffer is None
    again = loss_and_gradients(model, model(**batch, num_items_in_batch=num_items).loss)
    assert torch.equal(again[1], theirs[1])


@needs_bitsandbytes
@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 5e-3), ("int8", 2e-2)])
def test_a_base_prepared_by_peft_is_trained_by_our_own_layers(kind: str, tolerance: float) -> None:
    """`prepare_model_for_kbit_training` makes all that is not quantised float32, what travels between layers as well. In
    half precision bitsandbytes' own layers round the activations to 8 bits, ours do not."""
    from peft import prepare_model_for_kbit_training

    from quantized_models import quantised

    losses = []
    for fast_path in (True, False):
        base = quantised(tiny_llama(attention_bias=True, **WIDE).bfloat16(), kind)
        base = prepare_model_for_kbit_training(base, use_gradient_checkpointing=False)
        model = with_lora(base, task_type="CAUSAL_LM", init_lora_weights=False).train()
        trainer = short_trainer(model, bf16=True, fast_path=fast_path, max_steps=4, logging_steps=1)
        blocks: list[bool] = []
        trainer.add_callback(WideBlocks(trainer, blocks))
        trainer.train()
        assert blocks == ([True] * 2 if fast_path else [])
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == pytest.approx(losses[1], rel=tolerance)


class WideBlocks(TrainerCallback):
    """Whether each of our own layers had float32 to add to in the first step."""

    def __init__(self, trainer: Any, found: list[bool]) -> None:
        self.trainer, self.found = trainer, found

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 1 and self.trainer.path.name == "packed":
            self.found += [block.is_wide for block in self.trainer.path.plan.blocks]


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_check_compares_with_the_unpacked_weights_in_float32(kind: str) -> None:
    from quantized_models import quantised_lora

    model = quantised_lora(tiny_llama(attention_bias=True, **WIDE), kind)
    kinds = [quantized_kind(module) for module in model.modules()]
    found = short_trainer(model).check(reference_dtype="float32")
    assert found.reference_errors is not None
    ours, stock = found.reference_errors
    assert ours < 1e-5 and (stock < 1e-5) == (kind == "nf4")  # 8-bit layers of bitsandbytes round activations there
    assert found.reference_loss == pytest.approx(found.loss, rel=1e-6)
    assert found.is_fine and [quantized_kind(module) for module in model.modules()] == kinds

    half = short_trainer(quantised_lora(tiny_llama(**WIDE).bfloat16(), "nf4"), bf16=True)
    found = half.check(reference_dtype="float32")
    assert found.is_fine and found.reference_errors is not None and 1e-3 < min(found.reference_errors) < 0.1


@needs_bitsandbytes
def test_a_check_has_no_such_reference_where_weights_cannot_be_unpacked() -> None:
    from quantized_models import quantised_lora

    model = quantised_lora(tiny_llama(**WIDE), "nf4")
    linear: Any = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    linear.support_avx512bf16_for_cpu = True
    linear.forward = lambda x: type(linear).forward(linear, x)  # its own, which an evaluation would change
    found = short_trainer(model, fast_path=False).check(reference_dtype="float32")
    assert found.reference_errors is None
    assert any("no float32 reference: 4-bit weights that change their format" in note for note in found.notes)


@needs_bitsandbytes
def test_a_layer_left_in_full_precision_shares_a_product_with_quantised_ones() -> None:
    from quantized_models import quantised_lora

    base = tiny_llama(**WIDE)
    plain = [nn.Linear(64, 32, bias=False) for _ in base.model.layers]
    model = quantised_lora(base, "nf4")
    for layer, linear in zip(model.get_base_model().model.layers, plain, strict=True):
        layer.self_attn.v_proj = linear.requires_grad_(False)
    check_against_the_general_path(model, loss=1e-6, gradients=1e-5, kind=FOUR_BIT)


@needs_bitsandbytes
def test_weights_that_would_change_their_format_keep_their_own_layers() -> None:
    from quantized_models import quantised_lora

    model = quantised_lora(tiny_llama(**WIDE), "nf4")
    linear = model.get_base_model().model.layers[0].self_attn.q_proj.base_layer
    batch = Padded()(language_rows(4, seed=3))
    options: dict[str, Any] = {"fast_path": True, "overridden": (), "sample_inputs": batch, "training_dtype": None}
    linear.compute_dtype = torch.bfloat16
    path = choose_path(model, **options)
    assert any("4-bit weights that compute in bfloat16" in reason for reason in path.reasons), path.reasons
    linear.compute_dtype, linear.support_avx512bf16_for_cpu = torch.float32, True
    assert linear.weight.quant_state is not None
    from etude.kernels.quantized import quantized_obstacle

    assert quantized_obstacle(linear, torch.float32) is not None


# -- numbers for each row: DoRA, LoRA with a bias -----------------------------------------------------------------------


def with_numbers_of_rows(base: PreTrainedModel, kind: str | None, lora: str) -> Any:
    """On all layers; `kind` None leaves them as they are."""
    from quantized_models import quantised_lora

    settings: dict[str, Any] = {"task_type": "CAUSAL_LM", "init_lora_weights": False}
    first = settings | {
        "lora_bias": lora == "biases",
        "use_dora": lora != "biases",
        "lora_dropout": 0.3 * ("drop" in lora),
    }
    model: Any = with_lora(base, **first).train() if kind is None else quantised_lora(base, kind, **first)
    if lora == "DoRA before biases":
        model.add_adapter("second", LoraConfig(**settings, lora_bias=True, target_modules="all-linear", r=5))
        model.base_model.set_adapter(["default", "second"])
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
            values = torch.randn_like(parameter, dtype=torch.float32)
            parameter.data = values.abs() + 0.1 if "lora_magnitude" in name else 0.2 * values
            if "zero" in lora and "lora_magnitude" in name:
                parameter.data[1::3] = 0.0
    return model


def biased_llama() -> PreTrainedModel:
    return tiny_llama(attention_bias=True, mlp_bias=True, **WIDE)


ROWS = {
    "DoRA": lambda: tiny_qwen3(**WIDE),
    "DoRA of zero": lambda: tiny_qwen3(**WIDE),
    "biases": biased_llama,
    "DoRA before biases": biased_llama,
}


@needs_bitsandbytes
@pytest.mark.parametrize("lora", ROWS)
def test_numbers_of_a_row_give_those_of_the_general_path(lora: str) -> None:
    model = with_numbers_of_rows(ROWS[lora](), "nf4", lora)
    check_against_the_general_path(model, loss=1e-6, gradients=1e-5, kind=FOUR_BIT)


def in_full_precision(model: nn.Module, base: PreTrainedModel, lora: str) -> Any:
    """`base` with the weights of a quantised model as they are unpacked, and the same adapters."""
    import bitsandbytes

    plain = with_numbers_of_rows(base, None, lora)
    quantised = dict(model.named_modules())
    with torch.no_grad():
        for name, module in plain.named_modules():
            if type(module) is nn.Linear and name.endswith("base_layer"):
                weight: Any = quantised[name].weight
                if isinstance(weight, bitsandbytes.nn.Params4bit):
                    module.weight.copy_(bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state))
                else:
                    module.weight.copy_(weight.data * (weight.SCB / 127)[:, None])
    return plain


def packed_loss_and_gradients(model: nn.Module, batch: Any, num_items: int) -> tuple[Tensor, Tensor]:
    """Without a probe: on a CPU peft's own DoRA computes once on layers in 8 bits, and leaves them without their scales."""
    plan = plan_kernels(model, decoder_of(causal_model(model)), torch.float32)
    assert plan.why_no_block is None and len(plan.blocks) == 2
    plan.apply()
    path = PackedPath(model, kernel=PER_SEQUENCE, head=CHUNKED, plan=plan)
    torch.manual_seed(5)
    found = loss_and_gradients(model, path.loss(model, batch, num_items))
    plan.undo()
    return found


@needs_bitsandbytes
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("lora", [*ROWS, "DoRA that drops"])
def test_numbers_of_a_row_give_those_of_the_unpacked_weights(lora: str, kind: str) -> None:
    build = ROWS.get(lora, ROWS["DoRA"])
    model = with_numbers_of_rows(build(), kind, lora)
    plain = in_full_precision(model, build(), lora)
    batch = Padded()(language_rows(4, seed=3, shortest=5, longest=14))
    num_items = int((batch["labels"][:, 1:] != IGNORED).sum())
    ours = packed_loss_and_gradients(model, batch, num_items)
    assert relative(ours[0], packed_loss_and_gradients(plain, batch, num_items)[0]) < 1e-6
    assert relative(ours[1], packed_loss_and_gradients(plain, batch, num_items)[1]) < 1e-5
    if "drop" not in lora:  # where peft draws others
        theirs = loss_and_gradients(plain, plain(**batch, num_items_in_batch=num_items).loss)
        assert relative(ours[0], theirs[0]) < 1e-6
        assert relative(ours[1], theirs[1]) < 1e-5


@needs_bitsandbytes
def test_a_run_of_dora_says_that_its_layers_are_our_own(capsys: pytest.CaptureFixture[str]) -> None:
    curves = []
    for fast_path in (True, False):
        model = with_numbers_of_rows(tiny_qwen3(**WIDE), "nf4", "DoRA")
        trainer = short_trainer(
            model, language_rows(10, seed=2), max_steps=4, learning_rate=1e-3, fast_path=fast_path, logging_steps=1
        )
        trainer.train()
        said = capsys.readouterr().err
        assert ("2 decoder layers with their own forward and backward pass" in said) == fast_path
        curves.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert len(curves[0]) == 4
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_ordinary_layers_are_not_quantised_ones() -> None:
    assert quantized_kind(nn.Linear(2, 2)) is None
    assert not is_quantized_lora(nn.Linear(2, 2))


def test_the_workspace_is_as_large_as_the_largest_matrix_and_goes_with_its_last_user() -> None:
    workspace = Workspace()
    for size in (12, 40, 6):
        workspace.reserve(size, torch.float32, torch.device("cpu"))
    wide, small = workspace.view(5, 8), workspace.view(2, 3)
    assert wide.is_contiguous() and small.is_contiguous()
    assert wide.data_ptr() == small.data_ptr() and wide.untyped_storage().nbytes() == 4 * 40
    workspace.release()
    workspace.release()
    assert workspace.view(5, 8).shape == (5, 8)
    workspace.release()
    with pytest.raises(AssertionError):
        workspace.view(1, 1)
