"""What an RMS norm of a layer computes is found by asking it, next to weights of any size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from etude.kernels.block import Block
from etude.kernels.layers import block_of
from etude.model.capabilities import causal_model, decoder_of
from tiny import tiny_gemma3, tiny_llama, with_lora


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("size", [0.0, 1.0, 60.0, 320.0])
@pytest.mark.parametrize(("build", "offset"), [(tiny_llama, 0.0), (tiny_gemma3, 1.0)])
def test_the_offset_is_found(
    build: Callable[[], PreTrainedModel], offset: float, size: float, dtype: torch.dtype
) -> None:
    layer: Any = decoder_of(causal_model(with_lora(build(), task_type="CAUSAL_LM").to(dtype))).layers[0]
    with torch.no_grad():
        layer.input_layernorm.weight.copy_(size + torch.linspace(0.5, 1.5, layer.input_layernorm.weight.numel()))
    block = block_of(layer, dtype)
    assert isinstance(block, Block) and block.input_norm.offset == offset
