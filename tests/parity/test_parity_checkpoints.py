"""The way back: transformers.Trainer goes on from a checkpoint of ours as if it had trained all along."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from side_by_side import ADAPTER_TOLERANCE, STEP_TOLERANCE, largest_difference, ours, train

from tiny import Padded, Row, adapter_of, causal_lora, distance, language_rows


def resumed_by_transformers(
    checkpoint: Path, rows: list[Row], folder: Path, **settings: object
) -> transformers.Trainer:
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        seed=7,
        learning_rate=1e-3,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **settings,
    )
    trainer = transformers.Trainer(model=causal_lora(r=8), args=arguments, train_dataset=rows, data_collator=Padded())
    trainer.train(resume_from_checkpoint=str(checkpoint))
    return trainer


@pytest.mark.filterwarnings("ignore")  # the peer's own
@pytest.mark.parametrize("step", [3, 6])
def test_transformers_goes_on_from_our_checkpoint(step: int, tmp_path: Path) -> None:
    rows, settings = language_rows(20), {"num_train_epochs": 2, "per_device_train_batch_size": 4}
    saving = {"save_strategy": "steps", "save_steps": step}
    mine = ours(causal_lora, rows, settings | saving, folder=tmp_path)
    checkpoint = Path(mine.trainer.args.output_dir, f"checkpoint-{step}")
    peer = resumed_by_transformers(checkpoint, rows, tmp_path / "resumed", **settings)
    for name in ("loss", "learning_rate", "grad_norm"):
        logged = [entry[name] for entry in peer.state.log_history if name in entry]
        assert largest_difference(mine.steps(name), logged) <= STEP_TOLERANCE, name
    assert peer.state.global_step == 10
    assert distance(mine.adapter, adapter_of(peer.model)) <= ADAPTER_TOLERANCE


@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_transformers_is_refused_with_the_way_to_take_it_over(tmp_path: Path) -> None:
    """Its state lies in pickles, which are never opened unasked."""
    rows, settings = language_rows(20), {"num_train_epochs": 1, "per_device_train_batch_size": 4}
    peer = train(transformers, causal_lora, rows, settings | {"save_strategy": "epoch"}, folder=tmp_path)
    checkpoint = Path(peer.trainer.args.output_dir, "checkpoint-5")
    mine = ours(causal_lora, rows, settings, folder=tmp_path)
    with pytest.raises(ValueError, match="import-checkpoint"):
        mine.trainer.train(resume_from_checkpoint=str(checkpoint))
