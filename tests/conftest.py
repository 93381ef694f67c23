"""What every test may rely on: one thread, no network, and an empty folder of its own to run in."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

# Read once, when torch and huggingface_hub are first imported, so they are set before any test module imports them.
os.environ["OMP_NUM_THREADS"] = "1"  # one thread adds in one order: equal runs give equal bits
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the dataloader tests fork

sys.path.insert(0, str(Path(__file__).parent))  # `tiny` and `side_by_side` are imported by name


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Run the test in a fresh folder, so that `./lora-output` of one test is never seen by another."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def cache_of_its_own(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep tokens of a test where no other test, and no run of the user's, finds them."""
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("ETUDE_CACHE", str(cache))
    return cache


def pytest_configure(config: pytest.Config) -> None:
    """peft asks transformers for an attribute that transformers has renamed; neither end is ours."""
    config.addinivalue_line("filterwarnings", "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
