"""What a run tells its listeners, and what they may ask of it: events, state, control flags, the built-in callbacks.

A callback gets `(args, state, control, **kwargs)` at every event and may set flags of `control`; the loop acts on them at
fixed places (the pseudocode of `TrainerCallback`). Callbacks written for `transformers` run unchanged: nothing here asks
for a base class.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from etude.arguments import TrainingArguments

logger = logging.getLogger(__name__)


class ExportableState:
    """Something whose state goes into a checkpoint as plain JSON: constructor arguments, and attributes set afterwards."""

    def state(self) -> dict[str, Any]:
        """`{"args": {constructor arguments}, "attributes": {what has changed since}}`."""
        raise NotImplementedError(f"{type(self).__name__} must define state() -> {{'args': ..., 'attributes': ...}}")

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Any:
        """An instance in the state that `state()` gave."""
        instance = cls(**state["args"])
        for name, value in state["attributes"].items():
            setattr(instance, name, value)
        return instance


@dataclass
class TrainerState:
    """Where a run is. Written into every checkpoint as `trainer_state.json`.

    A step is an optimizer step: one update, however many micro-batches it takes. `epoch` is a fraction (2.5: in the middle
    of the third). `logging_steps`, `eval_steps` and `save_steps` are absolute numbers here, also where the arguments give
    them as a share of the run.

    `best_metric` is None in a run that has not evaluated, +inf (-inf where greater is better) while the first evaluation
    is being judged, and the best value since. JSON has no infinity: it is written as null and comes back as None.
    """

    epoch: float = 0
    global_step: int = 0
    max_steps: int = 0
    logging_steps: int = 500
    eval_steps: int = 500
    save_steps: int = 500
    train_batch_size: int | None = None
    num_train_epochs: int = 0
    num_input_tokens_seen: int = 0
    total_flos: float = 0
    log_history: list[dict[str, Any]] = field(default_factory=list)
    best_metric: float | None = None
    best_global_step: int | None = None
    best_model_checkpoint: str | None = None
    is_local_process_zero: bool = True
    is_world_process_zero: bool = True
    is_hyper_param_search: bool = False
    trial_name: str | None = None
    trial_params: dict[str, Any] | None = None
    stateful_callbacks: Any = field(default_factory=dict)
    """Class name -> state, or a list of states where a class occurs more than once. May be given as the callbacks."""

    def __post_init__(self) -> None:
        self.log_history = [] if self.log_history is None else self.log_history
        if not isinstance(self.stateful_callbacks, dict):
            self.stateful_callbacks = _states_by_class_name(self.stateful_callbacks or ())

    def save_to_json(self, json_path: str | Path) -> None:
        """Write all fields as valid JSON; numbers that are not finite become null."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        text = json.dumps(_json_value(fields), indent=2, sort_keys=True, allow_nan=False)
        Path(json_path).write_text(text + "\n", encoding="utf-8")

    def as_written(self) -> TrainerState:
        """A copy with what `save_to_json` would write now, whatever becomes of this one."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        log = [_copy_of_row(row) for row in fields.pop("log_history")]
        return dataclasses.replace(self, log_history=log, **_json_value(fields))

    @classmethod
    def load_from_json(cls, json_path: str | Path) -> TrainerState:
        """Read what `save_to_json`, here or in transformers, has written. Fields of other versions are left out.

        Raises:
            CheckpointError: the file is not the JSON of a trainer state.
        """
        try:
            content = json.loads(Path(json_path).read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise CheckpointError(f"is damaged ({error}); resume from an older checkpoint", path=json_path) from error
        if not isinstance(content, dict):
            raise CheckpointError("is not a trainer state; resume from an older checkpoint", path=json_path)
        known = {f.name for f in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in content.items() if name in known})

    def compute_steps(self, args: TrainingArguments, max_steps: int) -> None:
        """Take over the logging, evaluation and save intervals; a value below 1 is a share of `max_steps`."""
        for name in ("logging_steps", "eval_steps", "save_steps"):
            interval = getattr(args, name)
            if interval is not None:
                setattr(self, name, math.ceil(max_steps * interval) if interval < 1 else interval)

    def init_training_references(self, trainer: Any, max_steps: int, num_train_epochs: int, trial: Any) -> None:
        """Take over what the trainer knows when training begins. `trial` is one of a hyper-parameter search, or None."""
        hp_name, running_trial = getattr(trainer, "hp_name", None), getattr(trainer, "_trial", None)
        if hp_name is not None and running_trial is not None:
            self.trial_name = hp_name(running_trial)
        self.trial_params = None if trial is None else dict(getattr(trial, "params", trial))
        self.max_steps = max_steps
        self.num_train_epochs = num_train_epochs
        self.is_local_process_zero = trainer.is_local_process_zero()
        self.is_world_process_zero = trainer.is_world_process_zero()


@dataclass
class TrainerControl(ExportableState):
    """What callbacks ask of the loop. The loop clears a flag when it has acted on it, or when its scope begins anew."""

    should_training_stop: bool = False
    """Stop after this step. Cleared when training begins."""
    should_epoch_stop: bool = False
    """Go on with the next epoch. Cleared when an epoch begins."""
    should_save: bool = False
    """Write a checkpoint after this step. Cleared when a step begins, and by the save."""
    should_evaluate: bool = False
    """Evaluate after this step. Cleared when a step begins, and by the evaluation."""
    should_log: bool = False
    """Log after this step. Cleared when a step begins, and by the log."""

    def _new_training(self) -> None:
        self.should_training_stop = False

    def _new_epoch(self) -> None:
        self.should_epoch_stop = False

    def _new_step(self) -> None:
        self.should_save = self.should_evaluate = self.should_log = False

    def state(self) -> dict[str, Any]:
        return {"args": dataclasses.asdict(self), "attributes": {}}


class TrainerCallback:
    """Base of callbacks: every event does nothing until it is overridden. The events, where the loop fires them:

        on_init_end                                   # the trainer is constructed
        on_train_begin
        for each epoch:
            on_epoch_begin
            for each step:
                on_step_begin
                for each micro-step but the last:     # gradient_accumulation_steps, however the batch is really cut
                    on_substep_end
                on_pre_optimizer_step                 # gradients complete and clipped, in p.grad
                on_optimizer_step                     # weights updated, gradients still there
                on_step_end                           # state.global_step and state.epoch have advanced
                if control.should_log:       on_log
                if control.should_evaluate:  on_prediction_step per batch, on_log, on_evaluate
                if control.should_save:      on_save
            on_epoch_end                              # then log, evaluate and save as after a step
        on_log                                        # the summary of the run
        on_train_end

    `on_predict` follows `Trainer.predict`, `on_push_begin` precedes an upload to the hub.

    `kwargs` has `model`, `processing_class` (also as `tokenizer`), `optimizer`, `lr_scheduler`, `train_dataloader` and
    `eval_dataloader`; `metrics` at `on_evaluate` and `on_predict`; `logs` at `on_log`. An event may return the control, or
    None for the one it was given.
    """

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The trainer is constructed."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Training begins, or goes on after a resume."""

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Training is over; the best model is loaded where that was asked for."""

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A pass over the data begins."""

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A pass over the data is over; flags set here are honoured."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A step begins; `state.global_step` counts the steps before it."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The gradients of the step are complete and clipped; the weights are the old ones."""

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """The weights are updated; the gradients are still there."""

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A micro-step of gradient accumulation other than the last of its step is done."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A step is done and counted; flags set here are honoured."""

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """An evaluation is done and logged; `state.best_metric` is still that of the evaluations before."""

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **kwargs: Any) -> Any:
        """A prediction is done."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """A checkpoint is written."""

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """`logs` has been appended to `state.log_history`."""

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """One batch of an evaluation or a prediction is done."""

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """An upload to the hub is about to begin."""


class CallbackHandler(TrainerCallback):
    """Fires an event at every callback, in the order in which they were added, and clears the flags that it uses up."""

    def __init__(
        self, callbacks: Iterable[Any], model: Any, processing_class: Any, optimizer: Any, lr_scheduler: Any
    ) -> None:
        self.callbacks: list[Any] = []
        self.first: list[Any] = []
        """Listeners of etude's own that go before all callbacks, and are none to whoever looks at these."""
        self.last: list[Any] = []
        """Those that see what the callbacks have made of an event."""
        self.model, self.processing_class = model, processing_class
        self.optimizer, self.lr_scheduler = optimizer, lr_scheduler
        self.train_dataloader: Any = None
        self.eval_dataloader: Any = None
        for callback in callbacks:
            self.add_callback(callback)
        names = {base.__name__ for callback in self.callbacks for base in type(callback).__mro__}
        if "DefaultFlowCallback" not in names:  # that of transformers does as well
            logger.warning(
                "there is no DefaultFlowCallback: nothing is logged, evaluated or saved unless a callback asks"
            )

    def add_callback(self, callback: Any) -> None:
        """Append a callback, given as an instance or as a class to be constructed without arguments."""
        instance = callback() if isinstance(callback, type) else callback
        if type(instance) in map(type, self.callbacks):
            logger.warning(f"a second {type(instance).__name__} is added; both will be called")
        self.callbacks.append(instance)

    def pop_callback(self, callback: Any) -> Any:
        """Take out and return the first callback that is `callback` or of that class; None where there is none."""
        for members in (self.callbacks, self.first, self.last):
            for present in members:
                if _is_the_one(present, callback):
                    members.remove(present)
                    return present
        return None

    def remove_callback(self, callback: Any) -> None:
        """As `pop_callback`, without the answer."""
        self.pop_callback(callback)

    def listeners(self, event: str) -> list[Any]:
        """The callbacks that do something at `event`: they have more than the empty method of their base class."""
        return [callback for callback in self.callbacks if not _is_empty(getattr(callback, event, None), event)]

    @property
    def callback_list(self) -> str:
        """The class names, one a line."""
        return "\n".join(type(callback).__name__ for callback in self.callbacks)

    def call_event(self, event: str, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Call the method named `event` of every callback that has it; the control that the last one left."""
        for callback in [*self.first, *self.callbacks, *self.last]:
            method = getattr(callback, event, None)
            if method is None:
                continue
            answer = method(
                args,
                state,
                control,
                model=self.model,
                processing_class=self.processing_class,
                tokenizer=self.processing_class,
                optimizer=self.optimizer,
                lr_scheduler=self.lr_scheduler,
                train_dataloader=self.train_dataloader,
                eval_dataloader=self.eval_dataloader,
                **kwargs,
            )
            control = control if answer is None else answer
        return control

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self.call_event("on_init_end", args, state, control, **kwargs)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = False
        return self.call_event("on_train_begin", args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self.call_event("on_train_end", args, state, control, **kwargs)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_epoch_stop = False
        return self.call_event("on_epoch_begin", args, state, control, **kwargs)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self.call_event("on_epoch_end", args, state, control, **kwargs)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_log = control.should_evaluate = control.should_save = False
        return self.call_event("on_step_begin", args, state, control, **kwargs)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self.call_event("on_pre_optimizer_step", args, state, control, **kwargs)

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self.call_event("on_optimizer_step", args, state, control, **kwargs)

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self.call_event("on_substep_end", args, state, control, **kwargs)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self.call_event("on_step_end", args, state, control, **kwargs)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> Any:
        control.should_evaluate = False
        return self.call_event("on_evaluate", args, state, control, metrics=metrics, **kwargs)

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> Any:
        return self.call_event("on_predict", args, state, control, metrics=metrics, **kwargs)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_save = False
        return self.call_event("on_save", args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> Any:
        control.should_log = False
        return self.call_event("on_log", args, state, control, logs=logs, **kwargs)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self.call_event("on_prediction_step", args, state, control, **kwargs)

    def on_push_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        return self.call_event("on_push_begin", args, state, control, **kwargs)


class DefaultFlowCallback(TrainerCallback):
    """Turns the arguments' intervals into flags: when to log, evaluate, save and stop.

    The last step of a run is evaluated and saved too where the strategy is "steps", so that no run ends unsaved.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        step, is_last = state.global_step, state.global_step >= state.max_steps
        if args.logging_strategy == "steps" and step % state.logging_steps == 0:
            control.should_log = True
        if args.logging_first_step and step == 1:
            control.should_log = True
        if args.eval_strategy == "steps" and step >= args.eval_delay and (step % state.eval_steps == 0 or is_last):
            control.should_evaluate = True
        on_interval = state.save_steps > 0 and step % state.save_steps == 0
        if args.save_strategy == "steps" and (on_interval or is_last):
            control.should_save = True
        if is_last:
            control.should_training_stop = True
        return control

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if args.logging_strategy == "epoch":
            control.should_log = True
        if args.eval_strategy == "epoch" and state.epoch >= args.eval_delay:
            control.should_evaluate = True
        if args.save_strategy == "epoch":
            control.should_save = True
        return control


class EarlyStoppingCallback(TrainerCallback, ExportableState):
    """Stops training when the metric of the best model has not improved for some evaluations.

    Args:
        early_stopping_patience: evaluations in a row without improvement after which training stops.
        early_stopping_threshold: what an improvement must exceed to count, in units of the metric.

    The metric is `args.metric_for_best_model` ("loss" where that is not set). How long it has been waiting is part of every
    checkpoint.
    """

    def __init__(self, early_stopping_patience: int = 1, early_stopping_threshold: float | None = 0.0) -> None:
        self.early_stopping_patience = early_stopping_patience
        self.early_stopping_threshold = early_stopping_threshold
        self.early_stopping_patience_counter = 0

    def check_metric_value(self, args: Any, state: Any, control: Any, metric_value: float) -> None:
        """Count an evaluation without improvement, or start counting anew."""
        best = state.best_metric
        gain = 0.0 if best is None else (metric_value - best if args.greater_is_better else best - metric_value)
        if best is None or gain > (self.early_stopping_threshold or 0.0):
            self.early_stopping_patience_counter = 0
        else:
            self.early_stopping_patience_counter += 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if args.eval_strategy == "no":
            raise ConfigError("EarlyStoppingCallback needs evaluations: 'steps' or 'epoch'", field="eval_strategy")
        if not args.load_best_model_at_end:
            logger.warning("early stopping without load_best_model_at_end=True: the run ends with its last weights")
        if state.global_step > 0 and self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True  # a run that had stopped already was resumed

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> Any:
        name = args.metric_for_best_model or "loss"
        name = name if name.startswith("eval_") else f"eval_{name}"
        value = (metrics or {}).get(name)
        if value is None:
            logger.warning("early stopping found no '%s' among the metrics; this evaluation is not counted", name)
            return
        self.check_metric_value(args, state, control, value)
        if self.early_stopping_patience_counter >= self.early_stopping_patience:
            control.should_training_stop = True

    def state(self) -> dict[str, Any]:
        return {
            "args": {
                "early_stopping_patience": self.early_stopping_patience,
                "early_stopping_threshold": self.early_stopping_threshold,
            },
            "attributes": {"early_stopping_patience_counter": self.early_stopping_patience_counter},
        }


def _is_empty(method: Any, event: str) -> bool:
    """Whether there is no method, or the one of `TrainerCallback`, here or in transformers."""
    function = getattr(method, "__func__", None)
    bases = ("etude.callbacks", "transformers.trainer_callback")
    is_of_a_base = (
        getattr(function, "__qualname__", None) == f"TrainerCallback.{event}" and function.__module__ in bases
    )
    return method is None or is_of_a_base


def _is_the_one(present: Any, wanted: Any) -> bool:
    """Whether a callback is the wanted instance, or of the wanted class.

    Scripts say `trainer.remove_callback(transformers.PrinterCallback)`: a class of transformers also stands for ours of the
    same name.
    """
    if not isinstance(wanted, type):
        return bool(present is wanted or present == wanted)
    if isinstance(present, wanted):
        return True
    from_transformers = wanted.__module__.split(".")[0] == "transformers"
    return from_transformers and wanted.__name__ in (base.__name__ for base in type(present).__mro__)


def _states_by_class_name(callbacks: Iterable[Any]) -> dict[str, Any]:
    """Class name -> state, or a list of states where several callbacks share a class."""
    states: dict[str, list[Any]] = {}
    for callback in callbacks:
        if not callable(getattr(callback, "state", None)):
            raise TypeError(f"{type(callback).__name__} has no state() method and cannot be saved")
        states.setdefault(type(callback).__name__, []).append(callback.state())
    return {name: several[0] if len(several) == 1 else several for name, several in states.items()}


def _copy_of_row(row: Any) -> Any:
    """A log may be long, and most rows hold plain numbers only: they need not be looked at one by one again."""
    is_plain = type(row) is dict and all(type(value) in (float, int, str) for value in row.values())
    return dict(row) if is_plain else _json_value(row)


def _json_value(value: Any) -> Any:
    """`value` in the types of JSON: array scalars become numbers, and numbers that are not finite null."""
    if isinstance(value, dict):
        return {str(key): _json_value(member) for key, member in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(member) for member in value]
    if not isinstance(value, (bool, int, float, str)) and callable(getattr(value, "item", None)):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
