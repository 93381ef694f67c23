"""Every name a training argument has, or ever had since transformers 4.40, and what etude does with it.

One declarative table, read by the constructor of `TrainingArguments` (translation, warnings, refusals), by its attribute
access (old names stay readable) and by the documentation. A name is

- *mapped*: etude does what it says;
- *accepted*: nothing is lost by ignoring it; the note says what happens instead, and one warning repeats it;
- *refused*: ignoring it would change the result, or leave out something asked for; the note is the reason;
- *alias*: another name of `target`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final, Literal

from etude.errors import ConfigError

Kind = Literal["mapped", "accepted", "refused", "alias"]
UNSET: Final = object()  # an old flag that is off asks for nothing of its new name


def same(value: Any) -> Any:
    return value


@dataclass(frozen=True)
class ArgumentName:
    """One row of the table.

    `target` is the new name of an alias (`field.key` for a key of a dictionary field); `write` turns an old value into
    the new one (or `UNSET`), `read` a new value into the old one. `default` is what an old name without a field reads
    as when it was not passed. `quiet` rows are accepted without a warning.
    """

    name: str
    kind: Kind
    note: str = ""
    target: str | None = None
    write: Callable[[Any], Any] = same
    read: Callable[[Any], Any] = same
    default: Any = None
    quiet: bool = False


@dataclass
class Translation:
    """What the constructor does with the keywords it was given."""

    settings: dict[str, Any] = field(default_factory=dict)  # new name -> value
    leftovers: dict[str, Any] = field(default_factory=dict)  # old names with no field, kept readable
    warnings: list[str] = field(default_factory=list)


def _flag(name: str, target: str, value: Any, note: str = "") -> ArgumentName:
    """An old boolean that became one value of `target`."""
    return ArgumentName(
        name,
        "alias",
        note,
        target,
        write=lambda on: value if on else UNSET,
        read=lambda now: now == value,
        default=False,
    )


def _alias(name: str, target: str, note: str = "") -> ArgumentName:
    return ArgumentName(name, "alias", note, target)


def _accepted(
    name: str, note: str, *, default: Any = None, target: str | None = None, quiet: bool = False
) -> ArgumentName:
    return ArgumentName(name, "accepted", note, target, default=default, quiet=quiet)


def _refused(name: str, note: str, *, default: Any = None) -> ArgumentName:
    return ArgumentName(name, "refused", note, default=default)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_MAPPED = _words(
    """
    output_dir per_device_train_batch_size num_train_epochs max_steps gradient_accumulation_steps auto_find_batch_size
    learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps
    optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm
    label_smoothing_factor neftune_noise_alpha
    bf16 fp16 bf16_full_eval fp16_full_eval tf32
    activation_checkpointing activation_checkpointing_kwargs use_cache torch_empty_cache_steps
    logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter
    include_num_input_tokens_seen log_level log_level_replica disable_tqdm
    report_to run_name project trackio_space_id trackio_bucket_id trackio_static_space_id
    eval_strategy eval_steps eval_delay per_device_eval_batch_size prediction_loss_only eval_on_start
    eval_do_concat_batches eval_accumulation_steps include_for_metrics batch_eval_metrics
    save_only_model save_strategy save_steps save_on_each_node save_total_limit
    load_best_model_at_end metric_for_best_model greater_is_better
    ignore_data_skip restore_callback_states_from_checkpoint resume_from_checkpoint
    full_determinism seed data_seed use_cpu
    dataloader_drop_last dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
    dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
    remove_unused_columns label_names train_sampling_strategy length_column_name
    torch_compile skip_memory_metrics do_train do_eval do_predict
    warmup_ratio logging_dir
    on_nonfinite deterministic hf_checkpoint_files save_in_background cuda_graphs tokens_per_micro_batch gpu_memory_limit_gib
    activation_offloading base_precision fast_path
    """
)

_NOTHING_PUSHED = "etude uploads nothing, so it is not read; save locally, then `hf upload`"
_ONE_REDUCTION = "gradients are summed over processes by one fixed-order reduction of a flat buffer, not by DDP"
_ONE_COMPILER = "it turns torch_compile on; the decoder layers are compiled with inductor in its default mode"

FIELDS: Final[dict[str, ArgumentName]] = {
    row.name: row
    for row in (
        *(ArgumentName(name, "mapped") for name in _MAPPED),
        _alias("gradient_checkpointing", "activation_checkpointing"),
        _alias("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        _accepted("torch_compile_backend", _ONE_COMPILER),
        _accepted("torch_compile_mode", _ONE_COMPILER),
        _accepted("use_liger_kernel", "etude's own loss head and kernels are used where a probe shows them equal"),
        _accepted("liger_kernel_config", "etude's own loss head and kernels are used where a probe shows them equal"),
        _accepted("average_tokens_across_devices", "the loss is always divided by the token count of all processes"),
        _accepted("eval_use_gather_object", "evaluation results of any type are gathered without being told"),
        _accepted(
            "overwrite_output_dir",
            "checkpoints of an earlier run are always moved aside, never overwritten",
            default=False,
            quiet=True,
        ),
        _accepted(
            "enable_jit_checkpoint", "SIGTERM, SIGINT, SIGHUP and SIGUSR1 always save a checkpoint before the run ends"
        ),
        _accepted("accelerator_config", "etude cuts and deals the batches itself and duplicates no sample to even out"),
        _accepted("ddp_find_unused_parameters", _ONE_REDUCTION),
        _accepted("ddp_bucket_cap_mb", _ONE_REDUCTION),
        _accepted("ddp_broadcast_buffers", _ONE_REDUCTION),
        _accepted("ddp_static_graph", _ONE_REDUCTION),
        _accepted("ddp_backend", "the backend follows the device: nccl on GPUs, gloo on CPUs"),
        _accepted("ddp_timeout", "the time limit of collectives is that of the process group"),
        _accepted("debug", "a non-finite loss or gradient norm stops the run and names the step and its rows"),
        _accepted("local_rank", "the place of a process comes from torch.distributed", quiet=True),
        _accepted("fsdp_config", "it is only read together with `fsdp`, which is refused", quiet=True),
        _accepted("hub_token", _NOTHING_PUSHED, quiet=True),
        _accepted("hub_private_repo", _NOTHING_PUSHED, quiet=True),
        _accepted("hub_model_id", _NOTHING_PUSHED, quiet=True),
        _accepted("hub_strategy", _NOTHING_PUSHED, quiet=True),
        _accepted("hub_always_push", _NOTHING_PUSHED, quiet=True),
        _accepted("hub_revision", _NOTHING_PUSHED, quiet=True),
        _refused("push_to_hub", "etude contacts no network while it trains; save locally, then `hf upload`"),
        _refused("optim_target_modules", "only GaLore and APOLLO read it, and these train whole weights, not adapters"),
        _refused("fsdp", "sharding the base model over processes is not supported; leave it out"),
        _refused("deepspeed", "DeepSpeed is not supported; leave it out (an adapter's optimizer state is small)"),
        _refused("parallelism_config", "tensor, context and sequence parallelism are not supported; leave it out"),
    )
}

OLD_NAMES: Final[dict[str, ArgumentName]] = {
    row.name: row
    for row in (
        _alias("evaluation_strategy", "eval_strategy"),
        _alias("no_cuda", "use_cpu"),
        _alias("per_gpu_train_batch_size", "per_device_train_batch_size"),
        _alias("per_gpu_eval_batch_size", "per_device_eval_batch_size"),
        _alias("push_to_hub_token", "hub_token"),
        _alias("push_to_hub_model_id", "hub_model_id"),
        _alias("torchdynamo", "torch_compile_backend"),
        _alias("split_batches", "accelerator_config.split_batches"),
        _alias("dispatch_batches", "accelerator_config.dispatch_batches"),
        _flag("group_by_length", "train_sampling_strategy", "group_by_length"),
        _flag("adafactor", "optim", "adafactor"),
        ArgumentName(
            "include_inputs_for_metrics",
            "alias",
            "becomes `include_for_metrics=['inputs']`",
            "include_for_metrics",
            write=lambda on: ["inputs"] if on else UNSET,
            read=lambda parts: "inputs" in (parts or ()),
            default=False,
        ),
        ArgumentName(
            "include_tokens_per_second",
            "alias",
            "becomes `include_num_input_tokens_seen='all'`",
            "include_num_input_tokens_seen",
            write=lambda on: "all" if on else UNSET,
            read=lambda counted: counted not in ("no", False, None),
            default=False,
        ),
        _accepted("save_safetensors", "adapters are always written as safetensors", default=True),
        _accepted("use_mps_device", "an Apple GPU is used where there is one", default=False, quiet=True),
        _accepted("fp16_backend", "mixed precision is always that of torch.amp", default="auto"),
        _accepted("half_precision_backend", "mixed precision is always that of torch.amp", default="auto"),
        _accepted("fp16_opt_level", "mixed precision is always that of torch.amp", default="O1"),
        _accepted("jit_mode_eval", "evaluation runs the model as it is", default=False),
        _accepted("use_ipex", "Intel's extension is not used; torch's own CPU kernels are", default=False),
        _accepted("use_legacy_prediction_loop", "there is one evaluation loop", default=False),
        _accepted("tpu_num_cores", "training runs on GPUs and CPUs"),
        _accepted("tpu_metrics_debug", "training runs on GPUs and CPUs", default=False),
        _accepted("ray_scope", "hyper-parameter search does not go through Ray", default="last"),
        _accepted("mp_parameters", "SageMaker's model parallelism is not used", default=""),
        _accepted("fsdp_min_num_params", "it is only read together with `fsdp`, which is refused", default=0),
        _accepted("fsdp_transformer_layer_cls_to_wrap", "it is only read together with `fsdp`, which is refused"),
        _accepted("push_to_hub_organization", _NOTHING_PUSHED, quiet=True),
        _accepted("_n_gpu", "the devices are counted", target="n_gpu", default=-1, quiet=True),
        _refused("past_index", "no state of the model is carried from one batch to the next; leave it out", default=-1),
        _refused("tp_size", "tensor parallelism is not supported; leave it out", default=0),
    )
}


# One process and the sample order of etude make all of these moot; the values are transformers' defaults.
ACCELERATOR_DEFAULTS: Final[dict[str, Any]] = {
    "split_batches": False,
    "dispatch_batches": None,
    "even_batches": True,
    "use_seedable_sampler": True,
    "non_blocking": False,
    "gradient_accumulation_kwargs": None,
    "use_configured_state": False,
}


def asks_for_something(name: str, value: Any, default: Any) -> bool:
    """Whether `value` departs from `default`. Two empty values (None, False, "", {}) ask for the same: nothing."""
    if isinstance(value, Enum):
        value = value.value
    if name == "accelerator_config" and isinstance(value, Mapping):
        return any(setting != ACCELERATOR_DEFAULTS.get(key) for key, setting in value.items())
    if name == "torch_compile_backend" and value == "inductor":
        return False  # the one that is used
    return bool(value) != bool(default) or (bool(value) and bool(value != default))


def ignored(row: ArgumentName, value: Any) -> str:
    """The warning for an accepted name."""
    return f"{row.name}={value!r} has no effect in etude: {row.note}."


def refuse(row: ArgumentName, value: Any) -> ConfigError:
    """The error for a refused name."""
    return ConfigError(f"{value!r} is refused: {row.note}.", field=row.name)


def translate(given: Mapping[str, Any], parameters: Collection[str]) -> Translation:
    """Give every old name in `given` its new one. Names in `parameters` are fields and stay as they are.

    Raises:
        ConfigError: a refused old name, or an old and a new name that say different things.
    """
    result = Translation({name: value for name, value in given.items() if name in parameters or name not in OLD_NAMES})
    for name, value in given.items():
        if name in result.settings:
            continue
        row = OLD_NAMES[name]
        if row.kind == "alias":
            require_agreement(row, given)
            _write(row, value, result.settings)
            continue
        if asks_for_something(name, value, row.default):
            if row.kind == "refused":
                raise refuse(row, value)
            if not row.quiet:
                result.warnings.append(ignored(row, value))
        if row.target is None:
            result.leftovers[name] = value
    return result


def require_agreement(row: ArgumentName, given: Mapping[str, Any]) -> None:
    """Refuse an old and a new name that are both given and say different things; None says nothing.

    Raises:
        ConfigError: names both.
    """
    target, _, key = (row.target or "").partition(".")
    value, now = given.get(row.name), given.get(target)
    if key:
        now = now.get(key) if isinstance(now, Mapping) else None
    if now is not None and value is not None and row.read(now) != value:
        raise ConfigError(
            f"{value!r} contradicts {row.target}={now!r}; they are two names of one setting, keep one.", field=row.name
        )


def _write(row: ArgumentName, value: Any, settings: dict[str, Any]) -> None:
    """Store `value` under the new name, unless it asks for nothing or the new name was given too (and agrees)."""
    new_value = UNSET if value is None else row.write(value)
    target, _, key = (row.target or "").partition(".")
    if new_value is UNSET:
        return
    if not key:
        settings.setdefault(target, new_value)
    elif not isinstance(settings.get(target) or {}, Mapping):
        raise ConfigError(f"put it into {target}, which was given as well and is not a dictionary.", field=row.name)
    else:
        settings[target] = {key: new_value, **(settings.get(target) or {})}
