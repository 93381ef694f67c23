"""Checkpoints made by an attacker who can compute digests, given to a trainer: refused by file and field, or what is hostile in
them is never read. Nothing is executed, nothing is contacted, nothing large is allocated.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import re
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from etude.checkpoint import CheckpointStore
from etude.checkpoint.codec import STATE_TENSORS_PER_PARAMETER
from etude.checkpoint.manifest import FORMAT, encode_manifest
from etude.checkpoint.reading import DOCUMENT, LOG, MAX_TENSORS, JsonLimits
from etude.checkpoint.resume import read_progress
from etude.errors import CheckpointError
from short_run import short_trainer
from tiny import language_rows, tiny_llama, with_lora

MAX_SECONDS, MAX_KIBIBYTES = 2.0, 256 << 10  # of the processor; unchecked, the worst here take minutes and terabytes
READ = (
    *("adapter_model.safetensors", "trainer_state.json", "etude.json", "optimizer.json", "optimizer.safetensors"),
    *("scheduler.json", "scaler.json", "rng.json", "rng.safetensors"),
)
NEVER_READ = (
    *("adapter_config.json", "README.md", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"),
    *("adapter_model.bin", "pytorch_model.bin", "scaler.pt", ".metadata", "config.json", "tokenizer.json"),
)
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the peak of memory is read from /proc")
RUN: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "report_to": "none"}


def small_model(seed: int = 0) -> Any:
    return with_lora(
        tiny_llama(seed, hidden_size=16, intermediate_size=32, num_hidden_layers=1), task_type="CAUSAL_LM", r=4
    )


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first checkpoint of a run of two steps."""
    folder = tmp_path_factory.mktemp("sound") / "out"
    short_trainer(small_model(), output_dir=str(folder), **RUN).train()
    return folder / "checkpoint-1"


@pytest.fixture
def checkpoint(sound: Path) -> Path:
    """A copy of it to attack."""
    shutil.copytree(sound, "out/checkpoint-1")
    return Path("out/checkpoint-1")


