"""Hyper-parameter search with optuna."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import textwrap
import weakref
from pathlib import Path
from typing import Any

import optuna
import pytest

from etude import BestRun, EarlyStoppingCallback, TrainerCallback
from etude.errors import ConfigError
from etude.search.study import default_objective
from short_run import checkpoints, logged, short_trainer
from tiny import causal_lora, language_rows

optuna.logging.set_verbosity(optuna.logging.WARNING)
pytestmark = pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")


def rates(trial: Any) -> dict[str, Any]:
    return {"learning_rate": trial.suggest_float("learning_rate", 1e-5, 1e-2, log=True)}


def searching(build: Any = None, **settings: Any) -> Any:
    base = {"max_steps": 2, "eval_rows": language_rows(4, 5), "eval_strategy": "steps", "eval_steps": 1}
    return short_trainer(model_init=build or (lambda trial: causal_lora()), **(base | settings))


def sampler() -> Any:
    return optuna.samplers.RandomSampler(seed=1)


def test_the_best_run_is_the_one_with_the_lowest_loss() -> None:
    trainer, seen = searching(), []

    class Watch(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
            seen.append((losses[-1], state.is_hyper_param_search, state.trial_params))

    trainer.add_callback(Watch)
    best = trainer.hyperparameter_search(rates, n_trials=3, sampler=sampler())
    assert isinstance(best, BestRun)
    assert best.objective == min(loss for loss, _, _ in seen)
    assert best.hyperparameters == min(seen)[2]
    assert all(in_search for _, in_search, _ in seen)
    assert trainer.hp_search_backend is None


def test_a_sweep_over_rank_and_targets() -> None:
    shapes: list[Any] = []

    def build(trial: Any) -> Any:
        if trial is None:
            return causal_lora()
        rank = trial.suggest_categorical("r", [2, 4])
        targets = trial.suggest_categorical("targets", ["q_proj", "q_proj,v_proj"]).split(",")
        shapes.append((rank, tuple(targets)))
        return causal_lora(r=rank, target_modules=targets)

    trainer = searching(build, save_strategy="steps", save_steps=2)
    grid = optuna.samplers.GridSampler({"r": [2, 4], "targets": ["q_proj", "q_proj,v_proj"]}, seed=0)
    best = trainer.hyperparameter_search(lambda trial: {}, n_trials=4, sampler=grid)
    assert len(set(shapes)) == 4
    assert set(best.hyperparameters) == {"r", "targets"}
    assert [checkpoints(f"out/run-{number}") for number in range(4)] == [[2]] * 4


def test_names_of_trials_and_direction() -> None:
    trainer = searching(save_strategy="steps", save_steps=2)
    best = trainer.hyperparameter_search(
        rates,
        compute_objective=lambda metrics: -metrics["eval_loss"],
        direction="maximize",
        n_trials=2,
        hp_name=lambda trial: f"try-{trial.number}",
        sampler=sampler(),
    )
    assert checkpoints(f"out/try-{best.run_id}") == [2]
    assert best.objective < 0


def test_without_evaluations_the_model_is_judged_at_the_end() -> None:
    trainer = searching(eval_strategy="no")
    best = trainer.hyperparameter_search(rates, n_trials=1, sampler=sampler())
    assert best.objective > 0


def test_hopeless_trials_are_pruned() -> None:
    class PruneAll(optuna.pruners.BasePruner):
        def prune(self, study: Any, trial: Any) -> bool:
            return trial.number > 0

    steps: list[int] = []

    class Watch(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.append(state.global_step)

    trainer = searching(callbacks=[Watch()])
    best = trainer.hyperparameter_search(rates, n_trials=3, pruner=PruneAll(), sampler=sampler())
    assert best.run_id == "0"
    assert steps == [2, 1, 1]


def test_several_objectives_give_all_best_runs() -> None:
    trainer = searching()
    best = trainer.hyperparameter_search(
        rates,
        compute_objective=lambda metrics: [metrics["eval_loss"], -metrics["eval_loss"]],
        direction=["minimize", "minimize"],
        n_trials=2,
        sampler=sampler(),
    )
    assert sorted(run.run_id for run in best) == ["0", "1"]
    assert all(len(run.objective) == 2 for run in best)


def test_the_model_of_one_trial_is_gone_before_the_next() -> None:
    models: list[Any] = []
    alive_at_build: list[int] = []

    def build(trial: Any) -> Any:
        gc.collect()
        alive_at_build.append(sum(model() is not None for model in models))
        model = causal_lora()
        models.append(weakref.ref(model))
        return model

    trainer = searching(build)
    trainer.hyperparameter_search(rates, n_trials=3, sampler=sampler())
    gc.collect()
    assert [model() for model in models] == [None] * len(models)
    assert max(alive_at_build[2:]) == 0


def test_patience_spent_by_one_trial_is_not_missing_in_the_next() -> None:
    trainer = searching(
        max_steps=3,
        compute_metrics=lambda prediction: {"score": 1.0},
        metric_for_best_model="score",
        load_best_model_at_end=True,
        save_strategy="steps",
        save_steps=1,
        callbacks=[EarlyStoppingCallback(2)],
    )
    steps: list[int] = []

    class Watch(TrainerCallback):
        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            steps.append(state.global_step)

    trainer.add_callback(Watch)
    trainer.hyperparameter_search(rates, n_trials=2, direction="maximize", sampler=sampler())
    assert steps == [3, 3]


def test_a_finished_search_makes_only_the_trials_that_are_missing() -> None:
    numbers: list[int] = []
    for total in (2, 2, 3):
        trainer = searching()
        original = trainer.train

        def counted(*args: Any, trial: Any = None, original: Any = original, **kwargs: Any) -> Any:
            numbers.append(trial.number)
            return original(*args, trial=trial, **kwargs)

        trainer.train = counted
        trainer.hyperparameter_search(rates, n_trials=total, storage="search.log", sampler=sampler())
    assert numbers == [0, 1, 2]


KILLED = """
    import os, signal, sys
    sys.path[:0] = {path!r}
    from test_search import rates, sampler, searching
    from etude import TrainerCallback

    class Die(TrainerCallback):
        def on_save(self, args, state, control, **_):
            if state.global_step == 1 and trials[0] == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        def on_train_begin(self, args, state, control, **_):
            trials[0] += 1

    trials = [0]
    trainer = searching(save_strategy="steps", save_steps=1, callbacks=[Die()])
    trainer.hyperparameter_search(rates, n_trials=2, storage="search.log", sampler=sampler())
