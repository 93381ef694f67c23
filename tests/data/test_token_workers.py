"""Several processes tokenize as one does, and what happens to them is no matter."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from etude.data import TokenizedRows, encode_rows, read_rows, token_workers
from etude.data.token_workers import Worker, description
from etude.errors import DataError, ModelError

CHAT = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_workers, "CHUNK_ROWS", 8)


@pytest.fixture
def workers(monkeypatch: pytest.MonkeyPatch) -> list[Worker]:
    """Those that were started."""
    started: list[Worker] = []

    class Noted(Worker):
        def __init__(self, described: bytes) -> None:
            super().__init__(described)
            started.append(self)

    monkeypatch.setattr(token_workers, "Worker", Noted)
    return started


def pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Say {number} é<s>", "completion": f" hello {number % 7}"} for number in range(count)]


def assert_equal(one: TokenizedRows, other: TokenizedRows) -> None:
    assert list(one) == list(other) and one.statistics == other.statistics
    assert [one.origin(i) for i in range(len(one))] == [other.origin(i) for i in range(len(other))]
    assert list(map(str, one.rejected)) == list(map(str, other.rejected))


def assert_gone(workers: list[Worker]) -> None:
    assert workers and all(worker._process.poll() is not None for worker in workers)


@pytest.mark.parametrize("template", [None, CHAT])
def test_as_one_process_does(template: str | None, tokenizer: PreTrainedTokenizerFast, workers: list[Worker]) -> None:
    rows = read_rows([*pairs(50), {"prompt": "x " * 60, "completion": "cut"}, *pairs(3)])
    options: dict[str, Any] = {"max_length": 40, "on_bad_row": "skip", "template": template}
    alone = encode_rows(rows, tokenizer, num_processes=1, **options)
    assert not workers and len(alone.rejected) == 1
    assert_equal(encode_rows(rows, tokenizer, num_processes=2, **options), alone)
    assert len(workers) == 2
    assert_gone(workers)


def test_few_rows_start_no_process(tokenizer: PreTrainedTokenizerFast, workers: list[Worker]) -> None:
    encode_rows(read_rows(pairs(50)), tokenizer)
    assert workers == []


def test_many_rows_start_as_many_as_there_are_cores(
    tokenizer: PreTrainedTokenizerFast, workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_workers, "ROWS_FOR_A_WORKER", 10)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    encode_rows(read_rows(pairs(50)), tokenizer)
    assert len(workers) == 3


@pytest.mark.parametrize(("processes", "expected"), [("2", 4), ("4", 2), ("99", 0), ("no number", 8)])
def test_processes_that_train_together_share_the_cores(
    processes: str,
    expected: int,
    tokenizer: PreTrainedTokenizerFast,
    workers: list[Worker],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(token_workers, "ROWS_FOR_A_WORKER", 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    encode_rows(read_rows(pairs(20)), tokenizer)
    assert len(workers) == expected


@pytest.mark.parametrize("started", [0, 1])
def test_where_no_more_processes_can_start_the_others_do(
    started: int, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    all_workers: list[Worker] = []

    class Rare(Worker):
        def __init__(self, described: bytes) -> None:
            if len(all_workers) == started:
                raise BlockingIOError(11, "Resource temporarily unavailable")
            super().__init__(described)
            all_workers.append(self)

    monkeypatch.setattr(token_workers, "Worker", Rare)
    rows = read_rows(pairs(40))
    assert_equal(encode_rows(rows, tokenizer, num_processes=3), encode_rows(rows, tokenizer, num_processes=1))
    assert len(all_workers) == started and all(worker._process.poll() is not None for worker in all_workers)


def test_an_error_that_is_kept_keeps_no_process(tokenizer: PreTrainedTokenizerFast, workers: list[Worker]) -> None:
    rows = read_rows([*pairs(30), {"prompt": "x " * 60, "completion": "cut"}, *pairs(30)])
    try:
        encode_rows(rows, tokenizer, max_length=40, num_processes=2)
    except DataError as error:
        kept = error  # as a notebook does, with every frame that it went through
        assert kept.__traceback__ is not None
        assert_gone(workers)
    else:
        pytest.fail("the row was taken")


def test_the_error_of_a_row_is_the_same(tokenizer: PreTrainedTokenizerFast, workers: list[Worker]) -> None:
    rows = read_rows([*pairs(30), {"prompt": "x " * 60, "completion": "cut"}, *pairs(30)])
    with pytest.raises(DataError, match=r"rows:31: .*cut at max_length=40"):
        encode_rows(rows, tokenizer, max_length=40, num_processes=2)
    assert_gone(workers)


def test_a_broken_template_is_never_skipped(tokenizer: PreTrainedTokenizerFast, workers: list[Worker]) -> None:
    broken = CHAT + "{% if messages[0].content.startswith('Say 20') %}{{ 'x' * 9999999 }}{% endif %}"
    with pytest.raises(ModelError, match="rows:21"):
        encode_rows(read_rows(pairs(40)), tokenizer, template=broken, on_bad_row="skip", num_processes=2)
    assert_gone(workers)


def test_dead_workers_are_done_without(tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[range] = []

    class Dying(Worker):
        def ask(self, rows: Any, chunk: range) -> Any:
            asked.append(chunk)
            if len(asked) == 3:
                os.kill(self._process.pid, signal.SIGKILL)
            return super().ask(rows, chunk)

    monkeypatch.setattr(token_workers, "Worker", Dying)
    rows = read_rows(pairs(80))
    assert_equal(encode_rows(rows, tokenizer, num_processes=2), encode_rows(rows, tokenizer, num_processes=1))
    assert len(asked) > 3


def test_a_worker_that_tokenizes_otherwise_is_not_believed(
    tokenizer: PreTrainedTokenizerFast, workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        token_workers, "description", lambda *args, **options: description(*args, **options | {"max_length": 3})
    )
    rows = read_rows(pairs(40))
    assert_equal(encode_rows(rows, tokenizer, num_processes=2), encode_rows(rows, tokenizer, num_processes=1))
    assert_gone(workers)


def test_ctrl_c_leaves_no_process(
    tokenizer: PreTrainedTokenizerFast, workers: list[Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(token_workers, "_reply", interrupted)
    with pytest.raises(KeyboardInterrupt):
        encode_rows(read_rows(pairs(80)), tokenizer, num_processes=2)
    assert_gone(workers)


def test_a_worker_outlives_nobody(tokenizer: PreTrainedTokenizerFast) -> None:
    """One whose parent was killed finds its input at an end."""
    described = description(tokenizer, None, format="prompt_completion", max_length=None, train_on="completion")
    assert described is not None
    worker = Worker(described)
    try:
        assert worker.ask(read_rows(pairs(3)), range(3)) is not None
        assert worker._process.stdin is not None
        worker._process.stdin.close()
        assert worker._process.wait(timeout=10) == 0
    finally:
        worker.close()


def test_workers_start_without_torch(tokenizer: PreTrainedTokenizerFast) -> None:
    described = description(tokenizer, "plain", format="prompt_completion", max_length=None, train_on="completion")
    assert described is not None
    worker = Worker(described)
    try:
        started = time.monotonic()
        assert worker.ask(read_rows(pairs(3)), range(3)) is not None
        maps = Path(f"/proc/{worker._process.pid}/maps")
        assert not maps.exists() or "libtorch" not in maps.read_text()
        assert time.monotonic() - started < 30
    finally:
        worker.close()
