"""Hooks of one micro-batch: batch to device, forward, loss, backward."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
from torch import nn

from etude.cut import AsCollated, Packed
from etude.data.batching import count_items
from etude.errors import DataError
from etude.estimates import optimizer_state_bytes
from etude.hooks.base import Composition, accepts, as_tuple
from etude.kernels.cross_entropy import GPU_ROWS
from etude.kernels.offload import Rates, measured_rates
from etude.kernels.plan import CompileSwitch
from etude.model import loss as model_loss
from etude.model.graphs import GraphedLoss, graph_obstacle, launch_bound_tokens
from etude.model.memory import (
    HeadBytes,
    LayerBytes,
    MemoryPlan,
    Rows,
    TokenBudget,
    free_memory,
    plan_memory,
    seconds_of,
)
from etude.model.packing import PackedBatch
from etude.observe.machine import free_memory_bytes

OUR_LAYERS, AS_RECORDED = "etude", "the checkpoint was made with the model's own layers"
"""A run goes on with the layers it began with: they draw their dropout in another way, and round in another place."""

OUTSIDE_BYTES_PER_WIDTH = 16
"""Per token and unit of the hidden size, outside the layers: embeddings, last norm, labelled rows and their gradient."""

SPARE_BYTES = 192 * 2**20
"""Workspaces of the matrix products and the like."""

DETERMINISTIC_TOKENS = 8192
"""Token budget of a deterministic run on a GPU, where none is given."""


class ForwardHooks(Composition):
    """The forward and backward pass, on the path decided on the first batch."""

    def run_training_step(self, inputs: Any, num_items: int | None) -> torch.Tensor:
        """One micro-batch through `training_step`."""
        items = num_items if isinstance(inputs, PackedBatch) else self.items_tensor(num_items)
        if isinstance(self.cutter, Packed):
            self.cutter.budget.before_micro_batch()
        share: torch.Tensor = self.call_hook(self.training_step, self.model_wrapped, inputs, num_items_in_batch=items)
        if isinstance(inputs, PackedBatch) and isinstance(self.cutter, Packed):
            decided = self.cutter.budget.after_micro_batch(sum(inputs.lengths))
            if decided is not None:
                self.notices.say(decided)
                self.cut |= self.cutter.record()
        return share

    def items_tensor(self, num_items: int | None) -> torch.Tensor | None:
        return None if num_items is None else torch.tensor(num_items, device=self.args.device)

    def choose_path(self, inputs: Any) -> None:
        """Decide, on the first real batch, which path computes the run and how its steps are cut."""
        from etude.model.paths import choose_path

        overridden = self.overridden + (("compute_loss_func",) if self.compute_loss_func is not None else ())
        overridden += ("label_smoothing_factor",) if self.label_smoother is not None else ()
        overridden += ("neftune_noise_alpha",) if self.neftune_noise_alpha is not None else ()
        overridden += ("loss_is_scaled_for_ga",) if self.loss_is_scaled_for_ga is False else ()
        recorded = self._run.recorded_cut if self._run is not None else {}
        on_device = self._prepare_inputs(inputs)
        self.path = choose_path(
            self.model,
            fast_path=self.args.fast_path and recorded.get("path") != "general",
            overridden=overridden,
            sample_inputs=dict(on_device) if isinstance(on_device, Mapping) else {},
            training_dtype=self.precision.autocast_dtype,
            base_precision=self.args.base_precision,
            why_no_block=AS_RECORDED if recorded and recorded.get("layers") != OUR_LAYERS else None,
        )
        self.cutter = self._build_cutter(recorded, on_device)
        self.cut |= {"path": self.path.name, **self.cutter.record()}
        if self.path.name == "packed" and self.path.plan.blocks:
            self.cut["layers"] = OUR_LAYERS
        self.notices.say(f"{self.path.name} path: {'; '.join(self.path.reasons)}")
        for name, was in recorded.items():
            if self.cut.get(name) != was:
                self.notices.say(
                    f"cut differs from the checkpoint's, so rounding may: {name} {was} -> {self.cut.get(name)}"
                )
        if self.path.name == "general" and self._divides_by_items is None:
            self._divides_by_items = model_loss.divides_by_num_items(self.model, on_device, self.precision.autocast())

    def _build_cutter(self, recorded: Mapping[str, Any], inputs: Any) -> AsCollated | Packed:
        as_collated = AsCollated(self.shifts_labels, recorded.get("rows_per_micro_batch"))
        if self.path.name != "packed":
            return as_collated
        given = self.args.tokens_per_micro_batch or recorded.get("tokens_per_micro_batch")
        if given is None and self.args.deterministic and self.args.device.type == "cuda":
            given = DETERMINISTIC_TOKENS  # a measured budget could be another in the next run
        if self.path.plan.blocks and self.args.device.type == "cuda":
            given = self._plan_memory(given, inputs)
        return Packed(TokenBudget(self.args.device, given), as_collated)

    def _plan_memory(self, wanted_tokens: int | None, inputs: Any) -> int:
        """Decide what our own layers keep for the backward pass, and where; returns the token budget."""
        kernels, device = self.path.plan, self.args.device
        num_layers, layer = len(kernels.blocks), LayerBytes(*kernels.layer_bytes())
        may_offload = self.args.activation_offloading
        # Without copies only the ratios of the products count, and nothing has to be measured.
        rates = measured_rates(device, kernels.blocks[0].qkv.dtype) if may_offload else Rates(products=1.0, copies=0.0)
        tokens_of_rows = inputs["attention_mask"].sum(dim=1)
        planned = functools.partial(
            plan_memory,
            free_memory(device) - self._bytes_to_come(),
            layer,
            num_layers,
            HeadBytes(
                OUTSIDE_BYTES_PER_WIDTH * kernels.blocks[0].qkv.in_features,
                2 * GPU_ROWS * self.model.get_input_embeddings().num_embeddings,
            ),
            wanted_tokens,
            int(tokens_of_rows.max()),
            seconds=seconds_of(kernels.layer_operations(), rates.products, rates.copies),
            rows=Rows(
                len(tokens_of_rows) * self.args.gradient_accumulation_steps,
                max(1.0, float(tokens_of_rows.float().mean())),
            ),
        )
        if self.args.gradient_checkpointing or self.args.activation_checkpointing:
            memory_plan = MemoryPlan(planned().tokens, num_recomputed=num_layers)
        else:
            memory_plan = planned(host_room=(free_memory_bytes() or 0) if may_offload else 0)
        try:
            self._keep(memory_plan, layer)
        except RuntimeError as error:  # whatever kept the machine from pinning so much
            self.notices.say(f"nothing is kept in host memory: {str(error).strip().splitlines()[0]}")
            memory_plan = planned()
            self._keep(memory_plan, layer)
        self.notices.say(memory_plan.describe(num_layers))
        return memory_plan.tokens

    def _keep(self, memory_plan: MemoryPlan, layer: LayerBytes) -> None:
        self.path.plan.keep(
            num_recomputed=memory_plan.num_recomputed,
            num_without_gates=memory_plan.num_without_gates,
            num_offloaded=memory_plan.num_offloaded,
            recomputes_offloaded=memory_plan.recomputes_offloaded,
            in_flight=memory_plan.in_flight,
            host_bytes=memory_plan.host_bytes(layer),
        )

    def _bytes_to_come(self) -> int:
        """Gradients, the optimizer's state, and workspaces."""
        trained: int = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        has_state = self.optimizer is not None and any(self.optimizer.state.values())
        state = 0 if has_state else optimizer_state_bytes(str(self.args.optim)) * trained
        return 4 * trained + state + SPARE_BYTES

    def build_compile_switch(self, max_steps: int) -> CompileSwitch | None:
        """When the decoder layers are compiled; None on the general path. A deterministic run never decides by the clock."""
        if self.path.name != "packed":
            return None
        asked = bool(self.args.torch_compile)
        automatic = not self.args.deterministic and "torch_compile" not in self.args.explicit
        return CompileSwitch(self.path.plan, self.args.device, max_steps=max_steps, asked=asked, automatic=automatic)

    def build_graphs(self) -> GraphedLoss | None:
        """CUDA graphs for micro-batches that would wait for Python; None where that cannot be or was not wanted."""
        assert self._run is not None
        if self.args.cuda_graphs is False:
            return None
        obstacle = graph_obstacle(self.path, self.args.device, scales_loss=self.precision.scales_loss)
        if obstacle is not None:
            if self.args.cuda_graphs:
                self.notices.say(f"no CUDA graphs: {obstacle}")
            return None
        path, model = self.path, self.model_wrapped
        num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        most_tokens = launch_bound_tokens(num_parameters)
        self.notices.say(f"CUDA graphs for micro-batches of up to {most_tokens:,} tokens")
        return GraphedLoss(
            lambda batch: path.loss(model, batch, 1), self.compute_loss_context_manager, self.args.device, most_tokens
        )

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward of one micro-batch; returns its share of the step's loss, detached."""
        if not model.training:  # walking over all modules takes milliseconds in a large model
            model.train()
        for_training = getattr(self.optimizer, "train", None)
        if callable(for_training):
            for_training()
        if isinstance(inputs, PackedBatch):
            self.path.plan.require_unchanged()
        if self.graphs is not None and isinstance(inputs, PackedBatch) and not self.path.plan.is_watched():
            share = self.graphs(inputs, cast(int, num_items_in_batch))
            if self.graphs.failure is not None:
                self.notices.say_once(f"goes on without CUDA graphs: {self.graphs.failure}")
            return share
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            if isinstance(inputs, PackedBatch):
                loss = self.path.loss(model, inputs, num_items_in_batch)
            else:
                loss = self._general_loss(model, inputs, num_items_in_batch)
        self.accelerator.backward(loss)
        if self.args.torch_empty_cache_steps and self.state.global_step % self.args.torch_empty_cache_steps == 0:
            _empty_device_cache(self.args.device)
        detached: torch.Tensor = loss.detach()
        return detached

    def _general_loss(self, model: nn.Module, inputs: Any, num_items: Any) -> torch.Tensor:
        is_overridden = "compute_loss" in self.overridden
        if is_overridden and not self._tells_overrides_items():
            num_items = None
        loss: torch.Tensor = self.call_hook(self.compute_loss, model, inputs, num_items_in_batch=num_items)
        is_scaled = self.loss_is_scaled_for_ga
        if is_scaled is None:
            is_scaled = num_items is not None
            if is_overridden:
                is_scaled = is_scaled and accepts(self.compute_loss, "num_items_in_batch")
        return loss if is_scaled else loss / self.current_gradient_accumulation_steps

    def _tells_overrides_items(self) -> bool:
        """Whether an overridden `compute_loss` is told the item count: only where the model or the loss function uses it."""
        return self.model_accepts_loss_kwargs or self.compute_loss_func is not None

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of one batch: its mean, or with `num_items_in_batch` its sum over items divided by that number."""
        labels = None
        own_loss = self.label_smoother is not None or self.compute_loss_func is not None
        num_items = count_items(inputs, shifts_labels=self.shifts_labels)
        if own_loss and isinstance(inputs, Mapping) and "labels" in inputs:
            labels = inputs["labels"]
            inputs = {key: value for key, value in inputs.items() if key != "labels"}
        extra = {}
        if num_items_in_batch is not None and self.model_accepts_loss_kwargs and self._divides_by_items is not False:
            extra["num_items_in_batch"] = num_items_in_batch
        outputs = model(**inputs, **extra) if isinstance(inputs, Mapping) else model(*as_tuple(inputs))
        if self.compute_loss_func is not None:
            loss = self.compute_loss_func(outputs, labels, num_items_in_batch=num_items_in_batch)
        elif labels is not None:
            loss = self.call_hook(
                self.label_smoother,
                outputs,
                labels,
                shift_labels=self.shifts_labels,
                num_items_in_batch=num_items_in_batch,
            )
        else:
            loss = model_loss.read_loss(outputs)
            if num_items_in_batch is not None and not extra and num_items is not None:
                loss = loss * (num_items / num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def compute_loss_context_manager(self) -> AbstractContextManager[Any]:
        return self.autocast_smart_context_manager()

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> AbstractContextManager[Any]:
        return self.precision.autocast()

    def _prepare_inputs(self, inputs: Any) -> Any:
        """Tensors of a batch, however nested, on the device of the run."""
        prepared = self._prepare_input(inputs)
        if isinstance(prepared, Mapping) and len(prepared) == 0:
            raise DataError(
                "the collator returned an empty batch: none of the dataset's columns is an argument of the model's "
                f"forward, which takes {', '.join(self._signature_columns or [])}"
            )
        return prepared

    def _prepare_input(self, data: Any) -> Any:
        if torch.is_tensor(data) or isinstance(data, PackedBatch):
            return data.to(self.args.device, non_blocking=True)
        if isinstance(data, Mapping):
            return type(data)({key: self._prepare_input(value) for key, value in data.items()})  # type: ignore[call-arg]
        if isinstance(data, (tuple, list)):
            return type(data)(self._prepare_input(value) for value in data)
        return data


def _empty_device_cache(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
