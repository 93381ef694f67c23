"""The process that tokenizes for `token_workers.py`, which starts this file as a script: a description of the tokenizer and
of the work, then chunks of rows in, tokens out, until the other side closes."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import sys
from typing import Any


class CoreTokenizer:
    """What the encoding asks of a tokenizer of transformers, on top of its core alone."""

    is_fast = True

    def __init__(self, known: dict[str, Any]) -> None:
        from tokenizers import Tokenizer

        self._core = Tokenizer.from_str(known["core"])
        self._core.no_truncation()
        self._core.no_padding()
        self._core.encode_special_tokens = known["splits_special_tokens"]
        self.bos_token_id, self.eos_token_id = known["bos_token_id"], known["eos_token_id"]
        self.eos_token = known["eos_token"]
        self.special_tokens_map = known["special_tokens_map"]
        self.all_special_tokens = known["all_special_tokens"]

    def __call__(self, texts: list[str], *, add_special_tokens: bool, **_: Any) -> dict[str, Any]:
        encodings = self._core.encode_batch(texts, add_special_tokens=add_special_tokens)
        return {
            "input_ids": [encoding.ids for encoding in encodings],
            "offset_mapping": [encoding.offsets for encoding in encodings],
        }


def give_memory_back() -> None:
    """Building a tokenizer with a large vocabulary takes four times the memory that it keeps; glibc holds on to it."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def main() -> None:
    """Answer requests from stdin on stdout until stdin ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what an import prints is no reply
    from etude.data.encoding import as_chunk, encode_each
    from etude.data.token_workers import packed, receive, send

    known = json.loads(receive(sys.stdin.buffer))
    tokenizer = CoreTokenizer(known)
    del known["core"]
    give_memory_back()
    while True:
        rows = json.loads(receive(sys.stdin.buffer))
        encoded = encode_each(rows, tokenizer, template=known["template"], **known["options"])
        send(replies, packed(as_chunk(encoded)))


if __name__ == "__main__":
    try:
        main()
    except (EOFError, BrokenPipeError):
        sys.exit(0)
