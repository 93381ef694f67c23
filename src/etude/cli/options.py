"""Options that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer

RunFolder = Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, a checkpoint or an adapter.")]
Template = Annotated[
    str | None, typer.Option(metavar="T", help="A Jinja file, own, plain or raw.", show_default="as in training")
]
BaseModel = Annotated[str | None, typer.Option(metavar="M", help="Base model, where it has moved.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Execute code that comes with the model.")]
