"""Hooks around evaluation and prediction."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from etude.data.batching import count_items
from etude.errors import ConfigError
from etude.evaluation import Kept, evaluate
from etude.hooks.base import Composition, as_tuple, speed_metrics
from etude.outputs import EvalLoopOutput, PredictionOutput


class EvaluationHooks(Composition):
    """What is measured, on which outputs, and which model is the best."""

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Loss (weighted by items) and metrics of an evaluation set, or of each of several (`{prefix}_{name}_...`)."""
        override = eval_dataset is not None
        dataset = eval_dataset if override else self.eval_dataset
        if isinstance(dataset, dict):
            metrics: dict[str, float] = {}
            for name, part in dataset.items():
                metrics |= self.evaluate(part if override else name, ignore_keys, f"{metric_key_prefix}_{name}")
            return metrics
        started = time.time()
        loader = self.get_eval_dataloader(dataset if override or isinstance(dataset, str) else None)
        loss_only = True if self.compute_metrics is None else None
        with self.memory.stage("eval") as memory:
            output = self.evaluation_loop(loader, "Evaluation", loss_only, ignore_keys, metric_key_prefix)
            metrics = (output.metrics or {}) | memory.finish()
        metrics |= self._evaluation_speed(metric_key_prefix, started, output)
        self.call_hook(self.log, metrics)
        if self.is_in_train and self.state.best_metric is None:
            self.state.best_metric = -math.inf if self.args.greater_is_better else math.inf
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def predict(
        self, test_dataset: Any, ignore_keys: list[str] | None = None, metric_key_prefix: str = "test"
    ) -> PredictionOutput:
        """Outputs, labels and metrics of a test set."""
        started = time.time()
        loader = self.get_test_dataloader(test_dataset)
        with self.memory.stage("test") as memory:
            output = self.evaluation_loop(
                loader, description="Prediction", ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix
            )
            metrics = (output.metrics or {}) | memory.finish()
        metrics |= self._evaluation_speed(metric_key_prefix, started, output)
        self.control = self.callback_handler.on_predict(self.args, self.state, self.control, metrics)
        return PredictionOutput(output.predictions, output.label_ids, metrics)

    def _evaluation_speed(self, prefix: str, started: float, output: EvalLoopOutput) -> dict[str, float]:
        samples = output.num_samples or 0
        return speed_metrics(prefix, time.time() - started, samples, math.ceil(samples / self.args.eval_batch_size))

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        args, model = self.args, self.model_wrapped
        loss_only = prediction_loss_only if prediction_loss_only is not None else args.prediction_loss_only
        if not self.is_in_train and (args.fp16_full_eval or args.bf16_full_eval):
            model.to(dtype=torch.float16 if args.fp16_full_eval else torch.bfloat16)
        was_training = model.training
        model.eval()
        for_evaluation = getattr(self.optimizer, "eval", None)
        if callable(for_evaluation):
            for_evaluation()
        self.callback_handler.eval_dataloader = dataloader
        keep = Kept(
            self.compute_metrics,
            self.preprocess_logits_for_metrics,
            keeps_outputs=not loss_only and not (args.batch_eval_metrics and description != "Prediction"),
            include=args.include_for_metrics,
            main_input=getattr(self.model, "main_input_name", "input_ids"),
            by_batch=args.batch_eval_metrics,
            concatenate=args.eval_do_concat_batches,
            move_every=args.eval_accumulation_steps,
        )

        run = self._run if self.is_in_train else None
        interrupts = run.interrupts if run is not None and run.events.evaluation_can_be_repeated() else None

        def on_batch() -> None:
            self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
            if interrupts is not None:
                interrupts.stop_if_requested()

        def run_loop() -> EvalLoopOutput:
            return evaluate(
                dataloader,
                predict=lambda inputs: self.call_hook(
                    self.prediction_step, model, inputs, loss_only, ignore_keys=ignore_keys
                ),
                count_items=lambda inputs: count_items(inputs, shifts_labels=self.shifts_labels),
                keep=keep,
                on_batch=on_batch,
            )

        with interrupts.stopping_at_once() if interrupts is not None else nullcontext():
            output = run_loop()
        model.train(was_training)
        metrics = {
            name if name.startswith(f"{metric_key_prefix}_") else f"{metric_key_prefix}_{name}": _plain_number(value)
            for name, value in (output.metrics or {}).items()
        }
        return EvalLoopOutput(output.predictions, output.label_ids, metrics, output.num_samples)

    def prediction_step(
        self, model: nn.Module, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """(mean loss, outputs, labels) of one batch; each may be None."""
        is_mapping = isinstance(inputs, Mapping)
        has_labels = bool(self.label_names) and is_mapping and all(inputs.get(n) is not None for n in self.label_names)
        returns_loss = not self.label_names and is_mapping and inputs.get("return_loss", self.can_return_loss)
        inputs = self._prepare_inputs(inputs)
        if ignore_keys is None:
            config = getattr(self.model, "config", None)
            ignore_keys = list(getattr(config, "keys_to_ignore_at_inference", ["past_key_values"])) if config else []
        labels = None
        if has_labels:
            parts = tuple(_detached(inputs.get(name)) for name in self.label_names)
            labels = parts[0] if len(parts) == 1 else parts
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = None
            if has_labels or returns_loss:
                num_items = count_items(inputs, shifts_labels=self.shifts_labels)
                if prediction_loss_only and self.path is not None and self.path.name == "packed" and num_items:
                    return self.path.loss(model, inputs, num_items).detach(), None, None
                is_own = "compute_loss" in self.overridden or self.compute_loss_func is not None
                sees_items = is_own and num_items is not None and self._tells_overrides_items()
                items = self.items_tensor(num_items) if sees_items else None
                loss, outputs = self.call_hook(
                    self.compute_loss, model, inputs, return_outputs=True, num_items_in_batch=items
                )
                loss = loss.detach().mean()
            else:
                outputs = model(**inputs) if is_mapping else model(*as_tuple(inputs))
        if prediction_loss_only:
            return loss, None, None
        if isinstance(outputs, Mapping):
            logits = tuple(
                v for k, v in outputs.items() if k not in ignore_keys and not (k == "loss" and loss is not None)
            )
        else:
            logits = tuple(outputs[1:]) if loss is not None else outputs
        logits = _detached(logits)
        if isinstance(logits, tuple) and len(logits) == 1:
            logits = logits[0]
        return loss, logits, labels

    def _evaluate(
        self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False
    ) -> dict[str, float]:
        metrics: dict[str, float] = self.call_hook(self.evaluate, ignore_keys=ignore_keys_for_eval)
        self._report_to_hp_search(trial, self.state.global_step, metrics)
        if self.schedule_follows_metric and not skip_scheduler:
            self.lr_scheduler.step(_metric_named(self.args.metric_for_best_model or "loss", metrics))
        return metrics

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Whether this evaluation is the best so far; `state.best_metric` then holds it."""
        name = self.args.metric_for_best_model
        value = _metric_named(name, metrics) if name is not None else metrics.get("eval_loss")
        if value is None:
            return False
        best = self.state.best_metric
        if best is None:
            best = -math.inf if self.args.greater_is_better else math.inf
        is_best = value > best if self.args.greater_is_better else value < best
        if is_best:
            self.state.best_metric = value
            if self.args.save_strategy != "no" and name is not None:
                self.state.best_global_step = self.state.global_step
        return bool(is_best)


def _detached(value: Any) -> Any:
    if torch.is_tensor(value):
        return value.detach()
    if isinstance(value, Mapping):
        return {key: _detached(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_detached(item) for item in value)
    return value


def _metric_named(name: str, metrics: dict[str, float]) -> float:
    key = name if name.startswith("eval_") else f"eval_{name}"
    if key not in metrics:
        raise ConfigError(
            f"'{key}' is not among the metrics of the evaluation: {', '.join(metrics)}", field="metric_for_best_model"
        )
    return metrics[key]


def _plain_number(value: Any) -> Any:
    return value.item() if hasattr(value, "item") and getattr(value, "size", 1) in (1,) else value
