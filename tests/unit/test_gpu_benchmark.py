"""`benchmarks/gpu.py`: tried out on a CPU; what is left out, missing or failed is said, and what is done is kept."""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    return importlib.import_module("benchmarks.gpu")


@pytest.fixture
def timed_run(gpu: ModuleType) -> ModuleType:
    return importlib.import_module("benchmarks.timed_run")


def fake_python(monkeypatch: pytest.MonkeyPatch, *body: str) -> None:
    """Stands in for the process of a contender; `asked` is what it was asked for."""
    script = Path("fake").absolute()
    head = ["import json, sys, time", "asked = json.loads(sys.argv[3])", "lines = open(asked['lines'], 'a')"]
    script.write_text("\n".join([f"#!{sys.executable} -S", *head, *body]))
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))


RESULT: dict[str, Any] = {
    "tokens_per_second": 50.0, "peak_gib": 1.0, "seconds_to_first_step": 2.0, "seconds_to_full_speed": 3.0, "loss": 4.5,
    "loss_is_of_the_same_rows": True, "gemm_flops": 1e12, "device": "a card",
}  # fmt: skip
WRITE = f"print(json.dumps({RESULT!r} | {{'work': asked['works'][0], 'contender': asked['contender']}}), file=lines)"
TINY = ("--device", "cpu", "--work", "tiny", "--output", "out/found")


def found() -> tuple[dict[str, Any], str]:
    return json.loads(Path("out/found.json").read_text()), Path("out/found.md").read_text()


@pytest.mark.slow
def test_both_do_the_same_work_in_processes_of_their_own(gpu: ModuleType) -> None:
    gpu.main([*TINY, "--contender", "etude", "transformers", "--rounds", "1", "--check"])
    report, table = found()
    runs = report["results"]["tiny"]
    (ours,), (theirs,) = runs["etude"], runs["transformers"]
    assert ours["path"] == "packed"
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert ours["loss_steps"] == theirs["loss_steps"] == 5
    for run in (ours, theirs):
        assert 0 < run["seconds_to_first_step"] <= run["seconds_to_full_speed"]
        assert run["tokens_per_second"] > 0 and run["peak_gib"] > 0
    assert ours["check"]["is_fine"] and 0 < ours["check"]["gradient_error"] < 1e-4
    assert report["gemm_tflops"] > 0 and report["versions"]["torch"]
    assert "| tiny | etude |" in table and "| tiny | transformers |" in table


def test_rounds_take_turns_and_give_a_median_and_a_range(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    speeds = iter([100.0, 10.0, 300.0, 10.0, 120.0, 10.0])

    def run(asked: dict[str, Any], stop_at: float | None, work_seconds: float, report: Any) -> None:
        order.append(asked["contender"])
        now = {"work": asked["works"][0], "contender": asked["contender"], "tokens_per_second": next(speeds)}
        report.add(RESULT | now)

    monkeypatch.setattr(gpu, "run_process", run)
    gpu.main([*TINY, "--contender", "etude", "transformers", "--rounds", "3"])
    assert order == ["etude", "transformers"] * 3
    assert "| tiny | etude | 120 (100 to 300) |" in found()[1]
    assert "| tiny | transformers | 10 |" in found()[1]


def test_a_peer_that_is_not_installed_is_listed(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "is_installed", lambda name: name == "etude")
    monkeypatch.setattr(gpu, "run_process", lambda *args: None)
    gpu.main([*TINY, "--contender", "etude", "liger"])
    assert found()[0]["not_installed"] == ["liger"]
    assert "Not installed: liger." in found()[1]


def test_what_was_done_before_a_process_died_is_kept(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_python(monkeypatch, WRITE, "lines.flush()", "sys.exit(7)")
    works = ["--work", "tiny", "llama-1b-ragged", "llama-8b-4x1024", "--together", "--rounds", "1"]
    gpu.main(["--device", "cpu", *works, "--contender", "etude", "--output", "out/found"])
    report, table = found()
    assert report["results"]["tiny"]["etude"][0]["loss"] == 4.5
    assert report["results"]["llama-1b-ragged"]["etude"][0]["error"] == "the process ended with 7"
    assert report["left_out"] == ["etude on llama-8b-4x1024 (round 1)"]
    assert "the process ended with 7" in table


def test_a_process_that_hangs_is_ended(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_python(
        monkeypatch,
        f"open({str(Path('pid').absolute())!r}, 'w').write(str(__import__('os').getpid()))",
        "time.sleep(60)",
    )
    gpu.main([*TINY, "--contender", "etude", "--rounds", "1", "--work-seconds", "1"])
    assert found()[0]["results"]["tiny"]["etude"][0]["error"] == "took more than 1 s"
    with pytest.raises(ProcessLookupError):
        os.kill(int(Path("pid").read_text()), 0)


def test_nothing_is_started_after_the_budget(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_python(monkeypatch, "time.sleep(0.3)", WRITE)
    gpu.main([*TINY, "--contender", "etude", "transformers", "--rounds", "1", "--budget-seconds", "0.2"])
    report, table = found()
    assert list(report["results"]["tiny"]) == ["etude"]
    assert report["left_out"] == ["transformers on tiny (round 1)"]
    assert "Left out for want of time: transformers on tiny (round 1)." in table


@pytest.mark.parametrize("name", ["nobody", "transformers@20"])
def test_a_contender_that_there_is_not_is_refused(
    gpu: ModuleType, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--contender", name])
    assert name in capsys.readouterr().err


def test_full_speed_is_the_first_step_near_the_median(timed_run: ModuleType) -> None:
    clock = timed_run.Clock(warmup=3, steps=3, device="cpu")
    clock.marks = [0.0, 4.0, 5.0, 5.5, 6.0, 6.5, 7.0]
    found = timed_run.figures(clock, [100, 40, 50, 50, 50, 50], warmup=3, steps=3)
    assert found["seconds_to_first_step"] == 4.0
    assert (found["seconds_to_full_speed"], found["steps_to_full_speed"]) == (5.5, 3)
    assert found["tokens_per_second"] == 100.0
