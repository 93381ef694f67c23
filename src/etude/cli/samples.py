"""Samples: what the model answers to a few fixed prompts, before training, at each evaluation, and at the end.

A falling loss does not show a wrong template or an answer that never ends; one look at an answer does. Answers are the
likeliest tokens, so they draw no random numbers: a run with samples has the same losses as one without.
"""

from __future__ import annotations

import json
import textwrap
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from etude.data.chat import messages_of
from etude.data.formats import Row
from etude.data.randomness import undisturbed_generators
from etude.errors import ConfigError, DataError
from etude.observe.console import LineWriter, printable
from etude.observe.jsonl import append, rewind
from etude.observe.report import ShownSample

if TYPE_CHECKING:
    from etude.cli.voice import Voice
    from etude.trainer import Trainer

FILE_NAME = "samples.jsonl"
WIDTH, MOST_LINES = 80, 3
FREE_SECONDS, LARGEST_SHARE = 30.0, 0.1
"""Sampling may always take so long in all, and beyond that so much of the time since training began."""

LONGEST_ANSWERS = (24, 128)
"""Tokens: the least and the most that an answer is given where nobody said how long it may be."""


class Prompt(NamedTuple):
    """A prompt as it is shown, its tokens, and the answer that the data has for it (empty where there is none)."""

    text: str
    ids: list[int]
    expected: str = ""


def template_for(format: str, template: str | None) -> str | None:
    """What `Voice` takes so that prompts look as in training, the template of the run being on the tokenizer already."""
    from etude.cli.voice import PLAIN

    return PLAIN if format == "text" or template == PLAIN else None


def prompts_of_rows(rows: Sequence[Row], format: str, voice: Voice, count: int) -> list[Prompt]:
    """The prompts of the first `count` rows that differ in them and that the chat template takes."""
    found: dict[str, Prompt] = {}
    for row in rows:
        if len(found) >= count:
            break
        given, given_format = (_halved(row["text"]), "prompt_completion") if format == "text" else (row, format)
        text, expected = _question(given, given_format)
        try:
            [ids] = voice.prompts([given], given_format)
        except DataError:
            continue  # training skips this row as well
        found.setdefault(text, Prompt(text, ids, expected))
    return list(found.values())


def given_prompts(source: str | Sequence[str], voice: Voice) -> list[Prompt]:
    """The prompts of a recipe: a list of texts, or a file as `etude generate` reads it.

    Raises:
        ConfigError: there is no such file.
        DataError: naming the file and line of a prompt that is none.
    """
    from etude.cli.generate import prompt_ids

    found = []
    for row in read_given(source):
        text = row.get("prompt") or row.get("instruction") or row["messages"][-1]["content"]
        found.append(Prompt(text, prompt_ids(voice, row)))
    return found


def read_given(source: str | Sequence[str]) -> list[Row]:
    """`sample_prompts` of a recipe as rows; see `given_prompts`."""
    from etude.cli.generate import read_prompts

    if not isinstance(source, str):
        return [{"prompt": text} for text in source]
    if not Path(source).expanduser().is_file():
        raise ConfigError(
            f"'{source}': no such file; give a file of prompts, or a list: '[\"first\", \"second\"]'",
            field="sample_prompts",
        )
    return read_prompts(source)


def _question(row: Row, format: str) -> tuple[str, str]:
    """What a row asks, and what it answers."""
    if format == "prompt_completion":
        return row["prompt"], row["completion"]
    turns = messages_of(row, format)
    answer = max(place for place, turn in enumerate(turns) if turn["role"] == "assistant")
    asked = [turn for turn in turns[:answer] if turn["role"] == "user"]
    return (asked[-1].get("content") or "" if asked else ""), turns[answer].get("content") or ""


