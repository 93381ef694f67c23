"""`SFTTrainer`: supervised fine-tuning with the arguments of `trl.SFTTrainer`, on etude's own rooms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch

from etude.data.loader import is_streamed
from etude.errors import ConfigError, DataError, ModelError, UnknownArgumentError, nearest
from etude.sft_config import SFTConfig
from etude.sft_data import BlockCollator, FormattingFunc, StreamedSamples, prepare
from etude.trainer import Trainer

__all__ = ["SFTConfig", "SFTTrainer"]

_LOADING = {"dtype", "torch_dtype", "gguf_file", "quantization_config", "trust_remote_code"}


class SFTTrainer(Trainer):
    """A `Trainer` that also loads the model, attaches the adapter and tokenizes the data.

    Args:
        model: a model, or the folder or name of one.
        args: `SFTConfig`; `TrainingArguments` and TRL's own `SFTConfig` are taken over.
        train_dataset, eval_dataset: rows of text, prompt and completion, messages, or token ids: a `datasets.Dataset`,
            an iterable one, or a list; `eval_dataset` also a dict of them.
        processing_class: the tokenizer; without it, the one that lies beside the model.
        peft_config: an adapter to attach.
        quantization_config: how to quantise a model that is given by name.
        formatting_func: row -> text.
        The other arguments are those of `Trainer`.

    Raises:
        ConfigError, DataError, ModelError: before anything is written.
    """

    def __init__(
        self,
        model: Any,
        args: Any = None,
        data_collator: Callable[[list[Any]], Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        compute_loss_func: Callable[..., torch.Tensor] | None = None,
        compute_metrics: Callable[..., dict[str, Any]] | None = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        optimizer_cls_and_kwargs: tuple[Any, dict[str, Any]] | None = None,
        preprocess_logits_for_metrics: Callable[[Any, Any], Any] | None = None,
        quantization_config: Any = None,
        peft_config: Any = None,
        formatting_func: FormattingFunc | None = None,
        **old_names: Any,
    ) -> None:
        if "tokenizer" in old_names:
            processing_class = processing_class if processing_class is not None else old_names.pop("tokenizer")
        config = _config(args, model, old_names)
        if train_dataset is None:
            raise DataError("SFTTrainer needs a train_dataset")
        _seed(config)  # the adapter's start depends on it
        model, tokenizer = _model_and_tokenizer(model, processing_class, config, quantization_config)
        _agree_on_tokens(model, tokenizer, config)
        if peft_config is not None:
            model = _adapted(model, peft_config)
        self._tokenizer, self._formatting_func = tokenizer, formatting_func
        self._left_out: list[DataError] = []
        train_dataset = self._prepare(train_dataset, config, packing=config.packing, shuffle=config.shuffle_dataset)
        eval_dataset = self._prepare_evaluation(eval_dataset, config)
        super().__init__(
            model=model,
            args=config,
            data_collator=data_collator or BlockCollator(tokenizer, config.pad_to_multiple_of),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            compute_loss_func=compute_loss_func,
            compute_metrics=compute_metrics,
            callbacks=callbacks,
            optimizers=optimizers,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            preprocess_logits_for_metrics=preprocess_logits_for_metrics,
        )
        if self._left_out:
            self.notices.say(f"{len(self._left_out)} rows are left out; the first: {self._left_out[0]}")

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """As `Trainer.evaluate`; a data set that is given here is prepared as the others were."""
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._prepare_evaluation(eval_dataset, self.args)
        return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if "seq_lengths" not in (self._signature_columns or []):
            self._signature_columns = [*(self._signature_columns or []), "seq_lengths"]

    def _prepare_evaluation(self, dataset: Any, config: Any) -> Any:
        if dataset is None:
            return None
        if isinstance(dataset, dict):
            return {name: self._prepare_evaluation(part, config) for name, part in dataset.items()}
        packing = config.packing if config.eval_packing is None else config.eval_packing
        return self._prepare(dataset, config, packing=packing, shuffle=False)

    def _prepare(self, dataset: Any, config: Any, *, packing: bool, shuffle: bool) -> Any:
        """Rows -> samples; what is prepared already, or is to be left alone, as it is."""
        if (config.dataset_kwargs or {}).get("skip_prepare_dataset") or isinstance(dataset, _Samples | StreamedSamples):
            return dataset

        is_whole = not is_streamed(dataset)

        def prepare_rows(rows: Any) -> Sequence[Any]:
            done = prepare(
                *(rows, self._tokenizer, config),
                packing=packing,
                formatting_func=self._formatting_func,
                is_whole=is_whole,
            )
            self._left_out += done.left_out
            return done.samples

        if not is_whole:
            return StreamedSamples(dataset, prepare_rows)
        samples = _Samples(prepare_rows(dataset))
        return samples.shuffled(config.seed) if shuffle else samples


class _Samples(torch.utils.data.Dataset[Any]):
    """Prepared samples, in an order of their own."""

    def __init__(self, samples: Sequence[Any], order: Sequence[int] | None = None) -> None:
        self.samples, self.order = samples, order

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        return self.samples[index if self.order is None else self.order[index]]

    def shuffled(self, seed: int) -> _Samples:
        """The same samples in the order in which `datasets` shuffles with this seed."""
        order = np.random.default_rng(seed).permutation(len(self.samples))
        return _Samples(self.samples, order.tolist())


def _config(args: Any, model: Any, old_names: dict[str, Any]) -> SFTConfig:
    """The settings, with those that scripts for older versions give to the trainer itself.

    Raises:
        UnknownArgumentError: neither the trainer nor its settings have the name.
    """
    known = [item.name for item in fields(SFTConfig)]
    for name in old_names:
        if name not in known:
            near = nearest(name, [*known, "peft_config", "formatting_func", "processing_class"])
            hint = f"; did you mean '{near}'?" if near else ""
            raise UnknownArgumentError(f"SFTTrainer has no such argument{hint}", field=name)
    if args is None:
        name = model if isinstance(model, str) else getattr(model.config, "_name_or_path", "") or "model"
        return SFTConfig(output_dir=f"{Path(name).name}-SFT", **old_names)
    config = args if isinstance(args, SFTConfig) else SFTConfig.from_arguments(args)
    for name, value in old_names.items():
        setattr(config, name, value)
    if old_names:
        config.__post_init__()
    return config


def _seed(config: SFTConfig) -> None:
    from transformers import set_seed

    set_seed(config.seed)


def _model_and_tokenizer(model: Any, tokenizer: Any, config: SFTConfig, quantization_config: Any) -> tuple[Any, Any]:
    from etude.model.load import ensure_pad_token, load_base_model

    if isinstance(model, str):
        options = dict(config.model_init_kwargs or {})
        unknown = sorted(options.keys() - _LOADING)
        if unknown:
            raise ConfigError(
                f"{', '.join(unknown)}: load the model yourself for that and give it as model=",
                field="model_init_kwargs",
            )
        dtype = options.get("dtype", options.get("torch_dtype", "float32"))
        model, found = load_base_model(
            model,
            dtype=None if dtype == "auto" else dtype,
            device=config.device,
            trust_remote_code=config.trust_remote_code or options.get("trust_remote_code") is True,
            gguf_file=options.get("gguf_file"),
            quantization=quantization_config or options.get("quantization_config"),
        )
        tokenizer = tokenizer if tokenizer is not None else found
    if tokenizer is None:
        from transformers import AutoTokenizer

        name = getattr(model.config, "_name_or_path", "")
        try:
            tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=config.trust_remote_code)
        except (OSError, ValueError) as error:
            raise ModelError("no tokenizer lies beside the model; give it as processing_class=") from error
    if hasattr(tokenizer, "tokenizer"):
        raise ModelError("this is a processor of several modalities; give its tokenizer as processing_class=")
    if config.pad_token is not None:
        tokenizer.pad_token = _known_token(tokenizer, config.pad_token, "pad_token")
    ensure_pad_token(tokenizer)
    return model, tokenizer


def _agree_on_tokens(model: Any, tokenizer: Any, config: SFTConfig) -> None:
    """Let tokenizer and model mean the same by end and padding, and use the chat template that was asked for."""
    text_config = model.config.get_text_config()
    generation = getattr(model, "generation_config", None)
    text_config.pad_token_id = tokenizer.pad_token_id
    if generation is not None:
        generation.pad_token_id = tokenizer.pad_token_id
    if config.eos_token is not None:
        tokenizer.eos_token = _known_token(tokenizer, config.eos_token, "eos_token")
        text_config.eos_token_id = tokenizer.eos_token_id
        if generation is not None:  # several tokens may end a reply
            ends = generation.eos_token_id
            known = [ends] if isinstance(ends, int) else list(ends or [])
            generation.eos_token_id = [tokenizer.eos_token_id, *(end for end in known if end != tokenizer.eos_token_id)]
    if config.chat_template_path is not None:
        tokenizer.chat_template = _template(config.chat_template_path)
    if config.router_aux_loss_coef is not None:
        if not hasattr(text_config, "router_aux_loss_coef"):
            raise ConfigError("the model is no mixture of experts", field="router_aux_loss_coef")
        text_config.router_aux_loss_coef = config.router_aux_loss_coef
        text_config.output_router_logits = config.router_aux_loss_coef != 0


def _known_token(tokenizer: Any, token: str, field: str) -> str:
    vocabulary = tokenizer.get_vocab()
    if token not in vocabulary:
        guess = nearest(token, sorted(vocabulary))
        hint = f"; did you mean {guess!r}?" if guess else ""
        raise ConfigError(f"{token!r} is not in the vocabulary{hint}", field=field)
    return token


def _template(path: str) -> Any:
    from transformers import AutoTokenizer

    file = Path(path)
    if file.is_file():
        return file.read_text(encoding="utf-8")
    try:
        return AutoTokenizer.from_pretrained(path).chat_template
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} is neither a file nor a tokenizer", field="chat_template_path") from error


def _adapted(model: Any, peft_config: Any) -> Any:
    """The model with a new adapter.

    Raises:
        ModelError: it has one already, or cannot carry this one.
    """
    from peft import PeftConfig, PeftModel, get_peft_model

    if not isinstance(peft_config, PeftConfig):
        raise ConfigError(
            f"expected a PeftConfig such as LoraConfig, got {type(peft_config).__name__}", field="peft_config"
        )
    if isinstance(model, PeftModel):
        raise ModelError("the model has an adapter already; leave peft_config out, or merge the adapter first")
    try:
        return get_peft_model(model, peft_config)
    except ValueError as error:
        raise ModelError(f"the adapter cannot be attached: {error}") from error
