"""The real shapes of public models, filled with random weights, and the lengths of their training data."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


def llama_8b(layers: int = 32) -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=False,
    )  # fmt: skip


def llama_1b() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
        num_key_value_heads=8, head_dim=64, max_position_embeddings=8192, rope_theta=500000.0, tie_word_embeddings=True,
    )  # fmt: skip


def qwen3_06b() -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=151936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, max_position_embeddings=8192, tie_word_embeddings=True,
    )  # fmt: skip


def qwen3_30b_a3b() -> Any:
    """The shape of Qwen3-30B-A3B with 12 of its 48 layers, which fit one GPU."""
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=12, num_attention_heads=32,
        num_key_value_heads=4, head_dim=128, num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
        norm_topk_prob=True, max_position_embeddings=8192, tie_word_embeddings=False,
    )  # fmt: skip


def tiny() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=False,
    )  # fmt: skip


EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
"""Adapters on stacked experts as well, which are no linear layers."""


@dataclass(frozen=True)
class Work:
    """A model shape, the samples of one step, and how many steps etude is given before and while it is timed."""

    config: Any
    samples: int
    length: int
    ragged: bool = False
    warmup: int = 6
    steps: int = 8
    adapter: dict[str, Any] = field(default_factory=dict)
    """Arguments of LoraConfig beside the rank and the linear layers."""


WORKS = {
    "llama-8b-4x2048": Work(llama_8b, 4, 2048),
    "llama-8b-4x1024": Work(llama_8b, 4, 1024),
    "llama-1b-8x1024": Work(llama_1b, 8, 1024),
    "qwen3-0.6b-8x1024": Work(qwen3_06b, 8, 1024),
    "qwen3-0.6b-1x512": Work(qwen3_06b, 1, 512, warmup=60, steps=40),
    "llama-1b-ragged": Work(llama_1b, 8, 2048, ragged=True, warmup=110, steps=40),
    "qwen3-30b-a3b-4x1024": Work(qwen3_30b_a3b, 4, 1024, adapter=EXPERTS),
    "tiny": Work(tiny, 2, 256, ragged=True, warmup=2, steps=3),  # shows on a CPU that the benchmark works
}

MEASURED = tuple(name for name in WORKS if name != "tiny")


def rows_of(work: Work, steps: int, vocab_size: int, seed: int = 0) -> list[dict[str, list[int]]]:
    """Random tokens, all of them supervised; ragged lengths are log-normal between 16 and `length`, mean about 270."""
    generator = torch.Generator().manual_seed(seed)
    count = work.samples * steps
    lengths = [work.length] * count
    if work.ragged:
        drawn = torch.exp(torch.randn(count, generator=generator) * 0.9 + 5.2)
        lengths = drawn.clamp(16, work.length).long().tolist()
    rows = []
    for length in lengths:
        ids = torch.randint(1, vocab_size, (length,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": ids, "attention_mask": [1] * length})
    return rows


def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, filler: int) -> torch.Tensor:
        return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows])

    return {
        "input_ids": padded("input_ids", 0),
        "labels": padded("labels", -100),
        "attention_mask": padded("attention_mask", 0),
    }
