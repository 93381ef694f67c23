"""kill -9 at random moments of training on a CUDA device, on the packed path: the same adapter in the end, bit for bit.

The children are forked before CUDA is touched, so that importing torch is paid once.
"""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a GPU must not open it
import torch

from etude import Trainer, TrainingArguments
from etude.model.adapter import read_tensors
from tiny import Padded, language_rows, tiny_llama, with_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]

STEPS = 60
CHAINS, KILLS = 3, 3


def train(folder: Path) -> None:
    model = with_lora(
        tiny_llama(hidden_size=256, intermediate_size=512, head_dim=64), task_type="CAUSAL_LM", lora_dropout=0.1
    )
    arguments: dict[str, Any] = {
        "output_dir": str(folder), "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "max_steps": STEPS, "save_steps": 5, "save_total_limit": 2, "logging_steps": 1, "learning_rate": 1e-3,
        "bf16": True, "deterministic": True, "disable_tqdm": True,
    }  # fmt: skip
    rows = language_rows(60, seed=1, shortest=5, longest=40)
    trainer = Trainer(model=model, args=TrainingArguments(**arguments), train_dataset=rows, data_collator=Padded())
    trainer.train(resume_from_checkpoint="auto")
    assert trainer.path.name == "packed"


def in_child(folder: Path, *, kill_after_seconds: float | None) -> int:
    """Train in a forked child; its exit status, negative where a signal ended it."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            train(folder)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    if kill_after_seconds is not None:
        time.sleep(kill_after_seconds)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def final_adapter(folder: Path) -> dict[str, torch.Tensor]:
    return read_tensors(folder / f"checkpoint-{STEPS}" / "adapter_model.safetensors")


def test_killed_at_random_moments(tmp_path: Path) -> None:
    assert not torch.cuda.is_initialized(), "run this file in a process of its own: children are forked"
    started = time.monotonic()
    assert in_child(tmp_path / "whole", kill_after_seconds=None) == 0
    seconds = time.monotonic() - started
    expected = final_adapter(tmp_path / "whole")
    moments = random.Random(0)
    num_killed = 0
    for chain in range(CHAINS):
        folder = tmp_path / f"chain-{chain}"
        for _ in range(KILLS):
            num_killed += in_child(folder, kill_after_seconds=moments.uniform(0.3, 1.0) * seconds) == -signal.SIGKILL
        assert in_child(folder, kill_after_seconds=None) == 0
        found = final_adapter(folder)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert num_killed > 0
    print(f"{num_killed} kills in {CHAINS} chains, each ended with the same bits; one run took {seconds:.1f} s")
