"""`etude eval`: how good an adapter is on rows that it has not seen."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from etude.cli.options import BaseModel, RunFolder, Template, TrustRemoteCode
from etude.errors import ConfigError, DataError, nearest, require

if TYPE_CHECKING:
    from etude.cli.adapted import Adapted
    from etude.data import RowSet

METRICS = ("loss", "exact", "rouge", "bleu")
EXTRA = "pip install 'etude[eval]'"


def evaluate(
    run: RunFolder,
    data: Annotated[str, typer.Option("--data", metavar="D", help="File or folder of rows.")],
    metrics: Annotated[str, typer.Option(metavar="LIST", help="Of loss, exact, rouge, bleu.")] = "loss,exact",
    limit: Annotated[int | None, typer.Option(metavar="N", help="Only the first N rows.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer in tokens.")] = 128,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Rows side by side.")] = 16,
    base: Annotated[bool, typer.Option("--base", help="Measure the base model as well.")] = False,
    output: Annotated[str | None, typer.Option(metavar="FILE", help="Also write the numbers as JSON.")] = None,
    template: Template = None,
    model: BaseModel = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure an adapter on held-out rows.

    loss is the mean over all learned tokens; exact, rouge (ROUGE-L) and bleu
    compare greedy answers with the last answer of each row. Rows that share a
    prompt are references of one answer.

    \b
      etude eval ./run --data test.jsonl --metrics loss,exact,rouge,bleu
    """
    names = metric_names(metrics)
    for field, value in (("--limit", limit), ("--max-new-tokens", max_new_tokens), ("--batch-size", batch_size)):
        if value is not None and value < 1:
            raise ConfigError(f"must be at least 1, got {value}", field=field)
    scorers = Scorers(names)  # what is not installed is said before the model is loaded

    from etude.cli.adapted import load_adapted
    from etude.cli.voice import chosen_template
    from etude.data import read_rows

    rows = read_rows(data)
    rows = rows if limit is None else rows[:limit]
    adapted = load_adapted(run, base=model, trust_remote_code=trust_remote_code)
    chosen = chosen_template(adapted.tokenizer, template)
    options: dict[str, Any] = {"template": chosen, "max_new_tokens": max_new_tokens, "batch_size": batch_size}
    found = {"adapter": measure(adapted, rows, names, scorers, merge=True, **options)}
    if base:
        with adapted.model.disable_adapter():
            found["base"] = measure(adapted, rows, names, scorers, merge=False, **options)
    typer.echo(table(found, len(rows)))
    if output is not None:
        Path(output).write_text(json.dumps({"rows": len(rows), **found}, indent=1) + "\n", encoding="utf-8")


def metric_names(text: str) -> list[str]:
    """The metrics of a comma-separated list.

    Raises:
        ConfigError: with the nearest name.
    """
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in METRICS:
            guess = nearest(name, METRICS)
            hint = f"; did you mean {guess}?" if guess else f"; there are {', '.join(METRICS)}"
            raise ConfigError(f"'{name}' is no metric{hint}", field="--metrics")
    if not names:
        raise ConfigError(f"names no metric; there are {', '.join(METRICS)}", field="--metrics")
    return names


