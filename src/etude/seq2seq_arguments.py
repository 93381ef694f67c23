"""`Seq2SeqTrainingArguments`: the settings of a run that is judged by what the model generates."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

from etude.arguments import TrainingArguments
from etude.errors import ConfigError


@dataclass(repr=False)
class Seq2SeqTrainingArguments(TrainingArguments):
    """`TrainingArguments`, and how sequences are generated for an evaluation or a prediction.

    Raises:
        UnknownArgumentError, ConfigError: as `TrainingArguments`; also for `sortish_sampler`, which nothing reads any more.
    """

    sortish_sampler: bool = field(
        default=False, metadata={"help": "Refused; train_sampling_strategy='group_by_length' does it."}
    )
    predict_with_generate: bool = field(
        default=False, metadata={"help": "Predict by generating, for metrics on text such as ROUGE and BLEU."}
    )
    generation_max_length: int | None = field(
        default=None, metadata={"help": "Longest sequence to generate, in tokens; the model's own limit if not given."}
    )
    generation_num_beams: int | None = field(
        default=None, metadata={"help": "Beams to generate with; the model's own number if not given."}
    )
    generation_config: str | None | Any = field(  # noqa: RUF036  # HfArgumentParser takes the type from the first
        default=None, metadata={"help": "Folder, file or model id of a generation config, or a GenerationConfig."}
    )

    def validate(self) -> None:
        super().validate()
        if self.sortish_sampler:
            raise ConfigError(
                "has no effect in any version; use train_sampling_strategy='group_by_length'", field="sortish_sampler"
            )

    def to_dict(self) -> dict[str, Any]:
        """Every field in terms of JSON, a `GenerationConfig` as a dictionary."""
        settings = super().to_dict()
        config: Any = self.generation_config
        if hasattr(config, "to_dict"):
            settings["generation_config"] = config.to_dict()
        return settings

    @classmethod
    def from_transformers(cls, theirs: Any) -> Self:
        """The same settings from a `transformers.Seq2SeqTrainingArguments`."""
        made = super().from_transformers(theirs)
        for name in (
            *("sortish_sampler", "predict_with_generate", "generation_max_length"),
            *("generation_num_beams", "generation_config"),
        ):
            setattr(made, name, getattr(theirs, name, getattr(made, name)))
        made.validate()
        return made
