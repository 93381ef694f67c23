"""Every call that a save makes on its folder is made to fail, stop half way or kill the process, one after the other.

Afterwards the newest checkpoint is the old or the new one, byte for byte; success was reported only for the new one; the
next process clears up and its save works.
"""

from __future__ import annotations

import errno
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import saves
from saves import COUNT, FAIL_FROM, FAIL_ONCE, KILL, SHORT_KILL, SHORT_WRITES, SITUATIONS, Outcome

RunSave = Callable[..., Outcome]
FAULTS = {
    "kill": (KILL, 0),
    "short write, then kill": (SHORT_KILL, 0),
    "ENOSPC once": (FAIL_ONCE, errno.ENOSPC),
    "ENOSPC from there on": (FAIL_FROM, errno.ENOSPC),
    "EIO once": (FAIL_ONCE, errno.EIO),
    "EIO from there on": (FAIL_FROM, errno.EIO),
}


def calls_of(run_save: RunSave, base: Path, situation: str) -> list[str]:
    """The operations of a save that nothing disturbs, in order."""
    log = base.with_name(f"{base.name}.log")
    root = saves.prepare(base, situation)
    outcome = run_save(root=root, base=base, situation=situation, mode=COUNT, log=log)
    assert outcome.saved and not saves.violations(root, situation, saved=True)
    calls = [line.split("\t")[0] for line in log.read_text().splitlines()]
    return [call for call in calls if call != "mark"]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_any_call_may_fail(run_save: RunSave, fast_dir: Path, situation: str) -> None:
    calls = calls_of(run_save, fast_dir / "undisturbed", situation)
    prepared = fast_dir / "prepared"
    saves.prepare(prepared, situation)
    trials, wrong = 0, []
    for fault, (mode, number) in FAULTS.items():
        for at, call in enumerate(calls):
            if mode == SHORT_KILL and call not in ("write", "pwrite"):
                continue
            base = fast_dir / "trial"
            shutil.copytree(prepared, base)
            outcome = run_save(
                root=base / "runs" / "out", base=base, situation=situation, mode=mode, at=at, errno=number
            )
            problems = saves.violations(base / "runs" / "out", situation, saved=outcome.saved)
            problems += _judge_report(outcome, killed=mode in (KILL, SHORT_KILL), number=number)
            wrong += [f"{fault} at call {at} ({call}): {problem}" for problem in problems]
            shutil.rmtree(base)
            trials += 1
    print(f"{situation}: {trials} trials over {len(calls)} calls")
    assert trials > 5 * len(calls) > 100
    assert not wrong, "\n".join(wrong)


def _judge_report(outcome: Outcome, *, killed: bool, number: int) -> list[str]:
    if killed:
        return [] if outcome.signal == signal.SIGKILL else ["was not killed"]
    if outcome.signal:
        return [f"died of signal {outcome.signal}"]
    if outcome.saved:
        return []  # the fault hit what comes after the commit, or something that may fail
    wanted = (errno.errorcode[number], "runs/out")
    return [] if outcome.refused and all(each in outcome.report for each in wanted) else [f"reported {outcome.report}"]


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_failure_before_the_rename_is_never_called_success(run_save: RunSave, fast_dir: Path, situation: str) -> None:
    """So that the sweep above cannot pass by errors being swallowed."""
    calls = calls_of(run_save, fast_dir / "undisturbed", situation)
    last_sync = max(at for at, call in enumerate(calls) if call == "fsync" and "rename" in calls[:at])
    if situation == "retention":  # its last rename and sync belong to the retiring
        last_sync = max(at for at, call in enumerate(calls[:last_sync]) if call == "fsync")
    for at in range(last_sync + 1):
        root = saves.prepare(fast_dir / f"trial-{at}", situation)
        outcome = run_save(
            root=root, base=fast_dir / f"trial-{at}", situation=situation, mode=FAIL_ONCE, at=at, errno=errno.EIO
        )
        # Making a folder that is already there; listing files to estimate a size (what `commit` lists, the sweep judges).
        may_fail = calls[at] in ("failed", "list")
        assert outcome.refused or may_fail, f"EIO at call {at} ({calls[at]}): {outcome.report}"


