"""Which mixtures of experts can be computed by `mixture`: found by looking at their parts, not at their class.

The experts are one module with stacked weights (transformers 5), plain or inside one or two of peft's `ParamWrapper`,
one for each weight that carries an adapter. The outermost of them gets the forward of this file.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from etude.kernels.experts import factors_of, mixture
from etude.kernels.layers import activation_of, distance_of, largest
from etude.kernels.reference import SILU

WEIGHTS = ("gate_up_proj", "down_proj")
ARGUMENTS = ["hidden_states", "top_k_index", "top_k_weights"]
SIZE_MULTIPLE = 8
"""What the sizes of grouped products on a GPU are multiples of: their rows begin at multiples of 16 bytes."""


def mixture_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward of experts, or of the outermost wrapper around them, with one adapter for each weight.

    Wherever they are used in another way (adapters disabled, merged, several), it is their own forward that runs.
    """
    wrappers, experts = unwrapped(self)
    if use_obstacle(wrappers, experts) is not None:
        own: Tensor = type(self).forward(self, hidden_states, top_k_index, top_k_weights)
        return own
    gate_up, down = experts.gate_up_proj, experts.down_proj
    with torch.autocast(hidden_states.device.type, enabled=False):
        factors: dict[str, Any] = {}
        for wrapper in wrappers:
            name = wrapper.active_adapters[0]
            factors[wrapper.parameter_name] = factors_of(
                wrapper.lora_A[name].weight, wrapper.lora_B[name].weight, wrapper.scaling[name], len(down), down.dtype
            )
        output = mixture(
            hidden_states.to(down.dtype), top_k_weights, top_k_index, gate_up, down, SILU,
            factors.get("gate_up_proj"), factors.get("down_proj"),
        )  # fmt: skip
    return output.to(hidden_states.dtype)


def expert_layers(model: nn.Module) -> list[nn.Module]:
    """Modules of stacked experts, or the outermost wrapper around each."""
    from peft.tuners.lora.layer import ParamWrapper

    inside = {id(module.base_layer) for module in model.modules() if isinstance(module, ParamWrapper)}
    return [
        module
        for module in model.modules()
        if id(module) not in inside and all(_is_stacked(unwrapped(module)[1], name) for name in WEIGHTS)
    ]


def unwrapped(layer: Any) -> tuple[list[Any], Any]:
    """The wrappers of the parameters of a module, from the outside to the inside, and the module."""
    wrappers = []
    while isinstance(getattr(layer, "parameter_name", None), str) and hasattr(layer, "base_layer"):
        wrappers.append(layer)
        layer = layer.base_layer
    return wrappers, layer


def _is_stacked(experts: nn.Module, name: str) -> bool:
    weight = experts._parameters.get(name)
    return weight is not None and weight.dim() == 3


def use_obstacle(wrappers: list[Any], experts: Any) -> str | None:
    """Why experts that can be computed by `mixture` cannot be as they are used at this moment; None where they can."""
    for wrapper in wrappers:
        if len(wrapper.active_adapters) != 1:
            return f"{len(wrapper.active_adapters)} active adapters"
        if wrapper.active_adapters[0] not in wrapper.lora_A:
            return "the active adapter is not on all of its weights"
        if wrapper.merged:
            return "the adapter is merged"
        if wrapper.disable_adapters:
            return "adapters are disabled"
    for module in (*wrappers[1:], *([experts] if wrappers else [])):  # those of the outermost are called as ever
        if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
            return f"hooks on its {type(module).__name__}"
    return None