def measure(
    adapted: Adapted,
    rows: RowSet,
    names: Sequence[str],
    scorers: Scorers,
    *,
    template: str | None,
    max_new_tokens: int,
    batch_size: int,
    merge: bool,
) -> dict[str, float]:
    """Name -> number, of the model as it is now; `merge`: its adapter is on and may be folded in for a while."""
    found: dict[str, float] = {}
    if "loss" in names:
        loss = mean_loss(adapted, rows, template=template, batch_size=batch_size)
        found |= {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if set(names) - {"loss"}:
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": batch_size, "merge": merge}
        found |= scorers.scores(answers_of(adapted, rows, template=template, **options))
    return found


def mean_loss(adapted: Adapted, rows: RowSet, *, template: str | None, batch_size: int) -> float:
    """Cross entropy summed over the learned tokens of all rows / their number, whatever the batches."""
    import torch
    from torch.nn import functional

    from etude.cli.voice import PLAIN, RAW
    from etude.data import CausalLMCollator, encode_rows

    tokenized = encode_rows(
        rows,
        adapted.tokenizer,
        template=PLAIN if template == RAW else template,
        max_length=adapted.settings.get("max_length"),
        train_on=adapted.settings.get("train_on") or "completion",
    )
    collate = CausalLMCollator(adapted.tokenizer)
    device = next(adapted.model.parameters()).device
    by_length = sorted(range(len(tokenized)), key=lambda index: -len(tokenized[index]["input_ids"]))
    total, count = 0.0, 0
    for start in range(0, len(by_length), batch_size):
        batch = collate([tokenized[index] for index in by_length[start : start + batch_size]])
        labels = batch.pop("labels")[:, 1:].to(device)  # (B, T - 1)
        with torch.no_grad():
            logits = adapted.model(**{name: value.to(device) for name, value in batch.items()}).logits[:, :-1]
        is_learned = labels != -100  # only their logits are needed in float32
        total += float(functional.cross_entropy(logits[is_learned].float(), labels[is_learned], reduction="sum"))
        count += int(is_learned.sum())
    return total / count


class Answer(NamedTuple):
    """What the model said to one prompt, and every answer that the rows have for it."""

    said: str
    references: list[str]


def answers_of(
    adapted: Adapted, rows: RowSet, *, template: str | None, max_new_tokens: int, batch_size: int, merge: bool = True
) -> list[Answer]:
    """One greedy answer for every different prompt.

    Raises:
        DataError: rows of plain text have no answer.
    """
    from etude.cli.generate import continued
    from etude.cli.voice import Voice

    if rows.format == "text":
        raise DataError("rows of plain text have no answer to compare; measure --metrics loss", file=rows.origin(0)[0])
    voice = Voice(adapted.tokenizer, format=rows.format, template=template)
    references: dict[tuple[int, ...], list[str]] = {}
    for prompt, row in zip(voice.prompts(list(rows), rows.format), rows, strict=True):
        references.setdefault(tuple(prompt), []).append(last_answer(row, rows.format))
    prompts = [list(prompt) for prompt in references]
    said = continued(adapted.model, voice, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, merge=merge)
    return [Answer(text.strip(), known) for text, known in zip(said, references.values(), strict=True)]


def last_answer(row: Mapping[str, Any], format: str) -> str:
    """What the row says the model should have said."""
    from etude.data.chat import messages_of

    turns = [turn for turn in messages_of(dict(row), format) if turn["role"] == "assistant"]
    return str(turns[-1].get("content") or "").strip()


class Scorers:
    """Answers -> numbers, by the libraries that papers use.

    Raises:
        MissingDependencyError: one of them is not installed.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = names
        rouge: Any = require("rouge_score.rouge_scorer", purpose="ROUGE", install=EXTRA) if "rouge" in names else None
        self._rouge: Any = rouge.RougeScorer(["rougeL"], use_stemmer=False) if rouge is not None else None
        self._bleu: Any = require("sacrebleu", purpose="BLEU", install=EXTRA) if "bleu" in names else None

    def scores(self, answers: Sequence[Answer]) -> dict[str, float]:
        """Each in percent, the best reference counting; BLEU is of all answers together."""
        found: dict[str, float] = {}
        if "exact" in self.names:
            found["exact_match"] = 100 * sum(answer.said in answer.references for answer in answers) / len(answers)
        if self._rouge is not None:
            found["rouge_l"] = 100 * sum(map(self._best_rouge, answers)) / len(answers)
        if self._bleu is not None:
            streams = [list(column) for column in zip_longest(*(answer.references for answer in answers))]
            found["bleu"] = float(self._bleu.corpus_bleu([answer.said for answer in answers], streams).score)
        return found

    def _best_rouge(self, answer: Answer) -> float:
        return max(float(self._rouge.score(known, answer.said)["rougeL"].fmeasure) for known in answer.references)


def table(found: Mapping[str, Mapping[str, float]], num_rows: int) -> str:
    """The numbers, one metric a line, one model a column."""
    names = list(next(iter(found.values())))
    lines = [f"{num_rows} rows".ljust(14) + "".join(f"{model:>12}" for model in found)]
    for name in names:
        digits = 4 if name in ("loss", "perplexity") else 1
        lines.append(f"{name:<14}" + "".join(f"{values[name]:>12.{digits}f}" for values in found.values()))
    return "\n".join(lines)
