"""Hooks around checkpoints: what is written into one, and put back from it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from etude import contents
from etude.callbacks import ExportableState, TrainerState
from etude.checkpoint import codec
from etude.checkpoint.store import CheckpointStore
from etude.errors import CheckpointError
from etude.hooks.base import Composition
from etude.model import adapter


class CheckpointHooks(Composition):
    """Weights, optimizer, schedule, randomness and callbacks, each to its files and back."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapters (or the whole model where there are none), and the tokenizer."""
        if self._run is not None and not _internal_call:
            self._run.saves.settle()  # whoever saves by hand may look for the checkpoints as well
        self.call_hook(self._save, output_dir or self.args.output_dir)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        adapter.save_weights(self.model, folder, state_dict)
        processor = contents.processor_of(self)
        if processor is not None:
            processor.save_pretrained(str(folder))
        contents.write_arguments(folder, contents.arguments_of(self))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self._run is not None
        self.store_flos()
        self._run.saves.save(trial)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        contents.write_optimizer(Path(output_dir), contents.optimizer_of(self, adapter.parameter_names(self.model)))

    def _save_scaler(self, output_dir: str) -> None:
        contents.write_scaler(Path(output_dir), contents.scaler_of(self))

    def _save_rng_state(self, output_dir: str) -> None:
        contents.write_random(Path(output_dir), contents.random_of(self))

    def collect_callback_states(self) -> None:
        self.state.stateful_callbacks = TrainerState(stateful_callbacks=self._stateful_callbacks()).stateful_callbacks

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        adapter.load_weights(self.model if model is None else model, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint or "")
        CheckpointStore(folder.parent).verify(folder)
        adapter.load_weights(self.model, folder)
        step, metric = self.state.best_global_step, self.state.best_metric
        is_written = folder.name == f"checkpoint-{step}"
        shown = str(metric) if is_written else f"step {step} was better, {metric}, but could not be saved"
        self.notices.say(f"loaded the best model, {folder.name} ({shown})")

    def _load_optimizer_and_scheduler(self, checkpoint: str) -> None:
        """Restore the optimizer's state and the place in the schedule; settings come from the arguments of this run.

        A schedule that is a function of the step needs only the step. One that follows a metric, or the user's own, is
        restored whole, with the learning rates that it had set.
        """
        folder = Path(checkpoint)
        if not (folder / "optimizer.json").exists():
            raise CheckpointError(
                "holds weights only (save_only_model=True): training cannot go on from it", path=folder
            )
        fresh = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        names = adapter.parameter_names(self.model)
        tree = codec.load_tree(folder, "optimizer", codec.max_optimizer_tensors(names))
        codec.load_optimizer_tree(self.optimizer, tree, names, folder)
        schedule = codec.load_tree(folder, "scheduler")
        is_function_of_step = type(self.lr_scheduler) is torch.optim.lr_scheduler.LambdaLR and not self._given_scheduler
        if not is_function_of_step or self._given_optimizer:
            self.lr_scheduler.load_state_dict(schedule)
            return
        base_rates = self.lr_scheduler.base_lrs
        self.lr_scheduler.load_state_dict(schedule)
        self.lr_scheduler.base_lrs = base_rates
        rates = []
        for group, settings, base, factor in zip(
            self.optimizer.param_groups, fresh, base_rates, self.lr_scheduler.lr_lambdas, strict=True
        ):
            group.update(settings)
            group["lr"] = base * factor(self.lr_scheduler.last_epoch)
            rates.append(group["lr"])
        self.lr_scheduler._last_lr = rates

    def _load_scaler(self, checkpoint: str) -> None:
        assert self._run is not None
        self._run.scaler.load_state(codec.load_tree(Path(checkpoint), "scaler"))

    def _load_rng_state(self, checkpoint: str) -> None:
        codec.load_random_tree(codec.load_tree(Path(checkpoint), "rng"))

    def _load_callback_state(self) -> None:
        """Give stateful callbacks what they had when the checkpoint was written.

        Their settings stay those of this run, and so does the control, unless
        `args.restore_callback_states_from_checkpoint` asks for those of the checkpoint.
        """
        with_settings = self.args.restore_callback_states_from_checkpoint
        saved: dict[str, list[dict[str, Any]]] = {
            name: list(states) if isinstance(states, list) else [states]
            for name, states in self.state.stateful_callbacks.items()
        }
        for callback in self.callback_handler.callbacks:
            states = saved.get(type(callback).__name__, [])
            if states and callable(getattr(callback, "state", None)):
                state, own = states.pop(0), callback.state()
                if with_settings:  # no others than its own, whatever the file says
                    settings = {name: value for name, value in state.get("args", {}).items() if name in own["args"]}
                    vars(callback).update(vars(type(callback)(**settings)))
                for name in own["attributes"]:
                    if name in state["attributes"]:
                        setattr(callback, name, state["attributes"][name])
        control = saved.pop("TrainerControl", [])
        if with_settings and control:
            self.control.should_training_stop = bool(control[0].get("args", {}).get("should_training_stop"))
        missing = [name for name, states in saved.items() if states]
        if missing:
            self.notices.say(
                f"the checkpoint has the state of callbacks that this run does not have: {', '.join(missing)}"
            )

    def _stateful_callbacks(self) -> list[Any]:
        candidates = [*self.callback_handler.callbacks, self.control]
        return [c for c in candidates if isinstance(c, ExportableState) or _is_transformers_exportable(c)]

    def _fresh_state(self) -> TrainerState:
        return TrainerState(
            stateful_callbacks=self._stateful_callbacks(),
            train_batch_size=self.args.train_batch_size,
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
        )


def _is_transformers_exportable(callback: Any) -> bool:
    return any(base.__name__ == "ExportableState" for base in type(callback).__mro__)
