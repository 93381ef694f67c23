"""Command lines: which words are flags, which are values, and what a wrong one is answered with."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from etude.arguments import TrainingArguments
from etude.cli import recipe
from etude.cli.flags import describe_arguments, flag_types, read_words
from etude.cli.main import with_dashes
from etude.cli.train import gather
from etude.errors import ConfigError


def values(line: str) -> dict[str, Any]:
    settings = gather(line.split(), {"model": "m", "data": "d"}, [])
    return recipe.build(settings).training


@pytest.mark.parametrize(
    ("line", "training"),
    [
        ("--learning-rate 1e-4", {"learning_rate": 1e-4}),
        ("--learning-rate=1e-4", {"learning_rate": 1e-4}),
        ("--max-steps -1", {"max_steps": -1}),
        ("--bf16", {"bf16": True}),
        ("--bf16 True --max-steps 3", {"bf16": True, "max_steps": 3}),
        ("--bf16 --max-steps 3", {"bf16": True, "max_steps": 3}),
        ("--bf16 false", {"bf16": False}),
        ("--bf16=false", {"bf16": False}),
        ("--no-bf16", {"bf16": False}),
        ("--eval-strategy no", {"eval_strategy": "no"}),
        ("--report-to [tensorboard,wandb]", {"report_to": ["tensorboard", "wandb"]}),
        ('--lr-scheduler-kwargs {"power":2}', {"lr_scheduler_kwargs": {"power": 2}}),
        ("--evaluation-strategy steps", {"evaluation_strategy": "steps"}),
        ("--group-by-length", {"group_by_length": True}),
    ],
)
def test_a_training_argument_is_a_flag(line: str, training: dict[str, Any]) -> None:
    assert values(line) == training


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--learning-rat 1", "--learning-rat is not a setting; did you mean --learning-rate?"),
        ("--lora-rr 1", "did you mean --lora-r?"),
        ("--dry-rn", "did you mean --dry-run?"),
        ("--micro-batch-size 1", "--micro-batch-size is --per-device-train-batch-size here"),
        ("--lora-rank 1", "--lora-rank is --lora-r here"),
        ("--max-steps", "--max-steps: needs a value: integer"),
        ("--max-steps --bf16", "--max-steps: needs a value: integer"),
        ("--max-steps few", "max_steps: expected integer, got 'few' (--max-steps)"),
        ("--bf16 maybe", "bf16: expected true|false, got 'maybe' (--bf16)"),
        ("--no-bf16=1", "--no-bf16: takes no value"),
        ("--no-max-steps", "not a setting"),
        ("-x", "-x: options start with two dashes"),
        ("a.yaml b.yaml", "'b.yaml' has no flag; one recipe at most"),
    ],
)
def test_a_wrong_word_is_answered(line: str, message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        values(line)
    assert message in str(refused.value)


def test_every_training_argument_has_a_flag_and_a_line_of_help() -> None:
    ours = {"output_dir", "resume_from_checkpoint", "debug"}  # `--output`, `--resume`, and a flag of etude's own
    names = {item.name for item in fields(TrainingArguments)} - ours
    flags = flag_types()
    assert {name.replace("_", "-") for name in names} <= set(flags)
    described = describe_arguments()
    assert all(f"--{name.replace('_', '-')}  [" in described for name in names)
    assert described.startswith("--model  [text; required]\n    Folder or Hub name of the base model.\n")
    assert "--keep-tokens  [true|false; default True]\n    Keep the tokens of the rows" in described
    assert "--lora-r  [integer; default 32]" in described


def test_the_recipe_may_stand_anywhere_but_behind_a_flag_that_takes_it() -> None:
    for line in ("run.yaml --max-steps 3 --bf16", "--max-steps 3 run.yaml --bf16", "--max-steps 3 --bf16 run.yaml"):
        words = read_words(line.split())
        assert words.recipe_file == "run.yaml"
        assert set(words.settings) == {"max_steps", "bf16"}


def test_flags_win_over_the_recipe_and_set_wins_over_flags() -> None:
    Path("run.yaml").write_text("model: a\ndata: b\nmax_steps: 1\nlearning_rate: 1\nseed: 5\nlora: {r: 4, alpha: 4}\n")
    words = ["run.yaml", "--max-steps", "2", "--learning-rate", "2"]
    settings = gather(words, {"model": "c", "lora.r": "8"}, ["learning_rate=3"])
    built = recipe.build(settings)
    assert (built.model, built.data, built.lora.r, built.lora.alpha) == ("c", "b", 8, 4)
    assert built.training == {"max_steps": 2, "learning_rate": 3.0, "seed": 5}
    origins = {key: setting.origin for key, setting in settings.items()}
    assert (origins["seed"], origins["max_steps"]) == ("run.yaml:5", "--max-steps")
    with pytest.raises(ConfigError, match=r"--set: expected a.b=c, got 'lora.r'"):
        gather(words, {}, ["lora.r"])


def test_underscores_in_flags_are_dashes_and_values_stay() -> None:
    assert with_dashes(["--lora_r=a_b", "--max_steps", "my_file", "x_y.yaml"]) == [
        "--lora-r=a_b",
        "--max-steps",
        "my_file",
        "x_y.yaml",
    ]
