"""Blocks whose adapters are more than a plain one each (DoRA, several at once, LoRA with a bias), against peft's layers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from peft import LoraConfig
from test_blocks import (
    ADAPTERS,
    FLOAT32_NORMS,
    adapted,
    applied,
    assert_block_equals_layer,
    assert_equal,
    batches,
    loss_and_gradients,
    num_items_of,
    with_blocks,
)
from torch import nn

from etude import Trainer, TrainingArguments
from etude.errors import ModelError
from etude.kernels.block import Block
from etude.kernels.layers import block_of, compare
from etude.kernels.projection import Drop
from etude.model.capabilities import causal_model, decoder_of
from tiny import Padded, adapter_of, assert_same_bits, language_rows, tiny_qwen3, with_lora

MODELS = ("llama, all biases", "qwen3", "gemma3, window 4")


def with_magnitudes_of_its_own(model: nn.Module) -> nn.Module:
    """Not the norms that they begin with."""
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            with torch.no_grad():
                parameter.mul_(torch.empty_like(parameter).uniform_(0.5, 1.5))
    return model


def with_dora(kind: str, **lora: Any) -> nn.Module:
    return with_magnitudes_of_its_own(adapted(kind, use_dora=True, **lora))


def with_magnitudes_of_zero(kind: str, **lora: Any) -> nn.Module:
    """And of less: what a magnitude passes through on its way to the other sign."""
    model = with_dora(kind, **lora)
    for name, parameter in model.named_parameters():
        if "lora_magnitude" in name:
            with torch.no_grad():
                parameter[1::3], parameter[2] = 0.0, -parameter[2]
    return model


def with_two(
    kind: str, *, trains_second: bool = True, first: Any = None, second: Any = None, names: Any = None, **lora: Any
) -> nn.Module:
    """Two active adapters of different layers, ranks and scalings; `first` and `second` are settings of one of them."""
    model = adapted(kind, **({"target_modules": ["q_proj", "k_proj", "gate_proj", "o_proj"]} | lora | (first or {})))
    targets = ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {"r": 5, "lora_alpha": 3, "target_modules": targets, "init_lora_weights": False, **(second or {})}
    model.add_adapter("second", LoraConfig(**{"task_type": "CAUSAL_LM"} | lora | settings))
    model.base_model.set_adapter(names or ["default", "second"])
    for name, parameter in model.named_parameters():
        if ".second." in name or ".default." in name:
            parameter.requires_grad_(trains_second or ".default." in name)
        if "lora_B" in name and name.endswith("bias"):
            nn.init.normal_(parameter)
    return with_magnitudes_of_its_own(model)


DORA: dict[str, Any] = {"use_dora": True}


def with_three(kind: str, **lora: Any) -> nn.Module:
    model = with_two(kind, **lora)
    of_third = {name: value for name, value in lora.items() if name not in ("first", "second")}
    model.add_adapter("third", LoraConfig(r=3, task_type="CAUSAL_LM", target_modules="all-linear", **of_third))
    model.base_model.set_adapter(["default", "second", "third"])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(True)
            if ".third." in name:
                nn.init.normal_(parameter, std=0.1)
    return model


def with_bias(kind: str, **lora: Any) -> nn.Module:
    """Biases of LoRA on the layers that have one of their own, which peft asks for."""
    targets = ["q_proj", "v_proj"] if kind == "qwen2" else "all-linear"
    model = adapted(kind, lora_bias=True, target_modules=targets, **lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name and name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


BUILT: dict[str, Callable[[], nn.Module]] = {
    **{f"DoRA, {kind}": lambda kind=kind: with_dora(kind) for kind in MODELS},
    **{f"DoRA of zero, {kind}": lambda kind=kind: with_magnitudes_of_zero(kind) for kind in MODELS},
    **{
        f"DoRA, {name}": lambda name=name: with_dora("qwen2", **ADAPTERS[name])
        for name in ("q and v", "down and k", "a rank and an alpha each", "rslora", "in the second layer alone")
    },
    **{f"two, {kind}": lambda kind=kind: with_two(kind) for kind in MODELS},
    "two, one of them frozen": lambda: with_two("qwen2", trains_second=False),
    "two with biases": lambda: with_two("llama, all biases", lora_bias=True),
    **{f"DoRA after LoRA, {kind}": lambda kind=kind: with_two(kind, second=DORA) for kind in MODELS},
    **{f"DoRA before LoRA, {kind}": lambda kind=kind: with_two(kind, first=DORA) for kind in MODELS},
    **{f"DoRA after DoRA, {kind}": lambda kind=kind: with_two(kind, first=DORA, second=DORA) for kind in MODELS},
    "DoRA after DoRA, the other way round": lambda: with_two("llama", **DORA, names=["second", "default"]),
    "DoRA after DoRA that is frozen": lambda: with_two("qwen2", trains_second=False, **DORA),
    "DoRA after biases": lambda: with_two("llama, all biases", first={"lora_bias": True}, second=DORA),
    "biases after DoRA": lambda: with_two("llama, all biases", first=DORA, second={"lora_bias": True}),
    "DoRA between two, qwen3": lambda: with_three("qwen3", second=DORA),
    "bias, all layers": lambda: with_bias("llama, all biases"),
    "bias, q and v": lambda: with_bias("qwen2"),
}  # type: ignore[misc]


WAYS = ("everything kept", "gates made again", "run again")


def in_each_way(names: Iterable[str]) -> list[tuple[str, str]]:
    """One model of each in all of the ways, and those that only vary it in one."""
    return [
        (name, way)
        for number, name in enumerate(names)
        for way in (WAYS if "qwen3" in name or "biases" in name else WAYS[number % 3 :][:1])
    ]


@pytest.mark.parametrize(("name", "way"), in_each_way(BUILT))
def test_a_block_equals_its_layer(name: str, way: str) -> None:
    """Output, gradient of the input and gradient of every parameter, magnitudes and biases among them."""
    model = BUILT[name]().double()
    with applied(model, torch.float64) as found:
        assert found.plan.explain() == [
            "2 decoder layers with their own forward and backward pass, and the norm behind them"
        ]
        for block, call in found.pairs():
            block.keeps_gates, block.recomputes = way != "gates made again", way == "run again"
            assert compare(block, call) < FLOAT32_NORMS
            assert_block_equals_layer(block, call, FLOAT32_NORMS)


STEPPED = [
    "DoRA, qwen3",
    "DoRA of zero, gemma3, window 4",
    "two, qwen3",
    "two, one of them frozen",
    "DoRA after LoRA, qwen3",
    "DoRA after DoRA, gemma3, window 4",
    "DoRA between two, qwen3",
    "bias, all layers",
]


@pytest.mark.parametrize("name", STEPPED)
def test_steps_of_a_model_equal_those_of_peft(name: str) -> None:
    """The adapters as they are after every update, beside peft in float64: in float32 it is as far from that as ours."""
    model = BUILT[name]()
    exact = copy.deepcopy(model).double()
    first, second = batches(2)
    num_items = num_items_of(first) + num_items_of(second)
    path = with_blocks(model, first)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        exact.load_state_dict(model.state_dict())
        theirs = loss_and_gradients(
            exact, lambda: (exact(**batch, num_items_in_batch=num_items).loss for batch in (first, second))
        )
        ours = loss_and_gradients(model, lambda: (path.loss(model, batch, num_items) for batch in (first, second)))
        assert_equal(ours, theirs, 1e-5)
        optimizer.step()
        losses.append(float(ours["loss"]))
    assert losses[0] > losses[1] > losses[2]


@pytest.mark.parametrize(
    "name", ["DoRA, llama, all biases", "two with biases", "DoRA after DoRA, qwen3", "bias, q and v"]
)
def test_undo_restores_the_model(name: str) -> None:
    model = BUILT[name]()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    batch = batches()[0]
    path = with_blocks(model, batch)
    assert_same_bits(dict(model.state_dict()), before)
    path.loss(model, batch, 10).backward()
    path.plan.undo()
    assert_same_bits(dict(model.state_dict()), before)
    for key, parameter in model.named_parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes, f"{key} holds on to the memory of others"


# peft takes a bias of its own for a matrix of which a part is missing.
@pytest.mark.filterwarnings("ignore:Adapter 'default'. .* LoRA tensor.s. have invalid shape")
@pytest.mark.parametrize("name", ["DoRA, qwen3", "two, qwen3", "DoRA after DoRA, qwen3", "bias, all layers"])
def test_a_run_says_that_its_layers_are_our_own(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    results = []
    for fast_path in (True, False):
        model = BUILT[name]()
        arguments = TrainingArguments(
            "out", max_steps=4, logging_steps=1, learning_rate=1e-3, fast_path=fast_path, report_to="none", seed=3
        )
        trainer = Trainer(model, arguments, train_dataset=language_rows(8), data_collator=Padded())
        trainer.train()
        said = "2 decoder layers with their own forward and backward pass" in capsys.readouterr().err
        assert said == fast_path
        results.append(adapter_of(model) | {"loss": torch.tensor([r["loss"] for r in trainer.state.log_history[:4]])})
    assert_equal(results[0], results[1], 1e-4)


class Dropped(nn.Dropout):
    """Dropout of peft's layers that drops what the blocks drop."""

    seed: torch.Tensor
    stream: int
    number: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training:
            return x
        return x * Drop(self.seed, self.stream).rows(torch.ones_like(x[0]), self.number, self.p)


