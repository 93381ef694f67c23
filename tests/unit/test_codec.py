"""What may be written into a checkpoint is what is read from it again; what peft has learned since is no obstacle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from etude.checkpoint import codec
from etude.checkpoint.reading import MAX_TENSORS, JsonLimits
from etude.checkpoint.resume import changes_since
from etude.errors import CheckpointError
from etude.model.adapter import save_weights
from short_run import logged, short_trainer
from tiny import causal_lora


@pytest.mark.parametrize("tree", [{"numbers": [0] * 500_001}, {"lists": [[]] * 200_001}, {"text": "a" * (33 << 20)}])
def test_what_could_not_be_read_again_is_not_written(tmp_path: Path, tree: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match=r"tree\.json: could not be read again: it (holds too much|has)"):
        codec.save_tree(tmp_path, "tree", tree)
    assert not list(tmp_path.iterdir())


def test_a_tree_of_very_many_tensors_needs_to_be_expected(tmp_path: Path) -> None:
    """As that of an optimizer of very many parameters is."""
    tree = {"state": {f"p{n}": torch.zeros(1) for n in range(MAX_TENSORS + 1)}}
    with pytest.raises(CheckpointError, match=r"holds 10,001 tensors, at most 10,000 are read"):
        codec.save_tree(tmp_path, "tree", tree)
    codec.save_tree(tmp_path, "tree", tree, MAX_TENSORS + 1)
    with pytest.raises(CheckpointError, match=r"tree\.safetensors: .*at most"):
        codec.load_tree(tmp_path, "tree")
    assert codec.load_tree(tmp_path, "tree", MAX_TENSORS + 1).keys() == tree.keys()


def test_a_log_that_is_too_long_keeps_its_newest_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """The run can be resumed, and ends as it would have; the whole log is in metrics.jsonl."""
    whole = short_trainer(output_dir="whole", save_strategy="steps", save_steps=4)
    monkeypatch.setattr("etude.contents.LOG", JsonLimits(1 << 20, 10**6, 8))
    whole.train()
    assert len(logged(whole, "loss")) == 10
    written = json.loads(Path("whole/checkpoint-8/trainer_state.json").read_text())["log_history"]
    left_out = 8 - len(written)
    assert 0 < left_out < 8 and [entry["step"] for entry in written] == list(range(left_out + 1, 9))
    assert any(f"leaves out the oldest {left_out}, metrics.jsonl has" in line for line in whole.notices.lines)
    resumed = short_trainer(output_dir="whole")
    resumed.train(resume_from_checkpoint="whole/checkpoint-8")
    assert logged(resumed, "loss") == logged(whole, "loss")[left_out:]
    rows = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 11))


def adapters(**settings: Any) -> dict[str, Any]:
    return {"adapters": {"default": {"r": 8, **settings}}}


def test_a_setting_that_only_another_version_of_peft_knows() -> None:
    """Switched off it is nothing; switched on it is said; a value that both know must be equal."""
    assert changes_since(adapters(), adapters(use_new=False, layers_new=None)) == []
    assert changes_since(adapters(use_old=False), adapters()) == []
    (change,) = changes_since(adapters(), adapters(use_new=True))
    assert not change.fatal and "'default' use_new" in str(change) and "versions of peft" in str(change)
    (change,) = changes_since(adapters(use_rslora=False), adapters(use_rslora=True))
    assert change.fatal


def test_the_model_card_of_every_checkpoint_is_the_one_that_peft_makes(tmp_path: Path) -> None:
    """It is made from peft's template for the first of them only."""
    model = causal_lora()
    save_weights(causal_lora(), tmp_path / "peft")
    for name in ("first", "second"):
        save_weights(model, tmp_path / name)
        assert (tmp_path / name / "README.md").read_bytes() == (tmp_path / "peft" / "README.md").read_bytes()
