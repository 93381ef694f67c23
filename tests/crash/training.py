"""A short real training run as the fault tests see it, and a fork server that makes one in a fresh process at a time.

The run: a LoRA adapter with dropout on a Llama of one layer, `ROWS` rows, two micro-batches of two rows a step (6 steps an
epoch, 9 in all), logged at every step, evaluated at every third and saved at every second. Run as a program, this file is
the server: for each order, a line of JSON, it forks, and the child trains and exits as a user's script would.
"""

from __future__ import annotations

import ctypes
import errno
import gc
import hashlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import saves
import torch
from peft import get_peft_model_state_dict

from etude import TrainerCallback, contents
from etude.checkpoint import CheckpointStore
from etude.errors import CheckpointError
from etude.model import adapter
from short_run import short_trainer, without_clock
from tiny import ListDataset, language_rows, tiny_llama, with_lora

NUM_ROWS, LAST_STEP = 24, 9
ROWS, EVAL_ROWS = language_rows(NUM_ROWS), language_rows(6, 50)
SETTINGS: dict[str, Any] = {
    "max_steps": LAST_STEP,
    "gradient_accumulation_steps": 2,
    "per_device_eval_batch_size": 2,
    "save_strategy": "steps",
    "save_steps": 2,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "report_to": "none",
}
LONGEST_SECONDS = 300
"""A child that hangs is ended, so that a test fails instead of waiting for ever."""


@dataclass(frozen=True)
class Ended:
    """How a run ended: the exit code as a shell gives it, all it printed, and its result where it came to the end."""

    exit_code: int
    said: str
    result: dict[str, Any] | None
    cpu_seconds: float


Train = Callable[..., Ended]


# -- the run ---------------------------------------------------------------------------------------------------------------


def tiny_model(seed: int = 1) -> Any:
    """Dropout in the attention and in the adapter, so that every step draws random numbers."""
    base = tiny_llama(hidden_size=16, intermediate_size=32, num_hidden_layers=1, attention_dropout=0.1)
    return with_lora(base, seed, task_type="CAUSAL_LM", lora_dropout=0.1, r=4)


def sha256_of_tensors(tree: Any) -> str:
    """A digest of everything in a tree of dicts and lists, tensors bit by bit."""
    digest = hashlib.sha256()

    def feed(value: Any) -> None:
        if isinstance(value, dict):
            for key in sorted(value, key=str):
                digest.update(str(key).encode())
                feed(value[key])
        elif isinstance(value, (list, tuple)):
            for item in value:
                feed(item)
        elif torch.is_tensor(value):
            digest.update(f"{value.dtype}{tuple(value.shape)}".encode() + value.detach().numpy().tobytes())
        else:
            digest.update(repr(value).encode())

    feed(tree)
    return digest.hexdigest()


def result_of(trainer: Any, output: Any) -> dict[str, Any]:
    """Everything that must be the same however often a run was interrupted."""
    return {
        "adapter": sha256_of_tensors(get_peft_model_state_dict(trainer.model)),
        "optimizer": sha256_of_tensors(trainer.optimizer.state_dict()),
        "schedule": sha256_of_tensors(trainer.lr_scheduler.state_dict()),
        "log": without_clock(trainer.state.log_history),
        "training_loss": output.training_loss,
        "step": output.global_step,
        "epoch": trainer.state.epoch,
        "best": [trainer.state.best_metric, trainer.state.best_global_step],
    }


class Happenings:
    """Sends this process the signals that an order asks for, at the n-th time that something happens."""

    def __init__(self, wanted: list[dict[str, Any]]) -> None:
        self.wanted = wanted
        self.times: dict[str, int] = {}

    def happened(self, event: str) -> bool:
        """Whether a signal was sent."""
        self.times[event] = self.times.get(event, 0) + 1
        due = [each for each in self.wanted if (each["at"], each["nth"]) == (event, self.times[event])]
        for each in due:
            if each.get("group"):  # from outside: workers take a signal of their parent for an order to end in peace
                kill = ["setsid", "kill", f"-{int(each['signal'])}", "--", f"-{os.getpgid(0)}"]
                os.waitpid(os.posix_spawnp(kill[0], kill, os.environ), 0)
            else:
                os.kill(os.getpid(), each["signal"])
        return bool(due)


