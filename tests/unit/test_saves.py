"""Checkpoints that are written while training goes on: the same bytes, the same failures, one at a time."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback as TheirCallback

from etude import Trainer, TrainerCallback, TrainerState, contents
from etude.callbacks import CallbackHandler, DefaultFlowCallback
from etude.checkpoint import CheckpointStore
from etude.checkpoint.writer import InBackground, InPlace, Save
from etude.errors import CheckpointError
from etude.model import adapter
from etude.observe.trackers import uploads_checkpoints
from saving import MODELS, SAVING, At, adapted_by, contents_of
from short_run import Scripted, checkpoints, short_trainer
from tiny import tiny_tokenizer


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


class Gate:
    """Holds the writer up, in whichever thread it runs, until it is opened; optionally it breaks down then."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, error: Callable[[], Exception] | None = None) -> None:
        self.is_open, self.reached, self.threads = threading.Event(), threading.Event(), set[str]()
        write_random = contents.write_random

        def wait(folder: Path, states: Any) -> None:
            self.threads.add(threading.current_thread().name)
            self.reached.set()
            assert self.is_open.wait(30)
            if error is not None:
                raise error()
            write_random(folder, states)

        monkeypatch.setattr(contents, "write_random", wait)


def read_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]


# The same bytes


@pytest.mark.parametrize("kind", MODELS)
def test_the_same_bytes_as_when_training_waits(kind: str) -> None:
    for folder, in_background in (("background", True), ("in-place", False)):
        settings: dict[str, Any] = SAVING | {"save_total_limit": 2, "processing_class": tiny_tokenizer()}
        trainer = short_trainer(MODELS[kind](), output_dir=folder, save_in_background=in_background, **settings)
        trainer.train()
        assert isinstance(trainer._run.saves.writer, InBackground if in_background else InPlace)
        assert len(trainer._run.saves.stalls_in_seconds) == (2 if in_background else 0)
    assert checkpoints("background") == [4, 6]
    found, expected = contents_of("background"), contents_of("in-place")
    assert found.keys() == expected.keys() and len(found) > 20
    assert [name for name in found if found[name] != expected[name]] == []
    assert any(name.endswith("tokenizer.json") for name in found)


