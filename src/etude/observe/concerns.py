"""What is likely to go wrong with a run, told before it starts, the gravest first; and afterwards, what made it slow.

Thresholds are those of `etude train`'s own defaults and their sources (see `etude.cli.defaults`): LoRA wants about ten
times the learning rate of full fine-tuning, tolerates large batches badly, and learns no more than its parameters hold.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from etude.observe.amounts import counted, of_bytes, of_parameters, of_share
from etude.observe.start_screen import Concern, RunSummary
from etude.observe.throughput import NOTABLE_WAIT, ThroughputCallback

LOW_LEARNING_RATE, HIGH_LEARNING_RATE = 8e-5, 2e-3
LARGE_BATCH = 32
MANY_STEPS = 1000
"""With this many updates a large batch takes nothing away that would be missed."""
FEW_STEPS = 10
MANY_EPOCHS = 10
NOTABLE_CUT, NOTABLE_DUPLICATES = 0.01, 0.1
NOTABLE_WAIT_SECONDS = 10.0


def concerns_of(summary: RunSummary, *, of_a_script: bool = False) -> list[Concern]:
    """Everything that is worth a warning; the author of a script decided about evaluation and length on purpose."""
    checks = [check for check in CHECKS if not (of_a_script and check in NOT_OF_A_SCRIPT)]
    return [concern for check in checks for concern in check(summary)]


def starvation(throughput: ThroughputCallback, *, num_workers: int, is_on_gpu: bool) -> str | None:
    """What a run that has ended spent waiting for its rows, and the way out; None where that is no matter."""
    share = throughput.mean_waiting_for_data
    if share is None or share < NOTABLE_WAIT or throughput.seconds_waited < NOTABLE_WAIT_SECONDS:
        return None
    fix = (
        f"more than {num_workers} dataloader_num_workers, or a cheaper dataset or collator, would shorten it"
        if num_workers
        else "dataloader_num_workers=2 prepares batches in processes of their own"
    )
    up_to = "up to " if is_on_gpu else ""  # which may have been busy with the step before
    return f"{up_to}{of_share(share)} of the training time went into waiting for rows; {fix}"


def _memory(summary: RunSummary) -> Iterator[Concern]:
    if summary.memory is not None and not summary.memory.is_met:
        yield Concern(
            f"the run needs {summary.memory.describe('available')}",
            "quantization: 4bit, a shorter max_length, gradient_checkpointing, or a smaller model; batches are cut smaller "
            "by themselves",
        )


def _disk(summary: RunSummary) -> Iterator[Concern]:
    if summary.disk is not None and not summary.disk.is_met and summary.disk.available_bytes is not None:
        yield Concern(
            f"its checkpoints need about {of_bytes(summary.disk.needed_bytes)}, and only "
            f"{of_bytes(summary.disk.available_bytes)} are free in {summary.output_dir}",
            "free some space, keep fewer with save_total_limit, or name an output folder on a larger disk",
        )


def _kept_logits(summary: RunSummary) -> Iterator[Concern]:
    if summary.kept_logits is not None and not summary.kept_logits.is_met:
        yield Concern(
            f"each evaluation keeps all logits for compute_metrics: {summary.kept_logits.describe('available')}",
            "preprocess_logits_for_metrics (argmax of them), batch_eval_metrics=True, or fewer rows to evaluate on",
        )


def _frozen_experts(summary: RunSummary) -> Iterator[Concern]:
    experts = next((part for part in summary.coverage if part.name == "experts"), None)
    if summary.adapter is not None and experts is not None and not experts.adapted_matrices:
        yield Concern(
            f"the experts of all {experts.layers} layers stay frozen; they hold most of the model's weights",
            "name their fused weights in target_parameters of the LoraConfig",
        )


def _cut_off(summary: RunSummary) -> Iterator[Concern]:
    data = summary.train
    if data.cut_off and data.samples and data.cut_off >= NOTABLE_CUT * data.samples:
        limit = f" at max_length {summary.max_length:,}" if summary.max_length else ""
        loses = "loses its end" if data.cut_off == 1 else "lose their end"
        yield Concern(
            f"{counted(data.cut_off, 'sample')} of {data.samples:,} ({of_share(data.cut_off / data.samples)}) {loses}"
            f"{limit}: the model never sees how {'that answer stops' if data.cut_off == 1 else 'those answers stop'}",
            "raise max_length, or shorten or drop those rows",
        )


def _everything_supervised(summary: RunSummary) -> Iterator[Concern]:
    data = summary.train
    samples = data.counted_samples or data.samples
    if data.tokens and samples and data.supervised_tokens == data.tokens - samples:
        yield Concern(
            "every token is supervised, prompts as well: right for plain text, seldom for questions and answers",
            "train_on: completion with prompt/completion or chat rows, or labels of -100 on the prompts",
        )


def _learning_rate(summary: RunSummary) -> Iterator[Concern]:
    if summary.adapter is None or summary.adapter.kind not in ("LoRA", "DoRA") or "adam" not in summary.optimizer:
        return
    if summary.learning_rate < LOW_LEARNING_RATE:
        yield Concern(
            f"a learning rate of {summary.learning_rate:.2g} suits full fine-tuning; LoRA usually wants about ten times "
            "as much",
            "learning_rate 2e-4 (1e-4 to 5e-4 for most models)",
        )
    elif summary.learning_rate > HIGH_LEARNING_RATE:
        yield Concern(
            f"a learning rate of {summary.learning_rate:.2g} is more than LoRA usually bears",
            "learning_rate 2e-4 to 1e-3",
        )


def _capacity(summary: RunSummary) -> Iterator[Concern]:
    tokens = summary.train.supervised_tokens
    if summary.adapter is None or tokens is None or summary.trainable_parameters >= tokens:
        return
    yield Concern(
        f"the adapter ({of_parameters(summary.trainable_parameters)} parameters) is smaller than the data "
        f"({of_parameters(tokens)} supervised tokens): it may not hold what they teach",
        "a larger r, or more target modules (all-linear)",
    )


def _large_batch(summary: RunSummary) -> Iterator[Concern]:
    if summary.adapter is not None and summary.global_batch > LARGE_BATCH and summary.steps < MANY_STEPS:
        yield Concern(
            f"{summary.global_batch} rows per update leave {counted(summary.steps, 'update')}; LoRA learns worse from "
            "large batches",
            f"16 to {LARGE_BATCH} rows per update (per-device batch x accumulation x processes)",
        )


def _few_steps(summary: RunSummary) -> Iterator[Concern]:
    if summary.steps < FEW_STEPS and summary.global_batch > 1:
        yield Concern(
            f"{counted(summary.steps, 'update')} will hardly move the adapter", "more epochs, or fewer rows per update"
        )


def _warmup(summary: RunSummary) -> Iterator[Concern]:
    if summary.steps >= FEW_STEPS and summary.warmup_steps * 2 > summary.steps:
        yield Concern(
            f"{summary.warmup_steps:,} of {summary.steps:,} steps are warm-up: the learning rate is hardly ever reached",
            "warmup_ratio 0.03, or fewer warmup_steps",
        )


def _many_epochs(summary: RunSummary) -> Iterator[Concern]:
    if summary.epochs is not None and summary.epochs > MANY_EPOCHS:
        yield Concern(
            f"{summary.epochs:.0f} passes over the same rows: most adapters start to memorise after three",
            "fewer epochs or max_steps, or early stopping on rows that are held out",
        )


def _duplicates(summary: RunSummary) -> Iterator[Concern]:
    data = summary.train
    if data.duplicates and data.samples and data.duplicates >= NOTABLE_DUPLICATES * data.samples:
        yield Concern(
            f"{counted(data.duplicates, 'sample')} of {data.samples:,} are duplicates and count twice",
            "drop them, unless the weight is meant",
        )


def _no_evaluation(summary: RunSummary) -> Iterator[Concern]:
    if summary.eval_samples is None:
        yield Concern(
            "nothing is held out, so a run that memorises looks like one that learns",
            "eval_fraction 0.05 in a recipe, an eval_dataset in a script",
        )


def _no_checkpoints(summary: RunSummary) -> Iterator[Concern]:
    if not summary.saves and summary.steps >= MANY_STEPS:
        yield Concern("save_strategy 'no': a run that is stopped starts from the beginning", "save_strategy steps")


CHECKS: tuple[Callable[[RunSummary], Iterator[Concern]], ...] = (
    _memory,
    _disk,
    _kept_logits,
    _frozen_experts,
    _everything_supervised,
    _cut_off,
    _learning_rate,
    _capacity,
    _large_batch,
    _few_steps,
    _warmup,
    _many_epochs,
    _duplicates,
    _no_evaluation,
    _no_checkpoints,
)

NOT_OF_A_SCRIPT = (_few_steps, _no_evaluation, _no_checkpoints)