def sign(checkpoint: Path, **changes: Any) -> None:
    """List whatever lies in the folder in its manifest, with true sizes and digests."""
    path = checkpoint / "MANIFEST.json"
    manifest = json.loads(path.read_bytes())
    del manifest["digest"]
    files = {}
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file() and file != path:
            content = file.read_bytes()
            name = file.relative_to(checkpoint).as_posix()
            files[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    path.write_bytes(encode_manifest(manifest | {"files": files} | changes))


def resume(**settings: Any) -> Any:
    trainer = short_trainer(small_model(), **(RUN | settings))
    return trainer.train(resume_from_checkpoint=True)


@contextmanager
def within_limits() -> Iterator[None]:
    """What happens here takes no more of the processor and of memory than a refusal may."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew from here
    started, before = time.process_time(), memory("VmRSS")
    yield
    seconds, kibibytes = time.process_time() - started, memory("VmHWM") - before
    assert seconds < MAX_SECONDS and kibibytes < MAX_KIBIBYTES, f"{seconds:.2f} s, {kibibytes / 1024:.0f} MiB"


def memory(name: str) -> int:
    """A figure of this process in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def refused(file: str, words: str, **settings: Any) -> None:
    """Resuming fails quickly, in little memory, with an error that begins with the file at fault."""
    trainer = short_trainer(small_model(), **(RUN | settings))
    with within_limits(), pytest.raises(CheckpointError, match=words) as caught:
        trainer.train(resume_from_checkpoint=True)
    said = "\n".join([str(caught.value), *trainer.notices.lines])
    assert f"checkpoint-1/{file}: " in said or f"checkpoint-1: {file}: " in said, said
    assert trainer.state.global_step < 2


def refused_when_read(checkpoint: Path, file: str, words: str) -> None:
    """As `refused`, of what is looked at first, without a trainer."""
    with within_limits(), pytest.raises(CheckpointError, match=words) as caught:
        read_progress(CheckpointStore(checkpoint.parent).verify(checkpoint))
    assert str(caught.value).startswith(f"{checkpoint / file}: ")


def test_the_attacker_of_these_tests_signs_rightly(checkpoint: Path) -> None:
    (checkpoint / "more").write_text("x")
    sign(checkpoint)
    assert resume().global_step == 2


# Pickles


class Canary:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "canary"
    assert not (tmp_path / "canary").exists(), "a pickle was loaded"


def pickles(canary: Path) -> list[bytes]:
    """As a bare pickle, and as torch writes one."""
    buffer = io.BytesIO()
    torch.save(Canary(canary), buffer)
    return [pickle.dumps(Canary(canary)), buffer.getvalue()]


@pytest.mark.parametrize("name", READ)
def test_a_pickle_instead_of_a_file_that_is_read(checkpoint: Path, canary: Path, name: str) -> None:
    for content in pickles(canary):
        (checkpoint / name).write_bytes(content)
        sign(checkpoint)
        refused(name, ".")


def test_pickles_in_all_files_that_are_not_read(checkpoint: Path, canary: Path) -> None:
    """The run goes on as if they were not there."""
    for number, name in enumerate(NEVER_READ):
        (checkpoint / name).write_bytes(pickles(canary)[number % 2])
    sign(checkpoint)
    assert resume().global_step == 2


@pytest.mark.parametrize("name", ["trainable.safetensors", "scaler.safetensors", "etude.safetensors"])
def test_a_pickle_where_a_file_may_be(checkpoint: Path, canary: Path, name: str) -> None:
    (checkpoint / name).write_bytes(pickles(canary)[0])
    sign(checkpoint)
    refused(name, ".")


# Adapter configurations: resuming takes the adapter of the script, whatever the file says


@pytest.mark.parametrize(
    "changes",
    [
        {"auto_mapping": {"base_model_class": "system", "parent_library": "os"}},
        {"auto_mapping": {"base_model_class": "Canary", "parent_library": "attack"}},
        {"peft_type": "REMOTE_CODE"},
        {"base_model_name_or_path": "https://attacker.example/base"},
        {"base_model_name_or_path": "attacker/base", "revision": "main"},
        {"target_modules": "(a+)+$", "lora_alpha": 1e308, "r": 2**62},
    ],
    ids=str,
)
def test_the_adapter_configuration_is_not_obeyed(
    checkpoint: Path, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def contact(*args: Any, **kwargs: Any) -> Any:
        pytest.fail(f"somebody was contacted: {args}")

    monkeypatch.setattr("socket.socket.connect", contact)
    monkeypatch.setattr("socket.getaddrinfo", contact)
    path = checkpoint / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    sign(checkpoint)
    assert resume().global_step == 2


# Tensors


def header(**tensors: tuple[str, list[int], int, int]) -> bytes:
    names = ("dtype", "shape", "data_offsets")
    entries = {k: dict(zip(names, (d, s, [a, b]), strict=True)) for k, (d, s, a, b) in tensors.items()}
    return json.dumps(entries).encode()


def with_header(text: bytes, data: bytes = b"", claim: int | None = None) -> bytes:
    return struct.pack("<Q", len(text) if claim is None else claim) + text + data


MANY = MAX_TENSORS + STATE_TENSORS_PER_PARAMETER * 1000
HUGE = {
    "a header of 2^63 bytes": with_header(b"{}", claim=2**63),
    "a header of 17 MB": with_header(b"{" + b" " * (17 << 20) + b"}"),
    "a header that is deep": with_header(b"[" * 1_000_000),
    "very many tensors": with_header(header(**{f"t{n}": ("F32", [0], 0, 0) for n in range(MANY)})),
    "tensors in disguise": with_header(
        header(**{f"t{n}": ("F32", [0], 0, 0) for n in range(MANY)}).replace(b"_offsets", b"\\u005foffsets")
    ),
    "a shape of many dimensions": with_header(header(a=("F32", [0] * 1_000_000, 0, 0))),
    "very many notes": with_header(json.dumps({"__metadata__": {f"{n:x}": "" for n in range(500_000)}}).encode()),
    "a tensor of a tebibyte": with_header(header(a=("F32", [1 << 38], 0, 1 << 40)), b"0000"),
    "a shape that overflows": with_header(header(a=("F32", [2**62, 2**62], 0, 4)), b"0000"),
    "a type that lies": with_header(header(a=("F64", [1], 0, 4)), b"0000"),
    "nothing": b"",
}


UNREAD = (
    *("a header of 2^63 bytes", "a header of 17 MB", "a header that is deep", "very many tensors"),
    *("tensors in disguise", "a shape of many dimensions", "very many notes"),
)


@pytest.mark.parametrize("attack", HUGE)
def test_hostile_tensor_files(checkpoint: Path, attack: str) -> None:
    names = [name for name in READ if name.endswith(".safetensors")]
    is_refused_unread = attack in UNREAD
    for name in names:
        sound = (checkpoint / name).read_bytes()
        (checkpoint / name).write_bytes(HUGE[attack])
        sign(checkpoint)
        refused(name, "at most .* are read" if is_refused_unread else ".")
        (checkpoint / name).write_bytes(sound)


def first(tensors: dict[str, torch.Tensor]) -> str:
    """The first name of a tensor with more than one value."""
    return next(name for name in sorted(tensors) if tensors[name].numel() > 1)


def spoil(tensors: dict[str, torch.Tensor], change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    name = first(tensors)
    changed = change(tensors[name])
    if changed is None:
        del tensors[name]
    else:
        tensors[name] = changed.contiguous()


TENSORS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor | None], str]] = {
    "another shape": (lambda t: t[:-1], "shape"),
    "transposed": (lambda t: t.T, "shape"),
    "one more dimension": (lambda t: t[None], "shape"),
    "missing": (lambda t: None, "missing|not in the safetensors file"),
    "NaN": (lambda t: t * float("nan"), "NaN"),
    "infinity": (lambda t: t + float("inf"), "NaN or infin"),
    "whole numbers": (lambda t: torch.zeros_like(t, dtype=torch.int64), "type|int64"),
    "flags": (lambda t: torch.ones_like(t, dtype=torch.bool), "type|bool"),
}