def test_steps_after_it_do_not_change_what_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on for a step while the writer is held up, and the weights are overwritten, too."""
    gate = Gate(monkeypatch)

    def spoil() -> None:
        assert gate.reached.wait(30)
        kept = [parameter.detach().clone() for parameter in trainer.model.parameters()]
        with torch.no_grad():
            for parameter in trainer.model.parameters():
                parameter.fill_(7)
            gate.is_open.set()
            trainer._run.saves.writer.wait()
            for parameter, value in zip(trainer.model.parameters(), kept, strict=True):
                parameter.copy_(value)

    trainer = short_trainer(callbacks=[At(step_3=spoil)], output_dir="held-up", **SAVING)
    trainer.train()
    assert gate.threads == {"etude-checkpoint"}
    short_trainer(output_dir="in-place", save_in_background=False, **SAVING).train()
    assert contents_of("held-up") == contents_of("in-place")


def test_a_tokenizer_that_changes_is_written_as_it_is_then() -> None:
    tokenizer = tiny_tokenizer()
    change = At(step_3=lambda: setattr(tokenizer, "chat_template", "{{ messages }}"))
    for folder, in_background in (("background", True), ("in-place", False)):
        tokenizer.chat_template = None
        settings: dict[str, Any] = SAVING | {"processing_class": tokenizer, "callbacks": [change]}
        short_trainer(output_dir=folder, save_in_background=in_background, **settings).train()
    assert [f"checkpoint-{n}/chat_template.jinja" in contents_of("background") for n in (2, 4)] == [False, True]
    assert contents_of("background") == contents_of("in-place")


def test_a_log_that_is_changed_later_is_written_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, samples, total = Gate(monkeypatch), ["first"], torch.ones(())

    def change() -> None:
        assert gate.reached.wait(30)
        samples.append("second")
        total.add_(1)
        gate.is_open.set()

    log = At(step_1=lambda: trainer.log({"samples": samples, "total": total}), step_3=change)
    trainer = short_trainer(callbacks=[log], **SAVING)
    trainer.train()
    rows = TrainerState.load_from_json("out/checkpoint-2/trainer_state.json").log_history
    assert [(row["samples"], row["total"]) for row in rows if "total" in row] == [(["first"], 1.0)]


def test_the_folder_is_the_one_in_which_the_run_began(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, began = Gate(monkeypatch), Path.cwd()

    def work_elsewhere() -> None:
        assert gate.reached.wait(30)
        (began / "elsewhere").mkdir()
        with contextlib.chdir(began / "elsewhere"):
            gate.is_open.set()
            trainer._run.saves.writer.wait()

    trainer = short_trainer(callbacks=[At(step_3=work_elsewhere)], **SAVING)
    trainer.train()
    assert checkpoints() == [2, 4, 6] and not list((began / "elsewhere").iterdir())


def test_the_settings_of_a_model_in_training_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """peft sets `inference_mode` while it saves: `model.save_pretrained` in a callback must not meet that half-way."""
    from peft import LoraConfig

    seen, write = [], LoraConfig.save_pretrained

    def look(config: Any, folder: str, **kwargs: Any) -> None:
        seen.append((config.inference_mode, trainer.model.peft_config["default"].inference_mode))
        write(config, folder, **kwargs)

    monkeypatch.setattr(LoraConfig, "save_pretrained", look)
    trainer = short_trainer(**SAVING | {"save_steps": 4, "max_steps": 5})
    trainer.train()
    assert seen[0] == (True, False) and checkpoints() == [4, 5]


# One at a time


def test_a_second_save_waits_for_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    gate, seen = Gate(monkeypatch), []

    def look_and_open_later() -> None:
        seen.append(checkpoints())
        threading.Timer(0.2, gate.is_open.set).start()

    trainer = short_trainer(
        callbacks=[At(step_3=lambda: seen.append(checkpoints()), step_4=look_and_open_later)], **SAVING
    )
    trainer.train()
    assert seen == [[], []]  # the step after it was made, and the next save began, while the first was being written
    assert checkpoints() == [2, 4, 6]
    assert trainer._run.saves.stalls_in_seconds[1] > 0.1


def test_the_writer_refuses_two_at_once(tmp_path: Path) -> None:
    writer, go_on = InBackground(), threading.Event()
    store = CheckpointStore(tmp_path / "store")

    def fill(folder: Path) -> list[str]:
        (folder / "file").write_text("content")
        assert go_on.wait(30)
        return ["said"]

    writer.write(Save(store, 1, fill))
    assert writer.finished(wait=False) is None
    with pytest.raises(RuntimeError, match="step 2"):
        writer.write(Save(store, 2, fill))
    go_on.set()
    done = writer.finished(wait=True)
    assert done is not None and (done.step, done.said) == (1, ["said"])
    assert writer.finished(wait=True) is None
    assert [checkpoint.step for checkpoint in store.committed()] == [1]


@pytest.mark.parametrize("is_interrupted", [False, True])
def test_a_fork_waits_for_the_writer(monkeypatch: pytest.MonkeyPatch, is_interrupted: bool) -> None:
    """A worker that is started meanwhile must not inherit what the thread has locked, whatever a signal does meanwhile."""
    gate = Gate(monkeypatch)
    seen: list[Any] = []

    def leave(number: int, frame: Any) -> None:
        seen.append("signal")
        raise KeyboardInterrupt

    def fork() -> None:
        threading.Timer(0.3, gate.is_open.set).start()
        if is_interrupted:
            signal.signal(signal.SIGALRM, leave)
            signal.setitimer(signal.ITIMER_REAL, 0.1)
        worker = multiprocessing.get_context("fork").Process(target=os._exit, args=(0,))
        worker.start()
        seen.append(checkpoints())
        worker.join()

    before = signal.getsignal(signal.SIGALRM)
    try:
        short_trainer(callbacks=[At(step_3=fork)], **SAVING).train()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert seen == (["signal", [2]] if is_interrupted else [[2]])


def test_what_reads_checkpoints_finds_them_complete(monkeypatch: pytest.MonkeyPatch) -> None:
    """`save_model` by hand waits for the writer, and so do the best model and the end of training."""
    gate = Gate(monkeypatch)

    def save_by_hand() -> None:
        threading.Timer(0.1, gate.is_open.set).start()
        trainer.save_model("by-hand")
        assert checkpoints() == [2]
        trainer._save_checkpoint(trainer.model, trial=None)
        assert checkpoints() == [2, 3]

    settings = SAVING | {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = short_trainer(callbacks=[At(step_3=save_by_hand)], eval_rows=short_trainer().train_dataset, **settings)
    trainer.train()
    assert not trainer.model.peft_config["default"].inference_mode
    assert trainer.state.best_model_checkpoint is not None and Path(trainer.state.best_model_checkpoint).is_dir()
    assert checkpoints() == [2, 3, 4, 6]


def test_nothing_is_kept_after_training() -> None:
    trainer = short_trainer(**SAVING)
    trainer.train()
    assert trainer._run.saves.stalls_in_seconds and not trainer._run.saves._copies._in_use


def test_a_second_run_begins_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the failures of the first run count in it, nor the time that its last save took."""
    Gate(monkeypatch, disk_is_full).is_open.set()
    trainer = short_trainer(**SAVING | {"save_steps": 3, "max_steps": 4})
    for _ in range(2):  # each time one failure on the way and one at the end: three in a row would stop at step 3
        with pytest.raises(CheckpointError, match="step 4"):
            trainer.train()
        assert "save_stall_seconds" not in read_rows()[0]
    assert checkpoints() == []


