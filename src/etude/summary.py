"""A composed trainer and its run as the plain record that the start screen and the report show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from etude.data.loader import has_length
from etude.estimates import disk_needed, memory_needed
from etude.model import adapter
from etude.model.coverage import reach_of
from etude.model.loss import unwrapped
from etude.observe.concerns import concerns_of
from etude.observe.hazards import hazards_of
from etude.observe.machine import device_name, free_memory_bytes
from etude.observe.start_screen import AdapterSummary, Concern, Coverage, DataSummary, Need, RunSummary

if TYPE_CHECKING:
    from etude.run import Plan, Run
    from etude.trainer import Trainer

KINDS = {"LORA": "LoRA", "ADALORA": "AdaLoRA", "IA3": "IA3", "LOHA": "LoHa", "LOKR": "LoKr", "OFT": "OFT"}
SHOWN_SETTINGS = (("r", "r"), ("alpha", "lora_alpha"), ("dropout", "lora_dropout"), ("tokens", "num_virtual_tokens"))
ROWS_LOOKED_AT = 1000
IGNORED_LABEL = -100
BYTES_OF_A_LOGIT = 4
CONCERNS_SAID = 3
"""A script gets the gravest ones; the command shows all."""


def describe(
    trainer: Trainer, plan: Plan, *, seconds: float | None = None, max_length: int | None = None
) -> RunSummary:
    """The run that `trainer` would make, or is about to make.

    Args:
        plan: its arithmetic.
        seconds: how long it is expected to take, where that was measured.
        max_length: longer rows were cut to this many tokens; said in warnings only.
    """
    args, model = trainer.args, trainer.model
    train = describe_data(trainer.train_dataset)
    base = unwrapped(model)
    return RunSummary(
        model_name=str(getattr(getattr(base, "config", None), "_name_or_path", "") or type(base).__name__),
        model_class=type(base).__name__,
        total_parameters=adapter.count_parameters(model)[1],
        trainable_parameters=adapter.count_parameters(model)[0],
        weights=_weights_format(base),
        adapter=describe_adapter(model),
        coverage=tuple(Coverage(*reach) for reach in reach_of(model)),
        train=train,
        eval_samples=_eval_samples(trainer.eval_dataset),
        per_device_batch=args.train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        processes=args.world_size,
        steps=plan.max_steps,
        steps_per_epoch=None if plan.streamed else plan.steps_per_epoch,
        first_step=trainer._run.initial_global_step if trainer._run is not None else 0,
        schedule=str(args.lr_scheduler_type),
        learning_rate=_learning_rate(trainer),
        warmup_steps=args.get_warmup_steps(plan.max_steps),
        optimizer=str(args.optim) if trainer.optimizer is None else _optimizer_name(trainer),
        precision=trainer.precision.name,
        precision_note=trainer.precision.note,
        device=device_name(args.device),
        path=trainer.path.name if trainer.path is not None else None,
        path_reasons=tuple(trainer.path.reasons) if trainer.path is not None else (),
        memory=memory_needed(trainer, train.longest),
        disk=disk_needed(trainer, plan),
        seconds=seconds,
        output_dir=str(args.output_dir),
        evaluates=str(getattr(args.eval_strategy, "value", args.eval_strategy)) != "no",
        saves=str(getattr(args.save_strategy, "value", args.save_strategy)) != "no",
        max_length=max_length,
        kept_logits=_kept_logits(trainer, base),
    )


def concerns(trainer: Trainer, summary: RunSummary, first_batch: Any, *, of_a_script: bool = False) -> list[Concern]:
    """What is likely to go wrong, by the numbers and by the first batch (None where it is not known)."""
    return [*hazards_of(first_batch, trainer.processing_class), *concerns_of(summary, of_a_script=of_a_script)]


def introduction(trainer: Trainer, run: Run) -> list[str]:
    """The few lines that a script gets: what is trained, in which steps, and the gravest concerns."""
    args, plan = trainer.args, run.plan
    summary = describe(trainer, plan)
    share = summary.trainable_parameters / max(summary.total_parameters, 1)
    reach = "; ".join(part.describe() for part in summary.coverage if part.adapted_matrices)
    lines = [
        f"trains {summary.trainable_parameters:,} of {summary.total_parameters:,} parameters ({share:.2%})"
        + (f": {reach}" if reach else ""),
        f"{plan.max_steps:,} steps of {args.train_batch_size * args.gradient_accumulation_steps} samples "
        f"({args.train_batch_size} x {args.gradient_accumulation_steps} accumulated), {trainer.precision.name} on "
        f"{args.device}, checkpoints in {args.output_dir}",
        *([summary.precision_note] if summary.precision_note else []),
    ]
    found = concerns(trainer, summary, first_batch_of(run), of_a_script=True)
    return lines + [f"warning: {problem}; {fix}" for problem, fix in found[:CONCERNS_SAID]]


def first_batch_of(run: Run) -> Any:
    """The collated batch that the run begins with, None where nothing is left to do."""
    loaded = run.batches.loaded()
    return loaded[0].inputs if loaded else None


def describe_adapter(model: Any) -> AdapterSummary | None:
    """The adapter in force: its kind and the settings that people compare. None for a model without."""
    if not adapter.is_peft(model):
        return None
    names: Sequence[str] = getattr(model, "active_adapters", None) or list(model.peft_config)
    config = model.peft_config[names[0]]
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    kind = "DoRA" if getattr(config, "use_dora", False) else KINDS.get(kind, kind.lower().replace("_", " "))
    settings = [(label, getattr(config, name, None)) for label, name in SHOWN_SETTINGS]
    targets = getattr(config, "target_modules", None) or ()
    named = sorted({path.rsplit(".", 1)[-1] for path in targets}) if not isinstance(targets, str) else [targets]
    return AdapterSummary(
        kind=kind,
        settings=tuple((label, f"{value:g}") for label, value in settings if isinstance(value, (int, float)) and value),
        targets=(*named, *(getattr(config, "target_parameters", None) or ())),
    )


def describe_data(dataset: Any) -> DataSummary:
    """A dataset in numbers: the known ones of rows that etude tokenized, else those of the first rows of a plain table.

    A dataset that computes its rows is not looked into: that could take long, or draw random numbers.
    """
    source = getattr(dataset, "source", "")  # of rows that we read; anything may be called so elsewhere
    source = source if isinstance(source, str) else ""
    if dataset is None or not has_length(dataset):
        return DataSummary(None, source=source)
    statistics = getattr(dataset, "statistics", None)
    if statistics is not None and hasattr(statistics, "supervised_tokens"):
        known = {name: getattr(statistics, name, None) for name in ("longest", "cut_off", "duplicates")}
        return DataSummary(
            samples=len(dataset),
            tokens=statistics.tokens,
            supervised_tokens=statistics.supervised_tokens,
            skipped=len(getattr(dataset, "rejected", ())),
            source=source,
            **known,
        )
    ids, labels = _first_columns(dataset)
    if not ids:
        return DataSummary(len(dataset))
    supervised = None
    if labels:
        supervised = sum(len(row) - 1 - list(row[1:]).count(IGNORED_LABEL) for row in labels)
    return DataSummary(
        samples=len(dataset),
        tokens=sum(map(len, ids)),
        supervised_tokens=supervised,
        longest=max(map(len, ids)),
        counted_samples=len(ids),
    )


def _first_columns(dataset: Any) -> tuple[list[Any], list[Any]]:
    """`input_ids` and `labels` of the first rows of a list or of a `datasets.Dataset` without a transform."""
    if isinstance(dataset, list):
        rows = dataset[:ROWS_LOOKED_AT]
    elif _is_plain_table(dataset):
        wanted = [name for name in ("input_ids", "labels") if name in dataset.column_names]
        rows = list(dataset.select_columns(wanted).take(ROWS_LOOKED_AT)) if "input_ids" in wanted else []
    else:
        return [], []
    if not all(isinstance(row, dict) and hasattr(row.get("input_ids"), "__len__") for row in rows):
        return [], []
    labels = [row.get("labels") for row in rows]
    has_labels = all(hasattr(row, "__len__") and not hasattr(row, "ndim") for row in labels)
    return [row["input_ids"] for row in rows], labels if has_labels else []


def _is_plain_table(dataset: Any) -> bool:
    layout = getattr(dataset, "format", None)
    return isinstance(layout, dict) and layout.get("type", "") is None and hasattr(dataset, "select_columns")


def _eval_samples(dataset: Any) -> int | None:
    if dataset is None:
        return None
    parts = list(dataset.values()) if isinstance(dataset, dict) else [dataset]
    return sum(map(len, parts)) if all(has_length(part) for part in parts) else -1


def _kept_logits(trainer: Trainer, base: Any) -> Need | None:
    """What the logits of a whole evaluation need, where they are kept until its end; None where nothing is known."""
    args = trainer.args
    is_reduced = trainer.preprocess_logits_for_metrics is not None or args.batch_eval_metrics
    if trainer.compute_metrics is None or is_reduced or args.prediction_loss_only:
        return None
    config: Any = getattr(base, "config", None)
    if not type(base).__name__.endswith("ForCausalLM") or not hasattr(config, "get_text_config"):
        return None
    dataset = trainer.eval_dataset
    parts = [describe_data(part) for part in (dataset.values() if isinstance(dataset, dict) else [dataset])]
    tokens = [
        part.tokens / (part.counted_samples or part.samples or 1) * (part.samples or 0) for part in parts if part.tokens
    ]
    needed = sum(tokens) * config.get_text_config().vocab_size * BYTES_OF_A_LOGIT
    return Need(int(needed), free_memory_bytes()) if needed else None


def _weights_format(base: Any) -> str:
    config = getattr(getattr(base, "config", None), "quantization_config", None)
    if config is not None:
        bits = {"load_in_4bit": "4-bit", "load_in_8bit": "8-bit"}
        return next((name for flag, name in bits.items() if getattr(config, flag, False)), "a quantized format")
    frozen = [p for p in base.parameters() if not p.requires_grad] or list(base.parameters())
    return str(max(frozen, key=lambda p: p.numel()).dtype).removeprefix("torch.") if frozen else "no weights"


def _learning_rate(trainer: Trainer) -> float:
    """The peak: that of the arguments, or of the user's own optimizer."""
    if trainer.optimizer is None:
        return trainer.args.learning_rate
    group = trainer.optimizer.param_groups[0]
    return float(group.get("initial_lr", group["lr"]))


def _optimizer_name(trainer: Trainer) -> str:
    is_given = trainer._given_optimizer or trainer.optimizer_cls_and_kwargs is not None
    return type(trainer.optimizer).__name__.lower() if is_given else str(trainer.args.optim)
