"""The loss of a frozen base in fp8 beside that of one in bfloat16, step by step on the same rows; fp8 needs a GPU.

    python -m benchmarks.loss_curves --model base-model --data e2e_test.txt --steps 500 --json curves.json

The rows are those of `benchmarks.quality`. What is compared are means over `--window` logs of ten steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.quality import BATCH_SIZE, encoded_rows, read_pairs, row_of, split

PRECISIONS = {"bf16": None, "fp8": "fp8"}
LEARNING_RATE, RANK, SEED, STEPS_OF_A_LOG = 2e-4, 16, 42, 10


def losses_of(model_folder: Path, rows: Any, base_precision: str | None, steps: int) -> list[float]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    from etude import Trainer, TrainingArguments

    torch.manual_seed(SEED)
    base = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16, local_files_only=True)
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as output:
        arguments = TrainingArguments(
            output_dir=output, per_device_train_batch_size=BATCH_SIZE, max_steps=steps, learning_rate=LEARNING_RATE,
            bf16=True, seed=SEED, logging_steps=min(STEPS_OF_A_LOG, steps), save_strategy="no", report_to="none",
            disable_tqdm=True, base_precision=base_precision,
        )  # fmt: skip
        collator = DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model_folder, local_files_only=True))
        trainer = Trainer(model=get_peft_model(base, lora), args=arguments, train_dataset=rows, data_collator=collator)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def differences(curve: list[float], other: list[float], window: int) -> list[float]:
    """How far `curve` is above `other`, relative to it, over every so many logs."""
    starts = range(0, len(other), window)
    means = [(statistics.mean(curve[i : i + window]), statistics.mean(other[i : i + window])) for i in starts]
    return [ours / theirs - 1 for ours, theirs in means]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of a base model")
    parser.add_argument("--data", type=Path, required=True, help="text file of lines meaning||sentence")
    parser.add_argument("--precision", nargs="+", default=list(PRECISIONS), choices=list(PRECISIONS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--window", type=int, default=5, help="logs of ten steps that are averaged")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        pairs = split(read_pairs(args.data), args.rows, 100).pairs
        file.write_text("".join(json.dumps(row_of(*pair)) + "\n" for pair in pairs), encoding="utf-8")
        rows = encoded_rows(file, args.model)
    curves = {name: losses_of(args.model, rows, PRECISIONS[name], args.steps) for name in args.precision}
    if args.json:
        args.json.write_text(json.dumps(curves, indent=1) + "\n", encoding="utf-8")
    for name, curve in curves.items():
        print(f"{name}: {curve[0]:.4f} -> {curve[-1]:.4f}, mean {statistics.mean(curve):.4f}")
    if len(curves) == len(PRECISIONS):
        found = differences(curves["fp8"], curves["bf16"], args.window)
        print(
            f"fp8 above bf16: {min(found):+.2%} to {max(found):+.2%} over windows, {statistics.mean(found):+.2%} on average"
        )


if __name__ == "__main__":
    main()
