"""The names of the parameters that are trained: asked at every save, put together only where something has changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn

from etude.model import adapter
from etude.model.adapter import TrainedNames, parameter_names
from tiny import causal_lora

NORM = "base_model.model.model.norm.weight"
QUERY = "base_model.model.model.layers.0.self_attn.q_proj"


def assert_current(names: dict[torch.Tensor, str], model: nn.Module) -> None:
    """Also in the same order: the optimizer counts them."""
    assert [(id(parameter), name) for parameter, name in names.items()] == [
        (id(parameter), name) for parameter, name in parameter_names(model).items()
    ]


def replace(model: Any) -> None:
    factors = model.get_submodule(QUERY).lora_A["default"]
    factors.weight = nn.Parameter(factors.weight.detach().clone())


def rename(model: Any) -> None:
    """The same parameters in the same order, under another name."""
    layer = model.get_submodule(QUERY)
    for factors in (layer.lora_A, layer.lora_B):
        factors["other"] = factors.pop("default")


def swap(model: Any) -> None:
    layer = model.get_submodule(QUERY)
    layer.lora_A["default"], layer.lora_B["default"] = layer.lora_B["default"], layer.lora_A["default"]


CHANGES: dict[str, Callable[[Any], Any]] = {
    "freeze": lambda model: model.get_submodule(QUERY).lora_A["default"].weight.requires_grad_(False),
    "thaw": lambda model: model.get_parameter(NORM).requires_grad_(True),
    "replace": replace,
    "rename": rename,
    "swap": swap,
    "train another adapter": lambda model: [
        model.add_adapter("second", LoraConfig(target_modules=["q_proj"])),
        model.set_adapter("second"),
    ],
    "add a parameter": lambda model: model.register_parameter("scale", nn.Parameter(torch.ones(1))),
    "remove a module": lambda model: model.get_submodule(QUERY).lora_B.pop("default"),
    "freeze one and thaw another": lambda model: [
        model.get_submodule(QUERY).lora_A["default"].weight.requires_grad_(False),
        model.get_submodule(QUERY).base_layer.weight.requires_grad_(True),
    ],
}


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change: str) -> None:
    model, names = causal_lora(), TrainedNames()
    assert_current(names.of(model), model)
    before = list(names.of(model).items())
    CHANGES[change](model)
    assert_current(names.of(model), model)
    assert [(id(parameter), name) for parameter, name in names.of(model).items()] != [
        (id(parameter), name) for parameter, name in before
    ]


def test_nothing_is_put_together_where_nothing_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, names, calls = causal_lora(), TrainedNames(), []
    monkeypatch.setattr(adapter, "parameter_names", lambda model: calls.append(0) or parameter_names(model))
    first = names.of(model)
    assert names.of(model) is first and len(calls) == 1
    with torch.no_grad():
        model.get_submodule(QUERY).lora_A["default"].weight.add_(1)
    model.get_submodule(QUERY).lora_A["default"].weight.requires_grad_(False).requires_grad_(True)
    assert names.of(model) is first and len(calls) == 1


class Tied(nn.Module):
    """Modules and a parameter that are in several places, one in itself, and a place with nothing in it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.empty = nn.Linear(2, 2), None
        self.register_module("nothing", None)
        self.register_parameter("no_weight", None)
        self.two, self.head = self.one, nn.Linear(2, 2)
        self.head.weight = self.one.weight
        self.one.above = nn.ModuleList([nn.Linear(2, 2)])
        self.one.above.append(self.one)


def test_what_is_in_several_places_has_one_name() -> None:
    model, names = Tied(), TrainedNames()
    assert_current(names.of(model), model)
    assert names.of(model) is names.of(model)


def test_a_model_that_lists_its_parameters_itself() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = [nn.Linear(2, 2)]

        def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
            yield "hidden", self.hidden[0].weight

    model, names = Own(), TrainedNames()
    assert_current(names.of(model), model)
    model.hidden = [nn.Linear(2, 2)]
    assert_current(names.of(model), model)
