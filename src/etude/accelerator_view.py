"""`trainer.accelerator`: what third-party trainers and callbacks read and call on accelerate's object, over our own engine."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from etude.argument_names import ACCELERATOR_DEFAULTS
from etude.optim.clipping import clip_gradients

if TYPE_CHECKING:
    from etude.hooks.base import Composition


class AcceleratorView:
    """A view, not an engine: it holds no state but the trainer it looks at.

    The values of `accelerator_config` are attributes. `gradient_state.sync_gradients` is true at the last micro-batch of a
    step.
    """

    def __init__(self, trainer: Composition) -> None:
        self._trainer = trainer
        self.state = SimpleNamespace(deepspeed_plugin=None, fsdp_plugin=None, distributed_type=self.distributed_type)
        self.parallelism_config = None

    def __getattr__(self, name: str) -> Any:
        settings = {**ACCELERATOR_DEFAULTS, **_mapping(self._trainer.args.accelerator_config)}
        if name in settings:
            return settings[name]
        raise AttributeError(
            f"trainer.accelerator has no {name!r}: it is a view of etude's own engine with "
            f"{', '.join(sorted(public for public in dir(self) if not public.startswith('_')))}"
        )

    # -- where this process is -----------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        return self._trainer.args.device

    @property
    def num_processes(self) -> int:
        return self._trainer.args.world_size

    @property
    def process_index(self) -> int:
        return self._trainer.args.process_index

    @property
    def local_process_index(self) -> int:
        return self._trainer.args.local_process_index

    @property
    def is_main_process(self) -> bool:
        return self.process_index == 0

    @property
    def is_local_main_process(self) -> bool:
        return self.local_process_index == 0

    @property
    def is_last_process(self) -> bool:
        return self.process_index == self.num_processes - 1

    @property
    def use_distributed(self) -> bool:
        return self.num_processes > 1

    @property
    def multi_device(self) -> bool:
        return self.use_distributed

    @property
    def is_fsdp2(self) -> bool:
        return False

    @property
    def distributed_type(self) -> str:
        """ "NO" in one process, "MULTI_GPU" or "MULTI_CPU" in several, the values of accelerate's enumeration."""
        if not self.use_distributed:
            return "NO"
        return "MULTI_GPU" if self.device.type == "cuda" else "MULTI_CPU"

    # -- numbers -------------------------------------------------------------------------------------------------------

    @property
    def mixed_precision(self) -> str:
        """ "no", "bf16" or "fp16"."""
        name = self._trainer.precision.name
        return "no" if name == "fp32" else name

    @property
    def native_amp(self) -> bool:
        return self.mixed_precision != "no"

    @property
    def scaler(self) -> Any:
        """torch's loss scaler of a float16 run, None otherwise."""
        run = self._trainer._run
        return None if run is None else getattr(run.scaler, "scaler", None)

    @property
    def gradient_accumulation_steps(self) -> int:
        return self._trainer.args.gradient_accumulation_steps

    @property
    def sync_gradients(self) -> bool:
        """Whether the micro-batch in hand is the last of its step."""
        return self._trainer.is_last_micro_batch

    @property
    def gradient_state(self) -> Any:
        return SimpleNamespace(
            sync_gradients=self.sync_gradients,
            num_steps=self.gradient_accumulation_steps,
            plugin_kwargs=self.gradient_accumulation_kwargs or {},
        )

    @property
    def optimizer_step_was_skipped(self) -> bool:
        """Whether the last update was left out because a float16 gradient overflowed."""
        run = self._trainer._run
        return run is not None and run.update.was_skipped

    def autocast(self, *_: Any, **__: Any) -> AbstractContextManager[Any]:
        return self._trainer.precision.autocast()

    def backward(self, loss: torch.Tensor, **kwargs: Any) -> None:
        """Backward of a loss that is scaled for its step already, with the scale of a float16 run."""
        run = self._trainer._run
        torch.autograd.backward(loss if run is None else run.scaler.scale(loss), **kwargs)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: int = 2) -> torch.Tensor:
        """The L2 norm before clipping. The gradients have been unscaled already."""
        if norm_type != 2:
            return torch.nn.utils.clip_grad_norm_(parameters, max_norm, norm_type=norm_type)
        return clip_gradients(parameters, max_norm)

    def clip_grad_value_(self, parameters: Any, clip_value: float) -> None:
        """Cut every element of the gradients to at most `clip_value`. They have been unscaled already."""
        torch.nn.utils.clip_grad_value_(parameters, clip_value)

    def accumulate(self, *_: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    def no_sync(self, *_: Any, **__: Any) -> AbstractContextManager[Any]:
        return nullcontext()

    # -- models --------------------------------------------------------------------------------------------------------

    def prepare(self, *objects: Any, **_: Any) -> Any:
        """The objects as they are: models on the device, nothing wrapped."""
        placed = tuple(self.prepare_model(each) if isinstance(each, nn.Module) else each for each in objects)
        return placed[0] if len(placed) == 1 else placed

    def prepare_model(self, model: nn.Module, **_: Any) -> nn.Module:
        return model if getattr(model, "hf_device_map", None) or _is_quantized(model) else model.to(self.device)

    def unwrap_model(self, model: Any, *_: Any, **__: Any) -> Any:
        """The model behind a wrapper with `.module` (DDP, DataParallel) or of torch.compile."""
        while True:
            if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
                model = model.module
            elif hasattr(model, "_orig_mod"):
                model = model._orig_mod
            else:
                return model

    def get_state_dict(self, model: nn.Module, unwrap: bool = True) -> dict[str, torch.Tensor]:
        return dict((self.unwrap_model(model) if unwrap else model).state_dict())

    # -- several processes ---------------------------------------------------------------------------------------------

    def gather(self, value: Any) -> Any:
        """Tensors of all processes, however nested, joined along their first axis."""
        return _nested(value, _gathered) if self.use_distributed else value

    def gather_for_metrics(self, value: Any, use_gather_object: bool = False) -> Any:
        """As `gather`; no process duplicates a sample, so nothing has to be cut off."""
        if use_gather_object and self.use_distributed:
            parts: list[Any] = [None] * self.num_processes
            torch.distributed.all_gather_object(parts, value)
            return [item for part in parts for item in part]
        return value if use_gather_object else self.gather(value)

    def reduce(self, value: Any, reduction: str = "sum", scale: float = 1.0) -> Any:
        """The sum (or "mean") over processes."""

        def reduced(tensor: torch.Tensor) -> torch.Tensor:
            total = tensor.clone()
            if self.use_distributed:
                torch.distributed.all_reduce(total)
            return total * scale / (self.num_processes if reduction == "mean" else 1)

        return _nested(value, reduced)

    def pad_across_processes(self, value: Any, dim: int = 0, pad_index: int = 0, pad_first: bool = False) -> Any:
        """Tensors widened along `dim` to the longest of all processes."""
        if not self.use_distributed:
            return value

        def padded(tensor: torch.Tensor) -> torch.Tensor:
            length = torch.tensor(tensor.shape[dim], device=tensor.device)
            torch.distributed.all_reduce(length, op=torch.distributed.ReduceOp.MAX)
            wide = tensor.new_full((*tensor.shape[:dim], int(length), *tensor.shape[dim + 1 :]), pad_index)
            start = int(length) - tensor.shape[dim] if pad_first else 0
            wide.narrow(dim, start, tensor.shape[dim]).copy_(tensor)
            return wide

        return _nested(value, padded)

    def wait_for_everyone(self) -> None:
        if self.use_distributed:
            torch.distributed.barrier()

    @contextmanager
    def main_process_first(self) -> Iterator[None]:
        with self._trainer.args.main_process_first(local=False):
            yield

    @contextmanager
    def local_main_process_first(self) -> Iterator[None]:
        with self._trainer.args.main_process_first(local=True):
            yield

    def on_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """A decorator: the function is run in the main process alone, and gives None in the others."""
        return _only_if(lambda: self.is_main_process, function)

    def on_local_main_process(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """As `on_main_process`, in the main process of each machine."""
        return _only_if(lambda: self.is_local_main_process, function)

    def print(self, *values: Any, sep: str = " ", end: str = "\n") -> None:
        """Print, in the main process of each machine."""
        if self.is_local_main_process:
            sys.stdout.write(sep.join(map(str, values)) + end)

    # -- the end -------------------------------------------------------------------------------------------------------

    def free_memory(self, *objects: Any) -> Any:
        """Let go of cached device memory; what was given comes back as None, as many times."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return [None] * len(objects)

    clear = free_memory

    def end_training(self) -> None:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _mapping(settings: Any) -> Mapping[str, Any]:
    return settings if isinstance(settings, Mapping) else {}


def _is_quantized(model: Any) -> bool:
    return bool(getattr(model, "is_quantized", False) or getattr(model, "quantization_method", None))


def _only_if(is_asked: Callable[[], bool], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs) if is_asked() else None

    return run


def _nested(value: Any, apply: Callable[[torch.Tensor], Any]) -> Any:
    if torch.is_tensor(value):
        return apply(value)
    if isinstance(value, Mapping):
        return {key: _nested(item, apply) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_nested(item, apply) for item in value)
    return value


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    rows = (tensor[None] if tensor.dim() == 0 else tensor).contiguous()
    parts = [torch.empty_like(rows) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, rows)
    return torch.cat(parts)
