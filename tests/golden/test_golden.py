"""Checkpoints that earlier versions have written are resumed, and end as those versions would have ended.

Format 1 is the only one so far. `format-1-first` is the earliest of its checkpoints: it has fields that are no longer
read, and lacks one that has come since.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from etude.checkpoint import CheckpointStore
from etude.checkpoint.manifest import FORMAT
from golden import KEPT, LAST, losses, trainer

HERE = Path(__file__).parent
KEPT_RUNS = sorted(path.name for path in HERE.glob("format-*"))


def format_of(run: str) -> int:
    return int(run.split("-")[1])


def test_every_format_is_here() -> None:
    """A new format comes with a checkpoint of its own: `python tests/golden/golden.py tests/golden/format-N`."""
    assert {format_of(run) for run in KEPT_RUNS} == set(range(1, FORMAT + 1))


@pytest.mark.parametrize("run", KEPT_RUNS)
def test_it_verifies(run: str) -> None:
    manifest = CheckpointStore(HERE / run).verify(HERE / run / f"checkpoint-{KEPT}").manifest
    assert manifest is not None and manifest["format"] == format_of(run)


@pytest.mark.parametrize("fast_path", [True, False])
@pytest.mark.parametrize("run", KEPT_RUNS)
def test_it_is_resumed(run: str, fast_path: bool) -> None:
    """With the losses that the version which wrote it went on to; on the other path, and with another torch, up to
    rounding."""
    shutil.copytree(HERE / run, "out")
    resumed = trainer(Path("out"), fast_path=fast_path)
    assert resumed.train(resume_from_checkpoint=True).global_step == LAST
    wanted = json.loads((HERE / run / "losses.json").read_text())
    tolerance = 1e-4 if fast_path else 1e-2  # dropout draws other numbers for padded batches
    assert losses(resumed.state.log_history) == pytest.approx(wanted, rel=tolerance)
    assert losses(resumed.state.log_history)[:KEPT] == wanted[:KEPT]
    assert any(f"resumed checkpoint-{KEPT}: step {KEPT} of {LAST}" in line for line in resumed.notices.lines)


def test_it_goes_on_from_there_and_not_from_anew() -> None:
    """The losses above are not those of a run that begins with these weights only."""
    wanted = json.loads((HERE / "format-1" / "losses.json").read_text())
    fresh = trainer(Path("fresh"), max_steps=LAST - KEPT)
    fresh.train()
    assert losses(fresh.state.log_history) != pytest.approx(wanted[KEPT:], rel=1e-3)
