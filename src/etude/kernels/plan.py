"""What is swapped inside the model for speed: planned, explained, applied, undone. Nothing else changes a user's model.

Only attributes of instances are set, and every one of them is put back by `undo`. State-dict keys stay as they are.
"""

from __future__ import annotations

import copy
import functools
import inspect
import math
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from etude.errors import ModelError
from etude.kernels.block import Block
from etude.kernels.expert_layers import compare_mixture, expert_layers, mixture_forward, mixture_obstacle
from etude.kernels.fp8 import Fp8Projection
from etude.kernels.layers import TOLERANCES, block_of, compare, last_norm_of, tolerance_of
from etude.kernels.lora import lean_forward, obstacle
from etude.kernels.magnitude import RowProjection
from etude.kernels.norm import LastNorm
from etude.kernels.offload import Offload, Shelf
from etude.kernels.projection import Copy, refresh
from etude.kernels.quantized import QuantizedProjection, Workspace, is_quantized_lora

WARMUP_STEPS = 2
TIMED_STEPS = 3
WORTHWHILE_SECONDS = 120.0
"""Compiling takes 15 to 60 seconds; it is worth it where about a third of more than this is saved."""

FP8_SPEED = 2
"""Products in 8 bits, beside those in half precision."""

UNPACKING_OPERATIONS = 1000
"""What unpacking a quantised weight takes as long as, on a GPU: it is bound by memory, and products are not."""


class StandIn:
    """A block, or the last norm, in the place of its layer's forward. A copy of the model, or a pickle, gets the
    layer's own forward back: the adapters that a block has taken over are not those of the copy."""

    def __init__(self, block: Block | LastNorm) -> None:
        self.block = block
        self.__signature__ = inspect.signature(block.forward)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.block.forward(*args, **options)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return own_forward(copy.deepcopy(self.block.layer, memo))

    def __reduce__(self) -> Any:
        return own_forward, (self.block.layer,)


def own_forward(layer: nn.Module) -> Any:
    """The forward of the layer's class, bound to the layer."""
    return types.MethodType(type(layer).forward, layer)


