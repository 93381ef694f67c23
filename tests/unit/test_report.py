"""The report and the model card: whole, self-contained, harmless whatever stands in the data, and without secrets."""

from __future__ import annotations

import importlib
import json
import re
import time
from collections.abc import Callable
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from etude import write_report
from etude.callbacks import TrainerControl, TrainerState
from etude.cli import main as command
from etude.errors import ConfigError, MissingDependencyError
from etude.observe import run_log
from etude.observe.concerns import starvation
from etude.observe.console import PrinterCallback, ProgressCallback, SmoothedLoss, extended, speed_words
from etude.observe.curves import Chart, Curve, charts_of, frame_of, label_of, loss_chart, png, svg, ticks
from etude.observe.report import Report, ShownSample, page, write, write_atomically
from etude.observe.start_screen import Concern
from etude.observe.throughput import ThroughputCallback
from etude.reporting import write_model_card
from short_run import short_trainer
from tiny import classification_rows, language_rows, tiny_bert, tiny_llama, tiny_tokenizer, with_lora

HOSTILE = "<script>alert(1)</script>\x1b[2J<img src=x onerror=alert(1)> ${title} $body \u202egnp.exe {{7*7}} \x00\x07"
HISTORY = [
    {"step": step, "loss": 3 - step / 20, "learning_rate": 1e-4, "grad_norm": 1.5, "epoch": step / 10}
    for step in range(1, 41)
] + [{"step": 20, "eval_loss": 2.2}, {"step": 40, "eval_loss": 1.1}, {"step": 40, "train_loss": 2.0}]

VOID = {"meta", "br"}


