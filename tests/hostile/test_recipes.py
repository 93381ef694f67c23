"""Recipes written to harm: each is refused with its file and key named, quickly, and nothing in it ever runs."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from etude.cli import recipe, strict_yaml
from etude.cli.train import training_arguments
from etude.errors import ConfigError

GOOD = "model: ./base\ndata: rows.jsonl\n"


def check(text: str, folder: Path) -> recipe.Recipe:
    """Read a recipe as far as `etude train` does before it loads anything."""
    file = folder / "run.yaml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    settings = recipe.read(file)
    built = recipe.build(settings)
    training_arguments(built.training, built.output, settings)
    return built


def refusal(text: str, folder: Path) -> str:
    begin = time.process_time()
    with pytest.raises(ConfigError) as refused:
        check(text, folder)
    assert time.process_time() - begin < 2
    assert not (folder / "canary").exists()
    message = str(refused.value)
    assert "run.yaml" in message
    assert len(message) < 500
    return message


def test_the_harmless_recipe_is_read(tmp_path: Path) -> None:
    assert check(GOOD + "learning_rate: 1e-5\n", tmp_path).training == {"learning_rate": 1e-5}


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch canary']",
        "!!python/object/new:os.system [touch canary]",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!str plain",
        "!!binary dG91Y2g=",
        "!custom x",
        "!<tag:yaml.org,2002:python/object/apply:os.system> ['touch canary']",
    ],
)
def test_tags_are_refused(value: str, tmp_path: Path) -> None:
    message = refusal(f"{GOOD}run_name: {value}\n", tmp_path)
    assert "run.yaml:3" in message
    assert "tag" in message


def test_a_tag_on_a_key_or_the_document_is_refused(tmp_path: Path) -> None:
    assert "tag" in refusal("!!python/name:os.system : x\n", tmp_path)
    assert "tag" in refusal("--- !!python/object/apply:os.system ['touch canary']\n", tmp_path)
    assert "tag" in refusal(
        "%TAG ! tag:yaml.org,2002:python/\n---\n" + GOOD + "run_name: !name:os.system x\n", tmp_path
    )


def test_an_alias_bomb_is_refused(tmp_path: Path) -> None:
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"{b}: &{b} [{', '.join(['*' + a] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True))
    assert "anchor '&a'" in refusal(bomb, tmp_path)
    assert "alias '*base'" in refusal(GOOD + "run_name: *base\n", tmp_path)
    assert "anchor" in refusal("&all\nmodel: x\n<<: *all\n", tmp_path)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (GOOD + "model: ./other\n", "'model' appears twice, first on line 1"),
        (GOOD + "lora:\n  r: 8\n  r: 64\n", "'lora.r' appears twice"),
        (GOOD + "lr_scheduler_kwargs: {min_lr: 1, min_lr: 2}\n", "'lr_scheduler_kwargs.min_lr' appears twice"),
    ],
)
def test_a_repeated_key_is_refused(text: str, named: str, tmp_path: Path) -> None:
    assert named in refusal(text, tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 20_000, "{a: " * 10_000, "".join(" " * n + "k:\n" for n in range(300)), "- " * 20_000]
)
def test_deep_nesting_is_refused(text: str, tmp_path: Path) -> None:
    assert "nested more than 8 levels" in refusal(text, tmp_path)


def test_a_long_line_of_flow_punctuation_is_answered_in_time(tmp_path: Path) -> None:
    refusal("k: [" + "a, " * 20_000 + "\n", tmp_path)
    refusal("k: {" + "'a': " * 10_000 + "\n", tmp_path)
    refusal("? " * 20_000, tmp_path)


@pytest.mark.parametrize(
    "line",
    [
        "max_steps: " + "9" * 50_000,
        "max_steps: 9223372036854775808",
        "max_steps: 0x" + "f" * 5_000,
        "seed: -1",
        "seed: 99999999999",
        "learning_rate: .nan",
        "learning_rate: .inf",
        "learning_rate: -.inf",
        "learning_rate: 1e999",
        "learning_rate: -1e-4",
        "learning_rate: fast",
        "learning_rate: '1e-4, 2e-4'",
        "learning_rate: 12:30:00",
        "learning_rate: [1e-4]",
        "learning_rate: {value: 1e-4}",
        "learning_rate:",
        "learning_rate: true",
        "weight_decay: .nan",
        "max_steps: -5",
        "max_steps: 2.5",
        "save_steps: -10",
        "eval_fraction: -0.1",
        "eval_fraction: 1.0",
        "eval_fraction: .nan",
        "max_length: 0",
        "max_length: -4",
        "global_batch_size: 0",
        "per_device_train_batch_size: -8",
        "gradient_accumulation_steps: 0",
        "num_train_epochs: -1",
        "bf16: yes",
        "bf16: on",
        "bf16: 1",
        "bf16: auto",
        "train_on: everything",
        "quantization: 2bit",
        "run_name: [a]",
        'run_name: "a\\0b"',
        "data: {path: x}",
        "lr_scheduler_kwargs: {min_lr: .nan}",
        "push_to_hub_model_id: [x]",
    ],
)
def test_a_wrong_value_names_its_key(line: str, tmp_path: Path) -> None:
    key = line.partition(":")[0]
    text = GOOD.replace("data: rows.jsonl\n", "") if key == "data" else GOOD
    assert key in refusal(text + line + "\n", tmp_path)


@pytest.mark.parametrize(
    "line", ["r: 0", "r: -8", "r: 1e3", "alpha: 0", "dropout: 1", "dropout: .nan", "targets: {q: v}"]
)
def test_a_wrong_adapter_names_its_key(line: str, tmp_path: Path) -> None:
    assert f"lora.{line.partition(':')[0]}" in refusal(f"{GOOD}lora:\n  {line}\n", tmp_path)


@pytest.mark.parametrize("key", ["trust_remote_code", "push_to_hub", "hub_token", "push_to_hub_token", "hub_model_id"])
def test_rights_are_never_given_by_a_file(key: str, tmp_path: Path) -> None:
    assert f"'{key}' only comes from the command line" in refusal(f"{GOOD}{key}: true\n", tmp_path)


@pytest.mark.parametrize("nesting", ["lora: {trust_remote_code: true}", "training: {trust_remote_code: true}"])
def test_nor_from_a_hidden_corner_of_it(nesting: str, tmp_path: Path) -> None:
    refusal(f"{GOOD}{nesting}\n", tmp_path)


@pytest.mark.parametrize("key", ["output", "output_dir", "logging_dir"])
@pytest.mark.parametrize("path", ["../../elsewhere", "/etc/cron.d", "sub/../../up", "/root/.ssh", "link/in"])
def test_a_recipe_writes_nowhere_outside_the_folder(key: str, path: str, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "link").symlink_to("/usr")
    os.chdir(tmp_path / "work")
    message = refusal(f"{GOOD}{key}: {path}\n", tmp_path / "work")
    assert "outside this folder" in message
    assert key in message


def test_a_recipe_may_name_the_folder_it_lies_in(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    os.chdir(tmp_path / "elsewhere")
    assert check(f"{GOOD}output: {tmp_path / 'run'}\n", tmp_path / "run").output == str(tmp_path / "run")


@pytest.mark.parametrize(
    "value",
    [
        "${HOME}/x",
        "$HOME/x",
        "$(touch canary)",
        "`touch canary`",
        "{{ env.HF_TOKEN }}",
        "~/x",
        "%APPDATA%/x",
        "~root/x",
    ],
)
@pytest.mark.parametrize("key", ["run_name", "data", "output", "logging_dir"])
def test_nothing_is_substituted(key: str, value: str, tmp_path: Path) -> None:
    lines = [line for line in GOOD.splitlines() if not line.startswith(key)]
    message = refusal("\n".join([*lines, f"{key}: '{value}'", ""]), tmp_path)
    assert "nothing is substituted" in message
    assert key in message


@pytest.mark.parametrize("key", ["env", "environment", "ENV", "HF_TOKEN", "PYTHONPATH", "__class__", "<<", ""])
def test_unknown_keys_are_refused(key: str, tmp_path: Path) -> None:
    assert "not a setting" in refusal(f"{GOOD}'{key}': {{LD_PRELOAD: evil.so}}\n", tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "is empty"),
        ("# nothing\n", "is empty"),
        ("- model\n- data\n", "is a mapping"),
        ("just words\n", "is a mapping"),
        (GOOD + "---\n" + GOOD, "another document"),
        (GOOD + "\tlora: 1\n", "cannot start any token"),
        (GOOD + "'unfinished\n", "end of stream"),
        (GOOD + "? [a, b]\n: c\n", "a key must be a word"),
        (GOOD + "run_name: \udcff\n", "not UTF-8"),
        (GOOD + "run_name: \x00\n", "special characters"),
        (GOOD + "#" * strict_yaml.MAX_BYTES, "larger than 64 KiB"),
    ],
)
def test_what_is_no_recipe_says_so(text: str, reason: str, tmp_path: Path) -> None:
    assert reason in refusal(text, tmp_path)


def test_pipes_devices_and_folders_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path, reason in [
        ("pipe", "is not a file"),
        (".", "is a folder"),
        ("none.yaml", "no such recipe"),
        ("/dev/zero", "is not a file"),
    ]:
        with pytest.raises(ConfigError, match=reason):
            recipe.read(path)


def test_a_merge_of_missing_keys_is_answered_with_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: ./base\n")
    with pytest.raises(ConfigError, match=r"data: missing: the file or folder of training rows.*--data"):
        recipe.build(recipe.read(file))
