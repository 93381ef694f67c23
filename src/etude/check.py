"""`Trainer.check`: the first step of a run on the path in force, beside the same step through stock peft.

Both compute the loss and the gradient of one update, of the same rows and in the same precision: once cut, packed and with
our own layers as `train` would do it, once on the collated, padded batches with the model's own forward. Nothing is updated
and nothing is written; model, random numbers, data and trainer are left as they were found.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from etude.check_report import StepCheck, TensorCheck
from etude.cut import AsCollated
from etude.data.loader import TrainingStream
from etude.data.randomness import undisturbed_generators
from etude.errors import ConfigError, DataError, is_out_of_memory
from etude.interrupts import Interrupts
from etude.kernels.quantized import quantized_kind, unpacked, unpacking_obstacle
from etude.model import adapter
from etude.model import loss as model_loss
from etude.model.memory import memory_limit
from etude.model.paths import GeneralPath
from etude.notices import Notices
from etude.observe.amounts import of_bytes
from etude.observe.machine import free_memory_bytes
from etude.observe.throughput import ThroughputCallback
from etude.precision import (
    LossScaler,
    Precision,
    keep_trainable_in_float32,
    trainable_parameters,
    use_number_settings,
)
from etude.run import Run
from etude.trainer import _align_special_tokens, _checkpoint_activations, _is_quantized, _use_settings_for_training

if TYPE_CHECKING:
    from etude.data.batching import MicroBatch
    from etude.trainer import Trainer

TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Admitted relative differences by what is computed in: of every tensor in float32 and float64, of the whole gradient in
half precision, where single small tensors differ by more than that between any two orders of summation."""

TF32_TOLERANCE = 1e-2
"""Where a GPU rounds the factors of float32 products to ten bits, as many as float16 has."""

ROUNDINGS_ADMITTED = 4
"""Times what frozen products in 8 bits are known to differ by; the probe of the path admits as many."""

NEGLIGIBLE = 1e-6
"""A tensor that differs by less than this share of the whole gradient differs by rounding, however small it is itself."""

FLOAT32_SPARE = 1.25
"""The float32 model is made where there is room for so many times its weights."""


def check_step(trainer: Trainer, reference_dtype: Any = None) -> StepCheck:
    """What `Trainer.check` documents."""
    if reference_dtype not in (None, "float32", torch.float32):
        raise ConfigError(f"is 'float32' or None, got {reference_dtype!r}", field="reference_dtype")
    with ExitStack() as until_the_end:
        until_the_end.enter_context(_left_as_found(trainer))
        run = _open_run(trainer, until_the_end)
        path, dtype, collated = trainer.path, _computing_dtype(trainer), run.batches.loaded()
        micro_batches, num_items = run.batches.of_next_step()
        tolerance, is_of_every_tensor = _tolerance(trainer, dtype)
        ours = stock = _compute(trainer, run, micro_batches, num_items)
        trainer._undo_swaps()
        if path.name != "general":
            _take_general_path(trainer, run, collated[0])
            stock = _compute(trainer, run, collated, num_items)
        reference = _compute_in_float32(trainer, run, collated, num_items) if reference_dtype is not None else None
        return StepCheck(
            path=path.name,
            path_reasons=tuple(path.reasons),
            precision=str(dtype).removeprefix("torch."),
            micro_batches=len(micro_batches),
            num_items=num_items,
            loss=ours.loss,
            stock_loss=stock.loss,
            reference_loss=None if reference is None else reference.loss,
            tensors=_compared(ours, stock, reference),
            gradient_error=_whole_error(ours, stock),
            reference_errors=None
            if reference is None
            else tuple(_whole_error(one, reference) for one in (ours, stock)),
            tolerance=tolerance,
            is_of_every_tensor=is_of_every_tensor,
            notes=tuple(line for line in trainer.notices.lines if not line.startswith(f"{path.name} path:")),
        )


# -- the step ---------------------------------------------------------------------------------------------------------


class Computed(NamedTuple):
    """The loss of a step, and its gradients by name: float32 on the CPU, zero where a tensor got none."""

    loss: float
    gradients: dict[str, Tensor]


