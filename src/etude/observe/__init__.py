"""What a run shows and records: the terminal, `metrics.jsonl`, TensorBoard and the other trackers.

Everything here is a callback: an object with methods named after the events it listens to.
"""

from __future__ import annotations

from etude.observe.console import PrinterCallback, ProgressCallback
from etude.observe.jsonl import JsonlCallback
from etude.observe.tensorboard import TensorBoardCallback
from etude.observe.throughput import ThroughputCallback
from etude.observe.trackers import TRACKER_NAMES, tracker_callbacks

__all__ = [
    "TRACKER_NAMES",
    "JsonlCallback",
    "PrinterCallback",
    "ProgressCallback",
    "TensorBoardCallback",
    "ThroughputCallback",
    "tracker_callbacks",
]
