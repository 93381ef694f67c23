"""Which checkpoint a run resumes from, and what has changed since it was written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from etude.checkpoint import Checkpoint, CheckpointStore
from etude.checkpoint.codec import load_tree, malformed_means_checkpoint_error
from etude.checkpoint.reading import LOG, opened_file, opened_folder, read_bounded
from etude.errors import CheckpointError

PROGRESS = "etude"
"""Name of the tree (`etude.json`) with everything of ours that `trainer_state.json` has no field for."""

TRAINER_STATE = "trainer_state.json"

IGNORED_ADAPTER_KEYS = frozenset(
    {"inference_mode", "base_model_name_or_path", "revision", "task_type", "runtime_config", "auto_mapping"}
    | {"peft_version", "init_lora_weights", "lora_dropout", "eva_config", "corda_config", "loftq_config"}
)


def find_checkpoint(
    store: CheckpointStore, request: str | Path | bool | None, say: Callable[[str], None]
) -> Checkpoint | None:
    """The checkpoint to resume from, verified; None to begin afresh.

    `request` is None or False (begin afresh), a path, True (the newest valid one; there must be one), or "auto" (the
    newest valid one, or afresh where there is none at all).

    Raises:
        CheckpointError: where the asked-for checkpoint is missing or damaged, or where there are checkpoints and none
            is valid.
    """
    if isinstance(request, str) and request.lower() in ("true", "false", "none"):
        request = request.lower() == "true"
    if request is None or request is False or request == "":
        return None
    if request is True or request == "auto":
        return _newest(store, strict=request is True, say=say)
    assert not isinstance(request, bool)
    return _named(store, Path(request).expanduser())


def _newest(store: CheckpointStore, *, strict: bool, say: Callable[[str], None]) -> Checkpoint | None:
    newest, rejections = store.newest_valid()
    for rejection in rejections:
        say(f"rejected {rejection}")
    if newest is not None:
        return newest
    if rejections:
        raise CheckpointError(
            "none of the checkpoints here is valid (reasons above), and beginning afresh would hide that. Restore one, "
            "or choose another output_dir for a new run",
            path=store.root,
        )
    if strict:
        raise CheckpointError(
            f"No valid checkpoint found in output directory ({store.root}): there is none at all. Use "
            'resume_from_checkpoint="auto" to begin afresh in that case'
        )
    return None


def _named(store: CheckpointStore, path: Path) -> Checkpoint:
    if not path.is_dir():
        raise CheckpointError(f"Can't find a valid checkpoint at {path}: there is no such folder")
    if not (path / "MANIFEST.json").exists():
        inside = CheckpointStore(path).committed()
        if inside:
            raise CheckpointError(f"is not a checkpoint but holds some; did you mean {inside[-1].path}?", path=path)
        if (path / TRAINER_STATE).exists():
            raise CheckpointError(
                "was not written by etude, or not completely: it has no MANIFEST.json. Where transformers.Trainer wrote it, "
                f"take it over first: etude import-checkpoint {path}",
                path=path,
            )
        raise CheckpointError("is no checkpoint: it has neither MANIFEST.json nor trainer_state.json", path=path)
    try:
        return CheckpointStore(path.parent).verify(path)
    except CheckpointError as error:
        others = [checkpoint.path.name for checkpoint in store.committed() if checkpoint.path != path]
        hint = (
            f" Others here: {', '.join(others)}; resume_from_checkpoint=True takes the newest valid one"
            if others
            else ""
        )
        raise CheckpointError(f"{error}.{hint}") from error


@dataclass(frozen=True)
class Change:
    """One thing that is not as the checkpoint recorded it. A fatal one makes resuming wrong."""

    name: str
    was: Any
    now: Any
    fatal: bool
    way_out: str = ""

    def __str__(self) -> str:
        text = f"{self.name}: {_short(self.was)} in the checkpoint, {_short(self.now)} now"
        return f"{text}; {self.way_out}" if self.way_out else text


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else text[:77] + "..."


def changes_since(recorded: Mapping[str, Any], current: Mapping[str, Any]) -> list[Change]:
    """What differs between the record of a checkpoint and the run that wants to go on from it.

    An imported checkpoint does not record everything; what it leaves out is taken to be as it is now.
    """
    recorded = {**current, **recorded}
    changes = list(_adapter_changes(recorded.get("adapters", {}), current.get("adapters", {})))
    if recorded.get("base") != current.get("base"):
        way_out = "the adapter was trained on another base model; load that one, or use another output_dir"
        changes.append(Change("base model fingerprint", recorded.get("base"), current.get("base"), True, way_out))
    if recorded.get("data") != current.get("data"):
        way_out = (
            "the position in the data would be wrong. Use the same data, or pass ignore_data_skip=True to begin the "
            "epoch anew on the new data"
        )
        changes.append(Change("training data", recorded.get("data"), current.get("data"), True, way_out))
    before, now = recorded.get("settings", {}), current.get("settings", {})
    for name in sorted(set(before) | set(now)):
        if before.get(name) != now.get(name):
            changes.append(Change(name, before.get(name), now.get(name), False, "the new value is used from here on"))
    for name in sorted(set(recorded.get("versions", {})) | set(current.get("versions", {}))):
        was, is_now = recorded.get("versions", {}).get(name), current.get("versions", {}).get(name)
        if was != is_now:
            changes.append(Change(name, was, is_now, False, "results may differ from here on by rounding"))
    return changes


def _adapter_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    if set(before) != set(now):
        way_out = "attach the same adapters under the same names"
        return [Change("adapters", sorted(before), sorted(now), True, way_out)]
    changes = []
    for adapter, settings in now.items():
        for key in sorted(set(settings) | set(before[adapter])):
            if key in IGNORED_ADAPTER_KEYS:
                continue
            was, is_now = before[adapter].get(key), settings.get(key)
            if key not in settings or key not in before[adapter]:
                if was or is_now:  # otherwise it is switched off for the version of peft that knows it
                    way_out = "only one of the two versions of peft knows it"
                    changes.append(Change(f"adapter '{adapter}' {key}", was, is_now, False, way_out))
            elif _normalised(was) != _normalised(is_now):
                way_out = "use the value of the checkpoint, or another output_dir for a new run"
                changes.append(Change(f"adapter '{adapter}' {key}", was, is_now, True, way_out))
    return changes


def _normalised(value: Any) -> Any:
    return sorted(map(str, value)) if isinstance(value, (list, tuple, set)) else value


def refuse_fatal(changes: list[Change], checkpoint: Checkpoint) -> None:
    """
    Raises:
        CheckpointError: listing every change that makes resuming wrong.
    """
    fatal = [change for change in changes if change.fatal]
    if fatal:
        lines = "".join(f"\n  - {change}" for change in fatal)
        raise CheckpointError(f"cannot be resumed by this run:{lines}", path=checkpoint.path, step=checkpoint.step)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict)


def _or_none(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_right(value)


PROGRESS_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "position.epoch": _is_count,
    "position.batches_done": _or_none(_is_count),  # None where an imported checkpoint does not say
    "position.samples_per_batch": _or_none(lambda value: _is_count(value) and value > 0),
    "position.epoch_ended": _is_flag,
    "position.stream_state": _or_none(_is_mapping),
    "pending": lambda value: _is_mapping(value) and all(map(_is_flag, value.values())),
    "learning_rate": _or_none(_is_number),
    "loss_since_log": lambda value: isinstance(value, (int, float)),
    "loss_total": lambda value: isinstance(value, (int, float)),
    "step_last_logged": _is_count,
    "cut": _is_mapping,
    "run": _is_mapping,
}
STATE_FIELDS: Mapping[str, Callable[[Any], bool]] = {
    "global_step": _is_count,
    "epoch": _or_none(_is_number),
    "total_flos": _is_number,
    "log_history": lambda value: isinstance(value, list) and all(map(_is_mapping, value)),
    "best_metric": _or_none(lambda value: isinstance(value, (int, float))),
    "best_global_step": _or_none(_is_count),
    "best_model_checkpoint": _or_none(lambda value: isinstance(value, str)),
    "stateful_callbacks": _is_mapping,
}


def read_progress(checkpoint: Checkpoint) -> dict[str, Any]:
    """What `etude.json` holds, after a look at the trainer's state: whoever wrote the manifest may have written anything
    else as well.

    Raises:
        CheckpointError: naming file and field of what is missing, of another type, or too large to be read.
    """
    folder = checkpoint.path
    path = folder / TRAINER_STATE
    state = read_trainer_state(path)
    _require(STATE_FIELDS, state, path)
    if state["global_step"] != checkpoint.step:
        raise CheckpointError(
            f"field 'global_step': {state['global_step']}, in a checkpoint of step {checkpoint.step}", path=path
        )
    progress: dict[str, Any] = load_tree(folder, PROGRESS)
    _require(PROGRESS_FIELDS, progress, folder / f"{PROGRESS}.json")
    return progress


def read_trainer_state(path: Path) -> Any:
    """What `trainer_state.json` holds; transformers, whose checkpoints can be imported, writes NaN into it.

    Raises:
        CheckpointError: it is missing, is no JSON, or holds more than is read.
    """
    with opened_folder(path.parent) as folder, opened_file(path.name, folder=folder, shown=path) as descriptor:
        raw = read_bounded(descriptor, LOG.num_bytes, shown=path)
    if problem := LOG.problem_of(raw):
        raise CheckpointError(problem, path=path)
    with malformed_means_checkpoint_error(path):  # also a nesting that is too deep
        text = raw.decode()
        del raw
        return json.loads(text)


def _require(fields: Mapping[str, Callable[[Any], bool]], content: Any, path: Path) -> None:
    for name, is_right in fields.items():
        value = content
        for part in name.split("."):
            if not isinstance(value, dict) or part not in value:
                raise CheckpointError(f"field '{name}' is missing", path=path)
            value = value[part]
        if not is_right(value):
            raise CheckpointError(f"field '{name}': {str(value)[:80]!r} makes no sense there", path=path)
