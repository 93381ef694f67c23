"""Rows -> tokens in several processes, with the same result as in one.

A worker (`token_worker.py`) has the tokenizer as its own JSON describes it, without torch and without transformers; it starts
in a fraction of a second. Whether that is the same tokenizer is seen on the first chunk, which is encoded here as well. Where
it is not, and where a worker dies, the work is done here.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import IO, Any

import numpy as np

from etude.data import child, token_worker
from etude.data.chat import PLAIN, TrainOn, renders_by_itself, special_tokens, template_of
from etude.data.encoding import ROW_FIELDS, TOKEN_FIELDS, EncodedChunk, as_chunk, encode_each
from etude.data.rows import RowSet
from etude.data.templates import Refused

CHUNK_ROWS = 512
ROWS_FOR_A_WORKER = 8192
"""With fewer, its start costs more than it saves."""
MAX_WORKERS = 16
ASKED_AHEAD = 2
"""Chunks under way for each worker, so that none waits for this process."""
LENGTH = struct.Struct("<Q")


def encoded_chunks(
    rows: RowSet,
    tokenizer: Any,
    format: str,
    max_length: int | None,
    template: str | None,
    train_on: TrainOn,
    num_processes: int | None = None,
) -> Generator[EncodedChunk, None, None]:
    """All rows in their order, some hundred at a time; see `encode_rows` for the arguments."""
    options: dict[str, Any] = {"format": format, "max_length": max_length, "train_on": train_on}
    wanted = min(_cores(), MAX_WORKERS, len(rows) // ROWS_FOR_A_WORKER) if num_processes is None else num_processes
    described = description(tokenizer, template, **options) if wanted > 1 and len(rows) else None
    if described is None:
        encoded = encode_each(rows, tokenizer, template=template, **options)
        while len((chunk := as_chunk(islice(encoded, CHUNK_ROWS))).lengths):
            yield chunk
        return

    def encode_here(chunk: range) -> EncodedChunk:
        return as_chunk(encode_each(rows.subset(chunk), tokenizer, template=template, **options))

    with contextlib.ExitStack() as until_the_end:
        workers = []
        with contextlib.suppress(OSError):  # no memory, or too many processes: those that have started do it
            for _ in range(wanted):
                workers.append(until_the_end.enter_context(contextlib.closing(Worker(described))))
        yield from _in_order(workers, rows, encode_here)


def _cores() -> int:
    """For this process; those of one machine that train together (`torchrun`) each tokenize for themselves."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    sharing = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // max(1, int(sharing) if sharing.isdecimal() else 1))


def _in_order(
    workers: list[Worker], rows: RowSet, encode_here: Callable[[range], EncodedChunk]
) -> Iterator[EncodedChunk]:
    chunks = [range(start, min(start + CHUNK_ROWS, len(rows))) for start in range(0, len(rows), CHUNK_ROWS)]
    here = encode_here(chunks[0])
    yield here
    there = workers[0].ask(rows, chunks[0]) if workers else None
    if there is None or not _is_equal(here, there):
        yield from map(encode_here, chunks[1:])
        return
    pending: deque[tuple[range, Future[EncodedChunk | None]]] = deque()
    # One thread a worker: it waits for the reply, so that requests and replies never block each other.
    with contextlib.ExitStack() as until_the_end:
        threads = [until_the_end.enter_context(ThreadPoolExecutor(1)) for _ in workers]
        try:
            for number, chunk in enumerate(chunks[1:]):
                which = number % len(workers)
                pending.append((chunk, threads[which].submit(workers[which].ask, rows, chunk)))
                if len(pending) >= ASKED_AHEAD * len(workers):
                    yield _reply(*pending.popleft(), encode_here)
            while pending:
                yield _reply(*pending.popleft(), encode_here)
        finally:
            for _, future in pending:
                future.cancel()


def _reply(
    chunk: range, future: Future[EncodedChunk | None], encode_here: Callable[[range], EncodedChunk]
) -> EncodedChunk:
    encoded = future.result()
    return encode_here(chunk) if encoded is None else encoded


