"""The run whose checkpoints are kept: a model, rows and settings that nothing else shares, so that they never change.

    python tests/golden/golden.py tests/golden/format-N

writes what a version of the format needs: `checkpoint-4` of a run of eight steps, and the losses of the whole run. It is
called once for each, by the version that introduces it; what lies here is never written anew.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from etude import Trainer, TrainingArguments

KEPT, LAST = 4, 8
VOCABULARY = 32


def model() -> Any:
    """Dropout in the adapter: the restored randomness is part of what is checked. The weights are arithmetic."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    adapted = get_peft_model(
        LlamaForCausalLM(config),
        LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]),
    )
    with torch.no_grad():
        for number, (name, parameter) in enumerate(adapted.named_parameters()):
            if "norm" not in name:
                places = torch.arange(parameter.numel(), dtype=torch.float64) + 1
                values = torch.frac(places * 0.6180339887498949 * (number + 1)) - 0.5
                parameter.copy_(0 * parameter if "lora_B" in name else values.reshape(parameter.shape))
    return adapted


def rows() -> list[dict[str, list[int]]]:
    lengths = [3 + 5 * number % 7 for number in range(12)]
    tokens = [
        [1 + (7 * number + 3 * place) % (VOCABULARY - 1) for place in range(n)] for number, n in enumerate(lengths)
    ]
    return [{"input_ids": row, "labels": row} for row in tokens]


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(row["input_ids"]) for row in batch)

    def padded(name: str, fill: int) -> torch.Tensor:
        return torch.tensor([row[name] + [fill] * (longest - len(row[name])) for row in batch])

    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": torch.tensor(
            [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in batch]
        ),
    }


def trainer(folder: Path, **settings: Any) -> Any:
    """Four steps an epoch, of which the sampler shuffles the rows; the checkpoint lies in the second epoch."""
    arguments: dict[str, Any] = {
        "output_dir": str(folder), "max_steps": LAST, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
        "gradient_accumulation_steps": 2, "logging_steps": 1, "save_strategy": "steps", "save_steps": KEPT, "seed": 3,
        "use_cpu": True, "hf_checkpoint_files": False, "disable_tqdm": True, "report_to": "none",
        "dataloader_pin_memory": False,
    }  # fmt: skip
    given = {"model": model(), "train_dataset": rows(), "data_collator": collate}
    return Trainer(args=TrainingArguments(**(arguments | settings)), **given)


def losses(log: list[dict[str, Any]]) -> list[float]:
    return [entry["loss"] for entry in log if "loss" in entry]


def make(folder: Path) -> None:
    folder.mkdir(parents=True)
    with tempfile.TemporaryDirectory() as place:
        run = trainer(Path(place))
        run.train()
        shutil.copytree(Path(place) / f"checkpoint-{KEPT}", folder / f"checkpoint-{KEPT}")
    (folder / "losses.json").write_text(json.dumps(losses(run.state.log_history), indent=1) + "\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    make(Path(sys.argv[1]))
