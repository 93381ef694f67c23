"""Runs with settings drawn at random, cut off at events drawn at random and resumed, also more than once: they end with the
adapter, the optimizer, the schedule and every logged number of the run that nothing disturbed.
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import metrics_of, result_of, steps_in, tiny_model, unsound
from transformers import set_seed

from etude import EarlyStoppingCallback, TrainerCallback
from etude.errors import Interrupted
from short_run import short_trainer
from tiny import ListDataset, Padded, StreamDataset, language_rows

NUM_ROWS = 20
Settings = dict[str, Any]


class Noisy(Padded):
    """Masks labels at random, with each of the generators that a collator may use."""

    def __call__(self, rows: Sequence[Any]) -> Any:
        batch = super().__call__(rows)
        hidden = (torch.rand(batch["labels"].shape) < 0.2) & (batch["input_ids"] % 2 == random.randrange(2))
        batch["labels"][hidden] = -100
        return batch


class Augmented(ListDataset):
    """Every access to a row draws anew."""

    def __getitem__(self, index: int) -> Any:
        row = dict(super().__getitem__(index))
        row["input_ids"] = [token if random.random() > 0.1 else 3 for token in row["input_ids"]]
        return row


class SharedStream(StreamDataset):
    """Every worker reads its share of the rows, as torch asks of a stream."""

    def __iter__(self) -> Any:
        worker = torch.utils.data.get_worker_info()
        return iter(self.rows[worker.id :: worker.num_workers]) if worker else iter(self.rows)


class ReturningStream(StreamDataset):
    """A stream that can be put back to where it was; every later pass begins at the first row."""

    def __init__(self, rows: list[Any]) -> None:
        super().__init__(rows)
        self.first_row, self.next_row = 0, 0

    def __iter__(self) -> Any:
        self.next_row, self.first_row = self.first_row, 0
        while self.next_row < len(self.rows):
            self.next_row += 1
            yield self.rows[self.next_row - 1]

    def state_dict(self) -> dict[str, int]:
        return {"next_row": self.next_row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first_row = state["next_row"]


def shuffled_stream(rows: list[Any]) -> Any:
    import datasets

    return datasets.Dataset.from_list(rows).to_iterable_dataset(num_shards=2).shuffle(seed=3, buffer_size=5)


DATASETS: dict[str, Callable[[list[Any]], Any]] = {
    "list": list,
    "map": ListDataset,
    "augmented": Augmented,
    "stream": SharedStream,
    "returning stream": ReturningStream,
    "shuffled stream": shuffled_stream,
}
STREAMS = {"stream", "returning stream", "shuffled stream"}


def drawn(draw: random.Random) -> tuple[Settings, Settings]:
    """(`TrainingArguments`, the rest: dataset, collator, callbacks)."""
    data = draw.choice(sorted(DATASETS))
    rest: Settings = {"data": data, "noisy": draw.random() < 0.5, "patience": None, "shaky": draw.random() < 0.5}
    settings: Settings = {
        "per_device_train_batch_size": draw.choice([1, 2, 3]),
        "gradient_accumulation_steps": draw.choice([1, 2, 3]),
        "save_strategy": draw.choice(["steps", "steps", "epoch"]),
        "save_steps": draw.randint(1, 4),
        "save_total_limit": draw.choice([None, 1, 2]),
        "logging_strategy": draw.choice(["steps", "steps", "epoch"]),
        "logging_steps": draw.randint(1, 3),
        "eval_strategy": draw.choice(["no", "steps", "epoch"]),
        "eval_steps": draw.randint(1, 4),
        "per_device_eval_batch_size": 4,
        "optim": draw.choice(["adamw_torch", "adamw_torch", "sgd", "adafactor"]),
        "lr_scheduler_type": draw.choice(["linear", "cosine", "constant_with_warmup", "reduce_lr_on_plateau"]),
        "warmup_steps": draw.choice([0, 2]),
        "fast_path": draw.random() < 0.7,
        "dataloader_num_workers": 2
        if draw.random() < 0.25 and data not in ("returning stream", "shuffled stream")
        else 0,
        "dataloader_drop_last": draw.random() < 0.3,
        "max_steps": draw.randint(5, 9) if data in STREAMS else -1,
        "num_train_epochs": draw.choice([1, 1.5, 2]),
    }
    if data not in STREAMS:
        settings["train_sampling_strategy"] = draw.choice(["random", "group_by_length", "sequential"])
    if settings["lr_scheduler_type"] == "reduce_lr_on_plateau":
        settings["eval_strategy"] = "steps"
        settings["lr_scheduler_kwargs"] = {"patience": 0, "factor": 0.5, "threshold": 1.0}
    if settings["eval_strategy"] != "no" and draw.random() < 0.5:
        rest["patience"] = draw.randint(1, 2)
        settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
        settings |= {"save_strategy": settings["eval_strategy"], "save_steps": settings["eval_steps"]}
    return settings, rest


class Cut(TrainerCallback):
    """Counts the events of a run; at one of them the run crashes or is told to stop."""

    def __init__(self, at: int | None, *, signals: bool) -> None:
        self.at, self.signals, self.num_events = at, signals, 0

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_") or name == "on_init_end":
            return super().__getattribute__(name)

        def count(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.num_events += 1
            if self.num_events == self.at:
                if not self.signals:
                    raise CrashError(name)
                os.kill(os.getpid(), signal.SIGTERM)

        return count


class CrashError(Exception):
    pass


class Shaky(TrainerCallback):
    """A user's own use of the global generators: each gradient is shaken a little."""

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for parameter in kwargs["model"].parameters():
            if parameter.grad is not None:
                parameter.grad *= 1 + 0.1 * (random.random() + np.random.random() + float(torch.rand(())))


