"""Which decoder layers can be computed as a `Block`: found by looking at their parts, not at their class."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from etude.kernels.block import Block, Call, Norm
from etude.kernels.fp8 import FP8, Fp8Projection, layer_obstacle
from etude.kernels.lora import lean_forward
from etude.kernels.magnitude import Fp8RowProjection, QuantizedRowProjection, RowProjection, drops_base
from etude.kernels.norm import LastNorm
from etude.kernels.projection import STREAMS, Adapter, Projection
from etude.kernels.quantized import (
    QuantizedProjection,
    Workspace,
    is_quantized_lora,
    quantized_kind,
    quantized_obstacle,
)
from etude.kernels.reference import GELU_TANH, SILU

TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-6, torch.bfloat16: 3e-2, torch.float16: 4e-3}
"""Largest difference between a block and the model's own layer, of output and gradients, relative to their norm;
of float64, too, as the models' norms compute in float32 at most."""


def tolerance_of(block: Block, dtype: torch.dtype) -> float:
    """Largest admitted difference of `compare`: rounding in `dtype`, or what the products are known to differ by."""
    return max(TOLERANCES[dtype], *(projection.rounding for projection in block.projections))


def block_of(
    layer: nn.Module, dtype: torch.dtype, *, base_precision: str | None = None, workspace: Workspace | None = None
) -> Block | str:
    """The layer as a block that computes in `dtype`; otherwise, why not. Changes nothing.

    `base_precision` "fp8" has the frozen products computed in that; `workspace` is where the weights of a quantised base
    are made, one for all layers of a model.
    """
    found: Any = layer
    try:
        attention, gated = found.self_attn, found.mlp
        linears = {
            "q": attention.q_proj, "k": attention.k_proj, "v": attention.v_proj, "o": attention.o_proj,
            "gate": gated.gate_proj, "up": gated.up_proj, "down": gated.down_proj,
        }  # fmt: skip
        head_dim, activation = int(attention.head_dim), activation_of(gated.act_fn)
        norms = [_norm(found.input_layernorm), _norm(found.post_attention_layernorm)]
        is_sandwich = hasattr(found, "pre_feedforward_layernorm")
        if is_sandwich:
            norms += [_norm(found.pre_feedforward_layernorm), _norm(found.post_feedforward_layernorm)]
        head_norms = [
            _norm(norm) if (norm := getattr(attention, name, None)) is not None else None
            for name in ("q_norm", "k_norm")
        ]
    except AttributeError as error:
        if hasattr(getattr(layer, "mlp", None), "experts"):
            return "its gated layer is a mixture of experts"
        return f"its parts are other ones ({error})"
    if activation is None:
        return "an activation other than SiLU and GELU (tanh)"
    if any(norm is None for norm in norms) or (getattr(attention, "q_norm", None) is not None and None in head_norms):
        return "norms other than frozen RMS norms"
    if any(norm is not None and norm.weight.shape != (head_dim,) for norm in head_norms):
        return "norms over all heads"
    if (reason := _changes(found)) is not None:
        return reason
    parts: dict[str, Any] = {name: lora_parts(linear) for name, linear in linears.items()}
    for name, part in parts.items():
        if isinstance(part, str):
            return f"{part} ({name}_proj)"
    if (reason := _weight_obstacle([part[0] for part in parts.values()], dtype, base_precision)) is not None:
        return reason
    if (reason := _adapter_obstacle([part[1] for part in parts.values()])) is not None:
        return reason
    if base_precision == FP8 and any(drops_base(adapter) for _, adapters in parts.values() for adapter in adapters):
        return "DoRA with dropout on a base in fp8"
    workspace = Workspace() if workspace is None else workspace

    def project(*names: str, extends_input: bool = False, defers_update: bool = False) -> Projection:
        pairs = [(parts[name][0], adapter) for name in names for adapter in parts[name][1] or [None]]
        linears, adapters = [linear for linear, _ in pairs], [adapter for _, adapter in pairs]
        trains_rows = any(_trains_rows(adapter) for adapter in adapters if adapter is not None)
        if base_precision == FP8:
            kind = Fp8RowProjection if trains_rows else Fp8Projection
            return kind(linears, adapters, dtype, defers_update=defers_update)
        if any(quantized_kind(linear) for linear in linears):
            quantized = QuantizedRowProjection if trains_rows else QuantizedProjection
            return quantized(linears, adapters, dtype, workspace, defers_update=defers_update)
        if trains_rows:
            return RowProjection(linears, adapters, dtype, defers_update=defers_update)
        return Projection(linears, adapters, dtype, extends_input=extends_input, defers_update=defers_update)

    block = Block(
        layer=layer,
        attention=attention,
        input_norm=norms[0],  # type: ignore[arg-type]
        qkv=project("q", "k", "v", extends_input=True),
        output=project("o"),
        num_heads=parts["q"][0].out_features // head_dim,
        num_kv_heads=parts["k"][0].out_features // head_dim,
        head_dim=head_dim,
        gated_norm=norms[2] if is_sandwich else norms[1],  # type: ignore[arg-type]
        gate_up=project("gate", "up", defers_update=True),
        down=project("down", extends_input=True),
        activation=activation,
        query_norm=head_norms[0],
        key_norm=head_norms[1],
        attention_norm=norms[1] if is_sandwich else None,
        down_norm=norms[3] if is_sandwich else None,
    )
    known = {id(parameter) for projection in block.projections for parameter in projection.parameters}
    for name, parameter in layer.named_parameters():
        if parameter.requires_grad and id(parameter) not in known:
            return f"a trainable weight ({name})"
    return block


