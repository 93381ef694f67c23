"""After training: the report and the model card of a trainer's run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude.errors import ConfigError
from etude.model.loss import unwrapped
from etude.observe import run_log
from etude.observe.amounts import of_bytes, of_seconds
from etude.observe.concerns import concerns_of
from etude.observe.machine import device_name, peak_memory_bytes, versions
from etude.observe.model_card import Card, write_card
from etude.observe.report import REPORT_NAME, SECRET_NAME, Report, ShownSample, write
from etude.observe.start_screen import RunSummary, rows
from etude.recovery import RECORDED_SETTINGS
from etude.summary import describe

if TYPE_CHECKING:
    from etude.trainer import Trainer

USUAL = ("packed path:", "general path:", "trains ", "compiles ", "a token takes", "loaded the best", "warning: ")
"""Notices that report nothing out of the ordinary; warnings have a place of their own."""
FOLDERS = ("output", "output_dir", "logging_dir", "data", "eval_data")
"""Settings that mean something on this machine only; a card travels."""
ONLY_BEFORE = ("memory", "disk", "time")
"""Rows of the start screen that are estimates."""


def write_report(
    trainer: Trainer, samples: Sequence[ShownSample] = (), settings: Mapping[str, Any] | None = None
) -> Path:
    """Write `report.html` and `loss.png` of a finished (or stopped) run into its output folder.

    Args:
        samples: replies before and after training, to be shown side by side.
        settings: what to show as the settings; by default all training arguments.

    Returns:
        The path of `report.html`. Secrets among arguments and environment variables are never in it.

    Raises:
        ConfigError: the trainer has not trained.
    """
    summary = _summary_of(trainer)
    folder = Path(str(trainer.args.output_dir))
    report = Report(
        title=f"{_short(summary.model_name)}, fine-tuned",
        subtitle=_subtitle(trainer, summary),
        figures=_figures(trainer),
        log_history=trainer.state.log_history,
        happened=_happened(trainer, folder),
        concerns=concerns_of(summary, of_a_script=True),
        run=[(label, lines) for label, lines in rows(summary) if label not in ONLY_BEFORE],
        settings=trainer.args.to_dict() if settings is None else settings,
        environment=_environment(trainer),
        usage=usage(trainer),
        samples=samples,
        skipped_rows=[str(error) for error in getattr(trainer.train_dataset, "rejected", ())],
    )
    for line in write(report, folder, _secrets(trainer)):
        trainer.notices.say(line)
    return folder / REPORT_NAME


def write_model_card(trainer: Trainer, settings: Mapping[str, Any] | None = None) -> Path:
    """Write `README.md` into the output folder: base model, data, settings and results in real numbers.

    Raises:
        ConfigError: the trainer has not trained.
    """
    summary = _summary_of(trainer)
    folder = Path(str(trainer.args.output_dir))
    arguments = trainer.args.to_dict()
    chosen = {name: arguments[name] for name in arguments if name in trainer.args.explicit or name in RECORDED_SETTINGS}
    shown = ("adapter", "train", "eval", "batch", "steps", "schedule", "precision")
    card = Card(
        base_model=summary.model_name,
        pipeline_tag="text-generation" if summary.model_class.endswith("ForCausalLM") else None,
        folder=folder.resolve().name,
        adapter=summary.adapter.kind if summary.adapter else "full-weight",
        method=summary.adapter.kind if summary.adapter else "full",
        facts=[(label, lines) for label, lines in rows(summary) if label in shown],
        results=_figures(trainer),
        settings={name: value for name, value in (settings or chosen).items() if name not in FOLDERS},
        environment=_environment(trainer),
        usage=usage(trainer, folder="."),
    )
    return write_card(card, folder, _secrets(trainer))


def usage(trainer: Trainer, folder: str | None = None) -> list[tuple[str, str]]:
    """(caption, code) of the ways to use the adapter that lies in `folder` (the output folder if not given)."""
    place = folder or str(trainer.args.output_dir)
    is_peft = hasattr(trainer.model, "peft_config")
    kind = "AutoPeftModelForCausalLM" if is_peft else "AutoModelForCausalLM"
    library = "peft" if is_peft else "transformers"
    ways = [("Talk to it:", f"etude chat {place}")] if is_peft else []
    if not type(unwrapped(trainer.model)).__name__.endswith("ForCausalLM"):
        return [
            (
                "Load it in Python:",
                f"from peft import AutoPeftModel\n\nmodel = AutoPeftModel.from_pretrained({place!r})",
            )
        ]
    code = (
        f"from {library} import {kind}\nfrom transformers import AutoTokenizer\n\n"
        f"model = {kind}.from_pretrained({place!r})\n"
        f"tokenizer = AutoTokenizer.from_pretrained({place!r})"
    )
    return [*ways, ("Load it in Python:", code)]


def _summary_of(trainer: Trainer) -> RunSummary:
    if trainer._run is None:
        raise ConfigError("nothing was trained yet; call train() first", field="trainer")
    return describe(trainer, trainer._run.plan)


def _short(model_name: str) -> str:
    return Path(model_name).name or model_name


def _subtitle(trainer: Trainer, summary: RunSummary) -> str:
    state = trainer.state
    done = state.global_step >= state.max_steps
    progress = (
        f"{state.global_step:,} updates" if done else f"stopped after {state.global_step:,} of {state.max_steps:,}"
    )
    kind = summary.adapter.kind if summary.adapter is not None else "full fine-tuning"
    return f"{kind}, {progress}, {summary.output_dir}"


def _figures(trainer: Trainer) -> list[tuple[str, str]]:
    """The results: losses, best evaluation, time, speed, memory."""
    history = trainer.state.log_history
    found: list[tuple[str, str]] = []

    def last(name: str) -> Any:
        return next((row[name] for row in reversed(history) if isinstance(row.get(name), (int, float))), None)

    if (loss := last("loss")) is not None:
        found.append(("last training loss", f"{loss:.4f}"))
    if (mean := last("train_loss")) is not None:
        found.append(("mean training loss", f"{mean:.4f}"))
    for name in sorted({name for row in history for name in row if name.startswith("eval") and name.endswith("loss")}):
        values = [row[name] for row in history if isinstance(row.get(name), (int, float))]
        found.append((f"last {name.replace('_', ' ')}", f"{values[-1]:.4f}"))
        found.append((f"best {name.replace('_', ' ')}", f"{min(values):.4f}"))
    if trainer.state.best_global_step:
        found.append(("best step", f"{trainer.state.best_global_step:,}"))
    if (seconds := last("train_runtime")) is not None:
        found.append(("training time", of_seconds(seconds)))
    if (speed := trainer.throughput.mean_tokens_per_second) is not None:
        found.append(("tokens per second", f"{speed:,.0f}"))
    if (peak := peak_memory_bytes(trainer.args.device)) is not None:
        found.append(("peak memory", of_bytes(peak)))
    return found


def _happened(trainer: Trainer, folder: Path) -> list[str]:
    """What was said during all starts of the run, where it was kept, without what is said in every run."""
    kept = run_log.read(folder)
    lines = kept or trainer.notices.lines
    said = [line.partition("  ")[2] if kept else line for line in lines]
    return [line for line, words in zip(lines, said, strict=True) if not _is_usual(words)]


def _is_usual(line: str) -> bool:
    return line.startswith(USUAL) or " steps of " in line.partition("samples (")[0]


def _environment(trainer: Trainer) -> dict[str, str]:
    return {"device": device_name(trainer.args.device), **versions()}


def _secrets(trainer: Trainer) -> list[str]:
    """The values of arguments whose names say that they are secret."""
    return [value for name, value in vars(trainer.args).items() if isinstance(value, str) and SECRET_NAME.search(name)]
