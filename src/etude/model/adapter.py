"""Adapters in and out: what is trainable, what it was trained on, and writing and reading it strictly."""

from __future__ import annotations

import copy
import hashlib
import operator
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from safetensors.torch import save_file, save_model
from torch import nn

from etude.errors import CheckpointError, ModelError

EXTRA_WEIGHTS_FILE = "trainable.safetensors"
"""Trainable parameters that are part of no adapter file (a head unfrozen by hand)."""

_cards: WeakKeyDictionary[nn.Module, dict[frozenset[Any], bytes]] = WeakKeyDictionary()
"""Base model -> methods -> the model card that peft wrote last. It brings one that is there up to date ten times faster than
it makes one from its template."""

MAX_OTHER_HEADER_BYTES = 1 << 18
"""For what a safetensors header holds beside its tensors: the format, notes of other tools."""


def is_peft(model: Any) -> bool:
    """Whether `model` is a `peft.PeftModel` (or mixed model)."""
    from peft import PeftMixedModel, PeftModel

    return isinstance(model, (PeftModel, PeftMixedModel))


def is_mixed(model: Any) -> bool:
    """Whether adapters of different methods are mixed in `model`, for which peft has no file format."""
    from peft import PeftMixedModel

    return isinstance(model, PeftMixedModel)


def parameter_names(model: nn.Module) -> dict[torch.Tensor, str]:
    """The name of each trainable parameter."""
    return {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}


class TrainedNames:
    """The names of the trainable parameters, put together anew only where the model is not what it was.

    That takes a walk through its modules, which looks at the names that parts have in each other and at the parameters
    themselves. It takes a fraction of the time.
    """

    def __init__(self) -> None:
        self._names: dict[torch.Tensor, str] = {}
        self._parts: list[str] | None = None
        self._trained: list[nn.Parameter] = []

    def of(self, model: nn.Module) -> dict[torch.Tensor, str]:
        """As `parameter_names`; not to be changed."""
        parts, trained = _trained_parts(model)
        if parts != self._parts or not _are_same(trained, self._trained):
            self._names = parameter_names(model)
            is_usual = {*map(id, trained)} == {*map(id, self._names)}
            # A model that lists its parameters in its own way is asked each time.
            self._parts, self._trained = (parts, trained) if is_usual else (None, [])
        return self._names


def _trained_parts(model: nn.Module) -> tuple[list[str], list[nn.Parameter]]:
    """The names of modules and of trainable parameters in the modules that have them, and these parameters."""
    parts: list[str] = []
    trained: list[nn.Parameter] = []
    modules: list[nn.Module | None] = [model]
    seen: set[int] = set()
    for module in modules:  # which grows meanwhile
        if module is None:
            continue
        own, children = module._parameters, module._modules
        parts.append("")  # between two modules
        if own:  # most modules of an adapter have none
            for name, parameter in own.items():
                if parameter is not None and parameter.requires_grad:
                    parts.append(name)
                    trained.append(parameter)
        if children and id(module) not in seen:
            seen.add(id(module))
            parts += children
            modules += children.values()
    return parts, trained


def _are_same(some: Collection[torch.Tensor], others: Collection[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(operator.is_, some, others))


def require_trainable(model: nn.Module) -> None:
    """
    Raises:
        ModelError: where nothing would be trained.
    """
    if any(parameter.requires_grad for parameter in model.parameters()):
        return
    if is_peft(model):
        way_out = "the adapter is frozen: load it with PeftModel.from_pretrained(..., is_trainable=True)"
    else:
        way_out = "attach an adapter first: model = get_peft_model(model, LoraConfig(...))"
    raise ModelError(f"the model has no trainable parameter, so there is nothing to train; {way_out}")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameter counts."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return trainable, sum(p.numel() for p in model.parameters())


def adapter_settings(model: Any) -> dict[str, dict[str, Any]]:
    """For each adapter of a PEFT model, the settings that decide its shape and scale, as plain JSON values."""
    if not is_peft(model):
        return {}
    return {name: _plain(config.to_dict()) for name, config in model.peft_config.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items() if not str(key).startswith("_")}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, (bool, int, float)) else str(getattr(value, "value", value))