@dataclass
class KernelPlan:
    """The swaps of one model."""

    lora_layers: list[Any] = field(default_factory=list)
    """peft LoRA layers that get the forward without copies."""
    blocks: list[Block] = field(default_factory=list)
    """Decoder layers that are computed by our own forward and backward."""
    last_norm: LastNorm | None = None
    """The norm behind the blocks, computed by our own kernels."""
    mixtures: list[Any] = field(default_factory=list)
    """Experts, or the outermost of peft's wrappers around them, that are computed by grouped products of our own."""
    decoder_layers: list[nn.Module] = field(default_factory=list)
    """Layers that are compiled, once for all of them."""
    why_no_block: str | None = None
    obstacles: Counter[str] = field(default_factory=Counter)
    """Why some LoRA layers outside the blocks keep peft's forward."""
    mixture_obstacles: Counter[str] = field(default_factory=Counter)
    """Why some mixtures of experts keep the model's forward."""
    _undo: list[Callable[[], None]] = field(default_factory=list)
    _copies: list[Copy] = field(default_factory=list)
    _row_projections: list[RowProjection] = field(default_factory=list)
    _gather: Any = None
    _shelf: Shelf | None = None
    _watched: Any = None
    """A LoRA layer of the blocks, as an example of how all of them are used."""
    _use: dict[str, Any] = field(default_factory=dict)
    is_compiled: bool = False

    def explain(self) -> list[str]:
        """One line per kind of swap, for the start screen."""
        lines = []
        if self.blocks:
            and_norm = "" if self.last_norm is None else ", and the norm behind them"
            lines.append(f"{len(self.blocks)} decoder layers with their own forward and backward pass{and_norm}")
        elif self.why_no_block is not None:
            lines.append(f"decoder layers as the model computes them: {self.why_no_block}")
        lines += dict.fromkeys(p.note for block in self.blocks for p in block.projections if p.note is not None)
        if self.lora_layers and not self.blocks:
            lines.append(f"{len(self.lora_layers)} LoRA layers without float32 copies")
        lines += [f"{count} LoRA layers as peft computes them: {reason}" for reason, count in self.obstacles.items()]
        if self.mixtures:
            lines.append(f"{len(self.mixtures)} mixtures of experts as grouped products with their own backward pass")
        lines += [
            f"{count} mixtures of experts as the model computes them: {reason}"
            for reason, count in self.mixture_obstacles.items()
        ]
        return lines

    @property
    def rounding(self) -> float:
        """What the blocks' products are known to differ from the layers' own by, relative to their norm."""
        return max((p.rounding for block in self.blocks for p in block.projections), default=0.0)

    def apply(self) -> None:
        self._use = {} if self._watched is None else _use_of(self._watched)
        for layer in self.lora_layers:
            layer.forward = types.MethodType(lean_forward, layer)
            self._undo.append(lambda layer=layer: layer.__dict__.pop("forward", None))  # type: ignore[misc]
        for layer in self.mixtures:
            layer.forward = types.MethodType(mixture_forward, layer)
            self._undo.append(lambda layer=layer: layer.__dict__.pop("forward", None))  # type: ignore[misc]
        for block in self.blocks:
            for projection in block.projections:
                self._undo.append(projection.remove)
                projection.install()
                self._copies += projection.copies()
                if isinstance(projection, RowProjection):
                    self._row_projections.append(projection)
            self._stand_in(block)
            if getattr(block.layer, "gradient_checkpointing", False):  # as asked, but by our own recomputation
                block.recomputes = True
                setattr(block.layer, "gradient_checkpointing", False)  # noqa: B010, a plain attribute of the module
                self._undo.append(lambda layer=block.layer: setattr(layer, "gradient_checkpointing", True))  # type: ignore[misc]
        if self.last_norm is not None:
            self._stand_in(self.last_norm)

    def _stand_in(self, block: Block | LastNorm) -> None:
        block.layer.forward = StandIn(block)
        self._undo.append(lambda: block.layer.__dict__.pop("forward", None))

    def refresh(self) -> None:
        """Take over the adapters as they are now; called before every forward pass."""
        if self._gather is not None and self._gather.is_current():
            self._gather.copy()
        else:
            refresh(self._copies)
        for projection in self._row_projections:
            projection.renew()

    def is_watched(self) -> bool:
        """Whether somebody has hooked a module or parameter of a block; what is captured in a graph would not call the hook."""
        return any(block.is_watched() or any(part.has_hooks() for part in block.projections) for block in self.blocks)

    def require_unchanged(self) -> None:
        """
        Raises:
            ModelError: adapters were switched, merged, disabled or scaled anew while the blocks compute with those they know.
        """
        if self._watched is not None and _use_of(self._watched) != self._use:
            raise ModelError(
                f"the adapters are used otherwise than when training began (now {_use_of(self._watched)}, then "
                f"{self._use}): put them back after use, or train with fast_path=False"
            )

    def layer_bytes(self) -> tuple[int, int, int, int, int]:
        """Bytes of a token in one layer: kept with everything, without its gates, with its input alone; needed for a moment
        in the backward pass and in the forward pass."""
        block = self.blocks[0]
        everything, passing = block.bytes_per_token(keeps_gates=True)
        without_gates, _ = block.bytes_per_token(keeps_gates=False)
        width, gates = block.qkv.in_features, block.gate_up.out_features
        passing_forward = (gates + gates // 2 + 2 * width) * block.qkv.dtype.itemsize
        if block.gate_up.keeps_product:
            passing_forward += block.gate_up.kept_columns * block.qkv.dtype.itemsize
        return everything, without_gates, block.width_bytes, passing, passing_forward

    def layer_operations(self) -> tuple[int, int, int, int, int]:
        """Operations of one layer, as half-precision products: of a token forwards, to make its gates again, to make
        everything again; and of any number of tokens each time, for unpacking its weights and those of its gates."""
        block = self.blocks[0]
        speed = FP8_SPEED if isinstance(block.gate_up, Fp8Projection) else 1
        unpacked, gates = (
            sum(part.in_features * part.out_features for part in parts if isinstance(part, QuantizedProjection))
            for parts in (block.projections, (block.gate_up,))
        )
        forward, gates_again, again = (operations // speed for operations in block.operations_per_token())
        return forward, gates_again, again, UNPACKING_OPERATIONS * unpacked, UNPACKING_OPERATIONS * gates

    def keep(
        self,
        *,
        num_recomputed: int,
        num_without_gates: int,
        num_offloaded: int = 0,
        recomputes_offloaded: bool = False,
        in_flight: int = 2,
        host_bytes: int = 0,
    ) -> None:
        """Have the first blocks put what they keep in `host_bytes` of host memory, those after them run again in the
        backward pass, and those after them make their gates again. Offloaded blocks do one or the other.

        Raises:
            RuntimeError: the host does not give so much memory; every block is as it was.
        """
        self._unshelve()
        if num_offloaded:
            self._shelve(Offload(num_offloaded, in_flight), host_bytes)
        end = num_offloaded + num_recomputed
        for index, block in enumerate(self.blocks):
            block.recomputes = recomputes_offloaded if index < num_offloaded else index < end
            # A layer that is run again needs its gates at once.
            block.keeps_gates = block.recomputes or index >= end + num_without_gates

    def _shelve(self, offload: Offload, host_bytes: int) -> None:
        shelf = Shelf(self.blocks[0].qkv.device, offload)
        try:
            shelf.reserve(host_bytes)
        except RuntimeError:
            shelf.release()
            raise
        self._shelf = shelf
        self._undo.append(self._unshelve)
        for number, block in enumerate(self.blocks[: offload.num_layers + offload.in_flight]):
            block.shelve = functools.partial(shelf.run, number)

    def _unshelve(self) -> None:
        if self._shelf is not None:
            for block in self.blocks:
                block.shelve = None
            self._shelf.release()
            self._shelf = None

    def keep_less(self) -> bool:
        """Have a quarter of the blocks more run again in the backward pass, those first whose memory is on the device; False
        where they all do already."""
        end = 0 if self._shelf is None else self._shelf.offload.num_layers
        kept = [block for block in self.blocks[end:] + self.blocks[:end] if not block.recomputes]
        for block in kept[: -(-len(self.blocks) // 4)]:
            block.recomputes = block.keeps_gates = True
        return bool(kept)

    def accumulate_in_place(self) -> None:
        """Have the blocks add to the gradients where they lie (`p.grad` stays there), all adapters in a few launches."""
        if not self.blocks:
            return
        from etude.kernels.transfer import Gather, Piece

        for block in self.blocks:
            for projection in block.projections:
                projection.accumulate_in_place()
        pieces = [Piece(*copy) for copy in self._copies]
        if len({piece.source.dtype for piece in pieces}) == 1:
            self._gather = Gather(pieces)

    @contextmanager
    def packed(self) -> Iterator[None]:
        """Inside, forwards are of packed samples."""
        if self.last_norm is None:
            yield
            return
        before, self.last_norm.is_packed = self.last_norm.is_packed, True
        try:
            yield
        finally:
            self.last_norm.is_packed = before

    @contextmanager
    def verifying(self, dtype: torch.dtype) -> Iterator[None]:
        """Compare one block of each kind, and every mixture, with the layer's own forward and backward, on what it is called
        with inside.

        Raises:
            ModelError: they differ.
        """
        kinds = {getattr(block.attention, "sliding_window", None): block for block in self.blocks}
        chosen = self.blocks if self.rounding else list(kinds.values())  # each layer has been rounded by itself
        swapped: list[Any] = [*chosen, *([] if self.last_norm is None else [self.last_norm])]
        for part in swapped:
            part.calls_seen = []
        seen: list[list[tuple[Tensor, ...]]] = [[] for _ in self.mixtures]
        for layer, calls_of_layer in zip(self.mixtures, seen, strict=True):
            layer.forward = types.MethodType(_recording(calls_of_layer), layer)
        try:
            yield
            for block in chosen:
                calls, block.calls_seen = block.calls_seen, None
                difference = compare(block, calls[0]) if calls else math.inf
                if not difference <= tolerance_of(block, dtype):  # written so that NaN fails
                    raise ModelError(f"our layer and the model's own differ by {difference:.1e}")
            if self.last_norm is not None and self.last_norm.calls_seen:
                calls_of_norm, self.last_norm.calls_seen = self.last_norm.calls_seen, None
                difference = self.last_norm.compare(calls_of_norm[0])
                if not difference <= TOLERANCES[dtype]:
                    raise ModelError(f"our last norm and the model's own differ by {difference:.1e}")
            for layer, calls_of_layer in zip(self.mixtures, seen, strict=True):
                difference = compare_mixture(layer, *calls_of_layer[0]) if calls_of_layer else math.inf
                if not difference <= TOLERANCES[dtype]:
                    raise ModelError(f"our experts and the model's own differ by {difference:.1e}")
        finally:
            for part in swapped:
                part.calls_seen = None
            for layer in self.mixtures:
                layer.forward = types.MethodType(mixture_forward, layer)

    def compile(self) -> None:
        """Compile the decoder layers; token counts may differ from call to call without compiling again."""
        if self.is_compiled:
            return
        self.is_compiled = True
        for layer in self.mixtures:  # sorted rows are nothing that the compiler could make better
            layer.forward = types.MethodType(torch.compiler.disable(mixture_forward), layer)  # type: ignore[no-untyped-call]
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
        self._copies.clear()  # they hold the memory that the layers' weights go back from
        self._row_projections.clear()
        self._gather = None
        while self._undo:
            self._undo.pop()()
        self.is_compiled = False


def plan_kernels(
    model: nn.Module,
    decoder: nn.Module | None,
    dtype: torch.dtype | None = None,
    *,
    base_precision: str | None = None,
    why_no_block: str | None = None,
    why_no_mixture: str | None = None,
) -> KernelPlan:
    """Look at a model and decide what can be swapped; changes nothing. `decoder` has the layers, `dtype` is what they
    compute in, `base_precision` what their frozen products are computed in ("fp8", None: `dtype` as well), `why_no_block`
    keeps their own forward, and `why_no_mixture` that of the experts."""
    plan = KernelPlan(why_no_block=why_no_block)
    layers = getattr(decoder, "layers", None)
    if isinstance(layers, nn.ModuleList):
        _plan_blocks(plan, layers, dtype, base_precision)
        if plan.blocks:
            plan.last_norm = last_norm_of(getattr(decoder, "norm", None))
    inside = [module for block in plan.blocks for module in block.layer.modules()]
    lora_linear = _lora_linear_class()
    plan._watched = next((m for m in inside if type(m) is lora_linear or is_quantized_lora(m)), None)
    computed = set(inside)
    for module in model.modules():
        if type(module) is lora_linear:
            reason = obstacle(module)
            if reason is None:
                plan.lora_layers.append(module)
            elif module not in computed:
                plan.obstacles[reason] += 1
    for module in expert_layers(model) if dtype is not None else ():
        reason = why_no_mixture or mixture_obstacle(module, dtype)  # type: ignore[arg-type]
        if reason is None:
            plan.mixtures.append(module)
        else:
            plan.mixture_obstacles[reason] += 1
    return plan


def _plan_blocks(
    plan: KernelPlan, layers: nn.ModuleList, dtype: torch.dtype | None, base_precision: str | None
) -> None:
    blocks: list[Block | str] = []
    if dtype is not None and plan.why_no_block is None:
        workspace = Workspace()
        blocks = [block_of(layer, dtype, base_precision=base_precision, workspace=workspace) for layer in layers]
    plan.why_no_block = plan.why_no_block or next((block for block in blocks if isinstance(block, str)), None)
    if blocks and plan.why_no_block is None:
        plan.blocks = [block for block in blocks if isinstance(block, Block)]
    else:
        plan.decoder_layers = list(layers)


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


def _recording(calls: list[tuple[Tensor, ...]]) -> Callable[..., Tensor]:
    """`mixture_forward`, which keeps what it is called with."""

    def forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        calls.append((hidden_states.detach().clone(), top_k_index.clone(), top_k_weights.detach().clone()))
        return mixture_forward(self, hidden_states, top_k_index, top_k_weights)

    return forward


def _use_of(layer: Any) -> dict[str, Any]:
    """How a LoRA layer is used at this moment; whoever changes that changes it in all layers."""
    return {
        "active": tuple(layer.active_adapters),
        "merged": tuple(layer.merged_adapters),
        "disabled": bool(layer.disable_adapters),
        "scaling": tuple(layer.scaling.get(name) for name in layer.active_adapters),
    }


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