def _halved(text: str) -> Row:
    """Raw text has no question: its first half is given, the rest is to be said."""
    words = text.split(" ")
    middle = max(1, len(words) // 2)
    return {"prompt": " ".join(words[:middle]), "completion": " " + " ".join(words[middle:])}


@dataclass
class Samples:
    """A callback that asks the model its prompts, shows the answers, and keeps them in `samples.jsonl`.

    Args:
        prompts: none: nothing is ever asked.
        voice: how prompts become tokens, and answers text.
        max_new_tokens: the longest answer; by default twice the longest expected one.
    """

    prompts: Sequence[Prompt]
    voice: Voice
    max_new_tokens: int | None = None
    trainer: Trainer | None = None
    answers: dict[int, list[str]] = field(default_factory=dict)
    """Step -> answers; those of the base model at 0, the newest last."""
    _seconds: float = 0.0
    _started: float = 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.monotonic()
        if not self._is_asked(state):
            return
        file = Path(args.output_dir) / FILE_NAME
        is_new = state.global_step == 0
        rewind(file, state.global_step, 0 if is_new else None)
        self.answers = {} if is_new else self._kept(file)
        if 0 not in self.answers:
            self.answers = {0: self._answers(of_base=not is_new)}
            self._keep(file, 0)
        self._show("before training", self.answers[0], with_prompts=True)

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._is_asked(state) or not self._trainer.is_in_train or state.global_step == 0:
            return
        if self._seconds > max(FREE_SECONDS, LARGEST_SHARE * (time.monotonic() - self._started)):
            self._trainer.notices.say_once(
                f"samples are left out where they would take more than {LARGEST_SHARE:.0%} of the time"
            )
            return
        self._ask(args, state.global_step)
        self._show(f"at step {state.global_step}", self.answers[state.global_step])

    def finish(self, *, is_final: bool) -> list[ShownSample]:
        """For the report: the answers from before training, and those of the model as it is now.

        Args:
            is_final: the model is asked once more, unless it was at this very step. Without, the newest answers are taken.
        """
        if self.trainer is None or 0 not in self.answers:
            return []
        args, state = self.trainer.args, self.trainer.state
        keeps_best = args.load_best_model_at_end and state.best_model_checkpoint is not None
        step = (keeps_best and state.best_global_step) or state.global_step
        if not is_final:
            step = next(reversed(self.answers))
            if step == 0:  # nothing was asked since: the two columns would be one
                return []
        elif step not in self.answers:
            self._ask(args, step)
        if is_final:
            self._show(f"of the finished adapter, from step {step}", self.answers[step])
        return [
            ShownSample(prompt.text, before, after, prompt.expected)
            for prompt, before, after in zip(self.prompts, self.answers[0], self.answers[step], strict=True)
        ]

    @property
    def _trainer(self) -> Trainer:
        assert self.trainer is not None
        return self.trainer

    def _is_asked(self, state: Any) -> bool:
        return bool(self.prompts) and self.trainer is not None and state.is_world_process_zero

    def _ask(self, args: Any, step: int) -> None:
        self.answers[step] = self._answers()
        self._keep(Path(args.output_dir) / FILE_NAME, step)

    def _answers(self, *, of_base: bool = False) -> list[str]:
        from etude.cli.generate import BATCH_SIZE, continued

        trainer, started = self._trainer, time.monotonic()
        with ExitStack() as meanwhile:
            meanwhile.enter_context(undisturbed_generators())
            meanwhile.enter_context(_uncompiled(trainer))
            meanwhile.enter_context(trainer.compute_loss_context_manager())
            meanwhile.enter_context(trainer.model.disable_adapter() if of_base else nullcontext())
            answers = continued(
                trainer.model,
                self.voice,
                [prompt.ids for prompt in self.prompts],
                max_new_tokens=self.max_new_tokens or self._expected_tokens(),
                batch_size=BATCH_SIZE,
                merge=False,  # a copy of the weights, which merging keeps, may not fit beside the optimizer
            )
        self._seconds += time.monotonic() - started
        trainer.throughput.leave_out()
        return answers

    def _expected_tokens(self) -> int:
        """Room for twice the longest answer of the data, within limits: a model that does not stop is seen to."""
        expected = [prompt.expected for prompt in self.prompts if prompt.expected]
        longest = max(
            (len(self.voice.tokenizer(text)["input_ids"]) for text in expected), default=LONGEST_ANSWERS[1] // 2
        )
        return min(max(2 * longest, LONGEST_ANSWERS[0]), LONGEST_ANSWERS[1])

    def _kept(self, file: Path) -> dict[int, list[str]]:
        """Step -> answers of earlier starts of this run, as far as the same was asked."""
        found: dict[int, list[str]] = {}
        try:
            for line in file.read_text(encoding="utf-8").splitlines():
                kept = json.loads(line)
                if [sample["prompt"] for sample in kept["samples"]] == [prompt.text for prompt in self.prompts]:
                    found[int(kept["step"])] = [str(sample["answer"]) for sample in kept["samples"]]
        except (OSError, ValueError, KeyError, TypeError):
            return {}
        return found

    def _keep(self, file: Path, step: int) -> None:
        samples = [
            {"prompt": prompt.text, "answer": answer} | ({"expected": prompt.expected} if prompt.expected else {})
            for prompt, answer in zip(self.prompts, self.answers[step], strict=True)
        ]
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            append(file, json.dumps({"step": step, "samples": samples}, ensure_ascii=False) + "\n")
        except OSError as error:  # a full disk must not cost the run
            self._trainer.notices.say_once(
                f"{file} could not be written, training goes on without it: {error.strerror}"
            )

    def _show(self, when: str, answers: Sequence[str], *, with_prompts: bool = False) -> None:
        if self._trainer.notices.quiet:
            return
        expecting = [prompt for prompt in self.prompts if prompt.expected]
        right = sum(
            answer.strip() == prompt.expected.strip()
            for prompt, answer in zip(self.prompts, answers, strict=True)
            if prompt.expected
        )
        score = f" ({right} of {len(expecting)} as in the data)" if expecting else ""
        say = self._line_writer()
        say(f"samples {when}{score}:")
        for number, (prompt, answer) in enumerate(zip(self.prompts, answers, strict=True), start=1):
            texts = [("", answer)]
            if with_prompts:
                texts = [("asked     ", prompt.text), ("answered  ", answer)]
                texts[1:1] = [("expected  ", prompt.expected)] if prompt.expected else []
            for place, (label, text) in enumerate(texts):
                head = f"  {number}  " if place == 0 else "     "
                say(_wrapped(head + label, text))

    def _line_writer(self) -> Callable[[str], object]:
        """Where the lines of logs go, so that they stand beside a progress bar and not in it."""
        callbacks = self._trainer.callback_handler.callbacks
        writers = (callback for callback in callbacks if isinstance(callback, LineWriter))
        return next(writers, LineWriter()).write


def _wrapped(head: str, text: str) -> str:
    """`text` behind `head` in a few lines that fit everywhere; the rest is in `samples.jsonl`."""
    content = printable(text.strip()) or "(nothing)"
    indented: dict[str, Any] = {"initial_indent": head, "subsequent_indent": " " * len(head)}
    return textwrap.fill(content, WIDTH, max_lines=MOST_LINES, placeholder=" ...", break_on_hyphens=False, **indented)


def _uncompiled(trainer: Trainer) -> Any:
    """Layers that are compiled for training run as they are: answers of ever other lengths would compile them anew."""
    import torch

    plan = getattr(trainer.path, "plan", None)
    return torch.compiler.set_stance("force_eager") if plan is not None and plan.is_compiled else nullcontext()