class FixedLossScaler(LossScaler):
    """One scale for a float16 step, small enough not to overflow: the dynamic one finds its own over the first steps."""

    factor = 2.0**10
    tolerates_overflow = True  # as with the dynamic one, whose path is to be checked

    def scale(self, loss: Tensor) -> Tensor:
        return loss * self.factor

    def unscale(self, optimizer: torch.optim.Optimizer) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.div_(self.factor)


def _open_run(trainer: Trainer, until_the_end: ExitStack) -> Run:
    """The run that `train` would start, with its first step loaded and its path chosen, without a folder of its own."""
    args, model = trainer.args, trainer.model
    if isinstance(trainer.train_dataset, Iterator):
        raise DataError(
            "the train_dataset is an iterator: the check would use up its first rows. Give an object that can be iterated "
            "anew"
        )
    if trainer.train_dataset is None and type(trainer).get_train_dataloader.__module__.startswith("etude."):
        raise DataError("the trainer has no train_dataset")
    adapter.require_trainable(model)
    if trainer.precision.autocast_dtype is not None:
        keep_trainable_in_float32(model)
    _use_settings_for_training(model, args, until_the_end)
    _align_special_tokens(model, trainer.processing_class)
    trainer.model_wrapped = trainer._wrap_model(model)
    use_number_settings(args, until_the_end)
    until_the_end.enter_context(memory_limit(args.device, args.gpu_memory_limit_gib))
    trainer.state = trainer._fresh_state()
    trainer.path, trainer.graphs, trainer.cut, trainer._run = None, None, {}, None
    trainer.is_in_train = True
    _use_optimizer_without_state(trainer)

    loader = trainer.get_train_dataloader()
    stream = TrainingStream(loader, args.data_seed if args.data_seed is not None else args.seed)
    for generator in stream._generators().values():
        until_the_end.callback(generator.set_state, generator.get_state())
    until_the_end.callback(stream.close, also_persistent=True)
    batches, plan = trainer._build_batches(stream), trainer._plan(loader)
    scaler = FixedLossScaler() if trainer.precision.scales_loss else LossScaler()
    interrupts = Interrupts(Path(trainer._get_output_dir(None)))  # never entered: signals do what they always do
    gradient = trainer._build_gradient(batches, scaler)
    run = Run(trainer, plan, batches, gradient, scaler, interrupts, trial=None, ignore_keys_for_eval=None)
    trainer._run = run
    until_the_end.callback(trainer._undo_swaps)
    run.load_first_step()
    return run


def _use_optimizer_without_state(trainer: Trainer) -> None:
    """Stands in for the one of the run: an optimizer may move weights when training begins, and is not to be asked."""
    trainer.optimizer = torch.optim.SGD(list(trainable_parameters(trainer.model)), lr=0.0)


def _take_general_path(trainer: Trainer, run: Run, first: MicroBatch) -> None:
    trainer.path, trainer.graphs = GeneralPath(()), None
    trainer.cutter = AsCollated(trainer.shifts_labels)
    if trainer._divides_by_items is None:
        inputs, autocast = trainer._prepare_inputs(first.inputs), trainer.precision.autocast()
        trainer._divides_by_items = model_loss.divides_by_num_items(trainer.model, inputs, autocast)
    run.gradient = trainer._build_gradient(run.batches, run.scaler)


def _compute(trainer: Trainer, run: Run, micro_batches: list[MicroBatch], num_items: int | None) -> Computed:
    """Forward and backward of the whole step on the path that the trainer has now."""
    _switch_dropout_off(trainer.model)
    loss = run.gradient.zero()
    for micro_batch in micro_batches:
        loss += run.gradient.accumulate(micro_batch, num_items)
    run.scaler.unscale(trainer.optimizer)
    gradients = {
        name: torch.zeros(p.shape) if p.grad is None else p.grad.detach().to("cpu", torch.float32, copy=True)
        for name, p in trainer.model.named_parameters()
        if p.requires_grad
    }
    for parameter in trainer.model.parameters():
        parameter.grad = None
    return Computed(float(loss), gradients)


