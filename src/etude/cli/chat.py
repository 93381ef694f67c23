"""`etude chat`: talk to what was trained, in the form in which it was trained."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext, suppress
from typing import Annotated, Any

import typer

from etude.cli.options import BaseModel, RunFolder, Template, TrustRemoteCode
from etude.errors import ConfigError, DataError

Say = Callable[[str], None]


def chat(
    run: RunFolder,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Answer this once and exit.")] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Answer with the base model, then the adapter.")] = False,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(metavar="X", help="0: always the likeliest token.")] = 0.0,
    template: Template = None,
    model: BaseModel = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Talk to a trained adapter. Answers appear as they are written.

    /new forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an
    answer.

    \b
      etude chat ./run
      etude chat ./run --compare --prompt "What is the capital of France?"
    """
    if max_new_tokens < 1:
        raise ConfigError(f"must be at least 1, got {max_new_tokens}", field="--max-new-tokens")
    if not 0 <= temperature <= 10:
        raise ConfigError(f"must be between 0 and 10, got {temperature}", field="--temperature")
    from etude.cli.adapted import load_adapted
    from etude.cli.voice import Voice, chosen_template

    adapted = load_adapted(run, base=model, trust_remote_code=trust_remote_code)
    voice = Voice(adapted.tokenizer, format=adapted.format, template=chosen_template(adapted.tokenizer, template))
    speaker = Speaker(adapted.model, voice, system=system, max_new_tokens=max_new_tokens, temperature=temperature)
    say: Say = lambda text: typer.echo(text, nl=False)  # noqa: E731
    if prompt is not None:
        speaker.answer(prompt, say, compare=compare)
        return
    typer.echo(introduction(adapted, voice))
    converse(speaker, say, compare=compare)


def introduction(adapted: Any, voice: Any) -> str:
    """What is talked to, and in which form."""
    from etude.cli.display import one_line

    form = "prompts as they are" if voice.is_raw else "chat template" if voice.from_template else "plain form"
    return f"{one_line(str(adapted.folder))} on {one_line(adapted.base)}, {form}. /new, /quit"


def converse(speaker: Speaker, say: Say, *, compare: bool) -> None:
    """Read, answer, repeat, until the input ends."""
    with suppress(ImportError):
        import readline  # noqa: F401  # arrow keys and earlier lines, where the system has it
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            say("\n")
            return
        except KeyboardInterrupt:
            say("\n")
            return
        if text in ("/quit", "/exit"):
            return
        if text == "/new":
            speaker.history.clear()
        elif text:
            try:
                speaker.answer(text, say, compare=compare)
            except DataError as error:  # this question cannot be asked; the next one can
                say(f"{error}\n")


class Speaker:
    """A model in a conversation. `history` holds the turns so far; the base model's answers are not among them."""

    def __init__(self, model: Any, voice: Any, *, system: str | None, max_new_tokens: int, temperature: float) -> None:
        self.model, self.voice, self.system = model, voice, system
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.longest: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.room = max_new_tokens
        self.history: list[dict[str, Any]] = []

    def answer(self, text: str, say: Say, *, compare: bool = False) -> str:
        """Answer, showing the text while it is written; Ctrl-C ends the answer and keeps what was said."""
        ids = self.voice.prompt_of(text, self.history, self.system)
        room = self.longest - len(ids) if self.longest else self.max_new_tokens
        if room < 1:
            raise DataError(f"the conversation has {len(ids)} tokens, the model reads {self.longest}; /new begins anew")
        self.room = min(room, self.max_new_tokens)
        if compare:
            say("base:    ")
            self._speak(ids, say, with_adapter=False)
            say("adapter: ")
        said = self._speak(ids, say, with_adapter=True)
        self.history += [{"role": "user", "content": text}, {"role": "assistant", "content": said}]
        return said

    def _speak(self, ids: list[int], say: Say, *, with_adapter: bool) -> str:
        from etude.cli.display import visible

        written = ""
        with nullcontext() if with_adapter else self.model.disable_adapter():
            stream = stream_tokens(
                self.model,
                ids,
                stop_ids=self.voice.stop_ids,
                max_new_tokens=self.room,
                temperature=self.temperature,
            )
            tokens: list[int] = []
            try:
                for token in stream:
                    tokens.append(token)
                    text = self.voice.tokenizer.decode(tokens, skip_special_tokens=True)
                    if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # half of a character: the next token ends it
                        new, written = text[len(written) :], text
                        say(visible(new))
            except KeyboardInterrupt:
                say(" ...")
        text = self.voice.tokenizer.decode(tokens, skip_special_tokens=True)
        say(visible(text[len(written) :]) + "\n")
        return str(text)


def stream_tokens(model: Any, ids: list[int], *, stop_ids: set[int], max_new_tokens: int, temperature: float) -> Any:
    """The tokens that a model continues `ids` with, one by one, up to an end token, which is left out.

    `temperature` 0 takes the likeliest token; above it, tokens are drawn from softmax(logits / temperature).
    """
    import torch

    device = next(model.parameters()).device
    input_ids = torch.tensor([ids], device=device)  # (1, T)
    cache: Any = None
    for _ in range(max_new_tokens):
        with torch.no_grad():
            outputs = model(
                input_ids=input_ids,
                attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=device),
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        logits = outputs.logits[0, -1].float()  # (V,)
        if temperature > 0:
            token = int(torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1))
        else:
            token = int(logits.argmax())
        if token in stop_ids:
            return
        yield token
        ids = [*ids, token]
        input_ids, cache = torch.tensor([[token]], device=device), outputs.past_key_values
