"""Checkpoints written while training goes on, on a CUDA device: the bytes of those that training waits for."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from etude import TrainerCallback
from etude.checkpoint import pages
from etude.checkpoint.copies import Copies
from etude.checkpoint.pages import PAGE_BYTES, _carrier_from, _SideStream
from etude.checkpoint.writer import InBackground
from etude.model.memory import memory_limit
from short_run import checkpoints, short_trainer
from tiny import adapter_of, assert_same_bits, language_rows, tiny_llama, with_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),
]


def files_of(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.glob("checkpoint-*/**/*") if path.is_file())
    own = ("training_args.bin", "MANIFEST.json")  # which name the folder and the setting
    return {str(path.relative_to(folder)): path.read_bytes() for path in files if path.name not in own}


@pytest.mark.parametrize("half", [{}, {"bf16": True}])
def test_the_same_bytes_as_when_training_waits(tmp_path: Path, half: dict[str, Any]) -> None:
    for name, in_background in (("background", True), ("in-place", False)):
        trainer = short_trainer(
            output_dir=str(tmp_path / name),
            use_cpu=False,
            deterministic=True,
            save_in_background=in_background,
            save_strategy="steps",
            save_steps=1,
            report_to="none",
            **half,
        )
        trainer.train()
        assert isinstance(trainer._run.saves.writer, InBackground) == in_background
    assert checkpoints(tmp_path / "background") == list(range(1, 11))
    found, expected = files_of(tmp_path / "background"), files_of(tmp_path / "in-place")
    assert found.keys() == expected.keys()
    assert [name for name in found if found[name] != expected[name]] == []


class Watch(TrainerCallback):
    """What a checkpoint of each step has to hold, and how the run went."""

    trainer: Any = None

    def __init__(self) -> None:
        self.weights: dict[int, dict[str, torch.Tensor]] = {}
        self.moments: dict[int, list[torch.Tensor]] = {}
        self.num_graphs = 0
        self.reserved: list[torch.Tensor] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step, optimizer = state.global_step, self.trainer.optimizer
        self.weights[step] = adapter_of(self.trainer.model)
        self.moments[step] = [each["exp_avg_sq"].cpu() for each in optimizer.state_dict()["state"].values()]
        if step == 1:
            self.reserved = list(self.trainer._run.saves._copies._pages._pages)
        assert self.trainer.graphs is not None and self.trainer.graphs.failure is None
        self.num_graphs = self.trainer.graphs.num_graphs


def ragged_trainer(folder: Path, callback: TrainerCallback, *, num_steps: int, every: int) -> Any:
    base = tiny_llama(hidden_size=256, intermediate_size=512, head_dim=64, max_position_embeddings=512).bfloat16()
    return short_trainer(
        with_lora(base, task_type="CAUSAL_LM"),
        language_rows(40, seed=1, shortest=5, longest=300),
        output_dir=str(folder),
        use_cpu=False,
        bf16=True,
        cuda_graphs=True,
        per_device_train_batch_size=4,
        max_steps=num_steps,
        save_strategy="steps",
        save_steps=every,
        report_to="none",
        callbacks=[callback],
    )


def test_every_step_is_saved_as_it_was_while_graphs_are_captured(tmp_path: Path) -> None:
    """Each copy is on its way, and the one before is being written, while the next step is made."""
    watch = Watch()
    trainer = ragged_trainer(tmp_path, watch, num_steps=24, every=1)
    watch.trainer = trainer
    trainer.train()
    assert isinstance(trainer._run.saves.writer, InBackground) and watch.num_graphs > 0
    assert watch.reserved and all(page.is_pinned() for page in watch.reserved)
    assert checkpoints(tmp_path) == list(range(1, 25))
    for step, weights in watch.weights.items():
        folder = tmp_path / f"checkpoint-{step}"
        found = load_file(folder / "adapter_model.safetensors")
        assert_same_bits(found, {name: tensor.cpu() for name, tensor in weights.items()})
        state = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
        assert all(torch.equal(state[number]["exp_avg_sq"], each) for number, each in enumerate(watch.moments[step]))


def test_a_rehearsal_leaves_graphs_their_streams(tmp_path: Path) -> None:
    """Most sizes of ragged micro-batches are captured after it, and before the first save."""

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            copies, graphs = trainer._run.saves._copies, trainer.graphs
            self.has_places, self.num_graphs = bool(copies._pages._layout._rows), graphs.num_graphs
            assert graphs.failure is None

    watch = Watch()
    trainer = ragged_trainer(tmp_path, watch, num_steps=39, every=39)
    trainer.train()
    assert watch.has_places and watch.num_graphs > 0 and checkpoints(tmp_path) == [39]


# Copies

NUM_BYTES = 4 * (1 << 20)


def tensors_of_many_types() -> list[torch.Tensor]:
    """Of several sizes; one is larger than a page, others are no part of a block."""
    types = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float32)
    tensors = [torch.arange(1000 + number, device="cuda").to(dtype) for number, dtype in enumerate(types)]
    tensors += [torch.arange(PAGE_BYTES // 4 + 5, device="cuda").float(), torch.tensor(2.5, device="cuda")]
    tensors += [torch.arange(12, device="cuda").reshape(3, 4).t(), torch.zeros(0, 2, device="cuda")]
    return tensors


def assert_copied(copied: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
    for copy, tensor in zip(copied, tensors, strict=True):
        assert copy.device.type == "cpu" and (copy.dtype, copy.stride()) == (tensor.dtype, tensor.stride())
        assert torch.equal(copy, tensor.cpu())


def test_copies_are_page_locked_and_used_again() -> None:
    copies, tensors = Copies(), tensors_of_many_types()
    addresses = []
    for _ in range(2):
        copied = copies.take(tensors)
        copies.arrive()
        assert_copied(copied, tensors)
        assert all(copy.is_pinned() for copy in copied if copy.numel())
        addresses.append([copy.data_ptr() for copy in copied])
        for tensor in tensors:
            tensor.zero_()
    assert addresses[0] == addresses[1]


def test_training_goes_on_while_they_are_on_their_way() -> None:
    """The stream that carries them is held up for about a second: an update is over before they leave the device."""
    copies, tensors = Copies(), [torch.full((1 << 20,), 5.0, device="cuda"), torch.ones(7, device="cuda")]
    copies.take(tensors)
    copies.arrive()
    stream = _carrier_from(tensors[0].device).stream
    expected = [tensor.add_(1).clone() for tensor in tensors]
    with torch.cuda.stream(stream):
        torch.cuda._sleep(1_500_000_000)
    copied = copies.take(tensors)
    for tensor in tensors:
        tensor.fill_(-1)
    torch.cuda.current_stream().synchronize()
    assert not stream.query()  # the update is over, the copies are not
    thread = threading.Thread(target=copies.arrive)
    thread.start()
    thread.join()
    assert_copied(copied, expected)


def test_memory_of_the_device_is_given_back() -> None:
    copies, tensor = Copies(), torch.ones(NUM_BYTES // 4, device="cuda")
    before = torch.cuda.memory_allocated()
    copies.take([tensor])
    assert torch.cuda.memory_allocated() >= before + NUM_BYTES
    copies.arrive()
    assert torch.cuda.memory_allocated() == before


def out_of_memory(tensors: list[torch.Tensor]) -> torch.Tensor:
    raise torch.OutOfMemoryError


@pytest.mark.parametrize("lack", ["beside training", "now"])
def test_a_device_without_room(monkeypatch: pytest.MonkeyPatch, lack: str) -> None:
    """They are copied before `take` returns then, and nothing more is asked of the device."""
    copies, tensors = Copies(), [torch.arange(1 << 26, device="cuda").float(), torch.arange(9, device="cuda")]
    device = tensors[0].device
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    peak = torch.cuda.max_memory_allocated(device)
    with memory_limit(device, (peak + 2**26) / 2**30), monkeypatch.context() as patched:  # 256 MiB are copied
        if lack == "now":
            patched.setattr(_SideStream, "_unused_bytes", lambda carrier: 2**60)
            patched.setattr(pages, "_gathered", out_of_memory)
        copied = copies.take(tensors)
        assert copies._pages._under_way == []
    assert_copied(copied, tensors)
    copies.take(tensors)
    assert len(copies._pages._under_way) == 1
    copies.arrive()
