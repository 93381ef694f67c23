"""etude beside `transformers.Trainer` + PEFT on a CPU: Gemma 3 270M, LoRA r=8 on all linear layers, instruction rows.

    python -m benchmarks.cpu --data ../shared/data/alpaca_en_demo.json --steps 12 --rounds 2
    python -m benchmarks.cpu --data ... --contender etude --steps 60 --evaluate

Each run is a process of its own and the contenders take turns, on the same rows in the same order. Tokens per second
counts real tokens, not padding; memory is the peak resident set of the process. On a machine that others use as well, the
tokens per second of processor time are the steadier number (with OMP_WAIT_POLICY=PASSIVE: waiting threads then sleep).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

HELD_OUT = 50
LENGTH = 512
CONTENDERS = ("etude", "etude-general", "etude-fp32", "transformers", "transformers-fp32")


class Clock:
    """Times the steps after the first one."""

    def __init__(self) -> None:
        self.built, self.first, self.last = time.perf_counter(), 0.0, 0.0
        self.first_core, self.last_core = 0.0, 0.0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.last, self.last_core = time.perf_counter(), time.process_time()
        if state.global_step == 1:
            self.first, self.first_core = self.last, self.last_core


def encode(path: Path, tokenizer: Any) -> list[dict[str, list[int]]]:
    rows = []
    for row in json.loads(path.read_text()):
        prompt = f"Instruction: {row['instruction']}\n{row['input']}\nAnswer: "
        ids = tokenizer(prompt)["input_ids"]
        answer = tokenizer(row["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append({"input_ids": (ids + answer)[:LENGTH], "labels": ([-100] * len(ids) + answer)[:LENGTH]})
    return [row | {"attention_mask": [1] * len(row["input_ids"])} for row in rows if row["labels"][-1] != -100]


def child(args: argparse.Namespace) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    from benchmarks.shapes import collate
    from etude.demo.base_model import ensure_base_model

    started = time.perf_counter()
    folder = ensure_base_model(say=lambda line: None)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = encode(args.data, tokenizer)
    in_bf16 = not args.child.endswith("fp32")
    dtype = torch.bfloat16 if in_bf16 else torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    torch.manual_seed(0)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
        "max_steps": args.steps, "learning_rate": 2e-4, "warmup_steps": 3, "logging_steps": 1, "bf16": in_bf16,
        "use_cpu": True, "save_strategy": "no", "report_to": "none", "disable_tqdm": True, "seed": args.seed,
    }  # fmt: skip
    clock = type("ClockCallback", (Clock, TrainerCallback), {})()
    if args.child.startswith("etude"):
        from etude import Trainer, TrainingArguments

        settings["fast_path"] = args.child != "etude-general"
    else:
        from transformers import Trainer, TrainingArguments
    seen: list[int] = []

    def counting_collate(batch: list[dict[str, list[int]]]) -> Any:
        seen.append(sum(len(row["input_ids"]) for row in batch))
        return collate(batch)

    trainer = Trainer(
        model=model,
        args=TrainingArguments(**settings),
        train_dataset=rows[:-HELD_OUT],
        eval_dataset=rows[-HELD_OUT:],
        data_collator=counting_collate,
        callbacks=[clock],
    )
    before = trainer.evaluate()["eval_loss"] if args.evaluate else None
    seen.clear()
    trainer.train()
    tokens = sum(seen[1 : args.steps])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    result = {
        "contender": args.child,
        "tokens_per_second": tokens / (clock.last - clock.first),
        "tokens_per_core_second": tokens / (clock.last_core - clock.first_core),
        "peak_gib": peak,
        "seconds_to_first_step": clock.first - started,
        "losses": losses,
        "eval_loss_before": before,
        "eval_loss_after": trainer.evaluate()["eval_loss"] if args.evaluate else None,
    }
    print("RESULT " + json.dumps(result))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="JSON list of instruction/input/output rows")
    parser.add_argument("--contender", nargs="+", default=["etude", "transformers"], choices=CONTENDERS)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--evaluate", action="store_true", help="loss on held-out rows before and after")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args)
        return
    environment = {k: v for k, v in os.environ.items() if not k.startswith("OPENBLAS_")}
    runs: dict[str, list[dict[str, Any]]] = {contender: [] for contender in args.contender}
    for _ in range(args.rounds):
        for contender in args.contender:
            command = [sys.executable, "-m", "benchmarks.cpu", "--child", contender, "--data", str(args.data)]
            command += ["--steps", str(args.steps), "--seed", str(args.seed)] + ["--evaluate"] * args.evaluate
            finished = subprocess.run(command, env=environment, capture_output=True, text=True)
            line = next((line for line in finished.stdout.splitlines() if line.startswith("RESULT ")), None)
            if line is None:
                raise SystemExit(f"{contender} failed:\n{finished.stderr[-3000:]}")
            runs[contender].append(json.loads(line.removeprefix("RESULT ")))
            last = runs[contender][-1]
            print(
                f"{contender:18} {last['tokens_per_second']:7.1f} tok/s  {last['tokens_per_core_second']:7.1f} tok per core "
                f"second  {last['peak_gib']:5.2f} GiB  first step "
                f"{last['seconds_to_first_step']:5.1f} s  loss {last['losses'][0]:.4f} -> {last['losses'][-1]:.4f}  "
                f"held out {last['eval_loss_before']} -> {last['eval_loss_after']}",
                flush=True,
            )
    medians, core_medians = (
        {name: statistics.median(run[key] for run in results) for name, results in runs.items()}
        for key in ("tokens_per_second", "tokens_per_core_second")
    )
    for speeds, unit in ((medians, "tok/s"), (core_medians, "tok per core second")):
        for name, speed in speeds.items():
            ratio = f"  {speed / speeds['transformers']:.2f}x transformers" if "transformers" in speeds else ""
            print(f"median {name:18} {speed:7.1f} {unit}{ratio}")
    if args.json:
        report = {
            "date": date.today().isoformat(),
            "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
            "runs": runs,
            "median_tokens_per_second": medians,
            "median_tokens_per_core_second": core_medians,
        }
        args.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
