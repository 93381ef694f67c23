"""`SFTTrainer`: what is learned of each kind of row, packing, and the scripts of older versions."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, IterableDataset
from peft import LoraConfig, PeftModel
from sft_rows import IGNORED, MARKED_TEMPLATE, chats, pairs, sft_tokenizer, texts

import etude
from etude.arguments import TrainingArguments
from etude.errors import ConfigError, DataError, ModelError, UnknownArgumentError
from etude.sft_config import SFTConfig
from etude.sft_data import BlockCollator, best_fit, packed, prepare, shape_of
from tiny import adapter_of, same_bits, tiny_llama

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


def config(**changes: Any) -> SFTConfig:
    settings: dict[str, Any] = {
        "output_dir": "out",
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "bf16": False,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "log_level": "error",
        "disable_tqdm": True,
    }
    return SFTConfig(**(settings | changes))


def trainer(rows: Any, *, model: Any = None, **options: Any) -> etude.SFTTrainer:
    changes = options.pop("config", {})
    return etude.SFTTrainer(
        model=tiny_llama() if model is None else model,
        args=config(**changes),
        train_dataset=rows,
        processing_class=options.pop("processing_class", None) or sft_tokenizer(),
        peft_config=LoraConfig(**LORA),
        **options,
    )


def sample(row: dict[str, Any], **changes: Any) -> tuple[str, str]:
    """The text of a prepared row, and what is learned of it."""
    tokenizer = sft_tokenizer()
    done = prepare([row], tokenizer, config(**changes), packing=False).samples[0]
    learned = [token for token, label in zip(done["input_ids"], done["labels"], strict=True) if label != IGNORED]
    return tokenizer.decode(done["input_ids"]), tokenizer.decode(learned)


TURNS = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
MORE = [{"role": "user", "content": "w3"}, {"role": "assistant", "content": "w4"}]
CHAT = "<|user|> w1 <|end|> <|assistant|> w2 <|end|>"


@pytest.mark.parametrize(
    ("row", "changes", "text", "learned"),
    [
        ({"text": "w1 w2"}, {}, "w1 w2 <eos>", "w1 w2 <eos>"),
        ({"text": "w1 <eos>"}, {}, "w1 <eos>", "w1 <eos>"),
        ({"story": "w1 w2"}, {"dataset_text_field": "story"}, "w1 w2 <eos>", "w1 w2 <eos>"),
        ({"prompt": "w1 w2", "completion": " w3"}, {}, "w1 w2 w3 <eos>", "w3 <eos>"),
        ({"prompt": "w1", "completion": " w3"}, {"completion_only_loss": False}, "w1 w3 <eos>", "w1 w3 <eos>"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {}, CHAT, "w2 <|end|>"),
        ({"prompt": TURNS[:1], "completion": TURNS[1:]}, {"completion_only_loss": False}, CHAT, CHAT),
        ({"prompt": TURNS + MORE[:1], "completion": MORE[1:]}, {}, f"{CHAT} <|user|> w3 <|end|> <|assistant|> w4 <|end|>", "w4 <|end|>"),
        ({"messages": TURNS}, {}, CHAT, CHAT),
        ({"messages": TURNS}, {"assistant_only_loss": True}, CHAT, "w2 <|end|>"),
        ({"conversations": TURNS}, {"assistant_only_loss": True}, CHAT, "w2 <|end|>"),
        ({"conversations": [{"from": "human", "value": "w1"}, {"from": "gpt", "value": "w2"}]}, {"assistant_only_loss": True}, CHAT, "w2 <|end|>"),
        ({"instruction": "w1", "output": "w2"}, {}, CHAT, "w2 <|end|>"),
        ({"input_ids": [8, 9, 10]}, {}, "w0 w1 w2", "w0 w1 w2"),
        ({"input_ids": [8, 9, 10], "labels": [IGNORED, 9, IGNORED]}, {}, "w0 w1 w2", "w1"),
        ({"input_ids": [8, 9, 10], "assistant_masks": [0, 0, 1]}, {}, "w0 w1 w2", "w2"),
        ({"input_ids": [8, 9, 10], "completion_mask": [0, 1, 1]}, {}, "w0 w1 w2", "w0 w1 w2"),
        ({"input_ids": [8, 9, 10], "completion_mask": [0, 1, 1]}, {"completion_only_loss": True}, "w0 w1 w2", "w1 w2"),
        ({"text": "w1 w2 w3 w4"}, {"max_length": 3}, "w1 w2 w3", "w1 w2 w3"),
        ({"text": "w1 w2 w3 w4"}, {"max_seq_length": 2}, "w1 w2", "w1 w2"),
    ],
)  # fmt: skip
def test_what_is_learned_of_a_row(row: dict[str, Any], changes: dict[str, Any], text: str, learned: str) -> None:
    assert sample(row, **changes) == (text, learned)


@pytest.mark.parametrize(
    ("row", "changes", "message"),
    [
        ({"text": "w1"}, {"assistant_only_loss": True}, "no conversations"),
        ({"question": "w1"}, {}, "expected a row with 'text'"),
        ({"prompt": TURNS[:1], "completion": MORE}, {}, "expected one turn of the assistant"),
    ],
)
def test_rows_that_the_settings_do_not_fit(row: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        sample(row, **changes)


def test_a_bad_row_is_named_by_its_number() -> None:
    with pytest.raises(DataError, match=r"rows:2 field 'completion': expected string, got null"):
        prepare([*pairs(1), {"prompt": "w1", "completion": None}], sft_tokenizer(), config(), packing=False)


def test_rows_without_anything_to_learn_are_left_out_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*pairs(3), {"prompt": "w1 w2 w3 w4 w5", "completion": " w6"}]
    made = trainer(rows, config={"max_length": 5, "log_level": "info"})
    assert len(made.train_dataset) == sum(len(row["prompt"].split()) < 5 for row in rows)
    assert "left out; the first: rows:" in capsys.readouterr().err


def test_a_formatting_function_makes_the_text() -> None:
    rows = [{"q": "w1", "a": "w2"}]
    text = lambda row: f"{row['q']} w9 {row['a']}"  # noqa: E731
    done = prepare(rows, sft_tokenizer(), config(), packing=False, formatting_func=text)
    assert sft_tokenizer().decode(done.samples[0]["input_ids"]) == "w1 w9 w2 <eos>"
    with pytest.raises(ConfigError, match="formatting_func: must return the text of the one row"):
        prepare(rows, sft_tokenizer(), config(), packing=False, formatting_func=lambda row: ["w1"])  # type: ignore[arg-type,return-value]
    with pytest.raises(ConfigError, match="completion_only_loss"):
        shape_of(rows[0], config(completion_only_loss=True), text)


# -- packing ----------------------------------------------------------------------------------------------------------


def test_best_fit_takes_the_longest_first_and_the_fullest_bin() -> None:
    assert best_fit([5, 2, 3, 1], 4) == [[0], [2, 3], [1]]
    assert best_fit([2, 2, 2], 4) == [[0, 1], [2]]
    assert best_fit([3, 2, 1, 2], 5) == [[0, 1], [3, 2]]


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_packing_keeps_every_token_once_and_blocks_short(strategy: str) -> None:
    samples = [{"input_ids": list(range(n * 10, n * 10 + n)), "labels": [IGNORED] + [1] * (n - 1)} for n in range(1, 7)]
    blocks = packed(samples, 6, strategy)
    assert max(len(block["input_ids"]) for block in blocks) <= 6
    assert len(blocks) < len(samples)
    tokens = sorted(token for block in blocks for token in block["input_ids"])
    assert tokens == sorted(token for sample in samples for token in sample["input_ids"])


def test_samples_of_a_block_do_not_see_each_other() -> None:
    """Blocks and the samples in them give one loss: the collator takes them apart again."""
    model, collate = tiny_llama(), BlockCollator(0)
    samples = list(prepare(texts(6), sft_tokenizer(), config(), packing=False).samples)
    blocks = packed(samples, 24, "bfd")
    assert len(blocks) < len(samples)

    def loss(rows: Any) -> float:
        batch = collate(rows)
        return float(model(**batch, num_items_in_batch=1).loss.detach())

    assert loss(blocks) == pytest.approx(loss(samples), rel=1e-6)


def test_a_packed_run_trains_and_evaluates() -> None:
    made = trainer(texts(12), eval_dataset=texts(4), config={"packing": True, "max_length": 24})
    assert len(made.train_dataset) < 12
    made.train()
    assert made.state.global_step == 4
    assert made.evaluate()["eval_loss"] == pytest.approx(made.evaluate(texts(4))["eval_loss"], rel=1e-6)


# -- the trainer ------------------------------------------------------------------------------------------------------


def test_it_is_the_trainer_on_prepared_rows() -> None:
    made = trainer(Dataset.from_list(pairs(8)))
    made.train()
    base = tiny_llama()
    torch.manual_seed(made.args.seed)
    model = etude.get_peft_model(base, LoraConfig(**LORA))
    rows = list(prepare(pairs(8), sft_tokenizer(), config(), packing=False).samples)
    plain = etude.Trainer(
        model=model, args=config(output_dir="plain"), train_dataset=rows, data_collator=BlockCollator(sft_tokenizer())
    )
    plain.train()
    assert same_bits(adapter_of(made.model), adapter_of(plain.model))


def test_a_stream_trains_on_the_same_samples_in_file_order() -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield from pairs(8)

    streamed = trainer(IterableDataset.from_generator(rows))
    streamed.train()
    listed = trainer(pairs(8), config={"train_sampling_strategy": "sequential"})
    listed.train()
    assert same_bits(adapter_of(streamed.model), adapter_of(listed.model))


def test_a_stopped_run_goes_on_bit_for_bit() -> None:
    whole = trainer(pairs(8), config={"output_dir": "whole"})
    whole.train()
    first = trainer(pairs(8), config={"output_dir": "half", "save_strategy": "steps", "save_steps": 2})
    first.train()
    again = trainer(pairs(8), config={"output_dir": "half"})
    again.train(resume_from_checkpoint="half/checkpoint-2")
    assert same_bits(adapter_of(again.model), adapter_of(whole.model))


def test_a_model_by_name_brings_its_tokenizer(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path / "base")
    sft_tokenizer().save_pretrained(tmp_path / "base")
    made = etude.SFTTrainer(
        str(tmp_path / "base"), args=config(), train_dataset=pairs(4), peft_config=LoraConfig(**LORA)
    )
    assert isinstance(made.model, PeftModel)
    assert made.processing_class.chat_template == sft_tokenizer().chat_template
    made.train()
    with pytest.raises(ConfigError, match="model_init_kwargs: attn_implementation: load the model yourself"):
        etude.SFTTrainer(
            str(tmp_path / "base"),
            args=config(model_init_kwargs={"attn_implementation": "eager"}),
            train_dataset=pairs(4),
        )


def test_tokens_and_template_are_set_on_model_and_tokenizer() -> None:
    Path("chat.jinja").write_text(MARKED_TEMPLATE)
    made = trainer(chats(4), config={"eos_token": "<|end|>", "pad_token": "<unk>", "chat_template_path": "chat.jinja"})
    tokenizer, base = made.processing_class, made.model.get_base_model()
    assert (tokenizer.eos_token, tokenizer.pad_token, tokenizer.chat_template) == ("<|end|>", "<unk>", MARKED_TEMPLATE)
    assert base.config.eos_token_id == tokenizer.eos_token_id
    assert base.generation_config.eos_token_id[0] == tokenizer.eos_token_id
    assert base.config.pad_token_id == tokenizer.convert_tokens_to_ids("<unk>")
    with pytest.raises(ConfigError, match=r"eos_token: '<|ned|>' is not in the vocabulary; did you mean '<|end|>'\?"):
        trainer(chats(4), config={"eos_token": "<|ned|>"})


def test_shuffling_follows_datasets() -> None:
    rows = [{"input_ids": [number, 3], "labels": [number, 3]} for number in range(8)]
    made = trainer(rows, config={"shuffle_dataset": True})
    expected = Dataset.from_list(rows).shuffle(seed=42)["input_ids"]
    assert [sample["input_ids"] for sample in made.train_dataset] == list(expected)


def test_prepared_data_can_be_left_alone() -> None:
    rows = [{"input_ids": [8, 9], "attention_mask": [1, 1], "labels": [8, 9]}]
    made = trainer(rows, config={"dataset_kwargs": {"skip_prepare_dataset": True}})
    assert made.train_dataset is rows


def test_settings_of_old_scripts() -> None:
    tokenizer = sft_tokenizer()
    made = etude.SFTTrainer(
        tiny_llama(),
        args=TrainingArguments("out", report_to="none", use_cpu=True, max_steps=1),
        train_dataset=[{"story": "w1 w2 w3"}],
        tokenizer=tokenizer,
        peft_config=LoraConfig(**LORA),
        dataset_text_field="story",
        max_seq_length=2,
    )
    assert made.train_dataset[0]["input_ids"] == [9, 10]
    assert made.processing_class is tokenizer
    # What was a default there stays what it was.
    assert (made.args.learning_rate, made.args.gradient_checkpointing, made.args.bf16) == (5e-5, False, False)
    with pytest.raises(UnknownArgumentError, match=r"max_sequence_length.*did you mean 'max_seq_length'"):
        etude.SFTTrainer(tiny_llama(), train_dataset=texts(2), processing_class=tokenizer, max_sequence_length=2)


def test_the_completion_collator_of_old_scripts_decides_what_is_learned() -> None:
    tokenizer = sft_tokenizer()
    made = trainer(
        [{"text": "w1 w50 w2 w3"}, {"text": "w4 w5 w50 w6"}],
        data_collator=etude.DataCollatorForCompletionOnlyLM("w50", tokenizer=tokenizer),
        processing_class=tokenizer,
    )
    [batch] = list(made.get_eval_dataloader(made.train_dataset))
    learned = [tokenizer.decode(labels[labels != IGNORED]) for labels in batch["labels"]]
    assert learned == ["w2 w3 <eos>", "w6 <eos>"]
    made.train()
    assert made.state.global_step == 4


def test_arguments_of_transformers_are_taken_over() -> None:
    import transformers

    theirs = transformers.TrainingArguments("out", learning_rate=5e-5, use_cpu=True, report_to="none", seed=7)
    taken = SFTConfig.from_arguments(theirs)
    found = (taken.learning_rate, taken.logging_steps, taken.gradient_checkpointing, taken.bf16, taken.seed)
    assert found == (5e-5, 500, False, False, 7)
    assert taken.max_length == 1024


def test_defaults_are_those_of_trl() -> None:
    made = SFTConfig("out", use_cpu=True)
    found = (made.learning_rate, made.logging_steps, made.gradient_checkpointing, made.bf16, made.max_length)
    assert found == (2e-5, 10, True, True, 1024)
    assert SFTConfig("out", fp16=True).bf16 is False


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"packing_strategy": "ffd"}, "packing_strategy: expected one of bfd"),
        ({"packing": True, "max_length": None}, "max_length: packing needs it"),
        ({"truncation_mode": "keep_end"}, "truncation_mode"),
        ({"loss_type": "dft"}, "loss_type"),
        ({"max_length": 1}, "max_length"),
        ({"max_lenght": 4}, "did you mean 'max_length'"),
    ],
)
def test_settings_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises((ConfigError, UnknownArgumentError), match=message):
        config(**changes)


def test_a_second_adapter_and_a_missing_data_set_are_refused() -> None:
    adapted = etude.get_peft_model(tiny_llama(), LoraConfig(**LORA))
    with pytest.raises(ModelError, match="has an adapter already"):
        trainer(texts(2), model=adapted)
    with pytest.raises(DataError, match="train_dataset"):
        trainer(None)
    with pytest.raises(ConfigError, match="peft_config: expected a PeftConfig"):
        etude.SFTTrainer(
            tiny_llama(), config(), train_dataset=texts(2), processing_class=sft_tokenizer(), peft_config={}
        )


# -- the data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keeps", [True, False])
def test_tokens_are_kept_for_the_next_run(keeps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from etude.data import kept_tokens

    tokenized: list[int] = []
    encode_rows = kept_tokens.encode_rows

    def counted(rows: Any, *args: Any, **options: Any) -> Any:
        tokenized.append(len(rows))
        return encode_rows(rows, *args, **options)

    monkeypatch.setattr(kept_tokens, "WORTH_KEEPING_SECONDS", 0.0)
    monkeypatch.setattr(kept_tokens, "encode_rows", counted)
    monkeypatch.setattr("etude.sft_data.encode_rows", counted)
    data = Dataset.from_list(pairs(8))
    first, second = (prepare(data, sft_tokenizer(), config(keep_tokens=keeps), packing=False).samples for _ in range(2))
    assert list(first) == list(second)
    assert tokenized == ([8] if keeps else [8, 8])


def test_part_of_a_stream_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from etude.data import kept_tokens

    monkeypatch.setattr(kept_tokens, "WORTH_KEEPING_SECONDS", 0.0)
    prepare(pairs(8), sft_tokenizer(), config(), packing=False, is_whole=False)
    assert not kept_tokens.token_cache_dir().exists()


def test_the_processes_that_tokenize_can_be_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from etude.data import token_workers

    started: list[bytes] = []

    class Noted(token_workers.Worker):
        def __init__(self, described: bytes) -> None:
            super().__init__(described)
            started.append(described)

    monkeypatch.setattr(token_workers, "Worker", Noted)
    one, two = (
        prepare(pairs(8), sft_tokenizer(), config(dataset_num_proc=number), packing=False).samples for number in (1, 2)
    )
    assert list(one) == list(two) and len(started) == 2
