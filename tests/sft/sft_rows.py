"""Rows and a tokenizer for the tests of supervised fine-tuning."""

from __future__ import annotations

import random
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from tiny import V

IGNORED = -100

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
MARKED_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|> "
    "{% generation %}{{ m['content'] }} <|end|>{% endgeneration %} "
    "{% else %}<|{{ m['role'] }}|> {{ m['content'] }} <|end|> {% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]


def sft_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
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


def _words(draw: random.Random, shortest: int, longest: int) -> str:
    return " ".join(f"w{draw.randrange(50)}" for _ in range(draw.randint(shortest, longest)))


def texts(num_rows: int) -> list[dict[str, Any]]:
    draw = random.Random(1)
    return [{"text": _words(draw, 3, 14)} for _ in range(num_rows)]


def pairs(num_rows: int) -> list[dict[str, Any]]:
    draw = random.Random(2)
    return [{"prompt": _words(draw, 2, 6), "completion": " " + _words(draw, 1, 8)} for _ in range(num_rows)]


def chats(num_rows: int) -> list[dict[str, Any]]:
    draw = random.Random(3)

    def turns() -> list[dict[str, str]]:
        return [{"role": role, "content": _words(draw, 1, 5)} for role in ("user", "assistant")]

    return [{"messages": [turn for _ in range(draw.randint(1, 2)) for turn in turns()]} for _ in range(num_rows)]


def chat_pairs(num_rows: int) -> list[dict[str, Any]]:
    return [{"prompt": row["messages"][:-1], "completion": row["messages"][-1:]} for row in chats(num_rows)]
