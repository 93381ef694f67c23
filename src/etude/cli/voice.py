"""What a model is given before it speaks: the same text that stood before its answers in training.

A row with an answer is rendered by the data room, and the prompt is what stands before the span that was learned. So
there is no second reading of a chat template that could differ from the first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etude.errors import ConfigError, DataError

ANSWER = "answer"
"""Stands where the model is to speak."""

RAW, PLAIN, OWN = "raw", "plain", "own"
MAX_TEMPLATE_BYTES = 1024 * 1024

Message = dict[str, Any]


class Voice:
    """A tokenizer and the form of the rows that a model was trained on.

    Args:
        format: a name of `etude.data.FORMATS`, of the rows that the model learned from.
        template: a Jinja chat template, `"plain"`, `"raw"` (text goes in as it is), or None for the tokenizer's own.
    """

    def __init__(self, tokenizer: Any, *, format: str, template: str | None) -> None:
        from etude.data.chat import template_of

        self.tokenizer = tokenizer
        self.template = PLAIN if template == RAW else template
        has_template = template_of(tokenizer, self.template, "messages") is not None
        self.is_raw = template == RAW or (not has_template and format in ("prompt_completion", "text"))
        self.from_template = has_template
        self.stop_ids = self._stop_ids()

    def prompt_of(self, text: str, history: Sequence[Message] = (), system: str | None = None) -> list[int]:
        """The tokens before the answer to `text`. `history` holds the turns before it; raw prompts have none."""
        if self.is_raw:
            return self.prompts([{"prompt": text, "completion": ANSWER}], "prompt_completion")[0]
        first = [{"role": "system", "content": system}] if system else []
        turns = [*first, *history, {"role": "user", "content": text}, {"role": "assistant", "content": ANSWER}]
        return self.prompts([{"messages": turns}], "messages")[0]

    def prompts(self, rows: Sequence[dict[str, Any]], format: str) -> list[list[int]]:
        """The tokens before the last answer of each row.

        Raises:
            DataError: the chat template refuses a row.
        """
        from etude.data.chat import template_of

        template = PLAIN if self.is_raw and format == "prompt_completion" else self.template
        from_template = template_of(self.tokenizer, template, format) is not None
        texts = [text[: spans[-1][0]] for text, spans in _rendered(rows, self.tokenizer, format, template)]
        return [self._encoded(text, from_template) for text in texts]

    def text_of(self, tokens: Sequence[int]) -> str:
        """What the model said, up to the end of its turn."""
        end = next((place for place, token in enumerate(tokens) if token in self.stop_ids), len(tokens))
        return str(self.tokenizer.decode(tokens[:end], skip_special_tokens=True))

    def _encoded(self, text: str, from_template: bool) -> list[int]:
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        ids = list(self.tokenizer(text, add_special_tokens=not from_template)["input_ids"])
        if len(ids) > 1 and bos is not None and ids[0] == ids[1] == bos:
            ids = ids[1:]
        if not from_template and len(ids) > 1 and ids[-1] == eos:  # some tokenizers end whatever they are given
            ids = ids[:-1]
        return ids or [bos if bos is not None else eos]

    def _stop_ids(self) -> set[int]:
        """The end-of-sequence token, and the token that ends an assistant's turn in the template."""
        from etude.data.chat import special_tokens

        stops = {self.tokenizer.eos_token_id} - {None}
        if self.from_template and not self.is_raw:
            turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]
            [(text, spans)] = _rendered([{"messages": turns}], self.tokenizer, "messages", self.template)
            tail = text[text.rfind(ANSWER, *spans[-1]) + len(ANSWER) :].lstrip()
            endings = [token for token in special_tokens(self.tokenizer) if tail.startswith(token)]
            stops |= {self.tokenizer.convert_tokens_to_ids(max(endings, key=len))} if endings else set()
        return stops


def _rendered(
    rows: Sequence[dict[str, Any]], tokenizer: Any, format: str, template: str | None
) -> list[tuple[str, list[tuple[int, int]]]]:
    from etude.data.chat import render_rows
    from etude.data.templates import Refused

    found = []
    for row in [row for chunk in render_rows([list(rows)], tokenizer, format=format, template=template, train_on="last") for row in chunk]:  # fmt: skip
        if isinstance(row, Refused):
            raise DataError(f"the chat template refuses it: {row.reason}; --template raw gives the text as it is")
        found.append((row.text, row.spans))
    return found


def use_template(tokenizer: Any, choice: str | None) -> str | None:
    """The chat template of a run, which is also put on its tokenizer: so it travels with the adapter.

    Raises:
        ConfigError: there is no such template, or it is for prompts alone.
    """
    found = chosen_template(tokenizer, choice, field="template")
    if found == RAW:
        raise ConfigError("raw is for prompts; rows are plain at least", field="template")
    if found is not None:
        tokenizer.chat_template = None if found == PLAIN else found
    return found


def chosen_template(tokenizer: Any, choice: str | None, field: str = "--template") -> str | None:
    """`--template`: one of the tokenizer's named templates, `plain`, `raw`, `own`, or a Jinja file -> what `Voice` takes.

    Raises:
        ConfigError: there is no such template.
    """
    if choice is None or choice == OWN:
        return None
    if choice in (PLAIN, RAW):
        return choice
    named = getattr(tokenizer, "chat_template", None)
    if isinstance(named, dict) and choice in named:
        return str(named[choice])
    file = Path(choice).expanduser()
    if not file.is_file():
        names = f", one of {', '.join(named)}" if isinstance(named, dict) else ""
        raise ConfigError(f"'{choice}' is no file; give a Jinja file{names}, own, plain or raw", field=field)
    if file.stat().st_size > MAX_TEMPLATE_BYTES:
        raise ConfigError(f"{choice} is larger than {MAX_TEMPLATE_BYTES // 1024} KiB", field=field)
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{choice} is not UTF-8", field=field) from error
