"""What training, evaluation and prediction return, with the field names of `transformers`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple


class TrainOutput(NamedTuple):
    """Result of `Trainer.train`: optimizer steps done, mean training loss over them, and a metrics dictionary."""

    global_step: int
    training_loss: float
    metrics: dict[str, float]


class PredictionOutput(NamedTuple):
    """Result of `Trainer.predict`."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float] | None


class EvalLoopOutput(NamedTuple):
    """Result of `Trainer.evaluation_loop`."""

    predictions: Any
    label_ids: Any
    metrics: dict[str, float] | None
    num_samples: int | None


class BestRun(NamedTuple):
    """Result of `Trainer.hyperparameter_search`: the trial's number, its objective (a list of several) and its draws."""

    run_id: str
    objective: float | list[float]
    hyperparameters: dict[str, Any]
    run_summary: Any = None


class EvalPrediction:
    """What `compute_metrics` receives: `predictions` and `label_ids` as arrays, `inputs` and `losses` where asked for.

    Unpacks like a tuple: `logits, labels = eval_prediction`.
    """

    def __init__(self, predictions: Any, label_ids: Any, inputs: Any = None, losses: Any = None) -> None:
        self.predictions, self.label_ids, self.inputs, self.losses = predictions, label_ids, inputs, losses
        self.elements = (
            tuple(part for part in (predictions, label_ids, inputs, losses) if part is not None)
            if inputs is not None or losses is not None
            else (predictions, label_ids)
        )

    def __iter__(self) -> Iterator[Any]:
        return iter(self.elements)

    def __getitem__(self, index: int) -> Any:
        if not 0 <= index < len(self.elements):
            raise IndexError(f"an EvalPrediction has {len(self.elements)} elements, asked for number {index}")
        return self.elements[index]
