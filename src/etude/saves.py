"""The checkpoints of a run: who writes one, what is recorded of it, and what a failure means."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from etude.checkpoint import CheckpointStore
from etude.checkpoint.copies import Copies
from etude.checkpoint.writer import Done, InBackground, InPlace, Save
from etude.contents import Contents, ProcessorFiles, Require, processor_of, tree_of, written_later, written_now
from etude.errors import CheckpointError, NonFiniteError
from etude.estimates import checkpoint_bytes, optimizer_state_bytes
from etude.hooks.base import is_overridden
from etude.model.adapter import SavedTensors, TrainedNames, saved_tensors
from etude.observe.amounts import of_bytes
from etude.observe.machine import free_memory_bytes
from etude.observe.trackers import uploads_checkpoints
from etude.optim.finite import not_finite

if TYPE_CHECKING:
    from etude.run import Run
    from etude.trainer import Trainer

FAILURES_IN_A_ROW = 3
"""After this many failed saves in a row training stops: it would only get further from the last checkpoint."""

SAVE_HOOKS = (
    "_save_checkpoint",
    "save_model",
    "_save",
    "_save_optimizer_and_scheduler",
    "_save_scaler",
    "_save_rng_state",
    "collect_callback_states",
)
"""Whoever overrides one of these may look at the run while it is being saved, or at the files when it returns."""

REHEARSALS = 2
"""After as many steps everything is where it stays: the optimizer has its state after the first."""

COPIES_OF_A_CHECKPOINT = 3
"""In memory at most: what is saved, a file of it as it is written, and another one for transformers."""


class Saves:
    """What the loop calls to save, and asks whether a save that goes on beside it went well."""

    def __init__(self, trainer: Trainer, run: Run) -> None:
        self.trainer, self.run = trainer, run
        self._tensors = saved_tensors(trainer.model) if may_be_beside_training(trainer) else None
        self.why_in_place = _why_in_place(trainer, self._tensors)
        self.stalls_in_seconds: list[float] = []
        """How long training stood still for each save that it did not wait for."""
        self._names = TrainedNames()
        self._copies = Copies()
        self._processor = ProcessorFiles(processor_of(trainer))
        self._is_attended = True
        self._attempts = SaveAttempts()
        self._gone_wrong: NonFiniteError | None = None
        self._best_before: tuple[str | None] | None = None
        """The best checkpoint before the save of a better one, which may fail yet."""
        if self.why_in_place is None:
            try:
                self._processor.files()  # takes long only the first time
            except CheckpointError as error:
                self.why_in_place = str(error)
        self.writer: InPlace | InBackground = InBackground() if self.why_in_place is None else InPlace()
        is_gathered = self.writer.needs_copies and trainer.args.device.type == self._copies.device_type
        self._rehearsals_left = REHEARSALS if is_gathered else 0
        if self.writer.needs_copies and self._tensors is not None:  # what takes long only the first time
            self._copies.reserve(_sizes_on_gpu(trainer, self._tensors))
            self._names.of(trainer.model)

    @contextmanager
    def beside_training(self, *, allowed: bool) -> Iterator[None]:
        """Within, `save` does not wait until the checkpoint is durable, where that is possible and `allowed`."""
        began = time.perf_counter()
        self.settle()
        self._is_attended = not allowed or bool(save_listeners(self.trainer))
        try:
            yield
        finally:
            seconds = time.perf_counter() - began
            self.trainer.throughput.count_save(seconds)
            if not self._is_attended and self.writer.needs_copies:
                self.stalls_in_seconds.append(seconds)
            self._is_attended = True

    def rehearse(self) -> None:
        """After the first updates: find the places of all that will be copied, so that the first save holds training up no
        longer than the others."""
        trainer = self.trainer
        if not self._rehearsals_left or self._tensors is None or not getattr(trainer.optimizer, "state", None):
            return
        self._rehearsals_left -= 1
        try:
            names = self._names.of(trainer.model)
            if self._tensors.are_all_of(names):
                self._copies.rehearse(tree_of(trainer, self.run, names, self._tensors))
        except Exception:  # nobody has asked for a checkpoint yet; whoever does will hear of it
            self._rehearsals_left = 0

    def save(self, trial: Any) -> None:
        """Write and commit `checkpoint-<step>`, then retire those that `save_total_limit` has no room for.

        Raises:
            CheckpointError: it could not be written; older checkpoints are intact.
            NonFiniteError: an update has made a weight NaN or infinite; nothing is written. Where training does not wait
                for the checkpoint, `settle` raises it, in time for the next one.
        """
        trainer, run = self.trainer, self.run
        state, args = trainer.state, trainer.args
        names = self._names.of(trainer.model)
        self.settle()
        root = Path(trainer._get_output_dir(trial))
        store = CheckpointStore(root.absolute())  # a callback may change the working directory meanwhile
        existing = {checkpoint.step for checkpoint in store.committed()}
        self._best_before = (state.best_model_checkpoint,)
        if state.best_global_step and state.best_global_step in existing | {state.global_step}:
            state.best_model_checkpoint = str(root / f"checkpoint-{state.best_global_step}")
        versions = {"versions": trainer.run_record["versions"]}
        limit, best = args.save_total_limit, _step_named(state.best_model_checkpoint)
        check, fill = self._contents(names, store)
        self._write(Save(store, state.global_step, fill, versions, limit, best, check))
        run.events.saved_at = (state.global_step, run.events.epoch_ended)
        run.events.pending = {}

    def _write(self, save: Save) -> None:
        try:
            self.writer.write(save)
            if self._is_attended:
                self._note(self.writer.finished(wait=True))
        except NonFiniteError as error:
            self._stop_for(error)

    def _contents(self, names: dict[torch.Tensor, str], store: CheckpointStore) -> Contents:
        trainer, run = self.trainer, self.run
        require: Require = _require_nothing
        if trainer.args.on_nonfinite == "stop":
            require = functools.partial(_require_finite, store=store, step=trainer.state.global_step)
        if self.writer.needs_copies and (self._tensors is None or not self._tensors.are_all_of(names)):
            self._tensors = saved_tensors(trainer.model)
            if self._tensors is None:  # what is trained has changed, and cannot be copied any more
                self.writer = InPlace()
        if self.writer.needs_copies and self._tensors is not None:
            self._rehearsals_left = 0  # what is being written has these places
            return written_later(trainer, run, names, self._tensors, self._processor, self._copies, require)
        return written_now(trainer, run, names, require)

    def settle(self, *, wait: bool = True) -> None:
        """Take note of how the save before ended. Asked after every step, without waiting.

        Raises:
            CheckpointError: it failed, as did those before it.
            NonFiniteError: a weight was NaN or infinite; nothing was written. Raised each time from then on.
        """
        if self._gone_wrong is not None:
            raise self._gone_wrong
        try:
            done = self.writer.finished(wait=wait)
        except CheckpointError as error:
            self.failed(error, is_final=False)
        except NonFiniteError as error:
            self._stop_for(error)
        else:
            self._note(done)

    def failed(self, error: CheckpointError, *, is_final: bool) -> None:
        """A save failed. The best checkpoint is the one before again, so that it is neither retired nor missed at the end.

        Raises:
            CheckpointError: it was the final save, or those before it failed as well.
        """
        self._withdraw()
        self._attempts.failed(error, is_final=is_final, say=self.trainer.notices.say)

    def _stop_for(self, error: NonFiniteError) -> NoReturn:
        self._withdraw()
        self._gone_wrong = error
        raise error

    def _withdraw(self) -> None:
        """There is no checkpoint of this step, nor is it the best one."""
        self.run.events.saved_at = None
        self._copies.arrive()  # whoever failed to write them may not have waited for them
        if self._best_before is not None:
            (self.trainer.state.best_model_checkpoint,), self._best_before = self._best_before, None

    def _note(self, done: Done | None) -> None:
        if done is not None:
            self._attempts.succeeded()
            self._best_before = None
            for line in done.said:
                self.trainer.notices.say(line)

    def finish(self) -> None:
        """Training is over: wait for the last save, and say what saving has cost."""
        self.settle()
        stalls = self.stalls_in_seconds
        if stalls:
            mean, longest = 1000 * sum(stalls) / len(stalls), 1000 * max(stalls)
            self.trainer.notices.say(
                f"saved {len(stalls)} checkpoint{'s' * (len(stalls) > 1)} while training went on: it stood still for {mean:.0f} ms each, "
                f"{longest:.0f} ms at most"
            )

    def close(self) -> None:
        """Wait for a save that goes on, however training ended, and give the memory of the copies back."""
        why_it_ended = sys.exception()
        try:
            self._note(self.writer.finished(wait=True))
        except Exception as error:  # why training ended matters more
            self._withdraw()
            self.trainer.notices.say(f"checkpoint not written: {error}")
            if why_it_ended is not None:
                why_it_ended.add_note(f"Before that a checkpoint could not be written: {error}")
        self._copies = Copies()


def _sizes_on_gpu(trainer: Trainer, tensors: SavedTensors) -> list[int]:
    """The bytes of each tensor on a GPU that a checkpoint will hold, as far as it is known before the first step."""
    weights = {*tensors.in_adapters.values(), *tensors.beside.values()}
    sizes = [weight.nbytes for weight in weights if weight.is_cuda]
    if not trainer.args.save_only_model:
        per_number = optimizer_state_bytes(str(trainer.args.optim))
        sizes += [per_number * each.numel() for each in tensors.trained if each.is_cuda]
    return sizes


def _step_named(checkpoint: str | None) -> int | None:
    number = Path(checkpoint or "").name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else None


def may_be_beside_training(trainer: Trainer) -> bool:
    """Whether checkpoints are asked for at all, and in the background."""
    return bool(trainer.args.save_in_background and trainer.args.save_strategy != "no")


def _why_in_place(trainer: Trainer, tensors: SavedTensors | None) -> str | None:
    """Why training waits for every checkpoint; None where it need not, "" where that needs no words."""
    if not may_be_beside_training(trainer):
        return ""
    overridden = [name for name in SAVE_HOOKS if is_overridden(trainer, name)]
    if overridden:
        return f"{type(trainer).__name__} overrides {overridden[0]}"
    if listeners := save_listeners(trainer):
        return f"{listeners[0]} is told of each one when it is complete (on_save)"
    if tensors is None:
        return "only the adapters of usual peft methods can be copied and written later"
    needed, free = COPIES_OF_A_CHECKPOINT * checkpoint_bytes(trainer), free_memory_bytes()
    if free is not None and free < needed:
        return f"copies need {of_bytes(needed)} of memory, {of_bytes(free)} are free"
    return None


def save_listeners(trainer: Trainer) -> list[str]:
    """The callbacks that do something at `on_save`, for which the checkpoint must be complete."""
    listeners = trainer.callback_handler.listeners("on_save")
    return [type(each).__name__ for each in listeners if uploads_checkpoints(each) is not False]


def _require_finite(weights: Mapping[str, torch.Tensor], store: CheckpointStore, step: int) -> None:
    """Loss and gradient were finite, but what the optimizer made of them may not be.

    Raises:
        NonFiniteError: a weight is NaN or infinite.
    """
    wrong = not_finite(weights)
    if not wrong:
        return
    committed = store.committed()
    intact = f"{committed[-1].path.name} is the last sound one" if committed else "there is no earlier one"
    raise NonFiniteError(
        f"the update made weights NaN or infinite ({len(wrong)} tensors, first: {wrong[0]}), so no checkpoint is written; "
        f"{intact}. Lower learning_rate, or pass on_nonfinite='continue' to go on regardless",
        step=step,
    )


def _require_nothing(weights: Mapping[str, torch.Tensor]) -> None:
    """For runs that go on regardless."""


class SaveAttempts:
    """Decides what a failed save means: go on and try again at the next interval, or stop."""

    def __init__(self) -> None:
        self.failed_in_a_row = 0

    def succeeded(self) -> None:
        self.failed_in_a_row = 0

    def failed(self, error: CheckpointError, *, is_final: bool, say: Any) -> None:
        """
        Raises:
            CheckpointError: the final save failed, or too many in a row.
        """
        self.failed_in_a_row += 1
        if is_final:
            error.add_note("This was the final save: free some space or fix the folder, then resume to save it again.")
            raise error
        if self.failed_in_a_row >= FAILURES_IN_A_ROW:
            error.add_note(f"{self.failed_in_a_row} saves in a row failed, so training stops.")
            raise error
        say(f"checkpoint not written, training goes on and tries again at the next save: {error}")
