"""What a run costs before it trains: the way to the first step, a million rows, going on in the middle of an epoch.

    python -m benchmarks.startup --model BASE --data ../shared/data/alpaca_en_demo.json --rounds 3 --json startup.json
    python -m benchmarks.startup --model BASE --part rows resume

`first-step` starts the command, and a script with either `Trainer`, in turn on the same model and rows, and takes the time when
each says that its first step begins and that it is done. Before the first round everything runs once uncounted, so that
files are in memory for all. `rows` makes a million rows of real words, tokenizes them, and finds them again. `resume`
trains on a million samples from the start and from a checkpoint behind nine tenths of them. Each run is a process of its own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

PARTS = ("first-step", "rows", "resume")
LENGTH = 512
NUM_ROWS = 1_000_000
BATCHES_DRAWN = 200
RESUME_BATCH, RESUME_STEP = 1000, 900
BEGINS, DONE = "first step begins", "first step done"
CONTENDERS = (
    "etude train",
    "etude train, tokens kept",
    "script with etude.Trainer",
    "script with transformers.Trainer",
    "script with transformers.Trainer and datasets",
)


# -- the way to the first step ------------------------------------------------------------------------------------------


def command_of(contender: str, args: argparse.Namespace, output: str) -> list[str]:
    if not contender.startswith("etude train"):
        return [*_python("script"), contender, "--model", str(args.model), "--data", str(args.data)]
    words = {"model": args.model, "data": args.data, "output": output, "max-steps": 1, "max-length": LENGTH, "lora-r": 8,
             "global-batch-size": 4, "per-device-train-batch-size": 4, "eval-fraction": 0, "samples": 0,
             "save-strategy": "no", "logging-steps": 1}  # fmt: skip
    flags = [word for name, value in words.items() for word in (f"--{name}", str(value))]
    return [str(Path(sys.executable).parent / "etude"), "train", *flags, "--bf16", "--use-cpu"]


def _python(child: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.startup", "--child", child]


def seconds_to_first_step(contender: str, args: argparse.Namespace, cache: str) -> dict[str, float]:
    """From outside: when a line of the output says so. The command shows its screen, then trains; and logs the step."""
    begins, done = ("output ", "step 1/1") if contender.startswith("etude train") else (BEGINS, DONE)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"ETUDE_CACHE": cache, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        environment |= {"HF_DATASETS_CACHE": str(Path(folder) / "datasets")}
        started = time.perf_counter()
        process = subprocess.Popen(
            command_of(contender, args, str(Path(folder) / "run")),
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            said.append(line)
            for name, words in (("begins", begins), ("done", done)):
                if line.startswith(words) and name not in found:
                    found[name] = time.perf_counter() - started
                    found[f"{name}, of the processor"] = processor_seconds(process.pid)
            if args.no_step and "begins" in found:
                process.kill()
        if (process.wait() and not args.no_step) or "begins" not in found:
            raise SystemExit(f"{contender} failed:\n{''.join(said)[-3000:]}")
    return found


def processor_seconds(pid: int) -> float:
    """Of a process and of those it has waited for. On a busy machine this is what to compare until the step begins: up to
    there one thread works, without waiting."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def script(contender: str, args: argparse.Namespace) -> None:
    """What a user writes; only where `Trainer` comes from differs."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq

    if "etude" in contender:
        from etude import Trainer, TrainerCallback, TrainingArguments
    else:
        from transformers import Trainer, TrainerCallback, TrainingArguments

    tokenizer = AutoTokenizer.from_pretrained(args.model)

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        asked = f"{row['instruction']}\n\n{row['input']}" if row["input"] else row["instruction"]
        given = tokenizer(f"### Instruction:\n{asked}\n\n### Response:\n")["input_ids"]
        answer = tokenizer(row["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        ids, labels = (given + answer)[:LENGTH], ([-100] * len(given) + answer)[:LENGTH]
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}

    rows: Any
    if contender.endswith("datasets"):
        from datasets import load_dataset

        rows = load_dataset("json", data_files=str(args.data), split="train")
        rows = rows.map(encode, remove_columns=rows.column_names)
    else:
        rows = [encode(row) for row in json.loads(args.data.read_text())]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            print(BEGINS, flush=True)

        def on_step_end(self, *_: Any, **__: Any) -> None:
            print(DONE, flush=True)

    with tempfile.TemporaryDirectory() as output:
        settings = TrainingArguments(
            output_dir=output, per_device_train_batch_size=4, max_steps=1, learning_rate=2e-4, bf16=True, use_cpu=True,
            save_strategy="no", report_to="none", disable_tqdm=True, logging_steps=1,
        )  # fmt: skip
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        Trainer(model=model, args=settings, train_dataset=rows, data_collator=collator, callbacks=[Clock()]).train()


def measure_first_step(args: argparse.Namespace) -> dict[str, Any]:
    runs: dict[str, list[dict[str, float]]] = {contender: [] for contender in CONTENDERS}
    with tempfile.TemporaryDirectory() as kept:
        for number in range(args.rounds + 1):  # the first one counts for nobody
            for contender in CONTENDERS:
                with tempfile.TemporaryDirectory() as empty:
                    cache = kept if contender.endswith("kept") else empty
                    found = seconds_to_first_step(contender, args, cache)
                print(
                    f"{contender:46} {', '.join(f'{name} {seconds:.2f} s' for name, seconds in found.items())}",
                    flush=True,
                )
                if number:
                    runs[contender].append(found)
    medians = {
        name: {event: statistics.median(run[event] for run in found) for event in found[0]}
        for name, found in runs.items()
    }
    return {"runs": runs, "medians": medians}


# -- a million rows -----------------------------------------------------------------------------------------------------


def write_rows(words_of: Path, target: Path, count: int) -> None:
    """Short rows of real words in random order."""
    words = " ".join(f"{row['instruction']} {row['output']}" for row in json.loads(words_of.read_text())).split()
    chance = random.Random(0)
    with target.open("w", encoding="utf-8") as file:
        for _ in range(count):
            asked, said = (" ".join(chance.choices(words, k=chance.randint(5, longest))) for longest in (20, 40))
            file.write(json.dumps({"instruction": asked, "output": said}) + "\n")


def memory_mib(name: str) -> float:
    """Of this process: VmRSS, its whole resident set; RssAnon, what of it is not a file's."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) / 1024