def dropped(model: nn.Module) -> nn.Module:
    """The model with such dropouts; `agreed` tells them where they are."""
    for module in model.modules():
        for name, dropout in getattr(module, "lora_dropout", {}).items():
            if isinstance(dropout, nn.Dropout):
                module.lora_dropout[name] = Dropped(dropout.p)  # type: ignore[union-attr, operator]
    return model


def agreed(block: Block, seed: torch.Tensor) -> None:
    for stream, projection in enumerate(block.projections):
        for number, member in enumerate(projection.members):
            if member.adapter is not None:
                dropout: Any = member.adapter.dropout
                dropout.seed, dropout.stream, dropout.number = seed, stream, number


def seed_drawn(device: str = "cpu") -> torch.Tensor:
    return torch.randint(0, 2**31, (1,), device=device)


DROP = {"lora_dropout": 0.4}
DROPPING: dict[str, Callable[[], nn.Module]] = {
    **{f"DoRA, {kind}": lambda kind=kind: with_dora(kind, **DROP) for kind in MODELS},
    **{
        f"DoRA, {name}": lambda name=name: with_dora("qwen2", **DROP, **ADAPTERS[name])
        for name in ("q and v", "down and k", "a rank and an alpha each", "in the second layer alone")
    },
    "DoRA of zero, llama, all biases": lambda: with_magnitudes_of_zero("llama, all biases", **DROP),
    "DoRA of zero, qwen3": lambda: with_magnitudes_of_zero("qwen3", **DROP),
    "LoRA, qwen3": lambda: adapted("qwen3", **DROP),
    "two, gemma3, window 4": lambda: with_two("gemma3, window 4", **DROP),
    "three, llama": lambda: with_three("llama", second={}, **DROP),
    "LoRA before DoRA that drops nothing": lambda: with_two("qwen3", first=DROP, second=DORA),
    "LoRA after DoRA that drops nothing": lambda: with_two("llama, all biases", first=DORA, second=DROP),
    "DoRA beside DoRA that drops nothing, each on layers of its own": lambda: with_two(
        "llama, all biases",
        first=DORA | DROP | {"target_modules": ["q_proj", "gate_proj", "o_proj"]},
        second=DORA | {"target_modules": ["k_proj", "up_proj", "down_proj"]},
    ),
    "bias, all layers": lambda: with_bias("llama, all biases", **DROP),
}  # type: ignore[misc]


