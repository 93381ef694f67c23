"""Rough figures before a run: the memory it will hold and the disk its checkpoints will fill.

They are meant to be right within a third, and to err on the large side.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from etude.model.loss import unwrapped
from etude.observe.amounts import of_bytes
from etude.observe.machine import free_disk_bytes, free_memory_bytes
from etude.observe.start_screen import Need

if TYPE_CHECKING:
    from etude.run import Plan
    from etude.trainer import Trainer

STATE_BYTES = {"sgd": 4, "adafactor": 4, "lion": 4, "8bit": 2, "4bit": 1, "rmsprop": 4}
"""Optimizer state per trainable parameter, by a part of the optimizer's name; Adam's two moments elsewhere."""
ADAM_STATE_BYTES = 8
TOKENIZER_BYTES_PER_WORD = 110
"""tokenizer.json of Llama 3, Qwen3 and Gemma 3 has 75 to 135 bytes per entry of the vocabulary."""


def memory_needed(trainer: Trainer, longest: int | None) -> Need:
    """Weights, state of the optimizer and the activations of a micro-batch, against what the device has room for."""
    device = trainer.args.device
    weights = sum(p.numel() * p.element_size() for p in trainer.model.parameters())
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    state = trained * (4 + optimizer_state_bytes(str(trainer.args.optim)))  # the gradients are float32
    parts = [f"weights {of_bytes(weights)}", f"training state {of_bytes(state)}"]
    activations = 0.0
    tokens = (longest or 0) * trainer.args.train_batch_size
    budget = trainer.cut.get("tokens_per_micro_batch")  # a packed micro-batch may hold samples of the whole step
    if budget:
        tokens = min(budget, tokens * trainer.args.gradient_accumulation_steps or budget)
    per_token = activation_bytes_per_token(trainer)
    if tokens and per_token:
        activations = tokens * per_token
        parts.append(f"{tokens:,} tokens at a time {of_bytes(activations)}")
    free = free_memory_bytes(device)
    available = None if free is None else free + weights  # the weights are there already
    return Need(weights + state + activations, available, tuple(parts))


def optimizer_state_bytes(optimizer: str) -> int:
    """Bytes of state per trainable parameter."""
    return next((size for part, size in STATE_BYTES.items() if part in optimizer), ADAM_STATE_BYTES)


def activation_bytes_per_token(trainer: Trainer) -> float | None:
    """What the backward pass of a decoder keeps of one token, in bytes; None for models of another kind."""
    base = unwrapped(trainer.model)
    config = getattr(base, "config", None)
    config = config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config
    hidden, layers = getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)
    if not isinstance(hidden, int) or not isinstance(layers, int):
        return None
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    size = 2 if trainer.precision.autocast_dtype is not None or getattr(base, "dtype", None) in _HALF else 4
    # Of a layer: the inputs of both norms and their outputs, queries, keys, values and the attention's output, the
    # gate, the other branch, their product and the activation.
    layer = size * (8 * hidden + 4 * inner)
    checkpointed = trainer.args.gradient_checkpointing or trainer.args.activation_checkpointing
    kept = size * hidden * layers + layer if checkpointed else layer * layers
    vocabulary = getattr(config, "vocab_size", 0) if trainer.path is None or trainer.path.name == "general" else 0
    return float(kept + 8 * vocabulary)  # logits and their gradient, where they are not computed in chunks


_HALF = (torch.float16, torch.bfloat16)


def disk_needed(trainer: Trainer, plan: Plan) -> Need | None:
    """All checkpoints of the run together, and the finished adapter; None where nothing is saved."""
    args = trainer.args
    size = checkpoint_bytes(trainer)
    count = checkpoints_kept(args, plan)
    if not count:
        return None
    parts = (f"{count} checkpoint{'s' if count > 1 else ''} of {of_bytes(size)} at once",)
    return Need((count + 1) * size, free_disk_bytes(Path(str(args.output_dir))), parts)


def checkpoint_bytes(trainer: Trainer) -> float:
    """One checkpoint: the trained weights, the optimizer's state (twice with `hf_checkpoint_files`), the tokenizer."""
    args, model = trainer.args, trainer.model
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    is_adapter = hasattr(model, "peft_config")
    weights = trained * 4 if is_adapter else sum(p.numel() * p.element_size() for p in model.parameters())
    copies = 0 if args.save_only_model else 2 if args.hf_checkpoint_files else 1
    state = copies * trained * optimizer_state_bytes(str(args.optim))
    processor: Any = trainer.processing_class
    words = len(processor) if hasattr(processor, "__len__") else 0
    return float(weights + state + words * TOKENIZER_BYTES_PER_WORD)


def checkpoints_kept(args: Any, plan: Plan) -> int:
    """Checkpoints that lie on the disk at the same time."""
    if str(getattr(args.save_strategy, "value", args.save_strategy)) == "no":
        return 0
    strategy = str(getattr(args.save_strategy, "value", args.save_strategy))
    if strategy == "steps":
        interval = args.save_steps if args.save_steps >= 1 else math.ceil(plan.max_steps * args.save_steps)
        written = -(-plan.max_steps // max(1, int(interval)))
    elif strategy == "epoch":
        written = min(plan.num_epochs, plan.max_steps)
    else:
        written = 1
    limit = args.save_total_limit
    # The best one is never retired, and the oldest only once the next one is whole.
    return min(written, limit + 1) if limit else written
