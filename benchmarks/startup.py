"""What a run costs before it trains: the way to the first step, a million rows, going on in the middle of an epoch.

    python -m benchmarks.startup --data ../shared/data/alpaca_en_demo.json --rounds 3 --json startup.json
    python -m benchmarks.startup --part rows resume

`first-step` is one script with etude and with `transformers.Trainer` in turn, each run a process of its own: imports, a base
model from a folder, an adapter, a trainer, and one step on rows that are tokenized already. `rows` reads and tokenizes a
million short rows, without and with the cache. `resume` enters 1,000,000 samples at step 0 and at step 200,000. Seconds are of
the clock and, beside them, of the processor: on a busy machine those are the ones to compare.
"""

from __future__ import annotations

import json
import os
import re
import resource
import tempfile
import time
import zlib
from pathlib import Path
from typing import Any

PARTS = ("first-step", "rows", "resume")
CONTENDERS = ("etude", "transformers")
MODELS = ("tiny", "gemma-270m")
LENGTH = 512


def processor_seconds() -> float:
    """Of this process and of those it has waited for."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def resident_mib() -> float:
    """Memory of this process that is not shared with a file."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", status)
    return int(found.group(1)) / 1024 if found else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Stages:
    """The seconds between marks: of the clock and of the processor."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}
        self._last = self._now()

    def _now(self) -> tuple[float, float]:
        return time.perf_counter(), processor_seconds()

    def mark(self, name: str) -> None:
        now = self._now()
        self.seconds[name] = (now[0] - self._last[0], now[1] - self._last[1])
        self._last = now


def config_of(model: str) -> Any:
    if model == "tiny":
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=LENGTH,
        )  # fmt: skip
    from transformers import Gemma3TextConfig

    return Gemma3TextConfig(
        vocab_size=262144, hidden_size=640, intermediate_size=2048, num_hidden_layers=18, num_attention_heads=4,
        num_key_value_heads=1, head_dim=256, query_pre_attn_scalar=256, max_position_embeddings=32768,
    )  # fmt: skip


def tokenized(path: Path, vocab_size: int) -> list[dict[str, list[int]]]:
    """A number for every word: the lengths of real rows without a tokenizer."""
    rows = []
    for row in json.loads(path.read_text()):
        given, answer = f"{row['instruction']} {row['input']}".split(), row["output"].split()
        ids = [2 + zlib.crc32(word.encode()) % (vocab_size - 2) for word in [*given, *answer]][:LENGTH]
        labels = ([-100] * len(given) + ids[len(given) :])[:LENGTH]
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)})
    return rows


def first_step(contender: str, model_folder: Path, rows_file: Path, **_: Any) -> dict[str, Any]:
    """The script that both contenders run; only where `Trainer` comes from differs."""
    stages = Stages()
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    if contender == "etude":
        from etude import Trainer, TrainerCallback, TrainingArguments
    else:
        from transformers import Trainer, TrainerCallback, TrainingArguments

    from benchmarks.shapes import collate

    stages.mark("imports")
    rows = json.loads(rows_file.read_text())
    stages.mark("rows")
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="bfloat16")
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    stages.mark("model")

    class Clock(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stages.mark("until the step")

        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            stages.mark("the step")

    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=4, max_steps=1, bf16=True, use_cpu=True,
        save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer = Trainer(model=model, args=args, train_dataset=rows, data_collator=collate, callbacks=[Clock()])
    stages.mark("trainer")
    trainer.train()
    seconds = dict(stages.seconds)
    return {"stages": seconds}
