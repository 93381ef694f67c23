"""The adapter is refused on another base than its own, also where that was quantised in training and is not any more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from etude.checkpoint.codec import save_tree
from etude.checkpoint.resume import PROGRESS
from etude.cli.adapted import RECIPE_NAME, require_recorded_base
from etude.errors import CheckpointError
from etude.model.adapter import base_fingerprint, unquantised_fingerprint
from etude.recovery import describe_run
from short_run import short_trainer
from tiny import causal_lora, tiny_llama, with_lora


def quantised(model: Any) -> Any:
    """As a library for it leaves a model: the weights of linear layers packed into bytes, everything else as it was."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and "lora" not in name and "lm_head" not in name:
            packed = (module.weight.detach().reshape(-1, 2) * 7).round().to(torch.int8).sum(1, keepdim=True)
            module.weight = nn.Parameter(packed.to(torch.uint8), requires_grad=False)
    return model


def lora(seed: int = 0) -> Any:
    return with_lora(tiny_llama(seed), 1, task_type="CAUSAL_LM")


def test_quantisation_changes_one_fingerprint_and_not_the_other() -> None:
    plain, packed, other = lora(), quantised(lora()), lora(seed=3)
    assert base_fingerprint(plain) != base_fingerprint(packed)
    assert unquantised_fingerprint(plain) == unquantised_fingerprint(packed)
    assert unquantised_fingerprint(plain) != unquantised_fingerprint(other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_precision_it_is_loaded_in_does_not_matter(dtype: torch.dtype) -> None:
    stored = lora().to(torch.bfloat16)
    assert unquantised_fingerprint(lora().to(torch.bfloat16).to(dtype)) == unquantised_fingerprint(stored)


def record(folder: Path, model: Any, quantization: str | None) -> None:
    names = {"base": base_fingerprint(model), "base_unquantised": unquantised_fingerprint(model)}
    save_tree(folder, PROGRESS, {"run": names})
    (folder / RECIPE_NAME).write_text("model: base\n" + (f"quantization: {quantization}\n" if quantization else ""))


@pytest.mark.parametrize("trained", [None, "4bit"])
@pytest.mark.parametrize("now", [None, "4bit"])
def test_another_base_is_refused_however_it_is_loaded(tmp_path: Path, trained: str | None, now: str | None) -> None:
    def load(seed: int, quantization: str | None) -> Any:
        return quantised(lora(seed)) if quantization else lora(seed)

    record(tmp_path, load(0, trained), trained)
    require_recorded_base(load(0, now), tmp_path, "base", now)
    with pytest.raises(CheckpointError, match="was trained on another base model than other"):
        require_recorded_base(load(3, now), tmp_path, "other", now)


def test_a_run_records_both() -> None:
    trainer = short_trainer(causal_lora())
    described = describe_run(trainer)
    assert described["base"] == base_fingerprint(trainer.model)
    assert described["base_unquantised"] == unquantised_fingerprint(trainer.model)
