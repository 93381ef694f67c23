"""The kinds of training that PEFT's documentation shows with `Trainer`, on tiny models, with one import changed.

Each script is written against a module called `library`, once transformers and once etude, and must leave the same losses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import transformers
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from side_by_side import ADAPTER_TOLERANCE, STEP_TOLERANCE, largest_difference

import etude
from tiny import (
    V,
    adapter_of,
    distance,
    language_rows,
    tiny_bert,
    tiny_llama,
    tiny_t5,
    tiny_tokenizer,
    translation_rows,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own

COMMON: dict[str, Any] = {"use_cpu": True, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "seed": 3}


def causal_language_model(library: Any) -> Any:
    """A prompt-tuned decoder on text columns, tokenised with `map`, labels made by the collator."""
    tokenizer = tiny_tokenizer()
    texts = [" ".join(f"w{token - 4}" for token in row["input_ids"]) for row in language_rows(12)]
    data = datasets.Dataset.from_dict({"text": texts})
    data = data.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns=["text"])
    torch.manual_seed(0)
    model = get_peft_model(tiny_llama(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    trainer = library.Trainer(
        model=model,
        args=library.TrainingArguments(
            output_dir=library.__name__, learning_rate=3e-2, num_train_epochs=2, per_device_train_batch_size=4, **COMMON
        ),
        train_dataset=data,
        data_collator=transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False),
    )
    trainer.train()
    return trainer


def sequence_classification(library: Any) -> Any:
    """LoRA on an encoder, judged by accuracy at the end of each epoch, the best loaded at the end."""
    rows = [row | {"label": row["input_ids"][0] % 3} for row in language_rows(16, longest=8)]
    data = datasets.Dataset.from_list(rows).remove_columns("labels").train_test_split(test_size=4, seed=0)
    torch.manual_seed(0)
    config = LoraConfig(task_type="SEQ_CLS", r=4, lora_alpha=16, target_modules=["query", "key"], bias="all")
    trainer = library.Trainer(
        model=get_peft_model(tiny_bert(), config),
        args=library.TrainingArguments(
            output_dir=library.__name__, learning_rate=1e-3, num_train_epochs=2, per_device_train_batch_size=4,
            per_device_eval_batch_size=4, weight_decay=0.01, eval_strategy="epoch", save_strategy="epoch",
            load_best_model_at_end=True, **COMMON,
        ),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tiny_tokenizer(),
        data_collator=transformers.DataCollatorWithPadding(tiny_tokenizer()),
        compute_metrics=accuracy,
    )  # fmt: skip
    trainer.train()
    return trainer


def token_classification(library: Any) -> Any:
    """LoRA on an encoder with a label for each token."""
    torch.manual_seed(0)
    config = tiny_bert().config
    config.num_labels = 4
    base = transformers.BertForTokenClassification(config)
    rows = [row | {"labels": [token % 4 for token in row["input_ids"]]} for row in language_rows(12)]
    trainer = library.Trainer(
        model=get_peft_model(base, LoraConfig(task_type="TOKEN_CLS", r=4, target_modules=["query", "value"])),
        args=library.TrainingArguments(
            output_dir=library.__name__, learning_rate=1e-3, num_train_epochs=2, per_device_train_batch_size=4, **COMMON
        ),
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=transformers.DataCollatorForTokenClassification(tiny_tokenizer()),
    )
    trainer.train()
    return trainer


def sequence_to_sequence(library: Any) -> Any:
    """IA3 on an encoder-decoder."""
    torch.manual_seed(0)
    config = IA3Config(task_type="SEQ_2_SEQ_LM", target_modules=["k", "v", "wo"], feedforward_modules=["wo"])
    model = get_peft_model(tiny_t5(), config)
    trainer = library.Seq2SeqTrainer(
        model=model,
        args=library.Seq2SeqTrainingArguments(
            output_dir=library.__name__, learning_rate=8e-3, num_train_epochs=2, per_device_train_batch_size=4,
            predict_with_generate=True, **COMMON,
        ),
        train_dataset=datasets.Dataset.from_list(translation_rows(12)),
        data_collator=transformers.DataCollatorForSeq2Seq(tiny_tokenizer(), model=model),
    )  # fmt: skip
    trainer.train()
    return trainer


def image_classification(library: Any) -> Any:
    """LoRA on a vision transformer with a trained head; the collator makes the batch, so no column may be dropped."""
    torch.manual_seed(0)
    base = transformers.ViTForImageClassification(
        transformers.ViTConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4,
            hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, num_labels=3, initializer_range=0.2,
        )
    )  # fmt: skip
    config = LoraConfig(
        r=4, lora_alpha=4, target_modules=["query", "value", "q_proj", "v_proj"], modules_to_save=["classifier"]
    )
    pixels = torch.rand(14, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    images = [{"image": image, "label": number % 3} for number, image in enumerate(pixels)]

    def collate(rows: list[Any]) -> dict[str, torch.Tensor]:
        labels = torch.tensor([row["label"] for row in rows])
        return {"pixel_values": torch.stack([row["image"] for row in rows]), "labels": labels}

    trainer = library.Trainer(
        model=get_peft_model(base, config),
        args=library.TrainingArguments(
            output_dir=library.__name__, learning_rate=2e-2, num_train_epochs=4, per_device_train_batch_size=4,
            gradient_accumulation_steps=1, per_device_eval_batch_size=4, remove_unused_columns=False,
            label_names=["labels"], eval_strategy="epoch", save_strategy="epoch", load_best_model_at_end=True,
            metric_for_best_model="accuracy", **COMMON,
        ),
        train_dataset=images[:10],
        eval_dataset=images[10:],
        data_collator=collate,
        compute_metrics=accuracy,
    )  # fmt: skip
    trainer.train()
    return trainer


def accuracy(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((np.argmax(prediction.predictions, axis=1) == prediction.label_ids).mean())}


EXAMPLES: list[Callable[[Any], Any]] = [
    causal_language_model,
    sequence_classification,
    token_classification,
    sequence_to_sequence,
    image_classification,
]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.__name__)
def test_example(example: Callable[[Any], Any]) -> None:
    peer, mine = example(transformers), example(etude)
    for name in ("loss", "grad_norm", "learning_rate", "eval_loss", "eval_accuracy"):
        logged = [[e[name] for e in trainer.state.log_history if name in e] for trainer in (mine, peer)]
        assert logged[0] == logged[1] == [] or largest_difference(*logged) <= STEP_TOLERANCE, name
    assert distance(adapter_of(mine.model), adapter_of(peer.model)) <= ADAPTER_TOLERANCE
    losses = [entry["loss"] for entry in mine.state.log_history if "loss" in entry]
    assert np.mean(losses[len(losses) // 2 :]) < np.mean(losses[: len(losses) // 2])  # it learns


def test_the_adapter_of_an_example_is_loaded_and_generates() -> None:
    trainer = causal_language_model(etude)
    trainer.save_model("adapter")
    model = PeftModel.from_pretrained(tiny_llama(), "adapter")
    tokens = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        generated = model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3)
        expected = trainer.model.generate(input_ids=tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=3)
    assert generated.max() < V
    assert torch.equal(generated, expected)
