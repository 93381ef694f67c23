"""A power loss at any point of a save leaves the old or the new checkpoint, and the new one once it was called saved.

The model must also be able to fail: every fsync of the recorded save is removed in turn, renames are moved before the
syncs, and each of these mutants must be caught.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import saves
from powerloss import Folder, Operation, content_of, from_disk, read_log, replay, write_out
from saves import COUNT, SITUATIONS, Outcome

RunSave = Callable[..., Outcome]


@dataclass(frozen=True)
class Recording:
    """The operations of one save, and the disk before it."""

    situation: str
    base: Path
    before: Folder
    operations: list[Operation]


@pytest.fixture(params=SITUATIONS)
def recording(request: pytest.FixtureRequest, run_save: RunSave, fast_dir: Path) -> Recording:
    base, log = fast_dir / "recorded", fast_dir / "log"
    root = saves.prepare(base, request.param)
    before = from_disk(base)
    assert isinstance(before, Folder)
    assert run_save(root=root, base=base, situation=request.param, mode=COUNT, log=log).saved
    return Recording(request.param, base, before, read_log(log))


def violations(recording: Recording, operations: list[Operation], scratch: Path, *, stop_at_first: bool) -> list[str]:
    """Crash after every operation and judge every state the disk may hold then."""
    found: list[str] = []
    judged: set[str] = set()
    model, saved = copy.deepcopy(recording.before), False
    for at, operation in enumerate(operations):
        replay(model, recording.base, [operation])
        saved = saved or operation[:2] == ("mark", "saved")
        for state in model.states():
            key = json.dumps([saved, state], default=bytes.hex, sort_keys=True)
            if key in judged:
                continue
            judged.add(key)
            write_out(state, scratch)
            problems = saves.violations(scratch / "runs" / "out", recording.situation, saved=saved, next_save=False)
            shutil.rmtree(scratch)
            found += [f"after operation {at} {operation[:2]}: {problem}" for problem in problems]
            if found and stop_at_first:
                return found
    print(f"{recording.situation}: {len(operations)} operations, {len(judged)} different states")
    assert len(judged) > len(operations) / 2
    return found


def test_the_log_is_complete(recording: Recording) -> None:
    """Replaying it gives the tree that the save left: no call escaped the shim."""
    model = copy.deepcopy(recording.before)
    replay(model, recording.base, recording.operations)
    assert content_of(model) == content_of(from_disk(recording.base))


def test_power_loss_at_any_point(recording: Recording, fast_dir: Path) -> None:
    assert not violations(recording, recording.operations, fast_dir / "state", stop_at_first=False)


def test_every_missing_fsync_is_noticed(recording: Recording, fast_dir: Path) -> None:
    syncs = [at for at, operation in enumerate(recording.operations) if operation[0] == "fsync"]
    for at in syncs:
        mutant = recording.operations[:at] + recording.operations[at + 1 :]
        found = violations(recording, mutant, fast_dir / "state", stop_at_first=True)
        assert found, f"without {recording.operations[at]} nothing is noticed"
    print(f"{recording.situation}: {len(syncs)} mutants caught")
    assert len(syncs) >= 7


def test_every_wrong_order_is_noticed(recording: Recording, fast_dir: Path) -> None:
    operations = recording.operations
    commit = next(at for at, each in enumerate(operations) if each[0] == "rename" and each[2].endswith("checkpoint-3"))
    first_sync = next(at for at, each in enumerate(operations) if each[0] == "fsync" and "/.tmp-" in each[1])
    saved = next(at for at, each in enumerate(operations) if each[:2] == ("mark", "saved"))
    final_name = operations[commit][2]
    visible = [(name, path.replace(operations[commit][1], final_name), more) for name, path, more in operations]
    mutants = {
        "renamed before anything was synced": [
            *operations[:first_sync],
            operations[commit],
            *visible[first_sync:commit],
            *operations[commit + 1 :],
        ],
        "called saved before the parent was synced": [
            *operations[: commit + 1],
            operations[saved],
            *operations[commit + 1 : saved],
            *operations[saved + 1 :],
        ],
        "nothing synced": [each for each in operations if each[0] != "fsync"],
        "written in place": [each for each in visible if each != ("rename", final_name, final_name)],
    }
    if recording.situation == "overwrite":
        del mutants["renamed before anything was synced"]  # the old one is still in the place
        del mutants["written in place"]
    for mutant, changed in mutants.items():
        assert violations(recording, changed, fast_dir / "state", stop_at_first=True), f"{mutant}: nothing is noticed"
