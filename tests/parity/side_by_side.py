"""Train the same model with `transformers.Trainer` and with ours, and compare what came out.

Both start from the same seeds, data and settings, on one CPU thread in float32. The tolerances are the promise of the
project; transformers differs from itself by about 5e-7 when only the padding of its batches changes.
"""

from __future__ import annotations

import gc
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

import etude
from tiny import Padded, Row, Watched, adapter_of, distance

# transformers collects garbage at the start of every training; without the imported modules that is quick.
gc.freeze()

STEP_TOLERANCE = 1e-5
ADAPTER_TOLERANCE = 1e-4

# Wall-clock figures, which no two runs share.
TIMINGS = ("_runtime", "_per_second", "_preparation_time")


@dataclass
class Run:
    """What one training left behind."""

    log: list[dict[str, float]]
    adapter: dict[str, torch.Tensor]
    batches: list[list[tuple[int, ...]]]  # of the training rows, as the collator saw them
    output: Any
    trainer: Any
    recorded: list[Any] = field(default_factory=list)

    def steps(self, name: str) -> list[float]:
        """The values of `name` at the training steps that were logged."""
        return [entry[name] for entry in self.log if "loss" in entry and name in entry]

    def evaluations(self, name: str = "eval_loss") -> list[float]:
        return [entry[name] for entry in self.log if name in entry]


def train(
    world: Any,
    build: Callable[[], PeftModel],
    rows: Any,
    settings: dict[str, Any],
    *,
    folder: Path,
    collate: Callable[[Sequence[Row]], dict[str, torch.Tensor]] | None = None,
    eval_rows: Any = None,
    callbacks: Sequence[Any] = (),
    **trainer_arguments: Any,
) -> Run:
    """Train with the `Trainer` and `TrainingArguments` of `world`, which is `transformers` or `etude`."""
    watched = Watched(collate or Padded())
    arguments: dict[str, Any] = {
        "output_dir": str(folder / world.__name__),
        "use_cpu": True,
        "seed": 7,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    with warnings.catch_warnings():
        if world is transformers:
            warnings.simplefilter("ignore")  # the peer's warnings are not ours to fix
        trainer = world.Trainer(
            model=build(),
            args=world.TrainingArguments(**(arguments | settings)),
            train_dataset=rows,
            eval_dataset=eval_rows,
            data_collator=watched,
            callbacks=list(callbacks),
            **trainer_arguments,
        )
        trainer.pop_callback(world.PrinterCallback)  # transformers' own takes entries out of the logs it is shown
        output = trainer.train()
    evaluated = {tuple(row["input_ids"]) for row in eval_rows} if isinstance(eval_rows, list) else set()
    batches = [batch for batch in watched.batches if not evaluated.issuperset(batch)]
    return Run(trainer.state.log_history, adapter_of(trainer.model), batches, output, trainer)


def theirs(*arguments: Any, **named: Any) -> Run:
    return train(transformers, *arguments, **named)


def ours(*arguments: Any, **named: Any) -> Run:
    return train(etude, *arguments, **named)


def largest_difference(a: Sequence[float], b: Sequence[float]) -> float:
    """The largest relative difference; equal values differ by 0, also where both are 0."""
    assert len(a) == len(b), f"{len(a)} values against {len(b)}"
    return max((abs(x - y) / abs(y) if y else math.inf) if x != y else 0.0 for x, y in zip(a, b, strict=True))


def assert_same_numbers(mine: Run, peer: Run) -> None:
    """Loss, learning rate and gradient norm of every step, the evaluation loss, and the adapter at the end."""
    for name in ("loss", "learning_rate", "grad_norm"):
        assert peer.steps(name), f"transformers logged no {name}"
        assert largest_difference(mine.steps(name), peer.steps(name)) <= STEP_TOLERANCE, name
    if peer.evaluations():
        assert largest_difference(mine.evaluations(), peer.evaluations()) <= STEP_TOLERANCE
    assert mine.output.global_step == peer.output.global_step
    assert largest_difference([mine.output.training_loss], [peer.output.training_loss]) <= STEP_TOLERANCE
    assert distance(mine.adapter, peer.adapter) <= ADAPTER_TOLERANCE


def assert_same_log(mine: list[dict[str, float]], peer: list[dict[str, float]]) -> None:
    """Entry by entry the same keys, and the same values but for the clock."""
    assert [sorted(entry) for entry in mine] == [sorted(entry) for entry in peer]
    for number, (entry, expected) in enumerate(zip(mine, peer, strict=True)):
        for key, value in expected.items():
            if not key.endswith(TIMINGS):
                assert largest_difference([entry[key]], [value]) <= STEP_TOLERANCE, f"log entry {number}, {key}"
