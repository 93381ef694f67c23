"""Base weights and tokenizer, from a folder or the Hub.

Files never vote on trust (`etude.model.trust`). Weights are read from safetensors or GGUF, never unpickled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from etude.collection import paused
from etude.errors import ConfigError, ModelError, require
from etude.model.lora import attach_lora
from etude.model.trust import attention_of, require_trusted

__all__ = ["attach_lora", "ensure_pad_token", "load_base_model"]

# Entries that vocabularies reserve for padding, in order of preference.
_PAD_TOKENS = ("<|finetune_right_pad_id|>", "<|pad|>", "<pad>", "[PAD]", "<|vision_pad|>", "<|endoftext|>")


@paused()  # a large vocabulary is a million objects
def load_base_model(
    name_or_path: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    gguf_file: str | None = None,
    quantization: str | Any | None = None,
) -> tuple[Any, Any]:
    """Load a decoder language model and its tokenizer.

    Args:
        name_or_path: a folder, or the name of a repository on the Hub; the latter is taken from the local cache where
            it is complete there, so a second run contacts nobody.
        dtype: of the weights; None is bfloat16 on a GPU that has it, else float32.
        device: where the weights go; None is the current CUDA device, else the CPU.
        trust_remote_code: execute Python files that come with the model. Only a caller can say so.
        gguf_file: name of a GGUF file in the folder or repository; it is dequantised to `dtype`.
        quantization: "4bit", "8bit" (bitsandbytes) or a quantization config of transformers; the base stays frozen.

    Returns:
        The model in evaluation mode and its tokenizer, which has a pad token.

    Raises:
        ModelError: naming what is missing (folder, config, weights, tokenizer, causal language model class).
        ConfigError: `quantization` or `dtype` has no such value.
        MissingDependencyError: bitsandbytes or gguf is needed and not installed.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    name = str(Path(name_or_path).expanduser()) if Path(name_or_path).expanduser().is_dir() else str(name_or_path)
    _require_base_model_folder(name, gguf_file)
    if gguf_file is not None:
        require("gguf", purpose="reading a GGUF file")
    place = _default_device() if device is None else torch.device(device)
    weight_dtype = _resolved_dtype(dtype, place)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if gguf_file is not None:
        options["gguf_file"] = gguf_file

    if gguf_file is None:
        settings, options["local_files_only"] = _config_dict(name)
        require_trusted(settings, name, trust_remote_code)
    else:
        # A GGUF file names no code. Its header holds the whole vocabulary and takes seconds to parse, once less here.
        options["local_files_only"] = _is_here(name, gguf_file)
    config = _config(name, options)
    model_options = attention_of(config, name, trust_remote_code) | options
    if gguf_file is None:
        model_options["use_safetensors"] = True
    if quantization is not None:
        model_options["quantization_config"] = _quantization_config(quantization, weight_dtype)
        model_options["device_map"] = {"": place}
    tokenizer = _tokenizer(name, options)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, config=config, dtype=weight_dtype, **model_options)
    except (OSError, ValueError, ImportError, RuntimeError, KeyError, SafetensorError) as error:
        raise ModelError(f"{name}: the weights cannot be loaded: {_first_line(error)}{_weights_hint(name)}") from error
    if getattr(model, "peft_config", None):
        raise ModelError(f"{name}: an adapter lies beside the base weights; give the folder of the bare base model")
    if quantization is None:
        model = model.to(place)
    _require_fitting_vocabulary(model, tokenizer, name)
    ensure_pad_token(tokenizer, name)
    return model.eval(), tokenizer


def ensure_pad_token(tokenizer: Any, name: str = "tokenizer") -> None:
    """Give a tokenizer without a pad token one that is already in its vocabulary.

    Which one does not matter to training: padding is masked by the length of a row, never by the id, so the real end
    of a row is learned even where pad and end-of-sequence are the same token. A new token would need a new row of the
    embedding, which an adapter does not carry.

    Raises:
        ModelError: the vocabulary has neither a reserved entry nor an end-of-sequence or unknown token.
    """
    if tokenizer.pad_token is not None:
        return
    vocabulary = tokenizer.get_vocab()
    reserved = next((token for token in _PAD_TOKENS if token in vocabulary), None)
    token = reserved or tokenizer.eos_token or tokenizer.unk_token
    if token is None:
        raise ModelError(f"{name}: the tokenizer has no pad, end-of-sequence or unknown token; set tokenizer.pad_token")
    tokenizer.pad_token = token


