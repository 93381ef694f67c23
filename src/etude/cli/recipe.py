"""Recipes: what a run is made of, read from YAML and the command line, checked, and written back.

    defaults  <  recipe file  <  command line

A key of a recipe is one of ours (`OWN`) or a field of `TrainingArguments`. A file may set everything but what gives
rights away: whether code that comes with a model is executed, what is uploaded, and where outside the folder of the
run something is written are said on the command line only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, get_type_hints

from etude.argument_names import OLD_NAMES
from etude.arguments import TrainingArguments
from etude.cli import strict_yaml
from etude.cli.convert import Mismatch, convert
from etude.cli.names import answer
from etude.cli.strict_yaml import Value
from etude.errors import ConfigError, UnknownArgumentError

RECIPE_NAME = "recipe.yaml"
FORMAT_NAMES = ("messages", "sharegpt", "alpaca", "prompt_completion", "text")


@dataclass(frozen=True)
class Lora:
    """The adapter. `targets` is `all-linear` or names of modules; the update is scaled by alpha / r."""

    r: int = 32
    alpha: float = 32
    dropout: float = 0.0
    targets: str | list[str] = "all-linear"
    dora: bool = False


@dataclass(frozen=True)
class Recipe:
    """One run. `training` holds the fields of `TrainingArguments` that were set; the rest keeps its default."""

    model: str
    data: str | list[str | dict[str, Any]]
    output: str = "lora-output"
    format: str | None = None
    eval_data: str | list[str] | None = None
    eval_fraction: float = 0.05
    streaming: bool = False
    samples: int = 3
    sample_prompts: str | list[str] | None = None
    sample_tokens: int | None = None
    template: str | None = None
    train_on: Literal["completion", "last", "all"] = "completion"
    on_bad_row: Literal["stop", "skip"] = "stop"
    keep_tokens: bool = True
    max_length: int | None = None
    global_batch_size: int | None = None
    early_stopping_patience: int = 2
    quantization: Literal["4bit", "8bit"] | None = None
    gguf_file: str | None = None
    lora: Lora = field(default_factory=Lora)
    training: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Setting:
    """A value and who said it: `run.yaml:3` or `--learning-rate`."""

    value: Value
    origin: str


Settings = dict[str, Setting]

MEANING = {
    "model": "folder or Hub name of the base model",
    "data": "file or folder of training rows, hub:OWNER/NAME, or a list of them: path, or {path: P, weight: W}",
    "output": "folder of the run: checkpoints, report, the finished adapter",
    "format": "format of the training rows; by default found by their fields",
    "eval_data": "file of held-out rows; instead of eval_fraction",
    "eval_fraction": "share of the rows held out, chosen by a hash of the row",
    "streaming": "read rows while training instead of all of them before; needs max_steps",
    "samples": "prompts that are answered before training and at each evaluation; 0: none",
    "sample_prompts": "file of prompts to answer, or a list of them; by default those of held-out rows",
    "sample_tokens": "longest answer to a sample prompt, in tokens",
    "template": "chat template: a Jinja file, one of the tokenizer's by name, or plain",
    "train_on": "what is learned of a row: completion, last (its last turn) or all",
    "on_bad_row": "stop at a bad row, or skip and count it",
    "keep_tokens": "keep the tokens of the rows in the user's cache, for the next run on the same data",
    "max_length": "longest sample in tokens; longer ones are cut and counted",
    "global_batch_size": "rows per update over all processes",
    "early_stopping_patience": "evaluations without a new best before the run stops; 0: never",
    "quantization": "keep the frozen base in 4bit or 8bit",
    "gguf_file": "name of a GGUF file in the model's folder",
    "lora.r": "rank of the adapter",
    "lora.alpha": "the update is scaled by alpha / r",
    "lora.dropout": "share of adapter inputs dropped",
    "lora.targets": "what gets an adapter: all-linear, or names such as q_proj,v_proj",
    "lora.dora": "also learn the length of each weight's rows (DoRA)",
}

_POSITIVE = (lambda value: value > 0, "must be positive")
_LIMITS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "eval_fraction": (lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
    "max_length": (lambda value: value >= 2, "must be at least 2 tokens: one to read and one to predict"),
    "format": (lambda value: value in FORMAT_NAMES, f"must be one of {', '.join(FORMAT_NAMES)}"),
    "global_batch_size": _POSITIVE,
    "samples": (lambda value: value >= 0, "must not be negative; 0 turns samples off"),
    "sample_tokens": _POSITIVE,
    "early_stopping_patience": (lambda value: value >= 0, "must not be negative; 0 turns early stopping off"),
    "lora.r": _POSITIVE,
    "lora.alpha": _POSITIVE,
    "lora.dropout": (lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
}

_SAID_OTHERWISE = ("output_dir", "resume_from_checkpoint")
_ONLY_TYPED = ("trust_remote_code", "push_to_hub", "push_to_hub_token", "hub_token", "hub_model_id")
_WRITTEN_TO = ("output", "output_dir", "logging_dir")
_SUBSTITUTION = re.compile(r"\$\{|\$\(|\$[A-Za-z_]|%[A-Za-z_]+%|\{\{|`|^~")
# What belongs to one machine or one start, not to the run; secrets among it.
_NOT_SAVED = re.compile(r"token|^hub_|^push_to_hub|^local_rank$|^resume|^output_dir$")


@cache
def argument_types() -> dict[str, Any]:
    """Every training argument and every old name of one with its type, but for those a recipe says in its own words."""
    hints = get_type_hints(TrainingArguments)
    current = {item.name: hints[item.name] for item in fields(TrainingArguments) if item.name not in _SAID_OTHERWISE}
    old = {name: hints.get(row.target or "", Any) if row.default is None else type(row.default) | None
           for name, row in OLD_NAMES.items() if not name.startswith("_")}  # fmt: skip
    return current | old


@cache
def own_types() -> dict[str, Any]:
    """The keys that are not training arguments, those of the adapter as `lora.r`."""
    hints = {key: hint for key, hint in get_type_hints(Recipe).items() if key not in ("lora", "training")}
    return hints | {f"lora.{key}": hint for key, hint in get_type_hints(Lora).items()}


def known_types() -> dict[str, Any]:
    return own_types() | argument_types()


def read(path: str | Path) -> Settings:
    """The settings of a recipe file, names checked.

    Raises:
        ConfigError: naming the file, the line and the key.
    """
    settings: Settings = {}
    for key, value in strict_yaml.read_file(path).data.items():
        if key == "lora" and isinstance(value.data, dict):
            entries = {f"lora.{name}": entry for name, entry in value.data.items()}
        else:
            entries = {key: value}
        for name, entry in entries.items():
            setting = Setting(entry, f"{path}:{entry.line}")
            _refuse_from_file(name, setting, Path(path))
            settings[check_name(name, setting.origin)] = setting
    return settings


def check_name(name: str, origin: str) -> str:
    """`name` as we call it.

    Raises:
        UnknownArgumentError: with the nearest name.
    """
    if name == "output_dir":
        return "output"
    known = known_types()
    if name not in known:
        raise UnknownArgumentError(answer(name, known), field=origin)
    return name


def assign(settings: Settings, path: str, text: str) -> Settings:
    """Apply `--set a.b=text`: a setting, or one entry of a setting that is a mapping (`lr_scheduler_kwargs.min_lr`)."""
    origin = f"--set {path}"
    head, _, rest = path.partition(".")
    if path in known_types() or not rest or head not in known_types():
        return settings | {check_name(path, origin): typed(text, origin)}
    entries = (
        dict(settings[head].value.data) if head in settings and isinstance(settings[head].value.data, dict) else {}
    )
    entries[rest] = Value(strict_yaml.scalar(text), 1, text)
    return settings | {head: Setting(Value(entries, 1), origin)}


def typed(text: str, origin: str) -> Setting:
    """A setting from the command line; `[...]` and `{...}` are lists and mappings as in a recipe."""
    if text[:1] in ("[", "{"):
        value = strict_yaml.read_text(text, name=origin)
    else:
        value = Value(strict_yaml.scalar(text), 1, text)
    return Setting(value, origin)


def build(settings: Settings) -> Recipe:
    """Check every value and build the recipe.

    Raises:
        ConfigError: naming the key, what was expected and who said otherwise.
    """
    types = known_types()
    values: dict[str, Any] = {}
    for key, setting in settings.items():
        values[key] = value = _converted(key, setting, types[key])
        allowed, reason = _LIMITS.get(key, (None, ""))
        if allowed is not None and value is not None and not allowed(value):
            raise wrong(key, f"{reason}, got {value!r}", setting)
    for key in ("model", "data"):
        if not values.get(key):
            raise ConfigError(f"missing: the {MEANING[key]} (--{key}, or `{key}:` in the recipe)", field=key)
    lora = {key.removeprefix("lora."): values.pop(key) for key in list(values) if key.startswith("lora.")}
    own = {key: values.pop(key) for key in list(values) if key in own_types()}
    return Recipe(**own, lora=Lora(**lora), training=values)


def wrong(key: str, message: str, setting: Setting) -> ConfigError:
    return ConfigError(f"{message} ({setting.origin})", field=key)


def _converted(key: str, setting: Setting, hint: Any) -> Any:
    try:
        return convert(setting.value, hint)
    except Mismatch as mismatch:
        raise wrong(key, str(mismatch), setting) from None


def _refuse_from_file(key: str, setting: Setting, file: Path) -> None:
    if key in _ONLY_TYPED:
        raise ConfigError(f"'{key}' only comes from the command line, never from a file", field=setting.origin)
    for text in _strings(setting.value):
        if _SUBSTITUTION.search(text):
            raise wrong(key, f"{text!r}: nothing is substituted in recipes; write the value itself", setting)
    if setting.value.text and key in _WRITTEN_TO:
        target = Path(setting.value.text).resolve()
        if not any(target.is_relative_to(folder.resolve()) for folder in (Path(), file.parent)):
            flag = "--output" if key != "logging_dir" else "--logging-dir"
            raise wrong(key, f"'{setting.value.text}' is outside this folder; only `{flag}` can point there", setting)


def _strings(value: Value) -> Iterable[str]:
    if isinstance(value.data, dict):
        for key, entry in value.data.items():
            yield key
            yield from _strings(entry)
    elif isinstance(value.data, list):
        for entry in value.data:
            yield from _strings(entry)
    elif isinstance(value.data, str):
        yield value.data


def save(recipe: Recipe, folder: Path) -> Path:
    """Write the recipe into `folder`, so that running it again repeats the run; holds no secrets. Returns the path."""
    target = folder / RECIPE_NAME
    temporary = target.with_name(f".{RECIPE_NAME}.tmp")
    temporary.write_text(written(recipe), encoding="utf-8")
    temporary.replace(target)
    return target


def written(recipe: Recipe) -> str:
    """A recipe as text that `read` and `build` turn into the same recipe."""
    entries = asdict(recipe)
    training, lora = entries.pop("training"), entries.pop("lora")
    lines = ["# Every setting of this run. To repeat it: etude train recipe.yaml --output ANOTHER_FOLDER"]
    lines += [f"{key}: {as_yaml(value)}" for key, value in entries.items() if value is not None]
    lines += ["lora:", *(f"  {key}: {as_yaml(value)}" for key, value in lora.items())]
    lines += [f"{key}: {as_yaml(value)}" for key, value in sorted(training.items()) if not _NOT_SAVED.search(key)]
    return "\n".join(lines) + "\n"


def as_yaml(value: Any) -> str:
    """A value as a recipe writes it, on one line."""
    if isinstance(value, str) and re.fullmatch(r"[\w./][\w./@+-]*", value) and strict_yaml.scalar(value) == value:
        return value
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_quoted(str(key))}: {as_yaml(entry)}" for key, entry in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(as_yaml(entry) for entry in value) + "]"
    return _quoted(value) if isinstance(value, str) else json.dumps(value)


def _quoted(text: str) -> str:
    """A double-quoted YAML scalar; what an editor would not show is escaped."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in escaped) + '"'
