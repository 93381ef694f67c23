"""A run into a checkpoint, and back: what is saved where, and what must be equal to go on."""

from __future__ import annotations

import platform
import re
import time
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from etude.callbacks import TrainerState
from etude.checkpoint import Checkpoint, CheckpointStore
from etude.checkpoint.codec import malformed_means_checkpoint_error
from etude.checkpoint.durable import sync_folder
from etude.checkpoint.resume import PROGRESS, TRAINER_STATE, changes_since, read_progress, refuse_fatal
from etude.data.fingerprint import data_fingerprint
from etude.data.loader import state_at_next_epoch
from etude.model.adapter import adapter_settings, base_fingerprint, unquantised_fingerprint

if TYPE_CHECKING:
    from etude.run import Run
    from etude.trainer import Trainer

RECORDED_SETTINGS = [
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "optim",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "data_seed",
    "bf16",
    "fp16",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "train_sampling_strategy",
    "dataloader_drop_last",
]


def describe_run(trainer: Trainer) -> dict[str, Any]:
    """What a checkpoint records of the run, to be compared when it is resumed."""
    return {
        "adapters": adapter_settings(trainer.model),
        "base": base_fingerprint(trainer.model),
        "base_unquantised": unquantised_fingerprint(trainer.model),
        "data": data_fingerprint(trainer.train_dataset),
        "settings": {name: getattr(trainer.args, name, None) for name in RECORDED_SETTINGS},
        "versions": {
            **{name: metadata.version(name) for name in ("torch", "transformers", "peft")},
            "device": torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else platform.machine(),
        },
    }


def progress_of(trainer: Trainer, run: Run) -> dict[str, Any]:
    """Where the run stands, beyond what `trainer_state.json` holds."""
    position = run.batches.saved_position()
    return {
        "position": {
            "epoch": position.epoch,
            "batches_done": position.batches_done,
            "samples_per_batch": trainer.args.train_batch_size,
            "epoch_ended": run.events.epoch_ended,
            "stream_state": position.stream_state,
        },
        "pending": dict(run.events.pending),
        "learning_rate": run.events.learning_rate,
        "grad_norm": None if run.events.grad_norm is None else float(run.events.grad_norm),
        "loss_since_log": float(trainer._tr_loss),
        "loss_total": trainer._total_loss_scalar,
        "step_last_logged": trainer._globalstep_last_logged,
        "cut": trainer.cut,
        "run": trainer.run_record,
    }


def restore_run(trainer: Trainer, run: Run, checkpoint: Checkpoint) -> None:
    """Put a run back to where `checkpoint` was written.

    Raises:
        CheckpointError: the run differs from the recorded one in a way that makes resuming wrong.
    """
    folder = checkpoint.path
    progress = read_progress(checkpoint)
    changes = changes_since(progress["run"], trainer.run_record)
    if trainer.args.ignore_data_skip:
        changes = [change for change in changes if change.name != "training data"]
    refuse_fatal(changes, checkpoint)
    for change in changes:
        trainer.notices.say(f"changed since {folder.name}: {change}")
    run.recorded_cut = progress["cut"]
    trainer.call_hook(trainer._load_from_checkpoint, resume_from_checkpoint=str(folder), model=trainer.model)
    state = TrainerState.load_from_json(folder / TRAINER_STATE)
    state.stateful_callbacks = {**trainer.state.stateful_callbacks, **state.stateful_callbacks}
    if state.best_model_checkpoint is not None:
        # Beside the one resumed from, wherever that is now: a run may have been moved, and a file may name any place.
        name = Path(state.best_model_checkpoint).name
        is_there = re.fullmatch(r"checkpoint-\d+", name) is not None and (folder.parent / name).is_dir()
        state.best_model_checkpoint = str(folder.parent / name) if is_there else None
        if not is_there:
            trainer.notices.say(f"the best checkpoint {name!r} is not in {folder.parent} any more")
    trainer.state = state
    state.init_training_references(trainer, run.plan.max_steps, run.plan.num_epochs, None)
    state.compute_steps(trainer.args, run.plan.max_steps)
    trainer._load_callback_state()
    with malformed_means_checkpoint_error(folder / f"{PROGRESS}.json"):
        _restore_position(trainer, run, progress["position"])
    with malformed_means_checkpoint_error(
        folder / "scheduler.json"
    ):  # the optimizer's files are named where they are read
        trainer._load_optimizer_and_scheduler(str(folder))
    with malformed_means_checkpoint_error(folder / "scaler.json"):
        trainer._load_scaler(str(folder))
    with malformed_means_checkpoint_error(folder / "rng.json"):
        trainer._load_rng_state(str(folder))
    trainer._tr_loss.fill_(progress["loss_since_log"])
    trainer._total_loss_scalar = progress["loss_total"]
    trainer._globalstep_last_logged = progress["step_last_logged"]
    run.events.pending = progress["pending"]
    run.events.learning_rate = progress["learning_rate"]
    run.events.grad_norm = progress.get("grad_norm")
    run.events.epoch_ended = progress["position"]["epoch_ended"]
    run.events.saved_at = (state.global_step, run.events.epoch_ended)
    run.initial_global_step = state.global_step
    position = f"epoch {run.first_epoch}, micro-batch {run.first_batch}"
    trainer.notices.say(f"resumed {folder.name}: step {state.global_step} of {run.plan.max_steps}, {position}")


def _restore_position(trainer: Trainer, run: Run, position: dict[str, Any]) -> None:
    """Enter the data where the checkpoint left it; a changed batch size is converted by the samples seen."""
    epoch, batches = position["epoch"], position["batches_done"]
    was, now = position["samples_per_batch"], trainer.args.train_batch_size
    stream_state = position["stream_state"]
    if batches is None:  # imported: only the share of the epoch is recorded
        batches = round(position["share_of_epoch"] * run.plan.batches_per_epoch)
    elif was != now:
        batches, stream_state = batches * was // now, stream_state
    if trainer.args.ignore_data_skip:
        batches, stream_state = 0, None
    run.batches.position.epoch, run.batches.position.batches_done = epoch, batches
    if position["epoch_ended"]:
        epoch, batches, stream_state = epoch + 1, 0, state_at_next_epoch(stream_state)
    run.first_epoch, run.first_batch, run.stream_state = epoch, batches, stream_state


def set_aside(trainer: Trainer, store: CheckpointStore, resumed: Checkpoint | None) -> None:
    """Move checkpoints that this run does not go on from out of its way, so that the newest one is always its own."""
    in_the_way = [c for c in store.committed() if resumed is None or c.step > resumed.step]
    if not in_the_way:
        return
    folder = store.root / f"previous-{time.strftime('%Y%m%d-%H%M%S')}"
    number = 1
    while folder.exists():
        number += 1
        folder = folder.with_name(f"{folder.name.split('.')[0]}.{number}")
    folder.mkdir()
    for checkpoint in in_the_way:
        checkpoint.path.rename(folder / checkpoint.path.name)
    sync_folder(folder)
    sync_folder(store.root)
    begins = "begins afresh" if resumed is None else f"goes on from {resumed.path.name}"
    names = ", ".join(checkpoint.path.name for checkpoint in in_the_way)
    trainer.notices.say(
        f"this run {begins}, so {names} of an earlier run moved to {folder.name}/ "
        '(resume_from_checkpoint="auto" goes on from the newest instead)'
    )
