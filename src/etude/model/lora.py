"""A LoRA adapter on a base model: which modules carry it, and what can be wrong with the choice."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from etude.errors import ConfigError, ModelError, nearest

# Never adapted by "all-linear": what decides which expert sees a token, and encoders of other modalities.
_NOT_ADAPTED = re.compile(r"(^|\.)(router|gate|shared_expert_gate|vision_tower|vision_model|visual|audio_tower)(\.|$)")

# In a mixture of experts peft takes these names for experts that older versions kept as separate layers, and never for
# the dense or shared layers that still have them. Those are reached through their weight.
_FORMER_EXPERT_NAMES = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def attach_lora(
    model: Any, r: int, alpha: float, dropout: float, targets: str | Iterable[str] = "all-linear", **lora: Any
) -> Any:
    """Freeze `model` and add a LoRA adapter: W x + (alpha / r) B A x, with A: (r, in), B: (out, r), B = 0 at the start.

    Args:
        model: a decoder language model.
        r: rank, in [1, ...).
        alpha: scale of the update; it is multiplied by alpha / r.
        dropout: share of the adapter's inputs that is dropped, in [0, 1).
        targets: "all-linear" (every linear layer but the head, routers and towers of other modalities; experts too,
            also where a block keeps them fused in one parameter), or names of modules (`q_proj`, `mlp.down_proj`).
        lora: further fields of `peft.LoraConfig` (`use_dora`, `use_rslora`, ...).

    Returns:
        The `peft.PeftModel`; its adapter parameters are float32.

    Raises:
        ModelError: a target that the model does not have (the message lists near names) or that LoRA cannot adapt.
        ConfigError: r, alpha or dropout out of range.
    """
    from peft import LoraConfig, get_peft_model

    if r < 1:
        raise ConfigError(f"the rank must be at least 1, got {r}", field="lora.r")
    if alpha <= 0:
        raise ConfigError(f"must be positive, got {alpha}", field="lora.alpha")
    if not 0 <= dropout < 1:
        raise ConfigError(f"must be at least 0 and below 1, got {dropout}", field="lora.dropout")
    chosen = _names(targets)
    selection: dict[str, Any]
    if chosen == ["all-linear"]:
        selection = _all_linear(model, dropout)
    else:
        _require_modules(model, chosen)
        selection = {"target_modules": chosen}
    config = LoraConfig(r=r, lora_alpha=alpha, lora_dropout=dropout, task_type="CAUSAL_LM", **(selection | lora))
    try:
        with warnings.catch_warnings():
            # peft 0.21 asks transformers under an older name; nothing a user could do about it.
            warnings.filterwarnings("ignore", message=".is_gradient_checkpointing.", category=FutureWarning)
            return get_peft_model(model, config)
    except ValueError as error:
        raise ModelError(f"LoRA cannot be attached to {', '.join(chosen)}: {error}") from error


def _names(targets: str | Iterable[str]) -> list[str]:
    listed = targets.split(",") if isinstance(targets, str) else targets
    names = [name.strip() for name in listed]
    if not any(names):
        raise ConfigError("names no module; all-linear adapts every linear layer", field="lora.targets")
    return [name for name in names if name]


def _all_linear(model: nn.Module, dropout: float) -> dict[str, Any]:
    """What "all-linear" means for this model, in the fields of `LoraConfig`."""
    linear = [name for name, module in model.named_modules() if _is_linear(module)]
    excluded = [name for name in linear if _NOT_ADAPTED.search(name)]
    # Fused experts are one parameter of shape (experts, out, in), no linear layer: peft skips them unless named.
    fused = [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and "experts" in name.split(".") and not _NOT_ADAPTED.search(name)
    ]
    if not fused:
        return {"target_modules": "all-linear"} | ({"exclude_modules": excluded} if excluded else {})
    if dropout > 0:
        raise ConfigError(
            f"must be 0 where experts are fused into {_tail(fused[0], 2)}, got {dropout}", field="lora.dropout"
        )
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    adapted = [name for name in linear if name not in excluded and model.get_submodule(name) is not head]
    weights = [f"{name}.weight" for name in adapted if _tail(name, 1) in _FORMER_EXPERT_NAMES]
    return {
        "target_modules": sorted({_tail(name, 1) for name in adapted} - _FORMER_EXPERT_NAMES),
        "target_parameters": sorted({_tail(name, 2) for name in fused} | {_tail(name, 3) for name in weights}),
    }


def _tail(path: str, num_parts: int) -> str:
    return ".".join(path.split(".")[-num_parts:])


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _require_modules(model: nn.Module, names: list[str]) -> None:
    paths = [path for path, _ in model.named_modules() if path]
    for name in names:
        if any(path == name or path.endswith(f".{name}") for path in paths):
            continue
        linear = sorted({path.rsplit(".", 1)[-1] for path, module in model.named_modules() if _is_linear(module)})
        guess = nearest(name, linear)
        hint = f"did you mean '{guess}'? " if guess else ""
        raise ModelError(
            f"lora.targets: the model has no module '{name}'; {hint}Its linear layers are {', '.join(linear)}, "
            "and all-linear takes all but the head."
        )
