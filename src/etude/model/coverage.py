"""How far what is trained reaches into the model, per class of weights: attention, MLP, experts, embeddings, head."""

from __future__ import annotations

import re
from collections import defaultdict
from typing import Any, NamedTuple

from torch import nn

from etude.model.loss import unwrapped

CLASSES = ("attention", "MLP", "experts", "vision", "embeddings", "head", "other")

_WRAPPERS = re.compile(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)")
_ADDED = re.compile(r"\.(lora|ia3|oft|boft|hada|lokr|vera|trainable_tokens)_?\w*(?=\.|$)")
_LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks|layer|block)\.(\d+)\.")
_ROUTER = re.compile(r"(?:^|\.)(router|gate)$")
_BY_PATH = (
    ("vision", re.compile(r"(?:^|\.)(vision\w*|visual|image\w*)\.")),
    ("experts", re.compile(r"experts?\b")),
    ("embeddings", re.compile(r"(?:^|\.)(embed\w*|wte|wpe|shared|\w*embeddings?)\b")),
    ("attention", re.compile(r"attn|attention", re.IGNORECASE)),
    ("MLP", re.compile(r"mlp|feed_?forward|ffn|fc\d|dense|\bwi\b|\bwo\b|intermediate|output", re.IGNORECASE)),
)


class Reach(NamedTuple):
    """Of one class: layers and matrices that are trained, of how many. `layers` is 0 for weights outside of them."""

    name: str
    adapted_layers: int
    layers: int
    adapted_matrices: int
    matrices: int


def reach_of(model: Any) -> list[Reach]:
    """The classes of weights that `model` has, in the order of `CLASSES`. Routers are left out: they stay frozen."""
    head_path = _head_path(model)
    matrices: dict[str, tuple[str, str]] = {}  # path -> (class, layer)
    trained: set[str] = set()
    adapted_modules: set[str] = set()
    for name, parameter in model.named_parameters():
        path = _WRAPPERS.sub("", name.removeprefix("base_model.model.")).removesuffix(".weight")
        added = _ADDED.search(path)
        if added is not None:
            if parameter.requires_grad:
                adapted_modules.add(path[: added.start()])
        elif parameter.dim() >= 2 and not _ROUTER.search(path):
            layer = _LAYER.search(path)
            matrices[path] = (_class_of(path, head_path), layer.group(1) if layer else "")
            if parameter.requires_grad:
                trained.add(path)
    for module in adapted_modules:  # an adapter may sit on a module that holds several matrices (fused experts)
        trained |= {module} if module in matrices else {path for path in matrices if path.startswith(f"{module}.")}
    return _counted(matrices, trained)


def _class_of(path: str, head_path: str | None) -> str:
    if path == head_path:
        return "head"
    return next((name for name, pattern in _BY_PATH if pattern.search(path)), "other")


def _head_path(model: Any) -> str | None:
    base = unwrapped(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if not isinstance(head, nn.Module):
        return None
    found = next((path for path, module in base.named_modules() if module is head), None)
    return found and _WRAPPERS.sub("", found)


def _counted(matrices: dict[str, tuple[str, str]], trained: set[str]) -> list[Reach]:
    layers: dict[str, set[str]] = defaultdict(set)
    adapted_layers: dict[str, set[str]] = defaultdict(set)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for path, (name, layer) in matrices.items():
        is_trained = path in trained
        counts[name][0] += is_trained
        counts[name][1] += 1
        if layer:
            layers[name].add(layer)
            if is_trained:
                adapted_layers[name].add(layer)
    return [Reach(n, len(adapted_layers[n]), len(layers[n]), *counts[n]) for n in CLASSES if n in counts]
