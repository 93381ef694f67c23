"""The training loader: one order whatever loads it, rows named in errors, and workers that die are started again in place."""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from etude import Trainer
from etude.data.batching import StepBatches
from etude.data.loader import TrainingStream, build_loader, state_at_next_epoch
from etude.data.order import EpochBatches, EpochSampler
from etude.errors import DataError
from etude.interrupts import StopNow
from short_run import logged, short_trainer
from tiny import ListDataset, StreamDataset, adapter_of, language_rows, same_bits, tiny_llama, with_lora

NUM_ROWS, BATCH = 30, 3
Batch = list[tuple[int, float]]


class Numbers(torch.utils.data.Dataset[Any]):
    """Row n is (n, a random number)."""

    def __len__(self) -> int:
        return NUM_ROWS

    def __getitem__(self, number: int) -> tuple[int, float]:
        return number, random.random() + float(torch.rand(()))


class NumberStream(torch.utils.data.IterableDataset[Any]):
    def __iter__(self) -> Iterator[tuple[int, float]]:
        worker = torch.utils.data.get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        for number in range(first, NUM_ROWS, step):
            yield number, random.random() + float(torch.rand(()))


class ReturningStream(NumberStream):
    """Can be put back to where it was; every later pass begins at the first row."""

    first, row = 0, 0

    def __iter__(self) -> Iterator[tuple[int, float]]:
        self.row, self.first = self.first, 0
        while self.row < NUM_ROWS:
            self.row += 1
            yield self.row - 1, random.random() + float(torch.rand(()))

    def state_dict(self) -> dict[str, int]:
        return {"row": self.row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.first = state["row"]


def stream(dataset: Any = None, *, strategy: str = "random", **options: Any) -> TrainingStream:
    dataset = Numbers() if dataset is None else dataset
    batches = None
    if not isinstance(dataset, torch.utils.data.IterableDataset):
        sampler = EpochSampler(len(dataset), strategy=strategy, seed=7, lengths=range(len(dataset)), group_size=BATCH)
        batches = EpochBatches(sampler, BATCH, drop_last=False)
    return TrainingStream(
        build_loader(dataset, batches=batches, batch_size=BATCH, collator=list, seed=7, **options), seed=7
    )


def epoch_of(data: TrainingStream, epoch: int = 0, first: int = 0) -> list[Batch]:
    data.open(epoch, first)
    batches = []
    while (batch := data.next()) is not None:
        batches.append(batch)
    return batches


@pytest.mark.parametrize("epoch", [0, 1])
@pytest.mark.parametrize("strategy", ["random", "sequential", "group_by_length"])
def test_workers_change_nothing(strategy: str, epoch: int) -> None:
    """Neither the order nor the random numbers drawn for a row."""
    alone, helped = stream(strategy=strategy), stream(strategy=strategy, num_workers=2)
    assert epoch_of(alone, epoch) == epoch_of(helped, epoch)
    assert sorted(number for batch in epoch_of(alone, epoch) for number, _ in batch) == list(range(NUM_ROWS))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", [Numbers, NumberStream])
def test_any_place_is_entered_alike(kind: Any, workers: int) -> None:
    """In a process that has seen the epochs before and in one that has not, whatever was drawn meanwhile."""
    whole = stream(kind(), num_workers=workers)
    epochs = [epoch_of(whole, epoch) for epoch in (0, 1)]
    assert epochs[0] != epochs[1]
    for epoch, first in ((0, 4), (1, 0), (1, 7)):
        random.seed(first)
        torch.manual_seed(first)
        assert epoch_of(stream(kind(), num_workers=workers), epoch, first) == epochs[epoch][first:]


def test_a_stream_is_put_back_to_its_state() -> None:
    whole = stream(ReturningStream())
    batches, states = [], []
    whole.open(1)
    while (batch := whole.next()) is not None:
        batches.append(batch)
        states.append(whole.state())
    for first in (1, 4, len(batches)):
        data = stream(ReturningStream())
        data.open(1, first, states[first - 1])
        assert [data.next() for _ in range(len(batches) - first + 1)] == [*batches[first:], None]


class StopsReading(ReturningStream):
    """A stop request comes while row 10 is waited for."""

    def __iter__(self) -> Iterator[tuple[int, float]]:
        for number, drawn in super().__iter__():
            if number == 10:
                raise StopNow
            yield number, drawn


def test_a_step_that_was_not_read_to_its_end_is_read_again() -> None:
    """Three batches of three rows a step: of the second step, one batch and a row had been read."""
    data = StepBatches(stream(StopsReading()), accumulation=3, shifts_labels=False)
    data.open_epoch(0)
    assert data.advance()
    data.of_next_step()
    at_the_end_of_the_step = data.saved_position()
    assert at_the_end_of_the_step.stream_state == {"row": 9} and at_the_end_of_the_step.batches_done == 3
    with pytest.raises(StopNow):
        data.advance()
    assert data.saved_position() == at_the_end_of_the_step


def test_what_the_program_draws_is_not_disturbed() -> None:
    random.seed(3)
    torch.manual_seed(3)
    wanted = random.random(), float(torch.rand(()))
    random.seed(3)
    torch.manual_seed(3)
    epoch_of(stream())
    assert (random.random(), float(torch.rand(()))) == wanted


# An exception within a row


class BadRow(ListDataset):
    bad: int

    def __getitem__(self, index: int) -> Any:
        if index == self.bad:
            raise ValueError("this row cannot be read")
        return super().__getitem__(index)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("bad", [12, 13])
def test_an_exception_in_a_row_names_the_row(bad: int, workers: int) -> None:
    """Row 13 is one of those that are looked at before the first step, row 12 is not."""
    BadRow.bad = bad
    trainer = short_trainer(
        rows=BadRow(language_rows(20)),
        train_sampling_strategy="sequential",
        dataloader_num_workers=workers,
        save_strategy="steps",
        save_steps=1,
    )
    with pytest.raises(ValueError, match="this row cannot be read") as caught:
        trainer.train()
    said = "\n".join([str(caught.value), *getattr(caught.value, "__notes__", [])])
    assert f"while loading row {bad} of the BadRow dataset" in said
    assert trainer.state.global_step == (6 if bad == 12 else 0)


# Workers that die


def workers_of(data: TrainingStream) -> list[int]:
    return [worker.pid for worker in data._iterator._workers]  # type: ignore[union-attr]


def kill_and_wait(pid: int) -> None:
    """Until it is dead, but not yet waited for by anybody."""
    time.sleep(0.05)  # its last batch is on its way: a worker killed within that holds up the others for seconds
    os.kill(pid, signal.SIGKILL)
    while Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z":
        time.sleep(0.001)


@pytest.mark.parametrize("kind", [Numbers, NumberStream])
def test_a_killed_worker_is_started_again(kind: Any, caplog: pytest.LogCaptureFixture) -> None:
    wanted = epoch_of(stream(kind(), num_workers=2), 1)
    data = stream(kind(), num_workers=2, prefetch_factor=1)
    data.open(1)
    batches = [data.next() for _ in range(3)]
    kill_and_wait(workers_of(data)[0])
    while (batch := data.next()) is not None:
        batches.append(batch)
    assert batches == wanted
    assert "the workers are started again at micro-batch" in caplog.text


def test_all_workers_killed_again_and_again() -> None:
    """As often as it takes, as long as it gets anywhere."""
    wanted = epoch_of(stream(num_workers=2))
    data = stream(num_workers=2)
    data.open(0)
    batches = []
    for turn in range(len(wanted)):
        if turn % 2:
            for pid in workers_of(data):
                kill_and_wait(pid)
        batches.append(data.next())
    assert batches == wanted and data.next() is None


class Deadly(Numbers):
    """The worker that fetches row 13 is killed."""

    def __getitem__(self, number: int) -> tuple[int, float]:
        if number == 13:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(number)


def test_a_row_that_always_kills_its_worker_ends_the_run() -> None:
    data = stream(Deadly(), strategy="sequential", num_workers=1, prefetch_factor=1)
    data.open(0)
    batches = [data.next() for _ in range(4)]
    assert [number for batch in batches for number, _ in batch or []] == list(range(12))
    with pytest.raises(RuntimeError, match="DataLoader worker") as caught:
        data.next()
    (note,) = caught.value.__notes__
    assert "started again 3 times for micro-batch 4 of epoch 0" in note and "dataloader_num_workers" in note


def test_a_dead_worker_is_noticed_nowhere_but_in_the_wait_for_data() -> None:
    """torch raises in a signal handler: in the middle of an update as well as of a save."""
    data = stream(num_workers=2)
    data.open(0)
    first = data.next()
    kill_and_wait(workers_of(data)[1])
    for _ in range(1000):  # here torch would have raised
        sum(range(100))
    assert [first, data.next(), data.next()] == epoch_of(stream())[:3]


@pytest.mark.parametrize("kind", [Numbers, NumberStream])
def test_persistent_workers_are_started_again_as_well(kind: Any) -> None:
    wanted = [epoch_of(stream(kind(), num_workers=2), epoch) for epoch in (0, 1, 2)]
    data = stream(kind(), num_workers=2, persistent_workers=True, prefetch_factor=1)
    assert epoch_of(data, 0) == wanted[0]
    data.open(1)
    batches = [data.next(), data.next()]
    kill_and_wait(workers_of(data)[0])
    while (batch := data.next()) is not None:
        batches.append(batch)
    assert batches == wanted[1]
    of_epoch_1 = workers_of(data)
    assert epoch_of(data, 2) == wanted[2]
    if kind is Numbers:  # a worker's copy of a stream goes its own way, so that it is made anew
        assert workers_of(data) == of_epoch_1
    data.close(also_persistent=True)


# A loader that the user built


def users_loader(kind: str, workers: int = 0) -> TrainingStream:
    generator = torch.Generator().manual_seed(11)
    weights = [1.0 + number % 3 for number in range(NUM_ROWS)]
    shuffles: dict[str, dict[str, Any]] = {
        "loader": {"shuffle": True, "generator": generator},
        "sampler": {"sampler": torch.utils.data.WeightedRandomSampler(weights, NUM_ROWS, generator=generator)},
        "global": {"shuffle": True},
    }
    loader = torch.utils.data.DataLoader(
        Numbers(), batch_size=BATCH, collate_fn=list, num_workers=workers, **shuffles[kind]
    )
    return TrainingStream(loader, seed=7)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["loader", "sampler", "global"])
