"""What a recipe means: scalars, types, names, assignments, defaults, and the way back to a file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from etude.arguments import TrainingArguments
from etude.cli import recipe, strict_yaml
from etude.cli.defaults import Facts, batch_sizes, learning_rate, training_settings
from etude.cli.recipe import Lora, Recipe
from etude.errors import ConfigError, UnknownArgumentError

GOOD = "model: ./base\ndata: rows.jsonl\n"


def read(text: str) -> Recipe:
    Path("run.yaml").write_text(text, encoding="utf-8")
    return recipe.build(recipe.read("run.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("10", 10),
        ("-7", -7),
        ("0x1F", 31),
        ("0o17", 15),
        ("017", 17),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("no", "no"),
        ("on", "on"),
        ("y", "y"),
        ("12:30:00", "12:30:00"),
        ("2026-01-02", "2026-01-02"),
        ("1_000", "1_000"),
        ("0b11", "0b11"),
        ("1e", "1e"),
    ],
)
def test_an_unquoted_scalar_means_what_yaml_1_2_says(text: str, value: Any) -> None:
    assert strict_yaml.scalar(text) == value
    assert type(strict_yaml.scalar(text)) is type(value)


def test_the_field_decides_what_a_word_is() -> None:
    built = read(
        GOOD
        + "run_name: 12:30:00\neval_strategy: no\nproject: 007\nlearning_rate: 1\nmax_steps: 5\nlora:\n  targets: [q_proj, v_proj]\n"
    )
    assert built.training == {
        "run_name": "12:30:00",
        "eval_strategy": "no",
        "project": "007",
        "learning_rate": 1.0,
        "max_steps": 5,
    }
    assert built.lora == Lora(targets=["q_proj", "v_proj"])


def test_quoted_numbers_are_text_and_a_null_keeps_nothing() -> None:
    with pytest.raises(ConfigError, match=r"learning_rate: expected number, got 'fast' \(run.yaml:3\)"):
        read(GOOD + "learning_rate: 'fast'\n")
    assert read(GOOD + "eval_data: null\n").eval_data is None


@pytest.mark.parametrize(
    ("key", "sentence"),
    [
        ("micro_batch_size", "'micro_batch_size' is 'per_device_train_batch_size' here"),
        ("base_model", "'base_model' is 'model' here"),
        ("sequence_len", "'sequence_len' is 'max_length' here"),
        ("cutoff_len", "'cutoff_len' is 'max_length' here"),
        ("num_epochs", "'num_epochs' is 'num_train_epochs' here"),
        ("lora_rank", "'lora_rank' is 'lora.r' here"),
        ("lora_r", "'lora_r' is 'lora.r' here"),
        ("val_set_size", "'val_set_size' is 'eval_fraction' here"),
        ("packing", "'packing' is not needed"),
        ("resume_from_checkpoint", "a run resumes by itself"),
        ("learning_rat", "did you mean 'learning_rate'?"),
        ("zzzz", "'zzzz' is not a setting; `etude train --help-arguments` lists them all"),
    ],
)
def test_a_wrong_name_is_answered_with_ours(key: str, sentence: str) -> None:
    with pytest.raises(UnknownArgumentError) as refused:
        read(f"{GOOD}{key}: 4\n")
    assert sentence in str(refused.value)
    assert str(refused.value).startswith("run.yaml:3: ")


def test_names_inside_lora_are_checked_too() -> None:
    with pytest.raises(UnknownArgumentError, match=r"run.yaml:4: 'lora.rank' is 'lora.r' here"):
        read(GOOD + "lora:\n  rank: 4\n")


def test_old_argument_names_are_settings() -> None:
    built = read(GOOD + "evaluation_strategy: steps\ngroup_by_length: true\n")
    args = TrainingArguments(**built.training)
    assert (args.eval_strategy, args.train_sampling_strategy) == ("steps", "group_by_length")


def test_set_reaches_every_setting() -> None:
    given = recipe.read(_written(GOOD + "lr_scheduler_kwargs: {power: 2}\n"))
    for path, text in [
        ("lora.r", "4"),
        ("max_steps", "7"),
        ("lr_scheduler_kwargs.min_lr", "1e-6"),
        ("report_to", "[a, b]"),
    ]:
        given = recipe.assign(given, path, text)
    built = recipe.build(given)
    assert built.lora.r == 4
    assert built.training == {
        "lr_scheduler_kwargs": {"power": 2, "min_lr": 1e-6},
        "max_steps": 7,
        "report_to": ["a", "b"],
    }
    with pytest.raises(UnknownArgumentError, match=r"--set lora\.x"):
        recipe.assign(given, "lora.x", "4")


def _written(text: str) -> Path:
    path = Path("run.yaml")
    path.write_text(text, encoding="utf-8")
    return path


words = st.text(st.characters(codec="utf-8", exclude_characters="\0$`{%~", exclude_categories=["Cs"]), min_size=1)
finite = st.floats(allow_nan=False, allow_infinity=False)


@settings(max_examples=60, deadline=None)
@given(
    run_name=words,
    data=st.lists(words, min_size=1) | words,
    rate=st.floats(min_value=0, max_value=1),
    steps=st.integers(1, 2**40),
    options=st.dictionaries(st.text("abc_", min_size=1), finite | st.booleans() | words | st.lists(st.integers(0, 9))),
    targets=st.lists(st.text("abc_.", min_size=1), min_size=1) | st.just("all-linear"),
)
def test_a_saved_recipe_reads_back_as_itself(
    run_name: str, data: Any, rate: float, steps: int, options: dict[str, Any], targets: Any
) -> None:
    training = {"learning_rate": rate, "lr_scheduler_kwargs": options, "max_steps": steps, "run_name": run_name}
    original = Recipe("./base", data, output="out", lora=Lora(r=4, targets=targets), training=training)
    Path("out").mkdir(exist_ok=True)
    saved = recipe.save(original, Path("out"))
    assert saved == Path("out/recipe.yaml")
    assert recipe.build(recipe.read(saved)) == original


def test_a_saved_recipe_has_no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    training = {"hub_token": "hf_secret", "push_to_hub": False, "hub_model_id": "me/mine", "max_steps": 3}
    text = recipe.written(Recipe("m", "d", training=training))
    assert "hf_secret" not in text
    assert "me/mine" not in text
    assert "max_steps: 3" in text


@pytest.mark.parametrize(
    ("model_type", "hidden_size", "rate"),
    [
        ("llama", 4096, 2.9e-4),
        ("llama", 2048, 4.9e-4),
        ("qwen3", 4096, 4.7e-4),
        ("gemma3_text", 640, 2e-4),
        ("llama", 64, 1e-3),
        ("llama", None, 2e-4),
    ],
)
def test_the_learning_rate_follows_the_model(model_type: str, hidden_size: int | None, rate: float) -> None:
    assert learning_rate(model_type, hidden_size) == pytest.approx(rate)


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        ((None, None, None, 1), (16, 1)),
        ((None, None, None, 4), (4, 1)),
        ((None, 2, None, 1), (2, 8)),
        ((None, 2, None, 4), (2, 2)),
        ((None, None, 4, 2), (2, 4)),
        ((None, 3, 5, 1), (3, 5)),
        ((None, 64, None, 1), (64, 1)),
        ((32, None, None, 2), (16, 1)),
        ((32, 4, None, 2), (4, 4)),
        ((32, 4, 8, 1), (4, 8)),
    ],
)
def test_the_global_batch_is_sixteen_unless_said(asked: tuple[Any, ...], sizes: tuple[int, int]) -> None:
    assert batch_sizes(*asked) == sizes


@pytest.mark.parametrize("asked", [(10, 4, None, 1), (15, None, None, 2), (32, 4, 4, 1)])
def test_a_global_batch_that_cannot_be_dealt_is_refused(asked: tuple[Any, ...]) -> None:
    with pytest.raises(ConfigError, match="global_batch_size"):
        batch_sizes(*asked)


def resolved(said: dict[str, Any], **facts: Any) -> dict[str, Any]:
    known = Facts(1, has_bfloat16=False, num_eval_rows=10, model_type="llama", hidden_size=4096)
    return training_settings(Recipe("m", "d", training=said), known._replace(**facts))


def test_defaults_evaluate_and_keep_the_best() -> None:
    settings = resolved({})
    assert settings["warmup_ratio"] == 0.03
    assert settings["learning_rate"] == pytest.approx(2.9e-4)
    assert (settings["eval_steps"], settings["save_steps"], settings["load_best_model_at_end"]) == (0.1, 0.1, True)
    assert "bf16" not in settings


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ({"warmup_steps": 5}, {"warmup_steps": 5}),
        ({"eval_strategy": "epoch"}, {"save_strategy": "epoch", "load_best_model_at_end": True}),
        ({"save_strategy": "epoch"}, {"eval_strategy": "epoch", "load_best_model_at_end": True}),
        ({"evaluation_strategy": "epoch"}, {"save_strategy": "epoch"}),
        ({"save_strategy": "no"}, {"eval_strategy": "steps", "load_best_model_at_end": False}),
        ({"save_strategy": "best"}, {"eval_strategy": "steps", "load_best_model_at_end": True}),
        ({"eval_steps": 5}, {"eval_steps": 5, "save_steps": 5}),
        ({"save_steps": 20}, {"eval_steps": 20, "save_steps": 20}),
        ({"eval_steps": 5, "save_steps": 10}, {"eval_steps": 5, "save_steps": 10}),
        ({"eval_strategy": "no"}, {"save_steps": 0.1}),
    ],
)
def test_defaults_follow_what_was_said(said: dict[str, Any], expected: dict[str, Any]) -> None:
    settings = resolved(said)
    assert settings | expected == settings
    TrainingArguments(**settings)  # they never contradict each other


@pytest.mark.parametrize(
    ("said", "rows", "steps"),
    [
        ({}, 20, 1),  # 6 updates
        ({}, 10_000, 10),
        ({"max_steps": 150}, 10_000, 5),
        ({"max_steps": 150}, None, 5),
        ({"num_train_epochs": 30}, 50, 4),  # 120 updates
        ({"logging_steps": 7}, 20, 7),
    ],
)
def test_a_short_run_logs_often_enough_for_a_curve(said: dict[str, Any], rows: int | None, steps: int) -> None:
    assert resolved(said, num_train_rows=rows)["logging_steps"] == steps


@pytest.mark.parametrize(("said", "interval"), [({}, 0.25), ({"max_steps": 30}, 0.1), ({"eval_steps": 2}, 2)])
def test_a_run_of_a_few_updates_is_not_spent_on_evaluations(said: dict[str, Any], interval: float) -> None:
    settings = resolved(said, num_train_rows=20)
    assert settings["eval_steps"] == settings["save_steps"] == interval


def test_without_rows_to_evaluate_on_nothing_is_evaluated() -> None:
    settings = resolved({}, num_eval_rows=0)
    assert "eval_strategy" not in settings
    TrainingArguments(**settings)


def test_bfloat16_is_the_default_where_there_are_instructions_for_it() -> None:
    assert resolved({}, has_bfloat16=True)["bf16"] is True
    assert resolved({"bf16": False}, has_bfloat16=True)["bf16"] is False
    assert "bf16" not in resolved({"fp16": True}, has_bfloat16=True)


def test_every_own_setting_says_what_it_means() -> None:
    assert set(recipe.MEANING) == set(recipe.own_types())


def test_written_text_is_plain_where_it_can_be() -> None:
    text = recipe.written(replace(Recipe("./base", "rows.jsonl"), training={"learning_rate": 1e-5, "run_name": "1e-5"}))
    assert "model: ./base\n" in text
    assert "learning_rate: 1e-05\n" in text
    assert 'run_name: "1e-5"\n' in text
