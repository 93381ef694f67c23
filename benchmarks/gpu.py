"""etude beside the installed peers on one GPU: tokens per second, peak memory, loss, for one work after another.

    python -m benchmarks.gpu --work llama-1b-8x1024 llama-1b-ragged --contender etude transformers --rounds 2 --output gpu

Contenders take turns (A B A B ...), each in a process of its own, on the same rows and the same initial weights. The
first steps are left out. The share of the ceiling is of the bf16 matrix products a step cannot do without, at the rate
this card reaches now. `--output gpu` writes gpu.json and gpu.md anew whenever a work is done.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.contenders import PEER_ENVIRONMENT, contender_of
from benchmarks.shapes import MEASURED, WORKS
from benchmarks.table import markdown

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "liger-kernel", "trl", "datasets", "unsloth")
SECONDS_BETWEEN_LOOKS = 0.2


def contender_name(spelling: str) -> str:
    try:
        contender_of(spelling)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return spelling


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", nargs="+", default=list(MEASURED), choices=list(WORKS))
    parser.add_argument(
        "--contender", nargs="+", default=["etude", "transformers"], type=contender_name,
        help="names in benchmarks/contenders.py; etude@20 is told to stay within 20 GiB",
    )  # fmt: skip
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=None, help="timed steps (the work's own; of the peers 8 at most)")
    parser.add_argument("--warmup", type=int, default=None, help="steps before those (of the peers 4 at most)")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--deterministic", action="store_true", help="every etude with deterministic=True")
    parser.add_argument("--limit-gib", type=float, default=None, help="GPU memory that etude is told to stay within")
    parser.add_argument("--profile", action="store_true", help="print where the GPU's time goes, in steps of their own")
    parser.add_argument("--check", action="store_true", help="compare etude's gradients with stock peft's, in round 1")
    parser.add_argument("--together", action="store_true", help="all works of a contender in one process: fewer starts")
    parser.add_argument("--budget-seconds", type=float, default=None, help="nothing is started after so long")
    parser.add_argument("--work-seconds", type=float, default=240, help="a process may take so long for a work")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to try out the benchmark")
    parser.add_argument("--output", type=Path, default=None, help="writes OUTPUT.json and OUTPUT.md")
    return parser.parse_args(words)


def processes_of(args: argparse.Namespace, contenders: list[str]) -> list[dict[str, Any]]:
    """What each process is asked for, in the order in which they run."""
    groups = [args.work] if args.together else [[work] for work in args.work]
    common = {
        name: getattr(args, name)
        for name in ("steps", "warmup", "r", "deterministic", "limit_gib", "profile", "device")
    }
    return [
        common | {"contender": contender, "works": works, "round": i + 1, "check": args.check and i == 0}
        for i in range(args.rounds)
        for works in groups
        for contender in contenders
    ]


def is_installed(spelling: str) -> bool:
    return all(importlib.util.find_spec(module) for module in contender_of(spelling)[0].needs)


def versions() -> dict[str, str]:
    from etude import __version__

    found = {"etude": __version__}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class Report:
    """What is known so far, and its files."""

    def __init__(self, args: argparse.Namespace, command: str, not_installed: list[str]) -> None:
        self.output, self.rates = args.output, list[float]()
        self.content: dict[str, Any] = {
            "date": date.today().isoformat(),
            "device": None,
            "gemm_tflops": None,
            "python": platform.python_version(),
            "versions": versions(),
            "command": command,
            "settings": {name: value for name, value in vars(args).items() if name != "output"},
            "not_installed": not_installed,
            "left_out": [],
            "results": {},
        }

    def add(self, result: dict[str, Any]) -> None:
        if result.get("gemm_flops"):
            self.rates.append(result["gemm_flops"])
            self.content["gemm_tflops"] = statistics.median(self.rates) / 1e12
        self.content["device"] = result.get("device") or self.content["device"]
        runs = self.content["results"].setdefault(result["work"], {})
        runs.setdefault(result["contender"], []).append(result)
        if "error" in result:
            outcome = result["error"]
        else:
            outcome = (
                f"{result['tokens_per_second']:10,.0f} tok/s  {result['peak_gib']:6.1f} GiB  first step "
                f"{result['seconds_to_first_step']:5.1f} s  full speed {result['seconds_to_full_speed']:5.1f} s  "
                f"loss {result['loss']:.5f}"
            )
        print(f"{result['work']:20} {result['contender']:20} {outcome}", flush=True)
        self.write()

    def leave_out(self, asked: dict[str, Any], works: list[str]) -> None:
        self.content["left_out"] += [f"{asked['contender']} on {work} (round {asked['round']})" for work in works]
        self.write()

    def write(self) -> None:
        if self.output is None:
            return
        stem = str(self.output).removesuffix(".json").removesuffix(".md")
        Path(stem).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{stem}.json").write_text(json.dumps(self.content, indent=1) + "\n")
        Path(f"{stem}.md").write_text(markdown(self.content))


def run_process(asked: dict[str, Any], stop_at: float | None, work_seconds: float, report: Report) -> None:
    """Run one process to its end and take over each result as soon as it is there."""
    with tempfile.TemporaryDirectory(prefix="etude-benchmark-") as folder:
        lines, log = Path(folder) / "lines", Path(folder) / "log"
        lines.touch()
        words = json.dumps(asked | {"lines": str(lines), "stop_at": stop_at})
        paths = [str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | PEER_ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(paths)}
        environment["UNSLOTH_COMPILE_LOCATION"] = str(Path(folder) / "unsloth")
        done = 0
        with log.open("w") as output:
            command = [sys.executable, "-m", "benchmarks.timed_run", words]
            process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
            limit = time.monotonic() + work_seconds * len(asked["works"])
            try:
                while True:
                    is_over = process.poll() is not None
                    complete = [line for line in lines.read_text().splitlines(keepends=True) if line.endswith("\n")]
                    for line in complete[done:]:
                        report.add(json.loads(line) | {"round": asked["round"]})
                    done = len(complete)
                    if is_over or time.monotonic() > limit:
                        break
                    time.sleep(SECONDS_BETWEEN_LOOKS)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()
        said = log.read_text(errors="replace")
        if asked["profile"]:
            print(said)
        missing = asked["works"][done:]
        if not missing:
            return
        if process.returncode == 0:  # it stopped between two works because time was up
            report.leave_out(asked, missing)
            return
        print(said[-3000:], flush=True)
        is_late = time.monotonic() > limit
        error = f"took more than {work_seconds:.0f} s" if is_late else f"the process ended with {process.returncode}"
        report.add({"work": missing[0], "contender": asked["contender"], "round": asked["round"], "error": error})
        report.leave_out(asked, missing[1:])


def main(words: list[str] | None = None) -> None:
    args = parse(words)
    started = time.time()
    stop_at = None if args.budget_seconds is None else started + args.budget_seconds
    missing = [name for name in args.contender if not is_installed(name)]
    command = shlex.join(["python", "-m", "benchmarks.gpu", *(sys.argv[1:] if words is None else words)])
    report = Report(args, command, missing)
    for asked in processes_of(args, [name for name in args.contender if name not in missing]):
        if stop_at is not None and time.time() > stop_at:
            report.leave_out(asked, asked["works"])
        else:
            run_process(asked, stop_at, args.work_seconds, report)
    report.write()
    print("\n" + markdown(report.content))


if __name__ == "__main__":
    main()
