"""Rows -> the text a model sees, with the spans it is trained on.

With a chat template (the tokenizer's own, or one that is given), every format but `text` becomes a conversation: the
template of training is the template of serving. Without one, a plain form is used:

    alpaca, messages    {system}\\n\\n### Instruction:\\n{user}\\n\\n### Response:\\n{assistant}{eos}
                        (an alpaca input is its own section, ### Input:, before the response)
    prompt_completion   {prompt}{completion}{eos}
    text                {text}{eos}
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from etude.data.formats import SHAREGPT_ROLES, Row
from etude.data.template_worker import Message, Span, assistant_spans
from etude.data.templates import Chat, Refused, Rendered, renderer
from etude.errors import ConfigError

TrainOn = Literal["completion", "all", "last"]

INSTRUCTION, INPUT, RESPONSE = "### Instruction:\n", "### Input:\n", "### Response:\n"
PLAIN = "plain"  # as `template`: do not use the tokenizer's chat template


def messages_of(row: Row, format: str) -> list[Message]:
    """A row as a conversation of {role, content} turns; fields that are null are left out."""
    if format == "messages":
        return [{key: value for key, value in message.items() if value is not None} for message in row["messages"]]
    if format == "sharegpt":
        system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
        turns = row["conversations"]
        return system + [{"role": SHAREGPT_ROLES[turn["from"]], "content": turn["value"]} for turn in turns]
    if format == "alpaca":
        user = row["instruction"] + (f"\n\n{row['input']}" if row.get("input") else "")
        return [{"role": "user", "content": user}, {"role": "assistant", "content": row["output"]}]
    return [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]


def plain_text(row: Row, format: str, eos: str) -> Rendered:
    """A row in the plain form, with the spans of what the model is to say.

    `eos` ends every answer but the last: the end of the row is for the tokenizer, which may write it on its own.
    """
    if format == "text":
        return Rendered(row["text"], [(0, len(row["text"]))])
    if format == "prompt_completion":
        text = row["prompt"] + row["completion"]
        return Rendered(text, [(len(row["prompt"]), len(text))])
    if format == "alpaca":
        given = f"{INPUT}{row['input']}\n\n" if row.get("input") else ""
        prompt = f"{INSTRUCTION}{row['instruction']}\n\n{given}{RESPONSE}"
        text = prompt + row["output"]
        return Rendered(text, [(len(prompt), len(text))])
    text, spans = "", []
    headers = {"user": INSTRUCTION, "assistant": RESPONSE}
    *earlier, last = messages_of(row, format)
    for message, ending in [*((message, eos) for message in earlier), (last, "")]:
        is_answer = message["role"] == "assistant"
        text += ("\n\n" if text else "") + headers.get(message["role"], "")
        start = len(text)
        text += message.get("content", "") + (ending if is_answer else "")
        if is_answer:
            spans.append((start, len(text)))
    return Rendered(text, spans)


def template_of(tokenizer: Any, template: str | None, format: str) -> str | None:
    """The Jinja chat template that rows of a format go through, or None for the plain form.

    Raises:
        ConfigError: the tokenizer has several templates and none called 'default'.
    """
    if template == PLAIN or format == "text":
        return None
    chosen = template if template is not None else getattr(tokenizer, "chat_template", None)
    if isinstance(chosen, dict):
        if "default" not in chosen:
            raise ConfigError(f"give one of the tokenizer's templates: {', '.join(chosen)}", field="template")
        chosen = chosen["default"]
    return chosen or None


def render_rows(
    rows: Iterable[list[Row]], tokenizer: Any, *, format: str, template: str | None, train_on: TrainOn
) -> Iterator[list[Rendered | Refused]]:
    """Chunks of rows as text with the spans to train on.

    Args:
        template: a Jinja chat template, `"plain"`, or None for the tokenizer's own (plain where it has none).
        train_on: `"completion"`: every assistant turn, or all of `text`; `"last"`: the last turn; `"all"`: everything.
    """
    if train_on not in ("completion", "all", "last"):
        raise ConfigError(f"expected 'completion', 'all' or 'last', got {train_on!r}", field="train_on")
    chosen = template_of(tokenizer, template, format)
    if chosen is None:
        eos = getattr(tokenizer, "eos_token", None) or ""
        rendered: Iterator[list[Rendered | Refused]] = (
            [plain_text(row, format, eos) for row in chunk] for chunk in rows
        )
    else:
        chats = (
            [Chat(messages_of(row, format), row.get("tools") if format == "messages" else None) for row in chunk]
            for chunk in rows
        )
        rendered = _render_chats(chats, chosen, tokenizer)
    for chunk in rendered:
        yield [row if isinstance(row, Refused) else Rendered(row.text, _chosen(row, train_on)) for row in chunk]


def _chosen(row: Rendered, train_on: TrainOn) -> list[Span]:
    return {"completion": row.spans, "last": row.spans[-1:], "all": [(0, len(row.text))]}[train_on]


def _render_chats(chats: Iterable[list[Chat]], template: str, tokenizer: Any) -> Iterator[list[Rendered | Refused]]:
    if renders_by_itself(tokenizer):
        return ([_by_tokenizer(chat, tokenizer) for chat in chunk] for chunk in chats)
    markers = special_tokens(tokenizer)
    rendered = renderer.render(template, tokenizer.special_tokens_map, chats)
    return ([_through_end_of_turn(row, markers) for row in chunk] for chunk in rendered)


def renders_by_itself(tokenizer: Any) -> bool:
    """Whether a tokenizer has its own code for chats (`mistral-common`) instead of transformers' Jinja."""
    if not hasattr(tokenizer, "apply_chat_template"):
        return False
    from transformers import PreTrainedTokenizerBase

    return type(tokenizer).apply_chat_template is not PreTrainedTokenizerBase.apply_chat_template


def _by_tokenizer(chat: Chat, tokenizer: Any) -> Rendered | Refused:
    def render(messages: list[Message], opens_turn: bool) -> str:
        return str(
            tokenizer.apply_chat_template(
                messages, tools=chat.tools, tokenize=False, add_generation_prompt=opens_turn
            )
        )  # fmt: skip

    try:
        text = render(chat.messages, False)
        return Rendered(text, assistant_spans(text, chat.messages, render))
    except ValueError as error:
        return Refused(str(error), by_row=True)


def special_tokens(tokenizer: Any) -> tuple[str, ...]:
    """The texts of all tokens that are marks and no language: `</s>`, `<|im_end|>`."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    return tuple({*tokenizer.all_special_tokens, *(token.content for token in added if token.special)})


def _through_end_of_turn(row: Rendered | Refused, markers: tuple[str, ...]) -> Rendered | Refused:
    """Spans that stop before the end-of-turn token (the template's author marked the content only) take it in."""
    if isinstance(row, Refused) or not markers:
        return row
    spans = []
    for start, end in row.spans:
        if not row.text[start:end].rstrip().endswith(markers):
            end += max((len(mark) for mark in markers if row.text.startswith(mark, end)), default=0)
        spans.append((start, end))
    return Rendered(row.text, spans)
