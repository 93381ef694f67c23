"""LoRA dropout inside a block: the gradient is that of what was computed, and what is dropped depends on the seed alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from etude.kernels import reference
from etude.kernels.attention import Segments
from etude.kernels.block import Block
from etude.kernels.layers import block_of
from etude.kernels.projection import refresh
from etude.model.packing import AttentionSwitch
from etude.model.paths import PackedPath, choose_path
from tiny import Padded, language_rows, tiny_gemma3, tiny_llama, tiny_qwen3, with_lora

MODELS = {"llama": tiny_llama, "qwen3": tiny_qwen3, "gemma3": tiny_gemma3}
LENGTHS = (7, 10, 6)


class Layer:
    """The last layer of a model with LoRA dropout, as a function of h and its adapters that draws the same each time."""

    def __init__(self, name: str, **lora: object) -> None:
        lora = {"lora_dropout": 0.4, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | lora
        self.model = with_lora(MODELS[name](), **lora).double().train()
        decoder = self.model.base_model.model.model
        self.switch = AttentionSwitch(self.model)
        block = block_of(decoder.layers[-1], torch.float64)
        assert isinstance(block, Block), block
        self.block = block
        for projection in block.projections:
            projection.install()
        self.parameters = [p for projection in block.projections for p in projection.parameters]
        tokens = sum(LENGTHS)
        self.h = torch.randn(tokens, self.model.config.hidden_size, dtype=torch.float64)
        positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
        kind = ("full_attention",) if name == "gemma3" else ()
        self.embeddings = decoder.rotary_emb(self.h[None], positions, *kind)
        offsets = torch.tensor((0, *LENGTHS)).cumsum(0).int()
        self.segments = Segments(offsets, LENGTHS, 16)

    def __call__(self, h: Tensor, seed: int = 0) -> Tensor:
        for projection in self.block.projections:
            refresh(projection.copies())
        torch.manual_seed(seed)
        with self.switch.packed():
            return self.block.run(h, self.embeddings, segments=self.segments)


@pytest.mark.parametrize("way", ["everything kept", "gates made again", "run again"])
@pytest.mark.parametrize("name", MODELS)
def test_the_gradient_is_that_of_what_was_computed(name: str, way: str) -> None:
    """Against differences along one direction in h and all adapters at once."""
    torch.manual_seed(0)
    layer = Layer(name)
    layer.block.keeps_gates, layer.block.recomputes = way != "gates made again", way == "run again"
    h = layer.h.clone().requires_grad_()
    for parameter in layer.parameters:
        parameter.grad = None
    weights = torch.randn(h.shape, dtype=torch.float64)
    (layer(h) * weights).sum().backward()
    directions = [torch.randn(t.shape, dtype=torch.float64) for t in (h, *layer.parameters)]
    slope = sum(float((t.grad * d).sum()) for t, d in zip((h, *layer.parameters), directions, strict=True))
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for parameter, direction in zip(layer.parameters, directions[1:], strict=True):
                parameter += sign * 1e-6 * direction
            values.append(float((layer(layer.h + sign * 1e-6 * directions[0]) * weights).sum()))
            for parameter, direction in zip(layer.parameters, directions[1:], strict=True):
                parameter -= sign * 1e-6 * direction
    assert (values[0] - values[1]) / 2e-6 == pytest.approx(slope, rel=1e-6)


def test_what_is_dropped_depends_on_the_seed_alone() -> None:
    torch.manual_seed(0)
    layer = Layer("llama")
    first = layer(layer.h, seed=1)
    assert torch.equal(layer(layer.h, seed=1), first)
    assert not torch.equal(layer(layer.h, seed=2), first)
    layer.model.eval()
    calm = layer(layer.h, seed=1)
    assert torch.equal(layer(layer.h, seed=2), calm)


def test_the_mean_over_seeds_is_the_layer_without_dropout() -> None:
    """Of one projection, which is linear in what is dropped."""
    torch.manual_seed(0)
    x = torch.randn(5, 300, dtype=torch.float64)
    outs = []
    for seed in range(400):
        out = torch.empty_like(x)
        reference.drop(x, torch.tensor([seed]), 3, 0.25, out)
        outs.append(out)
    stacked = torch.stack(outs)
    assert float((stacked == 0).double().mean()) == pytest.approx(0.25, abs=0.005)
    kept = stacked[stacked != 0] / x.expand_as(stacked)[stacked != 0]
    assert torch.allclose(kept, torch.full_like(kept, 4 / 3))
    assert float((stacked.mean(dim=0) - x).norm() / x.norm()) < 0.05


def test_a_model_with_dropout_is_computed_by_blocks() -> None:
    model = with_lora(tiny_llama(), task_type="CAUSAL_LM", lora_dropout=0.2)
    batch = Padded()(language_rows(4, seed=3))
    path = choose_path(model, fast_path=True, overridden=(), sample_inputs=batch, training_dtype=None)
    assert isinstance(path, PackedPath) and path.plan.blocks
    path.plan.undo()
