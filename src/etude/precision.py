"""The number formats of a run: which type the forward computes in, which the adapters are kept in, and loss scaling."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn


@dataclass(frozen=True)
class Precision:
    """The decision, made once. `autocast_dtype` None means that the model computes in its own types."""

    name: str
    device_type: str
    autocast_dtype: torch.dtype | None
    scales_loss: bool
    note: str | None = None
    """Where the run does something else than was asked, one sentence that says so."""

    def autocast(self) -> AbstractContextManager[Any]:
        """The context a forward pass runs in."""
        if self.autocast_dtype is None:
            return nullcontext()
        return torch.autocast(self.device_type, dtype=self.autocast_dtype, cache_enabled=False)

    def build_scaler(self) -> LossScaler:
        """Loss scaling for float16, or its null object."""
        return DynamicLossScaler(self.device_type) if self.scales_loss else LossScaler()


def choose_precision(*, fp16: bool, bf16: bool, device: torch.device) -> Precision:
    """float32 unless asked; float16 with loss scaling only on a GPU, where a CPU or MPS device takes bfloat16."""
    if bf16:
        return Precision("bf16", device.type, torch.bfloat16, scales_loss=False, note=_bf16_note(device))
    if fp16 and device.type == "cuda":
        return Precision("fp16", "cuda", torch.float16, scales_loss=True)
    if fp16:
        note = f"fp16=True on {device.type}: float16 is for GPUs, so this run computes in bfloat16 autocast instead"
        return Precision("bf16", device.type, torch.bfloat16, scales_loss=False, note=note)
    return Precision("fp32", device.type, None, scales_loss=False)


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bfloat16; without them they are slower than in float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type != "cpu":
        return False
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(capabilities.get(name, False) for name in ("avx512_bf16", "amx_bf16"))


def _bf16_note(device: torch.device) -> str | None:
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return "bf16=True: this GPU has no bfloat16 units, expect it to be slow; fp16=True is faster here"
    return None


def keep_trainable_in_float32(model: nn.Module) -> int:
    """Make every trainable parameter float32 (half precision loses small updates); returns how many were changed."""
    changed = 0
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            parameter.data = parameter.data.float()
            changed += 1
    return changed


class LossScaler:
    """No loss scaling: the null object of float32 and bfloat16 runs."""

    skipped_steps = 0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return loss

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide the gradients by the scale, before their norm is taken."""

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        """Update; False where the step was skipped because a gradient overflowed."""
        optimizer.step()
        return True

    @property
    def tolerates_overflow(self) -> bool:
        """Whether a non-finite gradient means a smaller scale next time, not a broken run."""
        return False

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


class DynamicLossScaler(LossScaler):
    """torch's dynamic loss scaling for float16 gradients (Micikevicius et al., arXiv 1710.03740, section 3.2)."""

    def __init__(self, device_type: str) -> None:
        self.scaler = torch.amp.GradScaler(device_type)
        self.skipped_steps = 0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        return self.scaler.scale(loss)

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        self.scaler.unscale_(optimizer)

    def step(self, optimizer: torch.optim.Optimizer) -> bool:
        scale_before = self.scaler.get_scale()
        self.scaler.step(optimizer)
        self.scaler.update()
        stepped = self.scaler.get_scale() >= scale_before
        self.skipped_steps += not stepped
        return stepped

    @property
    def tolerates_overflow(self) -> bool:
        return True

    def state(self) -> dict[str, Any]:
        return {**self.scaler.state_dict(), "skipped_steps": self.skipped_steps}

    def load_state(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self.skipped_steps = int(state.pop("skipped_steps", 0))
        if state:
            self.scaler.load_state_dict(state)


def trainable_parameters(model: nn.Module) -> Iterable[nn.Parameter]:
    """The parameters that training moves, in the model's order."""
    return (parameter for parameter in model.parameters() if parameter.requires_grad)


def use_number_settings(args: Any, until_the_end: ExitStack) -> None:
    """Switch to deterministic kernels and to (or from) TF32 where asked; the process's own settings are put back.

    Deterministic kernels give the same bits from run to run on one kind of GPU; on a CPU they are so anyway.
    """
    if args.tf32 is not None:
        matmul = torch.backends.cuda.matmul
        until_the_end.callback(setattr, matmul, "allow_tf32", matmul.allow_tf32)
        matmul.allow_tf32 = args.tf32
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS makes its first handle
        cudnn, deterministic = torch.backends.cudnn, cast(Any, torch.utils.deterministic)  # its type knows no settings
        was = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        until_the_end.callback(torch.use_deterministic_algorithms, was[0], warn_only=was[1])
        until_the_end.callback(setattr, cudnn, "benchmark", cudnn.benchmark)
        cudnn.benchmark = False
        torch.use_deterministic_algorithms(True, warn_only=False)
        # Every new tensor would be filled with NaN, a launch each; nothing here reads what it has not written.
        until_the_end.callback(
            setattr, deterministic, "fill_uninitialized_memory", deterministic.fill_uninitialized_memory
        )
        deterministic.fill_uninitialized_memory = False
