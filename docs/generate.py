"""Write `docs/arguments.md` from the table that `TrainingArguments` itself reads.

python docs/generate.py            # write the page
python docs/generate.py --check    # exit with 1 where the page is not what would be written
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

from etude.arguments import Classification, classification

PAGE = Path(__file__).with_name("arguments.md")

WITHOUT_EFFECT_YET = {
    "deterministic": "on a GPU it fixes how steps are cut and that nothing is compiled by the clock; kernels are chosen as without it",
    "full_determinism": "the same as `deterministic`",
    "neftune_noise_alpha": "no noise is added in this version",
    "overwrite_output_dir": "checkpoints of an earlier run are always moved aside, never overwritten",
    "skip_memory_metrics": "memory use is not among the metrics of this version",
    "tf32": "set `torch.backends.cuda.matmul.allow_tf32` yourself",
}
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
    ]
    return "\n".join(parts)


def table(rows: Iterable[Classification], *, with_target: bool = False) -> str:
    head = ("argument", "is now", "note") if with_target else ("argument", "default", "meaning")
    lines = [f"| {' | '.join(head)} |", "|---|---|---|"]
    for row in rows:
        second = f"`{row.target}`" if with_target else f"`{row.default!r}`"
        lines.append(f"| `{row.name}` | {second} | {cell(WITHOUT_EFFECT_YET.get(row.name, row.note))} |")
    return "\n".join(lines) + "\n"


def cell(text: str) -> str:
    """One sentence as the cell of a table: no bars that would end it, a capital, no full stop."""
    text = text.replace("|", "\\|").rstrip(".")
    return text[:1].upper() + text[1:]


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