def test_the_generator_of_a_users_loader_is_put_back(kind: str, workers: int) -> None:
    """Every epoch draws its order from where the one before left the generator."""
    whole = users_loader(kind, workers)
    epochs, states = [], {}
    for epoch in range(3):
        whole.open(epoch)
        states[epoch, 0] = whole.state()
        epochs.append([whole.next() for _ in range(4)])
        states[epoch, 4] = whole.state()
        while (batch := whole.next()) is not None:
            epochs[-1].append(batch)
        states[epoch + 1, 0] = state_at_next_epoch(whole.state())
    assert epochs[0] != epochs[1] != epochs[2]
    for (epoch, first), state in states.items():
        if epoch < 3:
            resumed = users_loader(kind, workers)
            resumed.open(epoch, first, state)
            assert [resumed.next() for _ in range(len(epochs[epoch]) - first)] == epochs[epoch][first:]


def test_the_first_epoch_has_the_order_that_torch_gives_it() -> None:
    generator = torch.Generator().manual_seed(11)
    loader = torch.utils.data.DataLoader(Numbers(), BATCH, shuffle=True, generator=generator, collate_fn=list)
    wanted = [[number for number, _ in batch] for batch in loader]
    assert [[number for number, _ in batch] for batch in epoch_of(users_loader("loader"))] == wanted