class Watcher(TrainerCallback):
    """Every event of the loop is a happening; the fault of the order is armed between two steps."""

    def __init__(self, happenings: Happenings, fault: dict[str, Any] | None) -> None:
        self.happenings, self.fault = happenings, fault
        self.trainer: Any = None
        self.is_told_of_saves = any(each["at"] == "on_save" for each in happenings.wanted)
        """Whoever is told of them is told when they are complete, so that training waits for them."""

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_") or (name == "on_save" and not self.is_told_of_saves):
            return super().__getattribute__(name)

        def tell(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.happenings.happened(name)
            if self.fault and name == "on_step_end":
                if state.global_step == self.fault["step"] and not self.fault.get("within_save"):
                    wait_for_save(self.trainer)
                    arm(args.output_dir, self.fault)
                elif state.global_step == self.fault["until"]:
                    wait_for_save(self.trainer)
                    arm(args.output_dir, None)

        return tell


def wait_for_save(trainer: Any) -> None:
    """Until the save that goes on beside training has ended, well or not."""
    writer = trainer._run.saves.writer
    if writer.needs_copies:
        writer.wait()


def arm(folder: str, fault: dict[str, Any] | None) -> None:
    """Switch the shim on for everything below `folder`, or off."""
    shim = ctypes.CDLL(None)
    if fault is None:
        shim.faultio_arm(b"", 0, ctypes.c_long(0), 0, -1)
        return
    log = os.open(fault["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC) if fault.get("log") else -1
    root = str(Path(folder).absolute()).encode()
    shim.faultio_arm(root, fault["mode"], ctypes.c_long(fault.get("at", 0)), fault.get("errno", 0), log)


class Rows(ListDataset):
    """Fetching a row is a happening; one that brought a signal then takes very long."""

    def __init__(self, rows: list[Any], happenings: Happenings) -> None:
        super().__init__(rows)
        self.happenings = happenings

    def __getitem__(self, index: int) -> Any:
        if self.happenings.happened("row"):
            time.sleep(60)
            print("the wait for data was not cut short", file=sys.stderr)
        return super().__getitem__(index)


class Own(TrainerCallback):
    """What a user's callback may do between two steps: evaluate by itself, ask for a checkpoint by touching a file. The disk
    may be full after some steps, too."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.trainer: Any = None
        self.evaluates_at_step = settings.pop("evaluates_itself_at_step", None)
        self.touches_at_step = settings.pop("touch_at_step", None)
        self.full_at_steps = settings.pop("disk_is_full_at_steps", [])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.evaluates_at_step:
            self.trainer.evaluate()
        if state.global_step == self.touches_at_step:
            Path(args.output_dir, "SAVE").touch()
        if self.full_at_steps:
            full = {"mode": saves.FAIL_FROM, "errno": errno.ENOSPC}
            wait_for_save(self.trainer)
            arm(args.output_dir, full if state.global_step in self.full_at_steps else None)


def watch_saves(happenings: Happenings, fault: dict[str, Any] | None) -> None:
    """Being in the middle of a save is a happening too, and a moment to arm a fault; in whichever thread it is written.

    For this process only: nothing is put back.
    """
    save_weights, write_random = adapter.save_weights, contents.write_random

    def save_weights_and_arm(model: Any, folder: Path, *tensors: Any) -> None:
        if fault and fault.get("within_save") and f"-checkpoint-{fault['step']}-" in folder.name:
            arm(str(folder.parent), fault)
        save_weights(model, folder, *tensors)

    def write_random_and_tell(folder: Path, states: dict[str, Any]) -> None:
        write_random(folder, states)
        happenings.happened("save")

    adapter.save_weights, contents.write_random = save_weights_and_arm, write_random_and_tell  # type: ignore[assignment]


def build(
    output_dir: Path,
    happenings: Happenings | None = None,
    fault: dict[str, Any] | None = None,
    *,
    model_seed: int = 1,
    **settings: Any,
) -> Any:
    """The trainer of the run. Beside the names of `TrainingArguments`, `settings` has those of this file's own."""
    happenings = happenings or Happenings([])
    own = Own(settings)
    eval_rows = {"a": EVAL_ROWS, "b": EVAL_ROWS[::-1]} if settings.pop("several_eval_sets", False) else EVAL_ROWS
    watcher = Watcher(happenings, fault)
    trainer = short_trainer(
        tiny_model(model_seed),
        Rows(ROWS, happenings),
        eval_rows=eval_rows,
        callbacks=[own, watcher],
        output_dir=str(output_dir.absolute()),  # the shim compares paths as they are given
        **(SETTINGS | settings),
    )
    own.trainer = watcher.trainer = trainer
    return trainer


def train(order: dict[str, Any]) -> None:
    """One run in the working directory, as ordered; its result goes to the file `order["result"]`."""
    happenings = Happenings(order["signals"])
    os.register_at_fork(after_in_parent=lambda: happenings.happened("fork"))
    if order["cpu_seconds"] is not None:  # SIGPROF ends a process as SIGKILL does: nothing of it runs any more
        signal.setitimer(signal.ITIMER_PROF, order["cpu_seconds"])
    watch_saves(happenings, order["fault"])
    trainer = build(Path("out"), happenings, order["fault"], **order["settings"])
    output = trainer.train(resume_from_checkpoint=order["resume"])
    signal.setitimer(signal.ITIMER_PROF, 0)
    Path(order["result"]).write_text(json.dumps(result_of(trainer, output)))


# -- the server ------------------------------------------------------------------------------------------------------------


def train_and_leave(order: dict[str, Any]) -> NoReturn:
    """End as the interpreter ends a script, without tidying up what was inherited."""
    code = 0
    try:
        train(order)
    except SystemExit as request:
        code = request.code if isinstance(request.code, int) else 1
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def serve() -> None:
    with tempfile.TemporaryDirectory() as folder:  # what is made only once per process is made before the first fork
        tiny_model().save_pretrained(folder)
    gc.freeze()
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            os.setsid()
            os.chdir(order["folder"])
            printed = os.open(order["said"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(printed, 1)
            os.dup2(printed, 2)
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit it ignored
            signal.alarm(LONGEST_SECONDS)
            train_and_leave(order)
        _, status, used = os.wait4(child, 0)
        code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        print(json.dumps([code, used.ru_utime + used.ru_stime]), flush=True)


def metrics_of(output_dir: Path, log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `metrics.jsonl`, without the figures that it has beyond the log (speed, memory)."""
    known = {name for entry in log for name in entry}
    rows = [json.loads(line) for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name in known} for row in without_clock(rows)]


def unsound(output_dir: Path) -> list[str]:
    """What is wrong with the checkpoints in a folder: every visible one must be complete."""
    store, found = CheckpointStore(output_dir), []
    for checkpoint in store.committed():
        try:
            store.verify(checkpoint.path)
        except CheckpointError as error:
            found.append(str(error))
    return found


def steps_in(output_dir: Path) -> list[int]:
    return [checkpoint.step for checkpoint in CheckpointStore(output_dir).committed()]


if __name__ == "__main__":
    serve()
