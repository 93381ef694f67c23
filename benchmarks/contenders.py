"""Who is measured, and how each of them is built: the same base weights, the same adapters, the settings of its kind."""

from __future__ import annotations

import hashlib
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.shapes import Work, collate


@dataclass(frozen=True)
class Contender:
    """A trainer and its settings."""

    trainer: str
    """"etude", "transformers", "trl" or "unsloth"."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Training arguments beside the common ones."""
    needs: tuple[str, ...] = ()
    """Modules that have to be installed."""
    liger: bool = False
    nf4: bool = False
    packs: bool = False
    """Whether it puts other rows into a step than the rest, so that its loss is not that of the others."""
    sft: bool = False
    """Whether rows go through an SFTTrainer of trl, which collates them itself."""


GC = {"gradient_checkpointing": True}
PACKING, PADDING_FREE = {"packing": True}, {"padding_free": True, "max_length": None}
TRL, UNSLOTH = ("trl", "datasets"), ("unsloth",)
NO_GRAPHS = {"cuda_graphs": False}
OFFLOAD = {"activation_offloading": True}

CONTENDERS = {
    "etude": Contender("etude"),
    "etude-deterministic": Contender("etude", {"deterministic": True}),
    "etude-nographs": Contender("etude", NO_GRAPHS),
    "etude-general": Contender("etude", {"fast_path": False}),
    "etude-fp8": Contender("etude", {"base_precision": "fp8"}),
    "etude-nf4": Contender("etude", nf4=True, needs=("bitsandbytes",)),
    "etude-offload": Contender("etude", OFFLOAD),
    "etude-nf4-offload": Contender("etude", OFFLOAD, nf4=True, needs=("bitsandbytes",)),
    "transformers": Contender("transformers"),
    "transformers-gc": Contender("transformers", GC),
    "transformers-nf4": Contender("transformers", nf4=True, needs=("bitsandbytes",)),
    "transformers-nf4-gc": Contender("transformers", GC, nf4=True, needs=("bitsandbytes",)),
    "liger": Contender("transformers", liger=True, needs=("liger_kernel",)),
    "liger-gc": Contender("transformers", GC, liger=True, needs=("liger_kernel",)),
    "trl": Contender("trl", sft=True, needs=TRL),
    "trl-gc": Contender("trl", GC, sft=True, needs=TRL),
    "trl-packing": Contender("trl", PACKING, sft=True, packs=True, needs=TRL),
    "trl-padding-free": Contender("trl", PADDING_FREE, sft=True, needs=TRL),
    "unsloth": Contender("unsloth", needs=UNSLOTH),
    "unsloth-gc": Contender("unsloth", GC, needs=UNSLOTH),
    "unsloth-nf4": Contender("unsloth", nf4=True, needs=(*UNSLOTH, "bitsandbytes")),
    "unsloth-nf4-gc": Contender("unsloth", GC, nf4=True, needs=(*UNSLOTH, "bitsandbytes")),
    "unsloth-packing": Contender("unsloth", PACKING, sft=True, packs=True, needs=(*UNSLOTH, *TRL)),
    "unsloth-padding-free": Contender("unsloth", PADDING_FREE, sft=True, needs=(*UNSLOTH, *TRL)),
}

