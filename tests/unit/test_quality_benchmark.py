"""`benchmarks/quality.py`: what is held out, that the contenders do the same work, and how answers are scored."""

from __future__ import annotations

import argparse
import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from etude import precision
from tiny import tiny_llama, tiny_tokenizer

REPOSITORY = Path(__file__).parents[2]
REFERENCES = {
    f"w{number} | w{number + 1}": [f"w{number} w{word}" for word in range(1 + number % 4)] for number in range(20)
}


@pytest.fixture
def quality(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPOSITORY))
    return importlib.import_module("benchmarks.quality")


def report_of(*runs: dict[str, Any]) -> dict[str, Any]:
    same = {"steps": 3, "tokens": 90, "losses": [1.0], "seed": 1}
    held_out = {"a": ["The cat sat on the mat .", "A cat sat down ."], "b": ["A dog barked at the postman ."]}
    return {"held_out": held_out, "runs": [same | run for run in runs]}


def test_lines_become_meanings_with_all_their_sentences(quality: ModuleType) -> None:
    Path("pairs.txt").write_text("name : A||One .\nname : B||Two .\nname : A|| Three .\n")
    assert quality.read_pairs(Path("pairs.txt")) == {"name : A": ["One .", "Three ."], "name : B": ["Two ."]}


def test_a_line_without_a_sentence_is_named(quality: ModuleType) -> None:
    Path("pairs.txt").write_text("name : A||One .\nname : B\n")
    with pytest.raises(SystemExit, match=r"pairs\.txt:2: expected meaning\|\|sentence, got 'name : B'"):
        quality.read_pairs(Path("pairs.txt"))


def test_no_meaning_is_on_both_sides(quality: ModuleType) -> None:
    total = sum(map(len, REFERENCES.values()))
    task = quality.split(REFERENCES, num_rows=total - 8, num_meanings=6)  # few draws of six meanings have so few pairs
    assert len(task.pairs) == total - 8
    assert len(task.held_out) == 6
    assert not {meaning for meaning, _ in task.pairs} & task.held_out.keys()
    assert all(task.held_out[meaning] == REFERENCES[meaning] for meaning in task.held_out)
    assert len(set(task.pairs)) == len(task.pairs)


def test_what_cannot_be_held_out_is_refused(quality: ModuleType) -> None:
    total = sum(map(len, REFERENCES.values()))
    with pytest.raises(SystemExit, match=f"{total} pairs of 20 meanings leave no {total - 2} besides 6 meanings"):
        quality.split(REFERENCES, num_rows=total - 2, num_meanings=6)


def test_the_best_sentence_of_a_meaning_counts(quality: ModuleType) -> None:
    pytest.importorskip("sacrebleu")
    pytest.importorskip("rouge_score")
    right, half = ["A cat sat down .", "A dog barked at the postman ."], ["A cat sat down .", "A bird flew away ."]
    report = report_of(
        {"contender": "etude", "answers": right},
        {"contender": "transformers-2e-4", "answers": half},
        {"contender": "transformers-5e-4", "answers": ["No", "No"]},
    )
    quality.score(report)
    best, middle, worst = (run["scores"] for run in report["runs"])
    assert best == pytest.approx({"bleu": 100.0, "rouge_l": 100.0, "exact_match": 100.0})
    # 'a' of 4 and 6 words: precision 1/4, recall 1/6, F = 0.2.
    assert (middle["rouge_l"], middle["exact_match"]) == (pytest.approx(60.0), 50.0)
    assert worst["rouge_l"] == 0
    last = quality.table(report).splitlines()[-1]
    assert last == f"etude to the best of the others: BLEU {100 - middle['bleu']:+.2f}, ROUGE-L +40.00"


def test_unequal_work_is_no_comparison(quality: ModuleType) -> None:
    runs = report_of({"contender": "etude"}, {"contender": "transformers-2e-4", "tokens": 91})["runs"]
    with pytest.raises(SystemExit, match=r"\[\(3, 90\), \(3, 91\)\]"):
        quality.require_equal_work(runs)


def test_runs_of_several_files_are_one_report(quality: ModuleType) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        Path(f"{name}.json").write_text(json.dumps({"task": {}} | report_of({"contender": "etude", "seed": seed})))
    files = [Path("a.json"), Path("b.json")]
    assert [run["seed"] for run in quality.merged(files)["runs"]] == [1, 2]
    Path("b.json").write_text(json.dumps({"task": {"epochs": 2}, **report_of()}))
    with pytest.raises(SystemExit, match=r"b\.json is of another task than a\.json"):
        quality.merged(files)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_contenders_learn_from_the_same_batches(
    quality: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "multiplies_bfloat16", lambda device: False)  # losses are to agree in float32
    model = tmp_path / "base"
    tiny_llama().save_pretrained(model)
    tiny_tokenizer().save_pretrained(model)
    task = quality.split(REFERENCES, num_rows=24, num_meanings=3)
    args = argparse.Namespace(epochs=1.0, max_new_tokens=4)
    runs = [
        quality.run_once(name, 7, task, model, tmp_path / name, args) for name in ("etude", "transformers-alpha32-5e-4")
    ]
    quality.require_equal_work(runs)
    ours, theirs = runs
    assert ours["steps"] == 2  # 24 rows, 16 to a step
    assert ours["settings"]["eval_fraction"] == 0
    assert ours["settings"]["global_batch_size"] == quality.BATCH_SIZE
    assert ours["losses"][0] == pytest.approx(
        theirs["losses"][0], abs=1e-4
    )  # before the first update: that of the base
    assert [len(run["answers"]) for run in runs] == [3, 3]
