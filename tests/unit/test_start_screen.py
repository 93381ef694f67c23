"""The start screen says what is true of a run, fits eighty columns, and warns of what usually goes wrong."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from transformers import MixtralConfig, MixtralForCausalLM

from etude.estimates import checkpoint_bytes, disk_needed, memory_needed
from etude.model.coverage import reach_of
from etude.observe.amounts import of_bytes, of_parameters, of_seconds, of_share
from etude.observe.concerns import concerns_of
from etude.observe.hazards import hazards_of
from etude.observe.machine import free_disk_bytes, free_memory_bytes, versions
from etude.observe.start_screen import (
    AdapterSummary,
    Coverage,
    DataSummary,
    Need,
    RunSummary,
    plain_lines,
    renderable,
    show,
)
from etude.summary import describe, describe_adapter, describe_data
from short_run import short_trainer
from tiny import DECODER, EOS, PAD, StreamDataset, V, causal_lora, language_rows, tiny_bert, tiny_llama, with_lora

GOOD = RunSummary(
    model_name="maker/base-1b",
    model_class="LlamaForCausalLM",
    total_parameters=1_240_000_000,
    trainable_parameters=22_000_000,
    weights="bfloat16",
    adapter=AdapterSummary("LoRA", (("r", "32"), ("alpha", "32")), ("k_proj", "q_proj")),
    coverage=(Coverage("attention", 16, 16, 64, 64), Coverage("MLP", 16, 16, 48, 48), Coverage("head", 0, 0, 0, 1)),
    train=DataSummary(20_000, 4_000_000, 1_500_000, 900, 3, 12),
    eval_samples=1000,
    per_device_batch=8,
    accumulation=2,
    processes=1,
    steps=1250,
    steps_per_epoch=1250,
    first_step=0,
    schedule="linear",
    learning_rate=2e-4,
    warmup_steps=38,
    optimizer="adamw_torch",
    precision="bf16",
    precision_note=None,
    device="a GPU, 80 GiB",
    path="packed",
    path_reasons=("padding removed, samples packed", "attention: per sequence"),
    memory=Need(20 * 2**30, 70 * 2**30, ("weights 2.3 GiB",)),
    disk=Need(2**30, 50 * 2**30),
    seconds=5400,
    output_dir="run",
    evaluates=True,
)


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def problems(**changes: Any) -> str:
    return "\n".join(concern.problem for concern in concerns_of(replace(GOOD, **changes)))


# ---------------------------------------------------------------- the screen


def test_a_good_run_has_no_warning_and_all_its_facts() -> None:
    assert concerns_of(GOOD) == []
    said = "\n".join(plain_lines(GOOD, []))
    for fact in (
        "maker/base-1b",
        "LoRA r 32, alpha 32 on k_proj, q_proj",
        "22,000,000 of 1,240,000,000 parameters are trained (1.77%)",
        "attention 16/16 layers; MLP 16/16 layers; frozen: head",
        "20,000 samples, 4,000,000 tokens, 38% of them supervised",
        "longest 900, 3 cut off, 12 duplicates",
        "16 rows per update = 8 per device x 2 accumulated x 1 process",
        "1,250 updates = 1 epoch of 1,250 updates",
        "linear from 0.0002, 38 steps of warm-up, adamw_torch",
        "packed: padding removed, samples packed",
        "about 20 GiB of 70 GiB available",
        "weights 2.3 GiB",
        "about 1 h 30 min",
    ):
        assert fact in said


LONG = replace(
    GOOD,
    model_name="/a/very/long/path/" + "model-" * 20,
    output_dir="out-" * 40,
    learning_rate=5e-5,
    eval_samples=None,
    disk=Need(2**40, 2**20),
    train=DataSummary(10, 200, 190, 90, 8, 9, 4),
    path_reasons=("a reason that is as long as those that probes give when they fail " * 2,),
)


@pytest.mark.parametrize("summary", [GOOD, LONG])
def test_it_fits_eighty_columns_with_and_without_colour(summary: RunSummary) -> None:
    found = concerns_of(summary)
    assert max(map(len, plain_lines(summary, found))) <= 80
    console = Console(file=Terminal(), width=80, force_terminal=True, record=True)
    console.print(renderable(summary, found, "etude train"))
    shown = console.export_text()
    assert max(len(line.rstrip()) for line in shown.splitlines()) <= 80
    unfolded = "".join(line[10:].strip() for line in shown.splitlines())
    assert summary.model_name in unfolded  # folded, never cut


def test_colours_are_those_of_the_terminals_palette() -> None:
    """A fixed colour would be unreadable on one of the two backgrounds; so would yellow, white or black."""
    stream = Terminal()
    Console(file=stream, width=80, force_terminal=True, color_system="truecolor").print(
        renderable(LONG, concerns_of(LONG), "etude train")
    )
    codes = {part.partition("m")[0] for part in stream.getvalue().split("\x1b[")[1:]}
    assert codes <= {"0", "1", "31", "39", "1;31"} and "31" in codes


def test_without_a_terminal_the_lines_are_plain() -> None:
    stream = io.StringIO()
    show(LONG, concerns_of(LONG), stream=stream)
    assert "\x1b" not in stream.getvalue()
    assert "warning   a learning rate of 5e-05" in stream.getvalue()
    terminal = Terminal()
    show(LONG, concerns_of(LONG), stream=terminal)
    assert "\x1b[" in terminal.getvalue()


def test_names_cannot_steer_the_terminal() -> None:
    hostile = replace(GOOD, model_name="\x1b[2Jevil[red]", output_dir="a\rb")
    for stream in (io.StringIO(), Terminal()):
        show(hostile, [], stream=stream)
        assert "\x1b[2J" not in stream.getvalue() and "\r" not in stream.getvalue()
        assert "evil[red]" in stream.getvalue()


# ---------------------------------------------------------------- warnings


@pytest.mark.parametrize(
    ("changes", "warning"),
    [
        ({"learning_rate": 5e-5}, "suits full fine-tuning"),
        ({"learning_rate": 1e-2}, "more than LoRA usually bears"),
        ({"trainable_parameters": 1_000_000}, "smaller than the data"),
        ({"per_device_batch": 64, "steps": 300}, "LoRA learns worse from large batches"),
        ({"eval_samples": None}, "nothing is held out"),
        ({"train": DataSummary(100, 5000, 4900)}, "every token is supervised"),
        ({"train": DataSummary(9000, 50_000, 4900, counted_samples=1000)}, None),
        ({"train": DataSummary(9000, 50_000, 49_000, counted_samples=1000)}, "every token is supervised"),
        ({"train": DataSummary(1000, 5000, 490, 90, cut_off=20)}, "20 samples of 1,000 (2.0%) lose their end"),
        ({"train": DataSummary(1000, 5000, 490, 90, cut_off=2)}, None),
        ({"train": DataSummary(1000, 5000, 490, 90, duplicates=400)}, "400 samples of 1,000 are duplicates"),
        ({"memory": Need(2**40, 2**30)}, "needs about 1.0 TiB of 1.0 GiB available"),
        ({"disk": Need(2**40, 2**30)}, "only 1.0 GiB are free"),
        ({"disk": Need(2**40, None)}, None),
        (
            {"kept_logits": Need(2**40, 2**30)},
            "each evaluation keeps all logits for compute_metrics: about 1.0 TiB of 1.0",
        ),
        ({"kept_logits": Need(2**20, 2**30)}, None),
        ({"steps": 4}, "4 updates will hardly move the adapter"),
        ({"warmup_steps": 900}, "900 of 1,250 steps are warm-up"),
        ({"steps": 25_000}, "20 passes over the same rows"),
        ({"saves": False}, "starts from the beginning"),
        ({"coverage": (Coverage("experts", 0, 32, 0, 64),)}, "the experts of all 32 layers stay frozen"),
        ({"optimizer": "sgd", "learning_rate": 1e-2}, None),
        ({"adapter": None, "learning_rate": 5e-5, "per_device_batch": 64}, None),
    ],
)
def test_warnings(changes: dict[str, Any], warning: str | None) -> None:
    found = problems(**changes)
    assert found == "" if warning is None else warning in found


def test_logits_that_an_evaluation_keeps_are_counted() -> None:
    def measure(prediction: Any) -> dict[str, float]:
        return {"accuracy": 1.0}

    def kept(**settings: Any) -> Need | None:
        trainer = short_trainer(eval_rows=rows, num_train_epochs=1, **settings)
        return describe(trainer, trainer._plan(trainer.get_train_dataloader())).kept_logits

    rows = language_rows(10)
    found = kept(compute_metrics=measure)
    assert found is not None and found.needed_bytes == sum(len(row["input_ids"]) for row in rows) * V * 4
    assert kept() is None
    assert kept(compute_metrics=measure, preprocess_logits_for_metrics=lambda logits, labels: logits) is None
    assert kept(compute_metrics=measure, batch_eval_metrics=True) is None


def test_every_warning_has_a_fix() -> None:
    for concern in concerns_of(LONG):
        assert concern.fix and concern.problem[-1] not in ".!"


# ---------------------------------------------------------------- the first batch


class Words:
    pad_token_id, eos_token_id, bos_token_id = PAD, EOS, 1
    added_tokens_decoder: dict[int, Any] = {}  # noqa: RUF012


class PadIsEos(Words):
    pad_token_id = EOS


def batch(
    ids: list[list[int]], labels: list[list[int]], mask: list[list[int]] | None = None
) -> dict[str, torch.Tensor]:
    given = mask if mask is not None else [[1] * len(row) for row in ids]
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor(given),
    }


def test_an_end_token_masked_as_padding_is_found() -> None:
    masked = batch([[5, 6, EOS, EOS]], [[5, 6, -100, -100]], [[1, 1, 1, 0]])
    [concern] = hazards_of(masked, PadIsEos())
    assert "the end of an answer is never learned" in concern.problem
    learned = batch([[5, 6, EOS, EOS]], [[5, 6, EOS, -100]], [[1, 1, 1, 0]])
    assert hazards_of(learned, PadIsEos()) == []


def test_a_missing_end_and_a_double_beginning_are_found() -> None:
    [concern] = hazards_of(batch([[1, 5, 6]], [[1, 5, 6]]), Words())
    assert "not taught to stop" in concern.problem
    [concern] = hazards_of(batch([[1, 1, 5, EOS]], [[1, 1, 5, EOS]]), Words())
    assert "two beginning-of-sequence tokens" in concern.problem


@pytest.mark.parametrize(
    "inputs",
    [
        None,
        {},
        ["text"],
        {"input_ids": torch.ones(2, 3)},
        {"input_ids": torch.ones(2, 3), "labels": torch.ones(2)},
        {"input_ids": torch.ones(2, 3), "labels": torch.ones(2, 5)},
    ],
)
def test_other_batches_are_left_alone(inputs: Any) -> None:
    assert hazards_of(inputs, Words()) == []


# ---------------------------------------------------------------- from a trainer


def test_coverage_by_class_of_weights() -> None:
    reach = {part.name: part[1:] for part in reach_of(causal_lora())}
    assert reach == {
        "attention": (2, 2, 4, 8),
        "MLP": (0, 2, 0, 6),
        "embeddings": (0, 0, 0, 1),
        "head": (0, 0, 0, 1),
    }
    every = {part.name: part[1:] for part in reach_of(causal_lora(target_modules="all-linear"))}
    assert (every["attention"], every["MLP"]) == ((2, 2, 8, 8), (2, 2, 6, 6))
    first = causal_lora(target_modules=["q_proj"], layers_to_transform=[0], modules_to_save=["lm_head"])
    reach = {part.name: part[1:] for part in reach_of(first)}
    assert (reach["attention"], reach["head"]) == ((1, 2, 1, 8), (0, 0, 1, 1))


def test_fused_experts_that_an_adapter_misses_are_seen() -> None:
    sizes = {**DECODER, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes))
    reach = {part.name: part for part in reach_of(with_lora(model, target_modules=["q_proj"]))}
    assert reach["experts"].adapted_matrices == 0 and reach["experts"].layers == 2
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = with_lora(MixtralForCausalLM(MixtralConfig(**sizes)), target_modules=["q_proj"], target_parameters=names)
    assert {part.name: part.adapted_layers for part in reach_of(model)}["experts"] == 2


def test_targets_are_named_once() -> None:
    adapter = describe_adapter(causal_lora(target_modules=[f"model.layers.{n}.self_attn.q_proj" for n in (0, 1)]))
    assert adapter == AdapterSummary("LoRA", (("r", "8"), ("alpha", "16")), ("q_proj",))
    assert describe_adapter(causal_lora(use_dora=True)).kind == "DoRA"  # type: ignore[union-attr]


def test_a_model_of_another_kind_is_described() -> None:
    assert {part.name for part in reach_of(tiny_bert())} >= {"attention", "MLP", "embeddings"}
    trainer = short_trainer(tiny_llama())
    trainer.train()
    summary = describe(trainer, trainer._run.plan)
    assert summary.adapter is None and summary.trainable_parameters == summary.total_parameters
    assert plain_lines(summary, concerns_of(summary))


@pytest.mark.parametrize("make", [lambda rows: rows, Dataset.from_list])
def test_rows_in_memory_are_counted(make: Callable[[list[Any]], Any]) -> None:
    rows = language_rows(12)
    found = describe_data(make(rows))
    assert found == DataSummary(
        samples=12,
        tokens=sum(len(row["input_ids"]) for row in rows),
        supervised_tokens=sum(label != -100 for row in rows for label in row["labels"][1:]),
        longest=max(len(row["input_ids"]) for row in rows),
        counted_samples=12,
    )


def test_rows_that_are_computed_are_not_looked_into() -> None:
    class Computed:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> Any:
            raise AssertionError("was read")

    def refuse(rows: Any) -> Any:
        raise AssertionError("was read")

    assert describe_data(Computed()) == DataSummary(3)
    assert describe_data(Dataset.from_list(language_rows(3)).with_transform(refuse)) == DataSummary(3)
    assert describe_data(StreamDataset(language_rows(3))) == DataSummary(None)
    assert describe_data([1, 2, 3]) == DataSummary(3)


def test_a_script_gets_a_few_lines(capsys: pytest.CaptureFixture[str]) -> None:
    short_trainer(learning_rate=5e-5, num_train_epochs=1).train()
    said = capsys.readouterr().err.splitlines()
    said = [line for line in said if line.startswith("etude: ")]
    assert len(said) <= 6
    assert said[1] == "etude: trains 1,792 of 24,480 parameters (7.32%): attention 2/2 layers, 4 of 8 matrices"
    assert said[2].startswith("etude: 5 steps of 2 samples (2 x 1 accumulated), fp32 on cpu, checkpoints in out")
    assert "a learning rate of 5e-05 suits full fine-tuning" in said[3]


def test_a_quiet_run_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    short_trainer(learning_rate=5e-5, num_train_epochs=1, log_level="error").train()
    assert "etude: " not in capsys.readouterr().err


# ---------------------------------------------------------------- estimates


def test_a_checkpoint_is_as_large_as_estimated() -> None:
    model = causal_lora(r=64, target_modules="all-linear")
    trainer = short_trainer(model, num_train_epochs=1, save_strategy="epoch")
    trainer.train()
    written = sum(file.stat().st_size for file in Path("out/checkpoint-5").iterdir())
    estimated = checkpoint_bytes(trainer)
    assert 0.75 * written < estimated < 1.25 * written
    needed = disk_needed(trainer, trainer._run.plan)
    assert needed is not None and needed.needed_bytes == 2 * estimated


def test_memory_grows_with_the_batch_and_nothing_is_kept_without_checkpoints() -> None:
    trainer = short_trainer()
    small, large = memory_needed(trainer, 10), memory_needed(trainer, 1000)
    assert large.needed_bytes > small.needed_bytes > 0
    assert small.available_bytes is not None and small.is_met
    trainer.train()
    assert disk_needed(trainer, trainer._run.plan) is None


def test_the_machine_is_known() -> None:
    assert (free_memory_bytes() or 0) > 2**20
    assert free_disk_bytes("not/made/yet") == free_disk_bytes(".") or (free_disk_bytes(".") or 0) > 0
    assert versions()["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (of_bytes(1), "1 bytes"),
        (of_bytes(1536), "1.5 KiB"),
        (of_bytes(20 * 2**30), "20 GiB"),
        (of_seconds(45), "45 s"),
        (of_seconds(600), "10 min"),
        (of_seconds(12_000), "3 h 20 min"),
        (of_seconds(187_200), "2 d 4 h"),
        (of_parameters(999), "999"),
        (of_parameters(3_800_000), "3.8 M"),
        (of_parameters(8_000_000_000), "8.0 B"),
        (of_share(0.41), "41%"),
        (of_share(0.0123), "1.2%"),
    ],
)
def test_amounts(shown: str, expected: str) -> None:
    assert shown == expected
