"""What is swapped inside the model for speed: planned, explained, applied, undone. Nothing else changes a user's model.

Only attributes of instances are set, and every one of them is put back by `undo`. State-dict keys stay as they are.
"""

from __future__ import annotations

import time
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from etude.kernels.lora import lean_forward, obstacle

WARMUP_STEPS = 2
TIMED_STEPS = 3
WORTHWHILE_SECONDS = 120.0
"""Compiling takes 15 to 60 seconds; it is worth it where about a third of more than this is saved."""


@dataclass
class KernelPlan:
    """The swaps of one model."""

    lora_layers: list[Any] = field(default_factory=list)
    """peft LoRA layers that get the forward without copies."""
    decoder_layers: list[nn.Module] = field(default_factory=list)
    """Layers that are compiled, once for all of them."""
    obstacles: Counter[str] = field(default_factory=Counter)
    """Why some LoRA layers keep peft's forward."""
    _undo: list[Callable[[], None]] = field(default_factory=list)
    is_compiled: bool = False

    def explain(self) -> list[str]:
        """One line per kind of swap, for the start screen."""
        lines = []
        if self.lora_layers:
            lines.append(f"{len(self.lora_layers)} LoRA layers without float32 copies")
        lines += [f"{count} LoRA layers as peft computes them: {reason}" for reason, count in self.obstacles.items()]
        return lines

    def apply(self) -> None:
        for layer in self.lora_layers:
            layer.forward = types.MethodType(lean_forward, layer)
            self._undo.append(lambda layer=layer: layer.__dict__.pop("forward", None))  # type: ignore[misc]

    def compile(self) -> None:
        """Compile the decoder layers; token counts may differ from call to call without compiling again."""
        if self.is_compiled:
            return
        self.is_compiled = True
        for layer in self.decoder_layers:
            layer.compile(dynamic=True)
            self._undo.append(lambda layer=layer: setattr(layer, "_compiled_call_impl", None))  # type: ignore[misc]

    def abandon_compilation(self) -> None:
        """Run the layers as they are, after the compiler has failed on them."""
        for layer in self.decoder_layers:
            layer._compiled_call_impl = None
        self.is_compiled = False

    def undo(self) -> None:
        """Put everything back."""
        while self._undo:
            self._undo.pop()()
        self.is_compiled = False


def plan_kernels(model: nn.Module, decoder: nn.Module | None) -> KernelPlan:
    """Look at a model and decide what can be swapped; changes nothing. `decoder` has the layers to compile."""
    plan = KernelPlan()
    lora_linear = _lora_linear_class()
    for module in model.modules():
        if lora_linear is not None and type(module) is lora_linear:
            reason = obstacle(module)
            if reason is None:
                plan.lora_layers.append(module)
            else:
                plan.obstacles[reason] += 1
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList):
        plan.decoder_layers = list(layers)
    return plan


class CompileSwitch:
    """Decides when the layers of a plan are compiled: at once if asked, else when the rest of the run is long enough."""

    def __init__(self, plan: KernelPlan, device: torch.device, *, max_steps: int, asked: bool, automatic: bool) -> None:
        self.plan, self.max_steps, self.asked, self.automatic = plan, max_steps, asked, automatic
        self.first_step: int | None = None
        self.started = 0.0
        self.is_decided = can_compile(device) is not None or not plan.decoder_layers or not (asked or automatic)

    def before_step(self, step: int) -> str | None:
        """Called with the number of each step; returns a line to say when compiling is decided on."""
        if self.is_decided:
            return None
        if self.asked:
            return self._compile("as asked (torch_compile=True)")
        if self.first_step is None:
            self.first_step = step
        if step == self.first_step + WARMUP_STEPS:
            self.started = time.perf_counter()
        if step < self.first_step + WARMUP_STEPS + TIMED_STEPS:
            return None
        seconds = (time.perf_counter() - self.started) / TIMED_STEPS * (self.max_steps - step + 1)
        if seconds < WORTHWHILE_SECONDS:
            self.is_decided = True
            return None
        return self._compile(f"the remaining steps would take about {seconds:,.0f} s without")

    def _compile(self, reason: str) -> str:
        self.is_decided = True
        self.plan.compile()
        return f"compiles {len(self.plan.decoder_layers)} decoder layers: {reason}"


def _lora_linear_class() -> Any:
    from peft.tuners.lora import Linear

    return Linear


def can_compile(device: torch.device) -> str | None:
    """Why layers are not compiled on this device; None where they can be."""
    if device.type != "cuda":
        return "compiled layers are for GPUs"
    if torch.cuda.get_device_capability(device) < (7, 0):
        return "this GPU is too old for the compiler"
    return None
