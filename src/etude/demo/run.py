"""The demonstration from end to end: measure, train, measure again. How training is done is the caller's."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from etude.demo.base_model import ensure_base_model
from etude.demo.generation import generate
from etude.demo.task import Example, exact_match, is_exact_match, make_split
from etude.precision import multiplies_bfloat16

NUM_HELDOUT = 64
BATCH_SIZE = 8
MAX_NEW_TOKENS = 28  # the longest answer has 24
RESULT_FILE = "demo.json"
LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}

Row = dict[str, list[int]]
Say = Callable[[str], object]
Train = Callable[[Any, Any, list[Row], Path], None]
"""(PEFT model, tokenizer, rows, output folder): trains the adapter in place and saves it in the folder."""


@dataclass(frozen=True)
class Sample:
    """One held-out request with the replies of the base model and of the adapted one."""

    request: str
    answer: str
    before: str
    after: str

    @property
    def is_right(self) -> bool:
        return is_exact_match(self.after, self.answer)


@dataclass(frozen=True)
class DemoResult:
    """What the demo showed. Exact match lies between 0 and 1, over `num_heldout` requests."""

    base_model: Path
    adapter: Path
    exact_match_before: float
    exact_match_after: float
    num_heldout: int
    samples: tuple[Sample, ...]
    seconds: dict[str, float]


def run_demo(
    output_dir: Path, steps: int, seed: int, say: Say, train: Train, cache_dir: Path | None = None
) -> DemoResult:
    """Teach the base model the bundled task, and measure exact match on the held-out split before and after.

    Args:
        output_dir: where the adapter and `demo.json` go.
        steps: optimizer steps; each sees `BATCH_SIZE` requests, none of them twice.
        seed: of the requests and of the adapter's start.
        say: receives a line of text at a time.
        train: trains the adapter, see `Train`.
        cache_dir: where the unpacked base model is kept, see `ensure_base_model`.
    """
    clock = _Clock()
    base_model = ensure_base_model(cache_dir, say)
    model, tokenizer = load(base_model)
    clock.stop("base model")

    heldout = make_split("heldout", NUM_HELDOUT, seed)
    say(f"asking the base model for {NUM_HELDOUT} answers")
    before = answers(model, tokenizer, heldout)
    say(f"exact match before training: {exact_match(before, heldout):.1%}")
    clock.stop("before")

    adapted = with_adapter(model, seed)
    rows = [encode(example, tokenizer) for example in make_split("train", steps * BATCH_SIZE, seed)]
    train(adapted, tokenizer, rows, output_dir)
    clock.stop("training")

    after = answers(adapted, tokenizer, heldout)
    say(f"exact match after training: {exact_match(after, heldout):.1%}")
    clock.stop("after")
    result = DemoResult(
        base_model=base_model,
        adapter=output_dir,
        exact_match_before=exact_match(before, heldout),
        exact_match_after=exact_match(after, heldout),
        num_heldout=NUM_HELDOUT,
        samples=tuple(
            Sample(example.request, example.answer, *replies)
            for example, *replies in zip(heldout, before, after, strict=True)
        ),
        seconds=clock.seconds,
    )
    (output_dir / RESULT_FILE).write_text(json.dumps(asdict(result), default=str, indent=2), encoding="utf-8")
    return result


def load(folder: Path) -> tuple[Any, Any]:
    """The model in this machine's fastest number format and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=weights_dtype(), local_files_only=True, use_safetensors=True
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device), tokenizer


def weights_dtype() -> torch.dtype:
    """bfloat16 where it is multiplied in hardware (on a CPU measured 1.6 times as fast as float32), else float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32


def with_adapter(model: Any, seed: int) -> Any:
    """The model with a fresh LoRA adapter on all linear layers."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    with warnings.catch_warnings():
        # peft asks for a property that transformers has renamed; a user of the demo can do nothing about it.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        return get_peft_model(model, LoraConfig(**LORA))


def encode(example: Example, tokenizer: Any) -> Row:
    """Token ids of prompt, completion and end token; only the last two carry labels."""
    prompt = tokenizer(example.prompt)["input_ids"]
    completion = tokenizer(example.completion, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    return {"input_ids": prompt + completion, "labels": [-100] * len(prompt) + completion}


def answers(model: Any, tokenizer: Any, examples: Sequence[Example]) -> list[str]:
    """The model's replies."""
    prompts = [example.prompt for example in examples]
    return generate(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS, batch_size=NUM_HELDOUT)


def samples_to_show(samples: Sequence[Sample], count: int) -> list[Sample]:
    """The first few, with one that is still wrong among them where there is one."""
    wrong = next((sample for sample in samples if not sample.is_right), None)
    shown = list(samples[:count])
    if wrong is not None and wrong not in shown:
        shown[-1] = wrong
    return shown


class _Clock:
    """Seconds of each part, in the order of the parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._since = time.perf_counter()

    def stop(self, part: str) -> None:
        now = time.perf_counter()
        self.seconds[part], self._since = now - self._since, now
