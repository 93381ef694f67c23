"""What a run shows and records is readable, valid, complete after a resume, and cannot attack a terminal."""

from __future__ import annotations

import importlib
import io
import json
import math
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from etude.callbacks import CallbackHandler, TrainerControl, TrainerState
from etude.errors import ConfigError, MissingDependencyError
from etude.observe import (
    TRACKER_NAMES,
    JsonlCallback,
    PrinterCallback,
    ProgressCallback,
    TensorBoardCallback,
    tracker_callbacks,
)
from etude.observe.console import log_line, printable
from etude.observe.jsonl import rewind
from etude.observe.tensorboard import event_folder, tag

LOGS = {"loss": 2.12344, "grad_norm": 0.9123, "learning_rate": 1.8e-4, "epoch": 0.1, "total_flos": 1e12}


def arguments(folder: Path | str = "out", **changes: Any) -> SimpleNamespace:
    defaults = {"output_dir": str(folder), "disable_tqdm": False, "report_to": "none", "logging_dir": None}
    return SimpleNamespace(**{**defaults, **changes})


def at(step: int, **changes: Any) -> TrainerState:
    return TrainerState(global_step=step, max_steps=300, **changes)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def play(callback: Any, args: Any, first_step: int, last_step: int, *, finish: bool = True) -> None:
    """The events of a run from `first_step` (done already) to `last_step`, with a log at each step."""
    events, control = CallbackHandler([callback], None, None, None, None), TrainerControl()
    events.on_train_begin(args, at(first_step, log_history=[{"step": first_step}] if first_step else []), control)
    for step in range(first_step + 1, last_step + 1):
        events.on_step_end(args, at(step), control)
        events.on_log(args, at(step), control, logs={**LOGS, "loss": 1 / step})
    if finish:
        events.on_train_end(args, at(last_step), control)


# ---------------------------------------------------------------- console


def test_a_line_shows_what_people_compare() -> None:
    assert log_line(LOGS, 10, 300) == "step 10/300  epoch 0.10  loss 2.1234  grad 0.91  lr 1.8e-04"


@pytest.mark.parametrize(
    ("logs", "shown"),
    [
        ({"eval_loss": 1.23456, "eval_samples": 12}, "eval_loss 1.235  eval_samples 12"),
        ({"loss": math.nan, "grad_norm": math.inf}, "loss nan  grad inf"),
        ({"grad_norm": 1234.56}, "grad 1234.6"),
        ({"note": "x" * 30}, f"note {'x' * 20}... (30 characters)"),
        ({"loss": "oops"}, "loss oops"),
        ({"eval_f1": np.float32(0.5)}, "eval_f1 0.5"),
    ],
)
def test_a_line_of_other_values(logs: dict[str, Any], shown: str) -> None:
    assert log_line(logs, 4, 0, max_text_length=20) == f"step 4  {shown}"


@pytest.mark.parametrize("attack", ["\x1b[2J", "a\rb", "a\nb", "\x07", "\x9b1A", "\u202eabc", "\u2028"])
def test_control_characters_are_shown_and_not_obeyed(attack: str) -> None:
    assert printable(attack).isprintable()
    line = log_line({attack: 1.0, "note": attack}, 1, 2)
    assert line.isprintable() and "\\" in line


def test_the_printer_writes_lines_once_per_machine(capsys: pytest.CaptureFixture[str]) -> None:
    logs = dict(LOGS)
    printer = PrinterCallback()
    printer.on_log(arguments(), at(10), TrainerControl(), logs=logs)
    printer.on_log(arguments(), at(10, is_local_process_zero=False), TrainerControl(), logs=logs)
    assert capsys.readouterr().out == "step 10/300  epoch 0.10  loss 2.1234  grad 0.91  lr 1.8e-04\n"
    assert logs == LOGS  # other callbacks get the same dictionary


def test_the_bar_shows_steps_loss_and_rate_above_it_the_lines() -> None:
    lines, bar = io.StringIO(), Terminal()
    progress = ProgressCallback(stream=lines, bar_stream=bar)
    play(progress, arguments(), 297, 300)
    assert lines.getvalue().splitlines()[-1].startswith("step 300/300  epoch 0.10  loss 0.0033")
    assert "300/300" in bar.getvalue() and "loss 0.0033 lr 1.8e-04" in bar.getvalue()
    assert progress.training_bar is None


def test_a_resumed_bar_starts_where_the_run_does() -> None:
    progress = ProgressCallback(stream=io.StringIO(), bar_stream=Terminal())
    progress.on_train_begin(arguments(), at(120), TrainerControl())
    assert (progress.training_bar.n, progress.training_bar.initial, progress.training_bar.total) == (120, 120, 300)
    progress.on_train_end(arguments(), at(120), TrainerControl())


