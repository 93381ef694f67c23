"""`Seq2SeqTrainer`: predictions that are generated, beside transformers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

import etude
from etude import Seq2SeqTrainer, Seq2SeqTrainingArguments
from etude.errors import ConfigError, UnknownArgumentError
from tiny import PAD, tiny_t5, tiny_tokenizer, translation_rows, with_lora

pytestmark = pytest.mark.filterwarnings("ignore")  # the peer's own

SETTINGS: dict[str, Any] = {
    "output_dir": "out",
    "use_cpu": True,
    "seed": 7,
    "learning_rate": 1e-3,
    "max_steps": 3,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 2,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "predict_with_generate": True,
}


def trainer_of(world: Any, *, args: Any = None, **settings: Any) -> Any:
    model = with_lora(tiny_t5(), task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])
    tokenizer = tiny_tokenizer()
    return world.Seq2SeqTrainer(
        model=model,
        args=args or world.Seq2SeqTrainingArguments(**(SETTINGS | settings)),
        train_dataset=translation_rows(12),
        eval_dataset=translation_rows(5, 4),
        data_collator=transformers.DataCollatorForSeq2Seq(tokenizer, model=model),
        processing_class=tokenizer,
        compute_metrics=lambda prediction: {"length": float((_tokens(prediction) != PAD).sum())},
    )


def _tokens(prediction: Any) -> Any:
    """Generated tokens, or the likeliest ones where logits are predicted."""
    predictions = prediction.predictions
    return predictions[0].argmax(-1) if isinstance(predictions, tuple) else predictions


@pytest.mark.parametrize(
    ("settings", "given"),
    [
        ({}, {"max_new_tokens": 6}),
        ({"generation_max_length": 7, "generation_num_beams": 2}, {}),
        ({"generation_max_length": 7}, {"max_new_tokens": 4, "num_beams": 2}),
        ({"predict_with_generate": False}, {}),
        ({"prediction_loss_only": True}, {}),
        ({"label_smoothing_factor": 0.1}, {"max_length": 6}),
    ],
    ids=["plain", "arguments", "keywords", "logits", "loss-only", "smoothed"],
)
def test_predictions_are_those_of_transformers(settings: dict[str, Any], given: dict[str, Any]) -> None:
    """A limit is given: without one transformers generates 20 new tokens in the first batch and 19 in the others."""
    trainers = []
    for world in (transformers, etude):  # the data order of transformers depends on what was seeded last
        trainers.insert(0, trainer_of(world, **settings))
        trainers[0].train()
    mine, peer = (trainer.predict(translation_rows(5, 4), **given) for trainer in trainers)
    if settings.get("prediction_loss_only"):
        assert mine.predictions is peer.predictions is None
    elif settings.get("predict_with_generate", True):
        np.testing.assert_array_equal(mine.predictions, peer.predictions)
        np.testing.assert_array_equal(mine.label_ids, peer.label_ids)
    else:
        np.testing.assert_allclose(mine.predictions[0], peer.predictions[0], rtol=1e-3, atol=1e-5)
    assert mine.metrics.get("test_length") == pytest.approx(peer.metrics.get("test_length"))
    evaluated = [trainer.evaluate(metric_key_prefix="held", **given) for trainer in trainers]
    names = [{name for name in metrics if not name.endswith("_preparation_time")} for metrics in evaluated]
    assert names[0] == names[1]


def test_evaluations_during_training_generate() -> None:
    trainer = trainer_of(etude, eval_strategy="steps", eval_steps=3, generation_max_length=5)
    trainer.train()
    assert [entry["eval_length"] for entry in trainer.state.log_history if "eval_length" in entry]


def test_a_generation_config_from_a_folder_a_file_or_an_object(tmp_path: Path) -> None:
    config = transformers.GenerationConfig(
        max_new_tokens=3, decoder_start_token_id=PAD, eos_token_id=2, pad_token_id=PAD
    )
    config.save_pretrained(tmp_path)
    for given in (config, str(tmp_path), tmp_path / "generation_config.json"):
        trainer = trainer_of(etude, generation_config=given)
        assert trainer.model.generation_config.max_new_tokens == 3
        json.dumps(trainer.args.to_dict())
    assert trainer.predict(translation_rows(2)).predictions.shape[1] >= 4
    config.num_beams = 1
    config.early_stopping = True  # of beam search, without beams
    with pytest.raises(ConfigError, match="generation_config"):
        trainer_of(etude, generation_config=config)


def test_arguments_of_transformers_are_taken_as_they_are() -> None:
    theirs = transformers.Seq2SeqTrainingArguments(**SETTINGS, generation_max_length=9)
    trainer = trainer_of(etude, args=theirs)
    assert isinstance(trainer.args, Seq2SeqTrainingArguments)
    assert (trainer.args.predict_with_generate, trainer.args.generation_max_length) == (True, 9)


def test_the_arguments_are_those_of_transformers_from_the_command_line_too() -> None:
    words = [
        "--output_dir",
        "x",
        "--predict_with_generate",
        "--generation_num_beams",
        "3",
        "--evaluation_strategy",
        "no",
    ]
    (parsed,) = transformers.HfArgumentParser(Seq2SeqTrainingArguments).parse_args_into_dataclasses(words)
    assert (parsed.predict_with_generate, parsed.generation_num_beams, parsed.output_dir) == (True, 3, "x")
    ours, theirs = (
        {name for name, item in cls.__dataclass_fields__.items() if item.init}
        for cls in (Seq2SeqTrainingArguments, transformers.Seq2SeqTrainingArguments)
    )
    assert theirs <= ours
    assert Seq2SeqTrainingArguments.from_dict(parsed.to_dict()).generation_num_beams == 3
    with pytest.raises(UnknownArgumentError, match="predict_with_generate"):
        Seq2SeqTrainingArguments(predict_with_generat=True)
    with pytest.raises(ConfigError, match="sortish_sampler"):
        Seq2SeqTrainingArguments(sortish_sampler=True)


def test_it_is_a_trainer() -> None:
    assert issubclass(Seq2SeqTrainer, etude.Trainer)
    with pytest.raises(ConfigError, match="pad_token_id"):
        trainer = trainer_of(etude)
        trainer.processing_class, trainer.model.config.pad_token_id = None, None
        trainer._pad_tensors_to_max_len(translation_tokens(), 30)


def translation_tokens() -> Any:
    import torch

    return torch.zeros(1, 2, dtype=torch.int64)