@contextmanager
def peaks() -> Iterator[dict[str, float]]:
    """The most that either has grown to meanwhile, looked at fifty times a second."""
    names = ("VmRSS", "RssAnon")
    before = {name: memory_mib(name) for name in names}
    highest, is_over = dict(before), threading.Event()
    grown: dict[str, float] = {}

    def look() -> None:
        while not is_over.wait(0.02):
            for name in names:
                highest[name] = max(highest[name], memory_mib(name))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield grown
    finally:
        is_over.set()
        watcher.join()
        grown |= {name: highest[name] - before[name] for name in names}


def rows_child(args: argparse.Namespace) -> dict[str, Any]:
    """What `etude train` does with its rows, beside a model that is loaded."""
    from etude.cli.kept_rows import KeptRows
    from etude.cli.recipe import Recipe
    from etude.cli.rows import encode_sets, read_sets
    from etude.data import CausalLMCollator
    from etude.data.loader import TrainingStream, build_loader
    from etude.data.order import EpochBatches, EpochSampler
    from etude.model.load import load_base_model

    model, tokenizer = load_base_model(args.model, dtype="bfloat16")
    options: dict[str, Any] = {
        "max_length": LENGTH,
        "train_on": "completion",
        "on_bad_row": "stop",
        "template": "plain",
    }
    chosen = Recipe(model=str(args.model), data=str(args.data))
    seconds = {}
    with peaks() as grown:
        started = time.perf_counter()
        kept = KeptRows(chosen)
        is_warm = kept.are_likely()
        rows = kept.load(tokenizer, options)
        if rows is None:
            sets = read_sets(chosen)
            seconds["read"] = time.perf_counter() - started
            rows = encode_sets(chosen, *sets, tokenizer, **options)
            seconds["tokenized"] = time.perf_counter() - started
            kept.store(rows, tokenizer, options, seconds["tokenized"])
        seconds["there"] = time.perf_counter() - started
        sampler = EpochSampler(len(rows.train), strategy="random", seed=0)
        loader = build_loader(rows.train, batches=EpochBatches(sampler, 16, False), batch_size=16,
                              collator=CausalLMCollator(tokenizer), seed=0)  # fmt: skip
        stream = TrainingStream(loader, 0)
        stream.open(0)
        started = time.perf_counter()
        for _ in range(BATCHES_DRAWN):
            stream.next()
        seconds["a batch of 16"] = (time.perf_counter() - started) / BATCHES_DRAWN
    statistics_ = rows.train.statistics
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    return {"is_warm": is_warm, "seconds": seconds, "peak_mib_above_the_model": grown, "rows": statistics_.samples,
            "largest_worker_mib": workers,
            "tokens": statistics_.tokens, "parameters": model.num_parameters()}  # fmt: skip


