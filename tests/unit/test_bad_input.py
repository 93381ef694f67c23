"""What cannot work is said before the first step, by name and with the way out, and nothing is overwritten."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from etude import TrainerCallback, TrainingArguments
from etude.errors import EtudeError
from short_run import short_trainer
from tiny import IGNORED, StreamDataset, causal_lora, language_rows, tiny_llama, with_lora


class NoStep(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        pytest.fail("a step was begun")


def assert_refused(make: Callable[[], Any], match: str, kind: type[Exception] = ValueError, **train: Any) -> None:
    """Constructing or training fails with an error of ours that is also a `kind`; the files stay as they were."""
    before = {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()}
    with pytest.raises(EtudeError, match=match) as caught:
        make().train(**train)
    assert isinstance(caught.value, kind)
    after = {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()}
    assert {path: after.get(path) for path in before} == before
    assert not [path for path in after.keys() - before.keys() if "checkpoint" in str(path)]


def bad(**settings: Any) -> Callable[[], Any]:
    return lambda: short_trainer(callbacks=[NoStep()], save_strategy="epoch", **settings)


def test_nothing_to_train() -> None:
    frozen = causal_lora()
    frozen.requires_grad_(False)
    assert_refused(bad(model=frozen), r"(?i)trainable")


def test_an_adapter_loaded_for_inference() -> None:
    from peft import PeftModel

    causal_lora().save_pretrained("adapter")
    model = PeftModel.from_pretrained(tiny_llama(), "adapter")
    assert_refused(bad(model=model), r"is_trainable=True")


def test_every_label_masked() -> None:
    rows = [row | {"labels": [IGNORED] * len(row["labels"])} for row in language_rows(10)]
    assert_refused(bad(rows=rows), r"(?i)label")


def test_every_label_masked_in_a_stream() -> None:
    rows = [row | {"labels": [IGNORED] * len(row["labels"])} for row in language_rows(10)]
    assert_refused(bad(rows=StreamDataset(rows), max_steps=2), r"(?i)label")


def test_an_empty_dataset() -> None:
    assert_refused(bad(rows=[]), r"(?i)empty|no rows|0 rows")


def test_no_dataset() -> None:
    from etude import Trainer

    arguments = TrainingArguments(output_dir="out", use_cpu=True)
    assert_refused(lambda: Trainer(model=causal_lora(), args=arguments), r"train_dataset")


def test_fewer_rows_than_a_batch_that_must_be_full() -> None:
    assert_refused(
        bad(rows=language_rows(3), per_device_train_batch_size=8, dataloader_drop_last=True),
        r"(?s)3.*8|8.*3",
    )


def test_a_stream_without_a_number_of_steps() -> None:
    assert_refused(bad(rows=StreamDataset(language_rows(4))), r"max_steps")


@pytest.mark.parametrize("strategy", ["epoch", "steps"])
def test_evaluation_without_rows(strategy: str) -> None:
    assert_refused(bad(eval_strategy=strategy), r"eval_dataset")


def test_an_empty_evaluation_set() -> None:
    assert_refused(bad(eval_strategy="epoch", eval_rows=[]), r"(?i)eval")


def test_saving_the_best_without_evaluating() -> None:
    assert_refused(lambda: short_trainer(save_strategy="best", metric_for_best_model="loss"), r"eval_strategy")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("learning_rat", "learning_rate"),
        ("gradient_acumulation_steps", "gradient_accumulation_steps"),
        ("evaluation_strategi", "evaluation_strategy"),
        ("per_device_batch_size", "per_device_"),
    ],
)
def test_an_unknown_argument_suggests_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(TypeError, match=rf"{wrong}.*{right}"):
        TrainingArguments(output_dir="out", **{wrong: 1})


def test_both_half_precisions() -> None:
    with pytest.raises(ValueError, match=r"fp16.*bf16|bf16.*fp16"):
        TrainingArguments(output_dir="out", fp16=True, bf16=True)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("learning_rate", float("nan")),
        ("learning_rate", -1e-4),
        ("per_device_train_batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("num_train_epochs", -1),
        ("warmup_ratio", 1.5),
        ("logging_steps", 0),
        ("save_strategy", "sometimes"),
    ],
)
def test_values_that_make_no_sense_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=field):
        TrainingArguments(output_dir="out", **{field: value})


@pytest.mark.parametrize(("field", "value"), [("lr_scheduler_type", "zigzag"), ("optim", "adamw_torhc")])
def test_names_that_are_none_name_the_field(field: str, value: str) -> None:
    assert_refused(bad(**{field: value}), rf"(?s){field}.*{value}|{value}.*{field}")


def test_a_run_that_cannot_begin_leaves_the_checkpoints_of_another_where_they_are() -> None:
    short_trainer(save_strategy="epoch").train()
    rows = [row | {"labels": [IGNORED] * len(row["labels"])} for row in language_rows(10)]
    assert_refused(bad(rows=rows), r"(?i)label")


def test_neither_a_model_nor_a_way_to_make_one() -> None:
    from etude import Trainer

    with pytest.raises(ValueError, match=r"model_init"):
        Trainer(args=TrainingArguments(output_dir="out", use_cpu=True), train_dataset=language_rows(4))


def test_a_model_without_an_adapter_trains_or_says_why() -> None:
    """A whole small model has trainable weights; it is not refused for want of an adapter alone."""
    trainer = short_trainer(tiny_llama(), max_steps=1)
    try:
        assert trainer.train().global_step == 1
    except EtudeError as error:
        assert "get_peft_model" in str(error)


# Resuming from what does not fit


def test_resume_true_in_an_empty_folder() -> None:
    assert_refused(bad(), r"No valid checkpoint found in output directory", resume_from_checkpoint=True)


def test_a_folder_that_is_no_checkpoint() -> None:
    Path("other").mkdir()
    Path("other/notes.txt").write_text("nothing here")
    assert_refused(bad(), r"other.*checkpoint", resume_from_checkpoint="other")


def test_a_folder_that_does_not_exist() -> None:
    assert_refused(bad(), r"missing-folder", resume_from_checkpoint="missing-folder")


@pytest.fixture
def checkpoint() -> str:
    """A run of rank 8 on the query and value projections, saved after its fifth step of ten."""
    short_trainer(save_strategy="steps", save_steps=5).train()
    shutil.rmtree("out/checkpoint-10")
    return "out/checkpoint-5"


OTHER_MODELS: dict[str, tuple[Callable[[], Any], str]] = {
    "rank": (lambda: causal_lora(r=4), r"\br\b.*8.*4"),
    "alpha": (lambda: causal_lora(lora_alpha=64), r"lora_alpha.*16.*64"),
    "targets": (lambda: causal_lora(target_modules=["q_proj", "k_proj", "v_proj"]), r"target_modules"),
    "base": (lambda: causal_lora(seed=3), r"base model"),
    "base-size": (
        lambda: with_lora(
            tiny_llama(hidden_size=48, intermediate_size=64),
            task_type="CAUSAL_LM",
            target_modules=["q_proj", "v_proj"],
        ),
        r"base model|shape",
    ),
    "adapter-name": (
        lambda: get_peft_model(
            tiny_llama(), LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"]), adapter_name="poet"
        ),
        r"poet",
    ),
}


@pytest.mark.parametrize("other", OTHER_MODELS)
def test_a_checkpoint_of_another_model(other: str, checkpoint: str) -> None:
    build, match = OTHER_MODELS[other]
    assert_refused(bad(model=build()), rf"(?s)checkpoint-5.*({match})", resume_from_checkpoint=checkpoint)


def test_a_checkpoint_of_other_data(checkpoint: str) -> None:
    assert_refused(bad(rows=language_rows(8)), r"(?s)checkpoint-5.*data", resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_checkpoint_names_the_file(damage: str, checkpoint: str) -> None:
    file = Path(checkpoint, "adapter_model.safetensors")
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    else:
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert_refused(bad(), r"adapter_model\.safetensors", resume_from_checkpoint=checkpoint)
    assert_refused(bad(), r"none of the checkpoints|No valid checkpoint", resume_from_checkpoint=True)
    assert_refused(bad(), r"none of the checkpoints|No valid checkpoint", resume_from_checkpoint="auto")


def test_a_non_finite_loss_stops_before_the_update() -> None:
    """Not before the first step, but before anything is written: the adapter is as it was."""
    model = causal_lora()
    with torch.no_grad():
        next(parameter for parameter in model.parameters() if parameter.requires_grad).fill_(float("nan"))
    trainer = short_trainer(model, save_strategy="steps", save_steps=1)
    with pytest.raises(FloatingPointError, match=r"step 1"):
        trainer.train()
    assert not list(Path.cwd().rglob("adapter_model.safetensors"))