def test_an_evaluation_has_a_bar_of_its_own_that_ends_with_it() -> None:
    bar = Terminal()
    progress = ProgressCallback(stream=io.StringIO(), bar_stream=bar)
    for _ in range(3):
        progress.on_prediction_step(arguments(), at(0), TrainerControl(), eval_dataloader=[1, 2, 3])
    assert (progress.prediction_bar.n, progress.prediction_bar.total) == (3, 3)
    progress.on_evaluate(arguments(), at(0), TrainerControl())
    assert progress.prediction_bar is None and "evaluating" in bar.getvalue()
    progress.on_prediction_step(arguments(), at(0), TrainerControl(), eval_dataloader=iter(()))
    assert progress.prediction_bar.total is None
    progress.on_predict(arguments(), at(0), TrainerControl())


@pytest.mark.parametrize(
    ("disable_tqdm", "bar"), [(True, Terminal()), (False, io.StringIO())], ids=["disabled", "no terminal"]
)
def test_without_a_bar_there_are_still_lines(disable_tqdm: bool, bar: io.StringIO) -> None:
    lines = io.StringIO()
    progress = ProgressCallback(stream=lines, bar_stream=bar)
    play(progress, arguments(disable_tqdm=disable_tqdm), 0, 2)
    progress.on_prediction_step(arguments(disable_tqdm=disable_tqdm), at(0), TrainerControl(), eval_dataloader=[1])
    assert bar.getvalue() == "" and len(lines.getvalue().splitlines()) == 2


# ---------------------------------------------------------------- metrics.jsonl


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_log_is_one_line_that_can_be_read_at_once(tmp_path: Path) -> None:
    play(JsonlCallback(), arguments(tmp_path), 0, 3, finish=False)
    written = rows(tmp_path / "metrics.jsonl")
    assert [r["step"] for r in written] == [1, 2, 3]
    assert written[1] == {"step": 2, **LOGS, "loss": 0.5}


def test_rows_are_valid_json(tmp_path: Path) -> None:
    logs = {"loss": math.nan, "a": -math.inf, "b": np.float32(0.5), "c": np.int64(2), "d": "\u2028", "e": (1, 2)}
    JsonlCallback().on_log(arguments(tmp_path), at(1), TrainerControl(), logs=logs)
    (written,) = rows(tmp_path / "metrics.jsonl")
    assert written == {"step": 1, "loss": None, "a": None, "b": 0.5, "c": 2, "d": "\u2028", "e": [1, 2]}
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    play(JsonlCallback(), arguments(tmp_path), 0, 7, finish=False)
    with path.open("a") as file:
        file.write('{"step": 8, "lo')  # killed while writing
    play(JsonlCallback(), arguments(tmp_path), 4, 9)
    interrupted = path.read_text()
    path.unlink()
    play(JsonlCallback(), arguments(tmp_path), 0, 9)
    assert interrupted == path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_run_keeps_the_rows_of_the_old_one_aside(tmp_path: Path) -> None:
    callback = JsonlCallback()
    for last_step in (3, 2, 1):
        play(callback, arguments(tmp_path), 0, last_step)
    kept = [len(rows(tmp_path / name)) for name in ("metrics.1.jsonl", "metrics.2.jsonl", "metrics.jsonl")]
    assert kept == [3, 2, 1]


def test_an_evaluation_before_training_stays(tmp_path: Path) -> None:
    callback = JsonlCallback(tmp_path / "deep" / "mine.jsonl")
    callback.on_log(arguments(), at(0), TrainerControl(), logs={"eval_loss": 3.0})
    play(callback, arguments(), 0, 2)
    assert [r["step"] for r in rows(tmp_path / "deep" / "mine.jsonl")] == [0, 1, 2]


