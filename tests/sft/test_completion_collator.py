"""The collator of old scripts: only what follows a text counts."""

from __future__ import annotations

import pytest
from sft_rows import IGNORED, sft_tokenizer

from etude import DataCollatorForCompletionOnlyLM
from etude.errors import ConfigError

tokenizer = sft_tokenizer()


def learned(collator: DataCollatorForCompletionOnlyLM, *rows: str) -> list[str]:
    batch = collator([{"input_ids": tokenizer(row)["input_ids"]} for row in rows])
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    return [
        tokenizer.decode([int(token) for token in labels if token != collator.ignore_index])
        for labels in batch["labels"]
    ]


def test_the_last_answer_counts() -> None:
    collator = DataCollatorForCompletionOnlyLM("w50 w51", tokenizer=tokenizer)
    rows = ["w1 w50 w51 w2 <eos>", "w1 w50 w51 w2 w50 w51 w3 w4"]
    assert learned(collator, *rows) == ["w2 <eos>", "w3 w4"]


def test_every_answer_counts_between_both_templates() -> None:
    collator = DataCollatorForCompletionOnlyLM("w50", "w49", tokenizer=tokenizer)
    rows = ["w49 w1 w50 w2 w49 w3 w50 w4 <eos>", "w49 w1 w50 w2 <eos>"]
    assert learned(collator, *rows) == ["w2 w4 <eos>", "w2 <eos>"]


def test_token_ids_serve_as_templates() -> None:
    ids = tokenizer("w50")["input_ids"]
    assert learned(DataCollatorForCompletionOnlyLM(ids, tokenizer=tokenizer), "w1 w50 w2") == ["w2"]


def test_the_end_counts_where_it_is_also_the_padding() -> None:
    same = sft_tokenizer()
    same.pad_token = same.eos_token
    collator = DataCollatorForCompletionOnlyLM("w50", tokenizer=same)
    assert learned(collator, "w1 w50 w2 <eos>", "w1 w2 w3 w50 w4 w5 <eos>") == ["w2 <eos>", "w4 w5 <eos>"]


@pytest.mark.parametrize("row", ["w1 w2 w3", "w49 w1"])
def test_a_row_without_the_template_counts_nothing_and_is_shown(row: str) -> None:
    collator = DataCollatorForCompletionOnlyLM("w50", "w49", tokenizer=tokenizer)
    with pytest.warns(UserWarning, match="'w50' is not in a row.*It begins: 'w"):
        assert learned(collator, row) == [""]
    with pytest.warns(UserWarning, match="'w49' is not in a row"):
        assert learned(collator, "w1 w50 w2") == [""]


def test_another_index_can_be_ignored() -> None:
    collator = DataCollatorForCompletionOnlyLM("w50", tokenizer=tokenizer, ignore_index=-1)
    batch = collator([tokenizer("w50 w1")["input_ids"]])
    assert batch["labels"].tolist() == [[-1, 9]]
    assert IGNORED not in batch["labels"]


def test_what_cannot_work_is_refused() -> None:
    with pytest.raises(ConfigError, match="mlm"):
        DataCollatorForCompletionOnlyLM("w50", tokenizer=tokenizer, mlm=True)
    with pytest.raises(ConfigError, match="response_template: has no tokens"):
        DataCollatorForCompletionOnlyLM("", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="tokenizer: is missing"):
        DataCollatorForCompletionOnlyLM("w50")
