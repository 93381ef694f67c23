"""The trainer of the command: one screen before it starts, a log of what was said, and a dry run that measures a step.

Imported only when a run is about to be made; it needs torch.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch

from etude.data.batching import MicroBatch, count_items
from etude.data.loader import TrainingStream
from etude.errors import EtudeError, is_out_of_memory
from etude.model.packing import PackedBatch
from etude.observe.run_log import RunLog
from etude.observe.start_screen import RunSummary, show
from etude.outputs import TrainOutput
from etude.run import Plan, Run, plan_run
from etude.summary import concerns, describe, first_batch_of
from etude.trainer import Trainer

SHOWN_ON_THE_SCREEN = ("etude: packed path:", "etude: general path:")


class ScreenTrainer(Trainer):
    """`Trainer` that shows the whole start screen, and keeps every notice in `run.log` of the output folder.

    `max_length` is what rows were cut to, for the screen.
    """

    max_length: int | None = None

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As `Trainer.train`. Notices from before the first step are said after the screen, or when the run fails."""
        self._held: list[str] = []
        say = self.notices.write
        self._log = RunLog(str(self.args.output_dir), say)
        self.notices.write = self._held.append
        try:
            return super().train(*args, **kwargs)
        except EtudeError as error:
            if self._log.path.parent.is_dir():
                self._log.keep(f"the run failed: {error}")
            raise
        finally:
            self._release()
            self.notices.write = say

    def _introduce(self, run: Run) -> None:
        summary = describe(self, run.plan, max_length=self.max_length)
        if not self.notices.quiet:
            show(summary, concerns(self, summary, first_batch_of(run)))
        self._held = [text for text in self._held if not text.startswith(SHOWN_ON_THE_SCREEN)]
        self._release()
        self.notices.write = self._log.write

    def _release(self) -> None:
        """Say what was held back, and keep it where the run has a folder."""
        for text in self._held:
            if self._log.path.parent.is_dir():
                self._log.write(text)
            else:
                sys.stderr.write(text)
        self._held = []


def show_without_training(trainer: ScreenTrainer) -> None:
    """The start screen of a run that is not made: its first batch is computed once, nothing is written or changed."""
    loader = trainer.get_train_dataloader()
    plan = plan_run(trainer.args, loader, trainer.num_examples(loader))
    stream = TrainingStream(loader, trainer.args.data_seed if trainer.args.data_seed is not None else trainer.args.seed)
    stream.open(0)
    batch = stream.next()
    trainer.notices.write = lambda text: None
    trainer.choose_path(batch)
    summary = describe(trainer, plan, max_length=trainer.max_length)
    seconds_per_token = measure(trainer, batch)
    if seconds_per_token is not None:
        seconds = seconds_per_token * tokens_of(summary, plan, batch)
        summary = describe(trainer, plan, seconds=seconds, max_length=trainer.max_length)
    show(summary, concerns(trainer, summary, batch), title="etude train --dry-run")
    trainer._undo_swaps()


def measure(trainer: Trainer, batch: Any) -> float | None:
    """Seconds that the forward and backward pass of a token take, the first time not counted; None where memory ran out."""
    items = count_items(batch, shifts_labels=trainer.shifts_labels)
    whole = MicroBatch(inputs=batch, num_items=items, epoch=0, number=0, index=0)
    inputs = trainer._prepare_inputs(trainer.cutter.cut([whole])[0].inputs)
    trainer.model.train()
    try:
        seconds = min(_seconds_of(trainer, inputs, items or 1) for _ in range(2))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return None
    finally:
        trainer.model.zero_grad(set_to_none=True)
    return seconds / max(1, slots_of(inputs, is_packed=isinstance(inputs, PackedBatch)))


def _seconds_of(trainer: Trainer, inputs: Any, items: int) -> float:
    started = time.perf_counter()
    with trainer.compute_loss_context_manager():
        if isinstance(inputs, PackedBatch):
            loss = trainer.path.loss(trainer.model, inputs, items)
        else:
            loss = trainer.compute_loss(trainer.model, inputs)
    torch.autograd.backward(loss)
    if trainer.args.device.type == "cuda":
        torch.cuda.synchronize(trainer.args.device)
    return time.perf_counter() - started


def slots_of(inputs: Any, *, is_packed: bool) -> int:
    """Tokens that are computed of a micro-batch: the real ones where it is packed, padding as well where it is not."""
    if is_packed:
        return int(sum(inputs.lengths))
    tensor = inputs.get("input_ids") if hasattr(inputs, "get") else None
    return int(tensor.numel()) if torch.is_tensor(tensor) else 1


def tokens_of(summary: RunSummary, plan: Plan, batch: Any) -> float:
    """Tokens that the whole run computes: the mean row of the data, or the first batch, times its rows."""
    data = summary.train
    samples = data.counted_samples or data.samples
    if summary.path == "packed" and data.tokens and samples:
        return data.tokens / samples * summary.global_batch * plan.max_steps
    return float(slots_of(batch, is_packed=False) * summary.accumulation * plan.max_steps)


def finish(trainer: Trainer, samples: Any = (), settings: Any = None) -> Path:
    """Write the report and the model card of a run; returns the path of the report."""
    from etude.reporting import write_model_card, write_report

    write_model_card(trainer, settings)
    return write_report(trainer, samples, settings)


def finish_early(trainer: Trainer, samples: Any, settings: Any, error: BaseException, command: str) -> Path | None:
    """Write the report of a run that `error` ended; None where there is nothing to tell, or no way to.

    `command` goes on with the run.
    """
    from etude.reporting import write_report

    if trainer._run is None:
        return None
    try:
        return write_report(trainer, samples, settings, error, command)
    except Exception as failure:  # whatever it is, it must not hide what ended the run
        trainer.notices.say(f"the report could not be written: {failure}")
        return None