@pytest.mark.parametrize(("name", "way"), in_each_way(DROPPING))
def test_a_block_that_drops_equals_its_layer_that_drops_the_same(name: str, way: str) -> None:
    model = dropped(DROPPING[name]()).double()
    with applied(model, torch.float64) as found:
        for block, call in found.pairs():
            block.keeps_gates, block.recomputes = way != "gates made again", way == "run again"
            torch.manual_seed(0)
            agreed(block, seed_drawn())
            torch.manual_seed(0)
            assert_block_equals_layer(block, call, FLOAT32_NORMS)
            model.eval()
            assert_block_equals_layer(block, call, FLOAT32_NORMS)
            model.train()


@pytest.mark.parametrize("name", ["DoRA, qwen3", "DoRA, gemma3, window 4", "two, gemma3, window 4"])
def test_steps_that_drop_equal_those_of_peft_that_drop_the_same(name: str) -> None:
    """Of one sample each, whose tokens lie in the same places in both."""
    model = dropped(DROPPING[name]())
    rows = [{key: value[:1] for key, value in batch.items()} for batch in batches(3)]
    samples = [{key: value[:, : int(row["attention_mask"].sum())] for key, value in row.items()} for row in rows]
    path = with_blocks(model, samples[0])
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for step in range(3):
        torch.manual_seed(step)
        seeds = [[seed_drawn() for _ in path.plan.blocks] for _ in samples]

        def of_peft(seeds: Any = seeds) -> Any:
            for sample, of_sample in zip(samples, seeds, strict=True):
                for block, seed in zip(path.plan.blocks, of_sample, strict=True):
                    agreed(block, seed)
                yield model(**sample, num_items_in_batch=20).loss

        theirs = loss_and_gradients(model, of_peft)
        torch.manual_seed(step)
        ours = loss_and_gradients(model, lambda: (path.loss(model, sample, 20) for sample in samples))
        assert_equal(ours, theirs, 1e-5)
        optimizer.step()
        losses.append(float(ours["loss"]))
    assert len(set(losses)) == 3


