"""etude beside the installed peers on one GPU: tokens per second, peak memory, loss, for one work after another.

    python -m benchmarks.gpu --work llama-1b-8x1024 llama-1b-ragged --contender etude transformers --rounds 2

Contenders take turns (A B A B ...) on the same rows and the same initial weights. The first steps are left out. The
share of the ceiling is of the bf16 matrix products a step cannot do without, at the rate this card reaches now.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import platform
import pstats
import statistics
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import WORKS, Work, collate, rows_of

CONTENDERS = (
    "etude",
    "etude-eager",
    "etude-nographs",
    "etude-graphs",
    "etude-general",
    "etude-fp8",
    "etude-nf4",
    "transformers",
    "transformers-gc",
    "transformers-nf4",
    "liger",
)


PEER_WARMUP, PEER_STEPS = 4, 8
"""The peers have nothing to warm up but the allocator."""


class Clock:
    """A callback that times the steps after the warm-up, on a synchronised device."""

    def __init__(self, warmup: int, steps: int) -> None:
        self.last = warmup + steps
        self.warmup, self.started, self.stopped, self.first_step = warmup, 0.0, 0.0, 0.0
        self.built = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in (1, self.warmup, self.last):
            torch.cuda.synchronize()
            now = time.perf_counter()
            if state.global_step == 1:
                self.first_step = now - self.built
            if state.global_step == self.warmup:
                self.started = now
            self.stopped = now


class Profile:
    """A callback that profiles the steps after the timed ones and prints where the GPU's and Python's time goes."""

    def __init__(self, first_step: int, name: str) -> None:
        self.first_step, self.name = first_step, name
        self.python = cProfile.Profile()
        self.profiler = torch.profiler.profile(activities=list(torch.profiler.supported_activities()))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.first_step:
            torch.cuda.synchronize()
            self.profiler.start()
            self.python.enable()
            self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == state.max_steps:
            torch.cuda.synchronize()
            seconds, steps = time.perf_counter() - self.started, state.max_steps - self.first_step
            self.python.disable()
            self.profiler.stop()
            kernels = [e for e in self.profiler.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
            total = sum(e.self_device_time_total for e in kernels)
            print(
                f"-- {self.name}: {1000 * seconds / steps:.2f} ms a step, GPU busy {total / 1000 / steps:.2f} ms, {sum(e.count for e in kernels) // steps} kernels"
            )
            for e in sorted(kernels, key=lambda e: -e.self_device_time_total)[:PROFILE_LINES]:
                print(f"   {e.self_device_time_total / 1000 / steps:8.3f} ms {e.count // steps:5} x {e.key[:110]}")
            pstats.Stats(self.python).sort_stats("tottime").print_stats(PROFILE_LINES)


PROFILE_STEPS, PROFILE_LINES = 3, 28


def build_model(work: Work, r: int, liger: bool = False, nf4: bool = False) -> Any:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(work.config(), dtype=torch.bfloat16)
    if liger:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model=model)
    if nf4:
        quantise(model)
    return get_peft_model(model, LoraConfig(r=r, lora_alpha=r, target_modules="all-linear", task_type="CAUSAL_LM"))


def quantise(model: Any) -> None:
    """Replace the linear layers, but the head, by NF4 ones with nested scales, one after the other."""
    import bitsandbytes

    options = {"quant_type": "nf4", "compress_statistics": True}
    for path, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and module is not model.get_output_embeddings():
            sizes = (module.in_features, module.out_features, module.bias is not None)
            made = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.bfloat16, device="meta", **options)
            weight = module.weight.data.cpu()  # it is quantised on its way to the GPU
            made.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **options).to("cuda")
            made.bias = module.bias
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made)
            module.weight = None
    model.is_loaded_in_4bit = True


def run_once(name: str, work: Work, rows: list[Any], args: argparse.Namespace) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    from transformers import TrainerCallback

    model = build_model(work, args.r, liger=name == "liger", nf4=name.endswith("-nf4"))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()  # of training, not of a model that is made in full and then quantised
    warmup, steps = (args.warmup, args.steps) if name.startswith("etude") else (PEER_WARMUP, PEER_STEPS)
    settings: dict[str, Any] = {
        "output_dir": "/tmp/etude-benchmark",
        "per_device_train_batch_size": work.samples,
        "max_steps": warmup + steps + (PROFILE_STEPS if args.profile else 0),
        "learning_rate": 1e-4,
        "bf16": True,
        "logging_steps": warmup + steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
        "gradient_checkpointing": name.endswith("-gc"),
    }
    clock_type = type("ClockCallback", (Clock, TrainerCallback), {})
    callbacks = [clock := clock_type(warmup, steps)]
    if args.profile:
        callbacks.append(type("ProfileCallback", (Profile, TrainerCallback), {})(warmup + steps, name))
    if name.startswith("etude"):
        from etude import Trainer, TrainingArguments

        settings["fast_path"] = name != "etude-general"
        settings["base_precision"] = "fp8" if name == "etude-fp8" else None
        settings["torch_compile"] = name in ("etude", "etude-nographs")
        if name in ("etude-eager", "etude-nographs"):
            settings["cuda_graphs"] = False
        if args.deterministic:
            settings["deterministic"] = True
        settings["gpu_memory_limit_gib"] = args.limit_gib
    else:
        from transformers import Trainer, TrainingArguments
    trainer = Trainer(
        model=model, args=TrainingArguments(**settings), train_dataset=rows, data_collator=collate, callbacks=callbacks
    )
    output = trainer.train()
    tokens = sum(len(row["input_ids"]) for row in rows[work.samples * warmup : work.samples * (warmup + steps)])
    seconds = clock.stopped - clock.started
    result = {
        "contender": name,
        "tokens_per_second": tokens / seconds,
        "milliseconds_per_step": 1000 * seconds / steps,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "seconds_to_first_step": clock.first_step,
        "loss": output.training_loss,
    }
    del trainer, model
    return result


def gemm_rate() -> float:
    """bf16 FLOP/s of an 8192^3 product on this card, now."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for _ in range(3):
        a @ b
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(10):
        a @ b
    torch.cuda.synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - started)


