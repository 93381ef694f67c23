"""Every file of the newest checkpoint of a real run is damaged: resuming says which file and why, goes on from the checkpoint
before, and ends with the same bits. The files for `transformers.Trainer` are in the manifest like all others.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from training import Ended, build, result_of

from etude.checkpoint import CheckpointStore
from etude.errors import CheckpointError

pytest_plugins = ["training_fixtures"]

FILES = (
    *("adapter_config.json", "adapter_model.safetensors", "README.md", "trainer_state.json", "etude.json"),
    *("optimizer.json", "optimizer.safetensors", "scheduler.json", "scaler.json", "rng.json", "rng.safetensors"),
    *("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "MANIFEST.json"),
)
NEWEST, BEFORE = 6, 4


def missing(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def one_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 4
    path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], None]] = {"missing": missing, "empty": empty, "half": half, "one bit": one_bit}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a run that was stopped by hand after its sixth step; checkpoints 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("run") / "out"
    build(folder).train()
    for step in (8, 9):
        shutil.rmtree(folder / f"checkpoint-{step}")
    yield folder


@pytest.fixture
def out(run_folder: Path, fast_dir: Path) -> Path:
    shutil.copytree(run_folder, fast_dir / "out")
    return fast_dir / "out"


def test_every_file_is_in_the_list_above_and_in_the_manifest(out: Path) -> None:
    """Whatever was written before the commit, by whomever; so each of them is damaged below."""
    folder = out / f"checkpoint-{NEWEST}"
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there == set(FILES)
    assert set(json.loads((folder / "MANIFEST.json").read_text())["files"]) == there - {"MANIFEST.json"}


def said(trainer: Any, name: str) -> str:
    rejections = [line for line in trainer.notices.lines if "rejected" in line]
    assert len(rejections) == 1 and f"checkpoint-{NEWEST}: {name}" in rejections[0], rejections
    return rejections[0]


def resume(out: Path) -> Any:
    trainer = build(out, model_seed=5)
    trainer.output = trainer.train(resume_from_checkpoint=True)
    return trainer


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named_and_not_used(out: Path, damage: str, name: str) -> None:
    DAMAGES[damage](out / f"checkpoint-{NEWEST}" / name)
    newest, rejections = CheckpointStore(out).newest_valid()
    assert newest is not None and newest.step == BEFORE
    assert [rejection.path.name for rejection in rejections] == [f"checkpoint-{NEWEST}"]
    assert rejections[0].reason.startswith(f"{name}: ")
    says = rf"/{name}: .*resume_from_checkpoint=True takes the newest valid one|: .* it has no {name}"
    with pytest.raises(CheckpointError, match=rf"checkpoint-{NEWEST}({says})"):
        build(out).train(resume_from_checkpoint=str(out / f"checkpoint-{NEWEST}"))


def ends_the_same(out: Path, damage: str, name: str, whole: Ended) -> None:
    DAMAGES[damage](out / f"checkpoint-{NEWEST}" / name)
    trainer = resume(out)
    assert "is missing" in said(trainer, name) or damage != "missing"
    assert any(f"resumed checkpoint-{BEFORE}" in line for line in trainer.notices.lines)
    result = json.loads(json.dumps(result_of(trainer, trainer.output)))
    assert result == whole.result
    # The damaged one is out of the way, kept, and no later run trips over it.
    assert not CheckpointStore(out).newest_valid()[1]
    assert list(out.glob(f"previous-*/checkpoint-{NEWEST}"))


@pytest.mark.parametrize(("number", "name"), list(enumerate(FILES)))
def test_the_run_goes_on_from_the_one_before(out: Path, number: int, name: str, whole: Ended) -> None:
    ends_the_same(out, list(DAMAGES)[number % len(DAMAGES)], name, whole)


@pytest.mark.nightly
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_run_goes_on_whatever_the_damage(out: Path, damage: str, name: str, whole: Ended) -> None:
    ends_the_same(out, damage, name, whole)


@pytest.mark.parametrize("request_", [True, "auto"])
def test_all_damaged(out: Path, request_: Any) -> None:
    """Neither is one of them used nor is a new run begun in silence; nothing is moved or written."""
    for step, name in [(2, "rng.json"), (4, "etude.json"), (6, "optimizer.pt")]:
        one_bit(out / f"checkpoint-{step}" / name)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".etude.lock"}
    trainer = build(out)
    with pytest.raises(CheckpointError, match=r"none of the checkpoints here is valid") as caught:
        trainer.train(resume_from_checkpoint=request_)
    assert str(out) in str(caught.value)
    rejected = [line for line in trainer.notices.lines if "rejected" in line]
    assert [any(f"checkpoint-{step}: {name}" in line for line in rejected) for step, name in
            [(6, "optimizer.pt"), (4, "etude.json"), (2, "rng.json")]] == [True] * 3  # fmt: skip
    after = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != ".etude.lock"}
    assert after == before


def test_the_best_checkpoint_is_damaged(out: Path) -> None:
    """Training is not lost for it: what cannot be loaded at the end is said, by name."""
    settings = {"metric_for_best_model": "loss", "load_best_model_at_end": True, "eval_steps": 2, "save_steps": 2}
    shutil.rmtree(out)
    trainer = build(out, **settings)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    one_bit(best / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{best.name}/adapter_model\.safetensors: sha256 mismatch"):
        trainer._load_best_model()


SECRET = "s3cr3t-t0k3n-that-must-not-leak"


def test_no_secret_is_written(fast_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither tokens among the arguments nor anything of the environment."""
    for name in ("HF_TOKEN", "WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "ETUDE_TEST_SECRET"):
        monkeypatch.setenv(name, SECRET)
    build(fast_dir / "out", hub_token=SECRET, max_steps=2).train()
    files = [path for path in (fast_dir / "out").rglob("*") if path.is_file()]
    assert len(files) > len(FILES)
    assert [path for path in files if SECRET.encode() in path.read_bytes()] == []
