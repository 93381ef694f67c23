"""kill -9 at random moments of training on a CUDA device, on the packed path: the same adapter in the end, bit for bit.

Every process is forked before CUDA is touched, so that importing torch is paid once. The chains of kills run beside each
other, and each kill comes a random time after a random step that the child has told of.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a GPU must not open it
import torch

from etude import Trainer, TrainerCallback, TrainingArguments
from etude.model.adapter import read_tensors
from tiny import Padded, language_rows, tiny_llama, with_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]

STEPS, SAVE_STEPS = 72, 5
CHAINS, KILLS = 4, 6
STEPS_PER_KILL = 10
LATEST_SECONDS = 0.05  # after the step: a few steps, or a save
LONGEST_SECONDS = 120  # then a child that hangs is ended, so that the test fails instead of waiting for ever
FAILED = 255


class Tell(TrainerCallback):
    """Writes the number of each step into a pipe. One that is to be killed waits for it before its last steps."""

    def __init__(self, pipe: int) -> None:
        self.pipe = pipe

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        os.write(self.pipe, bytes([state.global_step]))
        if state.global_step == STEPS - 2:
            signal.pause()


def train(folder: Path, *, device: str, deterministic: bool, tell: int | None) -> None:
    model = with_lora(
        tiny_llama(hidden_size=256, intermediate_size=512, head_dim=64), task_type="CAUSAL_LM", lora_dropout=0.1
    )
    arguments: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "max_steps": STEPS, "save_steps": SAVE_STEPS, "save_total_limit": 2, "logging_steps": 1, "learning_rate": 1e-3,
        "bf16": True, "deterministic": deterministic, "disable_tqdm": True, "use_cpu": device == "cpu",
        "report_to": "none",
    }  # fmt: skip
    rows = language_rows(60, seed=1, shortest=5, longest=40)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(**arguments),
        train_dataset=rows,
        data_collator=Padded(),
        callbacks=[] if tell is None else [Tell(tell)],
    )
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.path.name == "packed"


def fork(work: Callable[[], int]) -> int:
    """The process id of a child that ends with the exit code that `work` returns."""
    child = os.fork()
    if child == 0:
        code = FAILED
        try:
            signal.alarm(LONGEST_SECONDS)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def ended(child: int) -> int:
    """Its exit code, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def whole_run(folder: Path, **how: Any) -> int:
    train(folder, tell=None, **how)
    return 0


def killed_run(folder: Path, step: int, seconds: float, **how: Any) -> bool:
    """Train, and kill `seconds` after `step`; whether that is how it ended."""
    reading, writing = os.pipe()

    def work() -> int:
        os.close(reading)
        train(folder, tell=writing, **how)
        return 0

    child = fork(work)
    os.close(writing)
    with open(reading, "rb", buffering=0) as pipe:
        while (told := pipe.read(1)) and told[0] < step:
            pass
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
        return ended(child) == -signal.SIGKILL and bool(told)


def chain(folder: Path, seed: int, **how: Any) -> int:
    """A run that is killed again and again, always a bit later, and then let finish; returns the number of kills."""
    draw, num_kills = random.Random(seed), 0
    for kill in range(KILLS):
        step = kill * STEPS_PER_KILL + draw.randint(1, STEPS_PER_KILL)
        num_kills += killed_run(folder, step, draw.uniform(0, LATEST_SECONDS), **how)
    child = fork(lambda: whole_run(folder, **how))
    return num_kills if ended(child) == 0 else FAILED


def final_adapter(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / f"checkpoint-{STEPS}" / "adapter_model.safetensors")


def losses(folder: Path) -> dict[int, float]:
    """Those of every step, which is in the log once."""
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    logged = [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry]
    assert [step for step, _ in logged] == list(range(1, STEPS + 1))
    return dict(logged)


def check_chains(folder: Path, device: str) -> None:
    """All runs at once: `CHAINS` with `deterministic=True`, one without, and an undisturbed one of each kind."""
    started = time.monotonic()
    exact, loose = ({"device": device, "deterministic": each} for each in (True, False))
    wholes = [fork(lambda: whole_run(folder / "whole", **exact)), fork(lambda: whole_run(folder / "loose", **loose))]
    chains = [fork(lambda seed=seed: chain(folder / f"chain-{seed}", seed, **exact)) for seed in range(CHAINS)]
    loosely = fork(lambda: chain(folder / "loose-chain", CHAINS, **loose))
    assert [ended(child) for child in wholes] == [0, 0]
    assert [ended(child) for child in chains] == [KILLS] * CHAINS
    assert ended(loosely) == KILLS
    expected, log = final_adapter(folder / "whole"), losses(folder / "whole")
    for seed in range(CHAINS):
        found = final_adapter(folder / f"chain-{seed}")
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        assert losses(folder / f"chain-{seed}") == log
    assert losses(folder / "loose-chain") == pytest.approx(losses(folder / "loose"), rel=2e-2)
    seconds = time.monotonic() - started
    print(f"{CHAINS * KILLS} kills in {CHAINS} chains ended with the same bits, {KILLS} in one without deterministic")
    print(f"with the same losses up to rounding; {seconds:.0f} s")


def test_killed_at_random_moments(tmp_path: Path) -> None:
    assert not torch.cuda.is_initialized(), "run this file in a process of its own: children are forked"
    check_chains(tmp_path, "cuda")
