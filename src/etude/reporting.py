"""After training: the report and the model card of a trainer's run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from etude.checkpoint.store import CheckpointStore
from etude.errors import ConfigError, EtudeError, Interrupted
from etude.model.loss import unwrapped
from etude.observe import run_log
from etude.observe.amounts import of_bytes, of_seconds, of_share
from etude.observe.concerns import concerns_of
from etude.observe.machine import device_name, peak_memory_bytes, versions
from etude.observe.model_card import Card, write_card
from etude.observe.report import REPORT_NAME, SECRET_NAME, Ending, Report, ShownSample, write
from etude.observe.start_screen import RunSummary, rows
from etude.recovery import RECORDED_SETTINGS
from etude.summary import describe

if TYPE_CHECKING:
    from etude.trainer import Trainer

USUAL = (
    "packed path:",
    "general path:",
    "trains ",
    "compiles ",
    "a token takes",
    "loaded the best",
    "warning: ",
    "samples are",
)
"""Notices that report nothing out of the ordinary; warnings have a place of their own."""
FOLDERS = ("output", "output_dir", "logging_dir", "data", "eval_data")
"""Settings that mean something on this machine only; a card travels."""
ONLY_BEFORE = ("memory", "disk", "time")
"""Rows of the start screen that are estimates."""


def write_report(
    trainer: Trainer,
    samples: Sequence[ShownSample] = (),
    settings: Mapping[str, Any] | None = None,
    error: BaseException | None = None,
    command: str | None = None,
) -> Path:
    """Write `report.html` and `loss.png` of a finished, stopped or failed run into its output folder.

    Args:
        samples: replies before and after training, to be shown side by side.
        settings: what to show as the settings; by default all training arguments.
        error: what `train()` raised, where it did; the page then says so and how to go on.
        command: what is typed to go on; by default the call in Python.

    Returns:
        The path of `report.html`. Secrets among arguments and environment variables are never in it.

    Raises:
        ConfigError: the trainer has not trained.
    """
    summary = _summary_of(trainer)
    folder = Path(str(trainer.args.output_dir))
    checkpoint = _newest_checkpoint(folder) if error is not None else None
    report = Report(
        title=f"{_short(summary.model_name)}, {'fine-tuned' if error is None else _outcome(error)}",
        subtitle=_subtitle(trainer, summary),
        figures=_figures(trainer),
        log_history=trainer.state.log_history,
        happened=_happened(trainer, folder),
        concerns=concerns_of(summary, of_a_script=True),
        run=[(label, lines) for label, lines in rows(summary) if label not in ONLY_BEFORE],
        settings=trainer.args.to_dict() if settings is None else settings,
        environment=_environment(trainer),
        usage=usage(trainer, checkpoint) if error is None or checkpoint else [],
        samples=samples,
        skipped_rows=[str(error) for error in getattr(trainer.train_dataset, "rejected", ())],
        ending=_ending(error, checkpoint, command) if error is not None else None,
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
    travelling = replace(summary, train=replace(summary.train, source=""))
    shown = ("adapter", "train", "eval", "batch", "steps", "schedule", "precision")
    card = Card(
        base_model=_short(summary.model_name) if Path(summary.model_name).is_absolute() else summary.model_name,
        pipeline_tag="text-generation" if summary.model_class.endswith("ForCausalLM") else None,
        folder=folder.resolve().name,
        adapter=summary.adapter.kind if summary.adapter else "full-weight",
        method=summary.adapter.kind if summary.adapter else "full",
        facts=[(label, lines) for label, lines in rows(travelling) if label in shown],
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


def _newest_checkpoint(folder: Path) -> str | None:
    checkpoint, _ = CheckpointStore(folder).newest_valid()
    return str(checkpoint.path) if checkpoint is not None else None


def _outcome(error: BaseException) -> str:
    return "stopped" if isinstance(error, (Interrupted, KeyboardInterrupt)) else "failed"


def _ending(error: BaseException, checkpoint: str | None, command: str | None) -> Ending:
    """What ended the run, and what is to be done."""
    if isinstance(error, Interrupted):
        what = str(error).partition(":")[0]
    elif isinstance(error, KeyboardInterrupt):
        what = "left at once, at a second Ctrl-C"
    else:
        what = f"failed: {error if isinstance(error, EtudeError) else f'{type(error).__name__}: {error}'}"
    again = command or f"trainer.train(resume_from_checkpoint={'True' if checkpoint else 'False'})"
    first = "" if _outcome(error) == "stopped" else "Set right what the message names. "
    if checkpoint is None:
        return Ending(what, (f"{first}No checkpoint was written yet, so this starts from the beginning:", again))
    return Ending(what, (f"{first}This goes on from {Path(checkpoint).name} as if nothing had happened:", again))


def _short(model_name: str) -> str:
    return Path(model_name).name or model_name


def _subtitle(trainer: Trainer, summary: RunSummary) -> str:
    state = trainer.state
    done = state.global_step >= state.max_steps
    progress = (
        f"{state.global_step:,} updates"
        if done
        else f"ended after {state.global_step:,} of {state.max_steps:,} updates"
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
    if (waiting := trainer.throughput.mean_waiting_for_data) is not None:
        found.append(("waiting for data", of_share(waiting)))
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