def _is_equal(one: EncodedChunk, other: EncodedChunk) -> bool:
    arrays = (*ROW_FIELDS, *TOKEN_FIELDS)
    return one.refused == other.refused and all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in arrays
    )


def description(tokenizer: Any, template: str | None, **options: Any) -> bytes | None:
    """What a worker needs to know; None for a tokenizer that only its own code can be."""
    facts = facts_of(tokenizer)
    if facts is None:
        return None
    chosen = template_of(tokenizer, template, options["format"])
    return json.dumps(facts | {"template": PLAIN if chosen is None else chosen, "options": options}).encode()


def facts_of(tokenizer: Any) -> dict[str, Any] | None:
    """All that decides which tokens a text becomes, chat templates aside; None where code of the tokenizer's own does."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    if core is None or renders_by_itself(tokenizer) or _encodes_by_itself(tokenizer):
        return None
    try:
        # What transformers does at every call, which says itself how to cut and pad: the state is that of the last one.
        core.no_truncation()
        core.no_padding()
        described = core.to_str()
    except Exception:  # one with parts written in Python has no description, and says so in many ways
        return None
    return {
        "core": described,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "eos_token": getattr(tokenizer, "eos_token", None),
        "special_tokens_map": {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
        "all_special_tokens": sorted(special_tokens(tokenizer)),
        "splits_special_tokens": bool(getattr(tokenizer, "split_special_tokens", False)),
    }


def _encodes_by_itself(tokenizer: Any) -> bool:
    """Whether its class does something of its own between a text and the core."""
    from transformers import PreTrainedTokenizerFast

    names = ("__call__", "_encode_plus", "_batch_encode_plus")
    return any(
        getattr(type(tokenizer), name, None) is not getattr(PreTrainedTokenizerFast, name, None) for name in names
    )


class Worker:
    """A process that encodes one chunk at a time."""

    def __init__(self, described: bytes) -> None:
        # The cores are taken by the other workers.
        self._process = child.start(token_worker, TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
        self._described: bytes | None = described

    def ask(self, rows: RowSet, chunk: range) -> EncodedChunk | None:
        """The rows of a chunk encoded; None where they cannot be sent, or the worker is gone."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            request = rows.as_json(chunk)
        except (TypeError, ValueError):  # values that JSON has no word for
            return None
        try:
            if self._described is not None:
                send(self._process.stdin, self._described)
                self._described = None
            send(self._process.stdin, request)
            return unpacked(receive(self._process.stdout))
        except (OSError, EOFError, ValueError):  # ValueError: it was closed meanwhile
            return None

    def close(self) -> None:
        """End the process; a request under way is answered with None."""
        child.end(self._process)


def send(stream: IO[bytes], content: bytes) -> None:
    stream.write(LENGTH.pack(len(content)))
    stream.write(content)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes:
    """
    Raises:
        EOFError: the stream ended.
    """
    head = stream.read(LENGTH.size)
    content = stream.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else b""
    if len(head) < LENGTH.size or len(content) < LENGTH.unpack(head)[0]:
        raise EOFError
    return content


def packed(chunk: EncodedChunk) -> bytes:
    """A chunk as bytes: a line of JSON, then its arrays."""
    head = {"rows": len(chunk.lengths), "tokens": len(chunk.input_ids), "refused": list(chunk.refused.items())}
    arrays = [getattr(chunk, name).tobytes() for name in (*ROW_FIELDS, *TOKEN_FIELDS)]
    return b"".join([json.dumps(head).encode(), b"\n", *arrays])


def unpacked(content: bytes) -> EncodedChunk:
    line, _, rest = content.partition(b"\n")
    head = json.loads(line)
    arrays, start = {}, 0
    for name, dtype in (ROW_FIELDS | TOKEN_FIELDS).items():
        count = head["rows"] if name in ROW_FIELDS else head["tokens"]
        arrays[name] = np.frombuffer(rest, dtype, count, start)
        start += arrays[name].nbytes
    return EncodedChunk(**arrays, refused={number: Refused(*why) for number, why in head["refused"]})
