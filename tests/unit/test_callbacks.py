"""Events, state, flags and the built-in callbacks behave as those of transformers, and write valid JSON."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers
from transformers import trainer_callback as peer

from etude.callbacks import (
    CallbackHandler,
    DefaultFlowCallback,
    EarlyStoppingCallback,
    ExportableState,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from etude.errors import CheckpointError, ConfigError

EVENTS = sorted(name for name in vars(peer.TrainerCallback) if name.startswith("on_"))
KWARGS = {
    "model", "processing_class", "tokenizer", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader",
}  # fmt: skip


def arguments(**changes: Any) -> SimpleNamespace:
    defaults = {
        "logging_strategy": "steps",
        "logging_steps": 2,
        "logging_first_step": False,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "eval_delay": 0,
        "save_strategy": "steps",
        "save_steps": 4,
        "load_best_model_at_end": True,
        "metric_for_best_model": "loss",
        "greater_is_better": False,
    }
    return SimpleNamespace(**{**defaults, **changes})


def handler(*callbacks: Any) -> CallbackHandler:
    return CallbackHandler(callbacks, "model", "tokenizer", "optimizer", "scheduler")


class Recorder(TrainerCallback):
    """Remembers every event with its keyword arguments."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)
        return lambda args, state, control, **kwargs: self.seen.append((name, kwargs))


# ---------------------------------------------------------------- events


def test_the_events_are_the_sixteen_of_transformers() -> None:
    assert sorted(name for name in vars(TrainerCallback) if name.startswith("on_")) == EVENTS
    assert len(EVENTS) == 16


@pytest.mark.parametrize("event", EVENTS)
def test_an_event_reaches_callbacks_with_everything_they_may_use(event: str) -> None:
    recorder, control = Recorder(), TrainerControl()
    extra = {"on_log": {"logs": {"loss": 1.0}}}.get(event, {})
    extra = {"metrics": {"eval_loss": 1.0}} if event in ("on_evaluate", "on_predict") else extra
    answer = getattr(handler(recorder), event)(arguments(), TrainerState(), control, **extra)
    ((name, kwargs),) = recorder.seen
    assert name == event and set(kwargs) == KWARGS | set(extra)
    assert kwargs["tokenizer"] is kwargs["processing_class"] == "tokenizer"
    assert answer is control


@pytest.mark.parametrize("event", EVENTS)
def test_flags_are_cleared_by_the_same_events_as_in_transformers(event: str) -> None:
    def after(a_handler: Any, control: Any) -> dict[str, bool]:
        extra = {"on_log": {"logs": {}}, "on_evaluate": {"metrics": {}}, "on_predict": {"metrics": {}}}.get(event, {})
        return getattr(a_handler, event)(arguments(), TrainerState(), control, **extra).state()["args"]

    theirs = peer.CallbackHandler([peer.DefaultFlowCallback()], None, None, None, None)
    theirs.callbacks = []
    raised = dict.fromkeys(TrainerControl().state()["args"], True)
    assert after(handler(), TrainerControl(**raised)) == after(theirs, peer.TrainerControl(**raised))


def test_the_scopes_of_the_flags() -> None:
    raised = dict.fromkeys(TrainerControl().state()["args"], True)
    control = TrainerControl(**raised)
    control._new_step()
    assert (control.should_save, control.should_evaluate, control.should_log) == (False, False, False)
    assert control.should_epoch_stop and control.should_training_stop
    control._new_epoch()
    control._new_training()
    assert control == TrainerControl() and TrainerControl.from_state(control.state()) == control


