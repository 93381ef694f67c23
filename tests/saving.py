"""Short runs that save, what happens in them, and what they have saved."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from etude import TrainerCallback
from tiny import causal_lora, tiny_llama, with_lora

SAVING = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "report_to": "none"}


class At(TrainerCallback):
    """Does something at the end of a step."""

    def __init__(self, **actions: Callable[[], Any]) -> None:
        self.actions = actions

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.actions.get(f"step_{state.global_step}", lambda: None)()


def contents_of(folder: str) -> dict[str, bytes]:
    files = (path for path in Path(folder).glob("checkpoint-*/**/*") if path.is_file())
    own = ("training_args.bin", "MANIFEST.json")  # which name the folder and the setting
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name not in own}


def dora_with_a_trained_head() -> Any:
    model = with_lora(tiny_llama(), 1, task_type="CAUSAL_LM", use_dora=True, r=4)
    model.base_model.model.model.norm.weight.requires_grad_(True)
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "lora": causal_lora,
    "dora": dora_with_a_trained_head,
    "ia3": lambda: adapted_by("IA3Config", target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "head": lambda: with_lora(tiny_llama(), 1, task_type="CAUSAL_LM", modules_to_save=["lm_head"]),
}


def adapted_by(config: str, **settings: Any) -> Any:
    import peft

    torch.manual_seed(0)
    return peft.get_peft_model(tiny_llama(), getattr(peft, config)(task_type="CAUSAL_LM", **settings))
