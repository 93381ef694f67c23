"""`etude doctor` reports what is there, says what to do about what is not, and answers by its exit code."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from etude.cli import doctor
from etude.cli import main as command
from etude.cli.doctor import BAD, GOOD, MISSING, Finding, is_within, judged, lines_of
from etude.observe import machine


def test_it_says_what_is_there_and_that_training_is_possible(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["doctor"]) == 0
    said = capsys.readouterr().out
    lines = said.splitlines()
    assert max(map(len, lines)) <= 80
    for title in ("Installation", "Devices", "Storage", "Optional"):
        assert title in lines
    for subject in ("python", "torch", "transformers", "peft", "processor", "this folder", "demo", "bitsandbytes"):
        assert any(line.split()[1:2] == [subject.split()[0]] for line in lines if line.startswith("  "))
    assert lines[-1] == "training is possible here"


def test_a_missing_package_makes_training_impossible(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    known = machine.version_of
    monkeypatch.setattr(machine, "version_of", lambda package: None if package == "peft" else known(package))
    assert command.main(["doctor"]) == 1
    said = capsys.readouterr().out
    assert "BAD  peft          not installed" in said and "-> pip install 'peft" in said
    assert "training is not possible here" in said


def test_a_version_outside_of_the_range_is_bad() -> None:
    assert judged("transformers", "5.23.0", ">=5.17,<6") == Finding(GOOD, "transformers", "5.23.0")
    found = judged("transformers", "4.57.1", ">=5.17,<6")
    assert (found.mark, found.way_out) == (BAD, "pip install 'transformers>=5.17,<6'")
    assert "supported is >=5.17,<6" in found.text


@pytest.mark.parametrize(
    ("version", "wanted", "expected"),
    [
        ("2.13.0+cpu", ">=2.11", True),
        ("2.11.0a0+git1", ">=2.11", True),
        ("2.9", ">=2.11", False),
        ("6.0.0", ">=5.17,<6", False),
        ("5.99", ">=5.17,<6", True),
        ("1.2.3", "!=1.2.3", False),
        ("1.2.3", "", True),
        ("unknown", ">=1", False),
    ],
)
def test_versions_are_compared_as_numbers(version: str, wanted: str, expected: bool) -> None:
    assert is_within(version, wanted) is expected


def test_an_extra_that_is_missing_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
    found = {finding.subject: finding for finding in doctor.optional()}
    assert {finding.mark for finding in found.values()} == {MISSING}
    assert found["wandb"].way_out == "pip install 'etude[wandb]'"
    assert found["pillow"].way_out == "pip install pillow"


def cuda(*, cards: int = 0, major: int = 9) -> Any:
    card = SimpleNamespace(name="H100", total_memory=80 * 2**30, major=major)
    return SimpleNamespace(
        is_available=lambda: cards > 0, device_count=lambda: cards, get_device_properties=lambda index: card
    )


@pytest.mark.parametrize(
    ("torch", "has_card", "text"),
    [
        (SimpleNamespace(cuda=cuda(cards=2)), True, "H100, 80 GiB, bfloat16"),
        (SimpleNamespace(cuda=cuda(cards=1, major=7)), True, "no bfloat16"),
        (SimpleNamespace(cuda=cuda(), version=SimpleNamespace(cuda=None)), True, "torch is built without CUDA"),
        (SimpleNamespace(cuda=cuda(), version=SimpleNamespace(cuda="13.0")), True, "built for CUDA 13.0, but no GPU"),
        (SimpleNamespace(cuda=cuda(), version=SimpleNamespace(cuda="13.0")), False, "training runs on the processor"),
    ],
)
def test_gpus(torch: Any, has_card: bool, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "has_nvidia_card", lambda: has_card)
    found = list(doctor._accelerators(torch))
    assert text in found[0].text
    assert all(finding.mark != BAD for finding in found)  # a processor is enough


def test_a_cache_that_cannot_be_written_to_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ETUDE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(Path("caches").absolute()))
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setattr(doctor.os, "access", lambda folder, mode: False)
    caches = {finding.subject: finding for finding in doctor.storage() if "cache" in finding.subject}
    assert {finding.mark for finding in caches.values()} == {MISSING}
    assert str(Path("caches/etude").absolute()) in caches["etude cache"].text
    assert "set XDG_CACHE_HOME" in caches["hub cache"].way_out
    assert not Path("caches").exists()


def test_kept_tokens_are_weighed(cache_of_its_own: Path) -> None:
    def told() -> str:
        [finding] = [finding for finding in doctor.storage() if finding.subject == "kept tokens"]
        return finding.text

    assert told() == "none"
    assert not (cache_of_its_own / "tokens").exists()  # looking makes no folder
    entry = cache_of_its_own / "tokens" / "key"
    entry.mkdir(parents=True)
    (entry / "MANIFEST.json").write_bytes(b"{}")
    (entry / "rows.input_ids").write_bytes(bytes(3 * 2**20))
    assert told() == f"3.0 MiB of 1 data set in {entry.parent}"
    [finding] = [finding for finding in doctor.storage() if finding.subject == "kept tokens"]
    assert "delete the folder" in finding.way_out and "--no-keep-tokens" in finding.way_out


def test_without_a_home_the_rest_is_examined(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ETUDE_CACHE", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where nothing is known of the user
    found = {finding.subject: finding for finding in doctor.storage()}
    assert found["etude cache"].mark == found["hub cache"].mark == MISSING
    assert "ETUDE_CACHE" in found["etude cache"].way_out and found["kept tokens"].text == "none"


def test_long_findings_are_wrapped() -> None:
    lines = lines_of(Finding(BAD, "torch", "words " * 40, "pip install " + "x " * 60))
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("  BAD  torch         words")
    assert any(line.strip().startswith("-> pip install") for line in lines)
