"""What a model's config may decide: sizes, never code.

`config.json` can name Python modules to import (`auto_map`) and attention code to fetch from the Hub
(`attn_implementation` and its private spellings). Modules are imported only where the caller said
`trust_remote_code=True`, and the attention is chosen here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping
from typing import Any

from etude.errors import ModelError

logger = logging.getLogger(__name__)

# Spellings under which transformers has taken the attention or expert code from a file. CVE-2026-4372 was one of them.
CODE_CHOICES = re.compile(r"_?(attn|experts)_implementation(_internal)?")
BUILT_IN_EXPERTS = ("eager", "batched_mm", "grouped_mm")


def require_trusted(settings: Mapping[str, Any], name: str, trust_remote_code: bool) -> None:
    from transformers import CONFIG_MAPPING

    model_type = settings.get("model_type")
    if not model_type:
        raise ModelError(f"{name}: config.json names no model_type, so it is no transformers model")
    if model_type not in CONFIG_MAPPING and not (trust_remote_code and "auto_map" in settings):
        brings_code = "; it brings Python code of its own, which only trust_remote_code=True executes"
        way_out = brings_code if "auto_map" in settings else "; a newer transformers may"
        raise ModelError(f"{name}: this transformers does not know the model type '{model_type}'{way_out}")
    if "auto_map" in settings and not trust_remote_code:
        logger.warning("%s: auto_map is ignored, the model class of transformers is used", name)
    for key, value in _code_choices(settings):
        if "experts" in key and value not in (None, *BUILT_IN_EXPERTS):
            raise ModelError(f"{name}: config.json asks for {key}={value!r}; files do not choose code, remove the line")


def _code_choices(settings: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    for key, value in settings.items():
        if CODE_CHOICES.fullmatch(key):
            yield key, value
        elif isinstance(value, dict):
            yield from _code_choices(value)


def attention_of(config: Any, name: str, trust_remote_code: bool) -> dict[str, Any]:
    """The attention to load with, said explicitly so that nothing in the config decides it.

    Raises:
        ModelError: transformers has no causal language model for this config.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if model_class is None:
        if trust_remote_code and getattr(config, "auto_map", None):
            return {}  # the caller trusts the model's own code, which also knows its attention
        raise ModelError(
            f"{name}: '{config.model_type}' has no causal language model in transformers; "
            "give a decoder model (Llama, Qwen, Gemma, Mistral, ...)"
        )
    if isinstance(model_class, tuple):
        model_class = model_class[0]
    return {"attn_implementation": "sdpa" if getattr(model_class, "_supports_sdpa", False) else "eager"}
