"""A training run: the parts that the loop names, put together by `Trainer.train`."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from etude.data.batching import MicroBatch, Position, StepBatches
from etude.data.loader import has_length
from etude.data.randomness import derive_seed
from etude.errors import CheckpointError, ConfigError, DataError, Interrupted, is_out_of_memory
from etude.interrupts import Interrupts, StopNow
from etude.saves import Saves

if TYPE_CHECKING:
    from etude.kernels.plan import CompileSwitch
    from etude.optim.gradient import Gradient
    from etude.outputs import TrainOutput
    from etude.precision import LossScaler
    from etude.trainer import Trainer


COMPILER_MODULES = ("torch._dynamo", "torch._inductor", "triton")


class Step(NamedTuple):
    """One optimizer step; `number` counts from 1 over the whole run."""

    number: int
    epoch: int


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run."""

    batches_per_epoch: int
    """Micro-batches of the loader in an epoch; for a stream of unknown length those of the whole run."""
    steps_per_epoch: int
    num_epochs: int
    max_steps: int
    num_samples: float
    """Samples that the whole schedule sees, for the throughput in the summary."""
    streamed: bool


def plan_run(args: Any, loader: Any, num_samples: int | None) -> Plan:
    """
    Raises:
        ConfigError: a stream without length needs `max_steps`.
        DataError: there is not a single batch.
    """
    accumulation = args.gradient_accumulation_steps
    if not has_length(loader):
        if args.max_steps <= 0:
            raise ConfigError(
                "must be set, since the training data has no length and an epoch cannot be counted", field="max_steps"
            )
        samples = args.max_steps * args.train_batch_size * accumulation
        return Plan(args.max_steps * accumulation, args.max_steps, sys.maxsize, args.max_steps, samples, True)
    batches = len(loader)
    if batches == 0:
        raise DataError(_why_no_batch(args, num_samples))
    steps = max(1, -(-batches // accumulation))
    samples = num_samples or batches * args.train_batch_size
    if args.max_steps > 0:
        total = args.max_steps * args.train_batch_size * accumulation
        return Plan(batches, steps, -(-args.max_steps // steps), args.max_steps, total, False)
    max_steps = math.ceil(args.num_train_epochs * steps)
    total = samples * args.num_train_epochs
    return Plan(batches, steps, math.ceil(args.num_train_epochs), max_steps, total, False)


def _why_no_batch(args: Any, num_samples: int | None) -> str:
    if not num_samples:
        return "the training dataset is empty"
    return (
        f"the training dataset has {num_samples} samples, fewer than the batch size {args.train_batch_size}, and "
        "dataloader_drop_last=True drops the incomplete batch: nothing would be trained. Lower "
        "per_device_train_batch_size or set dataloader_drop_last=False"
    )


class Run:
    """What `loop.train` runs over."""

    def __init__(
        self,
        trainer: Trainer,
        plan: Plan,
        batches: StepBatches,
        gradient: Gradient,
        scaler: LossScaler,
        interrupts: Interrupts,
        *,
        trial: Any,
        ignore_keys_for_eval: list[str] | None,
    ) -> None:
        self.trainer, self.plan, self.batches, self.gradient = trainer, plan, batches, gradient
        self.scaler, self.interrupts = scaler, interrupts
        self.first_epoch, self.first_batch = 0, 0
        self.stream_state: dict[str, Any] | None = None
        self.compile_switch: CompileSwitch | None = None
        self._is_open = False
        self.recorded_cut: dict[str, Any] = {}
        """The cut of the checkpoint this run goes on from; used again where it can be."""
        self.initial_global_step = trainer.state.global_step
        self.start_time = time.time()
        batches.on_batches = self.see_batches
        self.events = Events(self, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)
        self.update = Update(self)
        self.saves = Saves(trainer, self)

    def remaining_steps(self) -> Iterator[Step]:
        """The steps still to be made, with the events of their epochs around them."""
        state, control = self.trainer.state, self.events.control
        for epoch in range(self.first_epoch, self.plan.num_epochs):
            is_over = self.events.epoch_ended and state.global_step >= self.plan.max_steps
            if is_over or (control().should_training_stop and self.first_batch == 0):
                break  # a run that had stopped within an epoch and was resumed still has to end that epoch
            self._open(epoch)
            steps_done = self.first_batch // self.batches.accumulation
            self.first_batch, self.stream_state = 0, None
            self.events.epoch_begin()
            found_any = steps_done > 0
            while state.global_step < self.plan.max_steps and steps_done < self.plan.steps_per_epoch:
                if control().should_epoch_stop or control().should_training_stop or not self._load_next_step():
                    break
                yield Step(state.global_step + 1, epoch)
                found_any, steps_done = True, steps_done + 1
            if not found_any and state.global_step < self.plan.max_steps:
                self.trainer.notices.say(f"epoch {epoch} had no data, so training ends at step {state.global_step}")
                control().should_training_stop = True
            self.events.epoch_end()
            if state.global_step >= self.plan.max_steps:
                control().should_training_stop = True

    def _open(self, epoch: int) -> None:
        if self._is_open:
            self._is_open = False
            self.batches.position = Position(epoch, self.first_batch)
        else:
            self.batches.open_epoch(epoch, self.first_batch, self.stream_state)

    def _load_next_step(self) -> bool:
        try:
            with self.interrupts.stopping_at_once(), self.trainer.throughput.waiting_for_data():
                return bool(self.batches.loaded()) or self.batches.advance()
        except StopNow:
            return self.events.stop_here()

    def see_batches(self, batches: list[MicroBatch]) -> None:
        """Decide the path on the first batches, before they are cut; count the work of every step."""
        trainer = self.trainer
        trainer.current_gradient_accumulation_steps = len(batches)
        if trainer.path is None:
            self._choose_path(batches[0].inputs)
        line = self.compile_switch.before_step(trainer.state.global_step + 1) if self.compile_switch else None
        if line:
            trainer.notices.say(line)
        for batch in batches:
            trainer.count_work(batch.inputs)

    def load_first_step(self) -> None:
        """Load the first step of the run and decide on it how everything is computed, before anything is written.

        Raises:
            DataError: every label of the first step is masked.
        """
        batches, position = self.batches, self.batches.position
        batches.open_epoch(self.first_epoch, self.first_batch, self.stream_state)
        if self._load_next_step():
            self._require_labels(batches.loaded())
            inputs = batches.loaded()[0].inputs
        else:  # the checkpoint lies after the last step of an epoch that has not been closed yet
            batches.open_epoch(self.first_epoch)
            inputs = batches.stream.next()
            batches.open_epoch(self.first_epoch, self.first_batch, self.stream_state)
        batches.position = position  # nothing of it has been trained on
        self._is_open = True
        if inputs is not None:
            self._choose_path(inputs)

    def _require_labels(self, batches: list[MicroBatch]) -> None:
        if not all(batch.num_items == 0 for batch in batches):
            return
        rows = [row for batch in batches for row in self.batches.stream.rows_of(batch.epoch, batch.number)]
        where = f" (rows {', '.join(map(str, rows[:16]))})" if rows else ""
        raise DataError(
            f"every label of the first step{where} is masked (-100), so there is nothing to learn from. Is the answer cut "
            "off by the maximum length, or the response template not found?"
        )

    def _choose_path(self, inputs: Any) -> None:
        self.trainer.choose_path(inputs)
        self.batches.cut = self.trainer.cutter.cut
        self.compile_switch = self.trainer.build_compile_switch(self.plan.max_steps)
        self.trainer.graphs = self.trainer.build_graphs()
        is_plain = self.trainer.args.device.type == "cuda" and not self.scaler.tolerates_overflow
        if self.trainer.path.name == "packed" and is_plain:
            self.gradient.keep_in_place()
            self.trainer.path.plan.accumulate_in_place()

    def forward_backward(self, micro_batch: MicroBatch, num_items: int | None) -> torch.Tensor:
        """Forward and backward of one micro-batch, its randomness a function of its place."""
        trainer = self.trainer
        if num_items == 0:
            self._report_step_without_labels(micro_batch)
            return torch.zeros((), device=trainer.args.device)
        torch.manual_seed(derive_seed(trainer.args.seed, "model", *micro_batch.place))
        trainer.is_last_micro_batch = micro_batch.closes == 0
        share: torch.Tensor = trainer.run_training_step(micro_batch.inputs, num_items)
        return share

    def recover(self, error: Exception, micro_batch: MicroBatch) -> list[MicroBatch] | None:
        """What to do instead of a micro-batch that failed: its halves where memory ran out, the same one without the
        compiler where that failed; None where there is no way."""
        plan = getattr(self.trainer.path, "plan", None)
        if plan is not None and plan.is_compiled and type(error).__module__.startswith(COMPILER_MODULES):
            plan.abandon_compilation()
            self.trainer.notices.say(f"layers are not compiled after all: {str(error).strip().splitlines()[0]}")
            return [micro_batch]
        return self._halve(micro_batch) if is_out_of_memory(error) else None

    def _halve(self, micro_batch: MicroBatch) -> list[MicroBatch] | None:
        trainer = self.trainer
        parts: list[MicroBatch] | None = trainer.cutter.split(micro_batch)
        if parts is None and trainer.path.name == "packed" and trainer.path.plan.keep_less():
            step = trainer.state.global_step + 1
            trainer.notices.say(
                f"out of memory at step {step}: from here on more layers are run again in the backward pass"
            )
            return [micro_batch]
        if parts is not None:
            trainer.cut |= trainer.cutter.record()
            trainer.notices.say(
                f"out of memory at step {trainer.state.global_step + 1}: the step is repeated in smaller micro-batches, "
                f"and so are those after it ({_described(trainer.cutter.record())}); the samples of a step stay the same"
            )
        return parts

    def _report_step_without_labels(self, micro_batch: MicroBatch) -> None:
        if micro_batch.index > 0:
            return  # said with the first one of the step
        step, end = self.trainer.state.global_step + 1, self.batches.position.batches_done
        numbers = range(end - self.batches.current_size, end)
        rows = [row for number in numbers for row in self.batches.stream.rows_of(micro_batch.epoch, number)]
        where = f"step {step}" + (f" (rows {', '.join(map(str, rows[:16]))})" if rows else "")
        self.trainer.notices.say_once(f"{where}: every label is masked, so this step changes nothing")

    def finish(self) -> TrainOutput:
        self.gradient.settle()
        self.saves.finish()
        return self.trainer.finish_training(self)


def _described(record: dict[str, Any]) -> str:
    return ", ".join(f"{name.replace('_', ' ')}: {value}" for name, value in record.items())


class Update:
    """One optimizer step and one step of the schedule."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.was_skipped = False
        """Whether the last update was left out, because a float16 gradient overflowed."""

    def apply(self, step: Step) -> None:
        trainer, events = self.run.trainer, self.run.events
        events.fire("on_pre_optimizer_step")
        self.was_skipped = not self.run.scaler.step(trainer.optimizer)
        events.fire("on_optimizer_step")
        events.learning_rate = trainer._get_learning_rate()
        if not self.was_skipped and not trainer.schedule_follows_metric:
            trainer.lr_scheduler.step()


class Events:
    """Tells callbacks what happens, and acts on what they ask for."""

    def __init__(self, run: Run, *, trial: Any, ignore_keys_for_eval: list[str] | None) -> None:
        self.run, self.trainer = run, run.trainer
        self.trial, self.ignore_keys_for_eval = trial, ignore_keys_for_eval
        self.learning_rate: float | None = None
        self.grad_norm: Any = None
        """Of the last step; logs at the end of an epoch show it."""
        self.epoch_ended = False
        self.saved_at: tuple[int, bool] | None = None
        self.pending: dict[str, bool] = {}
        self._acts_on_flags = False

    def control(self) -> Any:
        return self.trainer.control

    def fire(self, event: str) -> None:
        trainer = self.trainer
        trainer.control = getattr(trainer.callback_handler, event)(trainer.args, trainer.state, trainer.control)

    def train_begin(self) -> None:
        self.fire("on_train_begin")
        if self.trainer.args.eval_on_start and self.trainer.state.global_step == 0:
            self._act(lambda: self.trainer._evaluate(self.trial, self.ignore_keys_for_eval, skip_scheduler=True))
        pending, self.pending = self.pending, {}
        if any(pending.values()):  # an evaluation or save that a stop request cut short
            for flag, is_set in pending.items():
                setattr(self.trainer.control, flag, is_set)
            self._log_save_evaluate(None)

    def epoch_begin(self) -> None:
        self.epoch_ended = False
        self.fire("on_epoch_begin")

    def step_begin(self, step: Step) -> None:
        self.fire("on_step_begin")

    def micro_batch_end(self, micro_batch: MicroBatch) -> None:
        for _ in range(micro_batch.closes):
            self.fire("on_substep_end")

    def step_end(self, step: Step, loss: torch.Tensor, norm: Any) -> None:
        trainer, position = self.trainer, self.run.batches.position
        self.run.saves.settle(wait=False)
        self.run.saves.rehearse()
        trainer.add_training_loss(loss)
        trainer.state.global_step = step.number
        trainer.state.epoch = step.epoch + position.batches_done / self.run.plan.batches_per_epoch
        self.grad_norm = norm
        self.fire("on_step_end")
        if self.run.interrupts.checkpoint_requested():
            trainer.control.should_save = True
        self._log_save_evaluate(norm)

    def epoch_end(self) -> None:
        self.epoch_ended = True
        self.fire("on_epoch_end")
        self._log_save_evaluate(self.grad_norm)

    def _log_save_evaluate(self, norm: Any) -> None:
        trainer, control = self.trainer, self.trainer.control
        is_asked = control.should_log or control.should_evaluate or control.should_save or control.should_training_stop
        if is_asked or self.run.interrupts.requested is not None:
            self.run.gradient.settle()  # nothing of a step that went wrong is logged or saved
        self._act(
            lambda: trainer.call_hook(
                trainer._maybe_log_save_evaluate,
                tr_loss=trainer._tr_loss,
                grad_norm=norm,
                model=trainer.model_wrapped,
                trial=self.trial,
                epoch=trainer.state.epoch,
                ignore_keys_for_eval=self.ignore_keys_for_eval,
                start_time=self.run.start_time,
                learning_rate=self.learning_rate,
            )
        )
        if self.run.interrupts.requested is not None:
            self.stop_here()

    def _act(self, action: Any) -> None:
        self._acts_on_flags = True
        try:
            action()
        except StopNow:
            self.stop_here()
        finally:
            self._acts_on_flags = False

    def evaluation_can_be_repeated(self) -> bool:
        """Whether an evaluation may be cut short: one that the loop asked for, of which nothing is reported yet. One that
        a callback makes for itself, or the second of several evaluation sets, would be lost or reported twice."""
        state, control = self.trainer.state, self.trainer.control
        return self._acts_on_flags and (control.should_evaluate or state.global_step == 0)

    def stop_here(self) -> bool:
        """Save where the run stands, unless that is done already, and leave.

        Raises:
            Interrupted: always.
        """
        trainer, interrupts = self.trainer, self.run.interrupts
        step = trainer.state.global_step
        control = trainer.control
        self.pending = {"should_evaluate": control.should_evaluate, "should_save": control.should_save}
        what = "nothing was trained yet"
        self.run.saves.settle()
        if step > 0:
            if self.saved_at != (step, self.epoch_ended) or any(self.pending.values()):
                self._save_before_leaving()
            what = f"checkpoint-{step} is complete; resume_from_checkpoint=True goes on from there"
        name = interrupts.requested.name if interrupts.requested is not None else "a stop request"
        message = f"stopped by {name} after step {step}: {what}"
        trainer.notices.say(message)
        raise Interrupted(message, exit_code=interrupts.exit_code, step=step)

    def _save_before_leaving(self) -> None:
        trainer = self.trainer
        try:
            trainer.call_hook(trainer._save_checkpoint, trainer.model_wrapped, trial=self.trial)
        except CheckpointError as error:
            self.run.saves.failed(error, is_final=True)
        self.fire("on_save")