"""


def test_a_killed_search_goes_on_in_the_trial_that_was_cut_off() -> None:
    path = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    script = textwrap.dedent(KILLED.format(path=path))
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (checkpoints("out/run-0"), checkpoints("out/run-1")) == ([1, 2], [1])

    resumed: list[int] = []

    class Watch(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            resumed.append(state.global_step)

    trainer = searching(save_strategy="steps", save_steps=1, callbacks=[Watch()])
    trainer.hyperparameter_search(rates, n_trials=2, storage="search.log", sampler=sampler())
    assert resumed == [1]  # one trial, from its checkpoint
    assert checkpoints("out/run-1") == [1, 2]


def test_what_cannot_be_searched_is_said() -> None:
    with pytest.raises(ConfigError, match="model_init"):
        short_trainer().hyperparameter_search(rates)
    with pytest.raises(ConfigError, match="'ray' is not supported"):
        searching().hyperparameter_search(rates, backend="ray")
    with pytest.raises(ConfigError, match="'lora_r' is no training argument"):
        searching().hyperparameter_search(lambda trial: {"lora_r": trial.suggest_int("lora_r", 1, 2)}, n_trials=1)
    with pytest.raises(ConfigError, match="n_jobs"):
        searching().hyperparameter_search(rates, n_jobs=2)


def test_the_objective_is_the_loss_or_the_sum_of_the_metrics() -> None:
    metrics = {"eval_loss": 2.0, "epoch": 1.0, "eval_runtime": 9.0, "eval_samples_per_second": 3.0}
    assert default_objective(metrics) == 2.0
    assert default_objective({**metrics, "eval_f1": 0.5, "eval_accuracy": 0.25}) == 0.75


def test_a_trial_given_to_train_reaches_model_init() -> None:
    given: list[Any] = []

    def build(trial: Any) -> Any:
        given.append(trial)
        return causal_lora(r=trial["r"] if trial else 8)

    trainer = searching(build)
    trainer.train(trial={"r": 2})
    assert given == [None, {"r": 2}]
    assert logged(trainer, "loss")
    assert trainer.model.peft_config["default"].r == 2
