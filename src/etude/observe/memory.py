"""Memory use of the stages of a run, for `skip_memory_metrics=False`.

A stage reports how much more memory is allocated at its end than at its beginning, and how far its peak lay above that end:
the sum of the two is what the stage needed.
"""

from __future__ import annotations

import gc
import resource
import sys
import threading
from pathlib import Path
from types import TracebackType

import torch

SECONDS_BETWEEN_SAMPLES = 0.005


class MemoryUse:
    """Measures stages (`init`, `train`, `eval`, `test`), all values in bytes. A stage inside another is not measured."""

    def __init__(self, *, enabled: bool, device: torch.device) -> None:
        self.enabled, self.device = enabled, device
        self.running: Stage | None = None
        self.of_init: dict[str, float] = {}
        """Figures of the `init` stage, which has no metrics of its own: the next stage reports them."""

    def stage(self, name: str) -> Stage:
        return Stage(self, name)


class Stage:
    """One stage: a context manager that may be finished early, by whom needs its figures."""

    def __init__(self, use: MemoryUse, name: str) -> None:
        self.use, self.name = use, name
        self._is_over = threading.Event()
        self._before: dict[str, int] = {}
        self._highest: dict[str, int] = {}

    def __enter__(self) -> Stage:
        if not self.use.enabled or self.use.running is not None:
            return self
        self.use.running = self
        gc.collect()
        if self.use.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.use.device)
        self._before = self._now()
        self._highest = dict(self._before)
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        self._sampler.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.finish()

    def finish(self) -> dict[str, float]:
        """The metrics of the stage; empty where it was not measured or is finished already."""
        if self.use.running is not self:
            return {}
        self.use.running = None
        self._is_over.set()
        self._sampler.join()
        if self.use.device.type == "cuda":
            self._highest["gpu"] = torch.cuda.max_memory_allocated(self.use.device)
        gc.collect()
        after = self._now()
        metrics: dict[str, float] = {}
        for place, before in self._before.items():
            metrics[f"{self.name}_mem_{place}_alloc_delta"] = after[place] - before
            metrics[f"{self.name}_mem_{place}_peaked_delta"] = max(0, self._highest[place] - after[place])
        if self.name == "init":
            metrics |= {f"before_init_mem_{place}": value for place, value in self._before.items()}
            self.use.of_init = metrics
            return {}
        metrics, self.use.of_init = self.use.of_init | metrics, {}
        return metrics

    def _now(self) -> dict[str, int]:
        use = {"cpu": resident_bytes()}
        if self.use.device.type == "cuda":
            use["gpu"] = torch.cuda.memory_allocated(self.use.device)
        return use

    def _sample(self) -> None:
        while not self._is_over.wait(SECONDS_BETWEEN_SAMPLES):
            self._highest["cpu"] = max(self._highest["cpu"], resident_bytes())


def resident_bytes() -> int:
    """Memory of this process that is in RAM; where the system has no /proc, its highest so far."""
    statm = Path("/proc/self/statm")
    if statm.exists():
        return int(statm.read_text(encoding="ascii").split()[1]) * resource.getpagesize()
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if sys.platform == "darwin" else highest * 1024
