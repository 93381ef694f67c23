"""How long a checkpoint holds training up, written in place and in the background.

    python -m benchmarks.saving                    on the CPU
    python -m benchmarks.saving --device cuda      on one GPU
    python -m benchmarks.saving --device cuda --model llama-8b --steps 130 --every 40

The adapter has the tensors that rank 16 on all linear layers of an 8B Llama has: 42 million numbers in 448 tensors of the
same sizes, 168 MB, and twice that in AdamW's state. The base under it is small (hidden size 256, 32 layers, rank 256), so
that a step is short and what is measured is the save; --model llama-8b has the base that belongs to it. The run is a real
one: `Trainer`, the loop, verified checkpoints.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.contenders import build_model as build_contender
from benchmarks.contenders import contender_of
from benchmarks.shapes import WORKS
from etude import Trainer, TrainerCallback, TrainingArguments
from etude.checkpoint import CheckpointStore

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS, TOKENS, LARGE_TOKENS = 512, 64, 2048

WAYS = {
    "no saves": {"in_background": False, "saves": False},
    "in place": {"in_background": False, "saves": True},
    "in the background": {"in_background": True, "saves": True},
}


def build_model(num_layers: int) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=896,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=1,
        use_cache=False,
    )
    lora = LoraConfig(r=256, target_modules=LINEAR, task_type="CAUSAL_LM", init_lora_weights=False)
    return get_peft_model(LlamaForCausalLM(config), lora)


def build_large_model(device: str) -> Any:
    return build_contender(contender_of("etude")[0], WORKS["llama-8b-4x2048"], 16, device)


def build_rows(num_tokens: int) -> list[dict[str, list[int]]]:
    numbers = torch.randint(0, 512, (ROWS, num_tokens), generator=torch.Generator().manual_seed(0)).tolist()
    return [{"input_ids": row, "attention_mask": [1] * num_tokens, "labels": row} for row in numbers]


class StepTimes(TrainerCallback):
    """The seconds from the end of a step to the end of the next one, saves included."""

    def __init__(self, device: str) -> None:
        self.device, self.ends = device, [0.0]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())

    def times(self) -> dict[int, float]:
        """Step -> seconds from the end of the step before it."""
        return {step: self.ends[step] - self.ends[step - 1] for step in range(2, len(self.ends))}


def measure(options: argparse.Namespace, *, in_background: bool, saves: bool) -> dict[str, Any]:
    times = StepTimes(options.device)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=options.steps,
            per_device_train_batch_size=options.batch,
            save_strategy="steps" if saves else "no",
            save_steps=options.every,
            save_total_limit=2,
            save_in_background=in_background,
            logging_steps=options.steps,
            use_cpu=options.device == "cpu",
            bf16=options.device == "cuda",
            report_to="none",
            disable_tqdm=True,
            seed=0,
        )
        is_large = options.model == "llama-8b"
        model = build_large_model(options.device) if is_large else build_model(options.layers)
        rows = build_rows(LARGE_TOKENS if is_large else TOKENS)
        trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[times])
        stalls: list[float] = []
        trainer.throughput.count_save = stalls.append  # type: ignore[method-assign,assignment]
        trainer.train()
        if saves:
            newest, rejected = CheckpointStore(folder).newest_valid()
            assert newest is not None and newest.step == options.steps and not rejected
            size = sum(path.stat().st_size for path in newest.path.rglob("*") if path.is_file())
        else:
            size = 0
    each = times.times()
    saved = set(range(options.every, options.steps, options.every))
    after = {step + 1 for step in saved}
    plain = [seconds for step, seconds in each.items() if step not in after]
    return {
        "checkpoint_mb": round(size / 1e6, 1),
        "first_stall_ms": round(1e3 * stalls[0], 1) if stalls else None,
        "stall_ms": [round(1e3 * stall, 1) for stall in stalls[1:-1]],
        "last_save_ms": round(1e3 * stalls[-1], 1) if stalls else None,
        "step_ms": round(1e3 * statistics.median(plain), 1),
        "step_after_a_save_ms": round(1e3 * statistics.median(each[step] for step in sorted(after)[1:]), 1),
        "all_steps_s": round(sum(each.values()), 2),
        "why_in_place": trainer._run.saves.why_in_place if trainer._run is not None else None,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| | first stall | median stall | longest | last save | step | step and save | all steps |",
        "|---" * 8 + "|",
    ]
    for name, result in results.items():
        stalls = result["stall_ms"]
        cells = [
            name,
            "" if result["first_stall_ms"] is None else f"{result['first_stall_ms']:,.0f} ms",
            f"{statistics.median(stalls):,.0f} ms" if stalls else "",
            f"{max(stalls):,.0f} ms" if stalls else "",
            "" if result["last_save_ms"] is None else f"{result['last_save_ms']:,.0f} ms",
            f"{result['step_ms']:,.0f} ms",
            f"{result['step_after_a_save_ms']:,.0f} ms",
            f"{result['all_steps_s']:,.1f} s",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--model", choices=["small", "llama-8b"], default="small", help="what the adapter is attached to"
    )
    parser.add_argument("--layers", type=int, default=32, help="32 has 42 million parameters")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--every", type=int, default=10, help="steps between two saves")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument(
        "--folder", type=Path, default=None, help="where checkpoints go; a temporary folder if not given"
    )
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the results")
    options = parser.parse_args()
    if options.model == "llama-8b" and options.device == "cpu":
        parser.error("--model llama-8b takes 16 GB of a GPU: add --device cuda")
    results = {}
    for way in options.ways:
        results[way] = measure(options, **WAYS[way])
        print(way, json.dumps(results[way]), flush=True)
    machine = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    document = {
        "machine": machine,
        "torch": torch.__version__,
        "model": options.model,
        "layers": options.layers,
        "every": options.every,
    }
    text = json.dumps(document | {"results": results}, indent=1)
    print(table(results))
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
