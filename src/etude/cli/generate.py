"""`etude generate`: a file of prompts in, a file of answers out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from etude.cli.options import BaseModel, RunFolder, Template, TrustRemoteCode
from etude.errors import ConfigError, DataError

BATCH_SIZE = 32


def generate(
    run: RunFolder,
    prompts: Annotated[
        str, typer.Option(metavar="FILE", help="JSON lines with prompt or messages, or plain lines.")
    ] = "-",
    output: Annotated[str, typer.Option(metavar="FILE", help="Answers as JSON lines.")] = "-",
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer in tokens.")] = 256,
    batch_size: Annotated[int, typer.Option(metavar="N", help="Prompts side by side.")] = BATCH_SIZE,
    template: Template = None,
    model: BaseModel = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Answer every prompt of a file, greedily.

    "-" is standard input or output. Each line of the output has the fields of
    its prompt and "answer".

    \b
      etude generate ./run --prompts prompts.jsonl --output answers.jsonl
      echo "Say hello." | etude generate ./run
    """
    if max_new_tokens < 1 or batch_size < 1:
        field = "--max-new-tokens" if max_new_tokens < 1 else "--batch-size"
        raise ConfigError("must be at least 1", field=field)
    rows = read_prompts(prompts)
    target = Path(output).expanduser()
    if output != "-" and not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is no folder", field="--output")

    from etude.cli.adapted import load_adapted
    from etude.cli.voice import Voice, chosen_template

    adapted = load_adapted(run, base=model, trust_remote_code=trust_remote_code)
    voice = Voice(adapted.tokenizer, format=adapted.format, template=chosen_template(adapted.tokenizer, template))
    ids = [prompt_ids(voice, row) for row in rows]
    answers = continued(adapted.model, voice, ids, max_new_tokens=max_new_tokens, batch_size=batch_size)
    lines = [
        json.dumps({**row, "answer": answer}, ensure_ascii=False) for row, answer in zip(rows, answers, strict=True)
    ]
    text = "".join(f"{line}\n" for line in lines)
    if output == "-":
        typer.echo(text, nl=False)
    else:
        target.write_text(text, encoding="utf-8")
        typer.echo(f"{len(lines)} answers: {target}")


def prompt_ids(voice: Any, row: dict[str, Any]) -> list[int]:
    """The tokens of one prompt: a text, an instruction (with input) or a conversation."""
    from etude.cli.voice import ANSWER

    ids: list[int]
    if "messages" in row:
        turns = [*row["messages"], {"role": "assistant", "content": ANSWER}]
        [ids] = voice.prompts([{"messages": turns}], "messages")
    elif "instruction" in row:
        [ids] = voice.prompts([row | {"output": ANSWER}], "alpaca")
    else:
        ids = voice.prompt_of(row["prompt"])
    return ids


def continued(
    model: Any, voice: Any, prompts: Sequence[list[int]], *, max_new_tokens: int, batch_size: int, merge: bool = True
) -> list[str]:
    """What the model says to each prompt, the likeliest token each time, up to the end of its turn.

    `merge` folds the adapter into the base weights meanwhile, which is faster; not for an adapter that is switched off.

    Raises:
        ConfigError: nothing marks the end of an answer.
    """
    from etude.demo.generation import continue_greedily, evaluation_mode, merged_adapter

    if not voice.stop_ids:
        raise ConfigError("has no end-of-sequence token, so an answer has no end", field="tokenizer")
    # What ended the turns of training: the template's token where it has one of its own, else end of sequence.
    end = next(iter(voice.stop_ids - {voice.tokenizer.eos_token_id}), voice.tokenizer.eos_token_id)
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    answers = [""] * len(prompts)
    with evaluation_mode(model), merged_adapter(model) if merge else nullcontext():
        for start in range(0, len(by_length), batch_size):
            chosen = by_length[start : start + batch_size]
            tokens = continue_greedily(
                model, [prompts[index] for index in chosen], eos_token_id=end, max_new_tokens=max_new_tokens
            )
            for index, new in zip(chosen, tokens, strict=True):
                answers[index] = voice.text_of(new)
    return answers


def read_prompts(source: str) -> list[dict[str, Any]]:
    """The prompts of a file, or of standard input for "-": JSON objects, or plain lines of text.

    Raises:
        DataError: naming file, line and field.
    """
    if source == "-":
        return _parsed(sys.stdin, "stdin")
    path = Path(source).expanduser()
    try:
        with path.open(encoding="utf-8") as file:
            return _parsed(file, source)
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror}", field="--prompts") from error
    except UnicodeDecodeError as error:
        raise DataError("expected UTF-8", file=source) from error


def _parsed(lines: Iterable[str], name: str) -> list[dict[str, Any]]:
    rows = [_prompt(line, number, name) for number, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise DataError("expected at least one prompt, got none", file=name)
    return rows


def _prompt(line: str, number: int, name: str) -> dict[str, Any]:
    if not line.lstrip().startswith("{"):
        return {"prompt": line.rstrip("\r\n")}
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"expected JSON: {error}", file=name, line=number) from error
    turns = row.get("messages")
    if isinstance(turns, list) and turns:
        for index, turn in enumerate(turns):
            if not isinstance(turn, dict) or not all(isinstance(turn.get(key), str) for key in ("role", "content")):
                raise DataError("expected role and content", file=name, line=number, field=f"messages[{index}]")
        return dict(row)
    field = "instruction" if "instruction" in row else "prompt"
    if not isinstance(row.get(field), str) or not row[field]:
        raise DataError("expected a string with text, or 'messages'", file=name, line=number, field=field)
    return dict(row)
