"""Rows -> tokens and labels: what is supervised, under every kind of template, with and without one."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import ByT5Tokenizer

from etude.data import encode_row, encode_rows, read_rows
from etude.errors import ConfigError, DataError, ModelError

OPEN_TURN = "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
CHAT = "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}" + OPEN_TURN
# The author marked the answer, and not the token that ends it.
MARKED = (
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}<|end|>\n{% endfor %}" + OPEN_TURN
)
# Thoughts of old turns are dropped, and the last turn gets an empty thought if it has none.
THINKING = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{% set said = m.content.split('</think>')[-1].strip() %}"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}{{ said }}<|end|>\n{% endfor %}"
    + OPEN_TURN
)
OPENS_A_THOUGHT = CHAT.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
# The system message is written into the last user turn, so that no prefix of a chat is a prefix of the longer one.
MOVES_SYSTEM = (
    "{% set system = messages[0].content %}{% for m in messages[1:] %}{% if m.role == 'user' %}"
    "[INST] {% if loop.last or loop.index == loop.length - 1 %}{{ system }} {% endif %}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
WITH_BOS = "{{ bos_token }}" + CHAT
NO_END = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"

TURNS = {
    "messages": [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "yes?"},
        {"role": "assistant", "content": "yes"},
        {"role": "user", "content": "yes, no"},
        {"role": "assistant", "content": "no"},
    ]
}
PAIR = {"prompt": "Say hello", "completion": " hello"}


def learned(encoded: dict[str, list[int]], tokenizer: Any) -> list[str]:
    """The runs of supervised tokens, as text."""
    runs: list[list[int]] = [[]]
    for label in encoded["labels"]:
        if label != -100:
            runs[-1].append(label)
        elif runs[-1]:
            runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def seen(encoded: dict[str, list[int]], tokenizer: Any) -> str:
    return str(tokenizer.decode(encoded["input_ids"]))


@pytest.mark.parametrize(
    ("row", "format", "text", "answers"),
    [
        (PAIR, "prompt_completion", "<s>Say hello hello</s>", [" hello</s>"]),
        ({"text": "Paris"}, "text", "<s>Paris</s>", ["<s>Paris</s>"]),
        ({"instruction": "a", "input": "b", "output": "c"}, "alpaca",
         "<s>### Instruction:\na\n\n### Input:\nb\n\n### Response:\nc</s>", ["c</s>"]),
        ({"instruction": "a", "input": "", "output": "c"}, "alpaca",
         "<s>### Instruction:\na\n\n### Response:\nc</s>", ["c</s>"]),
        (TURNS, "messages",
         "<s>be kind\n\n### Instruction:\nyes?\n\n### Response:\nyes</s>\n\n"
         "### Instruction:\nyes, no\n\n### Response:\nno</s>", ["yes</s>", "no</s>"]),
    ],
)  # fmt: skip
def test_plain_form_without_a_template(
    tokenizer: Any, row: dict[str, Any], format: str, text: str, answers: list[str]
) -> None:
    encoded = encode_row(row, tokenizer, format=format, max_length=None)
    assert seen(encoded, tokenizer) == text
    assert learned(encoded, tokenizer) == answers
    assert len(encoded["labels"]) == len(encoded["input_ids"])


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (CHAT, ["yes<|end|>\n", "no<|end|>\n"]),
        (WITH_BOS, ["yes<|end|>\n", "no<|end|>\n"]),
        (MARKED, ["yes<|end|>", "no<|end|>"]),
        (THINKING, ["yes<|end|>\n", "<think>\n\n</think>\n\nno<|end|>\n"]),
        (OPENS_A_THOUGHT, ["yes<|end|>\n", "no<|end|>\n"]),
        (MOVES_SYSTEM, ["yes</s>", " no</s>"]),
        (NO_END, ["assistant: yes\n", "assistant: no\n</s>"]),  # no generation prompt: the model opens its turn itself
    ],
    ids=["prefixes", "bos", "marked", "thinking", "opens a thought", "moves the system message", "no end"],
)
def test_assistant_turns_and_their_ends_are_supervised(tokenizer: Any, template: str, answers: list[str]) -> None:
    tokenizer.chat_template = template
    encoded = encode_row(TURNS, tokenizer, format="messages", max_length=None)
    assert learned(encoded, tokenizer) == answers
    served = tokenizer.apply_chat_template(TURNS["messages"], tokenize=False)
    assert seen(encoded, tokenizer).removesuffix("</s>") == served.removesuffix("</s>")


def test_only_what_was_asked_for_is_supervised(tokenizer: Any) -> None:
    tokenizer.chat_template = WITH_BOS
    last = encode_row(TURNS, tokenizer, format="messages", max_length=None, train_on="last")
    assert learned(last, tokenizer) == ["no<|end|>\n"]
    everything = encode_row(TURNS, tokenizer, format="messages", max_length=None, train_on="all")
    assert everything["labels"] == everything["input_ids"]
    with pytest.raises(ConfigError, match="train_on"):
        encode_row(TURNS, tokenizer, format="messages", max_length=None, train_on="first")  # type: ignore[arg-type]


def test_all_formats_of_one_conversation_go_through_the_template_alike(tokenizer: Any) -> None:
    tokenizer.chat_template = CHAT
    rows: dict[str, dict[str, Any]] = {
        "alpaca": {"instruction": "Say", "input": "hello", "output": "hello"},
        "prompt_completion": {"prompt": "Say\n\nhello", "completion": "hello"},
        "messages": {
            "messages": [{"role": "user", "content": "Say\n\nhello"}, {"role": "assistant", "content": "hello"}]
        },
        "sharegpt": {"conversations": [{"from": "human", "value": "Say\n\nhello"}, {"from": "gpt", "value": "hello"}]},
    }
    encoded = [encode_row(row, tokenizer, format=name, max_length=None) for name, row in rows.items()]
    assert all(other == encoded[0] for other in encoded)
    assert learned(encoded[0], tokenizer) == ["hello<|end|>\n"]


def test_there_is_one_beginning_of_sequence_and_one_end(tokenizer: Any) -> None:
    for row in ({"text": "<s>Paris"}, {"text": "Paris</s>"}, {"text": "<s>Paris</s>"}):
        text = seen(encode_row(row, tokenizer, format="text", max_length=None), tokenizer)
        assert text.count("<s>") == 1
    tokenizer.chat_template = WITH_BOS
    ids = encode_row(PAIR, tokenizer, format="prompt_completion", max_length=None)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1


def test_the_end_is_supervised_by_position_though_padding_has_its_id(tokenizer: Any) -> None:
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    row = {"prompt": "Say </s> hello", "completion": "hello"}  # the prompt has an end token that is not to be learned
    encoded = encode_row(row, tokenizer, format="prompt_completion", max_length=None)
    assert encoded["labels"][-1] == tokenizer.eos_token_id
    assert encoded["input_ids"].count(tokenizer.eos_token_id) == 2
    assert encoded["labels"].count(tokenizer.eos_token_id) == 1


def test_every_byte_of_a_character_is_supervised(tokenizer: Any) -> None:
    row = {"prompt": "Größe: ", "completion": "🎹é"}
    assert learned(encode_row(row, tokenizer, format="prompt_completion", max_length=None), tokenizer) == ["🎹é</s>"]


def test_tokenizer_without_offsets_masks_by_prefixes() -> None:
    tokenizer = ByT5Tokenizer(extra_ids=0)
    encoded = encode_row({"prompt": "2+2=", "completion": "4"}, tokenizer, format="prompt_completion", max_length=None)
    assert learned(encoded, tokenizer) == ["4</s>"]


def test_tokenizer_that_renders_chats_itself_is_asked(tokenizer: Any) -> None:
    class OwnChat(type(tokenizer)):  # type: ignore[misc]
        def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> str:
            opened = "B:" if options["add_generation_prompt"] else ""
            return "".join(("A:" if m["role"] == "user" else "B:") + m["content"] + ";" for m in messages) + opened

    own = OwnChat(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", bos_token="<s>")
    own.chat_template = "never used"
    encoded = encode_row(PAIR, own, format="prompt_completion", max_length=None)
    assert learned(encoded, own) == [" hello;</s>"]


def test_rows_are_cut_counted_and_refused_where_no_answer_is_left(tokenizer: Any) -> None:
    long = {"prompt": "What is the capital of France?" * 9, "completion": "Paris"}
    rows = read_rows([PAIR, long, {"prompt": "Say", "completion": "The capital of France is Paris. " * 9}])
    with pytest.raises(DataError, match=r"rows:2: expected at least one token to learn from.*max_length=24"):
        encode_rows(rows, tokenizer, max_length=24)
    encoded = encode_rows(rows, tokenizer, max_length=24, on_bad_row="skip")
    assert [error.line for error in encoded.rejected] == [2]
    assert [encoded.origin(index)[1] for index in range(len(encoded))] == [1, 3]
    assert encoded.lengths.tolist()[1] == 24 == encoded.statistics.longest
    assert encoded.statistics.cut_off == 1
    assert encoded[1]["labels"][-1] != tokenizer.eos_token_id  # an end that is not there is not taught
    with pytest.raises(DataError, match="all 3 were skipped"):
        encode_rows(rows, tokenizer, max_length=2, on_bad_row="skip")
    with pytest.raises(ConfigError, match="max_length"):
        encode_rows(rows, tokenizer, max_length=1)


def test_statistics_are_those_of_the_rows(tokenizer: Any) -> None:
    rows = read_rows([PAIR, {"prompt": "Say", "completion": "please"}, PAIR] * 50)  # more than one chunk
    encoded = encode_rows(rows, tokenizer)
    numbers = encoded.statistics
    samples = [encoded[index] for index in range(len(encoded))]
    assert samples[:3] == [encode_row(row, tokenizer, format="prompt_completion", max_length=None) for row in rows[:3]]
    assert numbers.samples == len(samples) == 150
    assert numbers.tokens == sum(len(sample["input_ids"]) for sample in samples) == encoded.lengths.sum()
    assert numbers.supervised_tokens == sum(label != -100 for sample in samples for label in sample["labels"])
    assert numbers.duplicates == 148
    assert encoded[-1] == encoded[149] and encoded.rejected == []
    assert "150 samples" in numbers.describe() and "148 duplicates" in numbers.describe()
    with pytest.raises(IndexError):
        encoded[150]


def test_the_first_token_counts_for_nothing(tokenizer: Any) -> None:
    """It is predicted from nothing, so a row of one supervised token at its start teaches nothing."""
    encoded = encode_rows(read_rows([{"text": "Paris"}]), tokenizer, train_on="all")
    assert encoded.statistics.supervised_tokens == encoded.statistics.tokens - 1


def test_rows_are_rendered_like_the_tokenizer_renders_them_in_chunks(tokenizer: Any) -> None:
    tokenizer.chat_template = WITH_BOS
    rows = read_rows([{"prompt": f"What is {number}?", "completion": str(number)} for number in range(150)])
    encoded = encode_rows(rows, tokenizer)
    for index, row in enumerate(rows):
        chat = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        assert encoded[index]["input_ids"] == tokenizer.apply_chat_template(chat)["input_ids"]
        assert learned(encoded[index], tokenizer) == [f"{index}<|end|>\n"]


def test_row_that_the_template_refuses_is_named_or_skipped(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% if messages[0].content == 'bad' %}{{ raise_exception('no such turn') }}{% endif %}" + CHAT
    )
    rows = read_rows([{"prompt": prompt, "completion": "x"} for prompt in ("good", "bad", "fine")])
    with pytest.raises(DataError, match="rows:2: the chat template refuses the row: no such turn"):
        encode_rows(rows, tokenizer)
    encoded = encode_rows(rows, tokenizer, on_bad_row="skip")
    assert [encoded.origin(index)[1] for index in range(len(encoded))] == [1, 3]


def test_tools_and_roles_reach_the_template(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}" + CHAT
    row = {"messages": TURNS["messages"], "tools": [{"name": "look_up"}]}
    assert seen(encode_row(row, tokenizer, format="messages", max_length=None), tokenizer).startswith("[look_up]")


def test_template_of_choice(tokenizer: Any) -> None:
    tokenizer.chat_template = {"default": CHAT, "rag": "never"}
    own = seen(encode_row(PAIR, tokenizer, format="prompt_completion", max_length=None), tokenizer)
    assert own.startswith("<|start|>user\nSay hello<|end|>")
    plain = encode_row(PAIR, tokenizer, format="prompt_completion", max_length=None, template="plain")
    assert seen(plain, tokenizer) == "<s>Say hello hello</s>"
    tokenizer.chat_template = {"rag": "never"}
    with pytest.raises(ConfigError, match="template: give one of the tokenizer's templates: rag"):
        encode_row(PAIR, tokenizer, format="prompt_completion", max_length=None)
    with pytest.raises(ModelError, match="the chat template cannot be used"):
        encode_row(PAIR, tokenizer, format="prompt_completion", max_length=None, template="{% for %}")
