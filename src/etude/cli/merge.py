"""`etude merge`: an adapter and its base -> one model of ordinary weights, and how much that changed it."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from etude.cli.options import BaseModel, TrustRemoteCode
from etude.errors import ConfigError, ModelError

PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Explain in two steps how to boil an egg.",
)


def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a run, a checkpoint or an adapter.")],
    output: Annotated[str, typer.Option(metavar="O", help="New folder of the merged model.")],
    dtype: Annotated[
        str | None,
        typer.Option(metavar="T", help="bfloat16, float16 or float32.", show_default="as the base is stored"),
    ] = None,
    model: BaseModel = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Fold an adapter into its base model.

    The base is read in its original weights, also where it was quantised in
    training; each sum is made in float32 and rounded once. Logits before and
    after are compared, and the largest difference is shown.

    \b
      etude merge ./run --output ./merged
    """
    target = Path(output).expanduser()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{output} is there already; name a new folder", field="--output")
    from etude.cli.adapted import adapter_folder, base_name, load_adapted
    from etude.cli.voice import Voice

    kept = dtype or stored_dtype(model or base_name(adapter_folder(adapter)))
    adapted = load_adapted(adapter, base=model, dtype=kept, trust_remote_code=trust_remote_code)
    voice = Voice(adapted.tokenizer, format=adapted.format, template=None)
    prompts = [voice.prompt_of(prompt) for prompt in PROMPTS]
    before = last_logits(adapted.model, prompts)
    merged = merged_model(adapted.model)
    difference = compare(before, last_logits(merged, prompts))
    save(merged, adapted.tokenizer, target)
    typer.echo(
        f"merged in {kept}: {target}\n"
        f"logits of {len(prompts)} prompts before and after: largest difference {difference.largest:.3g} "
        f"(logits up to {difference.scale:.3g}), same next token in {difference.agreeing} of {difference.positions} places"
    )


def stored_dtype(name: str) -> str:
    """The type that a base model's weights are stored in, as its config says; bfloat16 where that is not 16 or 32 bits."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return "bfloat16"  # loading says what is wrong with it; a GGUF file has no type of its own
    found = str(getattr(config, "dtype", None)).removeprefix("torch.")
    return found if found in ("bfloat16", "float16", "float32") else "bfloat16"


def merged_model(model: Any) -> Any:
    """The base model with the adapter in its weights. Each W + (alpha/r) B A is summed in float32 and rounded once.

    Raises:
        ModelError: this kind of adapter cannot be merged.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for layer in [part for part in model.modules() if isinstance(part, BaseTunerLayer) and not part.merged]:
        weights = list(layer.get_base_layer().parameters())
        stored = [weight.dtype for weight in weights]
        for weight in weights:
            weight.data = weight.data.float()
        layer.merge()
        for weight, dtype in zip(weights, stored, strict=True):
            weight.data = weight.data.to(dtype)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="All adapters are already merged")
            return model.merge_and_unload()
    except (AttributeError, NotImplementedError, ValueError) as error:
        raise ModelError(f"this adapter cannot be merged: {error}") from error


def last_logits(model: Any, prompts: list[list[int]]) -> list[Any]:
    """The logits of every place of each prompt, (T, V) in float32 on the CPU."""
    import torch

    device = next(model.parameters()).device
    with torch.no_grad():
        return [model(input_ids=torch.tensor([ids], device=device)).logits[0].float().cpu() for ids in prompts]


class Difference(NamedTuple):
    """Of two models' logits: the largest difference, the largest logit, and the places with the same likeliest token."""

    largest: float
    scale: float
    agreeing: int
    positions: int


def compare(before: list[Any], after: list[Any]) -> Difference:
    """How far the logits of the merged model are from those of base and adapter."""
    pairs = list(zip(before, after, strict=True))
    return Difference(
        largest=max(float((new - old).abs().max()) for old, new in pairs),
        scale=max(float(old.abs().max()) for old, _ in pairs),
        agreeing=sum(int((old.argmax(-1) == new.argmax(-1)).sum()) for old, new in pairs),
        positions=sum(len(old) for old, _ in pairs),
    )


def save(model: Any, tokenizer: Any, target: Path) -> None:
    """Write model and tokenizer; the folder appears when it is whole."""
    draft = target.with_name(f".{target.name}.partial")
    if draft.exists():
        shutil.rmtree(draft)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        model.save_pretrained(str(draft))
        tokenizer.save_pretrained(str(draft))
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise ConfigError(f"{target} cannot be written: {error.strerror or error}", field="--output") from error
    if target.exists():
        target.rmdir()  # it is empty
    draft.rename(target)
