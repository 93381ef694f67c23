"""Hooks after a step: counting, logging, and acting on the control flags."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from etude.arguments import SaveStrategy
from etude.errors import CheckpointError
from etude.hooks.base import Composition
from etude.model import loss as model_loss


class ProgressHooks(Composition):
    """What has been done, and what happens between two steps."""

    def add_training_loss(self, loss: torch.Tensor) -> None:
        if self.args.on_nonfinite == "continue":
            since = 1 + self.state.global_step - self._globalstep_last_logged
            loss = (
                torch.where(loss.isfinite(), loss, self._tr_loss / since) if self.args.logging_nan_inf_filter else loss
            )
        self._tr_loss += loss.to(self._tr_loss.device)

    def count_work(self, inputs: Any) -> None:
        """Floating-point operations and input tokens of one micro-batch, for the summary."""
        self.current_flos += self.floating_point_ops(inputs)
        self._track_num_input_tokens(inputs)
        self.throughput.count(inputs, padding_is_removed=self.path is not None and self.path.name == "packed")

    def floating_point_ops(self, inputs: Any) -> float:
        """6 x input elements x parameters, transformers' estimate of one forward and backward."""
        base = model_loss.unwrapped(self.model)
        tokens = inputs.get(getattr(base, "main_input_name", "input_ids")) if isinstance(inputs, Mapping) else None
        if not torch.is_tensor(tokens) or not hasattr(base, "num_parameters"):
            return 0.0
        self._flops_per_token = self._flops_per_token or 6 * base.num_parameters(exclude_embeddings=True)
        return float(self._flops_per_token * tokens.numel())

    def store_flos(self) -> None:
        self.state.total_flos += self.current_flos
        self.current_flos = 0.0

    def _track_num_input_tokens(self, inputs: Any) -> None:
        kind = self.args.include_num_input_tokens_seen
        if kind == "no" or not isinstance(inputs, Mapping):
            return
        tokens = inputs.get(getattr(self.model, "main_input_name", "input_ids"))
        mask = inputs.get("attention_mask")
        pad = getattr(self.processing_class, "pad_token_id", None)
        if torch.is_tensor(mask) and kind == "non_padding":
            self.state.num_input_tokens_seen += int(mask.sum())
        elif torch.is_tensor(tokens) and kind == "non_padding" and pad is not None:
            self.state.num_input_tokens_seen += int((tokens != pad).sum())
        elif torch.is_tensor(tokens):
            if kind == "non_padding":
                self.notices.say_once(
                    "include_num_input_tokens_seen='non_padding' counts all tokens here: the batches have no attention "
                    "mask, and no tokenizer says which token is padding"
                )
            self.state.num_input_tokens_seen += tokens.numel()

    def _maybe_log_save_evaluate(
        self,
        tr_loss: torch.Tensor,
        grad_norm: Any,
        model: nn.Module,
        trial: Any,
        epoch: float,
        ignore_keys_for_eval: list[str] | None,
        start_time: float | None = None,
        learning_rate: float | None = None,
    ) -> None:
        """After a step or an epoch: log, evaluate and save where the control flags ask for it."""
        if self.control.should_log and self.state.global_step > self._globalstep_last_logged:
            loss_sum = float(tr_loss)
            tr_loss.zero_()
            logs = {"loss": loss_sum / (self.state.global_step - self._globalstep_last_logged)}
            if grad_norm is not None:
                logs["grad_norm"] = float(grad_norm)
            logs["learning_rate"] = learning_rate if learning_rate is not None else self._get_learning_rate()
            self._total_loss_scalar += loss_sum
            self._globalstep_last_logged = self.state.global_step
            self.store_flos()
            self.call_hook(self.log, logs, start_time=start_time)
        if self.control.should_evaluate:
            metrics = self.call_hook(self._evaluate, trial=trial, ignore_keys_for_eval=ignore_keys_for_eval)
            is_best = self.call_hook(self._determine_best_metric, metrics=metrics, trial=trial)
            if self.args.save_strategy == SaveStrategy.BEST:
                self.control.should_save = is_best
            elif is_best and self._keeps_every_best():
                self.control.should_save = True
        if self.control.should_save:
            self._try_to_save(model, trial)

    def _keeps_every_best(self) -> bool:
        """Whoever names the metric of the best model wants that model, also between two regular saves."""
        asked = "metric_for_best_model" in self.args.explicit or self.args.load_best_model_at_end
        return asked and self.args.save_strategy != "no"

    def _try_to_save(self, model: nn.Module, trial: Any) -> None:
        assert self._run is not None
        is_final = self.state.global_step >= self.state.max_steps or self.control.should_training_stop
        saves = self._run.saves
        with saves.beside_training(allowed=not is_final):
            try:
                self.call_hook(self._save_checkpoint, model, trial=trial)
            except CheckpointError as error:
                saves.failed(error, is_final=is_final)
                self.control.should_save = False
                return
        self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the epoch, append to `state.log_history` and tell the callbacks."""
        if self.state.epoch is not None:
            logs["epoch"] = self.state.epoch
        if self.args.include_num_input_tokens_seen != "no":
            logs["num_input_tokens_seen"] = self.state.num_input_tokens_seen
            if start_time is not None:
                seconds = time.time() - start_time
                tokens = self.state.num_input_tokens_seen - self._initial_num_input_tokens_seen
                logs["train_runtime"] = round(seconds, 4)
                logs["train_tokens_per_second"] = round(tokens / max(seconds, 1e-9), 3)
        self.state.log_history.append({**logs, "step": self.state.global_step})
        self.control = self.callback_handler.on_log(self.args, self.state, self.control, logs)
