"""Checkpoints of `transformers.Trainer` are taken over on request, and training goes on with the losses it would have had.

The other way, transformers going on from ours, is in tests/parity/test_parity_checkpoints.py.
"""

from __future__ import annotations

import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from side_by_side import ADAPTER_TOLERANCE, STEP_TOLERANCE, Run, largest_difference, train

import etude
from etude.checkpoint.import_transformers import import_checkpoint
from etude.cli.main import main
from etude.errors import CheckpointError
from tiny import Padded, adapter_of, causal_lora, distance, language_rows

SETTINGS: dict[str, Any] = {
    "num_train_epochs": 2,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "weight_decay": 0.1,
}
ROWS = 20  # five steps an epoch

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own


@pytest.fixture(scope="module")
def peer(tmp_path_factory: pytest.TempPathFactory) -> Run:
    settings = SETTINGS | {"save_strategy": "steps", "save_steps": 1}
    return train(transformers, causal_lora, language_rows(ROWS), settings, folder=tmp_path_factory.mktemp("peer"))


def go_on(checkpoint: Path, model: Any = None, *, optimizers: Any = (None, None), **settings: Any) -> Any:
    trainer = etude.Trainer(
        model=causal_lora() if model is None else model,
        args=etude.TrainingArguments(
            output_dir="ours", use_cpu=True, seed=7, learning_rate=1e-3, logging_steps=1, save_strategy="no",
            disable_tqdm=True, **(SETTINGS | settings),
        ),
        train_dataset=language_rows(ROWS),
        data_collator=Padded(),
        optimizers=optimizers,
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


@pytest.mark.parametrize("step", [3, 5, 8])
def test_training_goes_on_with_the_same_losses(step: int, peer: Run, tmp_path: Path) -> None:
    """In the middle of the first epoch, between the two, and in the middle of the second."""
    original = Path(peer.trainer.args.output_dir, f"checkpoint-{step}")
    mine = go_on(import_checkpoint(original, tmp_path / "imported").path)
    for name in ("loss", "learning_rate", "grad_norm"):
        logged = [entry[name] for entry in mine.state.log_history if name in entry]
        assert largest_difference(logged, peer.steps(name)) <= STEP_TOLERANCE, name
    assert distance(adapter_of(mine.model), peer.adapter) <= ADAPTER_TOLERANCE
    assert mine.state.log_history[-1]["train_loss"] == pytest.approx(peer.output.training_loss, rel=STEP_TOLERANCE)


def test_the_command_takes_the_newest_in_place(peer: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(peer.trainer.args.output_dir, tmp_path / "out")
    assert main(["import-checkpoint", str(tmp_path / "out")]) == 0
    assert "checkpoint-10: step 10" in capsys.readouterr().out
    assert {"MANIFEST.json", "optimizer.pt", "trainer_state.json"} <= {
        path.name for path in (tmp_path / "out" / "checkpoint-10").iterdir()
    }
    longer = go_on(tmp_path / "out" / "checkpoint-10", num_train_epochs=3)
    assert longer.state.global_step == 15


def test_another_rank_is_named(peer: Run, tmp_path: Path) -> None:
    imported = import_checkpoint(Path(peer.trainer.args.output_dir, "checkpoint-3"), tmp_path / "imported").path
    with pytest.raises(CheckpointError, match=r"adapter 'default' r: 8 in the checkpoint, 4 now"):
        go_on(imported, causal_lora(r=4))


def test_another_order_of_parameters_is_seen(peer: Run, tmp_path: Path) -> None:
    imported = import_checkpoint(Path(peer.trainer.args.output_dir, "checkpoint-3"), tmp_path / "imported").path
    model = causal_lora()
    backwards = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad][::-1], lr=1e-3)
    with pytest.raises(CheckpointError, match="groups of"):
        go_on(imported, model, optimizers=(backwards, None))


class Bomb:
    def __reduce__(self) -> Any:
        return (Path("exploded").touch, ())


@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_nothing_in_a_pickle_is_executed(file: str, peer: Run, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(Path(peer.trainer.args.output_dir, "checkpoint-3"), folder)
    torch.save({"state": Bomb(), "param_groups": []}, folder / file, pickle_module=pickle)
    with pytest.raises(CheckpointError, match=file.replace(".", r"\.")):
        import_checkpoint(folder)
    assert not Path("exploded").exists()
    assert not (folder / "MANIFEST.json").exists()


def test_what_is_no_checkpoint_of_theirs_is_said(peer: Run, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no trainer_state\.json"):
        import_checkpoint(tmp_path)
    imported = import_checkpoint(Path(peer.trainer.args.output_dir, "checkpoint-3"), tmp_path / "imported").path
    with pytest.raises(CheckpointError, match="was written by etude"):
        import_checkpoint(imported)
