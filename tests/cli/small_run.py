"""A tokenizer with a chat template, and a run of a few steps that has learned to answer a question with one word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from etude.cli import main as command
from tiny import V, tiny_llama

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]


def chat_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    words = SPECIAL + [f"w{number}" for number in range(V - len(SPECIAL))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.decoder = WordPiece(prefix="##", cleanup=False)  # words with spaces between them
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=SPECIAL[4:],
    )
    made.chat_template = template
    return made


def save_base(folder: Path, seed: int = 0, template: str | None = TEMPLATE, **changes: Any) -> Path:
    tiny_llama(seed, **changes).save_pretrained(folder)
    chat_tokenizer(template).save_pretrained(folder)
    return folder


def question_rows(num_rows: int) -> list[dict[str, Any]]:
    """`w3` is answered with `w13 w13`."""
    rows = []
    for number in range(num_rows):
        word = number % 4
        turns = [("user", f"w{word} w9"), ("assistant", f"w{word + 10} w{word + 10}")]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def train_run(folder: Path, *words: str) -> Path:
    """A run in `folder/run` with `folder/base` and `folder/rows.jsonl`."""
    base, rows = save_base(folder / "base"), write_rows(folder / "rows.jsonl", question_rows(32))
    settings = ["--eval-fraction", "0", "--learning-rate", "2e-2", "--max-steps", "40", "--lora-r", "8", "--use-cpu"]
    told = ["--model", str(base), "--data", str(rows), "--output", str(folder / "run"), "--save-steps", "20"]
    assert command.main(["train", *told, *settings, *words]) == 0
    return folder / "run"