def test_a_run_waits_for_the_writer_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Ctrl-C has cut short even the wait at the end of training."""
    gate, wait = Gate(monkeypatch), InBackground.wait

    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    trainer = short_trainer(callbacks=[At(step_3=interrupted)], **SAVING)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(InBackground, "wait", interrupted)
        trainer.train()
    assert checkpoints() == [] and InBackground.wait is wait
    trainer.remove_callback(At)
    threading.Timer(0.2, gate.is_open.set).start()
    trainer.train(resume_from_checkpoint=True)
    assert any("resumed checkpoint-2" in line for line in trainer.notices.lines) and checkpoints() == [2, 4, 6]


# Failures


def disk_is_full() -> Exception:
    return OSError(28, "No space left on device")


def test_a_failed_write_is_said_at_the_next_step_and_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch, disk_is_full)
    gate.is_open.set()

    def wait() -> None:
        trainer._run.saves.writer.wait()

    def look_and_repair() -> None:
        assert [line for line in trainer.notices.lines if "tries again" in line and "step 2" in line]
        monkeypatch.undo()

    trainer = short_trainer(
        callbacks=[At(step_2=wait, step_3=wait, step_4=look_and_repair)],
        output_dir=str(Path("out").absolute()),
        **SAVING,
    )
    trainer.train()
    assert checkpoints(trainer.args.output_dir) == [4, 6]
    assert not list(Path(trainer.args.output_dir).glob(".tmp-*"))


@pytest.mark.parametrize("when", ["in a row", "final"])
def test_failures_that_stop_the_run(monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    Gate(monkeypatch, disk_is_full).is_open.set()
    settings = {"in a row": {"save_steps": 1}, "final": {"save_steps": 6}}[when]
    expected = {"in a row": "3 saves in a row failed", "final": "This was the final save"}[when]
    trainer = short_trainer(**(SAVING | settings))
    with pytest.raises(CheckpointError, match=r"ENOSPC.*step (3|6)") as caught:
        trainer.train()
    assert any(expected in note for note in caught.value.__notes__)
    assert trainer.state.global_step == {"in a row": 4, "final": 6}[when] or trainer.state.global_step == 3


def test_an_error_that_is_none_of_the_storage_names_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    Gate(monkeypatch, lambda: TypeError("cannot be written")).is_open.set()
    with pytest.raises(TypeError, match="cannot be written") as caught:
        short_trainer(**SAVING).train()
    assert any("checkpoint of step 2" in note for note in caught.value.__notes__)


def test_no_thread_can_be_started(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    trainer = short_trainer(**SAVING)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    trainer.train()
    assert isinstance(trainer._run.saves.writer, InBackground) and checkpoints() == [2, 4, 6]


def test_ctrl_c_before_the_thread_starts_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(thread: threading.Thread) -> None:
        raise KeyboardInterrupt

    trainer = short_trainer(**SAVING)
    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert checkpoints() == []


def test_a_tokenizer_that_cannot_be_written_beforehand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary folder may be full where the disk of the checkpoints is not."""
    tokenizer = tiny_tokenizer()
    write = tokenizer.save_pretrained

    def save_pretrained(folder: str) -> Any:
        if "etude-" in folder:
            raise Exception("No space left on device (os error 28)")  # as tokenizers does
        return write(folder)

    monkeypatch.setattr(tokenizer, "save_pretrained", save_pretrained)
    trainer = short_trainer(processing_class=tokenizer, **SAVING)
    trainer.train()
    assert "os error 28" in trainer._run.saves.why_in_place
    assert checkpoints() == [2, 4, 6] and Path("out/checkpoint-4/tokenizer.json").is_file()


@pytest.mark.parametrize("in_background", [True, False])
def test_the_best_of_those_that_could_be_written(monkeypatch: pytest.MonkeyPatch, in_background: bool) -> None:
    """The best checkpoint failed: the one before it is neither retired meanwhile nor forgotten at the end."""
    write_random, failed = contents.write_random, []

    def write(folder: Path, states: Any) -> None:
        if "checkpoint-4" in folder.name:
            failed.append(4)
            raise disk_is_full()
        write_random(folder, states)

    monkeypatch.setattr(contents, "write_random", write)
    settings = SAVING | {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "max_steps": 8}
    settings |= {"save_total_limit": 1, "save_in_background": in_background, "compute_metrics": Scripted(2, 3, 1, 1)}
    settings |= {"metric_for_best_model": "score", "greater_is_better": True}
    trainer = short_trainer(eval_rows=short_trainer().train_dataset, **settings)
    trainer.train()
    assert failed == [4] and checkpoints() == [2, 8]
    assert trainer.state.best_model_checkpoint == str(Path("out/checkpoint-2"))
    assert any("checkpoint-2 (step 4 was better, 3, but" in line for line in trainer.notices.lines)


