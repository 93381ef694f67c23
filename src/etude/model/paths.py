"""Which path trains this model: the packed one, proved right on the first batch, or the general one.

A decoder language model is admitted to the packed path by capability (what its class, config and adapters say) and then
by probe: its own padded forward and ours must agree on a few short rows cut from the first real batch. Whatever fails
there, an exception included, means the general path, with the reason for the start screen.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from etude.errors import ConfigError, DataError, ModelError
from etude.kernels.attention import FIXED_SHAPES, Segments, kernels_for
from etude.kernels.cross_entropy import linear_cross_entropy, linear_logits
from etude.kernels.fp8 import device_obstacle
from etude.kernels.plan import KernelPlan, plan_kernels
from etude.kernels.quantized import quantized_kind
from etude.model.capabilities import (
    causal_model,
    decoder_of,
    field_problem,
    head_obstacle,
    missing_capabilities,
    read_head,
)
from etude.model.packing import IGNORED_LABEL, AttentionSwitch, PackedBatch, pack, packed_forward

CHUNKED, MODEL_LOGITS = "chunked", "logits_to_keep"
HALF_PRECISION = (torch.float16, torch.bfloat16)
MOST_EVEN_SHAPES = 8
"""Shapes of equally long samples for which a kernel is made, at a fifth of a second each."""


@dataclass(frozen=True)
class GeneralPath:
    """The model's own forward over the user's padded batch."""

    reasons: tuple[str, ...]
    """Why the packed path is not taken."""
    name: str = "general"


class PackedPath:
    """The forward of a micro-batch without its padding, and without logits that no label asks for."""

    name = "packed"

    def __init__(
        self, model: nn.Module, *, kernel: str, head: str, plan: KernelPlan | None = None, note: str = ""
    ) -> None:
        self.kernel, self.head = kernel, head
        self.plan = plan = KernelPlan() if plan is None else plan
        self.switch = AttentionSwitch(model)
        self._even_shapes: Counter[tuple[int, ...]] = Counter()
        heads = {
            CHUNKED: "chunked cross entropy on labelled tokens",
            MODEL_LOGITS: "the model's own logits of labelled tokens",
        }
        self.reasons = (
            "padding removed, samples packed",
            f"attention: {kernel.replace('_', ' ')}",
            f"loss head: {heads[head]}" + (f" ({note})" if note else ""),
            *plan.explain(),
        )

    @property
    def has_fixed_shapes(self) -> bool:
        """Whether a micro-batch is the same work whatever lengths and labels are in its slots."""
        return self.kernel in FIXED_SHAPES and self.head == CHUNKED

    def loss(self, model: nn.Module, inputs: dict[str, Tensor] | PackedBatch, num_items: int | Tensor) -> Tensor:
        """Cross entropy summed over the labelled tokens of a micro-batch / `num_items`, with its graph.

        `inputs` is what the collator returned, or what `pack` made of it before the copy to the device.

        Raises:
            DataError: the batch has other fields than the batch the path was chosen on.
        """
        if isinstance(inputs, PackedBatch):
            batch = inputs
        elif (packed := packed_or_none(inputs)) is not None:
            batch = packed
        else:
            # The one thing that exists only under padding: a first token predicted from the padding before it.
            padded_loss: Tensor = model(**inputs, num_items_in_batch=num_items).loss
            return padded_loss
        loss_sum = self._chunked(model, batch) if self.head == CHUNKED else self._model_logits(model, batch)
        return loss_sum / (num_items.to(loss_sum.device) if isinstance(num_items, Tensor) else num_items)

    def verified_logits(self, model: nn.Module, batch: PackedBatch, windows_seen: list[int | None]) -> Tensor:
        """`logits`, while the layers of our own are compared with the model's.

        Raises:
            ModelError: they differ.
        """
        weight = causal_model(model).get_input_embeddings().weight
        dtype = (
            torch.get_autocast_dtype(weight.device.type)
            if torch.is_autocast_enabled(weight.device.type)
            else weight.dtype
        )
        with self.switch.packed(), self.plan.verifying(dtype):
            windows: list[int | None] = []
            logits = self.logits(model, batch, windows_seen=windows)
            windows_seen += windows  # without those of the comparison, which follows
            return logits

    def logits(self, model: nn.Module, batch: PackedBatch, *, windows_seen: list[int | None] | None = None) -> Tensor:
        """The model's own logits of every packed token: (T, V)."""
        outputs = self._forward(model, batch, self._segments(batch, windows_seen))
        logits_TV: Tensor = outputs.logits[0]
        return logits_TV

    def hidden_states(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        """What the head sees: (T, D)."""
        outputs = self._forward(decoder_of(causal_model(model)), batch, self._segments(batch))
        hidden_TD: Tensor = outputs[0][0]
        return hidden_TD

    def _segments(self, batch: PackedBatch, windows_seen: list[int | None] | None = None) -> Segments:
        """Samples of one length are attended as a batch once that shape has come before: its kernel is made only then."""
        batched = False
        if (
            self.kernel in FIXED_SHAPES
            and self.plan.blocks
            and batch.is_even
            and not torch.are_deterministic_algorithms_enabled()
        ):
            self._even_shapes[batch.lengths] += 1
            repeated = [shape for shape, count in self._even_shapes.items() if count > 1]
            batched = batch.lengths in repeated[:MOST_EVEN_SHAPES]
        return batch.segments(self.kernel, batched=batched, windows_seen=windows_seen)

    def _forward(self, module: nn.Module, batch: PackedBatch, segments: Segments, **options: Any) -> Any:
        self.plan.refresh()
        with self.switch.packed(), self.plan.packed():
            return packed_forward(module, batch, segments, **options)

    def _chunked(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        hidden_ND = self.hidden_states(model, batch)[batch.predicting]
        head = read_head(causal_model(model))
        return linear_cross_entropy(
            hidden_ND,
            head.weight,
            batch.targets,
            bias_V=head.bias,
            softcap=head.softcap,
            scale=head.scale,
            weights_N=batch.weights,
        )

    def _model_logits(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        keeps = "logits_to_keep" in inspect.signature(causal_model(model).forward).parameters
        options = {"logits_to_keep": batch.predicting} if keeps else {}
        logits = self._forward(model, batch, self._segments(batch), **options).logits[0]
        logits_NV = logits if keeps else logits[batch.predicting]
        return functional.cross_entropy(logits_NV.float(), batch.targets, reduction="sum")


def choose_path(
    model: nn.Module,
    *,
    fast_path: bool,
    overridden: tuple[str, ...],
    sample_inputs: dict[str, Any],
    training_dtype: torch.dtype | None,
    base_precision: str | None = None,
    why_no_block: str | None = None,
) -> GeneralPath | PackedPath:
    """Decide on the first real batch, once.

    `overridden` names the methods of the trainer that a subclass replaced and that see batches or losses;
    `training_dtype` is the type autocast computes in, None or float32 where the model computes in its own types;
    `base_precision` what frozen products are computed in, `why_no_block` keeps the decoder layers' own forward. Random number generators and the model's train/eval flags are
    left as they were.

    Raises:
        ConfigError: a `base_precision` that this device or this model cannot be trained in.
    """
    if base_precision is None:
        return _first_admitted(model, fast_path, overridden, sample_inputs, training_dtype, None, why_no_block)
    if (reason := device_obstacle(next(model.parameters()).device)) is not None:
        raise ConfigError(f"{reason}; leave it out to train as usual", field="base_precision")
    # First as strictly as without: what is wrong for another reason must not pass as rounding.
    path = _first_admitted(model, fast_path, overridden, sample_inputs, training_dtype, needs_blocks=True)
    if isinstance(path, PackedPath) and path.plan.blocks:
        path.plan.undo()
        path = _first_admitted(
            model, fast_path, overridden, sample_inputs, training_dtype, base_precision, needs_blocks=True
        )
    if isinstance(path, GeneralPath) or not path.plan.blocks:
        reason = "; ".join(path.reasons) if isinstance(path, GeneralPath) else path.plan.why_no_block
        if isinstance(path, PackedPath):
            path.plan.undo()
        raise ConfigError(
            f"{base_precision} needs decoder layers that etude computes itself, and cannot here: {reason}; leave it out "
            "to train as usual",
            field="base_precision",
        )
    return path


def _first_admitted(
    model: nn.Module,
    fast_path: bool,
    overridden: tuple[str, ...],
    sample_inputs: dict[str, Any],
    training_dtype: torch.dtype | None,
    base_precision: str | None = None,
    why_no_block: str | None = None,
    *,
    needs_blocks: bool = False,
) -> GeneralPath | PackedPath:
    if not fast_path:
        return GeneralPath(("the fast path is turned off (fast_path=False)",))
    if overridden:
        return GeneralPath(tuple(f"{name} is overridden and must see padded batches" for name in overridden))
    reasons = missing_capabilities(model, sample_inputs)
    if reasons:
        return GeneralPath(reasons)
    failures: dict[str, None] = {}  # an ordered set
    embedding = causal_model(model).get_input_embeddings().weight
    dtype = training_dtype if training_dtype in HALF_PRECISION else embedding.dtype
    if embedding.device.type == "cpu" and dtype in HALF_PRECISION and not needs_blocks:
        why_no_block = why_no_block or _why_no_block_on_cpu(model)
    for kernel in kernels_for(embedding.device, dtype):
        plan = plan_kernels(
            model, decoder_of(causal_model(model)), dtype, base_precision=base_precision, why_no_block=why_no_block
        )
        while True:
            try:
                return probed_path(model, sample_inputs, kernel=kernel, training_dtype=training_dtype, plan=plan)
            except Exception as error:  # any failure of foreign model code means: train it the way its authors wrote it
                if plan.blocks or plan.mixtures:
                    reason = _first_line(error)
                    plan = plan_kernels(
                        model, decoder_of(causal_model(model)), dtype,
                        why_no_block=reason if plan.blocks else plan.why_no_block,
                        why_no_mixture=reason if plan.mixtures else None,
                    )  # fmt: skip
                    continue
                failures[f"probe of {kernel.replace('_', ' ')} attention: {_first_line(error)}"] = None
                break
    return GeneralPath(tuple(failures))


def _why_no_block_on_cpu(model: nn.Module) -> str | None:
    """Blocks widen every activation to float32 where no kernel does that in registers; bases that must be unpacked for a
    product still gain by them."""
    if any(quantized_kind(module) is not None for module in model.modules()):
        return None
    return "in half precision a CPU is faster so"


def packed_or_none(inputs: dict[str, Tensor]) -> PackedBatch | None:
    """`pack`, for a batch that must look like the first one.

    Raises:
        DataError: it does not.
    """
    if problem := field_problem(inputs):
        raise DataError(f"{problem}, unlike for the first batch; fast_path=False trains on batches of any kind")
    return pack(inputs)


# -- the probe --------------------------------------------------------------------------------------------------------

PROBE_LENGTHS = (16, 10, 6, 8)
"""Tokens of the probe's rows; the last is padded on the left, the others on the right."""


class Tolerances(NamedTuple):
    """Largest admitted root-mean-square differences, relative to the root mean square of the values."""

    logits: float
    leak: float
    loss: float

    def widened(self, rounding: float, num_layers: int) -> Tolerances:
        """For layers that may each differ by `rounding` from the model's own (fp8, 8 bits), and are compared one by one:
        independent errors add up by their squares. Whether samples are apart is asked as strictly as ever."""
        logits = rounding * math.sqrt(num_layers)
        return self._replace(logits=max(self.logits, logits), loss=max(self.loss, rounding / 2))

    def allowing_for(self, difference: float) -> Tolerances:
        """For a model whose own two ways to the same logits are so far apart in half precision."""
        return self._replace(logits=max(self.logits, min(TIMES_ITS_OWN * difference, LARGEST_OF_ITS_OWN)))


TIMES_ITS_OWN, LARGEST_OF_ITS_OWN = 1.25, 0.2
"""Three ways that round independently are about equally far from each other, and a quarter is more than chance makes of it.
Where a model's own are farther apart than a fifth, nothing follows from how far ours is."""

EXACT = Tolerances(logits=1e-4, leak=1e-5, loss=1e-5)
ROUNDED = Tolerances(logits=5e-2, leak=1e-2, loss=2e-2)


def probed_path(
    model: nn.Module, inputs: dict[str, Tensor], *, kernel: str, training_dtype: torch.dtype | None, plan: KernelPlan
) -> PackedPath:
    """The packed path with this attention kernel, the swaps of `plan` and the best head, after it has shown that it
    equals the padded one.

    Raises:
        ModelError: it does not; the message says where.
    """
    probe = probe_batch(inputs)
    batch = pack(probe)
    if batch is None:
        raise ModelError("the probe's own rows cannot be packed")
    weight = causal_model(model).get_input_embeddings().weight
    is_rounded = training_dtype in HALF_PRECISION or weight.dtype in HALF_PRECISION
    tolerances = (ROUNDED if is_rounded else EXACT).widened(plan.rounding, len(plan.blocks))
    path = PackedPath(model, kernel=kernel, head=MODEL_LOGITS, plan=plan)
    try:
        with _at_rest(model), torch.no_grad(), _autocast(weight.device, training_dtype):
            num_items = len(batch.targets)
            padded = model(**probe, num_items_in_batch=num_items)
            padded_logits = padded.logits[probe["attention_mask"] != 0]
            plan.apply()
            windows: list[int | None] = []
            logits = path.verified_logits(model, batch, windows)
            if not relative_difference(logits, padded_logits) <= tolerances.logits:
                # In half precision the model's own attention functions can be further apart than is admitted here (8e-2,
                # Gemma 3 270M): ours may then equal the one that it writes out in products, without our layers, or be no
                # farther from both than they are from each other.
                plan.undo()
                with path.switch.written_out():
                    padded = model(**probe, num_items_in_batch=num_items)
                written_logits = padded.logits[probe["attention_mask"] != 0]
                plan.apply()
                if is_rounded:
                    widened = tolerances.allowing_for(relative_difference(written_logits, padded_logits))
                    if relative_difference(logits, padded_logits) <= widened.logits:
                        tolerances = widened
                padded_logits = written_logits
            _require_equal(logits, padded_logits, tolerances.logits, "packed and padded logits differ")
            _require_windows(windows, decoder_of(causal_model(model)).config)
            _require_isolation(path, model, batch, logits, tolerances.leak)
            path = _with_best_head(path, model, batch, logits, tolerances.leak)
            loss = path.loss(model, batch, num_items)
            _require_equal(loss, padded.loss, tolerances.loss, "packed and padded loss differ")
    except Exception:
        plan.undo()
        raise
    return path


def probe_batch(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """A small padded batch, ragged on both sides, made of the first real tokens of `inputs`."""
    is_real = inputs["attention_mask"] != 0
    num_rows, num_columns = len(PROBE_LENGTHS), max(PROBE_LENGTHS)
    tokens = _first_of(inputs["input_ids"][is_real], sum(PROBE_LENGTHS)).split_with_sizes(list(PROBE_LENGTHS))
    fields = {name: inputs["input_ids"].new_zeros(num_rows, num_columns) for name in inputs}
    fields["labels"].fill_(IGNORED_LABEL)
    for row, row_tokens in enumerate(tokens):
        length = len(row_tokens)
        start = num_columns - length if row == num_rows - 1 else 0
        real = slice(start, start + length)
        fields["input_ids"][row, real] = row_tokens
        fields["attention_mask"][row, real] = 1
        fields["labels"][row, start + 2 : start + length] = row_tokens[2:]
        if "position_ids" in fields:
            fields["position_ids"][row, real] = _first_of(inputs["position_ids"][is_real], length)
    return fields


def _first_of(values: Tensor, count: int) -> Tensor:
    """The first `count` values, from the start again where there are fewer.

    Raises:
        ModelError: there are none.
    """
    if len(values) == 0:
        raise ModelError("the first batch has no real token")
    return values.repeat(-(-count // len(values)))[:count]


def _require_windows(seen: list[int | None], config: Any) -> None:
    """Rows of a probe are shorter than most windows, so what the layers asked for is compared with the config."""
    window, kinds = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    num_layers = config.num_hidden_layers
    expected = [window] * num_layers if kinds is None else [window if "sliding" in kind else None for kind in kinds]
    if seen != expected[:num_layers]:
        raise ModelError(f"layers attended with the windows {seen}, the config says {expected[:num_layers]}")


def _require_isolation(
    path: PackedPath, model: nn.Module, batch: PackedBatch, logits: Tensor, tolerance: float
) -> None:
    """Changing the second sample changes its logits, and nobody else's."""
    start, end = batch.lengths[0], batch.lengths[0] + batch.lengths[1]
    input_ids = batch.input_ids.clone()
    num_words = causal_model(model).get_input_embeddings().num_embeddings
    input_ids[0, start:end] = (input_ids[0, start:end] + 1) % num_words
    changed = path.logits(model, PackedBatch(**(vars(batch) | {"input_ids": input_ids})))
    if torch.equal(changed[start:end], logits[start:end]):
        raise ModelError("the logits of a sample do not depend on its tokens")
    others = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    others[start:end] = False
    _require_equal(changed[others], logits[others], tolerance, "one sample moves the logits of another")


def _with_best_head(
    path: PackedPath, model: nn.Module, batch: PackedBatch, logits: Tensor, tolerance: float
) -> PackedPath:
    """`path` with the chunked head where that gives the model's own logits, else as it is with the reason."""
    obstacle = head_obstacle(model)
    if obstacle is None:
        head = read_head(causal_model(model))
        ours = linear_logits(
            path.hidden_states(model, batch), head.weight, bias_V=head.bias, softcap=head.softcap, scale=head.scale
        )
        if relative_difference(ours, logits) <= tolerance:
            return PackedPath(model, kernel=path.kernel, head=CHUNKED, plan=path.plan)
        obstacle = "the model does more to its logits than its config says"
    return PackedPath(model, kernel=path.kernel, head=MODEL_LOGITS, plan=path.plan, note=obstacle)


def relative_difference(values: Tensor, reference: Tensor) -> float:
    """Root mean square of the difference relative to that of the reference; robust where single experts flip."""
    if values.shape != reference.shape:
        return float("inf")
    wide = torch.promote_types(reference.dtype, torch.float32)
    difference = (values.to(wide) - reference.to(wide)).norm()
    return float(difference / reference.to(wide).norm().clamp_min(1e-30))


def _require_equal(values: Tensor, reference: Tensor, tolerance: float, complaint: str) -> None:
    difference = relative_difference(values, reference)
    if not difference <= tolerance:  # written so that NaN fails
        raise ModelError(f"{complaint} by {difference:.1e} (admitted {tolerance:.0e})")


def _autocast(device: torch.device, dtype: torch.dtype | None) -> AbstractContextManager[Any]:
    return torch.autocast(device.type, dtype=dtype) if dtype in HALF_PRECISION else nullcontext()


@contextmanager
def _at_rest(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and untouched random numbers, module by module as they were before."""
    was_training = {module: module.training for module in model.modules()}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        model.eval()
        try:
            yield
        finally:
            for module, training in was_training.items():
                module.training = training


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