def test_a_callback_may_return_another_control_and_none_keeps_it() -> None:
    other = TrainerControl(should_save=True)

    class Replaces(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
            return other

    class Looks(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert control is other
            control.should_log = True

    answer = handler(Replaces(), Looks()).on_step_end(arguments(), TrainerState(), TrainerControl())
    assert answer is other and other.should_log


def test_a_callback_without_the_event_is_skipped_and_own_events_are_possible() -> None:
    class OnlyMine:
        called = 0

        def on_my_event(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.called += kwargs["amount"]

    mine = OnlyMine()
    events = handler(mine, Recorder)
    events.on_step_end(arguments(), TrainerState(), TrainerControl())
    events.call_event("on_my_event", arguments(), TrainerState(), TrainerControl(), amount=2)
    assert mine.called == 2


def test_a_callback_written_for_transformers_works() -> None:
    class Theirs(peer.TrainerCallback):
        def on_log(
            self, args: Any, state: Any, control: Any, logs: Any = None, model: Any = None, **kwargs: Any
        ) -> Any:
            control.should_training_stop = logs["loss"] > 1 and model == "model"
            return control

    control = handler(Theirs).on_log(arguments(), TrainerState(), TrainerControl(), logs={"loss": 2.0})
    assert control.should_training_stop


def test_callbacks_are_added_taken_out_and_listed() -> None:
    first, second = EarlyStoppingCallback(), EarlyStoppingCallback()
    events = handler(first, DefaultFlowCallback, second)
    assert events.callback_list == "EarlyStoppingCallback\nDefaultFlowCallback\nEarlyStoppingCallback"
    assert events.pop_callback(second) is second
    assert events.pop_callback(EarlyStoppingCallback) is first
    assert events.pop_callback(EarlyStoppingCallback) is None
    events.remove_callback(transformers.trainer_callback.DefaultFlowCallback)  # theirs stands for ours
    assert events.callbacks == []


def test_a_callback_may_take_itself_out_during_an_event() -> None:
    class Once(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            events.remove_callback(self)

    recorder = Recorder()
    events = handler(Once(), recorder)
    events.on_step_end(arguments(), TrainerState(), TrainerControl())
    assert len(recorder.seen) == 1 and events.callbacks == [recorder]


def test_a_second_callback_of_a_class_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    handler(DefaultFlowCallback, DefaultFlowCallback)
    assert "a second DefaultFlowCallback" in caplog.text


# ---------------------------------------------------------------- state


def test_the_state_has_the_fields_of_transformers_and_both_read_each_other(tmp_path: Path) -> None:
    ours = TrainerState(epoch=1.5, global_step=3, log_history=[{"loss": 2.0, "step": 3}], best_metric=0.5)
    ours.save_to_json(tmp_path / "ours.json")
    theirs = peer.TrainerState.load_from_json(str(tmp_path / "ours.json"))
    assert vars(theirs) == vars(ours)
    theirs.save_to_json(str(tmp_path / "theirs.json"))
    assert TrainerState.load_from_json(tmp_path / "theirs.json") == ours
    assert (tmp_path / "ours.json").read_bytes() == (tmp_path / "theirs.json").read_bytes()


@pytest.mark.parametrize("unset", [math.inf, -math.inf])
def test_an_unjudged_best_metric_is_null_in_json(tmp_path: Path, unset: float) -> None:
    TrainerState(best_metric=unset).save_to_json(tmp_path / "state.json")
    assert json.loads((tmp_path / "state.json").read_text())["best_metric"] is None
    assert TrainerState.load_from_json(tmp_path / "state.json").best_metric is None


def test_array_scalars_and_non_finite_numbers_give_valid_json(tmp_path: Path) -> None:
    logs = [{"eval_f1": np.float32(0.5), "count": np.int64(3), "loss": math.nan, "each": [np.float64(math.inf), 1]}]
    TrainerState(log_history=logs).save_to_json(tmp_path / "state.json")

    def refuse(token: str) -> None:
        raise AssertionError(f"{token} is no JSON")

    content = json.loads((tmp_path / "state.json").read_text(), parse_constant=refuse)
    assert content["log_history"] == [{"eval_f1": 0.5, "count": 3, "loss": None, "each": [None, 1]}]


@pytest.mark.parametrize("content", ["{", "[1]", "\x00"])
def test_a_damaged_state_names_the_file(tmp_path: Path, content: str) -> None:
    (tmp_path / "trainer_state.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"trainer_state\.json: is .*older checkpoint"):
        TrainerState.load_from_json(tmp_path / "trainer_state.json")


def test_fields_of_other_versions_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"global_step": 4, "from_the_future": 1, "log_history": null}')
    assert TrainerState.load_from_json(tmp_path / "state.json") == TrainerState(global_step=4)


@pytest.mark.parametrize("steps", [0.1, 0.5, 1, 7, 0, None])
@pytest.mark.parametrize("max_steps", [1, 10, 33])
def test_intervals_equal_those_of_transformers(steps: float | None, max_steps: int) -> None:
    args = arguments(logging_steps=steps, eval_steps=steps, save_steps=steps)
    ours, theirs = TrainerState(), peer.TrainerState()
    ours.compute_steps(args, max_steps)
    theirs.compute_steps(args, max_steps)
    assert vars(ours) == vars(theirs)


def test_training_references_come_from_the_trainer_and_the_trial() -> None:
    trainer = SimpleNamespace(
        hp_name=lambda trial: f"trial-{trial.number}",
        _trial=SimpleNamespace(number=7),
        is_local_process_zero=lambda: True,
        is_world_process_zero=lambda: False,
    )
    state = TrainerState()
    state.init_training_references(trainer, 10, 2, SimpleNamespace(params={"learning_rate": 0.1}))
    assert (state.trial_name, state.trial_params) == ("trial-7", {"learning_rate": 0.1})
    assert (state.max_steps, state.num_train_epochs, state.is_world_process_zero) == (10, 2, False)


def test_states_of_callbacks_are_kept_by_class_name() -> None:
    one, two = EarlyStoppingCallback(2), peer.EarlyStoppingCallback(3)
    state = TrainerState(stateful_callbacks=[one, two, TrainerControl()])
    saved = state.stateful_callbacks
    assert [s["args"]["early_stopping_patience"] for s in saved["EarlyStoppingCallback"]] == [2, 3]
    assert saved["TrainerControl"] == TrainerControl().state()
    with pytest.raises(TypeError, match="DefaultFlowCallback has no state"):
        TrainerState(stateful_callbacks=[DefaultFlowCallback()])


# ---------------------------------------------------------------- built-in callbacks

FLOWS = list(
    itertools.product(
        ("steps", "epoch", "no"),  # logging_strategy
        (False, True),  # logging_first_step
        ("steps", "epoch", "no"),  # eval_strategy
        (0, 1.5, 4),  # eval_delay
        (2, 5),  # eval_steps
        ("steps", "epoch", "no", "best"),  # save_strategy
        (0, 2, 3),  # save_steps
    )
)


def test_the_default_flow_equals_that_of_transformers_over_a_grid() -> None:
    ours, theirs = DefaultFlowCallback(), peer.DefaultFlowCallback()
    for logging, first, evaluation, delay, eval_steps, saving, save_steps in FLOWS:
        args = arguments(
            logging_strategy=transformers.IntervalStrategy(logging), logging_first_step=first,
            eval_strategy=evaluation, eval_delay=delay, save_strategy=saving,
        )  # fmt: skip
        for step in range(1, 8):
            state = TrainerState(
                global_step=step, epoch=step / 3, max_steps=7, logging_steps=3, eval_steps=eval_steps,
                save_steps=save_steps,
            )  # fmt: skip
            for event in ("on_step_end", "on_epoch_end"):
                our_control = getattr(ours, event)(args, state, TrainerControl())
                their_control = getattr(theirs, event)(args, state, peer.TrainerControl())
                assert vars(our_control) == vars(their_control), (event, args, state)


@pytest.mark.parametrize("greater_is_better", [False, True])
@pytest.mark.parametrize(("patience", "threshold"), [(1, 0.0), (2, 0.05), (3, None)])
def test_early_stopping_equals_that_of_transformers(
    greater_is_better: bool, patience: int, threshold: float | None
) -> None:
    args = arguments(metric_for_best_model="score", greater_is_better=greater_is_better)
    ours = EarlyStoppingCallback(patience, threshold)
    theirs = peer.EarlyStoppingCallback(patience, threshold if threshold is not None else 0.0)
    state = TrainerState()
    sign = 1 if greater_is_better else -1
    for value in (1.0, 1.04, 1.2, 1.2, 1.1, 1.22, 1.5, 1.4, 1.3, 1.2):
        metrics = {"eval_score": sign * value}
        control, their_control = TrainerControl(), peer.TrainerControl()
        ours.on_evaluate(args, state, control, metrics=metrics)
        theirs.on_evaluate(args, state, their_control, metrics=metrics)
        assert ours.early_stopping_patience_counter == theirs.early_stopping_patience_counter
        assert control.should_training_stop == their_control.should_training_stop
        if state.best_metric is None or value > abs(state.best_metric):
            state.best_metric = sign * value


def test_the_first_evaluation_is_an_improvement_over_infinity() -> None:
    stopping, control = EarlyStoppingCallback(), TrainerControl()
    stopping.on_evaluate(arguments(), TrainerState(best_metric=math.inf), control, metrics={"eval_loss": 5.0})
    assert not control.should_training_stop
    stopping.on_evaluate(arguments(), TrainerState(best_metric=5.0), control, metrics={"eval_loss": math.nan})
    assert control.should_training_stop


def test_early_stopping_watches_the_loss_where_nothing_is_named() -> None:
    stopping, control = EarlyStoppingCallback(), TrainerControl()
    args = arguments(metric_for_best_model=None, greater_is_better=None)
    stopping.on_evaluate(args, TrainerState(best_metric=1.0), control, metrics={"eval_loss": 2.0})
    assert control.should_training_stop


def test_early_stopping_without_its_metric_does_not_count(caplog: pytest.LogCaptureFixture) -> None:
    stopping, control = EarlyStoppingCallback(), TrainerControl()
    stopping.on_evaluate(arguments(), TrainerState(best_metric=1.0), control, metrics={"eval_f1": 2.0})
    assert not control.should_training_stop and "no 'eval_loss'" in caplog.text


def test_early_stopping_says_what_it_needs(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(ConfigError, match=r"eval_strategy: .*'steps' or 'epoch'"):
        EarlyStoppingCallback().on_train_begin(arguments(eval_strategy="no"), TrainerState(), TrainerControl())
    EarlyStoppingCallback().on_train_begin(arguments(load_best_model_at_end=False), TrainerState(), TrainerControl())
    assert "load_best_model_at_end" in caplog.text


def test_how_long_it_waited_survives_a_checkpoint() -> None:
    stopping = EarlyStoppingCallback(5, 0.1)
    stopping.early_stopping_patience_counter = 3
    back = EarlyStoppingCallback.from_state(json.loads(json.dumps(stopping.state())))
    assert vars(back) == vars(stopping)
    assert peer.EarlyStoppingCallback.from_state(stopping.state()).early_stopping_patience_counter == 3


def test_an_exportable_state_must_be_defined() -> None:
    with pytest.raises(NotImplementedError, match=r"must define state\(\)"):
        ExportableState().state()
