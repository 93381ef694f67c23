"""`etude import-checkpoint`: take over a checkpoint of `transformers.Trainer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def import_checkpoint(
    folder: Annotated[
        Path, typer.Argument(help="The checkpoint, or the output folder that holds it (the newest is taken).")
    ],
    output_dir: Annotated[
        Path | None, typer.Option("--output-dir", help="Where it goes; in place of the original if not given.")
    ] = None,
) -> None:
    """Make a checkpoint of transformers.Trainer one that training goes on from."""
    from etude.checkpoint.import_transformers import import_checkpoint as take_over

    checkpoint = take_over(folder, output_dir)
    typer.echo(f"{checkpoint.path}: step {checkpoint.step}; resume_from_checkpoint goes on from it")