def test_a_file_without_later_rows_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n')
    before = path.stat()
    rewind(path, 1)
    assert (path.stat().st_ino, path.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_only_the_main_process_writes(tmp_path: Path) -> None:
    callback, state = JsonlCallback(), at(1, is_world_process_zero=False)
    callback.on_train_begin(arguments(tmp_path), state, TrainerControl())
    callback.on_log(arguments(tmp_path), state, TrainerControl(), logs=LOGS)
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------- TensorBoard


class Writer:
    """Stands for a SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: dict[str, str] = {}
        self.closed = False

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def add_text(self, name: str, text: str, step: int | None = None) -> None:
        self.texts[name] = text

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


def test_curves_have_the_tags_of_transformers() -> None:
    from transformers.integrations.integration_utils import rewrite_logs

    names = ["loss", "eval_loss", "test_f1", "evaluation", "learning_rate", "eval_a_b", "test"]
    assert [tag(name) for name in names] == list(rewrite_logs(dict.fromkeys(names, 0)))


def test_numbers_become_points_and_the_rest_is_announced_once(caplog: pytest.LogCaptureFixture) -> None:
    writer = Writer()
    callback = TensorBoardCallback(writer)
    for step in (1, 2):
        logs = {"loss": 2.0, "eval_loss": 1.0, "note": "hi", "list": [1]}
        callback.on_log(arguments(), at(step), TrainerControl(), logs=logs)
    assert writer.scalars == [
        ("train/loss", 2.0, 1),
        ("eval/loss", 1.0, 1),
        ("train/loss", 2.0, 2),
        ("eval/loss", 1.0, 2),
    ]
    assert writer.texts == {"train/note": "hi"} and caplog.text.count("cannot show 'list'") == 1
    callback.on_train_end(arguments(), at(2), TrainerControl())
    assert writer.closed


def test_arguments_and_model_are_described() -> None:
    writer = Writer()
    args = arguments(to_json_string=lambda: "{args}")
    model = SimpleNamespace(config=SimpleNamespace(to_json_string=lambda: "{config}"))
    TensorBoardCallback(writer).on_train_begin(args, at(0), TrainerControl(), model=model)
    assert writer.texts == {"args": "{args}", "model_config": "{config}"}


def test_event_files_are_written_and_hold_the_points(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is an optional dependency")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    args = arguments(tmp_path, logging_dir=str(tmp_path / "curves"))
    play(TensorBoardCallback(), args, 0, 3)
    events = EventAccumulator(str(tmp_path / "curves"))
    events.Reload()
    points = events.Scalars("train/loss")
    assert [point.step for point in points] == [1, 2, 3]
    assert [point.value for point in points] == pytest.approx([1.0, 0.5, 1 / 3])


def test_an_evaluation_after_training_goes_to_the_same_folder(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is an optional dependency")
    callback = TensorBoardCallback()
    play(callback, arguments(tmp_path), 0, 1)
    callback.on_log(arguments(tmp_path), at(1), TrainerControl(), logs={"eval_loss": 1.0})
    callback.on_train_end(arguments(tmp_path), at(1), TrainerControl())
    assert len(list((tmp_path / "runs").iterdir())) == 1
    assert len(list((tmp_path / "runs").rglob("events.*"))) == 2


def test_where_the_event_files_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    assert event_folder(arguments(), at(0)).parent == Path("out/runs")
    assert event_folder(arguments(), at(0, trial_name="trial-3")) == Path("out/runs/trial-3")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "~/boards")
    assert event_folder(arguments(), at(0)) == Path.home() / "boards"
    assert event_folder(arguments(logging_dir="here"), at(0)) == Path("here")


# ---------------------------------------------------------------- trackers


@pytest.mark.parametrize("report_to", ["none", None, [], ["none"]])
def test_nothing_is_reported_unless_asked(report_to: Any) -> None:
    assert tracker_callbacks(arguments(report_to=report_to)) == []


@pytest.mark.parametrize(
    "changes", [{"report_to": "tensorboard"}, {"report_to": ["tensorboard"], "logging_dir": "x"}, {"logging_dir": "x"}]
)
def test_tensorboard_is_ours_and_comes_once(changes: dict[str, Any]) -> None:
    (callback,) = tracker_callbacks(arguments(**changes))
    assert type(callback) is TensorBoardCallback


def test_all_is_what_is_installed() -> None:
    assert [type(callback) for callback in tracker_callbacks(arguments(report_to="all"))] == [TensorBoardCallback]


def test_an_unknown_tracker_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="report_to: unknown tracker 'wanddb'; did you mean 'wandb'"):
        tracker_callbacks(arguments(report_to=["wanddb"]))


@pytest.mark.parametrize("name", [name for name in TRACKER_NAMES if name != "kubeflow"])  # needs no package
def test_a_missing_package_names_its_installation(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(module: str) -> ModuleType:
        raise ImportError(module)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(MissingDependencyError, match=f"report_to='{name}' needs .*pip install "):
        tracker_callbacks(arguments(report_to=[name]))


def test_a_service_is_reported_to_by_the_callback_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations.integration_utils as integrations

    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))
    monkeypatch.setitem(integrations.INTEGRATION_TO_CALLBACK, "wandb", SimpleNamespace)
    (callback,) = tracker_callbacks(arguments(report_to="wandb"))
    assert type(callback) is SimpleNamespace


def test_every_tracker_of_transformers_is_known() -> None:
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    assert set(INTEGRATION_TO_CALLBACK) == set(TRACKER_NAMES)
