"""What a checkpoint holds. What is gathered here refers to live objects; what writes it needs nothing but what was gathered.

`written_now` writes a run as it is, through every hook that a subclass may have overridden. `written_later` takes copies and
writes those, the same bytes, whatever has become of the run meanwhile.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from etude.callbacks import TrainerState
from etude.checkpoint import codec, transformers_files
from etude.checkpoint.copies import Copies
from etude.checkpoint.durable import name_of
from etude.checkpoint.reading import LOG
from etude.checkpoint.resume import PROGRESS, TRAINER_STATE
from etude.errors import CheckpointError
from etude.model import adapter
from etude.recovery import progress_of

if TYPE_CHECKING:
    import torch

    from etude.hooks.base import Composition
    from etude.run import Run
    from etude.trainer import Trainer

Fill = Callable[[Path], list[str]]
"""Writes the files of a checkpoint into a folder; returns what is to be said about them."""

Require = Callable[[Mapping[str, "torch.Tensor"]], None]
"""Raises an error where trained weights are not fit to be saved."""


class Contents(NamedTuple):
    """What `Save` is given: to be called in this order. Copies are only there after the check."""

    check: Callable[[], None]
    fill: Fill


def written_now(trainer: Trainer, run: Run, names: dict[torch.Tensor, str], require: Require) -> Contents:
    """The run as it is when the files are written."""

    def check() -> None:
        require({name: weight.detach() for weight, name in names.items()})

    def fill(folder: Path) -> list[str]:
        trainer.save_model(str(folder), _internal_call=True)
        if not trainer.args.save_only_model:
            trainer._save_optimizer_and_scheduler(str(folder))
            trainer._save_scaler(str(folder))
            trainer._save_rng_state(str(folder))
        trainer.collect_callback_states()
        said = write_state(folder / TRAINER_STATE, trainer.state)
        codec.save_tree(folder, PROGRESS, progress_of(trainer, run))
        return said

    return Contents(check, fill)


def written_later(
    trainer: Trainer,
    run: Run,
    names: dict[torch.Tensor, str],
    tensors: adapter.SavedTensors,
    processor: ProcessorFiles,
    copies: Copies,
    require: Require,
) -> Contents:
    """The run as it is now; `names` are those of the parameters that are trained."""
    trainer.collect_callback_states()
    whole = not trainer.args.save_only_model
    model = adapter.with_own_settings(trainer.model)
    state, files, trained = trainer.state.as_written(), processor.files(), list(names.values())
    gathered = copies.take(tree_of(trainer, run, names, tensors))

    def check() -> None:
        copies.arrive()
        written = gathered["weights"] | gathered["extra"]
        require({name: written[name] for name in trained if name in written})

    def fill(folder: Path) -> list[str]:
        adapter.save_weights(model, folder, gathered["weights"], gathered["extra"])
        codec.save_files(folder, files)
        write_arguments(folder, gathered["arguments"])
        if whole:
            write_optimizer(folder, gathered["optimizer"])
            write_scaler(folder, gathered["scaler"])
            write_random(folder, gathered["random"])
        said = write_state(folder / TRAINER_STATE, state)
        codec.save_tree(folder, PROGRESS, gathered["progress"])
        return said

    return Contents(check, fill)


def tree_of(
    trainer: Trainer, run: Run, names: dict[torch.Tensor, str], tensors: adapter.SavedTensors
) -> dict[str, Any]:
    """What `written_later` copies: all that the steps to come will change."""
    whole = not trainer.args.save_only_model
    return {
        "weights": tensors.in_adapters,
        "extra": tensors.beside,
        "arguments": arguments_of(trainer),
        "optimizer": optimizer_of(trainer, names) if whole else None,
        "scaler": scaler_of(trainer) if whole else None,
        "random": random_of(trainer) if whole else None,
        "progress": progress_of(trainer, run),
    }


def optimizer_of(trainer: Composition, names: dict[torch.Tensor, str]) -> dict[str, Any]:
    state = trainer.optimizer.state_dict()
    contents = {
        "tree": codec.optimizer_tree(trainer.optimizer, state, names),
        "max_tensors": codec.max_optimizer_tensors(names),
        "schedule": trainer.lr_scheduler.state_dict(),
    }
    return contents | ({"state": state} if trainer.args.hf_checkpoint_files else {})


def write_optimizer(folder: Path, contents: dict[str, Any]) -> None:
    codec.save_tree(folder, "optimizer", contents["tree"], contents["max_tensors"])
    codec.save_tree(folder, "scheduler", contents["schedule"])
    if "state" in contents:
        transformers_files.write_optimizer_and_scheduler(folder, contents["state"], contents["schedule"])


def scaler_of(trainer: Composition) -> dict[str, Any]:
    assert trainer._run is not None
    return {"state": trainer._run.scaler.state(), "for_transformers": trainer.args.hf_checkpoint_files}


def write_scaler(folder: Path, contents: dict[str, Any]) -> None:
    codec.save_tree(folder, "scaler", contents["state"])
    if contents["for_transformers"]:
        transformers_files.write_scaler(folder, contents["state"])


def random_of(trainer: Composition) -> dict[str, Any]:
    contents = {"tree": codec.random_tree()}
    return contents | ({"states": transformers_files.random_states()} if trainer.args.hf_checkpoint_files else {})


def write_random(folder: Path, contents: dict[str, Any]) -> None:
    codec.save_tree(folder, "rng", contents["tree"])
    if "states" in contents:
        transformers_files.write_random_states(folder, contents["states"])


def arguments_of(trainer: Composition) -> dict[str, Any] | None:
    return trainer.args.to_dict() if trainer.args.hf_checkpoint_files else None


def write_arguments(folder: Path, settings: dict[str, Any] | None) -> None:
    if settings is not None:
        transformers_files.write_arguments(folder, settings)


def write_state(file: Path, state: TrainerState) -> list[str]:
    """Of a log that is longer than is read again, only the newest part is written; `metrics.jsonl` has all of it."""
    written = state
    written.save_to_json(file)
    while len(written.log_history) > 1 and LOG.problem_of(file.read_bytes()):
        written = replace(written, log_history=written.log_history[len(written.log_history) // 2 :])
        written.save_to_json(file)
    num_left_out = len(state.log_history) - len(written.log_history)
    if not num_left_out:
        return []
    return [
        f"the log has {len(state.log_history):,} entries: {file.name} leaves out the oldest {num_left_out:,}, metrics.jsonl "
        "has them all. Fewer logs: logging_steps"
    ]


def processor_of(trainer: Composition) -> Any:
    """The tokenizer or processor that is saved with the weights; None where there is none."""
    processor = trainer.processing_class
    if processor is None:
        processor = getattr(trainer.data_collator, "tokenizer", None)
    return processor if hasattr(processor, "save_pretrained") else None


class ProcessorFiles:
    """The files of a tokenizer or processor, kept in memory: they hardly change, and take long to make.

    A tokenizer of a hundred thousand words takes a third of a second, and it may not be asked for them in a thread while it
    is used in another.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor
        self._files: dict[str, bytes] = {}
        self._made_for: str | None = None

    def files(self) -> dict[str, bytes]:
        """Name -> content, as `save_pretrained` writes them now.

        Raises:
            CheckpointError: they could not be made in the temporary folder.
        """
        if self.processor is None:
            return {}
        settings = _settings_of(self.processor)
        if settings is None or settings != self._made_for:
            self._files, self._made_for = self._make(), settings
        return self._files

    def _make(self) -> dict[str, bytes]:
        try:
            with tempfile.TemporaryDirectory(prefix="etude-") as folder:
                self.processor.save_pretrained(folder)
                files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
                return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
        except Exception as error:  # tokenizers has one of its own for a full disk
            reason = name_of(error) if isinstance(error, OSError) else str(error)
            message = f"the files of the tokenizer could not be made: {reason}"
            raise CheckpointError(message, path=tempfile.gettempdir()) from error


def _settings_of(processor: Any) -> str | None:
    """What the files of a tokenizer depend on; None for anything else, whose files are made each time."""
    from transformers import PreTrainedTokenizerBase

    if not isinstance(processor, PreTrainedTokenizerBase):
        return None
    rust = getattr(processor, "backend_tokenizer", None)
    plain = {
        name: value for name, value in vars(processor).items() if value is None or isinstance(value, (str, int, float))
    }
    parts = (len(processor), plain, processor.init_kwargs, processor.special_tokens_map, processor.chat_template)
    return repr((*parts, getattr(rust, "truncation", None), getattr(rust, "padding", None)))
