"""`SFTConfig`: the settings of supervised fine-tuning, under the names of `trl.SFTConfig`.

Importing this module imports neither torch nor transformers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Self

from etude.arguments import TrainingArguments
from etude.errors import ConfigError

PACKING_STRATEGIES = ("bfd", "bfd_split", "wrapped")


def _help(text: str) -> dict[str, Any]:
    return {"help": text}


@dataclass(repr=False)
class SFTConfig(TrainingArguments):
    """`TrainingArguments` and what is done to the data before training. Defaults are those of TRL.

    Raises:
        ConfigError: a value that does not exist, or that etude refuses; says what to do instead.
    """

    # Where TRL's default differs from that of transformers.
    learning_rate: float = field(default=2e-5, metadata=_help("Peak learning rate; LoRA usually wants about 2e-4."))
    logging_steps: float = field(default=10, metadata=_help("Steps between two logs."))
    gradient_checkpointing: bool | None = field(
        default=True, metadata=_help("Keep fewer activations and compute them again in the backward pass.")
    )
    bf16: bool | None = field(  # type: ignore[assignment]  # resolved before it is read
        default=None, metadata=_help("Train in bfloat16 mixed precision; None: unless fp16 is set.")
    )

    # The model
    model_init_kwargs: dict[str, Any] | None = field(
        default=None,
        metadata=_help("How to load a model that is given by name: dtype, gguf_file, quantization_config."),
    )
    trust_remote_code: bool = field(default=False, metadata=_help("Execute code that comes with the model."))
    router_aux_loss_coef: float | None = field(
        default=None, metadata=_help("Weight of the load-balancing loss of a mixture of experts.")
    )
    chat_template_path: str | None = field(
        default=None, metadata=_help("A Jinja file, or the folder of a tokenizer whose chat template is used.")
    )
    eos_token: str | None = field(default=None, metadata=_help("What ends a row; default: the tokenizer's own."))
    pad_token: str | None = field(default=None, metadata=_help("What pads a batch; default: the tokenizer's own."))

    # The data
    dataset_text_field: str = field(default="text", metadata=_help("Column of plain text."))
    dataset_kwargs: dict[str, Any] | None = field(
        default=None, metadata=_help("{'skip_prepare_dataset': True} hands the data to the collator as it is.")
    )
    dataset_num_proc: int | None = field(
        default=None, metadata=_help("Processes that tokenize; None: one for each core where there are many rows.")
    )
    keep_tokens: bool = field(
        default=True,
        metadata=_help("Keep the tokens of the rows in the user's cache, for the next run on the same data."),
    )
    max_length: int | None = field(
        default=1024, metadata=_help("Longest sample in tokens; longer ones are cut at the end. None: no limit.")
    )
    max_seq_length: int | None = field(default=None, metadata=_help("The old name of max_length."))
    truncation_mode: str = field(
        default="keep_start", metadata=_help("Which end of a long sample is kept: keep_start.")
    )
    shuffle_dataset: bool = field(default=False, metadata=_help("Shuffle the samples once, before training."))
    packing: bool = field(
        default=False, metadata=_help("What a batch counts are blocks of up to max_length tokens, not samples.")
    )
    packing_strategy: str = field(
        default="bfd", metadata=_help("bfd: whole samples; bfd_split: long ones in parts; wrapped: cut anywhere.")
    )
    eval_packing: bool | None = field(default=None, metadata=_help("packing for evaluation; None: as for training."))
    padding_free: bool = field(default=False, metadata=_help("No effect: padding is removed wherever that is exact."))
    pad_to_multiple_of: int | None = field(default=None, metadata=_help("Pad batches to a multiple of it."))

    # What is learned
    completion_only_loss: bool | None = field(
        default=None, metadata=_help("Learn completions and not prompts; None: where the rows have both.")
    )
    assistant_only_loss: bool = field(default=False, metadata=_help("Learn the turns of the assistant alone."))
    loss_type: str = field(default="nll", metadata=_help("nll: cross entropy of the next token."))

    def __post_init__(self) -> None:
        if self.bf16 is None:
            self.bf16 = not self.fp16
        if self.max_seq_length is not None:
            self.max_length = self.max_seq_length
        _check(self)
        super().__post_init__()

    @classmethod
    def from_arguments(cls, args: Any) -> Self:
        """The same settings from `TrainingArguments`, ours or transformers', or from TRL's `SFTConfig`.

        Every value is taken over, also one that is a default there and another here.
        """
        base = args if isinstance(args, TrainingArguments) else TrainingArguments.from_transformers(args)
        settings = {item.name: getattr(base, item.name) for item in fields(TrainingArguments) if item.init}
        own = {item.name for item in fields(cls)} - settings.keys()
        settings |= {name: getattr(args, name) for name in own if hasattr(args, name)}
        return cls(**settings)


def _check(config: SFTConfig) -> None:
    """Raise ConfigError for what cannot be done; warn of what has no effect."""
    if config.packing_strategy not in PACKING_STRATEGIES:
        raise ConfigError(
            f"expected one of {', '.join(PACKING_STRATEGIES)}, got {config.packing_strategy!r}",
            field="packing_strategy",
        )
    if config.packing and config.max_length is None:
        raise ConfigError("packing needs it: the length of a block", field="max_length")
    if config.max_length is not None and config.max_length < 2:
        raise ConfigError(f"must be at least 2 tokens, got {config.max_length}", field="max_length")
    if config.truncation_mode != "keep_start":
        raise ConfigError(
            f"only 'keep_start' is there, got {config.truncation_mode!r}; cut the rows themselves for anything else",
            field="truncation_mode",
        )
    if config.loss_type not in ("nll", "chunked_nll"):
        raise ConfigError(
            f"only 'nll' is there, got {config.loss_type!r}; give another as compute_loss_func", field="loss_type"
        )
    if str(config.pad_to_multiple_of) == "auto":  # as TRL writes None
        config.pad_to_multiple_of = None
