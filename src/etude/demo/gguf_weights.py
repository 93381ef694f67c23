"""A GGUF file of Gemma 3 -> the weights and the configuration that transformers expects.

The `gguf` package unpacks the quantised blocks. The file's header is read here: the package makes several arrays of
each of the vocabulary's 262,144 entries, which takes eleven seconds for a table that is only skipped, and transformers
reads the header so three times.

Layout (GGUF version 3, little endian): magic, version, number of tensors and of metadata entries; the entries (name,
type, value); the tensors (name, dimensions innermost first, type, offset); padding; the data.
Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from etude.errors import ModelError, require

MAGIC, VERSION = b"GGUF", 3
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
DEFAULT_ALIGNMENT = 32

OUTER_WEIGHTS = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
LAYER_WEIGHTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
CONFIG_FIELDS = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "max_position_embeddings": "context_length",
}
SPECIAL_TOKENS = {
    "bos_token_id": "bos_token_id",
    "eos_token_id": "eos_token_id",
    "pad_token_id": "padding_token_id",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in the file. `shape` is outermost first; `offset` counts from the start of the data."""

    name: str
    shape: tuple[int, ...]
    quantization: int
    offset: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says before its data. Of an array in the metadata only the length is kept."""

    metadata: dict[str, Any]
    tensors: tuple[StoredTensor, ...]
    data_start: int


def read_header(content: bytes) -> Header:
    """Read everything in front of the data.

    Raises:
        ModelError: the file is no GGUF of version 3, or it ends too early.
    """
    if content[:4] != MAGIC:
        raise ModelError("the base model's file is no GGUF file")
    cursor = _Cursor(content, position=4)
    try:
        version, num_tensors, num_entries = cursor.take("I"), cursor.take("Q"), cursor.take("Q")
        if version != VERSION:
            raise ModelError(f"the base model's file is GGUF version {version}, expected {VERSION}")
        metadata = {cursor.string(): cursor.value(cursor.take("I")) for _ in range(num_entries)}
        tensors = tuple(cursor.tensor() for _ in range(num_tensors))
    except struct.error as error:
        raise ModelError("the base model's GGUF file ends within its header") from error
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    return Header(metadata, tensors, math.ceil(cursor.position / alignment) * alignment)


def read_weights(gguf_file: Path, dtype: torch.dtype) -> tuple[dict[str, Tensor], Any]:
    """The weights under the names of transformers, unpacked to `dtype`, and a `Gemma3TextConfig` for them.

    Raises:
        ModelError: the file is damaged, or of another kind of model.
    """
    require("gguf", purpose="the demo's base model", install="pip install 'etude[demo]'")
    content = gguf_file.read_bytes()
    header = read_header(content)
    weights = dict(_unpacked(content, header, dtype))
    return weights, gemma3_config(
        header.metadata, vocab_size=weights["model.embed_tokens.weight"].shape[0], dtype=dtype
    )


def gemma3_config(metadata: dict[str, Any], *, vocab_size: int, dtype: torch.dtype) -> Any:
    """The `Gemma3TextConfig` that the metadata describes; what it leaves open has Gemma 3's defaults."""
    from transformers import Gemma3TextConfig

    if metadata.get("general.architecture") != "gemma3":
        raise ModelError(f"expected a Gemma 3 model, the file says {metadata.get('general.architecture')!r}")
    fields = {name: metadata[f"gemma3.{key}"] for name, key in CONFIG_FIELDS.items()}
    return Gemma3TextConfig(
        vocab_size=vocab_size,
        query_pre_attn_scalar=fields["head_dim"],
        architectures=["Gemma3ForCausalLM"],
        dtype=dtype,
        **{name: metadata[f"tokenizer.ggml.{key}"] for name, key in SPECIAL_TOKENS.items()},
        **fields,
    )


def transformers_name(gguf_name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` for `blk.3.ffn_up.weight`.

    Raises:
        ModelError: Gemma 3 has no such weight.
    """
    if gguf_name in OUTER_WEIGHTS:
        return OUTER_WEIGHTS[gguf_name]
    block, layer, part, suffix = (gguf_name.split(".") + [""] * 4)[:4]
    if block != "blk" or suffix != "weight" or part not in LAYER_WEIGHTS:
        raise ModelError(f"the base model's file has a weight that Gemma 3 has not: {gguf_name}")
    return f"model.layers.{layer}.{LAYER_WEIGHTS[part]}.weight"


def _unpacked(content: bytes, header: Header, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    for tensor in header.tensors:
        quantization = GGMLQuantizationType(tensor.quantization)
        values_per_block, bytes_per_block = GGML_QUANT_SIZES[quantization]
        *outer, inner = tensor.shape
        packed_shape = (*outer, inner // values_per_block * bytes_per_block)
        start, num_bytes = header.data_start + tensor.offset, math.prod(packed_shape)
        if start + num_bytes > len(content):
            raise ModelError(f"the base model's GGUF file ends before the weight {tensor.name}")
        packed = np.frombuffer(content, dtype=np.uint8, count=num_bytes, offset=start).reshape(packed_shape)
        values = torch.from_numpy(np.array(dequantize(packed, quantization), dtype=np.float32))
        name = transformers_name(tensor.name)
        # llama.cpp stores the factor of a normalisation, Gemma 3 in transformers its difference from one.
        yield name, (values - 1 if name.endswith("norm.weight") else values).to(dtype)


@dataclass
class _Cursor:
    """Reads one value after the other."""

    content: bytes
    position: int

    def take(self, code: str) -> Any:
        (value,) = struct.unpack_from(f"<{code}", self.content, self.position)
        self.position += struct.calcsize(f"<{code}")
        return value

    def string(self) -> str:
        length = self.take("Q")
        self.position += length
        return self.content[self.position - length : self.position].decode("utf-8", errors="replace")

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY:
            return self.skip_array()
        if kind not in SCALARS:
            raise ModelError(f"the base model's GGUF file has metadata of an unknown type ({kind})")
        return self.take(SCALARS[kind])

    def skip_array(self) -> int:
        kind, length = self.take("I"), self.take("Q")
        if kind in SCALARS:
            self.position += length * struct.calcsize(f"<{SCALARS[kind]}")
            return int(length)
        for _ in range(length):
            self.value(kind)
        return int(length)

    def tensor(self) -> StoredTensor:
        name = self.string()
        dimensions = [self.take("Q") for _ in range(self.take("I"))]
        return StoredTensor(name, tuple(reversed(dimensions)), self.take("I"), self.take("Q"))
