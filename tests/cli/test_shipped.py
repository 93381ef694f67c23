"""Shipped recipes, `init`, `recipes`, `explain`, sources with weights, and the help of every verb."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from small_run import save_base, write_rows

from etude.arguments import TrainingArguments
from etude.cli import explain, recipe, shipped
from etude.cli import main as command
from etude.cli.defaults import Facts, training_settings
from etude.cli.rows import read_data
from etude.cli.sources import sources_of
from etude.errors import ConfigError

Capture = pytest.CaptureFixture[str]
VERBS = [[], ["train"], ["demo"], ["init"], ["recipes"], ["explain"], ["chat"], ["generate"], ["eval"], ["merge"], ["data"], ["data", "inspect"]]  # fmt: skip


def test_every_verbs_help_is_light_and_one_screen() -> None:
    script = (
        "import sys; from etude.cli.main import main\n"
        f"for words in {VERBS!r}: main([*words, '--help']); print('=====')\n"
        "print(*sorted({'torch', 'transformers', 'peft', 'numpy', 'rich'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.strip() == ""
    for words, screen in zip(VERBS, done.stdout.split("=====\n"), strict=False):
        lines = screen.splitlines()
        assert "Usage: etude" in lines[0], words
        assert len(lines) <= 40, words
        assert max(map(len, lines)) <= 80, words


# -- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shipped.names())
def test_a_shipped_recipe_is_valid_and_says_why(name: str) -> None:
    text = shipped.text_of(name)
    built = recipe.build(recipe.read(shipped.FOLDER / f"{name}.yaml"))
    facts = Facts(1, has_bfloat16=False, num_eval_rows=10, model_type="llama", hidden_size=2048)
    TrainingArguments(output_dir="out", report_to="none", **training_settings(built, facts))
    assert text.startswith("# ")
    assert {line.partition(":")[0] for line in text.splitlines()} >= {"model", "data", "output", "lora"}
    assert max(map(len, text.splitlines())) <= 120
    assert recipe.read(shipped.FOLDER / f"{name}.yaml")["lora.r"].value.data > 0


def test_the_kinds_that_people_ask_for_are_there() -> None:
    assert set(shipped.names()) == {"lora", "qlora", "dora", "long-context", "small-gpu", "cpu"}
    settings = {name: recipe.build(recipe.read(shipped.FOLDER / f"{name}.yaml")) for name in shipped.names()}
    assert settings["qlora"].quantization == "4bit"
    assert settings["dora"].lora.dora is True
    assert (settings["long-context"].max_length or 0) >= 16384
    assert settings["cpu"].training["use_cpu"] is True


def test_recipes_are_listed_and_printed(capsys: Capture) -> None:
    assert command.main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("lora ")
    assert max(map(len, lines)) <= 80
    assert command.main(["recipes", "qlora"]) == 0
    assert capsys.readouterr().out == shipped.text_of("qlora")
    assert command.main(["recipes", "qlorra"]) == 2
    assert "no recipe is called 'qlorra'; did you mean qlora?" in capsys.readouterr().err


def test_init_with_flags_writes_a_recipe_that_train_takes(tmp_path: Path, capsys: Capture) -> None:
    base = save_base(tmp_path / "my base")
    write_rows(Path("rows.jsonl"), [{"prompt": f"w{n}", "completion": f" w{n + 1}"} for n in range(8)])
    assert command.main(["init", "--model", str(base), "--data", "rows.jsonl", "--recipe", "cpu"]) == 0
    text = Path("recipe.yaml").read_text()
    assert text.count("#") == shipped.text_of("cpu").count("#")
    built = recipe.build(recipe.read("recipe.yaml"))
    assert (built.model, built.data) == (str(base), "rows.jsonl")
    assert command.main(["train", "recipe.yaml", "--dry-run"]) == 0
    assert command.main(["init", "--model", "m", "--data", "d", "--recipe", "cpu"]) == 2
    assert "--output: recipe.yaml is there already" in capsys.readouterr().err


def test_init_asks_three_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    answers = iter(["./base", "rows.jsonl", "dora"])

    def answer(question: str, default: Any = None) -> str:
        asked.append(question)
        return next(answers)

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("typer.prompt", answer)
    assert command.main(["init", "--output", "new.yaml"]) == 0
    assert [question.split()[0] for question in asked] == ["Base", "Training", "Recipe"]
    assert recipe.build(recipe.read("new.yaml")).lora.dora is True


def test_init_without_a_terminal_says_which_flag_is_missing(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    assert command.main(["init", "--model", "m"]) == 2
    assert "--data: missing, and there is no terminal to ask on" in capsys.readouterr().err


def test_dora_reaches_the_adapter(tmp_path: Path) -> None:
    from etude.cli import train

    write_rows(Path("rows.jsonl"), [{"prompt": f"w{n}", "completion": f" w{n + 1}"} for n in range(8)])
    base = save_base(tmp_path / "base")
    settings = train.gather(["--lora-dora", "--lora-targets", "q_proj", "--use-cpu"], {"model": str(base), "data": "rows.jsonl"}, [])  # fmt: skip
    prepared = train.prepare(recipe.build(settings), settings, trust_remote_code=False)
    assert any("lora_magnitude_vector" in name for name, _ in prepared.model.named_parameters())


@pytest.mark.parametrize(
    ("template", "text"), [("t.jinja", "w3 <|end|> w4 <|end|>"), ("plain", "<unk> <unk> w3 <unk> <unk> w4 <eos>")]
)
def test_a_named_template_travels_with_the_adapter(tmp_path: Path, template: str, text: str) -> None:
    from etude.cli import train
    from etude.cli.voice import Voice

    Path("t.jinja").write_text("{% for m in messages %}{{ m['content'] }} <|end|> {% endfor %}")
    turns = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
    write_rows(Path("rows.jsonl"), [{"messages": turns}])
    settings = train.gather(
        ["--template", template, "--eval-fraction", "0", "--use-cpu"],
        {"model": str(save_base(tmp_path / "base")), "data": "rows.jsonl"},
        [],
    )
    prepared = train.prepare(recipe.build(settings), settings, trust_remote_code=False)
    tokens = prepared.rows.train[0]["input_ids"]
    assert prepared.tokenizer.decode(tokens) == text
    prepared.tokenizer.save_pretrained("adapter")
    served = Voice(type(prepared.tokenizer).from_pretrained("adapter"), format="messages", template=None)
    assert served.prompt_of("w3") == tokens[:-2]
    expected = str(Path("t.jinja").resolve()) if template == "t.jinja" else "plain"
    assert prepared.recipe.template == expected


# -- explain ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(recipe.known_types()))
def test_every_setting_can_be_explained(name: str) -> None:
    text = explain.explanation(name)
    assert text.splitlines()[0] == name
    assert max(map(len, text.splitlines())) <= 80
    for label in ("type", "flag"):
        assert f"\n  {label} " in text


def test_reasons_name_settings_and_their_sources() -> None:
    assert set(explain.REASONS) <= set(recipe.known_types())
    assert set(recipe.own_types()) - {"model", "data", "output", "eval_data", "gguf_file"} <= set(explain.REASONS)


@pytest.mark.parametrize("spelling", ["lora.r", "--lora-r", "lora_r", "lora-r", "lora_rank", "rank"])
def test_a_setting_by_any_spelling(spelling: str, capsys: Capture) -> None:
    assert command.main(["explain", spelling]) == 0
    assert capsys.readouterr().out.startswith("lora.r\n")


def test_what_is_explained_is_what_is_used() -> None:
    assert "default  32" in explain.explanation("lora.r")
    assert "default  0.05" in explain.explanation("eval_fraction")
    assert "arXiv 2602.04998" in explain.explanation("lora.dora")
    assert "an old name of eval_strategy" in explain.explanation("evaluation_strategy")
    built = recipe.build({"model": recipe.typed("m", ""), "data": recipe.typed("d", "")})
    facts = Facts(1, has_bfloat16=False, num_eval_rows=10, model_type="x", hidden_size=None)
    used = training_settings(built, facts)
    for name, shown in explain.REASONS.items():
        if name in used and shown.default and not shown.default[0].isalpha():
            assert float(shown.default) == used[name], name
    assert explain.REASONS["global_batch_size"].default == str(used["per_device_train_batch_size"])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("packing", "'packing' is not needed: samples are packed"),
        ("learning_rat", "did you mean 'learning_rate'"),
        ("--zzzz", "'zzzz' is not a setting"),
    ],
)
def test_what_is_no_setting_is_answered(key: str, message: str, capsys: Capture) -> None:
    assert command.main(["explain", key]) == 2
    assert message in capsys.readouterr().err


# -- sources ----------------------------------------------------------------------------------------------------------


def rows_of(name: str, num_rows: int) -> str:
    return str(
        write_rows(Path(f"{name}.jsonl"), [{"prompt": f"{name} {n}", "completion": "w1"} for n in range(num_rows)])
    )


def chosen(text: str) -> recipe.Recipe:
    Path("run.yaml").write_text(f"model: m\n{text}")
    return recipe.build(recipe.read("run.yaml"))


def test_sources_have_weights() -> None:
    rows_of("a", 40), rows_of("b", 40), rows_of("c", 3)
    text = "data: [{path: a.jsonl, weight: 2}, {path: b.jsonl, weight: 0.25}, c.jsonl]\neval_fraction: 0\n"
    built = chosen(text)
    train_set, eval_set = read_data(built)
    counts = Counter(row["prompt"].split()[0] for row in train_set)
    assert (counts["a"], counts["c"], eval_set) == (80, 3, None)
    assert 3 <= counts["b"] <= 18
    assert set(Counter(row["prompt"] for row in train_set if row["prompt"][0] == "a").values()) == {2}
    assert train_set.origin(len(train_set) - 1) == ("c.jsonl", 3)
    # The recipe of the run says it again.
    Path("again.yaml").write_text(recipe.written(built))
    assert recipe.build(recipe.read("again.yaml")).data == built.data


def test_held_out_rows_are_there_once_and_never_trained_on() -> None:
    rows_of("a", 60)
    train_set, eval_set = read_data(chosen("data: [{path: a.jsonl, weight: 3}]\neval_fraction: 0.3\n"))
    assert eval_set is not None
    held_out = [row["prompt"] for row in eval_set]
    assert len(set(held_out)) == len(held_out) > 5
    assert not set(held_out) & {row["prompt"] for row in train_set}
    assert len(train_set) == 3 * (60 - len(held_out))


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "a", "wieght": 2}, "not 'wieght'; did you mean 'weight'"),
        ({"weight": 2}, "needs a path"),
        ({"path": "a", "weight": 0}, "the weight of a must be a positive number, got 0"),
        ({"path": "a", "weight": True}, "positive number"),
        ({"path": "a", "weight": float("nan")}, "positive number"),
    ],
)
def test_a_wrong_source_is_answered(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"data: .*{message}"):
        sources_of("data", [entry])


def test_a_source_that_is_not_there_is_named(capsys: Capture) -> None:
    Path("run.yaml").write_text("model: m\ndata: [{path: none.jsonl, weight: 2}]\n")
    assert command.main(["train", "run.yaml"]) == 2
    assert "data: 'none.jsonl': no such file or folder" in capsys.readouterr().err
