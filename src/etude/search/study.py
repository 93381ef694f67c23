"""A search with optuna over anything that trains once and returns its objective.

A study kept in a storage outlives the process: started again it makes only the trials that are missing, and a trial that
was cut off is tried once more with the same hyper-parameters, in the folder (so from the checkpoint) of the one cut off.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from etude.errors import ConfigError, require
from etude.outputs import BestRun

WORKER = "etude_worker"
"""Attribute of a trial: `host:process id` of who trains it."""

CONTINUES = "etude_continues"
"""Attribute of a trial: the number of the cut-off trial that it goes on from."""

SPEEDS = ("_runtime", "_per_second", "_compilation_time", "_preparation_time")


def optuna() -> Any:
    """
    Raises:
        MissingDependencyError: it is not installed.
    """
    return cast(Any, require("optuna", purpose="hyper-parameter search"))


def run_study(
    objective: Callable[[Any], float | list[float]],
    *,
    num_trials: int,
    direction: str | list[str],
    name: str,
    options: Mapping[str, Any],
) -> BestRun | list[BestRun]:
    """Call `objective(trial)` until the study has `num_trials` finished trials; the best, or all best of several objectives.

    `options` are those of `optuna.create_study` and `Study.optimize`. `storage` may also be the path of a file. With a
    storage the study is called `name` unless `study_name` is given, and goes on where it is there already.

    Raises:
        ConfigError: trials at the same time in one process.
    """
    settings = dict(options)
    if settings.pop("n_jobs", 1) != 1:
        raise ConfigError(
            "one trainer trains one trial at a time; start several processes on one storage", field="n_jobs"
        )
    running = {key: settings.pop(key) for key in ("timeout", "gc_after_trial", "catch") if key in settings}
    study = _open_study(direction, name, settings)
    _try_cut_off_trials_again(study)
    states = optuna().trial.TrialState
    missing = num_trials - len(study.get_trials(deepcopy=False, states=(states.COMPLETE, states.PRUNED)))

    def attempt(trial: Any) -> float | list[float]:
        trial.set_user_attr(WORKER, f"{socket.gethostname()}:{os.getpid()}")
        return objective(trial)

    if (
        missing > 0
    ):  # a trial that failed with an error was let through by `catch`, or ended the search: it is made again
        study.optimize(attempt, n_trials=missing, **running)
    if isinstance(direction, list):
        return [BestRun(str(best.number), best.values, best.params) for best in study.best_trials]
    best = study.best_trial
    return BestRun(str(best.number), best.value, best.params)


def _open_study(direction: str | list[str], name: str, settings: dict[str, Any]) -> Any:
    storage = settings.get("storage")
    if isinstance(storage, Path) or (isinstance(storage, str) and "://" not in storage):
        Path(storage).parent.mkdir(parents=True, exist_ok=True)
        storages = optuna().storages
        settings["storage"] = storages.JournalStorage(storages.journal.JournalFileBackend(str(storage)))
    if storage is not None:
        settings = {"study_name": name, "load_if_exists": True, **settings}
    directions = {"directions": direction} if isinstance(direction, list) else {"direction": direction}
    return optuna().create_study(**directions, **settings)


def _try_cut_off_trials_again(study: Any) -> None:
    """Trials that a process of this machine was training when it died: failed, and queued with what they had drawn."""
    states = optuna().trial.TrialState
    for trial in study.get_trials(deepcopy=False, states=(states.RUNNING,)):
        host, _, process = str(trial.user_attrs.get(WORKER, "")).rpartition(":")
        if host != socket.gethostname() or _is_alive(int(process)):
            continue
        study.tell(trial.number, state=states.FAIL)
        study.enqueue_trial(trial.params, user_attrs={CONTINUES: trial.user_attrs.get(CONTINUES, trial.number)})


def _is_alive(process: int) -> bool:
    if process == os.getpid():
        return False  # an earlier process had our number: this one has only begun
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def folder_number(trial: Any) -> int:
    """The number in the name of a trial's folder: its own, or that of the trial it goes on from."""
    return int(getattr(trial, "user_attrs", {}).get(CONTINUES, trial.number))


def goes_on(trial: Any) -> bool:
    """Whether the trial goes on from one that was cut off."""
    return CONTINUES in getattr(trial, "user_attrs", {})


def default_space(trial: Any) -> dict[str, Any]:
    """transformers' default search space."""
    return {
        "learning_rate": trial.suggest_float("learning_rate", 1e-6, 1e-4, log=True),
        "num_train_epochs": trial.suggest_int("num_train_epochs", 1, 5),
        "seed": trial.suggest_int("seed", 1, 40),
        "per_device_train_batch_size": trial.suggest_categorical("per_device_train_batch_size", [4, 8, 16, 32, 64]),
    }


def default_objective(metrics: Mapping[str, float]) -> float:
    """The evaluation loss, or the sum of the other metrics where there are any."""
    others = {
        name: value
        for name, value in metrics.items()
        if name not in ("eval_loss", "epoch") and not name.endswith(SPEEDS) and "_mem_" not in name
    }
    return float(sum(others.values())) if others else float(metrics["eval_loss"])
