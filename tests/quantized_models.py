"""Models whose decoder layers are those of bitsandbytes, built in code: nothing is loaded.

Import it only where bitsandbytes is there.
"""

from __future__ import annotations

from typing import Any

import bitsandbytes
import torch
from torch import nn
from transformers import PreTrainedModel

from tiny import with_lora


def quantised(model: PreTrainedModel, kind: str, device: str = "cpu", *, nested: bool = True) -> PreTrainedModel:
    """`model` on `device`, with every linear layer but the head in "nf4" (`nested`: its scales, too, in 8 bits) or "int8"."""
    dtype = model.dtype
    for path, module in list(model.named_modules()):
        if type(module) is nn.Linear and "lm_head" not in path:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _quantised_linear(module, kind, nested, dtype))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    return model.to(device)  # which quantises


def _quantised_linear(linear: nn.Linear, kind: str, nested: bool, dtype: torch.dtype) -> nn.Module:
    sizes = (linear.in_features, linear.out_features, linear.bias is not None)
    made: Any
    if kind == "nf4":
        made = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", compress_statistics=nested)
        made.weight = bitsandbytes.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=nested
        )
        made.support_avx512bf16_for_cpu = False  # or an evaluation on a CPU changes the format for good
    else:
        made = bitsandbytes.nn.Linear8bitLt(*sizes, has_fp16_weights=False)
        made.weight = bitsandbytes.nn.Int8Params(linear.weight.data, requires_grad=False, has_fp16_weights=False)
    if linear.bias is not None:
        made.bias = nn.Parameter(linear.bias.data, requires_grad=False)
    return made  # type: ignore[no-any-return]


def quantised_lora(
    base: PreTrainedModel, kind: str, device: str = "cpu", *, nested: bool = True, **lora: Any
) -> nn.Module:
    """With a random adapter, in float32, on all linear layers; `lora` are further settings of it."""
    settings = {"task_type": "CAUSAL_LM", "init_lora_weights": False} | lora
    model = with_lora(quantised(base, kind, device, nested=nested), **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model.train()
