"""Models, tokenizers, data and collators small enough to train in a test, built in code from a seed.

Shapes: V vocabulary, N rows, T tokens of a row.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

V = 64
PAD, BOS, EOS = 0, 1, 2
IGNORED = -100

Row = dict[str, Any]
Batch = dict[str, torch.Tensor]

# A wide initialisation: with the usual 0.02 so narrow a model has gradients near Adam's epsilon, where an optimizer
# step divides rounding by rounding.
DECODER = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}


def tiny_llama(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(DECODER | changes)))


def tiny_qwen3(seed: int = 0, **changes: Any) -> Qwen3ForCausalLM:
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**(DECODER | {"head_dim": 8} | changes)))


def tiny_gemma3(seed: int = 0, **changes: Any) -> Gemma3ForCausalLM:
    """A window of 4 tokens in the first layer, shorter than the rows; the second layer sees everything."""
    torch.manual_seed(seed)
    gemma = {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention"],
    }
    return Gemma3ForCausalLM(Gemma3TextConfig(**(DECODER | gemma | changes)))


def tiny_bert(seed: int = 0, **changes: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "num_labels": 3,
        "pad_token_id": PAD,
    }
    return BertForSequenceClassification(BertConfig(**(config | changes)))


def tiny_t5(seed: int = 0, **changes: Any) -> T5ForConditionalGeneration:
    torch.manual_seed(seed)
    config: dict[str, Any] = {
        "vocab_size": V,
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 2,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "pad_token_id": PAD,
        "decoder_start_token_id": PAD,
        "eos_token_id": EOS,
    }
    return T5ForConditionalGeneration(T5Config(**(config | changes)))


def with_lora(model: PreTrainedModel, seed: int = 1, **lora: Any) -> PeftModel:
    """Put a rank-8 adapter on `model`; the same seed draws the same A matrices."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"} | lora
    return get_peft_model(model, LoraConfig(**settings))


def causal_lora(seed: int = 0, **lora: Any) -> PeftModel:
    """The model of most behaviour tests: a tiny Llama with adapters on its query and value projections."""
    return with_lora(tiny_llama(seed), **({"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "v_proj"]} | lora))


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words `w0` ... of a vocabulary of V entries; the first four are special."""
    special = ["<pad>", "<bos>", "<eos>", "<unk>"]
    words = special + [f"w{number}" for number in range(V - len(special))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def language_rows(
    num_rows: int, seed: int = 0, *, shortest: int = 4, longest: int = 14, masked: bool = True
) -> list[Row]:
    """Rows of ragged length; with `masked`, a prompt of at least one token carries no label."""
    draw = random.Random(seed)
    rows = []
    for _ in range(num_rows):
        num_tokens = draw.randint(shortest, longest)
        tokens = [draw.randrange(4, V) for _ in range(num_tokens)]
        num_prompt = draw.randint(1, num_tokens - 2) if masked else 0
        labels = [IGNORED] * num_prompt + tokens[num_prompt:]
        rows.append({"input_ids": tokens, "attention_mask": [1] * num_tokens, "labels": labels})
    return rows


def classification_rows(num_rows: int, seed: int = 0, *, num_labels: int = 3) -> list[Row]:
    draw = random.Random(seed)
    return [
        {"input_ids": row["input_ids"], "attention_mask": row["attention_mask"], "labels": draw.randrange(num_labels)}
        for row in language_rows(num_rows, seed)
    ]


def translation_rows(num_rows: int, seed: int = 0) -> list[Row]:
    sources, targets = language_rows(num_rows, seed), language_rows(num_rows, seed + 1, longest=9, masked=False)
    return [source | {"labels": target["labels"]} for source, target in zip(sources, targets, strict=True)]


class Padded:
    """A user's collator: pads every field to the longest row of the batch (or a multiple of `multiple`)."""

    fill: ClassVar = {"input_ids": PAD, "attention_mask": 0, "labels": IGNORED}

    def __init__(self, *, side: str = "right", multiple: int = 1) -> None:
        self.side, self.multiple = side, multiple

    def __call__(self, rows: Sequence[Row]) -> Batch:
        batch = {}
        for name, fill in self.fill.items():
            if isinstance(rows[0][name], int):
                batch[name] = torch.tensor([row[name] for row in rows])
                continue
            longest = -(-max(len(row[name]) for row in rows) // self.multiple) * self.multiple
            padded = []
            for row in rows:
                padding = [fill] * (longest - len(row[name]))
                values = list(row[name])
                padded.append(values + padding if self.side == "right" else padding + values)
            batch[name] = torch.tensor(padded)
        return batch


class Watched:
    """A collator that remembers the tokens of every row it was given, batch by batch."""

    def __init__(self, collate: Callable[[Sequence[Row]], Batch]) -> None:
        self.collate = collate
        self.batches: list[list[tuple[int, ...]]] = []

    def __call__(self, rows: Sequence[Row]) -> Batch:
        self.batches.append([tuple(row["input_ids"]) for row in rows])
        return self.collate(rows)


class ListDataset(torch.utils.data.Dataset[Row]):
    """Map-style."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]


class StreamDataset(torch.utils.data.IterableDataset[Row]):
    """No length, one pass after the other in file order."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)


def adapter_of(model: PeftModel) -> dict[str, torch.Tensor]:
    """A copy of what a checkpoint of the adapter would hold."""
    return {name: value.detach().clone() for name, value in get_peft_model_state_dict(model).items()}


def distance(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    """Relative norm of the difference of two adapters, all tensors taken as one vector."""
    assert ours.keys() == theirs.keys()
    difference = torch.cat([(ours[name].double() - theirs[name].double()).flatten() for name in theirs]).norm()
    return float(difference / torch.cat([value.double().flatten() for value in theirs.values()]).norm())


def same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    return ours.keys() == theirs.keys() and not differing(ours, theirs)


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> list[str]:
    return [name for name in theirs if not torch.equal(ours[name], theirs[name])]


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """As `assert same_bits(...)`, but a failure names the tensors instead of printing them."""
    assert sorted(ours) == sorted(theirs)
    names = differing(ours, theirs)
    assert names == []
