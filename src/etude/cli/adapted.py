"""A finished run, a checkpoint or an adapter folder -> the model that was trained, ready to speak."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from etude.cli import strict_yaml
from etude.cli.recipe import RECIPE_NAME
from etude.errors import CheckpointError, DataError, ModelError

ADAPTER_CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 16 * 2**20


class Adapted(NamedTuple):
    """A base model with its adapter. `settings` is what the recipe of the run says; empty for a bare adapter folder."""

    model: Any
    tokenizer: Any
    folder: Path
    base: str
    settings: dict[str, Any]

    @property
    def format(self) -> str:
        """The format of the rows that were learned; `messages` where nothing says, and the data is gone."""
        from etude.cli.sources import sources_of
        from etude.data.hub import is_hub_name
        from etude.data.rows import format_of

        if self.settings.get("format"):
            return str(self.settings["format"])
        paths = [source.path for source in sources_of("data", self.settings.get("data"))]
        paths = [path for path in paths if not is_hub_name(path)]  # nobody asked to contact the Hub
        try:
            return (format_of(paths) if paths else None) or "messages"
        except DataError:
            return "messages"


def load_adapted(
    path: str,
    *,
    base: str | None = None,
    dtype: Any = None,
    quantization: str | None = None,
    device: Any = None,
    trust_remote_code: bool = False,
) -> Adapted:
    """Load an adapter on the base model that it was trained on.

    Args:
        path: the folder of a run, of one of its checkpoints, or of an adapter written by peft.
        base: folder or name of the base model; without it, what the run or the adapter recorded.
        quantization: "4bit", "8bit" or None, of the base.

    Raises:
        ModelError: no adapter, or no base model.
        CheckpointError: the adapter does not fit the base, or was trained on another one.
    """
    from etude.cli.display import bars_for_people_only
    from etude.model.adapter import load_weights
    from etude.model.load import load_base_model

    bars_for_people_only()

    folder = adapter_folder(path)
    settings = run_settings(folder)
    name = base or base_name(folder)
    model, tokenizer = load_base_model(
        name,
        dtype=dtype,
        device=device,
        gguf_file=settings.get("gguf_file") if base is None else None,
        quantization=quantization,
        trust_remote_code=trust_remote_code,
    )
    if (folder / "tokenizer_config.json").is_file():  # with the chat template of training
        tokenizer = load_tokenizer(str(folder))
    adapted = _with_adapter(model, folder)
    load_weights(adapted, folder)
    require_recorded_base(adapted, folder, name, quantization)
    return Adapted(adapted.eval().requires_grad_(False), tokenizer, folder, name, settings)


def adapter_folder(path: str) -> Path:
    """The folder itself, once it is known to hold an adapter that can be read without unpickling.

    Raises:
        ModelError: with what the folder holds instead.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise ModelError(f"{path}: there is no such folder; give the folder of a run or of an adapter")
    if not (folder / ADAPTER_CONFIG).is_file():
        checkpoints = sorted(folder.glob("checkpoint-*"), key=_step_of)
        way_out = f"; the run has not finished, its newest checkpoint is {checkpoints[-1]}" if checkpoints else ""
        raise ModelError(f"{path}: holds no adapter ({ADAPTER_CONFIG}){way_out}")
    if not (folder / "adapter_model.safetensors").is_file():
        raise ModelError(f"{path}: holds no adapter_model.safetensors; pickled adapters (.bin) are not opened here")
    return folder


def base_name(folder: Path) -> str:
    """The base model of an adapter: as its run recorded it, else as the adapter's own configuration does.

    Raises:
        ModelError: neither says.
    """
    name = run_settings(folder).get("model") or _recorded_name(folder)
    if not name:
        raise ModelError(f"{folder}: does not say which base model it belongs to; give it with --model")
    return str(name)


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder, or of a model in the local cache or on the Hub, with a pad token.

    Raises:
        ModelError: there is none.
    """
    from transformers import AutoTokenizer

    from etude.model.load import ensure_pad_token

    folder = Path(name).expanduser()
    place = str(folder) if folder.is_dir() else name
    for local_files_only in (True,) if folder.is_dir() else (True, False):
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                place, local_files_only=local_files_only, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # tokenizers raises bare Exception for a broken file
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        else:
            ensure_pad_token(tokenizer, name)
            return tokenizer
    raise ModelError(f"{name}: no usable tokenizer: {reason}")


def run_settings(folder: Path) -> dict[str, Any]:
    """What the recipe beside an adapter, or beside its checkpoint, says; empty where there is none.

    Only read: what it says about where to write, or a run that has moved since, is nobody's concern here.
    """
    for place in (folder / RECIPE_NAME, folder.parent / RECIPE_NAME):
        if place.is_file():
            settings: dict[str, Any] = strict_yaml.read_file(place).plain()
            return settings
    return {}


def recorded_base(folder: Path, kind: str = "base") -> str | None:
    """The fingerprint of the base model that an adapter was trained on, where its run recorded one.

    `kind` is "base", or "base_unquantised" for that of the weights which quantisation leaves as they are.
    """
    from etude.checkpoint.reading import read_json_strict
    from etude.checkpoint.resume import PROGRESS

    for place in (folder, *sorted(folder.glob("checkpoint-*"), key=_step_of, reverse=True)):
        file = place / f"{PROGRESS}.json"
        if file.is_file():
            record = read_json_strict(file)
            run = record.get("run") if isinstance(record, dict) else None
            return str(run[kind]) if isinstance(run, dict) and run.get(kind) else None
    return None


def require_recorded_base(model: Any, folder: Path, name: str, quantization: str | None) -> None:
    """Raise CheckpointError where the base under the adapter is not the one that it was trained on."""
    from etude.model.adapter import base_fingerprint, unquantised_fingerprint

    if run_settings(folder).get("quantization") == quantization:
        recorded, found = recorded_base(folder), base_fingerprint(model)
    else:  # quantised weights are other numbers; what is not quantised must still be the same
        recorded, found = recorded_base(folder, "base_unquantised"), unquantised_fingerprint(model)
    if recorded is not None and found != recorded:
        raise CheckpointError(
            f"was trained on another base model than {name}: the weights differ; give the right one with --model",
            path=folder,
        )


def _with_adapter(model: Any, folder: Path) -> Any:
    """The adapter's layers on the base, in the state they are trained in: the base frozen, the adapter not."""
    from peft import PeftConfig, get_peft_model

    try:
        config = PeftConfig.from_pretrained(str(folder))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".is_gradient_checkpointing.", category=FutureWarning)
            # Where the base model has moved is known, and `require_recorded_base` says whether it is the same.
            warnings.filterwarnings("ignore", message="The PEFT config's .base_model_name", category=UserWarning)
            config.inference_mode = False
            return get_peft_model(model, config)
    except (ValueError, TypeError, KeyError) as error:
        raise ModelError(f"{folder}: the adapter does not fit this base model: {error}") from error


def _recorded_name(folder: Path) -> str | None:
    file = folder / ADAPTER_CONFIG
    try:
        with file.open("rb") as stream:
            config = json.loads(stream.read(MAX_CONFIG_BYTES))
    except ValueError as error:
        raise CheckpointError(f"cannot be read as JSON: {error}", path=file) from error
    name = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    return str(name) if name else None


def _step_of(folder: Path) -> int:
    step = folder.name.rpartition("-")[2]
    return int(step) if step.isdigit() else -1
