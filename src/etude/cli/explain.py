"""`etude explain KEY`: what a setting means, what it is where nobody says, and why."""

from __future__ import annotations

import textwrap
from typing import Annotated, Any, NamedTuple

import typer

from etude.errors import UnknownArgumentError

WIDTH = 80


class Reason(NamedTuple):
    """Why a default of the command line is what it is. `default` is said in words where it depends on something."""

    why: str
    source: str = ""
    default: str = ""
    unit: str = ""


_SCALE = "Schulman et al., LoRA Without Regret, Thinking Machines 2025; TRL's documentation"

REASONS: dict[str, Reason] = {
    "lora.r": Reason(
        "Enough room for data sets of up to some millions of learned tokens. An adapter with fewer parameters than the "
        "data has learned tokens starts to lose against full fine-tuning: then raise it.",
        f"{_SCALE}; Tinker's documentation",
        unit="columns of A and B",
    ),
    "lora.alpha": Reason(
        "Left alone at every rank. The update is scaled by alpha / r, which keeps the best learning rate about the "
        "same when the rank changes.",
        _SCALE,
    ),
    "lora.dropout": Reason("Regularises little at these data sizes, and slows training.", "common practice", unit="share"),
    "lora.targets": Reason(
        "An adapter on attention alone learns less, even with more parameters; the MLP layers and the experts of a "
        "mixture count most. Never the router, the head or the tower of another modality.",
        _SCALE,
    ),
    "lora.dora": Reason(
        "Variants of LoRA (DoRA, LoRA+, PiSSA, rsLoRA) end within one or two percent of each other once each has its "
        "best learning rate, and DoRA is slower.",
        "arXiv 2602.04998",
    ),
    "learning_rate": Reason(
        "About ten times what full fine-tuning wants. For Llama 5e-4 * (2000 / hidden size)^0.781, for Qwen the same "
        "with 0.0775 (about 2.9e-4 and 4.7e-4 at hidden size 4096), at most 1e-3; 2e-4 for other families.",
        "the public copy of the Tinker cookbook; Unsloth's guide",
        default="by family and width; 2e-4 elsewhere",
        unit="step of AdamW, at its peak",
    ),
    "global_batch_size": Reason(
        "LoRA loses more than full fine-tuning when batches grow; stay under 32 unless there is much data. How it is cut "
        "to fit the memory does not change the result.",
        _SCALE,
        default="16",
        unit="rows per update, over all processes",
    ),
    "num_train_epochs": Reason(
        "Three passes suit some thousand rows; early stopping ends sooner where they are too many.",
        "common practice",
        unit="passes over the rows",
    ),
    "warmup_ratio": Reason("A short rise keeps Adam's first, noisy steps small.", "common practice", "0.03", "share of the steps"),
    "warmup_steps": Reason("A short rise keeps Adam's first, noisy steps small.", "common practice", "3% of the steps", "steps"),
    "lr_scheduler_type": Reason("Falls to zero, so that the last steps settle.", "common practice", "linear"),
    "max_grad_norm": Reason("Cuts the rare step that would throw the adapter far off.", "common practice", "1.0", "L2 norm"),
    "weight_decay": Reason("The rank limits what the adapter can do already.", "common practice", "0.0"),
    "eval_fraction": Reason(
        "Enough to see overfitting, little enough to miss. A row's side depends on a hash of its content: it stays "
        "when rows are added, and copies of a row are never on both sides.",
        "judgement",
        unit="share of the rows",
    ),
    "samples": Reason(
        "One look at an answer shows a wrong template or an answer that never ends; a loss does not. Answers are the "
        "likeliest tokens and draw no random numbers, so they change nothing in training.",
        "judgement",
        unit="prompts",
    ),
    "sample_prompts": Reason("Rows that were not trained on show what was learned.", default="those of held-out rows"),
    "sample_tokens": Reason(
        "Enough to see whether an answer ends.", "judgement", "twice the longest expected answer, 24 to 128", "tokens"
    ),
    "streaming": Reason(
        "Reading everything first finds a bad row now and not in three hours. It is for data that does not fit the memory.",
        "judgement",
    ),
    "keep_tokens": Reason(
        "Tokenizing the same rows in the same way again gives the same tokens. They are found by the content of the files, "
        "the tokenizer and the settings, checked before they are used, and lie where only you can read them.",
        "judgement",
    ),
    "format": Reason("Files say what they are by their fields.", default="that of the first good row"),
    "early_stopping_patience": Reason(
        "One bad evaluation is noise, two are a trend. The best adapter is kept either way.", "judgement", unit="evaluations"
    ),
    "template": Reason(
        "What the model was tuned with already costs nothing to learn. The template that was trained with is kept in the "
        "adapter's folder, and chat, generate and eval use it.",
        "TRL's documentation; reports of models served with another template than they were trained with",
        default="the tokenizer's own; without one, a plain form",
    ),
    "train_on": Reason(
        "Learning to write prompts as well costs capacity that answers need. The end of each answer is always learned, "
        "by where it stands, so that the model learns to stop.",
        "TRL's documentation; reports of models that never stop",
    ),
    "max_length": Reason(
        "What the model can read. Cutting an answer teaches the model to break off, so it is never done silently.",
        default="the model's own limit",
        unit="tokens",
    ),
    "on_bad_row": Reason("A bad row is mostly a sign of a bad file.", "judgement"),
    "quantization": Reason(
        "Rounding the base costs a little quality and a quarter of the speed, so it is for models that do not fit "
        "otherwise. NF4 with double quantisation.",
        "Dettmers et al., QLoRA, arXiv 2305.14314",
        default="none",
    ),
    "bf16": Reason(
        "Half the memory and twice the speed, with the range of float32; the adapter itself stays in float32.",
        "common practice",
        default="true where the GPU or the CPU has instructions for it",
    ),
    "eval_steps": Reason("Ten looks at a run, and ten points to go back to; four where it has under 30 updates.", "judgement", "a tenth of the run", "steps, or a share below 1"),
    "save_steps": Reason("Ten looks at a run, and ten points to go back to; four where it has under 30 updates.", "judgement", "a tenth of the run", "steps, or a share below 1"),
    "save_total_limit": Reason("The newest is for resuming; the best is kept apart.", "judgement", "2", "checkpoints"),
    "logging_steps": Reason("Often enough to see a curve: oftener where a run has less than 300 steps.", "judgement", "10", "steps"),
}  # fmt: skip