@pytest.mark.parametrize("kind", ["loader", "global"])
def test_a_killed_worker_of_a_users_loader(kind: str) -> None:
    wanted = epoch_of(users_loader(kind, workers=2))
    data = users_loader(kind, workers=2)
    data.open(0)
    batches = [data.next(), data.next()]
    kill_and_wait(workers_of(data)[0])
    while (batch := data.next()) is not None:
        batches.append(batch)
    assert [sorted(n for n, _ in batch or []) for batch in batches] == [sorted(n for n, _ in batch) for batch in wanted]


@pytest.mark.parametrize("wrong", [{}, {"loader": "x"}, {"loader": torch.zeros(3, dtype=torch.uint8)}], ids=str)
def test_a_state_of_another_loader_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="does not fit this loader"):
        users_loader("loader").open(1, 2, {"generators": wrong})


class WithOwnLoader(Trainer):
    def get_train_dataloader(self) -> Any:
        generator = torch.Generator().manual_seed(11)
        return torch.utils.data.DataLoader(
            self.train_dataset, batch_size=2, shuffle=True, generator=generator, collate_fn=self.data_collator
        )


@pytest.mark.parametrize("step", [3, 5, 7, 10, 12])
def test_training_on_a_users_loader_is_resumed(step: int) -> None:
    """Five steps an epoch: within one, at its end, and after others."""
    settings = {"trainer_class": WithOwnLoader, "num_train_epochs": 3}
    whole = short_trainer(output_dir="whole", save_strategy="steps", save_steps=1, **settings)
    whole.train()
    resumed = short_trainer(**settings)
    resumed.train(resume_from_checkpoint=f"whole/checkpoint-{step}")
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert same_bits(adapter_of(resumed.model), adapter_of(whole.model))