def test_a_run_that_drops_says_that_its_layers_are_our_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Elements that peft draws otherwise: about the same curve."""
    curves = []
    for fast_path in (True, False):
        trainer = Trainer(
            with_lora(tiny_qwen3(), task_type="CAUSAL_LM", use_dora=True, lora_dropout=0.1),
            TrainingArguments(
                "out", max_steps=12, logging_steps=1, learning_rate=2e-2, fast_path=fast_path, report_to="none", seed=3
            ),
            train_dataset=language_rows(8),
            data_collator=Padded(),
        )
        trainer.train()
        assert ("2 decoder layers with their own forward and backward pass" in capsys.readouterr().err) == fast_path
        curves.append([row["loss"] for row in trainer.state.log_history[:12]])
    assert curves[0] != curves[1]
    assert curves[0] == pytest.approx(curves[1], rel=0.05)
    assert curves[0][-1] < 0.9 * curves[0][0]


@pytest.mark.parametrize("build", [with_two, with_bias, with_dora])
def test_under_dropout_the_gradient_is_that_of_what_was_computed(build: Callable[..., nn.Module]) -> None:
    """Against differences along one direction in all adapters at once, or in all magnitudes: their norms count as constant."""
    model = build("llama, all biases", lora_dropout=0.4).double()
    with applied(model, torch.float64) as found:
        block, call = found.pairs()[0]
        trained = [p for p in block.layer.parameters() if p.requires_grad]
        magnitudes = [p for name, p in block.layer.named_parameters() if "lora_magnitude" in name]
        trained = magnitudes or trained
        weights = torch.randn(call.hidden.shape, dtype=torch.float64)

        def value() -> torch.Tensor:
            found.plan.refresh()
            torch.manual_seed(0)
            return (block.run(call.hidden, call.position_embeddings, **call.options) * weights).sum()

        gradients = torch.autograd.grad(value(), trained)
        directions = [torch.randn_like(p) for p in trained]
        slope = sum(float((g * d).sum()) for g, d in zip(gradients, directions, strict=True))
        values = []
        for step in (1e-6, -2e-6):
            with torch.no_grad():
                for parameter, direction in zip(trained, directions, strict=True):
                    parameter += step * direction
                values.append(float(value()))
        assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_a_change_of_the_active_adapters_is_noticed() -> None:
    model = with_two("llama")
    path = with_blocks(model, batches()[0])
    path.plan.require_unchanged()
    model.base_model.set_adapter("second")
    with pytest.raises(ModelError, match="otherwise than when training began"):
        path.plan.require_unchanged()


def why_not(model: nn.Module) -> str:
    found = block_of(decoder_of(causal_model(model)).layers[0], torch.float32)
    assert not isinstance(found, Block)
    return found


def test_dora_that_drops_beside_another_adapter_stays_with_peft() -> None:
    """It scales what the adapters before it gave when it is evaluated, and does not when it drops."""
    reason = "DoRA with dropout beside another active adapter (q_proj)"
    assert why_not(with_two("llama", use_dora=True, lora_dropout=0.1)) == reason
    assert why_not(with_two("llama", first=DORA | DROP)) == reason
    assert why_not(with_two("llama", second=DORA | DROP)) == reason


def with_many(count: int, **lora: Any) -> nn.Module:
    model = adapted("llama", **lora)
    names = [f"number {number}" for number in range(1, count)]
    for name in names:
        model.add_adapter(name, model.peft_config["default"])
    model.base_model.set_adapter(["default", *names])
    return model


def test_more_adapters_than_can_drop_apart() -> None:
    assert why_not(with_many(6, lora_dropout=0.1)) == "6 active adapters with dropout on a layer"
    model = with_many(6).double()
    with applied(model, torch.float64) as found:
        for block, call in found.pairs():
            assert_block_equals_layer(block, call, FLOAT32_NORMS)


def test_as_many_adapters_as_can_drop_apart_drop_something_else_each() -> None:
    block = block_of(decoder_of(causal_model(with_many(5, lora_dropout=0.5))).layers[0], torch.float32)
    assert isinstance(block, Block)
    seed, ones = seed_drawn(), torch.ones(2, 20)
    seen = {
        Drop(seed, stream).rows(ones, number, 0.5).numpy().tobytes()
        for stream, projection in enumerate(block.projections)
        for number in range(len(projection.members))
    }
    assert len(seen) == 5 * 7


def test_what_is_kept_of_a_token_counts_what_dropping_keeps() -> None:
    """Products that neither the output nor the gates hold, those of the gates only where the gates are kept, too."""
    kept = {}
    for name, settings in {"calm": {}, "dropping": DROP}.items():
        block = block_of(decoder_of(causal_model(with_dora("qwen3", **settings))).layers[0], torch.float32)
        assert isinstance(block, Block)
        kept[name] = [block.bytes_per_token(keeps_gates=keeps)[0] for keeps in (True, False)]
        gates = 4 * block.gate_up.out_features
    assert kept["dropping"][0] - kept["calm"][0] == gates
    assert kept["calm"][0] - kept["calm"][1] == gates
    assert kept["dropping"][1] == kept["calm"][1] - 4 * block.gate_up.rank
