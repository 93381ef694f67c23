"""One table: the name of an optimizer -> how it is built, or why it is not.

Every name that transformers knows is here. What torch, transformers and bitsandbytes provide is built; for the rest the
error says how to pass an optimizer of one's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from etude.errors import ConfigError, ModelError, nearest, require
from etude.optim.groups import parameter_groups

Built = tuple[Any, dict[str, Any]]


class OptimizerArguments(Protocol):
    """The part of `TrainingArguments` that is read here."""

    optim: Any
    optim_args: str | None
    learning_rate: float
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "1", "yes", "false", "0", "no"):
        raise ValueError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


@dataclass(frozen=True)
class Recipe:
    """How one optimizer is made: a builder, and the options it reads from `optim_args` with their types."""

    build: Callable[[OptimizerArguments, dict[str, Any]], Built]
    options: Mapping[str, Callable[[str], Any]]


@dataclass(frozen=True)
class NotBuilt:
    """An optimizer of a package that etude does not build; the user can, after `pip install <package>`."""

    package: str


def _adam(args: OptimizerArguments) -> dict[str, Any]:
    return {"lr": args.learning_rate, "betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}


def _adamw(args: OptimizerArguments, options: dict[str, Any]) -> Built:
    return torch.optim.AdamW, _adam(args)


def _adamw_fused(args: OptimizerArguments, options: dict[str, Any]) -> Built:
    return torch.optim.AdamW, {**_adam(args), "fused": True}


def _of_torch(optimizer_class: type[torch.optim.Optimizer]) -> Callable[[OptimizerArguments, dict[str, Any]], Built]:
    """A builder for an optimizer of torch that needs nothing but a learning rate and the user's options."""

    def build(args: OptimizerArguments, options: dict[str, Any]) -> Built:
        return optimizer_class, {"lr": args.learning_rate, **options}

    return build


def _adafactor(args: OptimizerArguments, options: dict[str, Any]) -> Built:
    from transformers.optimization import Adafactor

    # With these two off, Adafactor follows the learning rate it is given instead of one of its own.
    return Adafactor, {"lr": args.learning_rate, "scale_parameter": False, "relative_step": False}


def _of_bitsandbytes(class_name: str, *, bits: int, paged: bool = False) -> Recipe:
    """A recipe for an optimizer whose state is kept in `bits` bits, `paged` to host memory where the device is full."""

    def build(args: OptimizerArguments, options: dict[str, Any]) -> Built:
        bitsandbytes = cast(Any, require("bitsandbytes.optim", purpose=f"the optimizer {class_name} with {bits} bits"))
        settings: dict[str, Any] = {**_adam(args), "optim_bits": bits, "is_paged": paged}
        if class_name == "Lion":
            del settings["eps"]
        elif class_name == "RMSprop":
            settings = {"lr": args.learning_rate, **options, "optim_bits": bits}
        elif class_name == "AdEMAMix":
            betas = (options.pop("beta1", args.adam_beta1), options.pop("beta2", args.adam_beta2))
            settings["betas"] = (*betas, options.pop("beta3", 0.9999))
            settings.update({"alpha": 5.0, **options})
        return getattr(bitsandbytes, class_name), settings

    return Recipe(build, _BITSANDBYTES_OPTIONS.get(class_name, {}))


_RMSPROP_OPTIONS: Mapping[str, Callable[[str], Any]] = {"momentum": float, "alpha": float, "eps": float}
_BITSANDBYTES_OPTIONS: Mapping[str, Mapping[str, Callable[[str], Any]]] = {
    "RMSprop": _RMSPROP_OPTIONS,
    "AdEMAMix": {
        **dict.fromkeys(("beta1", "beta2", "beta3", "alpha", "eps"), float),
        **dict.fromkeys(("t_alpha", "t_beta3"), int),
    },
}

