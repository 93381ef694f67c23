"""A mixture of experts with adapters on its stacked weights trains as under `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from side_by_side import assert_same_numbers, ours, theirs
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from etude.kernels.expert_layers import expert_layers, mixture_forward
from tiny import DECODER, language_rows, with_lora

pytestmark = [
    pytest.mark.filterwarnings("ignore:.(is_)?gradient_checkpointing(_enable)?. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys did not match:RuntimeWarning"),
]

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SAID = "2 mixtures of experts as grouped products with their own backward pass"


def build() -> PeftModel:
    torch.manual_seed(0)
    shape = {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    base = Qwen3MoeForCausalLM(Qwen3MoeConfig(**(DECODER | shape)))
    return with_lora(base, task_type="CAUSAL_LM", target_parameters=TARGETS, r=4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_that_of_transformers(tmp_path: Path, checkpointing: bool) -> None:
    rows, during = language_rows(16, seed=1), list[bool]()
    settings = {
        "max_steps": 10, "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 5,
        "per_device_eval_batch_size": 8, "gradient_checkpointing": checkpointing,
    }  # fmt: skip

    class Looks:
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            during.extend(layer.forward.__func__ is mixture_forward for layer in expert_layers(model))

    mine = ours(build, rows, settings, folder=tmp_path, eval_rows=rows[:8], callbacks=[Looks()])
    peer = theirs(build, rows, settings, folder=tmp_path, eval_rows=rows[:8])
    assert_same_numbers(mine, peer)
    assert SAID in mine.trainer.path.reasons
    assert during == [True] * 20
    assert not any("forward" in vars(module) for module in mine.trainer.model.modules())
