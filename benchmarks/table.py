"""What the runs of one call add up to: a Markdown table, medians and ranges."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from benchmarks.shapes import WORKS, Work

HEAD = ("work", "contender", "tokens/s", "of ceiling", "GiB", "first step, s", "full speed, s", "loss")
CHECK_HEAD = ("work", "contender", "rows", "gradient", "worst tensor", "loss", "to float32: etude, stock", "fine")


def ceiling(work: Work, rate: float) -> float:
    """Tokens per second if only the frozen matrix products were done: 4 FLOP per weight and token."""
    config = work.config()
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = config.hidden_size * head_dim * (2 * config.num_attention_heads + 2 * config.num_key_value_heads)
    gated = 3 * config.hidden_size * config.intermediate_size
    if getattr(config, "num_experts_per_tok", None):
        gated = 3 * config.hidden_size * config.moe_intermediate_size * config.num_experts_per_tok
        gated += config.hidden_size * config.num_experts
    layers = config.num_hidden_layers * (attention + gated)
    return rate / (4 * (layers + config.hidden_size * config.vocab_size))


def markdown(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    lines = [
        f"# {report['device'] or 'No device'}, {report['date']}",
        "",
        f"    {report['command']}",
        "",
        f"Python {report['python']}, {versions}.",
    ]
    if report["gemm_tflops"]:
        lines.append(f"A large product reached {report['gemm_tflops']:,.3g} TFLOP/s.")
    lines += [
        "Medians, and the range where there are several rounds. Tokens are real ones. The times begin where the trainer is",
        "built; full speed is the end of the first step at 95% of the median rate. Losses are means of the same first",
        "steps, but for those with a star, which pack other rows into a step.",
        "",
        *rows(HEAD, [line for work in report["results"] for line in measured_of(report, work)]),
    ]
    checks = [line for work in report["results"] for line in checks_of(report, work)]
    if checks:
        lines += ["", "Relative errors of one step beside stock `peft`, from the adapters as trained:", ""]
        lines += rows(CHECK_HEAD, checks)
    for title, entries in (
        ("Not installed", report["not_installed"]),
        ("Left out for want of time", report["left_out"]),
    ):
        if entries:
            lines += ["", f"{title}: {', '.join(entries)}."]
    return "\n".join(lines) + "\n"


def rows(head: tuple[str, ...], cells: list[tuple[str, ...]]) -> list[str]:
    marks = "|".join("---" if i < 2 else "---:" for i in range(len(head)))
    return [f"| {' | '.join(line)} |" for line in (head,)] + [f"|{marks}|"] + [f"| {' | '.join(c)} |" for c in cells]


def measured_of(report: dict[str, Any], work: str) -> list[tuple[str, ...]]:
    lines = []
    for contender, runs in report["results"][work].items():
        good = [run for run in runs if "error" not in run]
        if not good:
            lines.append(
                (work, contender, *("" for _ in HEAD[3:]), runs[-1]["error"].replace("|", "/").replace("\n", " ")[:90])
            )
            continue

        def column(name: str, form: Callable[[float], str], good: list[dict[str, Any]] = good) -> str:
            return middle([run[name] for run in good], form)

        speed, rate = statistics.median(run["tokens_per_second"] for run in good), report["gemm_tflops"]
        share = f"{speed / ceiling(WORKS[work], rate * 1e12):.0%}" if rate else ""
        star = "" if good[-1]["loss_is_of_the_same_rows"] else "*"
        lines.append(
            (
                work,
                contender,
                column("tokens_per_second", "{:,.0f}".format),
                share,
                column("peak_gib", "{:.1f}".format),
                column("seconds_to_first_step", "{:.1f}".format),
                column("seconds_to_full_speed", "{:.1f}".format),
                f"{good[-1]['loss']:.4f}{star}",
            )
        )
    return lines


def middle(values: list[float], form: Callable[[float], str]) -> str:
    """The median, and the range where the values differ as they are written."""
    least, most = form(min(values)), form(max(values))
    return form(statistics.median(values)) + (f" ({least} to {most})" if least != most else "")


def checks_of(report: dict[str, Any], work: str) -> list[tuple[str, ...]]:
    lines = []
    for contender, runs in report["results"][work].items():
        for check in (run["check"] for run in runs if "check" in run):
            if "error" in check:
                lines.append((work, contender, *("" for _ in CHECK_HEAD[3:]), check["error"][:90]))
                continue
            to_truth = check["errors_against_float32"]
            lines.append(
                (
                    work,
                    contender,
                    str(check["rows"]),
                    f"{check['gradient_error']:.1e}",
                    f"{check['largest_tensor_error']:.1e}",
                    f"{check['loss_error']:.1e}",
                    f"{to_truth['etude']:.1e}, {to_truth['stock']:.1e}" if to_truth else "",
                    "yes" if check["is_fine"] else "no",
                )
            )
    return lines
