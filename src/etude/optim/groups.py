"""Which parameters are trained, in which group, in which order, under which name.

Optimizer state is saved by parameter *name*: the position of a parameter changes with a version of peft or a module added
to the model, its name does not. torch keeps the names of a group under `param_names`.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

# Biases and the scales of normalisation layers are not pulled towards zero. The patterns are those of transformers:
# `input_layernorm`, `q_norm`, `model.norm` match, `normalizer` does not.
_NO_DECAY = re.compile(r"bias|layernorm|rmsnorm|(?:^|\.)norm(?:$|\.)|_norm(?:$|\.)")


def decay_parameter_names(model: nn.Module) -> list[str]:
    """Names of the parameters that weight decay applies to, trainable or not, in the order of the model.

    Left out: names that look like a bias or a normalisation layer, and everything inside an `nn.LayerNorm`.
    """
    layer_norms = tuple(
        f"{name}."
        for name, module in model.named_modules(remove_duplicate=False)
        if name and isinstance(module, nn.LayerNorm)
    )
    return [
        name
        for name, _ in model.named_parameters(remove_duplicate=False)
        if not _NO_DECAY.search(name.lower()) and not name.startswith(layer_norms)
    ]


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_names: list[str] | None = None
) -> list[dict[str, Any]]:
    """The trainable parameters in two groups: with weight decay, then without. Either may be empty.

    Both groups always exist, so that optimizer states of transformers, which has the same two, fit. Each has `params`,
    `param_names` (same order: the model's) and `weight_decay`.

    Args:
        decay_names: names that decay; by default those of `decay_parameter_names`.
    """
    decaying = set(decay_parameter_names(model) if decay_names is None else decay_names)
    trainable = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]

    def group(members: list[tuple[str, nn.Parameter]], decay: float) -> dict[str, Any]:
        return {
            "params": [parameter for _, parameter in members],
            "param_names": [name for name, _ in members],
            "weight_decay": decay,
        }

    return [
        group([member for member in trainable if member[0] in decaying], weight_decay),
        group([member for member in trainable if member[0] not in decaying], 0.0),
    ]