def _switch_dropout_off(model: nn.Module) -> None:
    """Evaluation mode, except for layers that recompute their activations, which do so in training mode only."""
    model.eval()
    for module in model.modules():
        if getattr(module, "gradient_checkpointing", False) is True:
            module.training = True
    model.training = True  # what `training_step` looks at; it would switch all of it to training


def _compute_in_float32(
    trainer: Trainer, run: Run, collated: list[MicroBatch], num_items: int | None
) -> Computed | None:
    """The step through a float32 copy of the model; None, with the reason among the notices, where that cannot be."""
    model, device = trainer.model, trainer.args.device
    packed = [module for module in model.modules() if quantized_kind(module) is not None]
    obstacle = _why_no_float32_copy(trainer, packed)
    if obstacle is not None:
        trainer.notices.say(f"no float32 reference: {obstacle}")
        return None
    sizes = [parameter.numel() for parameter in model.parameters()] + [m.in_features * m.out_features for m in packed]
    needed = int(4 * FLOAT32_SPARE * sum(sizes))
    free = free_memory_bytes(device)
    if free is not None and free < needed:
        trainer.notices.say(f"no float32 reference: it takes {of_bytes(needed)}, and {of_bytes(free)} are free")
        return None
    try:
        with _exact_float32():
            _take_general_path(trainer, run, collated[0])
            trainer.model = trainer.model_wrapped = _float32_copy(model)
            trainer.precision = Precision("fp32", device.type, None, scales_loss=False)
            run.scaler = LossScaler()
            _use_optimizer_without_state(trainer)
            run.gradient = trainer._build_gradient(run.batches, run.scaler)
            computed = _compute_where_it_fits(trainer, run, collated, num_items)
            if computed is None and _recompute_layers(trainer.model):  # the same numbers, in less memory
                computed = _compute_where_it_fits(trainer, run, collated, num_items)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        computed = None
    if computed is None:
        trainer.notices.say("no float32 reference: memory ran out")
    return computed


def _why_no_float32_copy(trainer: Trainer, packed: list[Any]) -> str | None:
    if trainer.is_model_parallel:
        return "the base lies on several devices"
    if _is_quantized(model_loss.unwrapped(trainer.model)) and not packed:
        return "the base is quantised, but not by bitsandbytes"
    return next(filter(None, map(unpacking_obstacle, packed)), None)


def _float32_copy(model: nn.Module) -> nn.Module:
    """The model with float32 weights; those in 4 or 8 bits are unpacked."""
    instead = {id(module): unpacked(module) for module in model.modules() if quantized_kind(module) is not None}
    # Transformers' own `float` refuses models that were quantised.
    return nn.Module.float(copy.deepcopy(model, instead))