def explain(
    key: Annotated[str | None, typer.Argument(metavar="KEY", help="A setting, as in a recipe or as a flag.")] = None,
) -> None:
    """Say what a setting means, its default, and why.

    \b
      etude explain learning_rate
      etude explain --lora-r
    """
    if key is None:
        typer.echo(textwrap.fill(", ".join(REASONS), WIDTH))
        typer.echo("\nAll others too; a list: etude train --help-arguments")
        return
    typer.echo(explanation(known_name(key)))


def known_name(key: str) -> str:
    """A setting by any spelling: `lora.r`, `--lora-r`, `lora_r`, or what another tool calls it.

    Raises:
        UnknownArgumentError: with the nearest name.
    """
    from etude.cli.flags import spelled
    from etude.cli.names import NOT_NEEDED, OURS, answer
    from etude.cli.recipe import known_types

    known = known_types()
    by_flag = {spelled(name): name for name in known}
    plain = key.lstrip("-").replace("-", "_")
    found = key if key in known else plain if plain in known else by_flag.get(f"--{plain.replace('_', '-')}")
    if found is None and plain not in NOT_NEEDED:
        found = OURS.get(plain)
    if found is None:
        raise UnknownArgumentError(answer(plain, known), field="etude explain")
    return found


def explanation(name: str) -> str:
    """All that is known of a setting, in lines of at most 80 characters."""
    from etude.argument_names import OLD_NAMES
    from etude.cli.convert import type_names
    from etude.cli.flags import spelled
    from etude.cli.recipe import known_types

    target = OLD_NAMES[name].target if name in OLD_NAMES else None
    reason = REASONS.get(name) or REASONS.get(target or "")
    entries = [
        ("", meaning_of(target or name)),
        ("type", type_names(known_types()[name])),
        ("unit", reason.unit if reason else ""),
        ("default", reason.default if reason and reason.default else default_of(target or name)),
        ("why", reason.why if reason else ""),
        ("source", reason.source if reason else ""),
        ("flag", f"{spelled(name)} VALUE"),
        ("recipe", f"lora: {{{name.removeprefix('lora.')}: ...}}" if name.startswith("lora.") else f"{name}: ..."),
        ("also", f"an old name of {target}" if target else ""),
    ]
    lines = [name]
    for label, text in entries:
        if text:
            lines.append(textwrap.fill(text, WIDTH, initial_indent=f"  {label:<9}", subsequent_indent=" " * 11))
    return "\n".join(lines)


def meaning_of(name: str) -> str:
    """What a setting does, in one sentence."""
    from dataclasses import fields

    from etude.arguments import TrainingArguments
    from etude.cli.recipe import MEANING

    texts = {item.name: str(item.metadata.get("help", "")) for item in fields(TrainingArguments)}
    return MEANING.get(name) or texts.get(name.partition(".")[0], "")


def default_of(name: str) -> str:
    """The default of a recipe, else of `TrainingArguments`."""
    from dataclasses import MISSING, fields

    from etude.arguments import TrainingArguments
    from etude.cli.recipe import Lora, Recipe

    owner: Any = Lora if name.startswith("lora.") else Recipe
    for place, key in ((owner, name.removeprefix("lora.")), (TrainingArguments, name)):
        for item in fields(place):
            if item.name == key:
                return "none, it must be given" if item.default is MISSING else _shown(item.default)
    return ""


def _shown(value: Any) -> str:
    from etude.cli.recipe import as_yaml

    return "none" if value is None else as_yaml(getattr(value, "value", value))
