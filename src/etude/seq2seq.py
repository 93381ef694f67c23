"""`Seq2SeqTrainer`: a `Trainer` whose evaluations and predictions may generate."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from etude.arguments import TrainingArguments
from etude.errors import ConfigError
from etude.outputs import PredictionOutput
from etude.seq2seq_arguments import Seq2SeqTrainingArguments
from etude.trainer import Trainer

LENGTH_WITHOUT_LIMIT = 20
"""The length, in tokens, that generation has in transformers where no config sets one."""


class Seq2SeqTrainer(Trainer):
    """With `predict_with_generate=True` the predictions are generated tokens, not logits.

    `evaluate` and `predict` take keyword arguments of `generate` (`max_length`, `num_beams`, ...); those of the arguments
    stand in for what is not given. Constructor as `Trainer`.
    """

    def __init__(self, model: nn.Module | None = None, args: Any = None, *others: Any, **named: Any) -> None:
        if args is not None and not isinstance(args, TrainingArguments):
            args = Seq2SeqTrainingArguments.from_transformers(args)
        self._gen_kwargs: dict[str, Any] = {}
        super().__init__(model, args, *others, **named)
        config = getattr(self.args, "generation_config", None)
        if config is not None:
            self.model.generation_config = self.load_generation_config(config)

    @staticmethod
    def load_generation_config(gen_config_arg: Any) -> Any:
        """A `GenerationConfig` from one, a folder, a file, or the id of a model.

        Raises:
            ConfigError: its values contradict each other, so that it could not be saved when training ends.
        """
        from transformers import GenerationConfig

        if isinstance(gen_config_arg, GenerationConfig):
            config = copy.deepcopy(gen_config_arg)
        elif (file := Path(gen_config_arg)).is_file():
            config = GenerationConfig.from_pretrained(file.parent, file.name)
        else:
            config = GenerationConfig.from_pretrained(gen_config_arg)
        try:
            config.validate(strict=True)
        except ValueError as error:
            raise ConfigError(f"cannot be used: {error}", field="generation_config") from error
        return config

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
        **gen_kwargs: Any,
    ) -> dict[str, float]:
        """As `Trainer.evaluate`; `gen_kwargs` go to `generate`."""
        self._gen_kwargs = self._with_defaults(gen_kwargs)
        return super().evaluate(eval_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def predict(
        self,
        test_dataset: Any,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "test",
        **gen_kwargs: Any,
    ) -> PredictionOutput:
        """As `Trainer.predict`; `gen_kwargs` go to `generate`."""
        self._gen_kwargs = self._with_defaults(gen_kwargs)
        return super().predict(test_dataset, ignore_keys=ignore_keys, metric_key_prefix=metric_key_prefix)

    def _with_defaults(self, gen_kwargs: dict[str, Any]) -> dict[str, Any]:
        given = {name: value for name, value in gen_kwargs.items() if value is not None}
        max_length = getattr(self.args, "generation_max_length", None)
        num_beams = getattr(self.args, "generation_num_beams", None)
        if max_length is not None and not {"max_length", "max_new_tokens"} & given.keys():
            given["max_length"] = max_length
        return given if num_beams is None else {"num_beams": num_beams, **given}

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
        **gen_kwargs: Any,
    ) -> tuple[torch.Tensor | None, Any, Any]:
        """(mean loss, generated tokens, labels) of one batch; as `Trainer.prediction_step` where nothing is generated."""
        if not getattr(self.args, "predict_with_generate", False) or prediction_loss_only:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        labels = inputs.get("labels")
        with torch.no_grad(), self.compute_loss_context_manager():
            generated = self.model.generate(**_inputs_of_generation(inputs), **(gen_kwargs or self._gen_kwargs))
            loss = None if labels is None else self._loss_of(model, inputs, labels)
        generated = self._filled_up(generated)
        return loss, generated, None if labels is None else self._filled_up(labels)

    def _loss_of(self, model: nn.Module, inputs: Any, labels: torch.Tensor) -> torch.Tensor:
        outputs = model(**inputs)
        if self.label_smoother is not None:
            loss: torch.Tensor = self.label_smoother(outputs, labels)
        else:
            loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs[0]
        return loss.detach().mean()

    def _filled_up(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens (B, T) widened to the length of the model's generation config."""
        config = self.model.generation_config
        longest = getattr(config, "max_length", None) or LENGTH_WITHOUT_LIMIT
        if tokens.shape[-1] < longest:
            return self._pad_tensors_to_max_len(tokens, longest)
        new_tokens = getattr(config, "max_new_tokens", None)
        if new_tokens is not None and tokens.shape[-1] < new_tokens + 1:
            return self._pad_tensors_to_max_len(tokens, new_tokens + 1)
        return tokens

    def _pad_tensors_to_max_len(self, tensor: torch.Tensor, max_length: int) -> torch.Tensor:
        """Tokens (B, T) with pad tokens on the right, (B, max_length)."""
        pad = getattr(self.processing_class, "pad_token_id", None)
        pad = getattr(self.processing_class, "eos_token_id", None) if pad is None else pad
        pad = getattr(self.model.config, "pad_token_id", None) if pad is None else pad
        if pad is None:
            raise ConfigError(
                "neither the tokenizer nor the model's config has one, but generated rows differ in length",
                field="pad_token_id",
            )
        padded = tensor.new_full((tensor.shape[0], max_length), pad)
        padded[:, : tensor.shape[-1]] = tensor
        return padded


def _inputs_of_generation(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """What a model generates from: no labels, and no decoder inputs that were made of them."""
    labels, decoder_inputs = inputs.get("labels"), inputs.get("decoder_input_ids")
    left_out = {"labels"}
    if labels is not None and decoder_inputs is not None and labels.shape == decoder_inputs.shape:
        left_out |= {"decoder_input_ids", "decoder_attention_mask"}
    return {name: value for name, value in inputs.items() if name not in left_out}