def ceiling(work: Work, rate: float) -> float:
    """Tokens per second if only the frozen matrix products were done: 4 FLOP per weight and token."""
    config = work.config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.hidden_size * head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    per_layer = attention + 3 * config.hidden_size * config.intermediate_size
    return rate / (4 * (config.num_hidden_layers * per_layer + config.hidden_size * config.vocab_size))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=list(WORKS), choices=list(WORKS))
    parser.add_argument("--contender", nargs="+", default=["etude", "transformers"], choices=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--deterministic", action="store_true")
    parser.add_argument("--limit-gib", type=float, default=None, help="GPU memory that etude is told to stay within")
    parser.add_argument("--profile", action="store_true", help="print where the GPU's time goes, in steps of their own")
    parser.add_argument("--json", type=Path, default=None)
    args = parser.parse_args()
    rate = gemm_rate()
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "gemm_tflops": rate / 1e12,
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        "settings": {key: value for key, value in vars(args).items() if key != "json"},
        "results": {},
    }
    lines = []
    for name in args.work:
        work = WORKS[name]
        rows = rows_of(
            work, max(args.warmup + args.steps, PEER_WARMUP + PEER_STEPS) + PROFILE_STEPS, work.config().vocab_size
        )
        runs: dict[str, list[dict[str, Any]]] = {contender: [] for contender in args.contender}
        for _ in range(args.rounds):
            for contender in args.contender:
                try:
                    runs[contender].append(run_once(contender, work, rows, args))
                except (torch.OutOfMemoryError, ImportError, RuntimeError) as error:
                    runs[contender].append({"contender": contender, "error": f"{type(error).__name__}: {error}"[:300]})
        report["results"][name] = runs
        for contender, results in runs.items():
            good = [result for result in results if "error" not in result]
            if not good:
                lines.append(f"{name:20} {contender:16} {results[0]['error'][:90]}")
                continue
            speed = statistics.median(result["tokens_per_second"] for result in good)
            share = speed / ceiling(work, rate)
            peak = max(result["peak_gib"] for result in good)
            first = good[0]["seconds_to_first_step"]
            lines.append(
                f"{name:20} {contender:16} {speed:10,.0f} tok/s  {share:5.0%} of ceiling  {peak:6.1f} GiB  "
                f"first step {first:5.1f} s  loss {good[-1]['loss']:.5f}"
            )
            print(lines[-1], flush=True)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1, default=str))
    print(f"\n{report['device']}, {report['date']}, GEMM {rate / 1e12:.0f} TFLOP/s, {report['versions']}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
