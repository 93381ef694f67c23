"""The command `etude`: its verbs, and how an error ends it.

Exit codes: 0 done; 1 the run failed; 2 a setting or the command line is wrong; 128 + its
number (129, 130, 138, 143) stopped by a signal, after its checkpoint was written.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from etude import __version__
from etude.cli.chat import chat
from etude.cli.demo import demo
from etude.cli.doctor import doctor
from etude.cli.evaluate import evaluate
from etude.cli.explain import explain
from etude.cli.generate import generate
from etude.cli.import_checkpoint import import_checkpoint
from etude.cli.inspect import data_app
from etude.cli.merge import merge
from etude.cli.shipped import init, recipes
from etude.cli.train import train
from etude.errors import ConfigError, EtudeError, Interrupted, MissingDependencyError

# typer exports only this one of its parser's exceptions; its base is what every wrong command line raises.
USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]

# Plain help: it is shown in half the time of boxes drawn with rich.
app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
# What the parser does not know may be a training argument; `etude.cli.flags` reads those.
app.command(context_settings={"ignore_unknown_options": True})(train)
app.command()(demo)
app.command()(init)
app.command()(recipes)
# `etude explain --lora-r`: a flag may be what is asked about.
app.command(context_settings={"ignore_unknown_options": True})(explain)
app.add_typer(data_app, name="data")
app.command()(chat)
app.command()(generate)
app.command("eval")(evaluate)
app.command()(merge)
app.command()(doctor)
app.command("import-checkpoint")(import_checkpoint)


@app.callback()
def etude(
    version: Annotated[bool, typer.Option("--version", help="Show the version and exit.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where in the code an error came from.")] = False,
) -> None:
    """Train one skill into a language model with LoRA."""


def main(words: Sequence[str] | None = None) -> int:
    """Run one command line (of the process, if none is given) and return its exit code."""
    given = with_dashes(sys.argv[1:] if words is None else words)
    # Wherever it stands: it says how errors look, not what a verb does.
    debug = "--debug" in given
    given = [word for word in given if word != "--debug"]
    if given[:1] == ["--version"]:
        typer.echo(f"etude {__version__}")
        return 0
    try:
        if given[:1] == ["train"] and "--help" not in given:
            from etude.cli.flags import require_known

            require_known(given[1:])
        return int(app(given or ["--help"], prog_name="etude", standalone_mode=False) or 0)
    except (EtudeError, Interrupted, USAGE_ERROR, typer.Abort, KeyboardInterrupt) as error:
        if debug:
            raise
        typer.secho(one_line(error), fg=typer.colors.RED, err=True)
        return exit_code(error)


def with_dashes(words: Sequence[str]) -> list[str]:
    """The words with every flag's underscores as dashes, values untouched: `--lora_r=8` is `--lora-r=8`."""
    split = (word.partition("=") if word.startswith("--") else ("", "", word) for word in words)
    return [flag.replace("_", "-") + equals + value for flag, equals, value in split]


def exit_code(error: BaseException) -> int:
    """The exit code that an error ends the process with."""
    if isinstance(error, Interrupted):
        return error.exit_code
    if isinstance(error, (typer.Abort, KeyboardInterrupt)):
        return 130
    return 2 if isinstance(error, (ConfigError, MissingDependencyError, USAGE_ERROR)) else 1


def one_line(error: BaseException) -> str:
    """What is said about an error, on one line."""
    if isinstance(error, Interrupted):
        return f"stopped after step {error.step}; the same command goes on from there"
    if isinstance(error, (typer.Abort, KeyboardInterrupt)):
        return "stopped"
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    return "error: " + " ".join(message.split())
