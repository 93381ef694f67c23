"""What the model's own loss means, and what it must be multiplied by to be a micro-batch's share of the step's loss.

The loss of a step is (sum over its supervised items) / (their number). A model may divide by the number it is given
(`num_items_in_batch`), or always take the mean over the batch it sees; which of the two is found out once, by asking it.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from etude.errors import ModelError

IGNORED_LABEL = -100


def unwrapped(model: Any) -> Any:
    """The transformers model inside a PEFT model (also one of mixed methods), or the model itself."""
    if hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model.base_model.model if type(model).__name__ == "PeftMixedModel" else model


def accepts_loss_kwargs(model: Any) -> bool:
    """Whether the forward can be given `num_items_in_batch`; the model may say so itself (`accepts_loss_kwargs`)."""
    base = unwrapped(model)
    if hasattr(base, "accepts_loss_kwargs"):
        return bool(base.accepts_loss_kwargs)
    parameters = inspect.signature(base.forward).parameters.values()
    return any(p.kind is inspect.Parameter.VAR_KEYWORD or p.name == "num_items_in_batch" for p in parameters)


def shifts_labels(model: Any) -> bool:
    """Whether the model predicts the next token (a decoder language model), so that its first label is never a target."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    base = unwrapped(model)
    is_encoder_decoder = getattr(getattr(base, "config", None), "is_encoder_decoder", False)
    return LOSS_MAPPING.get(getattr(base, "loss_type", None)) is ForCausalLMLoss and not is_encoder_decoder


@torch.no_grad()
def divides_by_num_items(model: nn.Module, inputs: Any, autocast: AbstractContextManager[Any]) -> bool:
    """Ask the model: does its loss halve when it is told that there are twice as many items?

    One row of `inputs` is run twice, in evaluation mode; nothing is changed.
    """
    if not isinstance(inputs, Mapping) or not accepts_loss_kwargs(model):
        return False
    rows = next((value.shape[0] for value in inputs.values() if torch.is_tensor(value) and value.dim() > 0), 0)
    one_row = {
        key: value[:1] if torch.is_tensor(value) and value.dim() > 0 and value.shape[0] == rows else value
        for key, value in inputs.items()
    }
    was_training = model.training
    model.eval()
    try:
        with autocast:
            once, twice = (read_loss(model(**one_row, num_items_in_batch=count)) for count in (1, 2))
        return bool(torch.isfinite(once)) and bool((once - 2 * twice).abs() <= 0.01 * once.abs()) and bool(once != 0)
    except TypeError:  # a forward that passes **kwargs on to something that does not take the name
        return False
    finally:
        model.train(was_training)


def read_loss(outputs: Any) -> torch.Tensor:
    """The loss among a model's outputs.

    Raises:
        ModelError: where there is none.
    """
    if isinstance(outputs, Mapping):
        if "loss" not in outputs:
            raise ModelError(
                f"the model returned no loss, only {', '.join(outputs)}. The batch needs labels (see label_names), or "
                "override compute_loss"
            )
        loss = outputs["loss"]
    else:
        loss = outputs[0]
    if not torch.is_tensor(loss):
        raise ModelError(f"the model's loss is {type(loss).__name__}, not a tensor: does the batch have labels?")
    return loss


class LabelSmoother:
    """The loss of `label_smoothing_factor`, with the call that transformers' has."""

    def __init__(self, epsilon: float = 0.1, ignore_index: int = IGNORED_LABEL) -> None:
        self.epsilon, self.ignore_index = epsilon, ignore_index

    def __call__(
        self,
        model_output: Any,
        labels: torch.Tensor,
        shift_labels: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        return smoothed_loss(
            model_output,
            labels.masked_fill(labels == self.ignore_index, IGNORED_LABEL),
            epsilon=self.epsilon,
            shift=shift_labels,
            num_items=num_items_in_batch,
        )


def label_smoother(model: Any, factor: float) -> LabelSmoother | None:
    """None where labels are not smoothed; those of several classes at once cannot be."""
    if factor == 0:
        return None
    if getattr(getattr(model, "config", None), "problem_type", None) == "multi_label_classification":
        warnings.warn(
            "Label smoothing is not compatible with multi-label classification: labels stay as they are", stacklevel=2
        )
        return None
    return LabelSmoother(factor)


def smoothed_loss(
    outputs: Any, labels: torch.Tensor, *, epsilon: float, shift: bool, num_items: torch.Tensor | int | None
) -> torch.Tensor:
    """Cross entropy against labels smoothed by `epsilon` (Szegedy et al., arXiv 1512.00567, section 7).

    L = (1 - epsilon) * mean(-log p(label)) + epsilon * mean over tokens and classes (-log p), over the labels that are
    not -100. `logits` (..., C) float, `labels` (...) int64. With `num_items` the sums are divided by it instead.
    """
    logits = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    if shift:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    log_p = functional.log_softmax(logits, dim=-1, dtype=torch.float32)
    kept = labels != IGNORED_LABEL
    nll = -log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    uniform = -log_p.mean(dim=-1)
    divisor = kept.sum() if num_items is None else num_items
    return ((1 - epsilon) * nll + epsilon * uniform).masked_fill(~kept, 0.0).sum() / divisor
