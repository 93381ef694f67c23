"""What other tools call the settings of a run, so that a wrong name is answered with ours."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from etude.errors import nearest

# Keys of transformers/TRL, axolotl, LLaMA-Factory, torchtune, litgpt and unsloth; the last part of a dotted key counts.
OURS: dict[str, str] = {
    "base_model": "model",
    "model_name": "model",
    "model_name_or_path": "model",
    "pretrained_model_name_or_path": "model",
    "checkpoint_dir": "model",
    "dataset": "data",
    "datasets": "data",
    "dataset_name": "data",
    "dataset_path": "data",
    "data_path": "data",
    "local_dataset": "data",
    "train_data": "data",
    "train_file": "data",
    "eval_dataset": "eval_data",
    "validation_file": "eval_data",
    "test_datasets": "eval_data",
    "val_set_size": "eval_fraction",
    "val_size": "eval_fraction",
    "val_split_fraction": "eval_fraction",
    "out_dir": "output",
    "lora_r": "lora.r",
    "lora_rank": "lora.r",
    "rank": "lora.r",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "lora_targets": "lora.targets",
    "lora_target": "lora.targets",
    "lora_target_modules": "lora.targets",
    "lora_target_linear": "lora.targets",
    "lora_attn_modules": "lora.targets",
    "target_modules": "lora.targets",
    "chat_template": "template",
    "chat_template_path": "template",
    "use_dora": "lora.dora",
    "peft_use_dora": "lora.dora",
    "load_in_4bit": "quantization",
    "load_in_8bit": "quantization",
    "quantization_bit": "quantization",
    "quantize": "quantization",
    "batch_size": "global_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "max_steps_per_epoch": "max_steps",
    "lr": "learning_rate",
    "lr_scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "sequence_len": "max_length",
    "cutoff_len": "max_length",
    "seq_length": "max_length",
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "saves_per_epoch": "save_steps",
    "save_interval": "save_steps",
    "save_every_n_steps": "save_steps",
    "evals_per_epoch": "eval_steps",
    "wandb_project": "project",
    "precision": "bf16",
    "dtype": "bf16",
    "patience": "early_stopping_patience",
}

NOT_NEEDED: dict[str, str] = {
    "use_peft": "every run trains a LoRA adapter",
    "adapter": "every run trains a LoRA adapter",
    "finetuning_type": "every run trains a LoRA adapter",
    "training_type": "every run trains a LoRA adapter",
    "packing": "samples are packed wherever that leaves the result the same",
    "sample_packing": "samples are packed wherever that leaves the result the same",
    "neat_packing": "samples are packed wherever that leaves the result the same",
    "auto_resume_from_checkpoints": "a run resumes by itself; `--resume PATH` chooses a checkpoint",
    "resume_from_checkpoint": "a run resumes by itself; `--resume PATH` chooses a checkpoint",
    "resume": "a run resumes by itself; `--resume PATH` chooses a checkpoint",
    "flash_attention": "the fastest attention that gives the same result is chosen for you",
    "dataset_text_field": "the format of the rows is recognised",
    "format_type": "the format of the rows is recognised",
}


def quoted(name: str) -> str:
    return f"'{name}'"


def answer(name: str, known: Iterable[str], spell: Callable[[str], str] = quoted) -> str:
    """One sentence about a name that is not a setting: ours for it, the nearest one, or that there is none.

    `spell` writes a name as the user meets it: `'lora.r'` in a recipe, `--lora-r` on the command line.
    """
    last = name.rsplit(".", 1)[-1]
    if ours := OURS.get(name) or OURS.get(last):
        return f"{spell(name)} is {spell(ours)} here"
    if reason := NOT_NEEDED.get(last):
        return f"{spell(name)} is not needed: {reason}"
    if guess := nearest(name, sorted(known)):
        return f"{spell(name)} is not a setting; did you mean {spell(guess)}?"
    return f"{spell(name)} is not a setting; `etude train --help-arguments` lists them all"