def measure_rows(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        write_rows(args.data, file, args.num_rows)
        words = [*_python("rows"), "--model", str(args.model), "--data", str(file)]
        found = {name: run_child(words, folder) for name in ("cold", "warm")}
        found["file_mib"] = round(file.stat().st_size / 2**20)
    for name in ("cold", "warm"):
        print(name, json.dumps(found[name]), flush=True)
    return found


# -- going on in the middle ---------------------------------------------------------------------------------------------


class Numbers:
    """A million samples that cost nothing, so that what is timed is the way to one of them."""

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, index: int) -> int:
        return index

    def __getitems__(self, rows: list[int]) -> list[int]:
        return rows


def resume_child(args: argparse.Namespace) -> dict[str, Any]:
    """Seconds from `train()` to its first step: from the start, and from the checkpoint that this leaves."""
    import torch

    from etude import Trainer, TrainerCallback, TrainingArguments

    class Line(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"loss": (self.weight - x.mean() / NUM_ROWS).square().mean()}

    class Clock(TrainerCallback):
        begins: float | None = None

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begins = self.begins or time.perf_counter()

    def collate(rows: list[int]) -> dict[str, torch.Tensor]:
        return {"x": torch.tensor(rows, dtype=torch.float32)}

    def seconds(output: Path, resume: Any, last: int) -> float:
        settings = TrainingArguments(output_dir=str(output), per_device_train_batch_size=RESUME_BATCH, max_steps=last,
                                     save_steps=RESUME_STEP, use_cpu=True, report_to="none", disable_tqdm=True,
                                     logging_steps=100, remove_unused_columns=False, log_level="error")  # fmt: skip
        clock = Clock()
        trainer = Trainer(
            model=Line(), args=settings, train_dataset=Numbers(), data_collator=collate, callbacks=[clock]
        )
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=resume)
        assert clock.begins is not None
        return clock.begins - started

    run = args.data / "run"
    fresh = [seconds(args.data / f"fresh-{number}", None, 1) for number in range(3)]
    seconds(run, None, RESUME_STEP)
    resumed = [seconds(run, str(run / f"checkpoint-{RESUME_STEP}"), RESUME_STEP + 1) for number in range(3)]
    return {"start_seconds": fresh, "resume_seconds": resumed, "rows_passed_over": RESUME_BATCH * RESUME_STEP,
            "extra_seconds": statistics.median(resumed) - statistics.median(fresh)}  # fmt: skip


def measure_resume(args: argparse.Namespace) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        found = run_child([*_python("resume"), "--data", folder], folder)
    print(json.dumps(found), flush=True)
    return found


# -- both sides ---------------------------------------------------------------------------------------------------------


def run_child(words: list[str], cache: str) -> dict[str, Any]:
    environment = os.environ | {"ETUDE_CACHE": str(Path(cache) / "cache"), "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(words, env=environment, capture_output=True, text=True)
    line = next((line for line in finished.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"{' '.join(words)} failed:\n{finished.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(line.removeprefix("RESULT "))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of a base model")
    parser.add_argument("--data", type=Path, help="JSON list of instruction/input/output rows")
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-step", action="store_true", help="end each run where its first step begins")
    parser.add_argument("--num-rows", type=int, default=NUM_ROWS)
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--child", nargs="+", default=None, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, *rest = args.child
        if what == "script":
            script(rest[0], args)
        else:
            print("RESULT " + json.dumps({"rows": rows_child, "resume": resume_child}[what](args)))
        return
    if args.model is None or args.data is None:
        parser.error("--model and --data are needed")
    measures: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
        "first-step": measure_first_step,
        "rows": measure_rows,
        "resume": measure_resume,
    }
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft", "datasets")},
    }
    for part in args.part:
        report[part] = measures[part](args)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