@pytest.mark.parametrize("change", TENSORS)
def test_tensors_of_an_adapter_that_do_not_fit(checkpoint: Path, change: str) -> None:
    path = checkpoint / "adapter_model.safetensors"
    tensors = load_file(path)
    name = first(tensors)
    spoil(tensors, TENSORS[change][0])
    save_file(tensors, path)
    sign(checkpoint)
    refused("adapter_model.safetensors", rf"{re.escape(name)}.*({TENSORS[change][1]})|missing.*{re.escape(name)}")


def test_a_tensor_too_many(checkpoint: Path) -> None:
    path = checkpoint / "adapter_model.safetensors"
    save_file(load_file(path) | {"evil": torch.zeros(2)}, path)
    sign(checkpoint)
    refused("adapter_model.safetensors", "evil")


@pytest.mark.parametrize("change", TENSORS)
def test_tensors_of_an_optimizer_that_do_not_fit(checkpoint: Path, change: str) -> None:
    """torch takes them over as they are and fails within the update, or makes the adapter NaN."""
    path = checkpoint / "optimizer.safetensors"
    tensors = load_file(path)
    spoil(tensors, TENSORS[change][0])
    save_file(tensors, path)
    sign(checkpoint)
    refused("optimizer.json", TENSORS[change][1])


@pytest.mark.parametrize("parameters", [[], ["evil"]])
def test_an_optimizer_of_other_parameters(checkpoint: Path, parameters: list[str]) -> None:
    path = checkpoint / "optimizer.json"
    content = json.loads(path.read_text())
    content["param_groups"][0]["params"] = parameters
    path.write_text(json.dumps(content))
    sign(checkpoint)
    refused("optimizer.json", r"other parameters: (none|evil) only in the checkpoint")


def test_random_states_that_are_none(checkpoint: Path) -> None:
    path = checkpoint / "rng.safetensors"
    tensors = load_file(path)
    of_torch, of_numpy = tensors["rng/torch"], tensors["rng/numpy/1"]
    for wrong in (
        *({"rng/torch": state} for state in (of_torch[:-1], of_torch.double(), torch.zeros(10**6, dtype=torch.uint8))),
        {"rng/numpy/1": of_numpy[:-1].contiguous()},
    ):
        save_file(tensors | wrong, path)
        sign(checkpoint)
        refused("rng.json", "does not hold what it should")


# JSON

BOMBS = {
    "deep lists": b"[" * 1_000_000,
    "deep objects": b'{"a":' * 100_000,
    "an integer of 5000 digits": b'{"a": ' + b"9" * 5000 + b"}",
    "a list of a million": b"[" + b"0," * 1_000_000 + b"0]",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "nothing": b"",
    "half": b'{"a": ',
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
}


@pytest.mark.parametrize("name", [name for name in READ if name.endswith(".json")])
@pytest.mark.parametrize("bomb", BOMBS)
def test_json_bombs(checkpoint: Path, bomb: str, name: str) -> None:
    (checkpoint / name).write_bytes(BOMBS[bomb])
    sign(checkpoint)
    if name == "scaler.json" and bomb in HARMLESS_BOMBS:  # a float32 run scales nothing and looks at nothing
        assert resume().global_step == 2
    elif name in ("etude.json", "trainer_state.json") and bomb != "deep lists":
        refused_when_read(checkpoint, name, ".")
    else:
        refused(name, ".")


