"""Names that scripts and subclasses look for, and that need nothing of ours behind them, or are refused with the reason."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import nn

from etude.accelerator_view import AcceleratorView
from etude.errors import ConfigError
from etude.hooks.base import Composition

UPLOADS_NOTHING = "etude uploads nothing; save locally (save_model), then `hf upload REPOSITORY FOLDER`"

REFUSED_OVERRIDES = {
    "_inner_training_loop": "the loop is etude's own. Override training_step, compute_loss or a callback event",
    "_run_epoch": "the loop is etude's own. Override training_step or get_batch_samples, or use on_epoch_begin and -_end",
}
"""Hooks of the peer's loop that have no counterpart, and what to override instead."""


class NoTracker:
    """What an `evaluate` that was copied from the peer starts and stops; etude measures memory in the loop below it."""

    def start(self) -> None:
        """Nothing."""

    def stop_and_update_metrics(self, metrics: dict[str, Any] | None = None) -> None:
        """Nothing: the metrics stay as they are."""


class NamedHooks(Composition):
    """What is there so that it can be called, looked at or overridden."""

    deepspeed: Any = None
    is_deepspeed_enabled = False
    is_fsdp_enabled = False
    is_fsdp_xla_enabled = False
    is_fsdp_xla_v1_enabled = False
    is_fsdp_xla_v2_enabled = False
    is_tp_enabled = False
    use_apex = False
    use_cpu_amp = False
    hub_model_id: str | None = None
    _memory_tracker = NoTracker()

    @property
    def gather_function(self) -> Any:
        """What joins the results of an evaluation over processes."""
        return self.accelerator.gather_for_metrics

    @property
    def _train_batch_size(self) -> int:
        """Samples of a batch before accumulation."""
        return self.args.train_batch_size

    def create_accelerator_and_postprocess(self) -> None:
        """Build `trainer.accelerator`; called once, before the model is looked at.

        Raises:
            ConfigError: the number of accumulated batches is given twice.
        """
        self.accelerator = AcceleratorView(self)
        num_steps = (self.accelerator.gradient_accumulation_kwargs or {}).get("num_steps")
        if num_steps is None:
            return
        if self.args.gradient_accumulation_steps > 1:
            raise ConfigError(
                "The `AcceleratorConfig`'s `num_steps` is set but gradient_accumulation_steps is as well; keep one",
                field="accelerator_config",
            )
        self.args.gradient_accumulation_steps = int(num_steps)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """The model as the loop calls it. Nothing is wrapped: gradients are summed by one reduction of ours."""
        return model

    def get_sp_size(self) -> int:
        return 1

    def get_cp_size(self) -> int:
        return 1

    def get_tp_size(self) -> int:
        return 1

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Write the model card, `README.md`: peft's, which every saved adapter gets as well."""
        if hasattr(self.model, "create_or_update_model_card"):
            self.model.create_or_update_model_card(str(self.args.output_dir))
        else:
            self.notices.say("no model card: this model knows none of its own")

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> NoReturn:
        """Refused.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(UPLOADS_NOTHING, field="init_hf_repo")

    def push_to_hub(self, *_: Any, **__: Any) -> NoReturn:
        """Refused.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(UPLOADS_NOTHING, field="push_to_hub")

    def _push_from_checkpoint(self, checkpoint_folder: str) -> NoReturn:
        raise ConfigError(UPLOADS_NOTHING, field="_push_from_checkpoint")

    def end(self) -> None:
        """Leave the process group; call it last, when nothing needs the other processes any more."""
        self.accelerator.end_training()
