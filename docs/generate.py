"""Write `docs/arguments.md` from the table that `TrainingArguments` itself reads.

python docs/generate.py            # write the page
python docs/generate.py --check    # exit with 1 where the page is not what would be written
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from etude.arguments import Classification, TrainingArguments, classification
from etude.seq2seq_arguments import Seq2SeqTrainingArguments
from etude.sft_config import SFTConfig

PAGE = Path(__file__).with_name("arguments.md")

WITHOUT_EFFECT_YET: dict[str, str] = {}
"""Arguments whose own note says more than this version does. A test compares the list with what the source reads."""

TOP = """\
# Training arguments

<!-- Written by docs/generate.py; change the notes in src/etude and run it again. -->

`TrainingArguments` has the fields of `transformers.TrainingArguments` with the same defaults, the names that were removed
there since 4.40, and a few of its own. Every field is also a flag of `etude train` (`--learning-rate 1e-4`) and a key of
a recipe. A name that never existed is an error that suggests the nearest one. The defaults of the command line are
others, made for LoRA; `etude train ... --dry-run` shows them.
"""


def arguments_page() -> str:
    rows = classification()
    parts = [
        TOP,
        "## Read\n\nThese do what they say.\n",
        table(row for row in rows if row.kind == "mapped" and row.name not in WITHOUT_EFFECT_YET),
        "## Other names\n\nOld names, and second names, of the arguments above. They stay readable as attributes.\n",
        table((row for row in rows if row.kind == "alias"), with_target=True),
        "## Without effect\n\n"
        "These are accepted, so that a script runs as it is. Most say so in a warning when they are set.\n",
        table(row for row in rows if row.kind == "accepted" or row.name in WITHOUT_EFFECT_YET),
        "## Refused\n\nIgnoring these would change the result, or leave out something that was asked for.\n",
        table(row for row in rows if row.kind == "refused"),
        "## SFTConfig\n\nThe settings of `SFTTrainer`: all of the above, and these. Four defaults of the above are those of TRL.\n",
        field_table(added_by(SFTConfig)),
        "## Seq2SeqTrainingArguments\n\nThe settings of `Seq2SeqTrainer`: all of the above but `SFTConfig`'s, and these.\n",
        field_table(added_by(Seq2SeqTrainingArguments)),
    ]
    return "\n".join(parts)


def table(rows: Iterable[Classification], *, with_target: bool = False) -> str:
    head = ("argument", "is now", "note") if with_target else ("argument", "default", "meaning")
    lines = [f"| {' | '.join(head)} |", "|---|---|---|"]
    for row in rows:
        second = f"`{row.target}`" if with_target else f"`{row.default!r}`"
        lines.append(f"| `{row.name}` | {second} | {cell(WITHOUT_EFFECT_YET.get(row.name, row.note))} |")
    return "\n".join(lines) + "\n"


def added_by(arguments: type[TrainingArguments]) -> list[Field[Any]]:
    """The fields that a subclass adds, and those it gives another default."""
    known = {item.name: item.default for item in fields(TrainingArguments)}
    return [item for item in fields(arguments) if item.name not in known or item.default != known[item.name]]


def field_table(items: Iterable[Field[Any]]) -> str:
    lines = ["| argument | default | meaning |", "|---|---|---|"]
    for item in items:
        default = "{}" if item.default is MISSING else repr(item.default)
        lines.append(f"| `{item.name}` | `{default}` | {plain(str(item.metadata.get('help', '')))} |")
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """One sentence as the cell of a table: no bars that would end it, a capital, no full stop."""
    text = plain(text)
    return text[:1].upper() + text[1:]


def plain(text: str) -> str:
    return text.replace("|", "\\|").rstrip(".")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare, write nothing")
    page = arguments_page()
    if not parser.parse_args().check:
        PAGE.write_text(page, encoding="utf-8")
        return 0
    is_current = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == page
    if not is_current:
        sys.stderr.write(f"{PAGE.name} is stale: run python docs/generate.py\n")
    return 0 if is_current else 1


if __name__ == "__main__":
    sys.exit(main())
