"""The words behind `etude train` -> a recipe file and settings.

Every training argument is a flag: `--learning-rate 1e-4`, `--learning_rate=1e-4`, `--bf16`, `--bf16 true`, `--no-bf16`.
There are more than a hundred, so they are parsed here from the types of `TrainingArguments` and not declared one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from etude.cli import recipe
from etude.cli.convert import accepts, type_names
from etude.cli.names import answer
from etude.cli.recipe import Settings
from etude.errors import ConfigError, UnknownArgumentError

# Flags of `etude train` that say how to run, not what.
SWITCHES = ("set", "dry_run", "check", "resume", "trust_remote_code", "help_arguments", "help", "debug")


class Words(NamedTuple):
    """A command line, read: the recipe file if one was named, and what was set beside it."""

    recipe_file: str | None
    settings: Settings


def spelled(name: str) -> str:
    """A setting as a flag: `lora.r` is `--lora-r`."""
    return "--" + name.replace("_", "-").replace(".", "-")


def flag_types() -> dict[str, tuple[str, Any]]:
    """Every flag without its dashes -> (the setting it sets, the setting's type)."""
    types = {key: hint for key, hint in recipe.known_types().items() if key not in SWITCHES}
    flags = {spelled(key)[2:]: (key, hint) for key, hint in types.items()}
    return flags | {"output-dir": ("output", str)}


def read_words(words: Sequence[str]) -> Words:
    """Read what typer left over.

    Raises:
        UnknownArgumentError: a flag that does not exist, with the nearest one.
        ConfigError: a flag without its value, or a second recipe.
    """
    flags = flag_types()
    recipe_file: str | None = None
    settings: Settings = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            if recipe_file is not None:
                raise ConfigError(
                    f"'{word}' has no flag; one recipe at most, and lists are written a,b,c", field="etude train"
                )
            recipe_file = word
            continue
        name, equals, text = word.removeprefix("--").partition("=")
        negated = name.removeprefix("no-")
        if name not in flags and negated in flags and accepts(flags[negated][1], bool):
            if equals:
                raise ConfigError(f"takes no value, got '{text}'", field=f"--{name}")
            settings[flags[negated][0]] = recipe.typed("false", f"--{name}")
            continue
        if name not in flags or not word.startswith("--"):
            raise _unknown(word.partition("=")[0])
        key, hint = flags[name]
        if not equals:
            text = _next_value(rest, f"--{name}", hint)
        settings[key] = recipe.typed(text, f"--{name}")
    return Words(recipe_file, settings)


def require_known(words: Sequence[str]) -> None:
    """Answer a wrong flag before anything is parsed; the parser alone takes longer than that.

    Raises:
        UnknownArgumentError: a flag that does not exist, with the nearest one.
    """
    known = {*flag_types(), *(spelled(name)[2:] for name in (*SWITCHES, "resume_from_checkpoint"))}
    for word in words:
        name = word.partition("=")[0].removeprefix("--")
        if word.startswith("--") and name and name not in known and name.removeprefix("no-") not in known:
            raise _unknown(word.partition("=")[0])


def _next_value(rest: list[str], flag: str, hint: Any) -> str:
    """Take the flag's value from the words behind it; a boolean may go without."""
    follows = bool(rest) and not rest[0].startswith("--")
    if accepts(hint, bool) and not (follows and not rest[0].endswith((".yaml", ".yml"))):
        return "true"
    if not follows:
        raise ConfigError(f"needs a value: {type_names(hint)}", field=flag)
    return rest.pop(0)


def _unknown(word: str) -> UnknownArgumentError:
    if not word.startswith("--"):
        return UnknownArgumentError(f"{word}: options start with two dashes", field="etude train")
    name = word[2:].replace("-", "_")
    known = [*(key.replace("-", "_") for key in flag_types()), *SWITCHES]
    return UnknownArgumentError(answer(name, known, spelled), field="etude train")


def describe_arguments() -> str:
    """Two lines for each setting of a recipe and each training argument, for `--help-arguments`."""
    from dataclasses import MISSING, fields

    from etude.arguments import TrainingArguments

    own, types = recipe.own_types(), recipe.argument_types()
    defaults = {item.name: item.default for item in fields(recipe.Recipe)}
    defaults |= {f"lora.{item.name}": item.default for item in fields(recipe.Lora)}
    said = [(name, own[name], defaults[name], _sentence(recipe.MEANING[name])) for name in own]
    said += [
        (item.name, types[item.name], item.default, item.metadata.get("help", ""))
        for item in fields(TrainingArguments)
        if item.name in types and item.name not in own
    ]
    lines = []
    for name, hint, default, meaning in said:
        preset = "required" if default is MISSING else f"default {default!r}"
        lines += [f"{spelled(name)}  [{type_names(hint)}; {preset}]", f"    {meaning}"]
    return "\n".join(lines)


def _sentence(meaning: str) -> str:
    return f"{meaning[0].upper()}{meaning[1:]}."
