"""What a model must be able to do to be packed, read off its class, config, adapters and hooks without running it.

Necessary, not sufficient: what the model really computes is for the probe to find out (`paths.py`).
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from etude.model.packing import pack

REQUIRED_INPUTS, OPTIONAL_INPUTS = frozenset({"input_ids", "attention_mask", "labels"}), frozenset({"position_ids"})


def causal_model(model: Any) -> Any:
    """The language model inside the adapter wrapper, or `model` itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decoder_of(causal: Any) -> Any:
    """The language model without its head."""
    return getattr(causal, causal.base_model_prefix)


def missing_capabilities(model: nn.Module, inputs: dict[str, Any]) -> tuple[str, ...]:
    """Every reason, known without running the model, why it cannot be packed."""
    causal = causal_model(model)
    name = type(causal).__name__
    if not isinstance(causal, PreTrainedModel) or not _is_causal_lm_class(type(causal)):
        return (f"{name} is not a decoder language model of transformers",)
    if not isinstance(getattr(causal, causal.base_model_prefix, None), PreTrainedModel):
        return (f"{name} keeps its decoder and its head together",)
    return (
        *_class_reasons(causal, name),
        *_config_reasons(decoder_of(causal).config, causal.device),
        *_adapter_reasons(model),
        *_hook_reasons(model),
        *_input_reasons(inputs),
    )


def _is_causal_lm_class(model_class: type) -> bool:
    known: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        known.update((names,) if isinstance(names, str) else names)
    return any(ancestor.__name__ in known for ancestor in model_class.__mro__)


def _class_reasons(causal: PreTrainedModel, name: str) -> Iterator[str]:
    if "position_ids" not in inspect.signature(decoder_of(causal).forward).parameters:
        yield f"{name} takes no position_ids"
    parameters = inspect.signature(causal.forward).parameters.values()
    takes_keywords = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    if not takes_keywords or not getattr(causal, "_supports_attention_backend", False):
        yield f"{name} does not use the attention interface"
    for part in (causal, decoder_of(causal)):
        if "forward" in vars(part) and not hasattr(part, "_hf_hook"):  # accelerate's placement of layers is welcome
            yield f"the forward of this {type(part).__name__} object was replaced"


def _config_reasons(config: Any, device: torch.device) -> Iterator[str]:
    foreign = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if foreign:
        yield f"layers of the kind {', '.join(sorted(foreign))} may carry state from token to token"
    if getattr(config, "attention_chunk_size", None):
        yield "attention in chunks counts from the start of a row"
    if getattr(config, "is_encoder_decoder", False):
        yield "it has an encoder"
    if getattr(config, "output_router_logits", False):
        yield "the router's auxiliary loss depends on how a batch is cut (output_router_logits=True)"
    dropout = max(float(getattr(config, name, 0.0) or 0.0) for name in ("attention_dropout", "attn_pdrop"))
    if dropout > 0.0 and device.type == "cuda":
        yield f"packed attention on a GPU has no dropout (attention_dropout={dropout})"


def _adapter_reasons(model: nn.Module) -> Iterator[str]:
    for name, adapter in getattr(model, "peft_config", {}).items():
        if getattr(adapter, "is_prompt_learning", False) or getattr(adapter, "is_adaption_prompt", False):
            yield f"adapter {name!r} ({adapter.peft_type.value}) adds tokens of its own to every row"
        if getattr(adapter, "alora_invocation_tokens", None):
            yield f"adapter {name!r} is switched on inside each row by its invocation tokens"


def _hook_reasons(model: nn.Module) -> Iterator[str]:
    for path, module in model.named_modules():
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not _is_harmless(hook):
                yield f"a forward hook on {path or type(module).__name__} expects padded batches"
                return


def _is_harmless(hook: Any) -> bool:
    """Hooks known to work on any shape: gradients for checkpointing, recorders that are asleep, sharding."""
    owner = str(getattr(hook, "__module__", ""))
    name = str(getattr(hook, "__name__", ""))
    return name.startswith(("make_inputs_require_grad", "output_capturing_hook")) or (
        name in ("_pre_forward", "_post_forward") and owner.startswith("torch.distributed")
    )


def _input_reasons(inputs: dict[str, Any]) -> Iterator[str]:
    if problem := field_problem(inputs):
        yield problem
        return
    if any(not isinstance(value, Tensor) or value.ndim != 2 for value in inputs.values()):
        yield "the collator returns fields that are not rows of tokens (a mask of its own, for example)"
        return
    if len({value.shape for value in inputs.values()}) > 1:
        yield "the collator returns fields of different shapes"
    elif pack(inputs) is None:
        yield "left-padded rows whose first token is labelled: transformers predicts it from the padding before it"


def field_problem(inputs: dict[str, Any]) -> str | None:
    missing = REQUIRED_INPUTS - inputs.keys()
    if missing:
        return f"the collator returns no {', '.join(sorted(missing))}"
    foreign = inputs.keys() - REQUIRED_INPUTS - OPTIONAL_INPUTS
    return f"the collator also returns {', '.join(sorted(foreign))}" if foreign else None


class Head(NamedTuple):
    """A linear head and what the model does to its logits."""

    weight: Tensor
    """(V, D)"""
    bias: Tensor | None
    softcap: float | None
    scale: float


def read_head(causal: Any) -> Head:
    """The head as the config describes it; whether that is the truth is for the probe to say."""
    linear = causal.get_output_embeddings()
    config = decoder_of(causal).config
    divisor = getattr(config, "logits_scaling", None) or 1.0
    scale = (getattr(config, "logit_scale", None) or 1.0) / divisor
    return Head(linear.weight, linear.bias, getattr(config, "final_logit_softcapping", None), scale)


def head_obstacle(model: nn.Module) -> str | None:
    """Why the chunked head cannot even be tried: it is for a plain, frozen, unsharded linear layer."""
    causal = causal_model(model)
    linear = causal.get_output_embeddings()
    if type(linear) is not nn.Linear or type(linear.weight) is not nn.Parameter:
        return f"the head is a {type(linear).__name__}"
    if any(parameter.requires_grad for parameter in linear.parameters()):
        return "the head is trainable"
    if any(module._forward_pre_hooks for module in (model, causal, linear)):
        return "hooks gather the head's weights"
    return None