@pytest.mark.parametrize("situation", SITUATIONS)
def test_short_writes_are_continued(run_save: RunSave, fast_dir: Path, situation: str) -> None:
    root = saves.prepare(fast_dir / "short", situation)
    outcome = run_save(root=root, base=fast_dir / "short", situation=situation, mode=SHORT_WRITES)
    assert outcome.saved and not saves.violations(root, situation, saved=True)


def test_a_failed_save_leaves_nothing_and_says_what_is_intact(run_save: RunSave, fast_dir: Path) -> None:
    calls = calls_of(run_save, fast_dir / "undisturbed", "retention")
    for at in [at for at, call in enumerate(calls) if call == "write"]:
        root = saves.prepare(fast_dir / f"trial-{at}", "retention")
        outcome = run_save(
            root=root, base=fast_dir / f"trial-{at}", situation="retention", mode=FAIL_ONCE, at=at, errno=errno.ENOSPC
        )
        assert not list(root.glob(".tmp-*"))
        for part in ("checkpoint-3", "ENOSPC", "step 3", "needs", "free", "checkpoint-2 is intact"):
            assert part in outcome.report


def test_a_failed_replacement_puts_the_old_one_back_at_once(run_save: RunSave, fast_dir: Path) -> None:
    """Not only after the next start: the run that failed goes on and looks for its checkpoints by name."""
    calls = calls_of(run_save, fast_dir / "undisturbed", "overwrite")
    renames = [at for at, call in enumerate(calls) if call == "rename"]
    for at in renames:
        base = fast_dir / f"trial-{at}"
        root = saves.prepare(base, "overwrite")
        outcome = run_save(root=root, base=base, situation="overwrite", mode=FAIL_ONCE, at=at, errno=errno.EIO)
        assert outcome.refused
        assert sorted(path.name for path in root.iterdir()) == [".etude.lock", "checkpoint-2", "checkpoint-3"]
    assert len(renames) == 2


def test_a_file_size_limit(run_save: RunSave, fast_dir: Path) -> None:
    """RLIMIT_FSIZE at 20 sizes: a real refusal of the kernel, in the middle of a write."""
    refused = 0
    for size in range(0, 2000, 100):
        base = fast_dir / f"limit-{size}"
        root = saves.prepare(base, "retention")
        outcome = run_save(root=root, base=base, situation="retention", mode=COUNT, file_size_limit=size)
        assert outcome.saved or (outcome.refused and "EFBIG" in outcome.report), outcome.report
        assert not saves.violations(root, "retention", saved=outcome.saved)
        refused += outcome.refused
    assert 0 < refused < 20


def test_no_file_descriptors_left(run_save: RunSave, fast_dir: Path) -> None:
    outcomes = []
    for spare in range(6):
        base = fast_dir / f"spare-{spare}"
        root = saves.prepare(base, "overwrite")
        outcome = run_save(root=root, base=base, situation="overwrite", mode=COUNT, spare_descriptors=spare)
        assert outcome.saved or (outcome.refused and "EMFILE" in outcome.report), outcome.report
        assert not saves.violations(root, "overwrite", saved=outcome.saved)
        outcomes.append(outcome.saved)
    assert not outcomes[0] and outcomes[-1]


def test_a_read_only_file_system(run_save: RunSave, fast_dir: Path) -> None:
    for situation in SITUATIONS:
        root = saves.prepare(fast_dir / situation, situation)
        outcome = run_save(
            root=root, base=fast_dir / situation, situation=situation, mode=FAIL_FROM, at=0, errno=errno.EROFS
        )
        assert outcome.refused and "EROFS" in outcome.report and not saves.violations(root, situation, saved=False)


def test_a_file_where_the_folder_should_be(run_save: RunSave, fast_dir: Path) -> None:
    (fast_dir / "out").write_text("not a folder")
    for root in (fast_dir / "out", fast_dir / "out" / "deeper"):
        outcome = run_save(root=root, base=fast_dir, situation="first", mode=COUNT)
        assert outcome.refused and str(fast_dir / "out") in outcome.report


def test_a_name_too_long_for_the_file_system(run_save: RunSave, fast_dir: Path) -> None:
    outcome = run_save(root=fast_dir / ("x" * 300), base=fast_dir, situation="first", mode=COUNT)
    assert outcome.refused and "ENAMETOOLONG" in outcome.report
