"""Checkpoints written while training goes on, on a CUDA device: the bytes of those that training waits for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from etude.checkpoint.copies import Copies
from etude.checkpoint.writer import InBackground
from short_run import checkpoints, short_trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]


def files_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.glob("checkpoint-*/**/*") if path.is_file())
    own = ("training_args.bin", "MANIFEST.json")  # which name the folder and the setting
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name not in own}


@pytest.mark.parametrize("half", [{}, {"bf16": True}])
def test_the_same_bytes_as_when_training_waits(tmp_path: Path, half: dict[str, Any]) -> None:
    for name, in_background in (("background", True), ("in-place", False)):
        trainer = short_trainer(
            output_dir=str(tmp_path / name),
            use_cpu=False,
            deterministic=True,
            save_in_background=in_background,
            save_strategy="steps",
            save_steps=1,
            report_to="none",
            **half,
        )
        trainer.train()
        assert isinstance(trainer._run.saves.writer, InBackground) == in_background
    assert checkpoints(tmp_path / "background") == list(range(1, 11))
    found, expected = files_of(tmp_path / "background"), files_of(tmp_path / "in-place")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


def test_copies_are_page_locked_and_used_again() -> None:
    copies, tensor = Copies(), torch.arange(1 << 20, device="cuda", dtype=torch.float32)
    first = copies.take({"tensor": tensor})["tensor"]
    assert first.is_pinned() and not first.is_cuda and torch.equal(first, tensor.cpu())
    tensor.add_(1)
    assert not torch.equal(first, tensor.cpu())
    again = copies.take({"tensor": tensor})["tensor"]
    assert again.data_ptr() == first.data_ptr() and torch.equal(again, tensor.cpu())
