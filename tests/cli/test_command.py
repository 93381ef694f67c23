"""The command as a user meets it: help, exit codes, error lines, a dry run and a whole run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from etude import __version__
from etude.cli import main as command
from etude.cli import recipe
from etude.errors import CheckpointError, ConfigError, DataError, Interrupted, NonFiniteError
from tiny import tiny_llama, tiny_tokenizer


def etude(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the real command in a process of its own; it reports the heavy modules that it imported."""
    script = (
        "import sys; from etude.cli.main import main; code = main();"
        "print(*sorted({'torch', 'transformers', 'peft', 'numpy', 'rich'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    return subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("words", [["--help"], ["train", "--help"], ["demo", "--help"], []])
def test_help_is_light_and_fits_eighty_columns(words: list[str]) -> None:
    done = etude(*words)
    assert done.returncode == 0
    assert done.stderr.strip() == ""
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert "Usage: etude" in done.stdout


def test_a_typo_is_answered_without_importing_anything_heavy() -> None:
    done = etude("train", "--learning-rat", "1e-4")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == ("error: etude train: --learning-rat is not a setting; did you mean --learning-rate?\n\n")


def test_a_wrong_recipe_is_answered_without_importing_anything_heavy() -> None:
    Path("run.yaml").write_text("model: ./base\ndata: rows.jsonl\nmicro_batch_size: 4\n")
    done = etude("train", "run.yaml")
    assert done.returncode == 2
    assert done.stderr.strip() == "error: run.yaml:3: 'micro_batch_size' is 'per_device_train_batch_size' here"


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--version"]) == 0
    assert capsys.readouterr().out == f"etude {__version__}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'?"),
        (["--nonsense"], "No such option: --nonsense"),
        (["train"], "model: missing: the folder or Hub name of the base model (--model"),
        (["train", "--model", "m"], "data: missing"),
        (["train", "--model", "m", "--data", "none.jsonl"], "data: 'none.jsonl': no such file or folder"),
        (["train", "none.yaml"], "none.yaml: no such recipe"),
        (["train", "--model", "m", "--data", ".", "--resume", "nowhere"], "--resume: 'nowhere' is no folder"),
        (["train", "--model", "m", "--data", ".", "--learning_rate", "nan"], "learning_rate"),
        (["train", "--model", "m", "--data", ".", "--save-steps", "-3"], "(--save-steps)"),
        (["train", "--model", "m", "--data", ".", "--fsdp", "full_shard"], "fsdp"),
        (["train", "--set", "x"], "--set: expected a.b=c"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_exit_code_two(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(words) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert printed.err.startswith("error: ")
    assert message in printed.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("wrong"), 2),
        (DataError("wrong", file="a.jsonl", line=3), 1),
        (CheckpointError("wrong"), 1),
        (NonFiniteError("loss is nan", step=3), 1),
        (Interrupted("stopped", exit_code=143, step=3), 143),
        (Interrupted("stopped", exit_code=130, step=3), 130),
        (KeyboardInterrupt(), 130),
        (typer.Abort(), 130),
    ],
)
def test_exit_codes(error: BaseException, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(command, "app", fail)
    assert command.main(["train"]) == code
    with pytest.raises(type(error)):
        command.main(["train", "--debug"])


def test_a_defect_is_not_hidden_behind_a_red_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(command, "app", fail)
    with pytest.raises(ZeroDivisionError):
        command.main(["train"])


def test_none_refuses_to_mix_with_an_earlier_run(capsys: pytest.CaptureFixture[str]) -> None:
    Path("out/checkpoint-8").mkdir(parents=True)
    assert command.main(["train", "--model", "m", "--data", ".", "--output", "out", "--resume", "none"]) == 2
    assert "holds checkpoint-8 of an earlier run" in capsys.readouterr().err


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    tiny_llama().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    lines = [{"prompt": f"w{n} w{n + 1}", "completion": f" w{n + 2} w{n + 3}"} for n in range(40)]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def test_a_dry_run_shows_everything_and_writes_nothing(
    base: Path, rows: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("run.yaml").write_text(f"model: {base}\ndata: {rows}\noutput: run\nlora: {{r: 4}}\nmax_steps: 5\n")
    assert command.main(["train", "run.yaml", "--max-steps", "6", "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    said = {line.split()[0]: line.split(maxsplit=1)[1] for line in lines if line and line[0] != " "}
    assert said["max_steps"] == "6  (--max-steps)"
    assert said["lora.r"] == "4  (run.yaml:4)"
    assert said["lora.alpha"] == "32  (default)"
    assert said["warmup_ratio"] == "0.03  (default)"
    assert said["batch"] == "16 rows per update = 16 per device x 1 accumulated x 1 process"
    assert "supervised" in said["train"]
    assert any("parameters are trained" in line for line in lines)
    assert not Path("run").exists()


def test_a_whole_run_and_its_repetition(base: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--model", str(base), "--data", str(rows), "--output", "run", "--lora-r", "4", "--max-steps", "6"]
    assert command.main([*words, "--eval-fraction", "0.2", "--learning-rate", "1e-2", "--use-cpu"]) == 0
    assert "trained 6 steps" in capsys.readouterr().out
    adapter = Path("run/adapter_model.safetensors").read_bytes()
    saved = recipe.build(recipe.read("run/recipe.yaml"))
    assert (saved.model, saved.lora.r, saved.training["learning_rate"]) == (str(base), 4, 1e-2)
    assert saved.global_batch_size == 16

    assert command.main(["train", "run/recipe.yaml", "--output", "again"]) == 0
    assert Path("again/adapter_model.safetensors").read_bytes() == adapter

    assert command.main(["train", "run/recipe.yaml"]) == 0  # resumes a finished run: nothing is left to do
    assert Path("run/adapter_model.safetensors").read_bytes() == adapter