def test_the_folder_is_moved_away_while_it_is_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint that was being written is lost, which is said, and training goes on."""
    gate = Gate(monkeypatch)

    def move() -> None:
        assert gate.reached.wait(30)
        Path("out").rename("moved")
        gate.is_open.set()

    trainer = short_trainer(callbacks=[At(step_3=move)], **SAVING)
    trainer.train()
    assert [line for line in trainer.notices.lines if "checkpoint not written" in line and "step 2" in line]
    assert checkpoints() == [4, 6] and checkpoints("moved") == []


def test_an_error_in_training_waits_for_the_write_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)

    def fail() -> None:
        threading.Timer(0.1, gate.is_open.set).start()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        short_trainer(callbacks=[At(step_3=fail)], **SAVING).train()
    assert checkpoints() == [2] and not list(Path("out").glob(".tmp-*"))
    CheckpointStore("out").verify(Path("out/checkpoint-2"))


# When training waits


class Listener(TrainerCallback):
    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.seen.append(checkpoints())


class OwnSave(Trainer):
    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        super()._save(output_dir, state_dict)


def prompt_tuning() -> Any:
    return adapted_by("PromptTuningConfig", num_virtual_tokens=4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"callbacks": [Listener()]}, "Listener is told of each one"),
        ({"trainer_class": OwnSave}, "OwnSave overrides _save"),
        ({"model": prompt_tuning}, "usual peft methods"),
        ({"save_in_background": False}, None),
    ],
)
def test_training_waits_where_someone_needs_the_checkpoint(settings: dict[str, Any], reason: str | None) -> None:
    settings = {name: value() if name == "model" else value for name, value in settings.items()}
    trainer = short_trainer(**(SAVING | settings))
    trainer.train()
    assert isinstance(trainer._run.saves.writer, InPlace)
    said = [line for line in trainer.notices.lines if line.startswith("training waits for every checkpoint")]
    assert (reason is None and not said) or (reason is not None and reason in said[0])
    for callback in settings.get("callbacks", []):
        assert callback.seen == [[2], [2, 4], [2, 4, 6]]


def test_a_listener_that_comes_later_finds_complete_checkpoints() -> None:
    listener = Listener()
    trainer = short_trainer(**SAVING)
    trainer.add_callback(At(step_3=lambda: trainer.add_callback(listener)))
    trainer.train()
    assert isinstance(trainer._run.saves.writer, InBackground)
    assert listener.seen == [[2, 4], [2, 4, 6]]


def test_too_little_memory_for_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("etude.saves.free_memory_bytes", lambda: 1000)
    trainer = short_trainer(**SAVING)
    trainer.train()
    assert "of memory" in trainer._run.saves.why_in_place and checkpoints() == [2, 4, 6]


def test_who_listens() -> None:
    class Silent(TheirCallback):
        pass

    class Wandb:
        __module__ = "transformers.integrations.integration_utils"
        _log_model: Any = "false"

        def on_save(self, *args: Any, **kwargs: Any) -> None: ...

    Wandb.__name__ = "WandbCallback"
    wandb = Wandb()
    listener = Listener()
    handler = CallbackHandler(
        [DefaultFlowCallback(), Silent(), At(), object(), wandb, listener], None, None, None, None
    )
    assert handler.listeners("on_save") == [wandb, listener]
    assert uploads_checkpoints(wandb) is False and uploads_checkpoints(listener) is None
    wandb._log_model = "checkpoint"
    assert uploads_checkpoints(wandb) is True


def test_parameters_that_are_trained_later_are_saved() -> None:
    """A callback thaws a norm: what is written follows."""
    norm = "base_model.model.model.norm.weight"

    def thaw() -> None:
        trainer.model.get_parameter(norm).requires_grad_(True)

    trainer = short_trainer(**SAVING, fast_path=False)
    trainer.add_callback(At(step_3=thaw))
    trainer.train()
    assert not Path("out/checkpoint-2", adapter.EXTRA_WEIGHTS_FILE).exists()
    assert list(adapter.read_tensors(Path("out/checkpoint-4", adapter.EXTRA_WEIGHTS_FILE))) == [norm]


# What it costs


def test_the_stall_is_in_the_metrics() -> None:
    trainer = short_trainer(**SAVING)
    trainer.train()
    rows = [line for line in Path("out/metrics.jsonl").read_text().splitlines() if "save_stall_seconds" in line]
    assert len(rows) == 2  # the last save comes after the last log of a loss
    assert any("while training went on" in line for line in trainer.notices.lines)
