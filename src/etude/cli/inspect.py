"""`etude data inspect`: what a model will see of a file, before anything is trained on it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from etude.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from etude.data import RowSet, TokenizedRows

MAX_SHOWN_TOKENS = 400
HISTOGRAM_BINS = 8
BAR_WIDTH = 40
IGNORED = -100

data_app = typer.Typer(help="Look at training data.", no_args_is_help=True, rich_markup_mode=None)


@data_app.command("inspect")
def inspect(
    file: Annotated[str, typer.Argument(metavar="FILE", help="File or folder of training rows.")],
    model: Annotated[str, typer.Option("--model", metavar="M", help="Folder or Hub name; its tokenizer is used.")],
    rows: Annotated[int, typer.Option(metavar="N", help="Rows shown in full.")] = 3,
    template: Annotated[
        str | None,
        typer.Option(metavar="T", help="Chat template: a Jinja file, a name the tokenizer has, or plain."),
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(metavar="N", help="Cut rows after N tokens, as --max-length.")
    ] = None,
    train_on: Annotated[str, typer.Option(metavar="W", help="completion, last (turn) or all.")] = "completion",
) -> None:
    """Show what a model will see: tokens, labels, lengths, and what is wrong.

    Rows appear as the model reads them, special tokens included. What it
    learns is green, and stands between ⟦ and ⟧.

    \b
      etude data inspect rows.jsonl --model ./base --max-length 1024
    """
    if rows < 0:
        raise ConfigError(f"must not be negative, got {rows}", field="--rows")
    from rich.console import Console

    from etude.cli.adapted import load_tokenizer
    from etude.cli.voice import use_template
    from etude.data import encode_rows, read_rows

    found = read_rows(file, on_bad_row="skip")
    tokenizer = load_tokenizer(model)
    chosen = use_template(tokenizer, template)
    tokenized = encode_rows(
        found,
        tokenizer,
        max_length=max_length,
        template=chosen,
        train_on=train_on,  # type: ignore[arg-type]  # checked there
        on_bad_row="skip",
    )
    show(found, tokenized, tokenizer, Console(highlight=False), template=chosen, num_rows=rows, max_length=max_length)


def show(
    found: RowSet,
    tokenized: TokenizedRows,
    tokenizer: Any,
    console: Console,
    *,
    template: str | None,
    num_rows: int,
    max_length: int | None,
) -> None:
    """Print the rows, the lengths and the hazards."""
    from rich.text import Text

    from etude.cli.display import one_line

    console.print(Text(found.describe(), style="bold"))
    marks = ("⟦", "⟧") if console.encoding.lower().startswith("utf") else ("[[", "]]")
    for index in range(min(num_rows, len(tokenized))):
        file, line = tokenized.origin(index)
        row = tokenized[index]
        num_supervised = sum(label != IGNORED for label in row["labels"][1:])
        console.print()
        console.print(
            Text(f"{one_line(file)}:{line}  {len(row['input_ids'])} tokens, {num_supervised} learned", style="bold")
        )
        console.print(coloured(row["input_ids"], row["labels"], tokenizer, marks))
    console.print()
    console.print(Text(tokenized.statistics.describe()))
    for text in histogram(tokenized.lengths.tolist(), max_length):
        console.print(Text(text))
    console.print()
    errors = [*found.rejected, *tokenized.rejected]
    for error in errors[:3]:
        console.print(Text(f"bad row: {one_line(str(error), 200)}", style="red"))
    if len(errors) > 3:
        console.print(Text(f"bad rows: {len(errors)} in all; training stops at the first one", style="red"))
    for hazard in hazards(found, tokenized, tokenizer, template=template, max_length=max_length):
        console.print(Text(f"{hazard.kind}: {hazard.text}", style="red" if hazard.kind == "problem" else "yellow"))
    if not errors and not tokenized.statistics.cut_off:
        console.print(Text("every row is whole", style="green"))


# -- one row ----------------------------------------------------------------------------------------------------------


class Run(NamedTuple):
    """Neighbouring tokens of one kind, as text."""

    text: str
    is_learned: bool
    is_special: bool


def runs_of(input_ids: Sequence[int], labels: Sequence[int], tokenizer: Any) -> Iterator[Run]:
    """The tokens of a row as text, cut where the kind changes; nothing is left out and nothing is cleaned up."""
    special = set(tokenizer.all_special_ids) | {
        number for number, token in getattr(tokenizer, "added_tokens_decoder", {}).items() if token.special
    }
    kinds = [(label != IGNORED, token in special) for token, label in zip(input_ids, labels, strict=True)]
    start, shown = 0, ""
    for end in range(1, len(kinds) + 1):
        if end < len(kinds) and kinds[end] == kinds[start]:
            continue
        # From the beginning each time: a tokenizer writes a token in the middle otherwise than at the start of a text.
        text = str(tokenizer.decode(input_ids[:end], skip_special_tokens=False, clean_up_tokenization_spaces=False))
        yield Run(text[len(shown) :], *kinds[start])
        start, shown = end, text


def coloured(input_ids: Sequence[int], labels: Sequence[int], tokenizer: Any, marks: tuple[str, str]) -> Text:
    """One row for the terminal: learned tokens green and between marks, special tokens in bold."""
    from rich.text import Text

    shown = Text()
    is_open = False
    for run in runs_of(input_ids[:MAX_SHOWN_TOKENS], labels[:MAX_SHOWN_TOKENS], tokenizer):
        if run.is_learned != is_open:
            shown.append(marks[0] if run.is_learned else marks[1], style="bold green")
            is_open = run.is_learned
        style = " ".join(["bold"] * run.is_special + ["green" if run.is_learned else "dim"])
        shown.append(with_line_ends(run.text), style=style)
    if is_open:
        shown.append(marks[1], style="bold green")
    if len(input_ids) > MAX_SHOWN_TOKENS:
        shown.append(f" ... {len(input_ids) - MAX_SHOWN_TOKENS} tokens more", style="italic")
    return shown


def with_line_ends(text: str) -> str:
    """Text that a terminal only shows; a line end is visible and ends the line as well."""
    from etude.observe.console import printable

    return "\\n\n".join(printable(line) for line in text.split("\n"))


# -- all rows ---------------------------------------------------------------------------------------------------------


def histogram(lengths: Sequence[int], max_length: int | None) -> list[str]:
    """Lines such as `   1-  64  ######## 12`, bins of equal width from the shortest to the longest row."""
    shortest, longest = min(lengths), max(lengths)
    width = max(1, -(-(longest - shortest + 1) // HISTOGRAM_BINS))
    counts = [0] * (-(-(longest - shortest + 1) // width))
    for length in lengths:
        counts[(length - shortest) // width] += 1
    digits = len(str(longest + width))
    lines = ["tokens" + " " * max(0, 2 * digits - 5) + "  rows"]
    for index, count in enumerate(counts):
        first = shortest + index * width
        bar = "#" * -(-count * BAR_WIDTH // max(counts))
        limit = "  <- max_length" if max_length is not None and first <= max_length < first + width else ""
        lines.append(f"{first:>{digits}}-{first + width - 1:<{digits}}  {bar:<{BAR_WIDTH}} {count}{limit}")
    return lines


class Hazard(NamedTuple):
    """Something about the data: a `problem` that training suffers from, or a `note`."""

    kind: str
    text: str


def hazards(
    found: RowSet, tokenized: TokenizedRows, tokenizer: Any, *, template: str | None, max_length: int | None
) -> Iterator[Hazard]:
    """What is known to go wrong with such data, the worst first."""
    from etude.data.chat import special_tokens, template_of

    from_template = template_of(tokenizer, template, found.format)
    statistics = tokenized.statistics
    rows = [tokenized[index] for index in range(len(tokenized))]
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    if statistics.cut_off:
        share = statistics.cut_off / statistics.samples
        yield Hazard("problem", f"{statistics.cut_off} rows ({share:.0%}) lose their end at max_length={max_length}")
    doubled = sum(bos is not None and row["input_ids"][:2] == [bos, bos] for row in rows)
    if doubled:
        yield Hazard("problem", f"{doubled} rows begin with {tokenizer.bos_token} twice")
    ends = {tokenizer.convert_tokens_to_ids(token) for token in special_tokens(tokenizer)} | {eos}
    is_full = [max_length is not None and len(row["input_ids"]) >= max_length for row in rows]
    endless = sum(not full and not _ends(row, ends) for row, full in zip(rows, is_full, strict=True))
    if endless:
        yield Hazard(
            "problem",
            f"{endless} rows do not end in an end token that is learned: the model will not learn to stop"
            + ("" if eos is not None else "; the tokenizer has none (eos_token)"),
        )
    if statistics.duplicates:
        yield Hazard("problem", f"{statistics.duplicates} rows appear more than once")
    unknown = tokenizer.unk_token_id
    num_unknown = sum(row["input_ids"].count(unknown) for row in rows) if unknown is not None else 0
    if num_unknown:
        yield Hazard("problem", f"{num_unknown} tokens are {tokenizer.unk_token}: the vocabulary lacks their text")
    if found.format != "text" and statistics.supervised_tokens >= statistics.tokens - statistics.samples:
        yield Hazard("problem", "everything is learned, the prompts too")
    if found.format in ("messages", "sharegpt") and from_template is None:
        yield Hazard("note", "the tokenizer has no chat template: conversations get the plain form (### Instruction:)")
    if bos is not None and from_template is not None and _adds(tokenizer, bos) and _writes_bos(rows, bos):
        yield Hazard("note", f"template and tokenizer both add {tokenizer.bos_token}; one is kept here")
    if pad == eos and eos is not None:
        yield Hazard("note", f"pad and end are the same token, {tokenizer.eos_token}; padding goes by length here")


def _ends(row: dict[str, list[int]], ends: set[Any]) -> bool:
    """Whether the last thing that is learned is an end token, or what stands right behind it is none."""
    learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
    return any(token in ends for token in learned[-3:])  # a template may write a line end behind the end of a turn


def _adds(tokenizer: Any, token: int) -> bool:
    return token in tokenizer("a")["input_ids"]


def _writes_bos(rows: list[dict[str, list[int]]], bos: int) -> bool:
    return any(row["input_ids"][0] == bos for row in rows)
