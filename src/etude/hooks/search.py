"""Hooks of the hyper-parameter search: one trainer, trained again and again with what each trial draws."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from etude.errors import ConfigError
from etude.hooks.base import Composition
from etude.outputs import BestRun
from etude.search import study


class SearchHooks(Composition):
    """What a trial sets, where it saves, and what it reports."""

    hp_search_backend: str | None = None
    hp_name: Callable[[Any], str] | None = None
    hp_space: Callable[[Any], dict[str, Any]]
    compute_objective: Callable[[dict[str, float]], float | list[float]]
    objective: float | list[float] | None = None
    _trial: Any = None

    def hyperparameter_search(
        self,
        hp_space: Callable[[Any], dict[str, Any]] | None = None,
        compute_objective: Callable[[dict[str, float]], float | list[float]] | None = None,
        n_trials: int = 20,
        direction: str | list[str] = "minimize",
        backend: str | None = None,
        hp_name: Callable[[Any], str] | None = None,
        **kwargs: Any,
    ) -> BestRun | list[BestRun]:
        """Train `n_trials` times with other hyper-parameters; the best run, or all best runs of several objectives.

        Args:
            hp_space: trial -> {argument: value}. `model_init(trial)` may draw too (LoRA rank, targets).
            compute_objective: metrics of an evaluation -> objective; the loss, or the sum of the metrics, if not given.
            n_trials: trials of the study in all: a search that goes on (`storage=`) makes those that are missing.
            direction: "minimize" or "maximize"; a list of them for several objectives.
            backend: "optuna".
            hp_name: trial -> name of its folder in `output_dir`; `run-<number>` if not given.
            kwargs: of `optuna.create_study` and `Study.optimize`: `pruner`, `sampler`, `storage` (also the path of a
                file), `study_name`, `timeout`, `catch`.

        Raises:
            ConfigError: there is no `model_init`, or another backend is asked for.
            MissingDependencyError: optuna is not installed.
        """
        name = str(getattr(backend, "value", backend or "optuna"))
        if name != "optuna":
            raise ConfigError(f"'{name}' is not supported, 'optuna' is", field="backend")
        if self.model_init is None:
            raise ConfigError("is needed: every trial begins with a new model", field="model_init")
        study.optuna()
        self.hp_space = hp_space or study.default_space
        self.compute_objective = compute_objective or study.default_objective
        self.hp_search_backend, self.hp_name = name, hp_name
        untouched = [(callback, copy.deepcopy(callback.state())) for callback in self._stateful_callbacks()]

        def train_once(trial: Any) -> float | list[float]:
            for callback, state in untouched:  # patience spent by one trial is not missing in the next
                for attribute, value in state["attributes"].items():
                    setattr(callback, attribute, copy.deepcopy(value))
            return self._run_trial(trial)

        try:
            return study.run_study(
                train_once,
                num_trials=n_trials,
                direction=direction,
                name=Path(str(self.args.output_dir)).name,
                options=kwargs,
            )
        finally:
            self.hp_search_backend = None

    def _run_trial(self, trial: Any) -> float | list[float]:
        self.objective = None
        try:
            self.train(resume_from_checkpoint="auto" if study.goes_on(trial) else None, trial=trial)
            if self.objective is None:  # nothing was evaluated while it trained
                self.objective = self.compute_objective(dict(self.evaluate()))
        finally:
            self._let_go_of_the_model()
        return self.objective

    def _let_go_of_the_model(self) -> None:
        """Two trials must never be in memory at once."""
        handler = self.callback_handler
        self.model = self.model_wrapped = self.optimizer = self.lr_scheduler = None
        handler.model = handler.optimizer = handler.lr_scheduler = None
        handler.train_dataloader = handler.eval_dataloader = None
        self.path, self._run = None, None
        gc.collect()
        if self.args.device.type == "cuda":
            torch.cuda.empty_cache()

    def _hp_search_setup(self, trial: Any) -> None:
        """Write what the trial draws into the arguments.

        Raises:
            ConfigError: the search space names something that is no argument.
        """
        self._trial = trial
        if self.hp_search_backend is None or trial is None:
            return
        drawn: Mapping[str, Any] = self.hp_space(trial)
        for name, value in drawn.items():
            if not hasattr(self.args, name):
                raise ConfigError(
                    f"'{name}' is no training argument; what the model is made of is drawn in model_init(trial)",
                    field="hp_space",
                )
            before = getattr(self.args, name)
            setattr(self.args, name, value if before is None else type(before)(value))
        self.args.validate()

    def _report_to_hp_search(self, trial: Any, step: int, metrics: dict[str, float]) -> None:
        """Tell the study how the trial does.

        Raises:
            optuna.TrialPruned: it is not worth going on.
        """
        if self.hp_search_backend is None or trial is None:
            return
        self.objective = self.compute_objective(dict(metrics))
        if isinstance(self.objective, (list, tuple)) or len(trial.study.directions) > 1:
            return
        trial.report(self.objective, step)
        if trial.should_prune():
            self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)
            raise study.optuna().TrialPruned

    def _get_output_dir(self, trial: Any) -> str:
        """The output folder, or that of the trial inside it."""
        root = str(self.args.output_dir)
        if trial is None or self.hp_search_backend is None:
            return root
        name = self.hp_name(trial) if self.hp_name is not None else f"run-{study.folder_number(trial)}"
        return str(Path(root, name))
