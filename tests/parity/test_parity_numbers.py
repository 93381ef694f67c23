"""The same loss, learning rate, gradient norm and adapter as `transformers.Trainer`, at every step.

Every decoder meets every setting, on the fast and on the general path; what does not depend on the architecture is
checked on Llama alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from side_by_side import Run, assert_same_numbers, ours, theirs

from tiny import (
    Padded,
    Row,
    classification_rows,
    language_rows,
    tiny_bert,
    tiny_gemma3,
    tiny_llama,
    tiny_qwen3,
    tiny_t5,
    translation_rows,
    with_lora,
)

DECODERS: dict[str, Callable[..., Any]] = {"llama": tiny_llama, "qwen3": tiny_qwen3, "gemma3": tiny_gemma3}
PATHS = {"fast": True, "general": False}  # name -> fast_path
PATH_NAMES = {"fast": "packed", "general": "general"}  # what must have been taken, or the test proves nothing
ALL_LINEAR: dict[str, Any] = {"target_modules": "all-linear"}
QUERY_VALUE: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}

# name -> (rows, adapter, settings). 21 rows in batches of 2 make 11 micro-batches, the last of one row: with an
# accumulation of 4 the last step of an epoch holds 3 of them.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "two-epochs-linear": (
        {"num_rows": 21},
        ALL_LINEAR,
        {"num_train_epochs": 2, "per_device_train_batch_size": 4, "eval_strategy": "epoch"},
    ),
    "accumulated-ragged-cosine": (
        {"num_rows": 21},
        QUERY_VALUE,
        {
            "num_train_epochs": 4,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 4,
            "lr_scheduler_type": "cosine",
            "warmup_steps": 2,
        },
    ),
    "fifty-steps-cosine": (
        {"num_rows": 32, "masked": False},
        ALL_LINEAR,
        {
            "max_steps": 50,
            "per_device_train_batch_size": 4,
            "lr_scheduler_type": "cosine",
            "learning_rate": 5e-4,
            "eval_strategy": "steps",
            "eval_steps": 25,
        },
    ),
    "accumulated-one-by-one": (
        {"num_rows": 13, "longest": 30},
        ALL_LINEAR,
        {"max_steps": 12, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
    ),
}


def one_eval_batch(settings: dict[str, Any]) -> dict[str, Any]:
    return settings | {"per_device_eval_batch_size": 16}


def decoder_lora(decoder: str, setting: str) -> Any:
    return with_lora(DECODERS[decoder](), task_type="CAUSAL_LM", **SETTINGS[setting][1])


@functools.cache
def peer_run(decoder: str, setting: str, folder: Path) -> Run:
    """The run of transformers, made once for both of our paths."""
    rows, _, settings = SETTINGS[setting]
    build = functools.partial(decoder_lora, decoder, setting)
    return theirs(build, language_rows(**rows), one_eval_batch(settings), folder=folder, eval_rows=language_rows(6, 99))


@pytest.fixture(scope="module")
def peer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("transformers")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("decoder", DECODERS)
def test_a_decoder_trains_as_under_transformers(
    decoder: str, setting: str, path: str, tmp_path: Path, peer_folder: Path
) -> None:
    rows, _, settings = SETTINGS[setting]
    peer = peer_run(decoder, setting, peer_folder)
    mine = ours(
        functools.partial(decoder_lora, decoder, setting),
        language_rows(**rows),
        one_eval_batch(settings) | {"fast_path": PATHS[path]},
        folder=tmp_path,
        eval_rows=language_rows(6, 99),
    )
    assert mine.trainer.path.name == PATH_NAMES[path]
    assert_same_numbers(mine, peer)
    num_batches = peer.output.global_step * settings.get("gradient_accumulation_steps", 1)
    assert mine.batches[:num_batches] == peer.batches[:num_batches]


# name -> settings of one thing each, on a short accumulated run.
VARIATIONS: dict[str, dict[str, Any]] = {
    "weight-decay": {"weight_decay": 0.1},
    "tight-clipping": {"max_grad_norm": 0.1},
    "no-clipping": {"max_grad_norm": 0.0},
    "label-smoothing": {"label_smoothing_factor": 0.1},
    "data-seed": {"data_seed": 3},
    "sequential": {"train_sampling_strategy": "sequential"},
    "drop-last": {"dataloader_drop_last": True},
    "unfused-adamw": {"optim": "adamw_torch"},
    "sgd": {"optim": "sgd"},
    "betas": {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6},
    "half-an-epoch": {"num_train_epochs": 1.5},
    "warmup-share": {"warmup_steps": 0.3, "lr_scheduler_type": "cosine"},
    "constant-with-warmup": {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2},
    "workers": {"dataloader_num_workers": 1},
    "logged-every-third-step": {"logging_steps": 3},
    "activation-checkpointing": {"gradient_checkpointing": True},
}


def llama_lora() -> Any:
    return with_lora(tiny_llama(), task_type="CAUSAL_LM", **QUERY_VALUE)


def varied(variation: str) -> dict[str, Any]:
    base = {"num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    return base | VARIATIONS[variation]


@functools.cache
def varied_peer_run(variation: str, folder: Path) -> Run:
    return theirs(llama_lora, language_rows(13), varied(variation), folder=folder)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("variation", VARIATIONS)
def test_a_setting_means_what_it_means_under_transformers(
    variation: str, path: str, tmp_path: Path, peer_folder: Path
) -> None:
    settings = varied(variation)
    peer = varied_peer_run(variation, peer_folder)
    mine = ours(llama_lora, language_rows(13), settings | {"fast_path": PATHS[path]}, folder=tmp_path)
    assert_same_numbers(mine, peer)
    if not settings.get("dataloader_num_workers"):  # in a worker the collator remembers only there
        num_batches = min(len(mine.batches), len(peer.batches))
        assert num_batches >= peer.output.global_step
        assert mine.batches[:num_batches] == peer.batches[:num_batches]


@pytest.mark.parametrize("path", PATHS)
def test_left_padding_keeps_the_positions_of_the_collator(path: str, tmp_path: Path) -> None:
    """Under transformers a row padded on the left starts at the position of its column."""
    build = lambda: with_lora(tiny_llama(), task_type="CAUSAL_LM")  # noqa: E731
    settings = {"max_steps": 12, "per_device_train_batch_size": 4}
    peer = theirs(build, language_rows(12), settings, folder=tmp_path, collate=Padded(side="left"))
    mine = ours(
        build, language_rows(12), settings | {"fast_path": PATHS[path]}, folder=tmp_path, collate=Padded(side="left")
    )
    assert mine.trainer.path.name == PATH_NAMES[path]
    assert_same_numbers(mine, peer)


@pytest.mark.parametrize("path", PATHS)
def test_tied_embeddings_and_a_trained_head(path: str, tmp_path: Path) -> None:
    build = lambda: with_lora(  # noqa: E731
        tiny_llama(), task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], modules_to_save=["lm_head"]
    )
    settings = {"max_steps": 12, "per_device_train_batch_size": 4}
    peer = theirs(build, language_rows(12), settings, folder=tmp_path)
    mine = ours(build, language_rows(12), settings | {"fast_path": PATHS[path]}, folder=tmp_path)
    assert any("lm_head" in name for name in mine.adapter)
    assert_same_numbers(mine, peer)


def bert_lora() -> Any:
    return with_lora(tiny_bert(), task_type="SEQ_CLS", target_modules=["query", "value"])


def t5_lora() -> Any:
    return with_lora(tiny_t5(), task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])


OTHERS: dict[str, tuple[Callable[[], Any], Callable[[int], list[Row]]]] = {
    "bert-classifier": (bert_lora, classification_rows),
    "t5-seq2seq": (t5_lora, translation_rows),
}


@pytest.mark.parametrize("scheduler", ["linear", "cosine"])
@pytest.mark.parametrize("model", OTHERS)
def test_classifiers_and_encoder_decoders(model: str, scheduler: str, tmp_path: Path) -> None:
    build, make_rows = OTHERS[model]
    settings = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "lr_scheduler_type": scheduler,
        "eval_strategy": "epoch",
        "per_device_eval_batch_size": 16,
    }
    peer = theirs(build, make_rows(21), settings, folder=tmp_path, eval_rows=make_rows(6))
    mine = ours(build, make_rows(21), settings, folder=tmp_path, eval_rows=make_rows(6))
    assert_same_numbers(mine, peer)
    assert mine.batches == peer.batches


@pytest.mark.parametrize("model", OTHERS)
def test_accumulated_batches_equal_one_large_batch(model: str, tmp_path: Path) -> None:
    """transformers multiplies the loss of these models by the accumulation count; one large batch there is the truth."""
    build, make_rows = OTHERS[model]
    rows = make_rows(21)
    one_batch = {"num_train_epochs": 4, "per_device_train_batch_size": 8}
    accumulated = one_batch | {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    peer = theirs(build, rows, one_batch, folder=tmp_path / "one")
    assert_same_numbers(ours(build, rows, accumulated, folder=tmp_path / "accumulated"), peer)
    assert_same_numbers(ours(build, rows, one_batch, folder=tmp_path / "one"), peer)