class KillsItsWorkerOnce(ListDataset):
    """The first worker that fetches row 11 is killed; a file remembers that it was."""

    def __getitem__(self, index: int) -> Any:
        if index == 11 and torch.utils.data.get_worker_info() is not None and not Path("killed").exists():
            Path("killed").touch()
            time.sleep(0.1)  # its last batch is on its way: a worker killed within that holds up the others for seconds
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_training_does_not_notice() -> None:
    def dropped() -> Any:
        return with_lora(tiny_llama(attention_dropout=0.1), task_type="CAUSAL_LM", lora_dropout=0.1)

    rows = language_rows(20)
    whole = short_trainer(dropped(), ListDataset(rows), output_dir="whole")
    whole.train()
    helped = short_trainer(dropped(), KillsItsWorkerOnce(rows), dataloader_num_workers=2, gradient_accumulation_steps=1)
    helped.train()
    assert Path("killed").exists()
    assert logged(helped, "loss") == logged(whole, "loss")
    assert same_bits(adapter_of(helped.model), adapter_of(whole.model))


def test_no_worker_outlives_the_training() -> None:
    """Not until the garbage collector finds the loader, which may then wait for seconds."""
    before = set(children())
    for rows, settings in ((ListDataset(language_rows(20)), {}), (StreamDataset(language_rows(20)), {"max_steps": 3})):
        trainer = short_trainer(rows=rows, dataloader_num_workers=2, **settings)
        trainer.train()
        assert set(children()) == before


class Serving(Numbers):
    """Reports, for each row, an error in a thread, as Python's that serves the files of a batch does."""

    def __getitem__(self, number: int) -> tuple[int, float]:
        for error in (ConnectionResetError("a cut connection"), EOFError("a short message"), ValueError("another")):
            thread = threading.Thread(target=sys.excepthook, args=(type(error), error, None))
            thread.start()
            thread.join()
        sys.excepthook(BrokenPipeError, BrokenPipeError("not in a thread"), None)
        return super().__getitem__(number)


def test_a_cut_connection_is_no_error_of_a_worker(capfd: pytest.CaptureFixture[str]) -> None:
    """As a stop leaves it where it comes while a batch is received."""
    epoch_of(stream(Serving(), num_workers=1))
    said = capfd.readouterr().err
    assert said.count("another") == said.count("not in a thread") == NUM_ROWS
    assert "a cut connection" not in said and "a short message" not in said


def children() -> list[int]:
    """The living child processes of this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == os.getpid() and state != "Z":
            found.append(int(path.parent.name))
    return found
