"""`etude recipes` and `etude init`: the recipes that come with etude, and a first one of your own."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path
from typing import Annotated

import typer

from etude.errors import ConfigError, nearest

FOLDER = Path(__file__).parent / "recipes"


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Print this one.")] = None,
) -> None:
    """List the recipes that come with etude, or print one.

    \b
      etude recipes
      etude recipes qlora > run.yaml
    """
    if name is not None:
        typer.echo(text_of(name), nl=False)
        return
    width = max(map(len, names()))
    for known in names():
        purpose = text_of(known).splitlines()[0].removeprefix("# ").partition(": ")[2]
        indent = " " * (width + 2)
        typer.echo(textwrap.fill(purpose, 80, initial_indent=f"{known:<{width}}  ", subsequent_indent=indent))
    typer.echo("\nA start from one of them: etude init --recipe NAME")


def init(
    model: Annotated[str | None, typer.Option(metavar="M", help="Folder or Hub name of the base model.")] = None,
    data: Annotated[str | None, typer.Option(metavar="D", help="File or folder of training rows.")] = None,
    recipe: Annotated[str | None, typer.Option(metavar="NAME", help="What to start from: etude recipes.")] = None,
    output: Annotated[str, typer.Option(metavar="FILE", help="The recipe to write.")] = "recipe.yaml",
) -> None:
    """Write a commented recipe; asks for what is not given.

    \b
      etude init
      etude init --model ./base --data rows.jsonl --recipe lora
    """
    target = Path(output).expanduser()
    if target.exists():
        raise ConfigError(f"{output} is there already; name another file", field="--output")
    if recipe is not None:
        text_of(recipe)  # a wrong name is answered before the first question
    model = model or asked("Base model (folder or Hub name)", "--model")
    data = data or asked("Training rows (file or folder)", "--data")
    recipe = recipe or asked(f"Recipe ({', '.join(names())})", "--recipe", default="lora")
    text = filled(text_of(recipe), model=model, data=data)
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{output}: {error.strerror}", field="--output") from error
    typer.echo(f"{output} is written. Next:\n  etude train {output} --dry-run\n  etude train {output}")


def asked(question: str, flag: str, default: str | None = None) -> str:
    """The answer of whoever sits at the terminal.

    Raises:
        ConfigError: nobody does.
    """
    if not sys.stdin.isatty():
        if default is not None:
            return default
        raise ConfigError("missing, and there is no terminal to ask on", field=flag)
    return str(typer.prompt(question, default=default)).strip()


def names() -> list[str]:
    """The shipped recipes, the usual one first."""
    found = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    return sorted(found, key=lambda name: (name != "lora", name))


def text_of(name: str) -> str:
    """The text of a shipped recipe.

    Raises:
        ConfigError: there is none of that name; the message has the nearest.
    """
    if name not in names():
        guess = nearest(name, names())
        hint = f"did you mean {guess}?" if guess else f"there are {', '.join(names())}"
        raise ConfigError(f"no recipe is called '{name}'; {hint}", field="recipes")
    return (FOLDER / f"{name}.yaml").read_text(encoding="utf-8")


def filled(text: str, *, model: str, data: str) -> str:
    """A recipe with its model and data filled in, comments kept."""
    from etude.cli.recipe import as_yaml

    lines = []
    for line in text.splitlines():
        for key, value in (("model", model), ("data", data)):
            if line.startswith(f"{key}: "):
                comment = line[line.index("#") :]
                line = f"{f'{key}: {as_yaml(value)}':<29} {comment}"
        lines.append(line)
    return "\n".join(lines) + "\n"
