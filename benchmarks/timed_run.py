"""One contender on one work after another, in a process of its own that `benchmarks.gpu` starts; a JSON line for each."""

from __future__ import annotations

import cProfile
import gc
import json
import pstats
import resource
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import Contender, build_model, build_trainer, contender_of
from benchmarks.shapes import WORKS, Work, rows_of

PEER_WARMUP, PEER_STEPS = 4, 8
"""The peers have nothing to warm up but the allocator."""

FULL_SPEED = 0.95
"""Share of the median rate from which a step counts as one at full speed."""

PROFILE_STEPS, PROFILE_LINES = 3, 28


class Clock:
    """A callback that knows when the device had finished each step, without making anything wait."""

    def __init__(self, warmup: int, steps: int, device: str) -> None:
        self.last, self.device = warmup + steps, device
        synchronize(device)
        self.marks = [self._now()]
        """When the trainer was about to be built, and the end of each step."""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step <= self.last:
            self.marks.append(self._now())

    def _now(self) -> Any:
        if self.device == "cpu":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, first: int, last: int) -> float:
        """From the end of one step to that of another; step 0 is the beginning."""
        if self.device == "cpu":
            return self.marks[last] - self.marks[first]
        return self.marks[first].elapsed_time(self.marks[last]) / 1000


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


def steps_of(work: Work, is_etude: bool, asked: dict[str, Any]) -> tuple[int, int]:
    """Steps before the timed ones, and timed ones."""
    warmup = work.warmup if asked["warmup"] is None else asked["warmup"]
    steps = work.steps if asked["steps"] is None else asked["steps"]
    return (warmup, steps) if is_etude else (min(warmup, PEER_WARMUP), min(steps, PEER_STEPS))


def run_once(name: str, work: Work, asked: dict[str, Any]) -> dict[str, Any]:
    contender, limit_gib = contender_of(name)
    device, is_etude = asked["device"], contender.trainer == "etude"
    if contender.trainer == "unsloth":
        import unsloth  # noqa: F401  (it changes modules of the others, and wants to come first)
    from transformers import TrainerCallback

    model = build_model(contender, work, asked["r"], device)
    free_memory(device)
    reset_peak(device)  # of training, not of a model that is made in full and then quantised
    warmup, steps = steps_of(work, is_etude, asked)
    compared_steps = min(sum(steps_of(work, one, asked)) for one in (True, False))
    most_steps = max(sum(steps_of(work, one, asked)) for one in (True, False)) + PROFILE_STEPS
    rows = rows_of(work, most_steps, work.config().vocab_size)
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="etude-benchmark-"),
        "per_device_train_batch_size": work.samples,
        "max_steps": warmup + steps + (PROFILE_STEPS if asked["profile"] else 0),
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "bf16": device == "cuda",
        "use_cpu": device == "cpu",
        "logging_steps": compared_steps,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "train_sampling_strategy": "sequential",
    }
    if is_etude:
        settings["gpu_memory_limit_gib"] = limit_gib if limit_gib is not None else asked["limit_gib"]
        if asked["deterministic"]:
            settings["deterministic"] = True
    clock = type("ClockCallback", (Clock, TrainerCallback), {})(warmup, steps, device)
    callbacks = [clock]
    if asked["profile"]:
        callbacks.append(type("ProfileCallback", (Profile, TrainerCallback), {})(warmup + steps, name))
    trainer = build_trainer(contender, work, model, rows, settings, callbacks)
    del model
    trainer.train()
    synchronize(device)
    if contender.packs:
        tokens = trainer.data_collator.tokens[: warmup + steps]
    else:
        lengths = [len(row["input_ids"]) for row in rows]
        tokens = [sum(lengths[work.samples * i : work.samples * (i + 1)]) for i in range(warmup + steps)]
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    result = figures(clock, tokens, warmup, steps) | {
        "contender": name,
        "peak_gib": peak_gib(device),
        "loss": losses[0],
        "loss_steps": compared_steps,
        "loss_is_of_the_same_rows": not contender.packs,
        "path": getattr(getattr(trainer, "path", None), "name", None),
    }
    if asked["check"] and is_etude:
        trainer_model, trainer = trainer.model, None
        free_memory(device)
        try:
            result["check"] = check(contender, work, trainer_model, rows, settings, device)
        except Exception as error:
            traceback.print_exc()
            result["check"] = {"error": f"{type(error).__name__}: {error}"[:300]}
    return result