def as_much_as(limits: JsonLimits, opening: bytes, unit: bytes, closing: bytes) -> bytes:
    """As many units, each with a number for `%x` in it, as the limits allow; spaces to the full size."""
    num_opens = unit.count(b"[") + unit.count(b"{")
    num_units = min(limits.values - 2, (limits.containers - 2) // num_opens if num_opens else limits.values)
    inside = b",".join([unit % number if b"%x" in unit else unit for number in range(num_units)])
    content = opening + inside + closing
    assert limits.problem_of(content) is None and len(content) < limits.num_bytes
    return content + b" " * (limits.num_bytes - len(content))


UNITS = {  # a few characters of JSON that become very many bytes in memory; the worst first
    "keys": (b"{", b'"%x":0.5', b"}"),
    "numbers": (b"[", b"0.5", b"]"),
    "lists": (b"[", b"[]", b"]"),
    "objects": (b"[", b'{"":0}', b"]"),
    "tuples of ours": (b"[", b'{"$tuple":[]}', b"]"),
    "strings": (b"[", b'"%x"', b"]"),
}


@pytest.mark.parametrize("unit", ["keys", *(pytest.param(unit, marks=pytest.mark.nightly) for unit in list(UNITS)[1:])])
@pytest.mark.parametrize(("name", "limits"), [("etude.json", DOCUMENT), ("trainer_state.json", LOG)])
def test_json_at_its_limits(checkpoint: Path, name: str, limits: JsonLimits, unit: str) -> None:
    (checkpoint / name).write_bytes(as_much_as(limits, *UNITS[unit]))
    sign(checkpoint)
    refused_when_read(checkpoint, name, "field '.*' is missing")


@pytest.mark.parametrize("unit", UNITS)
def test_json_beyond_its_limits(checkpoint: Path, unit: str) -> None:
    """A size that is allowed is not enough: unchecked, these take half a minute and gigabytes at the largest size."""
    opening, element, closing = UNITS[unit]
    for name, limits in (("etude.json", DOCUMENT), ("trainer_state.json", LOG), ("optimizer.json", DOCUMENT)):
        sound = (checkpoint / name).read_bytes()
        num_units = limits.values + 1
        (checkpoint / name).write_bytes(opening + b",".join([element.replace(b"%x", b"x")] * num_units) + closing)
        sign(checkpoint)
        refused(name, "holds too much: at most .* are read")
        (checkpoint / name).write_bytes(sound)


def test_json_that_is_wide_in_memory(checkpoint: Path) -> None:
    """One character of four bytes makes all others four bytes long."""
    (checkpoint / "etude.json").write_bytes(b'["' + "\U0001f600".encode() + b"a" * (DOCUMENT.num_bytes - 64) + b'"]')
    sign(checkpoint)
    refused_when_read(checkpoint, "etude.json", "not all ASCII")


HARMLESS_BOMBS = ("a list", "a number", "null")


def test_json_that_is_too_large_is_not_read(checkpoint: Path) -> None:
    for name in READ:
        if name.endswith(".json"):
            sound = (checkpoint / name).read_bytes()
            with open(checkpoint / name, "r+b") as file:
                file.truncate(max(DOCUMENT.num_bytes, LOG.num_bytes) + 1)  # sparse
            sign(checkpoint)
            refused(name, "bytes, at most")
            (checkpoint / name).write_bytes(sound)


class _Missing:
    def __repr__(self) -> str:
        return "missing"


MISSING = _Missing()
FIELDS: list[tuple[str, str, Any]] = [  # (file, field, value)
    *(("etude.json", "position.epoch", value) for value in (-1, 2**70, 1.5, "0", None, True, MISSING)),
    *(("etude.json", "position.batches_done", value) for value in (-1, 2**70, "1", [], MISSING)),
    *(("etude.json", "position.samples_per_batch", value) for value in (0, -2, "2", MISSING)),
    ("etude.json", "position.epoch_ended", "no"),
    ("etude.json", "position.stream_state", 7),
    *(("etude.json", "pending", value) for value in ([], {"should_evaluate": "yes"}, MISSING)),
    *(("etude.json", "learning_rate", value) for value in ("1e-3", {"$float": "nan"}, [1])),
    ("etude.json", "loss_total", "4"),
    ("etude.json", "step_last_logged", -3),
    ("etude.json", "cut", "small"),
    *(("etude.json", "run", value) for value in (None, "same", MISSING)),
    *(("trainer_state.json", "global_step", value) for value in (-1, 0, 2, 10**30, "1", 1.0, None, MISSING)),
    *(("trainer_state.json", "epoch", value) for value in ("0", [], {})),
    *(("trainer_state.json", "log_history", value) for value in (None, {}, [1], "none")),
    ("trainer_state.json", "total_flos", "many"),
    ("trainer_state.json", "best_global_step", "../.."),
    ("trainer_state.json", "best_model_checkpoint", ["/etc"]),
    ("trainer_state.json", "stateful_callbacks", 3),
    *(("optimizer.json", "param_groups", value) for value in ([], [{}], {}, None, MISSING)),
    *(("optimizer.json", "param_groups.0.params", value) for value in (None, "all", MISSING)),
    *(("optimizer.json", "param_groups.0.lr", value) for value in ("fast", None, {"$float": "inf"}, [1e-3])),
    *(("optimizer.json", "state", value) for value in ([], None, 1, MISSING)),
    ("scheduler.json", "last_epoch", "late"),
    *(("rng.json", "python", value) for value in (None, [], {"$tuple": [3, {"$tuple": []}, None]}, MISSING)),
    *(("rng.json", "torch", value) for value in (None, 7, {"$tensor": "no such tensor"}, MISSING)),
    ("rng.json", "numpy", {"$tuple": ["PCG64", {"$tensor": "rng/torch"}, 624, 0, 0.0]}),
]


@pytest.mark.parametrize(("file", "field", "value"), FIELDS, ids=lambda value: str(value)[:30])
def test_fields_that_make_no_sense(checkpoint: Path, file: str, field: str, value: Any) -> None:
    path = checkpoint / file
    content = json.loads(path.read_text())
    owner, (*parents, leaf) = content, field.split(".")
    for parent in parents:
        owner = owner[int(parent)] if isinstance(owner, list) else owner[parent]
    if value is MISSING:
        del owner[leaf]
    else:
        owner[leaf] = value
    path.write_text(json.dumps(content))
    sign(checkpoint)
    words = "." if file in ("scheduler.json", "rng.json") else field.split(".")[-1]
    if file in ("etude.json", "trainer_state.json"):
        refused_when_read(checkpoint, file, words)
    else:
        refused(file, words)


@pytest.mark.parametrize("code", ["$tensor", "$float", "$tuple", "$dict"])
@pytest.mark.parametrize("value", [None, 7, "x", [1], {"a": 1}, [[1]], [[{}, 1]]], ids=str)
def test_codes_that_stand_for_nothing(checkpoint: Path, code: str, value: Any) -> None:
    """Wherever our encoding gives a key a meaning, any value may stand."""
    path = checkpoint / "etude.json"
    content = json.loads(path.read_text())
    content["position"] = {code: value}
    path.write_text(json.dumps(content))
    sign(checkpoint)
    refused_when_read(checkpoint, "etude.json", ".")


# Where a checkpoint may not lead


@pytest.mark.parametrize("place", ["/etc", "../..", "~", "\0", "checkpoint-1/..", ""])
def test_the_best_checkpoint_is_only_looked_for_beside_this_one(checkpoint: Path, place: str) -> None:
    path = checkpoint / "trainer_state.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"best_model_checkpoint": place, "best_global_step": 7}))
    sign(checkpoint)
    trainer = short_trainer(small_model(), **RUN)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.best_model_checkpoint is None


def test_a_callback_gets_no_more_than_its_own_state(checkpoint: Path) -> None:
    """State is for callbacks of the same name only, and is data."""
    from etude import EarlyStoppingCallback

    path = checkpoint / "trainer_state.json"
    content = json.loads(path.read_text())
    evil = {"args": {}, "attributes": {"early_stopping_patience_counter": 0, "on_step_end": "os.system", "evil": 1}}
    content["stateful_callbacks"] = {"EarlyStoppingCallback": evil, "os.system": evil}
    path.write_text(json.dumps(content))
    sign(checkpoint)
    callback = EarlyStoppingCallback(3)
    resume(callbacks=[callback], eval_rows=language_rows(4, 50), eval_strategy="steps", eval_steps=1)
    assert not hasattr(callback, "evil") and callable(callback.on_step_end)


def test_another_base_model(checkpoint: Path) -> None:
    trainer = short_trainer(small_model(3), **RUN)
    with pytest.raises(CheckpointError, match=r"(?s)checkpoint-1: cannot be resumed by this run:.*base model"):
        trainer.train(resume_from_checkpoint=True)


@pytest.mark.parametrize("number", [FORMAT + 1, 10**9])
def test_a_format_of_the_future(checkpoint: Path, number: int) -> None:
    sign(checkpoint, format=number)
    trainer = short_trainer(small_model(), **RUN)
    with pytest.raises(CheckpointError, match="none of the checkpoints here is valid"):
        trainer.train(resume_from_checkpoint=True)
    assert any(f"field 'format': {number} is from a newer etude" in line for line in trainer.notices.lines)
