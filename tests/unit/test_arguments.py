"""TrainingArguments: old names, validation, command line, copies, and agreement with the installed transformers."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import logging
import pickle
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import transformers
from transformers import HfArgumentParser

from etude.argument_names import FIELDS, OLD_NAMES
from etude.arguments import IntervalStrategy, ParallelMode, SaveStrategy, TrainingArguments, classification
from etude.errors import ConfigError, UnknownArgumentError

THEIR_FIELDS = {item.name: item for item in dataclasses.fields(transformers.TrainingArguments)}
OUR_FIELDS = {item.name: item for item in dataclasses.fields(TrainingArguments)}
OUR_OWN = {
    "cuda_graphs", "on_nonfinite", "deterministic", "hf_checkpoint_files", "save_in_background", "tokens_per_micro_batch",
    "gpu_memory_limit_gib", "activation_offloading", "base_precision", "fast_path",
}  # fmt: skip
NEW_IN_5_23 = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # the oldest supported version is 5.17
CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in THEIR_FIELDS else "gradient_checkpointing"
LEFT_OUT_BY_THEM = {"warmup_ratio", "logging_dir", "overwrite_output_dir"}

# Every field of transformers 4.40 to 5.17 that 5.23 does not have and that is no field of ours, with its default there.
REMOVED_NAMES = {
    "evaluation_strategy": "no",
    "per_gpu_train_batch_size": None,
    "per_gpu_eval_batch_size": None,
    "save_safetensors": True,
    "no_cuda": False,
    "use_mps_device": False,
    "jit_mode_eval": False,
    "use_ipex": False,
    "fp16_opt_level": "O1",
    "half_precision_backend": "auto",
    "tpu_num_cores": None,
    "tpu_metrics_debug": False,
    "past_index": -1,
    "tp_size": 0,
    "fsdp_min_num_params": 0,
    "fsdp_transformer_layer_cls_to_wrap": None,
    "adafactor": False,
    "group_by_length": False,
    "use_legacy_prediction_loop": False,
    "include_inputs_for_metrics": False,
    "fp16_backend": "auto",
    "push_to_hub_model_id": None,
    "push_to_hub_organization": None,
    "push_to_hub_token": None,
    "_n_gpu": -1,
    "mp_parameters": "",
    "torchdynamo": None,
    "ray_scope": "last",
    "dispatch_batches": None,
    "split_batches": None,
    "include_tokens_per_second": False,
}


@dataclass
class ScriptArguments(TrainingArguments):
    """What scripts do: a subclass with a changed default and extra fields."""

    learning_rate: float = field(default=1e-4, metadata={"help": "Another default."})
    model_name: str = field(default="tiny", metadata={"help": "An extra field."})
    eos_token: str | None = field(default=None, metadata={"help": "Masked, because its name ends in _token."})


def refused(**settings: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        TrainingArguments(**settings)
    assert isinstance(caught.value, ValueError)
    return str(caught.value)


# -- Agreement with the installed transformers ---------------------------------------------------------------------------


def test_has_every_field_of_transformers_and_the_listed_ones_more() -> None:
    assert THEIR_FIELDS.keys() - OUR_FIELDS.keys() == set()
    assert OUR_FIELDS.keys() - THEIR_FIELDS.keys() - NEW_IN_5_23 == OUR_OWN | LEFT_OUT_BY_THEM


def test_defaults_are_those_of_transformers() -> None:
    renamed_since = {"gradient_checkpointing"} if NEW_IN_5_23 - THEIR_FIELDS.keys() else set()
    for name in THEIR_FIELDS.keys() - renamed_since:
        ours, theirs = OUR_FIELDS[name], THEIR_FIELDS[name]
        assert ours.default == theirs.default and type(ours.default) is type(theirs.default), name
        if theirs.default_factory is not dataclasses.MISSING:
            assert ours.default_factory() == theirs.default_factory(), name  # type: ignore[misc]


def test_a_default_object_holds_what_theirs_holds() -> None:
    ours, theirs = TrainingArguments(use_cpu=True), transformers.TrainingArguments(use_cpu=True)
    differing = {name for name in THEIR_FIELDS if getattr(ours, name) != getattr(theirs, name)}
    assert differing == {"accelerator_config"}


def test_positional_order_is_that_of_transformers() -> None:
    assert [name for name in OUR_FIELDS if name in THEIR_FIELDS] == list(THEIR_FIELDS)
    assert TrainingArguments("here").output_dir == "here"


def test_every_field_has_its_own_help_and_a_classification() -> None:
    assert FIELDS.keys() == OUR_FIELDS.keys()
    for name, item in OUR_FIELDS.items():
        assert item.metadata["help"].endswith("."), name
        if name in THEIR_FIELDS:
            assert item.metadata["help"] != THEIR_FIELDS[name].metadata.get("help"), name


def test_every_row_that_does_not_do_what_it_says_gives_a_reason() -> None:
    rows = {row.name: row for row in classification()}
    assert list(rows)[: len(OUR_FIELDS)] == list(OUR_FIELDS)
    assert rows.keys() == OUR_FIELDS.keys() | OLD_NAMES.keys()
    for row in rows.values():
        assert row.kind in ("mapped", "accepted", "refused", "alias")
        assert row.note or row.kind == "alias", row.name
        if row.kind == "alias":
            assert row.target is not None and row.target.split(".")[0] in OUR_FIELDS


# -- Old names -----------------------------------------------------------------------------------------------------------


def test_every_removed_name_is_in_the_table_with_its_old_default() -> None:
    assert OLD_NAMES.keys() == REMOVED_NAMES.keys()
    args = TrainingArguments()
    for name, default in REMOVED_NAMES.items():
        if name == "_n_gpu":
            assert args._n_gpu == args.n_gpu
        elif name in ("per_gpu_train_batch_size", "per_gpu_eval_batch_size"):
            assert getattr(args, name) == 8
        else:
            assert getattr(args, name) == default, name


def test_every_removed_name_is_accepted_silently_at_its_old_default() -> None:
    assert TrainingArguments(**REMOVED_NAMES) == TrainingArguments()


@pytest.mark.parametrize(
    ("old", "value", "new", "becomes"),
    [
        ("evaluation_strategy", "epoch", "eval_strategy", "epoch"),
        ("no_cuda", True, "use_cpu", True),
        ("per_gpu_train_batch_size", 3, "per_device_train_batch_size", 3),
        ("per_gpu_eval_batch_size", 5, "per_device_eval_batch_size", 5),
        ("push_to_hub_token", "secret", "hub_token", "secret"),
        ("push_to_hub_model_id", "me/it", "hub_model_id", "me/it"),
        ("group_by_length", True, "train_sampling_strategy", "group_by_length"),
        ("adafactor", True, "optim", "adafactor"),
        ("include_inputs_for_metrics", True, "include_for_metrics", ["inputs"]),
        ("include_tokens_per_second", True, "include_num_input_tokens_seen", "all"),
        ("split_batches", False, "accelerator_config", {"split_batches": False}),
        ("gradient_checkpointing", True, "activation_checkpointing", True),
        ("gradient_checkpointing_kwargs", {"use_reentrant": False}, "activation_checkpointing_kwargs", {"use_reentrant": False}),
    ],
)  # fmt: skip
def test_alias_sets_the_new_name_and_stays_readable(old: str, value: Any, new: str, becomes: Any) -> None:
    args = TrainingArguments(**{old: value})
    assert getattr(args, new) == becomes
    assert getattr(args, old) == value
    assert new in args.explicit and old not in args.explicit


@pytest.mark.parametrize("alias", [row.name for row in OLD_NAMES.values() if row.kind == "alias"])
def test_alias_also_works_in_a_subclass(alias: str) -> None:
    value = {"evaluation_strategy": "steps", "torchdynamo": "eager"}.get(alias, 4 if "per_gpu" in alias else True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # some say that they have no effect
        args = ScriptArguments(**{alias: value}, model_name="large")
    assert getattr(args, alias) == value and args.model_name == "large" and args.learning_rate == 1e-4


def test_old_and_new_name_together() -> None:
    args = TrainingArguments(evaluation_strategy="epoch", eval_strategy=IntervalStrategy.EPOCH)
    assert args.eval_strategy == "epoch"
    assert TrainingArguments(
        include_inputs_for_metrics=True, include_for_metrics=["loss", "inputs"]
    ).include_for_metrics
    assert TrainingArguments(per_gpu_train_batch_size=None, per_device_train_batch_size=2).train_batch_size == 2
    message = refused(evaluation_strategy="epoch", eval_strategy="steps")
    assert message.startswith("evaluation_strategy: ") and "eval_strategy='steps'" in message
    assert "train_sampling_strategy" in refused(group_by_length=True, train_sampling_strategy="sequential")
    assert "activation_checkpointing=False" in refused(gradient_checkpointing=True, activation_checkpointing=False)
    assert "split_batches" in refused(split_batches=True, accelerator_config={"split_batches": False})


def test_two_old_names_that_share_a_dictionary() -> None:
    with pytest.warns(UserWarning, match="accelerator_config"):
        args = TrainingArguments(split_batches=True, dispatch_batches=False)
    assert args.accelerator_config == {"split_batches": True, "dispatch_batches": False}
    assert args.split_batches is True and args.dispatch_batches is False


def test_old_names_can_be_set_afterwards() -> None:
    args = TrainingArguments()
    args.evaluation_strategy = "epoch"
    args.group_by_length = True
    args.gradient_checkpointing = True
    args.split_batches = False
    assert (args.eval_strategy, args.train_sampling_strategy, args.activation_checkpointing) == (
        "epoch", "group_by_length", True,
    )  # fmt: skip
    assert args.accelerator_config == {"split_batches": False}
    args.group_by_length = False
    args.activation_checkpointing = False
    args.validate()
    assert args.train_sampling_strategy == "random" and args.gradient_checkpointing is False and args.do_eval


def test_a_subclass_may_have_an_old_name_as_its_own_field() -> None:
    @dataclass
    class Own(TrainingArguments):
        group_by_length: bool = field(default=False, metadata={"help": "Its own meaning."})

    args = Own(group_by_length=True)
    assert args.group_by_length is True and args.train_sampling_strategy == "random"


def test_a_subclass_may_have_its_own_constructor() -> None:
    class Wrapped(TrainingArguments):
        def __init__(self, flavour: str, **settings: Any) -> None:
            super().__init__(**settings)
            self.flavour = flavour

    args = Wrapped("sweet", evaluation_strategy="epoch")
    assert args.flavour == "sweet" and args.eval_strategy == "epoch"


ACCEPTED = {
    "fp16_backend": "apex",
    "half_precision_backend": "apex",
    "fp16_opt_level": "O2",
    "save_safetensors": False,
    "jit_mode_eval": True,
    "use_ipex": True,
    "use_legacy_prediction_loop": True,
    "tpu_num_cores": 8,
    "tpu_metrics_debug": True,
    "ray_scope": "all",
    "mp_parameters": "x",
    "fsdp_min_num_params": 5,
    "fsdp_transformer_layer_cls_to_wrap": "Block",
    "torch_compile_backend": "aot_eager",
    "torch_compile_mode": "max-autotune",
    "use_liger_kernel": True,
    "liger_kernel_config": {"rope": True},
    "average_tokens_across_devices": False,
    "eval_use_gather_object": True,
    "enable_jit_checkpoint": True,
    "accelerator_config": {"even_batches": False},
    "ddp_find_unused_parameters": True,
    "ddp_bucket_cap_mb": 25,
    "ddp_broadcast_buffers": True,
    "ddp_static_graph": True,
    "ddp_backend": "gloo",
    "ddp_timeout": 60,
    "debug": "underflow_overflow",
}
REFUSED = {
    "push_to_hub": True,
    "optim_target_modules": ["q_proj"],
    "fsdp": "full_shard",
    "deepspeed": "ds.json",
    "parallelism_config": object(),
    "past_index": 2,
    "tp_size": 2,
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_a_name_without_effect_warns_once_and_says_what_happens(name: str) -> None:
    with pytest.warns(UserWarning) as caught:
        args = TrainingArguments(**{name: ACCEPTED[name]})
    assert len(caught) == 1
    note = (FIELDS.get(name) or OLD_NAMES[name]).note
    assert str(caught[0].message).startswith(f"{name}=") and note in str(caught[0].message)
    assert caught[0].filename == __file__
    assert getattr(args, name) in (ACCEPTED[name], ["underflow_overflow"])


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_name_gives_the_reason(name: str) -> None:
    message = refused(**{name: REFUSED[name]})
    assert message.startswith(f"{name}: ") and (FIELDS.get(name) or OLD_NAMES[name]).note in message


def test_the_lists_above_are_complete() -> None:
    rows = {**FIELDS, **OLD_NAMES}.values()
    assert {row.name for row in rows if row.kind == "accepted" and not row.quiet} == ACCEPTED.keys()
    assert {row.name for row in rows if row.kind == "refused"} == REFUSED.keys()


def test_quiet_names_are_silent() -> None:
    TrainingArguments(hub_model_id="me/it", hub_token="t", hub_strategy="end", local_rank=0, use_mps_device=True)
    TrainingArguments(deepspeed=None, fsdp="", fsdp_config={"xla": False}, ddp_find_unused_parameters=False)


def test_unknown_names_suggest_the_nearest_one() -> None:
    for name, near in (("lerning_rate", "learning_rate"), ("evaluation_stratgy", "evaluation_strategy")):
        with pytest.raises(UnknownArgumentError, match=f"{name}: .*did you mean '{near}'") as caught:
            TrainingArguments(**{name: 1})
        assert isinstance(caught.value, TypeError)
    with pytest.raises(UnknownArgumentError, match="ScriptArguments has no such argument; did you mean 'model_name'"):
        ScriptArguments(model_nam="x")
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        TrainingArguments().nonsense  # noqa: B018


# -- What was chosen -----------------------------------------------------------------------------------------------------


def test_explicit_holds_what_the_caller_passed() -> None:
    assert TrainingArguments().explicit == frozenset()
    assert TrainingArguments("out", seed=42).explicit == {"output_dir", "seed"}


def test_explicit_of_a_copy_holds_what_is_off_default() -> None:
    args = TrainingArguments("out", eval_strategy="no", bf16=True)
    assert dataclasses.replace(args, seed=1).explicit == {"output_dir", "bf16", "seed"}
    assert TrainingArguments.from_dict(TrainingArguments().to_dict()).explicit <= {"output_dir"}


def test_the_nan_filter_given_explicitly_lets_training_go_on() -> None:
    assert TrainingArguments().on_nonfinite == "stop"
    assert TrainingArguments(logging_nan_inf_filter=True).on_nonfinite == "continue"
    assert TrainingArguments(logging_nan_inf_filter=True, on_nonfinite="stop").on_nonfinite == "stop"
    copied = dataclasses.replace(TrainingArguments(logging_nan_inf_filter=True), seed=1)
    assert copied.on_nonfinite == "continue"
    assert dataclasses.replace(TrainingArguments(), logging_nan_inf_filter=False).on_nonfinite == "stop"


# -- Validation ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"fp16": True, "bf16": True}, ["fp16: ", "bf16"]),
        ({"fp16_full_eval": True, "bf16_full_eval": True}, ["fp16_full_eval: ", "bf16_full_eval"]),
        ({"logging_steps": 0}, ["logging_steps: "]),
        ({"logging_steps": 1.5}, ["logging_steps: ", "whole number"]),
        ({"logging_steps": -3}, ["logging_steps: "]),
        ({"save_steps": 2.5}, ["save_steps: ", "whole number"]),
        ({"save_steps": 0}, ["save_steps: "]),
        ({"eval_strategy": "steps", "eval_steps": 7.5}, ["eval_steps: "]),
        ({"load_best_model_at_end": True, "eval_strategy": "epoch"}, ["load_best_model_at_end: ", "'steps'", "'epoch'"]),
        ({"load_best_model_at_end": True, "save_strategy": "epoch"}, ["load_best_model_at_end: "]),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 100, "save_steps": 250},
            ["load_best_model_at_end: ", "save_steps=250", "eval_steps=100"],
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.1, "save_steps": 250},
            ["load_best_model_at_end: ", "save_steps=250"],
        ),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 0.2, "save_steps": 0.3},
            ["load_best_model_at_end: "],
        ),
        ({"save_strategy": "best"}, ["save_strategy: ", "eval_strategy"]),
        ({"lr_scheduler_type": "reduce_lr_on_plateau"}, ["lr_scheduler_type: ", "eval_strategy"]),
        ({"lr_scheduler_type": "greedy"}, ["lr_scheduler_type: ", "eval_strategy"]),
        ({"warmup_steps": -1}, ["warmup_steps: "]),
        ({"warmup_ratio": 1.01}, ["warmup_ratio: ", "<= 1"]),
        ({"warmup_ratio": -0.1}, ["warmup_ratio: "]),
        ({"dataloader_prefetch_factor": 2}, ["dataloader_prefetch_factor: ", "dataloader_num_workers"]),
        ({"dataloader_num_workers": -1}, ["dataloader_num_workers: "]),
        ({"learning_rate": -1e-5}, ["learning_rate: "]),
        ({"learning_rate": float("nan")}, ["learning_rate: "]),
        ({"learning_rate": float("inf")}, ["learning_rate: "]),
        ({"learning_rate": "fast"}, ["learning_rate: ", "'fast'"]),
        ({"learning_rate": True}, ["learning_rate: "]),
        ({"per_device_train_batch_size": 0}, ["per_device_train_batch_size: "]),
        ({"per_device_train_batch_size": 2.5}, ["per_device_train_batch_size: ", "whole"]),
        ({"per_device_eval_batch_size": -1}, ["per_device_eval_batch_size: "]),
        ({"gradient_accumulation_steps": 0}, ["gradient_accumulation_steps: "]),
        ({"max_grad_norm": -1}, ["max_grad_norm: "]),
        ({"num_train_epochs": -1}, ["num_train_epochs: "]),
        ({"max_steps": 1.5}, ["max_steps: "]),
        ({"label_smoothing_factor": 1.5}, ["label_smoothing_factor: "]),
        ({"weight_decay": -0.1}, ["weight_decay: "]),
        ({"adam_beta1": 1.5}, ["adam_beta1: "]),
        ({"torch_empty_cache_steps": 0}, ["torch_empty_cache_steps: "]),
        ({"tokens_per_micro_batch": 0}, ["tokens_per_micro_batch: "]),
        ({"seed": -1}, ["seed: "]),
        ({"bf16": "maybe"}, ["bf16: ", "'maybe'"]),
        ({"save_only_model": 3}, ["save_only_model: "]),
        ({"eval_strategy": "step"}, ["eval_strategy: ", "did you mean 'steps'"]),
        ({"eval_strategy": "best"}, ["eval_strategy: "]),
        ({"train_sampling_strategy": "batch_rebalance"}, ["train_sampling_strategy: ", "tokens"]),
        ({"train_sampling_strategy": "randm"}, ["train_sampling_strategy: ", "did you mean 'random'"]),
        ({"log_level": "loud"}, ["log_level: "]),
        ({"base_precision": "int8"}, ["base_precision: ", "fp8"]),
        ({"on_nonfinite": "stopp"}, ["on_nonfinite: ", "did you mean 'stop'"]),
        ({"include_for_metrics": ["input"]}, ["include_for_metrics: ", "did you mean 'inputs'"]),
        ({"include_num_input_tokens_seen": "some"}, ["include_num_input_tokens_seen: "]),
        ({"lr_scheduler_kwargs": "{broken"}, ["lr_scheduler_kwargs: "]),
        ({"lr_scheduler_kwargs": "[1]"}, ["lr_scheduler_kwargs: "]),
        ({"accelerator_config": {"even_batch": True}}, ["accelerator_config: ", "did you mean 'even_batches'"]),
        ({"accelerator_config": "missing.json"}, ["accelerator_config: ", "missing.json"]),
        ({"save_total_limit": 1.5}, ["save_total_limit: "]),
    ],
)  # fmt: skip
def test_errors_name_the_field(settings: dict[str, Any], names: list[str]) -> None:
    message = refused(**settings)
    assert message.startswith(names[0])
    assert all(name in message for name in names)


def test_changes_made_afterwards_are_checked_by_validate() -> None:
    args = TrainingArguments()
    args.fp16 = args.bf16 = True
    with pytest.raises(ConfigError, match="fp16"):
        args.validate()


def test_intervals_that_are_not_in_use_may_hold_anything() -> None:
    TrainingArguments(logging_strategy="no", logging_steps=0, save_strategy="no", save_steps=0)


def test_intervals_are_whole_numbers_or_ratios() -> None:
    args = TrainingArguments(logging_steps=10.0, save_steps=0.25, eval_strategy="steps", eval_steps="5")
    assert (args.logging_steps, args.save_steps, args.eval_steps) == (10, 0.25, 5)
    assert type(args.logging_steps) is int and type(args.eval_steps) is int


def test_matching_intervals_for_the_best_model() -> None:
    for eval_steps, save_steps in ((100, 500), (0.1, 0.3), (0.05, 0.5)):
        args = TrainingArguments(
            load_best_model_at_end=True, eval_strategy="steps", eval_steps=eval_steps, save_steps=save_steps
        )
        assert args.metric_for_best_model == "loss" and args.greater_is_better is False
    TrainingArguments(load_best_model_at_end=True, eval_strategy="epoch", save_strategy="best")


def test_best_model_without_evaluation_is_pointed_out() -> None:
    with pytest.warns(UserWarning, match="load_best_model_at_end=True has no effect"):
        TrainingArguments(load_best_model_at_end=True, save_strategy="no")


def test_derived_values() -> None:
    args = TrainingArguments(eval_strategy="steps", logging_steps=20, metric_for_best_model="accuracy")
    assert args.do_eval is True and args.eval_steps == 20 and args.greater_is_better is True
    assert TrainingArguments(metric_for_best_model="eval_loss").greater_is_better is False
    assert TrainingArguments(save_strategy="best", eval_strategy="epoch").metric_for_best_model == "loss"
    assert TrainingArguments(lr_scheduler_type="greedy", eval_strategy="epoch").metric_for_best_model == "loss"
    assert TrainingArguments().metric_for_best_model is None and TrainingArguments().greater_is_better is None
    assert TrainingArguments(full_determinism=True).deterministic is True
    assert TrainingArguments(save_total_limit=0).save_total_limit is None
    assert TrainingArguments(max_grad_norm=None).max_grad_norm == 0.0


def test_output_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert TrainingArguments().output_dir == "trainer_output"
    assert TrainingArguments("~/runs").output_dir == str(tmp_path / "runs")
    assert TrainingArguments(Path("runs")).output_dir == "runs"
    assert TrainingArguments("").output_dir == "trainer_output"
    assert list(tmp_path.iterdir()) == []


def test_values_come_in_the_forms_that_scripts_and_files_give_them() -> None:
    theirs = transformers.trainer_utils
    args = TrainingArguments(
        eval_strategy=theirs.IntervalStrategy.EPOCH,
        save_strategy=theirs.SaveStrategy.BEST,
        lr_scheduler_type=theirs.SchedulerType.COSINE,
        optim=transformers.training_args.OptimizerNames.ADAFACTOR,
        hub_strategy=theirs.HubStrategy.END,
    )
    assert args.eval_strategy is IntervalStrategy.EPOCH and args.save_strategy is SaveStrategy.BEST
    assert (type(args.lr_scheduler_type), type(args.optim), type(args.hub_strategy)) == (str, str, str)
    assert (args.lr_scheduler_type, args.optim, args.hub_strategy) == ("cosine", "adafactor", "end")
    assert args.eval_strategy == theirs.IntervalStrategy.EPOCH and args.eval_strategy == "epoch"
    assert TrainingArguments(eval_strategy=False).eval_strategy == "no"  # YAML 1.1 reads `no` as false
    assert TrainingArguments(learning_rate="5e-5").learning_rate == 5e-5  # and `5e-5` as text
    assert TrainingArguments(bf16="false").bf16 is False
    assert TrainingArguments(label_names="labels").label_names == ["labels"]
    assert TrainingArguments(include_num_input_tokens_seen=True).include_num_input_tokens_seen == "all"
    assert TrainingArguments(resume_from_checkpoint="True").resume_from_checkpoint is True
    assert TrainingArguments(resume_from_checkpoint="auto").resume_from_checkpoint == "auto"


def test_numbers_of_numpy_become_plain_ones() -> None:
    numpy = pytest.importorskip("numpy", reason="a core dependency")
    args = TrainingArguments(
        learning_rate=numpy.float32(0.5), per_device_train_batch_size=numpy.int64(4), seed=numpy.int64(7)
    )
    assert (args.learning_rate, args.per_device_train_batch_size, args.seed) == (0.5, 4, 7)
    assert {type(args.learning_rate), type(args.seed)} == {float, int}


def test_dictionaries_are_read_from_json(tmp_path: Path) -> None:
    args = TrainingArguments(
        lr_scheduler_kwargs='{"min_lr": "1e-6", "num_cycles": "2", "deep": {"on": "true"}}',
        gradient_checkpointing_kwargs='{"use_reentrant": false}',
    )
    assert args.lr_scheduler_kwargs == {"min_lr": 1e-6, "num_cycles": 2, "deep": {"on": True}}
    assert args.activation_checkpointing_kwargs == {"use_reentrant": False}
    path = tmp_path / "accelerate.json"
    path.write_text(json.dumps({"even_batches": True}), encoding="utf-8")
    assert TrainingArguments(accelerator_config=str(path)).accelerator_config == {"even_batches": True}


def test_trackers() -> None:
    assert TrainingArguments().report_to == [] == TrainingArguments(report_to=None).report_to
    assert TrainingArguments(report_to="wandb").report_to == ["wandb"]
    assert TrainingArguments(report_to=["none"]).report_to == []
    assert set(TrainingArguments(report_to="all").report_to) <= {"tensorboard", "wandb", "mlflow", "trackio"}


def test_half_precision_needs_no_gpu() -> None:
    assert TrainingArguments(bf16=True).bf16 and TrainingArguments(fp16=True).fp16


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({}, 0),
        ({"warmup_steps": 7}, 7),
        ({"warmup_steps": 1}, 1),
        ({"warmup_steps": 0.05}, 6),
        ({"warmup_ratio": 0.05}, 6),
        ({"warmup_ratio": 1.0}, 101),
        ({"warmup_steps": 7, "warmup_ratio": 0.5}, 7),
    ],
)
def test_warmup_steps(settings: dict[str, Any], steps: int) -> None:
    assert TrainingArguments(**settings).get_warmup_steps(101) == steps


# -- Command line and subclasses -----------------------------------------------------------------------------------------


def parse(kind: Any, *words: str) -> Any:
    return HfArgumentParser(kind).parse_args_into_dataclasses(list(words), look_for_args_file=False)[0]


def test_command_line_without_words_is_the_default_object() -> None:
    args = parse(TrainingArguments)
    assert args == TrainingArguments() and args.explicit == frozenset() and args.on_nonfinite == "stop"


def test_command_line() -> None:
    args = parse(
        TrainingArguments,
        "--output_dir", "out", "--learning_rate", "2e-4", "--bf16", "--eval_strategy", "steps", "--eval_steps", "50",
        "--gradient_checkpointing", "--report_to", "tensorboard", "--lr_scheduler_kwargs", '{"num_cycles": 2}',
        "--label_names", "labels", "start", "--no_remove_unused_columns", "--warmup_ratio", "0.1",
        "--include_num_input_tokens_seen", "--resume_from_checkpoint", "true", "--seed", "3",
    )  # fmt: skip
    assert (args.learning_rate, args.eval_steps, args.warmup_ratio, args.seed) == (2e-4, 50, 0.1, 3)
    assert args.bf16 and args.activation_checkpointing and not args.remove_unused_columns
    assert args.report_to == ["tensorboard"] and args.lr_scheduler_kwargs == {"num_cycles": 2}
    assert args.label_names == ["labels", "start"] and args.include_num_input_tokens_seen == "all"
    assert args.resume_from_checkpoint is True
    assert args.explicit == {
        "output_dir", "learning_rate", "bf16", "eval_strategy", "eval_steps", "activation_checkpointing", "report_to",
        "lr_scheduler_kwargs", "label_names", "remove_unused_columns", "warmup_ratio", "include_num_input_tokens_seen",
        "resume_from_checkpoint", "seed",
    }  # fmt: skip


def test_command_line_knows_renamed_words() -> None:
    args = parse(TrainingArguments, "--evaluation_strategy", "epoch", "--no-cuda", "--per_gpu_train_batch_size", "2")
    assert args.eval_strategy == "epoch" and args.use_cpu and args.per_device_train_batch_size == 2


def test_command_line_of_a_subclass_and_its_round_trip() -> None:
    args = parse(ScriptArguments, "--model_name", "big", "--max_steps", "5")
    assert (args.model_name, args.max_steps, args.learning_rate) == ("big", 5, 1e-4)
    again = HfArgumentParser(ScriptArguments).parse_dict(args.to_dict())[0]
    assert again == args


def test_signature_shows_the_fields() -> None:
    assert list(inspect.signature(ScriptArguments).parameters) == [
        item.name for item in dataclasses.fields(ScriptArguments)
    ]


# -- In and out ----------------------------------------------------------------------------------------------------------


def test_json_round_trip() -> None:
    args = ScriptArguments(
        "out", eval_strategy="steps", optim="sgd", lr_scheduler_kwargs={"a": 1}, include_for_metrics=["loss"],
        resume_from_checkpoint=True, warmup_ratio=0.1, model_name="m",
    )  # fmt: skip
    text = args.to_json_string()
    again = ScriptArguments.from_dict(json.loads(text))
    assert again == args and again.to_json_string() == text
    assert type(args.to_dict()["eval_strategy"]) is str


def test_tokens_are_masked_everywhere() -> None:
    args = ScriptArguments("out", hub_token="hf_secret", eos_token="</s>")
    assert args.to_dict()["hub_token"] == "<HUB_TOKEN>" and args.to_dict()["eos_token"] == "<EOS_TOKEN>"
    written = [args.to_json_string(), repr(args), str(args), str(args.to_sanitized_dict())]
    written.append(repr(TrainingArguments("out", hub_token="hf_secret")))
    assert not any("hf_secret" in text for text in written)
    assert ScriptArguments.from_dict(args.to_dict()).hub_token is None


def test_sanitized_values_are_plain() -> None:
    settings = TrainingArguments(lr_scheduler_kwargs={"a": 1}, use_cpu=True).to_sanitized_dict()
    assert settings["train_batch_size"] == settings["eval_batch_size"] == 8
    assert settings["lr_scheduler_kwargs"] == "{'a': 1}"
    assert {type(value) for value in settings.values()} <= {bool, int, float, str}


def test_objects_inside_fields_are_written() -> None:
    torch = pytest.importorskip("torch", reason="a core dependency")
    args = TrainingArguments(
        lr_scheduler_kwargs={"dtype": torch.bfloat16, "path": Path("a"), "when": IntervalStrategy.STEPS}
    )
    assert args.to_dict()["lr_scheduler_kwargs"] == {"dtype": "bfloat16", "path": "a", "when": "steps"}


def test_copies_keep_everything() -> None:
    args = TrainingArguments("out", evaluation_strategy="epoch", use_mps_device=True)
    for copied in (copy.deepcopy(args), pickle.loads(pickle.dumps(args))):
        assert copied == args and copied.explicit == args.explicit and copied.use_mps_device is True
    changed = dataclasses.replace(args, activation_checkpointing=True)
    assert changed.gradient_checkpointing is True and changed.eval_strategy == "epoch"


def test_from_transformers() -> None:
    theirs = transformers.Seq2SeqTrainingArguments(
        "out", use_cpu=True, eval_strategy="steps", eval_steps=5, optim="sgd", lr_scheduler_type="cosine", learning_rate=1e-3,
        warmup_steps=0.1, **{CHECKPOINTING: True}, report_to="tensorboard", predict_with_generate=True,
        logging_nan_inf_filter=False, hub_token="secret",
    )  # fmt: skip
    ours = ScriptArguments.from_transformers(theirs)
    differing = {name for name in THEIR_FIELDS if getattr(ours, name) != getattr(theirs, name)}
    assert differing == {"accelerator_config"} and isinstance(ours, ScriptArguments)
    assert not hasattr(ours, "predict_with_generate")
    assert ours.hub_token == "secret" and ours.on_nonfinite == "continue"
    assert "learning_rate" in ours.explicit and "weight_decay" not in ours.explicit
    assert TrainingArguments.from_transformers(transformers.TrainingArguments(use_cpu=True)).on_nonfinite == "stop"


def test_from_transformers_refuses_what_etude_refuses() -> None:
    theirs = transformers.TrainingArguments("out", use_cpu=True, push_to_hub=True)
    with pytest.raises(ConfigError, match="push_to_hub"):
        TrainingArguments.from_transformers(theirs)


# -- Where this process is -----------------------------------------------------------------------------------------------


def test_a_single_process_on_the_cpu() -> None:
    args = TrainingArguments(use_cpu=True, per_device_eval_batch_size=3)
    assert args.device.type == "cpu" and args.n_gpu == 0
    assert (args.world_size, args.process_index, args.local_process_index) == (1, 0, 0)
    assert args.parallel_mode == "not_parallel" and args.parallel_mode is ParallelMode.NOT_PARALLEL
    assert args.should_log and args.should_save and args.place_model_on_device
    assert (args.train_batch_size, args.eval_batch_size) == (8, 3)
    assert args.ddp_timeout_delta.total_seconds() == 1800
    with args.main_process_first(desc="tokenizing"):
        pass


def test_places_come_from_torch_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as group

    monkeypatch.setattr(group, "is_initialized", lambda: True)
    monkeypatch.setattr(group, "get_world_size", lambda: 4)
    monkeypatch.setattr(group, "get_rank", lambda: 3)
    monkeypatch.setenv("LOCAL_RANK", "1")
    calls: list[str] = []
    monkeypatch.setattr(group, "barrier", lambda: calls.append("barrier"))
    args = TrainingArguments(use_cpu=True)
    assert (args.world_size, args.process_index, args.local_process_index) == (4, 3, 1)
    assert args.parallel_mode.value == "distributed" and not args.should_log and not args.should_save
    with args.main_process_first():
        calls.append("work")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert args.should_log and not args.should_save
    with args.main_process_first():
        calls.append("work")
    assert calls == ["barrier", "work", "work", "barrier"]


def test_log_level() -> None:
    assert TrainingArguments(log_level="error").get_process_log_level() == logging.ERROR
    expected = logging.getLogger("transformers").getEffectiveLevel()
    assert TrainingArguments().get_process_log_level() == expected


# -- Grouped setters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setter", "settings"),
    [
        ("set_training", {"learning_rate": 1e-4, "batch_size": 32, "num_epochs": 1, CHECKPOINTING: True}),
        ("set_evaluate", {"strategy": "steps", "steps": 100, "batch_size": 2, "loss_only": True, "delay": 1}),
        ("set_testing", {"batch_size": 32, "loss_only": True}),
        ("set_save", {"strategy": "steps", "steps": 100, "total_limit": 2}),
        ("set_logging", {"strategy": "epoch", "level": "info", "report_to": ["tensorboard"]}),
        ("set_optimizer", {"name": "adafactor", "beta1": 0.8, "args": "a=1"}),
        ("set_lr_scheduler", {"name": "cosine", "warmup_steps": 0.05, "max_steps": 9}),
        ("set_dataloader", {"train_batch_size": 16, "eval_batch_size": 64, "sampler_seed": 3}),
    ],
)
def test_setters_do_what_those_of_transformers_do(setter: str, settings: dict[str, Any]) -> None:
    ours, theirs = TrainingArguments("out", use_cpu=True), transformers.TrainingArguments("out", use_cpu=True)
    assert getattr(ours, setter)(**settings) is ours
    getattr(theirs, setter)(**settings)
    differing = {name for name in THEIR_FIELDS if getattr(ours, name) != getattr(theirs, name)}
    assert differing == {"accelerator_config"}
    assert ours.on_nonfinite == "stop"


def test_setters_have_the_signatures_of_transformers() -> None:
    for name in (name for name in dir(transformers.TrainingArguments) if name.startswith("set_")):
        if name == "set_push_to_hub":
            continue
        ours, theirs = (
            {
                key: parameter.default
                for key, parameter in inspect.signature(getattr(kind, name)).parameters.items()
                if not key.endswith("_checkpointing")  # which of the two names is the alias depends on the version
            }
            for kind in (TrainingArguments, transformers.TrainingArguments)
        )
        assert list(ours.items()) == list(theirs.items()), name


def test_setters_check_their_fields() -> None:
    args = TrainingArguments()
    with pytest.raises(ConfigError, match="save_steps"):
        args.set_save(steps=0)
    with pytest.raises(ConfigError, match="eval_strategy"):
        args.set_evaluate(strategy="often")
    with pytest.raises(ConfigError, match="learning_rate"):
        args.set_training(learning_rate=-1)
    with pytest.raises(ConfigError, match="hf upload"):
        args.set_push_to_hub("me/it")


def test_importing_costs_neither_torch_nor_transformers() -> None:
    source = str(Path(inspect.getfile(TrainingArguments)).parents[1].resolve())
    code = (
        f"import sys; sys.path.insert(0, {source!r}); import etude.arguments as a; a.TrainingArguments('x'); "
        "a.classification(); print([name for name in ('torch', 'transformers', 'accelerate', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