def last_norm_of(layer: Any) -> LastNorm | None:
    """The norm behind the layers as one that our kernels compute; None where it is something else or was changed."""
    if not isinstance(layer, nn.Module) or _changes(layer) is not None:
        return None
    norm = _norm(layer)
    return None if norm is None else LastNorm(layer, norm)


def _changes(layer: nn.Module) -> str | None:
    """What a layer does besides what its parts say, or was told to do by others, and a block would leave out."""
    for module in layer.modules():
        name, own = type(module).__name__, (type(module).forward, lean_forward)
        if "forward" in vars(module) and getattr(module.forward, "__func__", None) not in own:
            return f"the forward of its {name} was replaced"
        if module is not layer and (module._backward_hooks or module._backward_pre_hooks):
            return f"hooks on its {name}"
        for field, value in vars(module).items():
            if field.endswith("dropout") and isinstance(value, float) and value > 0.0:  # run again, it would be another
                return f"dropout ({field})"
    return None


def lora_parts(module: Any) -> tuple[nn.Linear, list[Adapter]] | str:
    """The linear layer and the adapters of a module that is one; otherwise, why it cannot be part of a projection."""
    from peft.tuners.lora import Linear

    if type(module) is nn.Linear or quantized_kind(module) is not None:
        return (module, []) if not any(p.requires_grad for p in module.parameters()) else "a trainable weight"
    if type(module) is not Linear and not is_quantized_lora(module):
        return f"{type(module).__name__} layers"
    if module.merged:
        return "the adapter is merged"
    if module.fan_in_fan_out:
        return "transposed weights"
    base = module.base_layer
    if type(base) is not nn.Linear and quantized_kind(base) is None:
        return f"{type(base).__name__} layers"
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return "a trainable weight"
    if module.disable_adapters:
        return "adapters are disabled"
    adapters = [adapter_of(module, name) for name in module.active_adapters if name in module.lora_A]
    reasons = [adapter for adapter in adapters if isinstance(adapter, str)]
    if reasons:
        return reasons[0]
    if len(adapters) > 1 and any(drops_base(adapter) for adapter in adapters):  # type: ignore[arg-type]
        return "DoRA with dropout beside another active adapter"
    return base, adapters  # type: ignore[return-value]


def adapter_of(module: Any, name: str) -> Adapter | str:
    """An adapter of a LoRA layer; otherwise, why it cannot be part of a projection."""
    from peft.tuners.lora.variants import DoraLinearVariant

    dropout, magnitude = module.lora_dropout[name], None
    if not isinstance(dropout, (nn.Dropout, nn.Identity)):
        return f"{type(dropout).__name__} before LoRA"
    if name in module.lora_variant:
        if type(module.lora_variant[name]) is not DoraLinearVariant:
            return "a variant of LoRA with a forward of its own (aLoRA)"
        magnitude = module.lora_magnitude_vector[name].weight
    A, B = module.lora_A[name], module.lora_B[name]
    return Adapter(A.weight, B.weight, module.scaling[name], dropout, B.bias, magnitude)


def _trains_rows(adapter: Adapter) -> bool:
    return adapter.magnitude is not None or adapter.bias is not None


