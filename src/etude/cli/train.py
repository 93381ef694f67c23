"""`etude train`: a base model, rows of data and a recipe in; an adapter out."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from etude.errors import ConfigError

if TYPE_CHECKING:
    from etude.arguments import TrainingArguments
    from etude.cli.recipe import Recipe, Settings
    from etude.cli.rows import Rows
    from etude.cli.samples import Samples
    from etude.cli.screen import ScreenTrainer


def train(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="RECIPE.yaml", help="A recipe. --help-arguments lists all that it may set, as flags."),
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="M", help="Folder or Hub name of the base model.")] = None,
    data: Annotated[str | None, typer.Option(metavar="D", help="File or folder of rows, or hub:OWNER/NAME.")] = None,
    output: Annotated[str | None, typer.Option(metavar="O", help="Folder of the run. [lora-output]")] = None,
    lora_r: Annotated[str | None, typer.Option(metavar="N", help="Rank of the adapter. [32]")] = None,
    lora_alpha: Annotated[str | None, typer.Option(metavar="X", help="Its scale is alpha / r. [32]")] = None,
    lora_dropout: Annotated[str | None, typer.Option(metavar="P", help="Dropout before the adapter. [0]")] = None,
    lora_targets: Annotated[str | None, typer.Option(metavar="T", help="all-linear, or q_proj,v_proj.")] = None,
    eval_data: Annotated[str | None, typer.Option(metavar="D", help="File of held-out rows.")] = None,
    eval_fraction: Annotated[str | None, typer.Option(metavar="P", help="Share held out by hash. [0.05]")] = None,
    streaming: Annotated[bool, typer.Option("--streaming", help="Read rows while training.")] = False,
    samples: Annotated[str | None, typer.Option(metavar="N", help="Prompts answered on the way. [3]")] = None,
    max_length: Annotated[str | None, typer.Option(metavar="N", help="Longest sample in tokens.")] = None,
    global_batch_size: Annotated[str | None, typer.Option(metavar="N", help="Rows per update. [16]")] = None,
    assignments: Annotated[
        list[str] | None, typer.Option("--set", metavar="a.b=c", help="Any setting of a recipe; may be repeated.")
    ] = None,
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            "--resume-from-checkpoint",
            metavar="auto|PATH|none",
            help="Where to start.",
            show_default="auto",
        ),
    ] = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, train nothing.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Compare one step's gradient with stock peft.")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Execute code that comes with the model.")
    ] = False,
    help_arguments: Annotated[
        bool, typer.Option("--help-arguments", help="List every setting as a flag, and exit.")
    ] = False,
) -> None:
    """Fine-tune a language model with LoRA.

    Flags win over the recipe, the recipe over the defaults. The settings that
    were used are kept in O/recipe.yaml, and running that repeats the run.

    \b
      etude train --model ./base --data rows.jsonl --output ./run
      etude train recipe.yaml --learning-rate 1e-4 --max-steps 200
    """
    from etude.cli.flags import describe_arguments

    if help_arguments:
        typer.echo(describe_arguments())
        return
    own = {
        "model": model,
        "data": data,
        "output": output,
        "lora.r": lora_r,
        "lora.alpha": lora_alpha,
        "lora.dropout": lora_dropout,
        "lora.targets": lora_targets,
        "eval_data": eval_data,
        "eval_fraction": eval_fraction,
        "streaming": "true" if streaming else None,
        "samples": samples,
        "max_length": max_length,
        "global_batch_size": global_batch_size,
    }
    settings = gather(words or [], {key: text for key, text in own.items() if text is not None}, assignments or [])
    run(settings, resume=resume, dry_run=dry_run, check=check, trust_remote_code=trust_remote_code)


def gather(words: list[str], own: Mapping[str, str], assignments: list[str]) -> Settings:
    """The settings of a command line over those of its recipe file.

    Raises:
        ConfigError: a name that does not exist, or a file that is no recipe.
    """
    from etude.cli import recipe
    from etude.cli.flags import read_words, spelled

    recipe_file, settings = read_words(words)
    settings = settings | {key: recipe.typed(text, spelled(key)) for key, text in own.items()}
    if recipe_file is not None:
        settings = recipe.read(recipe_file) | settings
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"expected a.b=c, got '{assignment}'", field="--set")
        settings = recipe.assign(settings, path.strip().replace("-", "_"), text)
    return settings


class Prepared(NamedTuple):
    """A run that is ready to start; `recipe` holds every setting it was resolved to."""

    recipe: Recipe
    args: TrainingArguments
    model: Any
    tokenizer: Any
    rows: Rows
    samples: Samples


def run(settings: Settings, *, resume: str, dry_run: bool, check: bool = False, trust_remote_code: bool) -> None:
    """Check the settings, show what they resolve to, and train.

    Raises:
        EtudeError: naming the setting, file, row or step that is wrong.
    """
    from etude.cli import recipe
    from etude.cli.rows import require_sources, require_streamable
    from etude.collection import paused

    chosen = recipe.build(settings)
    # Wrong values are answered now, before seconds go into imports and minutes into loading.
    training_arguments(chosen.training, chosen.output, settings)
    start = starting_point(resume, Path(chosen.output))
    for key in ("data", "eval_data"):
        require_sources(key, getattr(chosen, key))
    require_streamable(chosen, settings)
    if chosen.sample_prompts is not None:
        from etude.cli.samples import read_given

        read_given(chosen.sample_prompts)

    with paused():
        prepared = prepare(chosen, settings, trust_remote_code=trust_remote_code)
        trainer = build_trainer(prepared)
    is_first_process = int(os.environ.get("RANK", "0")) == 0
    if check:
        is_rounded = prepared.args.bf16 or prepared.args.fp16
        found = trainer.check(reference_dtype="float32" if is_rounded else None)
        typer.echo(found.describe())
        raise typer.Exit(0 if found.is_fine else 1)
    if not dry_run:
        execute(prepared, trainer, start, is_first_process=is_first_process)
    elif is_first_process:
        from etude.cli.screen import show_without_training

        typer.echo(resolution(prepared, settings))
        show_without_training(trainer)
        typer.echo("dry run: everything above was checked; nothing was trained, and no output written")


def training_arguments(training: Mapping[str, Any], output: str, settings: Settings) -> TrainingArguments:
    """`TrainingArguments`, whose errors also say where the wrong value was set."""
    from etude.arguments import TrainingArguments

    try:
        return TrainingArguments(output_dir=output, **training)
    except ConfigError as error:
        said = settings.get(error.field or "")
        if said is None:
            raise
        located = ConfigError(f"{str(error).rstrip('.')} ({said.origin})")
        located.field = error.field
        raise located from error


def starting_point(resume: str, output: Path) -> str | bool:
    """What `Trainer.train` gets as `resume_from_checkpoint`.

    Raises:
        ConfigError: a checkpoint that does not exist, or `none` where the checkpoints of another run would be mixed in.
    """
    if resume == "auto":
        return "auto"
    if resume != "none":
        if not Path(resume).is_dir():
            raise ConfigError(f"'{resume}' is no folder; give a checkpoint, auto or none", field="--resume")
        return resume
    earlier = sorted(path.name for path in output.glob("checkpoint-*"))
    if earlier:
        raise ConfigError(
            f"'none' starts afresh, but {output} holds {earlier[-1]} of an earlier run; name another --output",
            field="--resume",
        )
    return False


def prepare(chosen: Recipe, settings: Settings, *, trust_remote_code: bool) -> Prepared:
    """Load the rows and the model, fill in the defaults, and attach the adapter."""
    import torch
    from transformers import set_seed

    from etude.cli.defaults import Facts, training_settings
    from etude.cli.display import bars_for_people_only
    from etude.cli.kept_rows import KeptRows
    from etude.cli.rows import build_samples, encode_sets, read_sets
    from etude.cli.voice import use_template
    from etude.model.load import attach_lora, load_base_model
    from etude.precision import multiplies_bfloat16

    bars_for_people_only()
    kept = KeptRows(chosen)
    sets = None if kept.are_likely() else read_sets(chosen)  # what is wrong with a row is said before a model is loaded
    said = training_arguments(chosen.training, chosen.output, settings)
    has_gpu = torch.cuda.is_available() and not said.use_cpu
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_gpu else torch.device("cpu")
    has_bfloat16 = multiplies_bfloat16(device)
    computes_in_bfloat16 = said.bf16 or (has_bfloat16 and not said.fp16 and "bf16" not in chosen.training)
    model, tokenizer = load_base_model(
        absolute(chosen.model),  # the adapter records it, and is to find it from every folder
        dtype="bfloat16" if computes_in_bfloat16 else "float16" if said.fp16 and has_gpu else "float32",
        device=device,
        trust_remote_code=trust_remote_code,
        gguf_file=chosen.gguf_file,
        quantization=chosen.quantization,
    )
    text_config = model.config.get_text_config()
    limit = chosen.max_length or getattr(text_config, "max_position_embeddings", None)
    options: dict[str, Any] = {"max_length": limit, "train_on": chosen.train_on, "on_bad_row": chosen.on_bad_row}
    options["template"] = use_template(tokenizer, chosen.template)
    rows = kept.load(tokenizer, options)
    if rows is None:
        started = time.monotonic()
        rows = encode_sets(chosen, *(sets or read_sets(chosen)), tokenizer, **options)
        kept.store(rows, tokenizer, options, time.monotonic() - started)
    elif int(os.environ.get("RANK", "0")) == 0:
        typer.echo("tokens    of an earlier run on the same rows; --no-keep-tokens makes them anew")
    samples = build_samples(chosen, tokenizer, rows)

    facts = Facts(
        num_processes=int(os.environ.get("WORLD_SIZE", "1")),
        has_bfloat16=has_bfloat16,
        num_eval_rows=len(rows.evaluation) if rows.evaluation is not None else 0,
        model_type=str(model.config.model_type),
        hidden_size=getattr(text_config, "hidden_size", None),
        num_train_rows=rows.num_read,
    )
    training = training_settings(chosen, facts)
    args = training_arguments(training, chosen.output, settings)
    set_seed(args.seed)  # the adapter's start depends on it
    adapted = attach_lora(
        model, chosen.lora.r, chosen.lora.alpha, chosen.lora.dropout, chosen.lora.targets, use_dora=chosen.lora.dora
    )
    # The global batch is what a repetition keeps, on however many processes; how it was dealt follows from it.
    dealt = {"per_device_train_batch_size", "gradient_accumulation_steps"} - chosen.training.keys()
    resolved = replace(
        chosen,
        max_length=limit,
        format=rows.format,
        eval_fraction=0.0 if chosen.streaming else chosen.eval_fraction,
        global_batch_size=args.per_device_train_batch_size * args.gradient_accumulation_steps * facts.num_processes,
        training={key: value for key, value in training.items() if key not in dealt},
        **absolute_paths(chosen),
    )
    return Prepared(resolved, args, adapted, tokenizer, rows, samples)


def absolute(path: str) -> str:
    """A path as it is found from every folder; what is no path, such as a Hub name, stays as it is."""
    found = Path(path).expanduser()
    return str(found.resolve()) if found.exists() else path


def absolute_paths(chosen: Recipe) -> dict[str, Any]:
    """The paths of a recipe as they are found from every folder; Hub names stay names."""
    from etude.cli.sources import with_paths

    paths: dict[str, Any] = {"output": str(Path(chosen.output).resolve()), "model": absolute(chosen.model)}
    for key in ("data", "eval_data"):
        sources = getattr(chosen, key)
        paths[key] = with_paths(sources, absolute)
    if isinstance(chosen.sample_prompts, str):
        paths["sample_prompts"] = absolute(chosen.sample_prompts)
    return paths | ({"template": absolute(chosen.template)} if chosen.template else {})


def all_settings(recipe: Recipe) -> dict[str, Any]:
    """Every setting of a recipe that has a value, those of the adapter as `lora.r`; no tokens."""
    values = {item.name: getattr(recipe, item.name) for item in fields(recipe) if item.name not in ("lora", "training")}
    values |= {f"lora.{item.name}": getattr(recipe.lora, item.name) for item in fields(recipe.lora)}
    values |= dict(sorted(recipe.training.items()))
    return {key: value for key, value in values.items() if value is not None and not key.endswith("token")}


def resolution(prepared: Prepared, settings: Settings) -> str:
    """What the run was resolved to: every setting with who chose it."""
    from etude.cli.recipe import as_yaml

    shown = all_settings(prepared.recipe)
    width = max(map(len, shown))
    origins = {"format": "found in the data"} | {key: setting.origin for key, setting in settings.items()}
    lines = [f"{key:<{width}}  {as_yaml(value)}  ({origins.get(key, 'default')})" for key, value in shown.items()]
    return "\n".join(lines) + "\n"


def build_trainer(prepared: Prepared) -> ScreenTrainer:
    """The trainer of a run, which shows the start screen."""
    from etude.callbacks import EarlyStoppingCallback
    from etude.cli.screen import ScreenTrainer
    from etude.data import CausalLMCollator

    recipe, args = prepared.recipe, prepared.args
    callbacks: list[Any] = [prepared.samples]
    if recipe.early_stopping_patience and args.load_best_model_at_end:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=recipe.early_stopping_patience))
    trainer = ScreenTrainer(
        model=prepared.model,
        args=args,
        data_collator=CausalLMCollator(prepared.tokenizer),
        train_dataset=prepared.rows.train,
        eval_dataset=prepared.rows.evaluation,
        processing_class=prepared.tokenizer,
        callbacks=callbacks,
    )
    trainer.max_length = recipe.max_length
    prepared.samples.trainer = trainer
    return trainer


def execute(prepared: Prepared, trainer: ScreenTrainer, start: str | bool, *, is_first_process: bool) -> None:
    """Train, keep the best adapter in the output folder with its report, and say how it went.

    A run that is stopped or fails leaves a report as well.
    """
    from etude.cli.recipe import RECIPE_NAME, save
    from etude.cli.screen import finish, finish_early

    recipe, samples = prepared.recipe, prepared.samples
    if is_first_process:
        Path(recipe.output).mkdir(parents=True, exist_ok=True)
        save(recipe, Path(recipe.output))
    try:
        result = trainer.train(resume_from_checkpoint=start)
    except (Exception, SystemExit, KeyboardInterrupt) as error:
        if is_first_process:
            command = f"etude train {shlex.quote(str(Path(recipe.output) / RECIPE_NAME))}"
            report = finish_early(trainer, samples.finish(is_final=False), all_settings(recipe), error, command)
            if report is not None:
                typer.echo(f"report:  {report}", err=True)
        raise
    trainer.save_model()
    if is_first_process:
        report = finish(trainer, samples.finish(is_final=True), all_settings(recipe))
        typer.echo(
            f"trained {result.global_step} steps, mean training loss {result.training_loss:.4f}\n"
            f"adapter: {recipe.output}\n"
            f"report:  {report}"
        )
