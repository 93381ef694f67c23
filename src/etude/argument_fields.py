"""The fields of `TrainingArguments`: one declaration each, with its default, meaning and unit."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any, Literal

from etude.argument_checks import IntervalStrategy, SaveStrategy

LOG_LEVELS = {
    "detail": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
    "passive": None,  # as transformers' own logger is set
}


def _help(text: str, **parser_options: Any) -> dict[str, Any]:
    """A field's metadata; `HfArgumentParser` hands all of it to argparse."""
    return {"help": text, **parser_options}


def _formerly(*names: str) -> list[str]:
    """Command-line spellings of old names that only were renamed."""
    return [f"--{spelling}" for name in names for spelling in dict.fromkeys((name, name.replace("_", "-")))]


@dataclass(repr=False)
class ArgumentFields:
    """Every setting of a run. `TrainingArguments` adds what they mean together: checks, old names, properties."""

    # Where a union names `str | None` first: HfArgumentParser takes the type of a command-line value from there.

    # Output, duration, batch
    output_dir: str | None = field(
        default=None, metadata=_help("Folder for checkpoints and results; 'trainer_output' if not given.")
    )
    per_device_train_batch_size: int = field(
        default=8,
        metadata=_help(
            "Training samples per accumulation step and process.", aliases=_formerly("per_gpu_train_batch_size")
        ),
    )
    num_train_epochs: float = field(
        default=3.0, metadata=_help("Passes over the training data; a fraction ends the last one early.")
    )
    max_steps: int = field(
        default=-1, metadata=_help("Optimizer steps to train for, instead of num_train_epochs, if positive.")
    )

    # Learning rate and schedule
    learning_rate: float = field(default=5e-5, metadata=_help("Peak learning rate."))
    lr_scheduler_type: str = field(
        default="linear", metadata=_help("Shape of the learning rate over the steps, after warmup.")
    )
    lr_scheduler_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata=_help("Extra options of the schedule (JSON).")
    )
    warmup_steps: float = field(
        default=0,
        metadata=_help("Steps over which the learning rate rises from 0; a value below 1 is a fraction of all steps."),
    )

    # Optimizer
    optim: str = field(default="adamw_torch_fused", metadata=_help("Name of the optimizer."))
    optim_args: str | None = field(
        default=None, metadata=_help("Extra options of the optimizer, as 'name=value,name=value'.")
    )
    weight_decay: float = field(
        default=0.0, metadata=_help("Decoupled weight decay of all trained weights except biases and norms.")
    )
    adam_beta1: float = field(default=0.9, metadata=_help("Decay rate of Adam's mean of gradients."))
    adam_beta2: float = field(default=0.999, metadata=_help("Decay rate of Adam's mean of squared gradients."))
    adam_epsilon: float = field(default=1e-8, metadata=_help("Term added to Adam's denominator."))
    optim_target_modules: str | None | list[str] = field(  # noqa: RUF036
        default=None, metadata=_help("Modules of GaLore and APOLLO; refused.")
    )
    gradient_accumulation_steps: int = field(
        default=1, metadata=_help("Batches that are added up for one optimizer step.")
    )
    average_tokens_across_devices: bool = field(
        default=True, metadata=_help("Divide the loss by the tokens of all processes; always done.")
    )
    max_grad_norm: float = field(
        default=1.0, metadata=_help("Largest norm of the gradient, longer ones are scaled down; 0 turns it off.")
    )

    # Regularisation
    label_smoothing_factor: float = field(
        default=0.0, metadata=_help("Probability spread evenly over all labels, from 0 to 1.")
    )

    # Precision
    bf16: bool = field(default=False, metadata=_help("Train in bfloat16 mixed precision."))
    fp16: bool = field(
        default=False, metadata=_help("Train in float16 mixed precision (bfloat16 where there is no GPU).")
    )
    bf16_full_eval: bool = field(default=False, metadata=_help("Hold the whole model in bfloat16 for evaluation."))
    fp16_full_eval: bool = field(default=False, metadata=_help("Hold the whole model in float16 for evaluation."))
    tf32: bool | None = field(
        default=None, metadata=_help("Allow TF32 in float32 products on a GPU; None leaves torch's setting.")
    )

    # Memory and speed
    activation_checkpointing: bool | None = field(
        default=None,
        metadata=_help(
            "Keep fewer activations and compute them again in the backward pass: less memory, more time.",
            nargs="?",
            const=True,
        ),
    )
    activation_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata=_help("Options of activation checkpointing (JSON).")
    )
    gradient_checkpointing: bool | None = field(
        default=None, metadata=_help("Another name of activation_checkpointing.", nargs="?", const=True)
    )
    gradient_checkpointing_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata=_help("Another name of activation_checkpointing_kwargs.")
    )
    torch_compile: bool = field(
        default=False,
        metadata=_help("True compiles the decoder layers from the first step; if not given, they are where it pays."),
    )
    torch_compile_backend: str | None = field(
        default=None,
        metadata=_help("Asks for torch_compile; 'inductor' is always used.", aliases=_formerly("torchdynamo")),
    )
    torch_compile_mode: str | None = field(
        default=None, metadata=_help("Asks for torch_compile; the mode is always the default one.")
    )
    use_liger_kernel: bool = field(default=False, metadata=_help("No effect: etude has kernels of its own."))
    liger_kernel_config: dict[str, bool] | None = field(
        default=None, metadata=_help("No effect: etude has kernels of its own.")
    )
    use_cache: bool = field(default=False, metadata=_help("Keep the model's key-value cache on during training."))
    neftune_noise_alpha: float | None = field(
        default=None, metadata=_help("Scale of the NEFTune noise added to input embeddings.")
    )
    torch_empty_cache_steps: int | None = field(
        default=None, metadata=_help("Optimizer steps between two releases of cached GPU memory.")
    )
    auto_find_batch_size: bool = field(
        default=False, metadata=_help("Cut batches smaller when memory runs out; the global batch stays.")
    )

    # Logging
    logging_strategy: IntervalStrategy | str = field(default="steps", metadata=_help("When metrics are logged."))
    logging_steps: float = field(
        default=500, metadata=_help("Optimizer steps between two logs; below 1 a fraction of all steps.")
    )
    logging_first_step: bool = field(default=False, metadata=_help("Log the first step too."))
    log_on_each_node: bool = field(
        default=True, metadata=_help("Let one process of every machine log, not only one in all.")
    )
    logging_nan_inf_filter: bool = field(
        default=True,
        metadata=_help("Leave non-finite losses out of the logged mean; if given, training goes on after one."),
    )
    include_num_input_tokens_seen: str = field(
        default="no",
        metadata=_help(
            "Count the input tokens seen: 'all', 'non_padding' or 'no'.",
            nargs="?",
            const="all",
            aliases=_formerly("include_tokens_per_second"),
        ),
    )
    log_level: str = field(
        default="passive", metadata=_help("Log level of the main process.", choices=list(LOG_LEVELS))
    )
    log_level_replica: str = field(
        default="warning", metadata=_help("Log level of the other processes.", choices=list(LOG_LEVELS))
    )
    disable_tqdm: bool | None = field(
        default=None, metadata=_help("Show no progress bar; by default it follows the log level.")
    )
    report_to: str | None | list[str] = field(  # noqa: RUF036
        default="none",
        metadata=_help(
            "Trackers that receive the logs: names, 'all' or 'none'. In a Kubeflow TrainJob 'kubeflow' is added."
        ),
    )
    run_name: str | None = field(default=None, metadata=_help("Name of the run in the trackers."))
    project: str = field(default="huggingface", metadata=_help("Project of the run in Trackio."))
    trackio_space_id: str | None = field(default=None, metadata=_help("Space that Trackio writes to."))
    trackio_bucket_id: str | None = field(default=None, metadata=_help("Bucket that Trackio writes to."))
    trackio_static_space_id: str | None | Literal[False] = field(  # noqa: RUF036
        default=None, metadata=_help("Static Space that Trackio publishes to.")
    )

    # Evaluation
    eval_strategy: IntervalStrategy | str = field(
        default="no",
        metadata=_help("When the model is evaluated during training.", aliases=_formerly("evaluation_strategy")),
    )
    eval_steps: float | None = field(
        default=None,
        metadata=_help(
            "Optimizer steps between two evaluations, logging_steps if not given; below 1 a fraction of all steps."
        ),
    )
    eval_delay: float = field(
        default=0, metadata=_help("Steps or epochs (as eval_strategy counts) before the first evaluation.")
    )
    per_device_eval_batch_size: int = field(
        default=8,
        metadata=_help("Evaluation samples per batch and process.", aliases=_formerly("per_gpu_eval_batch_size")),
    )
    prediction_loss_only: bool = field(
        default=False, metadata=_help("Return only the loss from evaluation and prediction.")
    )
    eval_on_start: bool = field(default=False, metadata=_help("Evaluate once before the first step."))
    eval_do_concat_batches: bool = field(
        default=True, metadata=_help("Join the batches of predictions into one array.")
    )
    eval_use_gather_object: bool = field(default=False, metadata=_help("No effect: results of any type are gathered."))
    eval_accumulation_steps: int | None = field(
        default=None, metadata=_help("Batches of predictions kept on the GPU before they are moved.")
    )
    include_for_metrics: list[str] = field(
        default_factory=list, metadata=_help("What compute_metrics receives besides: 'inputs', 'loss'.")
    )
    batch_eval_metrics: bool = field(
        default=False, metadata=_help("Call compute_metrics after every batch instead of once.")
    )

    # Checkpoints
    save_only_model: bool = field(
        default=False, metadata=_help("Save the adapter alone; such a checkpoint cannot be resumed from.")
    )
    save_strategy: SaveStrategy | str = field(default="steps", metadata=_help("When a checkpoint is written."))
    save_steps: float = field(
        default=500, metadata=_help("Optimizer steps between two checkpoints; below 1 a fraction of all steps.")
    )
    save_on_each_node: bool = field(
        default=False, metadata=_help("Let one process of every machine save, not only one in all.")
    )
    save_total_limit: int | None = field(
        default=None,
        metadata=_help("Checkpoints kept, older ones are deleted but never the best; None or 0 keeps all."),
    )
    enable_jit_checkpoint: bool = field(default=False, metadata=_help("No effect: a signal always saves a checkpoint."))

    # Hub
    push_to_hub: bool = field(default=False, metadata=_help("Upload the result; refused."))
    hub_token: str | None = field(
        default=None, repr=False, metadata=_help("Not read.", aliases=_formerly("push_to_hub_token"))
    )
    hub_private_repo: bool | None = field(default=None, metadata=_help("Not read."))
    hub_model_id: str | None = field(
        default=None, metadata=_help("Not read.", aliases=_formerly("push_to_hub_model_id"))
    )
    hub_strategy: str = field(default="every_save", metadata=_help("Not read."))
    hub_always_push: bool = field(default=False, metadata=_help("Not read."))
    hub_revision: str | None = field(default=None, metadata=_help("Not read."))

    # Best model
    load_best_model_at_end: bool = field(
        default=False, metadata=_help("Put the best checkpoint's adapter into the model when training ends.")
    )
    metric_for_best_model: str | None = field(
        default=None, metadata=_help("Evaluation metric that says which checkpoint is the best.")
    )
    greater_is_better: bool | None = field(
        default=None, metadata=_help("Whether that metric should rise; by default unless it ends in 'loss'.")
    )

    # Resume and reproducibility
    ignore_data_skip: bool = field(default=False, metadata=_help("Start the data from the beginning when resuming."))
    restore_callback_states_from_checkpoint: bool = field(
        default=False, metadata=_help("Give callbacks their saved settings too, not only their saved state.")
    )
    full_determinism: bool = field(default=False, metadata=_help("Another way to ask for deterministic."))
    seed: int = field(default=42, metadata=_help("Seed of everything random in training."))
    data_seed: int | None = field(default=None, metadata=_help("Seed of the sample order; seed if not given."))
    use_cpu: bool = field(
        default=False, metadata=_help("Train on the CPU even where there is a GPU.", aliases=_formerly("no_cuda"))
    )

    # Taken over from accelerate
    accelerator_config: dict[str, Any] | str | None = field(
        default=None, metadata=_help("No effect: batches are cut and dealt by etude.")
    )
    parallelism_config: Any = field(default=None, metadata=_help("Tensor, context and sequence parallelism; refused."))

    # Data loader
    dataloader_drop_last: bool = field(
        default=False, metadata=_help("Leave out the last batch of an epoch if it is not full.")
    )
    dataloader_num_workers: int = field(
        default=0, metadata=_help("Processes that prepare data; 0 prepares it in the training process.")
    )
    dataloader_pin_memory: bool = field(default=True, metadata=_help("Copy batches through pinned memory."))
    dataloader_persistent_workers: bool = field(
        default=False, metadata=_help("Keep the data processes from one epoch to the next.")
    )
    dataloader_prefetch_factor: int | None = field(
        default=None, metadata=_help("Batches each data process prepares ahead.")
    )
    dataloader_multiprocessing_context: str | None = field(
        default=None, metadata=_help("How data processes start: fork, spawn, forkserver.")
    )
    dataloader_in_order: bool = field(default=True, metadata=_help("Take batches in the order they were asked for."))
    remove_unused_columns: bool = field(
        default=True, metadata=_help("Drop the columns of the data that the model's forward does not take.")
    )
    label_names: list[str] | None = field(default=None, metadata=_help("Names of the inputs that are labels."))
    train_sampling_strategy: str = field(
        default="random", metadata=_help("Order of samples: 'random', 'sequential', 'group_by_length'.")
    )
    length_column_name: str = field(
        default="length", metadata=_help("Column with the sample lengths, for group_by_length.")
    )

    # Several processes
    ddp_find_unused_parameters: bool | None = field(
        default=None, metadata=_help("No effect: gradients are summed without DDP.")
    )
    ddp_bucket_cap_mb: int | None = field(default=None, metadata=_help("No effect: gradients are summed without DDP."))
    ddp_broadcast_buffers: bool | None = field(
        default=None, metadata=_help("No effect: gradients are summed without DDP.")
    )
    ddp_static_graph: bool | None = field(default=None, metadata=_help("No effect: gradients are summed without DDP."))
    ddp_backend: str | None = field(default=None, metadata=_help("No effect: the backend follows the device."))
    ddp_timeout: int = field(
        default=1800, metadata=_help("No effect: the time limit is that of the process group (seconds).")
    )
    fsdp: str | None = field(default=None, metadata=_help("Sharded training; refused."))
    fsdp_config: dict[str, Any] | str | None = field(default=None, metadata=_help("Not read."))
    deepspeed: dict[str, Any] | str | None = field(default=None, metadata=_help("DeepSpeed; refused."))

    # Debugging
    debug: list[str] | str = field(
        default="", metadata=_help("No effect: a non-finite loss always stops and is explained.")
    )
    skip_memory_metrics: bool = field(default=True, metadata=_help("Leave memory use out of the metrics."))

    # For scripts; training does not depend on them
    do_train: bool = field(default=False, metadata=_help("A flag that scripts read."))
    do_eval: bool = field(default=False, metadata=_help("A flag that scripts read; True if eval_strategy is not 'no'."))
    do_predict: bool = field(default=False, metadata=_help("A flag that scripts read."))
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata=_help(
            "Checkpoint to go on from: a folder, True for the newest, 'auto' for the newest if there is one."
        ),
    )
    local_rank: int = field(
        default=-1, metadata=_help("Not read: the place of a process comes from torch.distributed.")
    )

    # Left out by newer versions of transformers
    warmup_ratio: float | None = field(
        default=None, metadata=_help("Warmup as a fraction of all steps, where warmup_steps is 0.")
    )
    logging_dir: str | None = field(
        default=None, metadata=_help("Folder of TensorBoard's files; 'runs' in output_dir if not given.")
    )
    overwrite_output_dir: bool = field(
        default=False, metadata=_help("No effect: checkpoints of an earlier run are moved aside, never overwritten.")
    )

    # Etude's own
    on_nonfinite: str = field(
        default="stop",
        metadata=_help("What to do at a NaN or infinite loss or gradient.", choices=["stop", "continue"]),
    )
    deterministic: bool = field(
        default=False, metadata=_help("Use only deterministic kernels: bit-identical runs on one kind of GPU, slower.")
    )
    hf_checkpoint_files: bool = field(
        default=True, metadata=_help("Also write the files that transformers.Trainer resumes from.")
    )
    save_in_background: bool = field(
        default=True,
        metadata=_help("Write checkpoints of an adapter while training goes on; False waits for every one of them."),
    )
    cuda_graphs: bool | None = field(
        default=None,
        metadata=_help("CUDA graphs for small micro-batches on the fast path; where they pay if not given."),
    )
    tokens_per_micro_batch: int | None = field(
        default=None,
        metadata=_help("Upper bound on token slots of one micro-batch on the fast path; chosen by etude if not given."),
    )
    gpu_memory_limit_gib: float | None = field(
        default=None,
        metadata=_help(
            "GPU memory in GiB that training stays within; micro-batches and what layers keep are planned for it."
        ),
    )
    activation_offloading: bool = field(
        default=False,
        metadata=_help(
            "Experimental: layers of etude's own may keep in pinned host memory what their backward pass needs, where GPU "
            "memory is short."
        ),
    )
    base_precision: str | None = field(
        default=None,
        metadata=_help(
            "'fp8' multiplies the frozen weights of the decoder layers in 8-bit floating point, coarser than in bfloat16; "
            "if not given, in the type the run trains in.",
            choices=["fp8"],
        ),
    )
    fast_path: bool = field(
        default=True, metadata=_help("Train padding-free where the model allows; False always takes the general path.")
    )
