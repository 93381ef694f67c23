"""Speed and memory of a run: tokens a second, how much padding was not computed, peak memory, time left.

These figures go to `metrics.jsonl` and to the terminal only. `state.log_history` and the logs that callbacks see keep
exactly the keys of `transformers.Trainer`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from etude.observe.machine import peak_memory_bytes

RATE_MEMORY = 0.7
"""Of the seconds per step, the weight of what was known before the newest log."""

NOTABLE_WAIT = 0.1
"""A share of the time: with more of it spent waiting for rows, the loader is what makes a run slow."""


class ThroughputCallback:
    """Counts tokens and the time of steps between two logs of the training loss; evaluations and saves do not count.

    It must stand before the callbacks that show `figures`.

    Args:
        clock: seconds from any starting point.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._since = clock()
        self._seconds, self._tokens, self._slots, self._computed = 0.0, 0, 0, 0
        self._waited = 0.0
        self._step_before = 0
        self._all_tokens, self._all_seconds, self._all_waited = 0, 0.0, 0.0
        self._saving_seconds = 0.0
        self.seconds_per_step: float | None = None
        self.seconds_left: float | None = None
        self.figures: dict[str, float] = {}
        """`tokens_per_second`, `padding_avoided` (share of the collated batch), `memory_gib` and `save_stall_seconds` (that
        training stood still to save, where it did) as of the newest log."""

    @property
    def mean_tokens_per_second(self) -> float | None:
        """Over all logged steps since training began; None where nothing was counted."""
        return self._all_tokens / self._all_seconds if self._all_tokens and self._all_seconds else None

    @property
    def mean_waiting_for_data(self) -> float | None:
        """The share of all logged steps in which nothing was computed because the rows were not there yet."""
        return self._all_waited / self._all_seconds if self._all_seconds else None

    @property
    def seconds_waited(self) -> float:
        """For rows, in all logged steps."""
        return self._all_waited

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Time the loading of a step. A GPU may still be busy with the step before: what counts then is the processor's
        share of the time, the most that the GPU can have waited."""
        started = self._clock()
        try:
            yield
        finally:
            self._waited += self._clock() - started

    def count(self, inputs: Any, *, padding_is_removed: bool) -> None:
        """Take note of a collated batch: its real tokens, and the slots that padding made of them."""
        mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
        if getattr(mask, "ndim", 0) != 2 or mask.is_cuda:  # type: ignore[union-attr]
            return  # not a batch of rows, or one whose tokens cannot be counted without waiting for the device
        slots, tokens = mask.numel(), int((mask != 0).sum())  # type: ignore[union-attr]
        self._slots += slots
        self._tokens += tokens
        self._computed += tokens if padding_is_removed else slots

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._step_before = state.global_step
        self.seconds_per_step = self.seconds_left = None
        self._all_tokens, self._all_seconds, self._all_waited = 0, 0.0, 0.0
        self._saving_seconds = 0.0
        self._restart()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        now = self._clock()
        self._seconds += now - self._since
        self._since = now

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = self._clock()

    def leave_out(self) -> None:
        """What was done since the last step does not count as training."""
        self._since = self._clock()

    def count_save(self, seconds: float) -> None:
        """Take note of a save: how long training stood still for it."""
        self._saving_seconds += seconds

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._since = self._clock()

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self.figures, self.seconds_left = {}, None
        if not logs or "loss" not in logs:
            return
        self._all_tokens += self._tokens
        self._all_seconds += self._seconds
        self._all_waited += min(self._waited, self._seconds)
        steps = state.global_step - self._step_before
        if steps > 0 and self._seconds > 0:
            newest = self._seconds / steps
            before = self.seconds_per_step
            self.seconds_per_step = newest if before is None else RATE_MEMORY * before + (1 - RATE_MEMORY) * newest
            self.seconds_left = self.seconds_per_step * max(0, state.max_steps - state.global_step)
            self.figures["waiting_for_data"] = round(min(self._waited / self._seconds, 1.0), 4)
            if self._tokens:
                self.figures["tokens_per_second"] = round(self._tokens / self._seconds, 1)
                self.figures["padding_avoided"] = round(1 - self._computed / self._slots, 4)
        if self._saving_seconds:
            self.figures["save_stall_seconds"] = round(self._saving_seconds, 4)
            self._saving_seconds = 0.0
        peak = peak_memory_bytes(getattr(args, "device", "cpu"))
        if peak is not None:
            self.figures["memory_gib"] = round(peak / 2**30, 3)
        self._step_before = state.global_step
        self._restart()

    def _restart(self) -> None:
        self._seconds, self._tokens, self._slots, self._computed = 0.0, 0, 0, 0
        self._waited = 0.0
        self._since = self._clock()