def _compute_where_it_fits(
    trainer: Trainer, run: Run, micro_batches: list[MicroBatch], num_items: int | None
) -> Computed | None:
    try:
        return _compute(trainer, run, micro_batches, num_items)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def _recompute_layers(model: Any) -> bool:
    """Turn gradient checkpointing on; whether that makes a difference."""
    base = model_loss.unwrapped(model)
    is_on = any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    if is_on or not getattr(base, "supports_gradient_checkpointing", False):
        return False
    _checkpoint_activations(base, {"use_reentrant": False})
    return True


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Products of float32 without TF32."""
    matmul = torch.backends.cuda.matmul
    was, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        yield
    finally:
        matmul.allow_tf32 = was


# -- the comparison ---------------------------------------------------------------------------------------------------


def _compared(ours: Computed, stock: Computed, reference: Computed | None) -> tuple[TensorCheck, ...]:
    """Every tensor, worst first; those that differ by rounding alone come last."""
    whole = math.sqrt(sum(_norm(gradient) ** 2 for gradient in stock.gradients.values()))
    tensors = []
    for name, expected in stock.gradients.items():
        gradient = ours.gradients[name]
        difference = _norm(gradient, expected)
        error = _relative(difference, _norm(expected))
        check = TensorCheck(
            name=name,
            error=error,
            cosine=_cosine(gradient, expected),
            norm=_norm(expected),
            is_rounding=error > TOLERANCES[torch.float32] and difference <= NEGLIGIBLE * whole,
        )
        if reference is not None:
            truth = reference.gradients[name]
            errors = tuple(_relative(_norm(one, truth), _norm(truth)) for one in (gradient, expected))
            check = replace(check, reference_errors=errors)
        tensors.append(check)
    return tuple(sorted(tensors, key=lambda tensor: (tensor.is_rounding, -tensor.error)))


def _whole_error(computed: Computed, expected: Computed) -> float:
    pairs = [(gradient, expected.gradients[name]) for name, gradient in computed.gradients.items()]
    difference = math.sqrt(sum(_norm(*pair) ** 2 for pair in pairs))
    return _relative(difference, math.sqrt(sum(_norm(gradient) ** 2 for _, gradient in pairs)))


def _norm(values: Tensor, subtracted: Tensor | None = None) -> float:
    wide = values.double()
    return float((wide if subtracted is None else wide - subtracted.double()).norm())


def _relative(difference: float, size: float) -> float:
    """difference / size; 0 where both are zero (an untrained adapter has A with a zero gradient), and never NaN."""
    if difference == 0:
        return 0.0
    return difference / size if size > 0 and math.isfinite(difference / size) else math.inf


def _cosine(gradient: Tensor, expected: Tensor) -> float:
    sizes = _norm(gradient) * _norm(expected)
    if sizes == 0:
        return 1.0 if _norm(gradient) == _norm(expected) else 0.0
    return float(gradient.double().flatten() @ expected.double().flatten()) / sizes


def _computing_dtype(trainer: Trainer) -> torch.dtype:
    """What products are computed in: the type of autocast, else that of the weights."""
    if trainer.precision.autocast_dtype is not None:
        return trainer.precision.autocast_dtype
    return next((p.dtype for p in trainer.model.parameters() if p.is_floating_point()), torch.float32)


def _tolerance(trainer: Trainer, dtype: torch.dtype) -> tuple[float, bool]:
    """The admitted difference, and whether it is that of every tensor (else of the whole gradient)."""
    tolerance, is_of_every_tensor = TOLERANCES.get(dtype, TOLERANCES[torch.bfloat16]), dtype.itemsize >= 4
    if dtype == torch.float32 and trainer.args.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32:
        tolerance, is_of_every_tensor = TF32_TOLERANCE, False
    rounding = trainer.path.plan.rounding if trainer.path.name != "general" else 0.0
    if rounding > 0:
        tolerance, is_of_every_tensor = max(tolerance, ROUNDINGS_ADMITTED * rounding), False
    return tolerance, is_of_every_tensor


# -- leaving everything as it was -------------------------------------------------------------------------------------


@contextmanager
def _left_as_found(trainer: Trainer) -> Iterator[None]:
    """Put the trainer's attributes, the model and all random numbers back, whatever happens inside."""
    attributes, model = dict(vars(trainer)), trainer.model
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    values = [(parameter, parameter.data) for parameter in trainable_parameters(model)]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    objects = _kept(model)
    for parameter, _ in gradients:
        parameter.grad = None  # what lies there belongs to the user, and is not to be added to
    trainer.notices, trainer.throughput = Notices(quiet=True), ThroughputCallback()
    try:
        with undisturbed_generators(), torch.random.fork_rng(devices=devices):
            yield
    finally:
        for parameter, tensor in values:
            parameter.data = tensor
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for live, as_found in objects:
            live.clear()
            live.update(as_found)
        vars(trainer).clear()
        vars(trainer).update(attributes)


def _kept(model: nn.Module) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The dictionaries that a model consists of beside its tensors, and a copy of each: attributes of modules (train or
    evaluate, activation checkpointing), their hooks, their buffers, and their configs."""
    owners: dict[int, Any] = {}
    for module in model.modules():
        owners[id(module)] = module
        for name in ("config", "generation_config"):
            config = getattr(module, name, None)
            parts = [config, *vars(config).values()] if hasattr(config, "__dict__") else []
            owners |= {id(part): part for part in parts if part is config or type(part).__name__.endswith("Config")}
    live = [vars(owner) for owner in owners.values()]
    live += [value for attributes in live for value in attributes.values() if isinstance(value, dict)]
    return [(dictionary, dict(dictionary)) for dictionary in live]