def figures(clock: Clock, tokens: list[int], warmup: int, steps: int) -> dict[str, Any]:
    """The rate of the timed steps, and when the first step ended and the first one at that rate."""
    total = warmup + steps
    rates = [tokens[i] / clock.seconds(i, i + 1) for i in range(total)]
    full = FULL_SPEED * statistics.median(rates[warmup:])
    at_full_speed = next(i for i, rate in enumerate(rates) if rate >= full)
    seconds = clock.seconds(warmup, total)
    return {
        "tokens_per_second": sum(tokens[warmup:total]) / seconds,
        "milliseconds_per_step": 1000 * seconds / steps,
        "steps": steps,
        "warmup": warmup,
        "seconds_to_first_step": clock.seconds(0, 1),
        "seconds_to_full_speed": clock.seconds(0, at_full_speed + 1),
        "steps_to_full_speed": at_full_speed + 1,
    }


def check(
    contender: Contender, work: Work, model: Any, rows: list[Any], settings: dict[str, Any], device: str
) -> dict[str, Any]:
    """One step beside stock peft, from the adapters as trained; of fewer rows where stock peft runs out of memory."""
    from etude.errors import is_out_of_memory

    samples = work.samples
    while True:
        trainer = build_trainer(
            contender, work, model, rows, settings | {"per_device_train_batch_size": samples}, callbacks=[]
        )
        try:
            found = trainer.check(reference_dtype="float32")
            break
        except (RuntimeError, MemoryError) as error:
            if samples == 1 or not is_out_of_memory(error):
                raise
        del trainer
        free_memory(device)
        samples //= 2
    worst = next((tensor for tensor in found.tensors if not tensor.is_rounding), None)
    return {
        "rows": samples,
        "path": found.path,
        "precision": found.precision,
        "loss": found.loss,
        "stock_loss": found.stock_loss,
        "loss_error": found.loss_error,
        "float32_loss": found.reference_loss,
        "gradient_error": found.gradient_error,
        "largest_tensor_error": found.max_error,
        "worst_tensor": worst and worst.name,
        "errors_against_float32": found.reference_errors
        and dict(zip(("etude", "stock"), found.reference_errors, strict=True)),
        "tolerance": found.tolerance,
        "is_fine": found.is_fine,
        "notes": list(found.notes),
    }


def gemm_rate(device: str) -> float:
    """FLOP/s of a large product on this device, now: bf16 and 8192^3 on a GPU."""
    size = 8192 if device == "cuda" else 256
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    synchronize(device)
    started = time.perf_counter()
    for _ in range(10):
        a @ b
    synchronize(device)
    return 10 * 2 * size**3 / (time.perf_counter() - started)


# -- the device -------------------------------------------------------------------------------------------------------


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def free_memory(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def reset_peak(device: str) -> None:
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def peak_gib(device: str) -> float:
    """Allocated by torch on a GPU; resident in the process on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    asked = json.loads(sys.argv[1])
    device = asked["device"]
    with Path(asked["lines"]).open("a") as lines:
        for name in asked["works"]:
            if asked["stop_at"] is not None and time.time() > asked["stop_at"]:
                break
            try:
                result = run_once(asked["contender"], WORKS[name], asked)
            except Exception as error:
                traceback.print_exc()
                text = f"{type(error).__name__}: {error}"[:300]
                traceback.clear_frames(error.__traceback__)  # they hold the model
                result = {"contender": asked["contender"], "error": text}
            free_memory(device)
            device_name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
            result |= {"work": name, "device": device_name, "gemm_flops": None}
            try:
                result["gemm_flops"] = gemm_rate(device)
            except RuntimeError:
                traceback.print_exc()
            lines.write(json.dumps(result) + "\n")
            lines.flush()
            free_memory(device)


if __name__ == "__main__":
    main()
