"""Side by side with `trl.SFTTrainer`: the same script with one import changed gives the same numbers."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from datasets import Dataset
from peft import LoraConfig
from sft_rows import MARKED_TEMPLATE, chat_pairs, chats, pairs, sft_tokenizer, texts

import etude
from tiny import adapter_of, distance, tiny_llama

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="the peer, trl, is not installed"),
    pytest.mark.filterwarnings("ignore"),  # the peer's own
]

STEPS = 6


def side(library: Any, rows: list[dict[str, Any]], **changes: Any) -> Any:
    args = library.SFTConfig(
        output_dir=f"out-{library.__name__}",
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        learning_rate=1e-3,
        logging_steps=1,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        **changes,
    )
    trainer = library.SFTTrainer(
        model=tiny_llama(),
        args=args,
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows[:4]),
        processing_class=sft_tokenizer(MARKED_TEMPLATE),
        peft_config=LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    trainer.train()
    return trainer


def test_their_settings_are_taken_over() -> None:
    import trl

    theirs = trl.SFTConfig("out", packing=True, max_length=64, use_cpu=True, report_to="none", seed=7)
    taken = etude.SFTConfig.from_arguments(theirs)
    names = ("learning_rate", "logging_steps", "gradient_checkpointing", "bf16", "seed", "packing", "max_length")
    assert [getattr(taken, name) for name in names] == [getattr(theirs, name) for name in names]


def test_every_setting_of_theirs_is_known_with_its_default() -> None:
    import dataclasses

    import trl

    ours = {item.name: item.default for item in dataclasses.fields(etude.SFTConfig)}
    added = {item.name: item.default for item in dataclasses.fields(trl.SFTConfig)}
    for item in dataclasses.fields(etude.TrainingArguments):
        if item.name not in ("learning_rate", "logging_steps", "gradient_checkpointing", "bf16"):
            added.pop(item.name, None)
    added["pad_to_multiple_of"] = None  # they write "auto", which is None but on one kind of hardware
    assert {name: ours.get(name, "missing") for name in added} == added


def test_every_argument_of_theirs_is_an_argument() -> None:
    import inspect

    import trl

    assert list(inspect.signature(trl.SFTTrainer.__init__).parameters) == [
        name for name in inspect.signature(etude.SFTTrainer.__init__).parameters if name != "old_names"
    ]


def curve(trainer: Any, key: str) -> list[float]:
    return [float(entry[key]) for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize(
    ("rows", "changes"),
    [
        (texts(24), {}),
        (texts(24), {"max_length": 6}),
        (texts(24), {"shuffle_dataset": True}),
        (texts(24), {"packing": True, "max_length": 24}),
        (texts(24), {"packing": True, "max_length": 12, "packing_strategy": "wrapped"}),
        (pairs(24), {}),
        (pairs(24), {"completion_only_loss": False}),
        (pairs(24), {"packing": True, "max_length": 10, "packing_strategy": "bfd_split"}),
        (chats(24), {}),
        (chats(24), {"assistant_only_loss": True}),
        (chats(24), {"assistant_only_loss": True, "packing": True, "max_length": 32}),
        (chat_pairs(24), {}),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "-".join(value[0]),
)
def test_same_numbers(rows: list[dict[str, Any]], changes: dict[str, Any]) -> None:
    import trl

    theirs, ours = side(trl, rows, **changes), side(etude, rows, **changes)
    for key in ("loss", "grad_norm", "learning_rate"):
        assert curve(ours, key) == pytest.approx(curve(theirs, key), rel=1e-5)
    assert len(curve(ours, "loss")) == STEPS
    assert distance(adapter_of(ours.model), adapter_of(theirs.model)) <= 1e-4
    if not changes.get("packing"):  # their loss of an evaluation set depends on its batches; one batch holds this one
        assert ours.evaluate()["eval_loss"] == pytest.approx(theirs.evaluate()["eval_loss"], rel=1e-5)
