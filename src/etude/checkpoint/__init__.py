"""Checkpoints: the atomic store, its manifest, and the reading of untrusted files."""

from etude.checkpoint.draft import Checkpoint, Draft
from etude.checkpoint.durable import estimate_free_bytes
from etude.checkpoint.reading import read_json_strict, read_safetensors_checked
from etude.checkpoint.store import CheckpointStore, Rejection

__all__ = [
    "Checkpoint",
    "CheckpointStore",
    "Draft",
    "Rejection",
    "estimate_free_bytes",
    "read_json_strict",
    "read_safetensors_checked",
]