PEER_ENVIRONMENT = {"UNSLOTH_DISABLE_STATISTICS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def contender_of(spelling: str) -> tuple[Contender, float | None]:
    """The contender that `name` or `name@GIB` means, and the memory it is told to stay within."""
    name, _, limit = spelling.partition("@")
    if name not in CONTENDERS:
        raise ValueError(f"no contender '{name}'; there are {', '.join(CONTENDERS)}")
    if limit and CONTENDERS[name].trainer != "etude":
        raise ValueError(f"'{spelling}': only etude can be told how much memory to use")
    return CONTENDERS[name], float(limit) if limit else None


# -- models -----------------------------------------------------------------------------------------------------------


def build_model(contender: Contender, work: Work, r: int, device: str) -> Any:
    """A model with random weights and untrained adapters: the same numbers for every contender."""
    if contender.trainer == "unsloth":
        model = build_with_unsloth(contender, work, r, device)
    else:
        from peft import LoraConfig, get_peft_model

        model = base_model(work, device)
        if contender.liger:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            _apply_liger_kernel_to_instance(model=model)
        if contender.nf4:
            quantise(model)
        common = {"r": r, "lora_alpha": r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        model = get_peft_model(model, LoraConfig(**(common | work.adapter)))
    seed_adapters(model)
    return model


def base_model(work: Work, device: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        config = work.config()
        # Said, not left to a default: the fastest way that transformers has, or an error where it cannot be taken.
        options = {"experts_implementation": "grouped_mm"} if hasattr(config, "num_experts") else {}
        return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def seed_adapters(model: Any) -> None:
    """Draw every A anew, by its place in the model: not every contender draws them in the same order."""
    import torch

    for name, parameter in sorted(model.named_parameters()):
        if "lora_A" in name:
            generator = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
            bound = parameter.shape[-1] ** -0.5
            values = (torch.rand(parameter.shape, generator=generator) * 2 - 1) * bound
            with torch.no_grad():
                parameter.copy_(values)


def quantise(model: Any) -> None:
    """Replace the linear layers, but the head, by NF4 ones with nested scales, one after the other."""
    import bitsandbytes
    import torch

    options = {"quant_type": "nf4", "compress_statistics": True}
    for path, module in list(model.named_modules()):
        if type(module) is torch.nn.Linear and module is not model.get_output_embeddings():
            sizes = (module.in_features, module.out_features, module.bias is not None)
            made = bitsandbytes.nn.Linear4bit(*sizes, compute_dtype=torch.bfloat16, device="meta", **options)
            weight = module.weight.data.cpu()  # it is quantised on its way to the GPU
            made.weight = bitsandbytes.nn.Params4bit(weight, requires_grad=False, **options).to("cuda")
            made.bias = module.bias
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, made)
            module.weight = None
    model.is_loaded_in_4bit = True


def build_with_unsloth(contender: Contender, work: Work, r: int, device: str) -> Any:
    """It loads from a folder only, so the same random weights are saved once and kept for the next process."""
    import torch
    from unsloth import FastLanguageModel

    gc = bool(contender.settings.get("gradient_checkpointing"))
    checkpointing = "unsloth" if gc else False
    model, _ = FastLanguageModel.from_pretrained(
        str(saved_model(work, device)),
        max_seq_length=work.length,
        dtype=torch.bfloat16,
        load_in_4bit=contender.nf4,
        local_files_only=True,
        use_gradient_checkpointing=checkpointing,
    )
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options = {"target_modules": targets, "use_gradient_checkpointing": checkpointing} | work.adapter
    return FastLanguageModel.get_peft_model(model, r=r, lora_alpha=r, lora_dropout=0.0, bias="none", **options)


def saved_model(work: Work, device: str) -> Path:
    """The folder with the base weights and a tokenizer, made where it is missing."""
    import torch

    digest = hashlib.sha256(work.config().to_json_string().encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"etude-benchmark-{os.getuid()}-{digest}"
    if not folder.exists():
        made = Path(tempfile.mkdtemp(dir=folder.parent))
        model = base_model(work, device)
        model.save_pretrained(made)
        tokenizer().save_pretrained(made)
        made.rename(folder)
        del model
        torch.cuda.empty_cache()
    return folder


def tokenizer() -> Any:
    """Rows are tokens already; some trainers want to know a padding token all the same."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {"<unk>": 0, "<pad>": 1, "<s>": 2, "</s>": 3}
    words |= {f"w{i}": i for i in range(len(words), 100)}
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="<unk>")), **special)


# -- trainers ---------------------------------------------------------------------------------------------------------


class CountingCollator:
    """Calls another one and keeps the number of tokens of every batch."""

    def __init__(self, collator: Any) -> None:
        self.collator, self.tokens = collator, list[int]()

    def __call__(self, rows: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Any:
        self.tokens.append(sum(len(row["input_ids"]) for row in rows))
        return self.collator(rows, *args, **kwargs)


def build_trainer(
    contender: Contender, work: Work, model: Any, rows: list[Any], settings: dict[str, Any], callbacks: list[Any]
) -> Any:
    settings = settings | contender.settings
    if contender.sft:
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        settings = {"gradient_checkpointing": False, "max_length": work.length} | settings
        # Packing takes what it needs from all rows, and joins them itself.
        kept = ("input_ids",) if contender.packs else ("input_ids", "labels")
        dataset = Dataset.from_list([{name: row[name] for name in kept} for row in rows])
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(**settings),
            train_dataset=dataset,
            processing_class=tokenizer(),
            callbacks=callbacks,
        )
        trainer.data_collator = CountingCollator(trainer.data_collator)
        return trainer
    if contender.trainer == "etude":
        from etude import Trainer, TrainingArguments
    else:
        from transformers import Trainer, TrainingArguments
    arguments = TrainingArguments(**settings)
    return Trainer(model=model, args=arguments, train_dataset=rows, data_collator=collate, callbacks=callbacks)