def _require_base_model_folder(name: str, gguf_file: str | None) -> None:
    folder = Path(name)
    if folder.is_file():
        way_out = f"; give its folder and gguf_file={folder.name!r}" if folder.suffix == ".gguf" else ""
        raise ModelError(f"{name}: is a file, a model is a folder{way_out}")
    if not folder.is_dir():
        # Repository names have at most one slash; anything else was meant as a folder.
        if name.count("/") > 1 or name.startswith((".", "/", "~", "\\")) or name.endswith("/"):
            raise ModelError(f"{name}: there is no such folder")
        return
    if (folder / "adapter_config.json").is_file():
        raise ModelError(f"{name}: holds an adapter (adapter_config.json); give the folder or name of its base model")
    wanted = gguf_file or "config.json"
    if not (folder / wanted).is_file():
        found = sorted(entry.name for entry in folder.iterdir())[:8]
        way_out = ""
        if any(entry.endswith(".gguf") for entry in found) and gguf_file is None:
            way_out = (
                f"; for GGUF weights also name the file: gguf_file={next(e for e in found if e.endswith('.gguf'))!r}"
            )
        raise ModelError(f"{name}: no {wanted} in this folder (it has {', '.join(found) or 'nothing'}){way_out}")


def _is_here(name: str, file: str) -> bool:
    """Whether a file of a model is in its folder or in the local cache."""
    from huggingface_hub import try_to_load_from_cache

    return Path(name).is_dir() or isinstance(try_to_load_from_cache(name, file), str)


def _config_dict(name: str) -> tuple[dict[str, Any], bool]:
    """The raw config, and whether it came from this machine alone (a folder or the cache)."""
    from transformers import PreTrainedConfig

    is_folder = Path(name).is_dir()
    for local_files_only in (True,) if is_folder else (True, False):
        try:
            settings, _ = PreTrainedConfig.get_config_dict(name, local_files_only=local_files_only)
        except (OSError, ValueError, KeyError) as error:
            reason = _first_line(error)
        else:
            if settings:
                return settings, local_files_only
            reason = "it has no config.json"
    if is_folder:
        raise ModelError(f"{name}: config.json cannot be read: {reason}")
    raise ModelError(
        f"{name}: not a folder here, not in the local cache, and the Hub did not give it ({reason}); "
        "check the name, or download it where there is a network"
    )


def _config(name: str, options: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{name}: config.json is not valid: {_first_line(error)}") from error


def _tokenizer(name: str, options: dict[str, Any]) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except Exception as error:  # tokenizers raises bare Exception for a broken file
        raise ModelError(
            f"{name}: no usable tokenizer beside the model: {_first_line(error)}; a model needs tokenizer.json (or "
            "tokenizer.model) and tokenizer_config.json"
        ) from error


def _require_fitting_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise ModelError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens, the model's embedding {rows} rows; "
            "one of them belongs to another model"
        )


def _quantization_config(quantization: str | Any, compute_dtype: torch.dtype) -> Any:
    if not isinstance(quantization, str):
        return quantization
    if quantization not in ("4bit", "8bit"):
        raise ConfigError(f"must be 4bit or 8bit, got {quantization!r}", field="quantization")
    require("bitsandbytes", purpose=f"a {quantization} base model", install="pip install 'etude[bitsandbytes]'")
    from transformers import BitsAndBytesConfig

    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    # NF4 with double quantization: Dettmers et al., QLoRA, arXiv 2305.14314, section 3.
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def _default_device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def _resolved_dtype(dtype: torch.dtype | str | None, device: torch.device) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype is None:
        has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        return torch.bfloat16 if has_bfloat16 else torch.float32
    found = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}.get(dtype)
    if found is None:
        raise ConfigError(f"must be float32, float16 or bfloat16, got {dtype!r}", field="dtype")
    return found


def _weights_hint(name: str) -> str:
    folder = Path(name)
    if folder.is_dir() and not any(folder.glob("*.safetensors")) and any(folder.glob("*.bin")):
        return "; pickled weights (.bin) are not opened here, convert them to safetensors first"
    return ""


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0].rstrip(".") if text else type(error).__name__