class Page(HTMLParser):
    """Balanced tags, and everything that could load or run something."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


def report(**changes: Any) -> Report:
    content: dict[str, Any] = {
        "title": "base, fine-tuned",
        "subtitle": "LoRA",
        "figures": [("last training loss", "1.0")],
        "log_history": HISTORY,
        "happened": ["resumed checkpoint-20"],
        "concerns": [Concern("a problem", "a fix")],
        "run": [("model", ["base", "LlamaForCausalLM"])],
        "settings": {"learning_rate": 1e-4, "nothing": None},
        "environment": {"torch": "2.13"},
        "usage": [("Talk to it:", "etude chat run")],
        "samples": [ShownSample("a prompt", "before text", "after text")],
    }
    return Report(**(content | changes))


# ---------------------------------------------------------------- the page


def test_the_page_has_everything_and_needs_nothing() -> None:
    shown = Page(page(report()))
    for word in (
        "base, fine-tuned",
        "resumed checkpoint-20",
        "a problem",
        "before text",
        "after text",
        "etude chat run",
    ):
        assert word in shown.words
    assert "nothing" not in shown.words  # a setting without a value
    assert shown.tags.count("svg") == 3
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "form"} & set(shown.tags)
    assert not [name for name, _ in shown.attributes if name.startswith("on") or name in ("src", "href", "style")]
    assert not re.search(r"url\(|@import|https?:", page(report()))
    assert "prefers-color-scheme: dark" in page(report())
    assert "default-src 'none'" in page(report())


def test_hostile_text_is_shown_and_does_nothing() -> None:
    content = page(
        report(
            title=HOSTILE,
            subtitle=HOSTILE,
            figures=[(HOSTILE, HOSTILE)],
            log_history=[*HISTORY, {"step": 3, f"eval_{HOSTILE}_loss": 1.0}],
            happened=[HOSTILE],
            concerns=[Concern(HOSTILE, HOSTILE)],
            run=[(HOSTILE, [HOSTILE])],
            settings={HOSTILE: HOSTILE, "inner": {HOSTILE: [HOSTILE]}},
            environment={HOSTILE: HOSTILE},
            usage=[(HOSTILE, HOSTILE)],
            samples=[ShownSample(HOSTILE, HOSTILE, HOSTILE, HOSTILE)],
            skipped_rows=[HOSTILE] * 30,
        )
    )
    shown = Page(content)
    assert not {"script", "img"} & set(shown.tags)
    assert not [name for name, _ in shown.attributes if name.startswith("on")]
    assert "<script>alert(1)</script>" in shown.words and "\\x1b[2J" in shown.words
    assert all(character.isprintable() or character == "\n" for character in content)
    assert "${title} $body" in shown.words
    assert "and 10 more" in shown.words


def test_secrets_are_never_in_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_fromTheEnvironment")
    monkeypatch.setenv("WANDB_API_KEY", 'k3y&"fromTheEnvironment')
    monkeypatch.setenv("HARMLESS", "harmless value")
    settings = {
        "hub_token": "hf_plantedInTheArguments",
        "tracker": {"api_key": "deepPlanted", "name": "shown name"},
        "note": 'k3y&"fromTheEnvironment hf_fromTheEnvironment hf_toldByTheCaller harmless value',
        "tokens_per_micro_batch": 1024,
    }
    write(report(settings=settings), tmp_path, secrets=["hf_toldByTheCaller"])
    content = (tmp_path / "report.html").read_text()
    for secret in ("planted", "Planted", "fromTheEnvironment", "toldByTheCaller"):
        assert secret not in content
    assert all(word in content for word in ("harmless value", "shown name", "tokens_per_micro_batch"))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "report.html"
    write_atomically(file, b"old")
    (tmp_path / "plain").write_bytes(b"")
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode

    def fail(*_: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(file, b"new")
    assert file.read_bytes() == b"old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["plain", "report.html"]


# ---------------------------------------------------------------- curves


def test_charts_follow_the_log() -> None:
    loss, rate, norm = charts_of(HISTORY)
    assert [curve.name for curve in loss.curves] == ["training loss", "smoothed", "eval loss"]
    assert loss.curves[2].points == ((20, 2.2), (40, 1.1))
    assert (rate.title, norm.title) == ("Learning rate", "Gradient norm")
    assert charts_of([]) == [] and loss_chart([]) is None
    broken = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": "x"}, {"loss": 2.0}, {"step": 3, "loss": 1.0}]
    assert charts_of(broken)[0].curves[0].points == ((3, 1.0),)
    many = charts_of({"step": step, "loss": 1.0} for step in range(50_000))
    assert len(many[0].curves[0].points) <= 1000


@pytest.mark.parametrize("values", [(0.0, 1.0), (3.2, 3.2), (0.0, 0.0), (1e-9, 2e-4), (-5.0, 1e6), (2.31, 2.32)])
def test_every_point_lies_inside_its_frame(values: tuple[float, float]) -> None:
    low, high = values
    chart = Chart("x", (Curve("x", ((1.0, low), (1.0 if low == high else 70.0, high))),))
    frame = frame_of(chart)
    for step, value in chart.curves[0].points:
        assert frame.left - 0.1 <= frame.x(step) <= frame.right + 0.1
        assert frame.top - 0.1 <= frame.y(value) <= frame.bottom + 0.1
    labels = [label_of(tick) for tick in frame.y_ticks]
    assert len(set(labels)) == len(labels) and 2 <= len(labels) <= 8
    Page(svg(chart))


def test_ticks_are_round() -> None:
    assert ticks(0.13, 0.97, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(1, 7, 6, whole=True) == [1, 2, 3, 4, 5, 6, 7]
    assert [label_of(value) for value in (0.0, 2e-4, 0.25, 1200.0)] == ["0", "2e-4", "0.25", "1,200"]


def test_the_picture_without_pillow_is_left_out_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str, **_: Any) -> object:
        raise MissingDependencyError(package)

    monkeypatch.setattr("etude.observe.curves.require", missing)
    [line] = write(report(), tmp_path)
    assert "pip install pillow" in line
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_the_picture_is_a_png_of_the_loss(tmp_path: Path) -> None:
    try:
        images: Any = importlib.import_module("PIL.Image")
    except ImportError:  # an optional package: the test above covers its absence
        chart = loss_chart(HISTORY)
        assert chart is not None and png(chart) is None
        return
    assert write(report(), tmp_path) == []
    with images.open(tmp_path / "loss.png") as picture:
        assert picture.size == (1800, 840) and picture.format == "PNG"
        assert len(picture.getcolors(100_000)) > 10


# ---------------------------------------------------------------- of a trainer


def test_a_finished_run_leaves_a_report_and_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_inTheEnvironment")
    rows = language_rows(10)
    trainer = short_trainer(
        rows=rows,
        eval_rows=rows[:3],
        eval_strategy="epoch",
        num_train_epochs=2,
        processing_class=tiny_tokenizer(),
        hub_token="hf_inTheArguments",
    )
    trainer.model.get_base_model().config._name_or_path = "maker/base"
    trainer.train()
    trainer.save_model()
    before = [dict(entry) for entry in trainer.state.log_history]
    path = write_report(trainer, samples=[ShownSample(HOSTILE, "b", "a", "e")])
    assert trainer.state.log_history == before
    assert path == Path("out/report.html")
    shown = Page(path.read_text())
    for word in (
        "base, fine-tuned",
        "10 updates",
        "best eval loss",
        "LoRA r 8",
        "10 samples",
        "etude chat out",
        "peft",
    ):
        assert word in shown.words
    card = write_model_card(trainer).read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "maker/base",
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["base_model:adapter:maker/base", "lora", "etude"],
    }
    loss = next(entry["loss"] for entry in reversed(before) if "loss" in entry)
    assert f"| last training loss | {loss:.4f} |" in body
    assert "from peft import AutoPeftModelForCausalLM" in body and "etude chat ." in body
    for written in (path.read_text(), card):
        assert "inTheArguments" not in written and "inTheEnvironment" not in written


def test_what_the_card_says_of_loading_works() -> None:
    trainer = short_trainer(num_train_epochs=1, processing_class=tiny_tokenizer())
    trainer.train()
    base = Path("base").resolve()
    tiny_llama().save_pretrained(base)  # of the same seed as the trained one
    trainer.model.peft_config["default"].base_model_name_or_path = str(base)
    trainer.save_model()
    card = write_model_card(trainer).read_text()
    [code] = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("'.'", "'out'"), names)  # noqa: S102 - the card's own code, as a reader would run it
    tokens = torch.tensor([[5, 6, 7]])
    trainer.model.eval()
    assert torch.equal(names["model"](tokens).logits, trainer.model(tokens).logits)


def test_a_card_cannot_be_broken_by_names() -> None:
    trainer = short_trainer(num_train_epochs=1)
    trainer.model.get_base_model().config._name_or_path = "x\n---\nlicense: mit | <b>`$(a)`</b> \x1b[2J"
    trainer.train()
    card = write_model_card(trainer).read_text()
    _, front, body = re.split(r"(?m)^---$", card, maxsplit=2)
    assert set(yaml.safe_load(front)) == {"base_model", "library_name", "pipeline_tag", "tags"}
    assert "<b>" not in body and "\x1b" not in body


def test_a_report_before_training_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing was trained yet"):
        write_report(short_trainer())


def test_a_model_of_another_kind_gets_a_report() -> None:
    model = with_lora(tiny_bert(), task_type="SEQ_CLS", target_modules=["query"])
    trainer = short_trainer(model, classification_rows(8), num_train_epochs=1)
    trainer.train()
    assert "AutoPeftModel" in Page(write_report(trainer).read_text()).words


@pytest.fixture
def words() -> list[str]:
    """The command line of a short run."""
    tiny_llama().save_pretrained("base")
    tiny_tokenizer().save_pretrained("base")
    rows = [{"prompt": f"w{n} w{n + 1}", "completion": f" w{n + 2} w{n + 3}"} for n in range(40)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", "--model", "base", "--data", "rows.jsonl", "--output", "run", "--lora-r", "4", "--use-cpu"]
    return [*words, "--eval-fraction", "0.2", "--max-steps", "12"]


def test_the_command_shows_the_screen_and_leaves_everything(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main([*words, "--learning-rate", "5e-5"]) == 0
    printed = capsys.readouterr()
    assert "warning   a learning rate of 5e-05 suits full fine-tuning" in printed.out
    assert "path      packed: padding removed, samples packed" in printed.out
    assert "packed path:" not in printed.err  # once is enough
    assert "report:  " in printed.out
    here = str(Path.cwd())  # as long as the folder of the test happens to be
    lines = [line.replace(here, ".") for line in printed.out.splitlines() if not line.startswith("step ")]
    assert max(map(len, lines)) <= 80
    shown = Page(Path("run/report.html").read_text()).words
    assert "lora.r" in shown and "best eval loss" in shown and "Nothing: one start" not in shown  # the warning is there
    assert "goes on after" not in shown
    assert Path("run/README.md").read_text().startswith("---\nbase_model: ")
    assert "rows.jsonl" not in Path("run/README.md").read_text()  # a card travels, this folder does not
    assert command.main([*words, "--learning-rate", "5e-5"]) == 0  # goes on from its last checkpoint, and says so
    assert "resumed checkpoint-12" in Path("run/run.log").read_text()
    assert "resumed checkpoint-12" in Page(Path("run/report.html").read_text()).words


def test_a_run_that_fails_says_what_was_held_back(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*words, "--learning-rate", "1e30", "--max-grad-norm", "0"]) == 1
    printed = capsys.readouterr()
    assert "the run failed: step" in Path("run/run.log").read_text()
    assert printed.err.count("error: step") == 1


def test_a_dry_run_measures_the_time_and_changes_nothing(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([*words, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"(?m)^time      about \d+ s$", said)
    assert said.count("packed: padding removed") == 1
    assert not Path("run").exists()


# ---------------------------------------------------------------- what happened


def test_the_log_of_a_run_spans_its_starts(tmp_path: Path) -> None:
    said: list[str] = []

    def noon() -> datetime:
        return datetime(2026, 7, 30, 12)

    run_log.RunLog(tmp_path, said.append, noon).write("etude: stopped by SIGTERM after step 3\n")
    run_log.RunLog(tmp_path, said.append, noon).write("etude: resumed checkpoint-3 \x1b[2J\n")
    assert said[0] == "etude: stopped by SIGTERM after step 3\n"
    assert run_log.read(tmp_path) == [
        "2026-07-30 12:00:00  stopped by SIGTERM after step 3",
        "2026-07-30 12:00:00  resumed checkpoint-3 \\x1b[2J",
    ]
    assert run_log.read(tmp_path / "nowhere") == []


def test_restarts_are_in_the_report_and_ordinary_lines_are_not() -> None:
    trainer = short_trainer(num_train_epochs=1)
    trainer.train()
    log = run_log.RunLog("out", lambda text: None)
    for line in (
        "packed path: padding removed",
        "resumed checkpoint-3",
        "9 steps of 2 samples (2 x 1)",
        "out of memory",
    ):
        log.write(f"etude: {line}\n")
    shown = Page(write_report(trainer).read_text()).words
    assert "resumed checkpoint-3" in shown and "out of memory" in shown
    assert "packed path: padding removed" not in shown and "steps of 2 samples" not in shown


# ---------------------------------------------------------------- speed


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_speed_counts_steps_and_not_evaluations() -> None:
    clock, control, args = Clock(), TrainerControl(), SimpleNamespace(device="cpu")
    meter = ThroughputCallback(clock)
    meter.on_train_begin(args, TrainerState(max_steps=10), control)
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])
    for step in (1, 2):
        state = TrainerState(global_step=step, max_steps=10)
        meter.count({"attention_mask": mask}, padding_is_removed=True)
        clock.now += 2
        meter.on_step_end(args, state, control)
        clock.now += 100
        meter.on_evaluate(args, state, control)
    logs = {"loss": 1.0}
    meter.on_log(args, state, control, logs=logs)
    assert logs == {"loss": 1.0}
    assert meter.figures["tokens_per_second"] == 2.0 and meter.figures["padding_avoided"] == 0.5
    assert meter.figures["memory_gib"] > 0.01
    assert (meter.seconds_per_step, meter.seconds_left) == (2.0, 16.0)
    assert meter.mean_tokens_per_second == 2.0
    meter.on_log(args, state, control, logs={"eval_loss": 1.0})
    assert meter.figures == {} and meter.seconds_left is None


def waiting_meter(shares: list[float], seconds: float = 2.0) -> ThroughputCallback:
    """A meter that saw a logged step of some seconds for each share of it that was spent waiting."""
    clock, control, args = Clock(), TrainerControl(), SimpleNamespace(device="cpu")
    meter = ThroughputCallback(clock)
    with meter.waiting_for_data():  # the first step is loaded before training begins, which nobody waits for
        clock.now += 50
    meter.on_train_begin(args, TrainerState(max_steps=10), control)
    for step, share in enumerate(shares, start=1):
        state = TrainerState(global_step=step, max_steps=10)
        with meter.waiting_for_data():
            clock.now += share * seconds
        clock.now += (1 - share) * seconds
        meter.on_step_end(args, state, control)
        meter.on_log(args, state, control, logs={"loss": 1.0})
    return meter


def test_a_loader_that_starves_the_device_is_seen() -> None:
    meter = waiting_meter([0.1, 0.5])
    assert meter.figures["waiting_for_data"] == 0.5
    assert meter.mean_waiting_for_data == pytest.approx(0.3) and meter.seconds_waited == pytest.approx(1.2)
    assert speed_words(meter)[0] == "waits for data 50%"
    assert not any("data" in word for word in speed_words(waiting_meter([0.05])))


def test_what_starved_a_run_is_said_at_its_end() -> None:
    def said(share: float, seconds: float = 60, num_workers: int = 0, is_on_gpu: bool = False) -> str | None:
        return starvation(waiting_meter([share], seconds), num_workers=num_workers, is_on_gpu=is_on_gpu)

    assert said(0.4) == (
        "40% of the training time went into waiting for rows; dataloader_num_workers=2 prepares batches in processes of "
        "their own"
    )
    assert "more than 3 dataloader_num_workers" in str(said(0.4, num_workers=3))
    assert str(said(0.4, is_on_gpu=True)).startswith("up to 40%")
    assert said(0.05) is None and said(0.4, seconds=10) is None
    assert starvation(ThroughputCallback(), num_workers=0, is_on_gpu=False) is None


def test_a_slow_dataset_is_in_the_report(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    class Slow(list[Any]):
        def __getitem__(self, index: Any) -> Any:
            time.sleep(0.02)
            return super().__getitem__(index)

    monkeypatch.setattr("etude.observe.concerns.NOTABLE_WAIT_SECONDS", 0.0)
    trainer = short_trainer(max_steps=3, logging_steps=1)
    trainer.train_dataset = Slow(trainer.train_dataset)
    trainer.train()
    share = trainer.throughput.mean_waiting_for_data
    assert share is not None and 0.2 < share <= 1
    assert "of the training time went into waiting for rows" in capsys.readouterr().err
    page = write_report(trainer).read_text()
    assert "waiting for data" in page and "went into waiting for rows" in page


def test_speed_is_in_the_metrics_file_and_the_lines_and_nowhere_else(capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[set[str]] = []

    class Watcher:
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            seen.append(set(logs))

    trainer = short_trainer(num_train_epochs=1, callbacks=[Watcher()])
    trainer.train()
    extra = {"tokens_per_second", "padding_avoided", "waiting_for_data", "memory_gib"}
    assert not any(extra & keys for keys in seen)
    assert not any(extra & set(entry) for entry in trainer.state.log_history)
    rows = [json.loads(line) for line in Path("out/metrics.jsonl").read_text().splitlines()]
    assert all(extra <= set(row) for row in rows if "loss" in row) and not extra & set(rows[-1])
    [first, *_] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1/")]
    assert " tok/s" in first and first.endswith("%") and " GiB" in first


@pytest.mark.parametrize(
    ("columns", "line"), [(None, "step  10 tok/s  2 min left"), (20, "step  10 tok/s"), (4, "step"), (200, None)]
)
def test_a_line_is_extended_as_far_as_it_fits(columns: int | None, line: str | None) -> None:
    assert extended("step", ["10 tok/s", "2 min left"], columns) == (line or "step  10 tok/s  2 min left")


@pytest.mark.parametrize("make", [PrinterCallback, ProgressCallback])
def test_lines_without_a_meter_are_as_they_were(make: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    make().on_log(SimpleNamespace(), TrainerState(global_step=1, max_steps=2), TrainerControl(), logs={"loss": 1.0})
    assert capsys.readouterr().out == "step 1/2  loss 1.0000\n"


def test_the_smoothed_loss_starts_right_and_follows() -> None:
    loss = SmoothedLoss()
    assert loss.after(4.0) == pytest.approx(4.0)
    assert 3 < loss.after(3.0) < 4
    assert loss.after("oops") == "oops"
    for _ in range(200):
        settled = loss.after(1.0)
    assert settled == pytest.approx(1.0, abs=1e-6)
