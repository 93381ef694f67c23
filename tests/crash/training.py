"""A short real training run as the fault tests see it, and a fork server that makes one in a fresh process at a time.

The run: a LoRA adapter with dropout on a Llama of one layer, `ROWS` rows, two micro-batches of two rows a step (6 steps an
epoch, 9 in all), logged at every step, evaluated at every third and saved at every second. Run as a program, this file is
the server: for each order, a line of JSON, it forks, and the child trains and exits as a user's script would.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict

from etude import EarlyStoppingCallback, Trainer, TrainerCallback
from short_run import short_trainer, without_clock
from tiny import ListDataset, Padded, StreamDataset, language_rows, tiny_llama, with_lora

HERE = Path(__file__).parent
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
            (os.killpg if each.get("group") else os.kill)(os.getpid(), each["signal"])
        return bool(due)


class Watcher(TrainerCallback):
    """Every event of the loop is a happening; the fault of the order is armed between two steps."""

    def __init__(self, happenings: Happenings, fault: dict[str, Any] | None) -> None:
        self.happenings, self.fault = happenings, fault

    def __getattribute__(self, name: str) -> Any:
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def tell(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.happenings.happened(name)
            if self.fault and name == "on_step_end" and state.global_step in (self.fault["step"], self.fault["until"]):
                arm(args.output_dir, self.fault if state.global_step == self.fault["step"] else None)

        return tell


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


def train(order: dict[str, Any]) -> None:
    """One run in the working directory, as ordered; its result goes to the file `order["result"]`."""
    happenings = Happenings(order["signals"])
    os.register_at_fork(after_in_parent=lambda: happenings.happened("fork"))

    class Watched(Trainer):
        def _save_rng_state(self, output_dir: str) -> None:
            super()._save_rng_state(output_dir)
            happenings.happened("save")

    if order["cpu_seconds"] is not None:  # SIGPROF ends a process as SIGKILL does: nothing of it runs any more
        signal.setitimer(signal.ITIMER_PROF, order["cpu_seconds"])
    trainer = short_trainer(
        tiny_model(),
        Rows(ROWS, happenings),
        eval_rows=EVAL_ROWS,
        callbacks=[Watcher(happenings, order["fault"])],
        trainer_class=Watched,
        output_dir=str(Path("out").absolute()),  # the shim compares paths as they are given
        **(SETTINGS | order["settings"]),
    )
    output = trainer.train(resume_from_checkpoint=order["resume"])
    signal.setitimer(signal.ITIMER_PROF, 0)
    Path(order["result"]).write_text(json.dumps(result_of(trainer, output)))


# -- the server ------------------------------------------------------------------------------------------------------------


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
            signal.alarm(LONGEST_SECONDS)
            train(order)
            return
        _, status = os.waitpid(child, 0)
        code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        print(json.dumps(code), flush=True)


@pytest.fixture(scope="session")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fault injector as a library to preload."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("the fault injector needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("faultio") / "faultio.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "faultio.c", "-ldl"], check=True)
    return library


@pytest.fixture(scope="session")
def train_in_child(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Train]:
    """`train_in_child(folder, resume=..., signals=[...], fault={...}, cpu_seconds=..., **settings)`."""
    scratch = tmp_path_factory.mktemp("orders")
    paths = [str(HERE), str(HERE.parent), *sys.path]
    environment = {**os.environ, "LD_PRELOAD": str(shim), "PYTHONPATH": os.pathsep.join(paths)}
    server = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    )
    assert server.stdin and server.stdout

    def run(
        folder: Path,
        *,
        resume: Any = None,
        signals: Any = (),
        fault: dict[str, Any] | None = None,
        cpu_seconds: float | None = None,
        **settings: Any,
    ) -> Ended:
        folder.mkdir(parents=True, exist_ok=True)
        result, said = scratch / "result.json", scratch / "said.txt"
        result.unlink(missing_ok=True)
        order = {"folder": str(folder), "resume": resume, "signals": list(signals), "settings": settings}
        order |= {"fault": fault and {"until": -1} | fault, "cpu_seconds": cpu_seconds}
        server.stdin.write(json.dumps(order | {"result": str(result), "said": str(said)}) + "\n")
        server.stdin.flush()
        code = json.loads(server.stdout.readline())
        content = json.loads(result.read_text()) if result.exists() else None
        return Ended(code, said.read_text(errors="replace"), content)

    yield run
    server.stdin.close()
    server.wait(timeout=10)
    server.stdout.close()


@pytest.fixture(scope="session")
def whole(train_in_child: Train) -> Iterator[dict[str, Any]]:
    """The result of the run that nothing disturbs."""
    folder = Path(tempfile.mkdtemp(prefix="etude-test-"))
    ended = train_in_child(folder)
    shutil.rmtree(folder)
    assert ended.exit_code == 0 and ended.result is not None, ended.said
    assert ended.result["step"] == LAST_STEP
    yield ended.result


if __name__ == "__main__":
    serve()