def base_fingerprint(model: nn.Module) -> str:
    """A digest of the frozen weights: of every name and shape, and of 64 evenly spaced values of each tensor.

    Values are compared in bfloat16, so the same base loaded in another precision has the same fingerprint. Quantised
    weights are compared as they are stored.
    """
    return _digest((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)


def unquantised_fingerprint(model: nn.Module) -> str:
    """As `base_fingerprint`, of what quantisation leaves as it is: norms, biases and embeddings. It is the same for a base
    model before and after, where nothing of those is trained."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    frozen = ((name, parameter) for name, parameter in model.named_parameters() if not parameter.requires_grad)
    return _digest((name, each) for name, each in frozen if each.dim() == 1 or id(each) in embeddings)


@torch.no_grad()
def _digest(parameters: Iterable[tuple[str, torch.Tensor]]) -> str:
    digest = hashlib.sha256()
    samples = []
    for name, parameter in parameters:
        digest.update(f"{_without_wrappers(name)}:{tuple(parameter.shape)};".encode())
        flat = parameter.detach().reshape(-1)
        stride = max(1, flat.numel() // 64)
        values = flat[::stride][:64]
        samples.append(values.to(torch.bfloat16).float() if values.is_floating_point() else values.float())
    for sample in samples:
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()


def _without_wrappers(name: str) -> str:
    return name.replace("base_model.model.", "").replace(".base_layer", "")


def uncovered_parameters(model: Any) -> dict[str, torch.Tensor]:
    """Trainable parameters that no adapter file holds."""
    if not is_peft(model):
        return {}
    if is_mixed(model):
        return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    from peft import get_peft_model_state_dict

    covered = {
        tensor.data_ptr()
        for name in model.peft_config
        for tensor in get_peft_model_state_dict(
            model, adapter_name=name, save_embedding_layers=_saves_embeddings(model)
        ).values()
    }
    return {
        name: parameter.detach()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.data_ptr() not in covered
    }


def _saves_embeddings(model: Any) -> bool:
    """Whole embeddings belong into an adapter file only where they are trained; asking a hub is never needed."""
    layers = [model.get_input_embeddings()] if hasattr(model, "get_input_embeddings") else []
    if hasattr(model, "get_output_embeddings"):
        layers.append(model.get_output_embeddings())
    return any(
        parameter.requires_grad and "lora" not in name
        for layer in layers
        if layer is not None
        for name, parameter in layer.named_parameters()
    )


@dataclass(frozen=True)
class SavedTensors:
    """The tensors that `save_weights` writes for a PEFT model, by the names they have in it."""

    in_adapters: dict[str, nn.Parameter]
    beside: dict[str, nn.Parameter]
    """Those that no adapter file holds."""
    trained: list[torch.Tensor]

    def are_all_of(self, trained: Collection[torch.Tensor]) -> bool:
        """Whether these parameters are trained, and no others."""
        return _are_same(trained, self.trained)


def saved_tensors(model: Any) -> SavedTensors | None:
    """What has to be copied so that an adapter can be written later, the same to the bit.

    None where it cannot: peft computes what it writes from other things than the parameters in its state dict, or the
    model's class saves itself.
    """
    from peft import PeftModel, get_peft_model_state_dict

    if not is_peft(model):
        return None
    beside = dict(uncovered_parameters(model))
    parameters = dict(model.named_parameters())
    in_adapters: dict[str, nn.Parameter] = {}
    if not is_mixed(model):
        if type(model).save_pretrained is not PeftModel.save_pretrained or "save_pretrained" in vars(model):
            return None
        # Stand-ins show which of the tensors it was given peft writes, and that it writes them as they are.
        stand_ins = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in model.state_dict().items()}
        name_of = {id(stand_in): name for name, stand_in in stand_ins.items()}
        for adapter_name in model.peft_config:
            options = {"adapter_name": adapter_name, "save_embedding_layers": _saves_embeddings(model)}
            try:
                written = get_peft_model_state_dict(model, state_dict=dict(stand_ins), **options)
                names = {name_of.get(id(tensor)) for tensor in written.values()}
                alone = {name: stand_ins[name] for name in stand_ins if name in names}
                again = get_peft_model_state_dict(model, state_dict=alone, **options)
            except Exception:  # a method that looks at more than these
                return None
            if {key: id(tensor) for key, tensor in written.items()} != {key: id(t) for key, t in again.items()}:
                return None
            if not all(name in parameters for name in names):
                return None
            in_adapters |= {name: parameters[name] for name in alone}
    return SavedTensors(in_adapters, {name: parameters[name] for name in beside}, list(parameter_names(model)))


def with_own_settings(model: Any) -> Any:
    """The same layers and weights, but settings of its own: peft changes them for a moment while it saves, and may not do
    that to a model that is trained meanwhile."""
    if is_mixed(model):  # peft has no file for it
        return model
    twin, tuner = copy.copy(model), copy.copy(model.base_model)
    twin._modules = {**model._modules, "base_model": tuner}
    twin.peft_config = {name: copy.copy(config) for name, config in model.peft_config.items()}  # sets keep their order
    return twin


def save_weights(
    model: Any,
    folder: Path,
    state_dict: dict[str, torch.Tensor] | None = None,
    beside: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write what was trained into `folder`: adapter files for a PEFT model, the whole model otherwise.

    Args:
        state_dict: tensors to write instead of those of the model.
        beside: the same for those that no adapter file holds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if is_peft(model):
        options = {"state_dict": state_dict} if state_dict is not None else {}
        if not is_mixed(model):
            card, cards = folder / "README.md", _cards.setdefault(model.get_base_model(), {})
            methods = frozenset(config.peft_type for config in model.peft_config.values())
            if methods in cards and not card.exists():
                card.write_bytes(cards[methods])
            model.save_pretrained(str(folder), save_embedding_layers=_saves_embeddings(model), **options)
            if card.is_file():
                cards[methods] = card.read_bytes()
        extra = uncovered_parameters(model) if beside is None else beside
        if extra:
            save_file({name: tensor.cpu().contiguous() for name, tensor in extra.items()}, folder / EXTRA_WEIGHTS_FILE)
    elif hasattr(model, "save_pretrained"):
        model.save_pretrained(str(folder), **({"state_dict": state_dict} if state_dict is not None else {}))
    else:
        save_model(model, str(folder / "model.safetensors"))


def load_weights(model: nn.Module, folder: Path) -> int:
    """Put the trained weights of a checkpoint back, in place; returns the number of tensors.

    Raises:
        CheckpointError: where a tensor is missing, new, or of another shape; nothing has been changed then.
    """
    if is_peft(model):
        return _load_adapters(model, folder)
    return _load_whole_model(model, folder)


def adapter_folder(folder: Path, name: str) -> Path:
    """peft writes the adapter called "default" into the folder itself and every other one into a sub-folder."""
    return folder if name == "default" else folder / name


def _load_adapters(model: Any, folder: Path) -> int:
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    loaded: dict[str, dict[str, torch.Tensor]] = {}
    for name in () if is_mixed(model) else model.peft_config:
        file = adapter_folder(folder, name) / "adapter_model.safetensors"
        if not file.is_file():
            raise CheckpointError(f"has no adapter '{name}' (expected {file.name})", path=file.parent)
        expected = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=_saves_embeddings(model))
        weights = read_tensors(file, expected)
        _require_same_tensors(weights, expected, file)
        loaded[name] = weights
    extra_expected = uncovered_parameters(model)
    extra_file = folder / EXTRA_WEIGHTS_FILE
    extra = read_tensors(extra_file, extra_expected) if extra_file.is_file() else {}
    _require_same_tensors(extra, extra_expected, extra_file)
    for name, weights in loaded.items():
        set_peft_model_state_dict(model, weights, adapter_name=name)
    with torch.no_grad():
        for name, tensor in extra.items():
            extra_expected[name].copy_(tensor)
    return sum(map(len, loaded.values())) + len(extra)


def _load_whole_model(model: nn.Module, folder: Path) -> int:
    files = sorted(folder.glob("model*.safetensors"))
    if not files:
        raise CheckpointError("has no model.safetensors", path=folder)
    expected = model.state_dict()
    weights = {name: tensor for file in files for name, tensor in read_tensors(file, expected).items()}
    tied = {name for name in expected if name not in weights and _is_alias(expected, name, weights)}
    if not _loads_in_its_own_way(model):
        _require_same_tensors(weights, {k: v for k, v in expected.items() if k not in tied}, files[0])
    try:
        model.load_state_dict(weights, strict=not tied)
    except RuntimeError as error:
        raise CheckpointError(f"the model does not take it: {error}", path=files[0]) from error
    return len(weights)


def _loads_in_its_own_way(model: nn.Module) -> bool:
    """Whether the model's class loads its state itself, so that it alone knows which tensors are right."""
    return type(model).load_state_dict is not nn.Module.load_state_dict


def _is_alias(expected: dict[str, torch.Tensor], name: str, weights: dict[str, torch.Tensor]) -> bool:
    pointer = expected[name].data_ptr()
    return any(expected[other].data_ptr() == pointer for other in weights if other in expected)


def _require_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], file: Path) -> None:
    missing, new = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or new:
        raise CheckpointError(
            f"holds other tensors than the model: {len(missing)} of the model's {len(expected)} are missing"
            + (f" (first: {missing[0]})" if missing else "")
            + (f", {len(new)} are unknown to it (first: {new[0]})" if new else "")
            + ". Were target_modules or modules_to_save changed? Use the settings of the checkpoint's "
            "adapter_config.json, or another output_dir for a new run",
            path=file,
        )
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)}, the model's has {tuple(expected[name].shape)}. Was the rank "
                "(r) changed? Use the settings of the checkpoint's adapter_config.json, or another output_dir for a "
                "new run",
                path=file,
            )
        if tensor.is_floating_point() != expected[name].is_floating_point():
            raise CheckpointError(f"{name} has the type {tensor.dtype}, the model's {expected[name].dtype}", path=file)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{name} holds NaN or infinity; take an older checkpoint", path=file)


def read_tensors(file: Path, expected: Mapping[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. With `expected`, the tensors it should hold, one that describes far more than
    those is not opened: the library would spend seconds and gigabytes on its header.

    Raises:
        CheckpointError: where it cannot be read as one.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if expected is not None:
            _require_short_header(file, MAX_OTHER_HEADER_BYTES + sum(256 + len(name.encode()) for name in expected))
        tensors: dict[str, torch.Tensor] = load_file(str(file))
        return tensors
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"cannot be read as safetensors: {error}", path=file) from error


def _require_short_header(file: Path, max_bytes: int) -> None:
    with file.open("rb") as opened:
        num_bytes = int.from_bytes(opened.read(8), "little")
    if num_bytes > max_bytes:
        raise CheckpointError(
            f"says its header has {num_bytes:,} bytes, at most {max_bytes:,} are read for the tensors of this model",
            path=file,
        )