def make(folder: Path, settings: Settings, rest: Settings, cut: Cut) -> Any:
    callbacks: list[Any] = [cut]
    if rest["shaky"]:
        callbacks.append(Shaky())
    if rest["patience"] is not None:
        callbacks.append(EarlyStoppingCallback(rest["patience"], 0.05))
    return short_trainer(
        tiny_model(),
        DATASETS[rest["data"]](language_rows(NUM_ROWS)),
        eval_rows=language_rows(6, 50),
        collate=Noisy() if rest["noisy"] else Padded(),
        callbacks=callbacks,
        output_dir=str(folder),
        report_to="none",
        learning_rate=1e-2,
        **settings,
    )


def outcome(folder: Path, settings: Settings, rest: Settings, cut: Cut, resume: str | None) -> dict[str, Any] | None:
    """The result of a run, None where it was cut off. Where it is resumed, the generators have gone astray before."""
    trainer = make(folder, settings, rest, cut)
    set_seed(random.randrange(2**31) if steps_in(folder) else 1)
    try:
        output = trainer.train(resume_from_checkpoint=resume)
    except (CrashError, Interrupted):
        return None
    result = result_of(trainer, output)
    assert metrics_of(folder, result["log"]) == result["log"]
    return result


def check_draw(seed: int, folder: Path) -> None:
    draw = random.Random(seed)
    settings, rest = drawn(draw)
    whole_cut = Cut(None, signals=False)
    whole = outcome(folder / "whole", settings, rest, whole_cut, None)
    assert whole is not None and whole["step"] >= 2
    history = []
    for _ in range(draw.randint(1, 3)):
        cut = Cut(draw.randint(1, whole_cut.num_events), signals=draw.random() < 0.5)
        history.append((cut.at, cut.signals))
        if outcome(folder / "resumed", settings, rest, cut, "auto") is not None:
            break
        assert not unsound(folder / "resumed")
    resumed = outcome(folder / "resumed", settings, rest, Cut(None, signals=False), "auto")
    assert resumed == whole, f"seed {seed}, {settings}, {rest}, cut at {history} of {whole_cut.num_events} events"


@pytest.mark.parametrize("seed", range(12))
def test_a_resumed_run_is_the_same(seed: int, fast_dir: Path) -> None:
    check_draw(seed, fast_dir)


@pytest.mark.nightly
@pytest.mark.parametrize("seed", range(100, 250))
def test_many_resumed_runs_are_the_same(seed: int, fast_dir: Path) -> None:
    check_draw(seed, fast_dir)
