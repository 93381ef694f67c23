"""evaluate(), predict(), and what compute_metrics gets to see."""

from __future__ import annotations

import math
import signal
from typing import Any

import numpy as np
import pytest
import torch

from etude import EvalPrediction, PredictionOutput, TrainerCallback
from etude.errors import Interrupted
from short_run import Scripted, logged, short_trainer
from tiny import IGNORED, Padded, V, adapter_of, assert_same_bits, causal_lora, language_rows, tiny_llama, with_lora

EVAL_ROWS = language_rows(13, 50)


def mean_over_tokens(model: Any, rows: list[dict[str, Any]]) -> float:
    """The loss of the whole set, row by row without any padding: the sum over all labels by their number."""
    total, count = 0.0, 0
    model.eval()
    for row in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([row["input_ids"]])).logits[0, :-1]
        labels = torch.tensor(row["labels"][1:])
        total += torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum").item()
        count += int((labels != IGNORED).sum())
    return total / count


@pytest.mark.parametrize("batch_size", [1, 2, 4, 8, 13])
def test_the_loss_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    trainer = short_trainer(eval_rows=EVAL_ROWS, per_device_eval_batch_size=batch_size)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean_over_tokens(causal_lora(), EVAL_ROWS), rel=1e-6)


def test_evaluate_returns_and_logs_its_metrics() -> None:
    trainer = short_trainer(eval_rows=EVAL_ROWS)
    trainer.train()
    metrics = trainer.evaluate()
    assert {"eval_loss", "eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch"} <= metrics.keys()
    assert trainer.state.log_history[-1]["eval_loss"] == metrics["eval_loss"]
    assert "held_out_loss" in trainer.evaluate(EVAL_ROWS[:3], metric_key_prefix="held_out")


