"""A tokenizer made here: byte-level BPE over a few sentences, with the marks that chat templates need."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SENTENCES = ["What is the capital of France?", "The capital of France is Paris.", "Say hello to the user, please."]
MARKS = ["<s>", "</s>", "<|start|>", "<|end|>"]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Writes `<s>` before a text unless a template did; pads with its end token; has no chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(vocab_size=320, special_tokens=MARKS, initial_alphabet=alphabet, show_progress=False),
    )
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=["<|start|>", "<|end|>"],
    )
