"""A trainer for a run of a few steps, with the settings that most tests share."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etude import Trainer, TrainingArguments
from tiny import Padded, causal_lora, language_rows

# Keys of logs and metrics that hold wall-clock figures, which no two runs share.
CLOCK = ("_runtime", "_per_second", "_preparation_time")

TRAINER_ARGUMENTS = (
    "model_init",
    "processing_class",
    "compute_metrics",
    "preprocess_logits_for_metrics",
    "compute_loss_func",
    "optimizers",
)


def short_trainer(
    model: Any = None,
    rows: Any = None,
    *,
    eval_rows: Any = None,
    collate: Any = None,
    callbacks: Sequence[Any] = (),
    trainer_class: Any = Trainer,
    **settings: Any,
) -> Any:
    """Five steps an epoch of two rows each, unless told otherwise; `settings` go to the one that knows them."""
    given = {name: settings.pop(name) for name in TRAINER_ARGUMENTS if name in settings}
    arguments: dict[str, Any] = {
        "output_dir": "out",
        "seed": 7,
        "use_cpu": True,
        "learning_rate": 1e-3,
        "num_train_epochs": 2,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return trainer_class(
        model=causal_lora() if model is None and "model_init" not in given else model,
        args=TrainingArguments(**(arguments | settings)),
        train_dataset=language_rows(10) if rows is None else rows,
        eval_dataset=eval_rows,
        data_collator=collate or Padded(),
        callbacks=list(callbacks),
        **given,
    )


def without_clock(log: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The log without what depends on the time it took."""
    return [{key: value for key, value in entry.items() if not key.endswith(CLOCK)} for entry in log]


def logged(trainer: Any, name: str) -> list[float]:
    """The values of `name` over the log, in order."""
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def checkpoints(folder: str | Path = "out") -> list[int]:
    """The steps of the checkpoints in `folder`."""
    return sorted(int(path.name.removeprefix("checkpoint-")) for path in Path(folder).glob("checkpoint-*"))


class Scripted:
    """A `compute_metrics` that returns the given scores one after the other, whatever the model predicts."""

    def __init__(self, *scores: float) -> None:
        self.scores = list(scores)

    def __call__(self, prediction: Any) -> dict[str, float]:
        return {"score": self.scores.pop(0)}
