"""The bundled task: a plain-English appointment in, compact JSON out.

    Lunch with Maria on Friday at half past 3 in the afternoon
    {"event":"lunch","who":"Maria","day":"Fri","time":"3:30pm"}

The answer is a function of the request, so a reply is right or wrong: it is scored by exact match. Hours keep their
number on purpose: in sixty steps a model of this size learns to write what is meant, but not to add twelve to an hour
(measured: 69% right after sixty steps on such a task).

Every example is drawn by a seeded generator, there are no data files. The two splits share no (event, who) pair, so a
right answer on the held-out split was composed, not remembered.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Split = Literal["train", "heldout"]

EVENTS = (
    "lunch",
    "dinner",
    "breakfast",
    "coffee",
    "tennis",
    "chess",
    "yoga",
    "a walk",
    "a call",
    "a review",
    "an interview",
    "a rehearsal",
)
PEOPLE = (
    "Maria",
    "Tom",
    "Anna",
    "David",
    "Sarah",
    "Peter",
    "Laura",
    "Ben",
    "Emma",
    "Paul",
    "Julia",
    "Max",
    "Nina",
    "Oscar",
    "Grace",
    "Victor",
)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
REQUESTS = (
    "{event} with {who} on {day} at {time}",
    "Please book {event} with {who} for {day} at {time}",
    "On {day} I have {event} with {who} at {time}",
    "{who} wants {event} on {day} at {time}",
    "{day}, {time}: {event} with {who}",
    "At {time} on {day} there is {event} with {who}",
)
FIRST_HOUR, LAST_HOUR = 8, 20
MINUTES = (0, 15, 30)
HELDOUT_EVERY = 6


@dataclass(frozen=True)
class Example:
    """One request and its only right answer. `pair` is what the splits never share."""

    request: str
    answer: str
    pair: tuple[str, str]

    @property
    def prompt(self) -> str:
        """The text the model sees."""
        return prompt_for(self.request)

    @property
    def completion(self) -> str:
        """The text the model is trained to continue with; an end-of-sequence token follows it."""
        return f" {self.answer}"


def make_split(name: Split, n: int, seed: int) -> list[Example]:
    """`n` examples with different requests; the same arguments always give the same list.

    Raises:
        ValueError: for a split that does not exist.
    """
    if name not in ("train", "heldout"):
        raise ValueError(f"a split is 'train' or 'heldout', not {name!r}")
    pairs = [
        (event, who)
        for event_index, event in enumerate(EVENTS)
        for who_index, who in enumerate(PEOPLE)
        # Every event and every person occurs in both splits; only their combination is new.
        if ((event_index + who_index) % HELDOUT_EVERY == 0) == (name == "heldout")
    ]
    generator = random.Random(f"{name}-{seed}")
    examples: dict[str, Example] = {}
    while len(examples) < n:
        example = _draw(generator, pairs)
        examples.setdefault(example.request, example)
    return list(examples.values())


def prompt_for(request: str) -> str:
    """The text that asks for the JSON of a request."""
    return f"{request}\nJSON:"


def is_exact_match(reply: str, answer: str) -> bool:
    """True where the reply is the answer and nothing else; white space around it does not count."""
    return reply.strip() == answer


def exact_match(replies: Sequence[str], examples: Sequence[Example]) -> float:
    """The share of right replies, between 0 and 1."""
    pairs = zip(replies, examples, strict=True)
    return sum(is_exact_match(reply, example.answer) for reply, example in pairs) / len(examples)


def _draw(generator: random.Random, pairs: Sequence[tuple[str, str]]) -> Example:
    event, who = generator.choice(pairs)
    day = generator.choice(DAYS)
    hour, minute = generator.randint(FIRST_HOUR, LAST_HOUR), generator.choice(MINUTES)
    spoken = generator.choice(TIME_PHRASES)(hour, minute)
    request = generator.choice(REQUESTS).format(event=event, who=who, day=day, time=spoken)
    fields = {
        "event": event.split()[-1],  # without its article
        "who": who,
        "day": day[:3],
        "time": f"{_twelve_hour(hour)}:{minute:02d}{_half_of_day(hour)}",
    }
    return Example(request[0].upper() + request[1:], json.dumps(fields, separators=(",", ":")), (event, who))


def _with_digits(hour: int, minute: int) -> str:
    digits = f"{_twelve_hour(hour)}:{minute:02d}" if minute else f"{_twelve_hour(hour)}"
    return f"{digits} {_half_of_day(hour)}"


def _in_words(hour: int, minute: int) -> str:
    if (hour, minute) == (12, 0):
        return "noon"
    part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    prefix = {0: "", 15: "quarter past ", 30: "half past "}[minute]
    return f"{prefix}{_twelve_hour(hour)} {part}"


def _half_of_day(hour: int) -> str:
    return "am" if hour < 12 else "pm"


def _twelve_hour(hour: int) -> int:
    return (hour - 1) % 12 + 1


TIME_PHRASES: tuple[Callable[[int, int], str], ...] = (_with_digits, _in_words)
