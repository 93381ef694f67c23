"""A tokenizer with a chat template, and a run as `etude train` leaves it, made without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from etude.checkpoint.codec import save_tree
from etude.checkpoint.resume import PROGRESS
from etude.cli.recipe import Lora, Recipe, save
from etude.model.adapter import base_fingerprint
from etude.model.load import attach_lora
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


def save_base(folder: Path, seed: int = 0, template: str | None = TEMPLATE, dtype: torch.dtype = torch.float32) -> Path:
    tiny_llama(seed).to(dtype).save_pretrained(folder)
    chat_tokenizer(template).save_pretrained(folder)
    return folder


def question_rows(num_rows: int) -> list[dict[str, Any]]:
    """Conversations of one question and one answer, four different ones."""
    rows = []
    for number in range(num_rows):
        word = number % 4
        turns = [("user", f"w{word} w9"), ("assistant", f"w{word + 10} w{word + 11}")]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    return rows


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def made_run(
    folder: Path, *, template: str | None = TEMPLATE, rows: list[dict[str, Any]] | None = None, **adapter: Any
) -> Path:
    """`folder/run` with an adapter of random matrices, its recipe, and a checkpoint that knows its base model."""
    base, run = save_base(folder / "base", template=template), folder / "run"
    data = write_rows(folder / "rows.jsonl", rows or question_rows(8))
    model = attach_lora(tiny_llama(), 4, 8, 0.0, **adapter)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(run)
    chat_tokenizer(template).save_pretrained(run)
    save(Recipe(model=str(base), data=str(data), output=str(run), lora=Lora(r=4, alpha=8)), run)
    (run / "checkpoint-1").mkdir()
    save_tree(run / "checkpoint-1", PROGRESS, {"run": {"base": base_fingerprint(model)}})
    return run