def test_several_sets_are_told_apart_by_name() -> None:
    sets = {"easy": EVAL_ROWS[:5], "hard": EVAL_ROWS[5:]}
    trainer = short_trainer(eval_rows=sets, eval_strategy="epoch")
    trainer.train()
    assert len(logged(trainer, "eval_easy_loss")) == len(logged(trainer, "eval_hard_loss")) == 2
    assert not logged(trainer, "eval_loss")
    assert trainer.evaluate().keys() >= {"eval_easy_loss", "eval_hard_loss"}
    expected = mean_over_tokens(trainer.model, EVAL_ROWS[:5])
    assert trainer.evaluate("easy")["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_the_best_model_may_be_judged_by_one_of_several_sets() -> None:
    trainer = short_trainer(
        eval_rows={"easy": EVAL_ROWS[:5], "hard": EVAL_ROWS[5:]},
        eval_strategy="epoch",
        save_strategy="epoch",
        metric_for_best_model="hard_loss",
        load_best_model_at_end=True,
    )
    trainer.train()
    assert trainer.state.best_metric == min(logged(trainer, "eval_hard_loss"))


def test_compute_metrics_gets_all_logits_and_labels_padded() -> None:
    seen: list[EvalPrediction] = []

    def accuracy(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        logits, labels = prediction
        hits = (logits[:, :-1].argmax(-1) == labels[:, 1:])[labels[:, 1:] != IGNORED]
        return {"accuracy": float(hits.mean())}

    trainer = short_trainer(eval_rows=EVAL_ROWS, compute_metrics=accuracy, per_device_eval_batch_size=4)
    metrics = trainer.evaluate()
    longest = max(len(row["input_ids"]) for row in EVAL_ROWS)
    assert seen[0].predictions.shape == (13, longest, V)
    assert seen[0].label_ids.shape == (13, longest)
    assert all(isinstance(part, np.ndarray) for part in seen[0])
    assert 0 <= metrics["eval_accuracy"] <= 1


def test_metrics_without_the_prefix_get_it_once() -> None:
    trainer = short_trainer(eval_rows=EVAL_ROWS, compute_metrics=lambda _: {"f1": 0.5, "eval_exact": 0.25})
    metrics = trainer.evaluate()
    assert (metrics["eval_f1"], metrics["eval_exact"]) == (0.5, 0.25)


def test_logits_may_be_reduced_before_they_are_kept() -> None:
    def best_token(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        assert logits.shape[:2] == labels.shape
        return logits.argmax(-1)

    def shape(prediction: EvalPrediction) -> dict[str, float]:
        return {"dimensions": prediction.predictions.ndim}

    trainer = short_trainer(eval_rows=EVAL_ROWS, compute_metrics=shape, preprocess_logits_for_metrics=best_token)
    assert trainer.evaluate()["eval_dimensions"] == 2


def test_inputs_and_losses_are_given_where_asked_for() -> None:
    seen: list[EvalPrediction] = []

    def keep(prediction: EvalPrediction) -> dict[str, float]:
        seen.append(prediction)
        return {}

    short_trainer(eval_rows=EVAL_ROWS, compute_metrics=keep, include_for_metrics=["inputs", "loss"]).evaluate()
    assert seen[0].inputs.shape[0] == 13
    assert seen[0].losses.shape == (13,)


def test_metrics_may_be_computed_batch_by_batch() -> None:
    calls: list[bool] = []

    def count_rows(prediction: EvalPrediction, compute_result: bool) -> dict[str, float]:
        calls.append(compute_result)
        return {"calls": len(calls)} if compute_result else {}

    trainer = short_trainer(
        eval_rows=EVAL_ROWS, compute_metrics=count_rows, batch_eval_metrics=True, per_device_eval_batch_size=4
    )
    assert trainer.evaluate()["eval_calls"] == 4
    assert calls == [False, False, False, True]


def test_predict_returns_predictions_labels_and_metrics() -> None:
    trainer = short_trainer(per_device_eval_batch_size=4)
    output = trainer.predict(EVAL_ROWS)
    assert isinstance(output, PredictionOutput)
    longest = max(len(row["input_ids"]) for row in EVAL_ROWS)
    assert output.predictions.shape == (13, longest, V)
    assert output.label_ids.shape == (13, longest)
    model = causal_lora().eval()
    row = torch.tensor([EVAL_ROWS[4]["input_ids"]])
    with torch.no_grad():
        expected = model(input_ids=row).logits[0].numpy()
    np.testing.assert_allclose(output.predictions[4, : row.shape[1]], expected, rtol=1e-4, atol=1e-5)
    assert (output.predictions[4, row.shape[1] : 0] == IGNORED).all()
    assert output.metrics["test_loss"] == pytest.approx(mean_over_tokens(model, EVAL_ROWS), rel=1e-6)


def test_only_the_loss_where_nothing_else_is_wanted() -> None:
    output = short_trainer(prediction_loss_only=True).predict(EVAL_ROWS)
    assert output.predictions is None
    assert output.label_ids is None
    assert "test_loss" in output.metrics


@pytest.mark.parametrize("fast_path", [True, False])
def test_evaluating_does_not_change_the_training(fast_path: bool) -> None:
    def dropped() -> Any:
        return with_lora(tiny_llama(attention_dropout=0.1), task_type="CAUSAL_LM", lora_dropout=0.1)

    alone = short_trainer(dropped(), fast_path=fast_path)
    watched = short_trainer(dropped(), eval_rows=EVAL_ROWS, eval_strategy="steps", eval_steps=1, fast_path=fast_path)
    alone.train()
    watched.train()
    assert_same_bits(adapter_of(watched.model), adapter_of(alone.model))


def test_dropout_is_off_while_evaluating() -> None:
    model = with_lora(tiny_llama(attention_dropout=0.5), task_type="CAUSAL_LM", lora_dropout=0.5)
    trainer = short_trainer(model, eval_rows=EVAL_ROWS)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] == trainer.evaluate()["eval_loss"]


class Watcher(TrainerCallback):
    """Remembers `state.best_metric` as it stands when an evaluation is announced."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **kwargs: Any) -> None:
        self.seen.append(state.best_metric)


def test_best_metric_can_be_compared_from_the_first_evaluation_on() -> None:
    watcher = Watcher()
    trainer = short_trainer(eval_rows=EVAL_ROWS, eval_strategy="epoch", callbacks=[watcher])
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert watcher.seen == [math.inf, losses[0]]
    assert trainer.state.best_metric == min(losses)


def test_best_metric_starts_at_the_bottom_where_greater_is_better() -> None:
    watcher = Watcher()
    trainer = short_trainer(
        eval_rows=EVAL_ROWS,
        eval_strategy="epoch",
        num_train_epochs=3,
        metric_for_best_model="score",
        compute_metrics=Scripted(0.25, 0.75, 0.5),
        callbacks=[watcher],
    )
    trainer.train()
    assert watcher.seen == [-math.inf, 0.25, 0.75]
    assert trainer.state.best_metric == 0.75


def test_best_metric_is_none_in_a_run_that_never_evaluates() -> None:
    trainer = short_trainer()
    trainer.train()
    assert trainer.state.best_metric is None


def test_bad_metric_names_are_answered_with_those_there_are() -> None:
    trainer = short_trainer(eval_rows=EVAL_ROWS, eval_strategy="epoch", metric_for_best_model="bleu")
    with pytest.raises(Exception, match=r"bleu.*eval_loss") as caught:
        trainer.train()
    assert isinstance(caught.value, (KeyError, ValueError))


def test_a_collator_of_the_user_pads_the_evaluation_too() -> None:
    left = short_trainer(eval_rows=EVAL_ROWS, collate=Padded(side="left", multiple=8))
    mask_sum = sum(int(batch["attention_mask"].sum()) for batch in left.get_eval_dataloader())
    assert mask_sum == sum(len(row["input_ids"]) for row in EVAL_ROWS)


def test_a_stop_request_that_python_dropped_cuts_an_evaluation_short() -> None:
    """What a signal raises in a finalizer, or while a fork waits, never arrives."""
    seen = []

    class Dropped(TrainerCallback):
        def on_prediction_step(self, *args: Any, **kwargs: Any) -> None:
            seen.append(trainer.state.global_step)
            interrupts = trainer._run.interrupts
            interrupts.requested, interrupts._may_stop_now = signal.SIGTERM, False

    settings = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}
    trainer = short_trainer(eval_rows=language_rows(6), callbacks=[Dropped()], **settings)
    with pytest.raises(Interrupted, match="SIGTERM after step 2"):
        trainer.train()
    assert seen == [2]
