"""The script that most people have: it runs unchanged but for one import, and its resumes work."""

from __future__ import annotations

import json
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from etude import Trainer, TrainerCallback, TrainingArguments
from short_run import checkpoints
from tiny import Padded, adapter_of, assert_same_bits, causal_lora, language_rows, tiny_llama

EXAMPLE = Path(__file__).parents[2] / "examples" / "classic_lora.py"

train_dataset = language_rows(48)
eval_dataset = language_rows(8, 50)
data_collator = Padded()


class SaveBestCallback(TrainerCallback):
    def on_evaluate(self, args, state, control, metrics, **kwargs):  # type: ignore[no-untyped-def]
        if metrics.get("eval_loss", float("inf")) < state.best_metric:
            control.should_save = True
        return control


def classic_trainer(model: Any) -> Trainer:
    training_args = TrainingArguments(
        output_dir="./lora-output",
        num_train_epochs=3,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,
        learning_rate=2e-4,
        warmup_ratio=0.03,
        logging_steps=10,
        evaluation_strategy="epoch",
        save_strategy="epoch",
        fp16=True,
    )
    return Trainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        data_collator=data_collator,
        callbacks=[SaveBestCallback()],
    )


@pytest.fixture
def finished() -> Trainer:
    model = causal_lora(lora_dropout=0.1)
    trainer = classic_trainer(model)
    trainer.train()
    model.save_pretrained("./final-adapter")
    return trainer


def test_it_runs_and_leaves_what_it_should(finished: Trainer) -> None:
    assert finished.state.global_step == 9
    assert checkpoints("lora-output") == [3, 6, 9]
    losses = [entry["eval_loss"] for entry in finished.state.log_history if "eval_loss" in entry]
    assert len(losses) == 3
    assert finished.state.best_metric == min(losses)
    state = json.loads(Path("lora-output/checkpoint-9/trainer_state.json").read_text())
    assert state["best_metric"] == min(losses)
    assert_same_bits(load_file("final-adapter/adapter_model.safetensors"), adapter_of(finished.model))
    tokens = torch.tensor([train_dataset[0]["input_ids"]])
    loaded = PeftModel.from_pretrained(tiny_llama(), "./final-adapter").eval()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, finished.model.eval()(input_ids=tokens).logits)


@pytest.mark.parametrize("step", [3, 6])
def test_resuming_from_a_named_checkpoint(step: int, finished: Trainer) -> None:
    trainer = classic_trainer(causal_lora(seed=0, lora_dropout=0.1))
    trainer.train(resume_from_checkpoint=f"./lora-output/checkpoint-{step}")
    assert trainer.state.global_step == 9
    assert_same_bits(adapter_of(trainer.model), adapter_of(finished.model))


def test_resuming_from_the_newest(finished: Trainer) -> None:
    shutil.rmtree("lora-output/checkpoint-9")
    trainer = classic_trainer(causal_lora(lora_dropout=0.1))
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 9
    assert_same_bits(adapter_of(trainer.model), adapter_of(finished.model))


def test_a_callback_alone_makes_checkpoints_of_the_best() -> None:
    """Without a save strategy, every new best is saved because the callback asks for it."""
    trainer = classic_trainer(causal_lora())
    trainer.args.save_strategy = "no"
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    new_bests = [step for step, loss in zip((3, 6, 9), losses, strict=True) if loss == min(losses[: step // 3])]
    assert checkpoints("lora-output") == new_bests


def test_the_example_runs_offline_and_resumes(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *arguments])
        runpy.run_path(str(EXAMPLE), run_name="__main__")

    run()
    first = load_file("final-adapter/adapter_model.safetensors")
    shutil.rmtree("lora-output/checkpoint-9")
    run("--resume")
    assert_same_bits(load_file("final-adapter/adapter_model.safetensors"), first)