OPTIMIZERS: Mapping[str, Recipe | NotBuilt] = {
    "adamw_torch": Recipe(_adamw, {}),
    "adamw_torch_fused": Recipe(_adamw_fused, {}),
    "sgd": Recipe(_of_torch(torch.optim.SGD), {"momentum": float, "dampening": float, "nesterov": _boolean}),
    "adagrad": Recipe(_of_torch(torch.optim.Adagrad), {"lr_decay": float, "eps": float}),
    "rmsprop": Recipe(_of_torch(torch.optim.RMSprop), {**_RMSPROP_OPTIONS, "centered": _boolean}),
    "adafactor": Recipe(_adafactor, {}),
    "adamw_bnb_8bit": _of_bitsandbytes("AdamW", bits=8),
    "adamw_8bit": _of_bitsandbytes("AdamW", bits=8),
    "paged_adamw_32bit": _of_bitsandbytes("AdamW", bits=32, paged=True),
    "paged_adamw_8bit": _of_bitsandbytes("AdamW", bits=8, paged=True),
    "ademamix": _of_bitsandbytes("AdEMAMix", bits=32),
    "ademamix_8bit": _of_bitsandbytes("AdEMAMix", bits=8),
    "paged_ademamix_32bit": _of_bitsandbytes("AdEMAMix", bits=32, paged=True),
    "paged_ademamix_8bit": _of_bitsandbytes("AdEMAMix", bits=8, paged=True),
    "lion_32bit": _of_bitsandbytes("Lion", bits=32),
    "lion_8bit": _of_bitsandbytes("Lion", bits=8),
    "paged_lion_32bit": _of_bitsandbytes("Lion", bits=32, paged=True),
    "paged_lion_8bit": _of_bitsandbytes("Lion", bits=8, paged=True),
    "rmsprop_bnb": _of_bitsandbytes("RMSprop", bits=32),
    "rmsprop_bnb_8bit": _of_bitsandbytes("RMSprop", bits=8),
    "rmsprop_bnb_32bit": _of_bitsandbytes("RMSprop", bits=32),
    "adamw_torch_xla": NotBuilt("torch_xla"),
    "adamw_torch_npu_fused": NotBuilt("torch_npu"),
    "adamw_anyprecision": NotBuilt("torchdistx"),
    **dict.fromkeys(("adamw_torch_4bit", "adamw_torch_8bit"), NotBuilt("torchao")),
    **dict.fromkeys(("galore_adamw", "galore_adamw_8bit", "galore_adafactor"), NotBuilt("galore_torch")),
    **dict.fromkeys(
        ("galore_adamw_layerwise", "galore_adamw_8bit_layerwise", "galore_adafactor_layerwise"),
        NotBuilt("galore_torch"),
    ),
    **dict.fromkeys(("apollo_adamw", "apollo_adamw_layerwise"), NotBuilt("apollo-torch")),
    **dict.fromkeys(("lomo", "adalomo"), NotBuilt("lomo-optim")),
    "grokadamw": NotBuilt("grokadamw"),
    **dict.fromkeys(("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), NotBuilt("schedulefree")),
    "stable_adamw": NotBuilt("torch-optimi"),
}
OPTIMIZER_NAMES: tuple[str, ...] = tuple(OPTIMIZERS)


def optimizer_class_and_kwargs(args: OptimizerArguments) -> Built:
    """The class that `args.optim` names and its keyword arguments.

    Raises:
        ConfigError: unknown name, one that etude does not build, or an option in `optim_args` that it does not have.
        MissingDependencyError: its package is not installed.
    """
    name = str(getattr(args.optim, "value", args.optim))
    recipe = OPTIMIZERS.get(name)
    if recipe is None:
        near = nearest(name, OPTIMIZER_NAMES)
        hint = f"did you mean '{near}'?" if near else f"known: {', '.join(OPTIMIZER_NAMES)}"
        raise ConfigError(f"unknown optimizer '{name}'; {hint}", field="optim")
    if isinstance(recipe, NotBuilt):
        raise ConfigError(
            f"etude does not build '{name}'; pip install {recipe.package}, construct the optimizer and pass "
            "Trainer(optimizers=(optimizer, None)) or optimizer_cls_and_kwargs=(cls, kwargs)",
            field="optim",
        )
    return recipe.build(args, _parse_options(name, args.optim_args, recipe.options))


def create_optimizer(
    model: nn.Module,
    args: OptimizerArguments,
    cls_and_kwargs: Built | None = None,
    decay_names: list[str] | None = None,
) -> torch.optim.Optimizer:
    """An optimizer over the trainable parameters of `model`, grouped as in `parameter_groups`.

    Args:
        cls_and_kwargs: instead of what `args.optim` names. `params` among the keyword arguments replaces our groups. A
            first element that is no optimizer class is a factory of the kind Muon and Dion come with: it is called
            without arguments, and its result with the model and the keyword arguments.
        decay_names: names of parameters that decay, where the caller decides them.

    Raises:
        ModelError: nothing in the model is trainable.
        ConfigError, MissingDependencyError: as `optimizer_class_and_kwargs`.
    """
    optimizer_class, given = cls_and_kwargs or optimizer_class_and_kwargs(args)
    settings = dict(given)
    if not (isinstance(optimizer_class, type) and issubclass(optimizer_class, torch.optim.Optimizer)):
        return cast(torch.optim.Optimizer, optimizer_class()(model, **settings))
    groups = settings.pop("params", None) or parameter_groups(model, args.weight_decay, decay_names)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trainable:
        raise ModelError("no parameter of the model is trainable; add an adapter with get_peft_model(model, config)")
    if cls_and_kwargs is None and settings.get("fused") and not _can_fuse(trainable):
        del settings["fused"]
    optimizer: torch.optim.Optimizer = optimizer_class(groups, **settings)
    if settings.get("optim_bits") == 8:
        _keep_embeddings_in_32_bits(model)
    return optimizer


def _parse_options(name: str, text: str | None, known: Mapping[str, Callable[[str], Any]]) -> dict[str, Any]:
    """`"momentum=0.9, nesterov=true"` -> `{"momentum": 0.9, "nesterov": True}`, with the types of `known`."""
    options: dict[str, Any] = {}
    for part in (text or "").replace(" ", "").split(","):
        if not part:
            continue
        key, equals, value = part.partition("=")
        if not equals:
            raise ConfigError(f"'{part}' is not of the form name=value", field="optim_args")
        if key not in known:
            near = nearest(key, tuple(known))
            hint = f"did you mean '{near}'?" if near else f"it takes {', '.join(known) or 'none'}"
            raise ConfigError(f"'{name}' has no option '{key}'; {hint}", field="optim_args")
        try:
            options[key] = known[key](value)
        except ValueError as error:
            raise ConfigError(f"{key}: {error}", field="optim_args") from error
    return options


def _can_fuse(parameters: Sequence[Tensor]) -> bool:
    """Whether torch has one fused kernel for all of them (cpu, cuda, mps, xpu, hpu; real floating point)."""
    devices = ("cpu", "cuda", "mps", "xpu", "hpu")
    return all(parameter.is_floating_point() and parameter.device.type in devices for parameter in parameters)


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    """Rows of an embedding are updated rarely and unevenly: 8-bit state is unstable there, bitsandbytes advises 32."""
    bitsandbytes = cast(Any, require("bitsandbytes", purpose="an 8-bit optimizer"))
    manager = bitsandbytes.optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