def mixture_obstacle(layer: nn.Module, dtype: torch.dtype) -> str | None:
    """Why `mixture_forward` cannot stand in for the forward of these experts in `dtype`; None where it can."""
    wrappers, experts = unwrapped(layer)
    reason = next((reason for module in (*wrappers, experts) if (reason := _replaced(module)) is not None), None)
    reason = reason or _layout_obstacle(experts) or use_obstacle(wrappers, experts)
    reason = reason or next((reason for wrapper in wrappers if (reason := _adapter_obstacle(wrapper, experts))), None)
    if reason is not None:
        return reason
    if len({wrapper.parameter_name for wrapper in wrappers}) != len(wrappers):
        return "two adapters on one weight"
    gate_up, down = experts.gate_up_proj, experts.down_proj
    if gate_up.requires_grad or down.requires_grad:
        return "a trainable weight"
    if {gate_up.dtype, down.dtype} != {dtype}:
        return f"weights in another type than {str(dtype).removeprefix('torch.')}, in which it computes"
    if down.device.type != "cuda":
        return None
    if dtype != torch.bfloat16:
        return "grouped products on a GPU are for bfloat16"
    ranks = [wrapper.r[wrapper.active_adapters[0]] for wrapper in wrappers]
    if any(size % SIZE_MULTIPLE for size in (*down.shape[1:], *ranks)):
        return f"sizes or a rank that are no multiples of {SIZE_MULTIPLE}"
    return None


def _replaced(module: nn.Module) -> str | None:
    own = "forward" not in vars(module) or getattr(module.forward, "__func__", None) is mixture_forward
    return None if own else f"the forward of its {type(module).__name__} was replaced"


def _layout_obstacle(experts: Any) -> str | None:
    gate_up, down = experts.gate_up_proj, experts.down_proj
    num_experts, hidden_size, width = down.shape
    if getattr(experts, "is_transposed", False) or gate_up.shape != (num_experts, 2 * width, hidden_size):
        return "stacked weights of another layout"
    if not getattr(experts, "is_concatenated", True) or not getattr(experts, "has_gate", True):
        return "gates of another layout"
    if len(list(experts.parameters())) != len(WEIGHTS) or getattr(experts, "has_post_expert_norm", False):
        return "weights beside those of gates and output"
    if getattr(experts, "_is_expert_parallel", False):
        return "experts spread over processes"
    if list(inspect.signature(type(experts).forward).parameters)[1:] != ARGUMENTS:
        return "a forward with other arguments"
    if getattr(type(experts)._apply_gate, "__name__", "") != "_default_apply_gate":
        return "a gate of its own"
    return None if activation_of(experts.act_fn) == SILU else "an activation other than SiLU"


def _adapter_obstacle(wrapper: Any, experts: Any) -> str | None:
    name = wrapper.active_adapters[0]
    if wrapper.parameter_name not in WEIGHTS:
        return f"an adapter on its {wrapper.parameter_name}"
    if name in wrapper.lora_variant:
        return "a variant of LoRA with a forward of its own"
    if wrapper.lora_B[name].bias is not None:
        return "LoRA with a bias"
    if not isinstance(wrapper.lora_dropout[name], nn.Identity):
        return "dropout before LoRA"
    num_experts, outputs, inputs = getattr(experts, wrapper.parameter_name).shape
    rows = num_experts * wrapper.r[name]
    if wrapper.lora_A[name].weight.shape != (rows, inputs) or wrapper.lora_B[name].weight.shape != (outputs, rows):
        return "factors of another layout"
    return None


def compare_mixture(layer: Any, hidden: Tensor, index: Tensor, weights: Tensor) -> float:
    """The largest relative difference of output, gradients of the hidden states and of the routing weights, and gradients
    of the adapters, between `mixture_forward` and the experts' own forward with the same routing.

    The adapters' gradients are compared all together: some of them are zero in an adapter that has not been trained.
    """
    parameters = [parameter for parameter in layer.parameters() if parameter.requires_grad]
    direction = torch.linspace(-1, 1, hidden.numel(), device=hidden.device).view_as(hidden).to(hidden.dtype)
    results = []
    for forward in (type(layer).forward, mixture_forward):
        with torch.enable_grad():
            inputs = [hidden.clone().requires_grad_(), weights.clone().requires_grad_()]
            output = forward(layer, inputs[0], index, inputs[1])
            gradients = torch.autograd.grad(output, [*inputs, *parameters], direction)
        adapters = [gradient.flatten() for gradient in gradients[2:]]
        results.append([output.detach(), *gradients[:2], torch.cat(adapters) if adapters else output.new_zeros(1)])
    theirs, ours = results
    return largest(distance_of(*pair) for pair in zip(ours, theirs, strict=True))