def _adapter_obstacle(adapters: list[list[Adapter]]) -> str | None:
    """Why a layer of a model cannot have so many adapters; None where it can."""
    most = max(len(of_layer) for of_layer in adapters)
    drops = any(getattr(adapter.dropout, "p", 0.0) > 0.0 for of_layer in adapters for adapter in of_layer)
    # q, k and v are one projection, each of whose adapters drops something else.
    return f"{most} active adapters with dropout on a layer" if drops and 3 * most > STREAMS else None


def _weight_obstacle(linears: list[nn.Linear], dtype: torch.dtype, base_precision: str | None) -> str | None:
    """Why the weights of these layers cannot be multiplied in `dtype`; None where they can."""
    if base_precision == FP8:
        if any(quantized_kind(linear) for linear in linears):
            return "its base is quantised already"
        if (reason := layer_obstacle(linears, dtype)) is not None:
            return reason
    for linear in linears:
        if quantized_kind(linear) is None:
            if linear.weight.dtype != dtype:
                return f"weights in another type than {str(dtype).removeprefix('torch.')}, in which it computes"
        elif (reason := quantized_obstacle(linear, dtype)) is not None:
            return reason
    return None


def _norm(module: Any) -> Norm | None:
    """What an RMS norm computes, found by asking it; None where it is something else or is trained."""
    weight = getattr(module, "weight", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is None or eps is None or weight.dim() != 1 or weight.requires_grad or len(list(module.parameters())) > 1:
        return None
    probe = torch.linspace(-2, 3, weight.numel(), device=weight.device, dtype=weight.dtype)[None]
    with torch.no_grad():
        answer = type(module).forward(module, probe).double()  # without the hooks of others
        wide = probe.double()
        normed = wide * torch.rsqrt(wide.square().mean() + eps)
        # The nearer of the two: next to weights in the hundreds (Gemma 3) an offset of one passes for rounding.
        offset = min((0.0, 1.0), key=lambda offset: float((answer - normed * (offset + weight.double())).norm()))
        expected = normed * (offset + weight.double())
        if float((answer - expected).norm()) <= _rounding(weight.dtype) * float(expected.norm()):
            return Norm(weight.detach(), offset, float(eps))
    return None


def activation_of(function: Any) -> str | None:
    x = torch.linspace(-6, 6, 101)
    with torch.no_grad():
        answer = function(x)
    for name, expected in ((SILU, functional.silu(x)), (GELU_TANH, functional.gelu(x, approximate="tanh"))):
        if torch.allclose(answer, expected, atol=1e-5):
            return name
    return None


def _rounding(dtype: torch.dtype) -> float:
    return max(1e-5, 2 * torch.finfo(dtype).eps)


def compare(block: Block, call: Call) -> float:
    """The largest relative difference of output, gradient of h and gradients of the adapters between a block and the
    layer's own forward on the same input.

    The adapters' gradients are compared all together: some of them are zero in an adapter that has not been trained.
    """
    layer: Any = block.layer
    parameters = [p for projection in block.projections for p in projection.parameters if p.requires_grad]
    block = replace(block, recomputes=False)  # a layer that is run again adds its gradients to `p.grad`
    direction = (
        torch.linspace(-1, 1, call.hidden.numel(), device=call.hidden.device).view_as(call.hidden).to(call.hidden.dtype)
    )
    options = {"attention_mask": None, "position_embeddings": call.position_embeddings, **call.options}
    results = []
    for run in (
        lambda h: type(layer).forward(layer, h[None], **options)[0],
        lambda h: block.run(h, call.position_embeddings, **call.options),
    ):
        with torch.enable_grad():
            h = call.hidden.clone().requires_grad_()
            output = run(h)
            gradients = torch.autograd.grad(output, [h, *parameters], direction, allow_unused=True)
        adapters = [gradient.flatten() for gradient in gradients[1:] if gradient is not None]
        results.append((output.detach(), gradients[0], torch.cat(adapters) if adapters else output.new_zeros(1)))
    theirs, ours = results
    return largest(distance_of(*pair) for pair in zip(ours, theirs, strict=True))


def largest(differences: Iterable[float]) -> float:
    """NaN where one of them is none: `max` may pass over it."""
    return float(torch.tensor(list(differences), dtype=torch.float64).max())


def distance_of(ours: Tensor, theirs: Tensor) -> float:
    difference = (ours.double() - theirs.double()).norm()
    return float(difference / theirs.double().norm().clamp_min(1e-30))
