"""What every group of hooks can rely on: the parts that `Trainer` puts together, and calling an overridden method."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from etude.accelerator_view import AcceleratorView
    from etude.arguments import TrainingArguments
    from etude.callbacks import CallbackHandler, TrainerControl, TrainerState
    from etude.cut import AsCollated, Packed
    from etude.model.graphs import GraphedLoss
    from etude.notices import Notices
    from etude.observe.memory import MemoryUse
    from etude.observe.throughput import ThroughputCallback
    from etude.precision import Precision
    from etude.run import Run


class Composition:
    """The attributes of a trainer. `Trainer.__init__` sets every one of them."""

    args: TrainingArguments
    model: Any
    model_wrapped: Any
    """The model as the loop calls it; the same object as `model` in a single process."""
    processing_class: Any
    data_collator: Any
    train_dataset: Any
    eval_dataset: Any
    model_init: Callable[..., nn.Module] | None
    compute_loss_func: Callable[..., torch.Tensor] | None
    compute_metrics: Callable[..., dict[str, Any]] | None
    preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None
    optimizer: Any
    optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None
    lr_scheduler: Any
    state: TrainerState
    control: TrainerControl
    callback_handler: CallbackHandler
    notices: Notices
    throughput: ThroughputCallback
    precision: Precision
    is_in_train: bool
    is_model_parallel: bool
    place_model_on_device: bool

    accelerator: AcceleratorView
    label_smoother: Any
    """(outputs, labels, shift_labels, num_items_in_batch) -> loss; None where labels are not smoothed."""
    neftune_noise_alpha: float | None
    is_last_micro_batch: bool
    """Whether the micro-batch in hand is the last of its step."""
    memory: MemoryUse

    label_names: list[str]
    can_return_loss: bool
    model_accepts_loss_kwargs: bool
    shifts_labels: bool
    loss_is_scaled_for_ga: bool | None
    current_gradient_accumulation_steps: int
    overridden: tuple[str, ...]
    """Overridden methods that see batches or losses, so that the general path is taken."""
    path: Any
    """How a micro-batch is computed; None until the first one has been seen."""
    graphs: GraphedLoss | None
    """Forward and backward by CUDA graph, where that is on."""
    cutter: AsCollated | Packed
    """Cuts the batches of a step into micro-batches."""
    cut: dict[str, Any]
    """How a step is cut into micro-batches, as recorded in checkpoints."""
    run_record: dict[str, Any]
    """What a checkpoint records of the run."""
    current_flos: float

    _run: Run | None
    _divides_by_items: bool | None
    _given_optimizer: bool
    _given_scheduler: bool
    _signature_columns: list[str] | None
    _persistent_loaders: list[tuple[Any, Any]]
    """(evaluation dataset, its loader), where loader processes outlive an evaluation."""
    _flops_per_token: int
    _tr_loss: torch.Tensor
    _total_loss_scalar: float
    _globalstep_last_logged: int
    _initial_num_input_tokens_seen: int

    if TYPE_CHECKING:  # methods of one group that another calls

        def log(self, logs: dict[str, float], start_time: float | None = None) -> None: ...
        def store_flos(self) -> None: ...
        def get_eval_dataloader(self, eval_dataset: Any = None) -> Any: ...
        def get_test_dataloader(self, test_dataset: Any) -> Any: ...
        def _tells_overrides_items(self) -> bool: ...
        def compute_loss_context_manager(self) -> AbstractContextManager[Any]: ...
        def _prepare_inputs(self, inputs: Any) -> Any: ...
        def choose_path(self, inputs: Any) -> None: ...
        def build_graphs(self) -> Any: ...
        def build_compile_switch(self, max_steps: int) -> Any: ...
        def items_tensor(self, num_items: int | None) -> torch.Tensor | None: ...
        def compute_loss(
            self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any: ...
        def _get_learning_rate(self) -> float: ...
        def _stateful_callbacks(self) -> list[Any]: ...
        def _report_to_hp_search(self, trial: Any, step: int, metrics: dict[str, float]) -> None: ...
        def train(self, resume_from_checkpoint: str | bool | None = None, trial: Any = None) -> Any: ...
        def evaluate(self, eval_dataset: Any = None, ignore_keys: list[str] | None = None) -> dict[str, float]: ...
        def _evaluate(
            self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
        ) -> dict[str, float]: ...
        def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool: ...
        def _save_checkpoint(self, model: nn.Module, trial: Any) -> None: ...
        def is_local_process_zero(self) -> bool: ...
        def is_world_process_zero(self) -> bool: ...

    def call_hook(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Call a method that a subclass may have overridden, with those keyword arguments that it accepts."""
        return method(*args, **{name: value for name, value in kwargs.items() if accepts(method, name)})

    @property
    def schedule_follows_metric(self) -> bool:
        """Whether the learning rate is stepped at evaluations, not at updates."""
        return isinstance(self.lr_scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau) or (
            type(self.lr_scheduler).__name__ == "GreedyLR"
        )


def is_overridden(trainer: Composition, name: str) -> bool:
    """Whether a subclass, or an assignment on the instance, replaced etude's own method."""
    from etude.trainer import Trainer

    return getattr(type(trainer), name, None) is not getattr(Trainer, name, None) or name in vars(trainer)


def accepts(method: Callable[..., Any], name: str) -> bool:
    """Whether `method` can be called with the keyword `name`."""
    names, takes_any = _keywords_of(getattr(method, "__func__", method))
    return takes_any or name in names


@functools.lru_cache(maxsize=256)
def _keywords_of(function: Callable[..., Any]) -> tuple[frozenset[str], bool]:
    """The parameter names of a function, and whether it takes any other; asked several times a step, found out once."""
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return frozenset(parameters), takes_any


def as_tuple(inputs: Any) -> tuple[Any, ...]:
    return tuple(inputs) if isinstance(inputs, (list, tuple)) else (inputs,)


def plain_number(value: Any) -> float | int | None:
    """A count as a Python number, whole where it is whole; tensors and NumPy scalars are read."""
    if value is None:
        return None
    number = value.item() if hasattr(value, "item") else value
    return int(number) if float(number).is_integer() else float(number)


def speed_metrics(prefix: str, seconds: float, num_samples: float, num_steps: int) -> dict[str, float]:
    """`{prefix}_runtime` in seconds, `{prefix}_samples_per_second` and `{prefix}_steps_per_second`."""
    metrics = {f"{prefix}_runtime": round(seconds, 4)}
    if seconds > 0:
        metrics[f"{prefix}_samples_per_second"] = round(num_samples / seconds, 3)
        metrics[f"{prefix}_steps_per_second"] = round(num_steps / seconds, 3)
    return metrics
