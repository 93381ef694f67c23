"""How good the adapters are: etude's defaults beside `transformers.Trainer` + PEFT, sentences from data, Gemma 3 270M.

    python -m benchmarks.quality --data e2e_test.txt --json quality.json
    python -m benchmarks.quality --score-only quality.json

The data is a text file of lines `meaning||sentence`, several sentences to a meaning. No meaning is both trained on and
asked for. Every contender sees the same rows as often and in the same order, in a process of its own; then its adapter
is loaded from its folder, by the same code for all, and answers greedily. BLEU is of all answers together, ROUGE-L the
mean of each answer's, both against all sentences of the meaning. Scores need sacrebleu and rouge-score: without them
the answers are kept, and `--score-only` scores them elsewhere.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

BATCH_SIZE = 16
MOST_SPLITS = 10_000
ETUDE = "etude"
PATHS = ("model", "data", "output")
SCORES = ("bleu", "rouge_l", "exact_match")


class Peer(NamedTuple):
    """What a user of `transformers.Trainer` + PEFT chooses; everything else has its default there."""

    learning_rate: float
    lora: dict[str, Any]


# peft's own alpha is 8, whatever the rank; twice the rank is what many recipes write.
RANK = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
PEERS = {
    "transformers-5e-5": Peer(5e-5, RANK),
    "transformers-2e-4": Peer(2e-4, RANK),
    "transformers-5e-4": Peer(5e-4, RANK),
    "transformers-1e-3": Peer(1e-3, RANK),
    "transformers-alpha32-5e-5": Peer(5e-5, RANK | {"lora_alpha": 32}),
    "transformers-alpha32-2e-4": Peer(2e-4, RANK | {"lora_alpha": 32}),
    "transformers-alpha32-5e-4": Peer(5e-4, RANK | {"lora_alpha": 32}),
}
DEFAULT_CONTENDERS = (ETUDE, "transformers-5e-5", "transformers-2e-4", "transformers-5e-4")

References = dict[str, list[str]]


@dataclass(frozen=True)
class Split:
    """Pairs to train on, and held-out meanings with all their sentences. `seed` drew the order of the meanings."""

    pairs: list[tuple[str, str]]
    held_out: References
    seed: int

    def summary(self) -> dict[str, int]:
        return {
            "seed": self.seed,
            "train_pairs": len(self.pairs),
            "train_meanings": len({meaning for meaning, _ in self.pairs}),
            "held_out_pairs": sum(map(len, self.held_out.values())),
            "held_out_meanings": len(self.held_out),
        }


class Trained(NamedTuple):
    """An adapter in its folder, and what it took. `tokens` are those that were learned from, padding not counted."""

    folder: Path
    settings: dict[str, Any]
    steps: int
    tokens: int
    losses: list[float]


def read_pairs(path: Path) -> References:
    """Meaning -> its sentences, in the order of the file."""
    references: References = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        meaning, separator, sentence = (part.strip() for part in line.partition("||"))
        if not (meaning and separator and sentence):
            raise SystemExit(f"{path}:{number}: expected meaning||sentence, got {line[:60]!r}")
        references.setdefault(meaning, []).append(sentence)
    return references


def split(references: References, num_rows: int, num_meanings: int) -> Split:
    """Hold out `num_meanings` meanings, and train on `num_rows` pairs of the others.

    The first seed that leaves enough pairs is taken: where the two numbers use up the file, few draws do.
    """
    for seed in range(MOST_SPLITS):
        order = sorted(references)
        random.Random(seed).shuffle(order)
        pairs = [(meaning, sentence) for meaning in order[num_meanings:] for sentence in references[meaning]]
        if len(pairs) >= num_rows:
            return Split(pairs[:num_rows], {meaning: references[meaning] for meaning in order[:num_meanings]}, seed)
    total = sum(map(len, references.values()))
    raise SystemExit(f"{total} pairs of {len(references)} meanings leave no {num_rows} besides {num_meanings} meanings")


def row_of(meaning: str, sentence: str) -> dict[str, str]:
    return {"prompt": f"Meaning: {meaning}\nText:", "completion": f" {sentence}"}


def train_with_etude(model: Path, rows: Path, folder: Path, *, epochs: float, seed: int) -> Trained:
    """`etude train` with its defaults, except that no row is held out: the contenders learn from the same ones."""
    from etude.cli.adapted import run_settings
    from etude.cli.main import main as etude

    words = ["train", "--model", str(model), "--data", str(rows), "--output", str(folder), "--eval-fraction", "0"]
    if etude([*words, "--num-train-epochs", str(epochs), "--seed", str(seed), "--debug"]) != 0:
        raise SystemExit("etude train failed")
    newest = max(folder.glob("checkpoint-*"), key=lambda checkpoint: int(checkpoint.name.rpartition("-")[2]))
    state = json.loads((newest / "trainer_state.json").read_text(encoding="utf-8"))
    encoded = encoded_rows(rows, model)
    return Trained(
        folder=folder,
        settings={key: value for key, value in run_settings(folder).items() if key not in PATHS},
        steps=state["global_step"],
        tokens=round(epochs * encoded.statistics.tokens),
        losses=[entry["loss"] for entry in state["log_history"] if "loss" in entry],
    )


def train_with_transformers(
    model: Path, rows: Path, folder: Path, *, epochs: float, seed: int, peer: Peer
) -> Trained:  # fmt: skip
    """What a script of the usual kind does; only the batch size, the rows and their tokens are those of etude."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    from etude import precision

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    has_bfloat16 = precision.multiplies_bfloat16(device)  # as `etude train` decides
    settings: dict[str, Any] = {
        "per_device_train_batch_size": BATCH_SIZE,
        "num_train_epochs": epochs,
        "learning_rate": peer.learning_rate,
        "lr_scheduler_type": "linear",
        "bf16": has_bfloat16,
        "use_cpu": not torch.cuda.is_available(),
        "logging_steps": 10,
        "logging_first_step": True,
        "save_strategy": "no",
        "seed": seed,
    }
    encoded = encoded_rows(rows, model)
    set_seed(seed)
    dtype = torch.bfloat16 if has_bfloat16 else torch.float32
    base = AutoModelForCausalLM.from_pretrained(model, dtype=dtype, local_files_only=True)
    trainer = Trainer(
        model=get_peft_model(base, LoraConfig(**peer.lora)),
        args=TrainingArguments(output_dir=str(folder), report_to="none", disable_tqdm=True, **settings),
        train_dataset=encoded,
        data_collator=DataCollatorForSeq2Seq(AutoTokenizer.from_pretrained(model, local_files_only=True)),
    )
    trainer.train()
    trainer.save_model(str(folder))
    return Trained(
        folder=folder,
        settings=settings | {"lora": peer.lora},
        steps=trainer.state.global_step,
        tokens=round(epochs * encoded.statistics.tokens),
        losses=[entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    )


def encoded_rows(rows: Path, model: Path) -> Any:
    """Tokens and labels as etude reads the rows: only the sentence and the end token are learned."""
    from transformers import AutoTokenizer

    from etude.data import encode_rows, read_rows

    return encode_rows(read_rows(str(rows)), AutoTokenizer.from_pretrained(model, local_files_only=True))


def answers_of(adapter: Path, model: Path, meanings: Sequence[str], *, max_new_tokens: int) -> list[str]:
    """The greedy answer to each meaning, of an adapter as it lies in its folder; its weights are not merged."""
    from etude.cli.adapted import load_adapted
    from etude.cli.generate import continued
    from etude.cli.voice import ANSWER, Voice

    adapted = load_adapted(str(adapter), base=str(model))
    voice = Voice(adapted.tokenizer, format="prompt_completion", template=None)
    prompts = voice.prompts([row_of(meaning, ANSWER) for meaning in meanings], "prompt_completion")
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "batch_size": len(prompts), "merge": False}
    return [text.strip() for text in continued(adapted.model, voice, prompts, **options)]


def run_once(contender: str, seed: int, task: Split, model: Path, folder: Path, args: argparse.Namespace) -> Any:
    """Train one contender from the start and ask it."""
    shutil.rmtree(folder, ignore_errors=True)  # an earlier run would be gone on with
    folder.mkdir(parents=True)
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row_of(*pair)) + "\n" for pair in task.pairs), encoding="utf-8")
    adapter = folder / "adapter"
    options: dict[str, Any] = {"epochs": args.epochs, "seed": seed}
    started = time.perf_counter()
    if contender == ETUDE:
        trained = train_with_etude(model, rows, adapter, **options)
    else:
        trained = train_with_transformers(model, rows, adapter, peer=PEERS[contender], **options)
    trained_at = time.perf_counter()
    answers = answers_of(adapter, model, list(task.held_out), max_new_tokens=args.max_new_tokens)
    return {
        "contender": contender,
        "seed": seed,
        "settings": trained.settings,
        "steps": trained.steps,
        "tokens": trained.tokens,
        "losses": trained.losses,
        "seconds": {"training": trained_at - started, "answers": time.perf_counter() - trained_at},
        "answers": answers,
    }


def score(report: dict[str, Any]) -> None:
    """Put the scores, in percent, beside the answers of every run."""
    from etude.cli.evaluate import Answer, Scorers

    scorers = Scorers(("bleu", "rouge", "exact"))
    for run in report["runs"]:
        pairs = zip(run["answers"], report["held_out"].values(), strict=True)
        run["scores"] = scorers.scores([Answer(said, references) for said, references in pairs])


def table(report: Mapping[str, Any]) -> str:
    """One line a contender, means over its seeds; below it, what etude is ahead of the best of the others."""
    by_name: dict[str, list[Any]] = {}
    for run in report["runs"]:
        by_name.setdefault(run["contender"], []).append(run)
    width = max(map(len, by_name), default=0)
    lines = [f"{'':{width}} seeds   steps    tokens  last loss    BLEU  ROUGE-L  exact"]
    for name, runs in by_name.items():
        loss = statistics.mean(statistics.mean(run["losses"][-5:]) for run in runs)
        line = f"{name:{width}} {len(runs):5} {runs[0]['steps']:7} {runs[0]['tokens']:9} {loss:10.4f}"
        if all("scores" in run for run in runs):
            bleu, rouge, exact = (mean_score(runs, name) for name in SCORES)
            line += f" {bleu:7.2f} {rouge:8.2f} {exact:6.1f}"
        lines.append(line)
    peers = [runs for name, runs in by_name.items() if name != ETUDE]
    if ETUDE in by_name and peers and all("scores" in run for run in report["runs"]):
        ahead = {name: mean_score(by_name[ETUDE], name) - max(mean_score(runs, name) for runs in peers) for name in SCORES[:2]}  # fmt: skip
        lines.append(f"etude to the best of the others: BLEU {ahead['bleu']:+.2f}, ROUGE-L {ahead['rouge_l']:+.2f}")
    return "\n".join(lines)


def mean_score(runs: Sequence[Mapping[str, Any]], name: str) -> float:
    return statistics.mean(run["scores"][name] for run in runs)


def require_equal_work(runs: Sequence[Mapping[str, Any]]) -> None:
    """Raise where one contender learned from more than another."""
    work = {(run["steps"], run["tokens"]) for run in runs}
    if len(work) > 1:
        raise SystemExit(f"the contenders did not do the same work: (steps, tokens) are {sorted(work)}")


def base_model_folder(model: Path | None, workplace: Path) -> Path:
    """The folder of the base model; a GGUF file is unpacked, with the tokenizer that lies beside it or else its own."""
    if model is None:
        from etude.demo.base_model import ensure_base_model

        return ensure_base_model()
    if model.suffix != ".gguf":
        return model
    import torch
    from safetensors.torch import save_file
    from transformers import AutoTokenizer

    from etude.demo.gguf_weights import read_weights

    folder = workplace / "base-model"
    folder.mkdir(parents=True, exist_ok=True)
    weights, config = read_weights(model, torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    source = {} if (model.parent / "tokenizer.json").is_file() else {"gguf_file": model.name}
    AutoTokenizer.from_pretrained(model.parent, local_files_only=True, **source).save_pretrained(folder)
    return folder


def device_name() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="text file of lines meaning||sentence")
    parser.add_argument("--model", type=Path, help="folder or GGUF file; without it, the one of the demo extra")
    parser.add_argument("--output", type=Path, default=Path("build/quality-runs"), help="folder of the adapters")
    parser.add_argument("--json", type=Path, default=Path("quality.json"), help="written after every run")
    parser.add_argument("--contender", nargs="+", default=list(DEFAULT_CONTENDERS), choices=[ETUDE, *PEERS])
    parser.add_argument("--seed", nargs="+", type=int, default=[42], help="one run of each contender for every seed")
    parser.add_argument("--rows", type=int, default=4000, help="pairs to train on")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--meanings", type=int, default=100, help="held-out meanings to put into words")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument(
        "--score-only", nargs="+", type=Path, help="score the answers of earlier runs; the first file is written"
    )
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.data is None and args.score_only is None:
        parser.error("--data is needed, or --score-only")
    return args


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """The runs of several files on one split as one report."""
    first, *others = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    for file, other in zip(files[1:], others, strict=True):
        for key in ("task", "held_out"):
            if other[key] != first[key]:
                raise SystemExit(f"{file} is of another {key} than {files[0]}")
        first["runs"] += other["runs"]
    return dict(first)


def finish(report: dict[str, Any], file: Path) -> None:
    """Score where that is possible, write the file and print the table."""
    require_equal_work(report["runs"])
    try:
        score(report)
    except ImportError as error:
        print(f"not scored: {error}")
    write(report, file)
    print(table(report))


def write(report: Mapping[str, Any], file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    args = arguments()
    if args.score_only:
        finish(merged(args.score_only), args.score_only[0])
        return
    task = split(read_pairs(args.data), args.rows, args.meanings)
    if args.child:
        (seed,) = args.seed
        folder = args.output / f"{args.child}-{seed}"
        write(run_once(args.child, seed, task, args.model, folder, args), args.json)
        return
    model = base_model_folder(args.model, args.output).resolve()
    report: dict[str, Any] = {
        "date": date.today().isoformat(),
        "device": device_name(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("torch", "transformers", "peft")},
        "task": task.summary() | {"epochs": args.epochs, "max_new_tokens": args.max_new_tokens},
        "held_out": task.held_out,
        "runs": [],
    }
    print(json.dumps(report["task"]), flush=True)
    for seed in args.seed:
        for contender in args.contender:
            result = args.output / f"{contender}-{seed}.json"
            shared = [f"--{name.replace('_', '-')}={getattr(args, name)}" for name in ("data", "output", "rows", "epochs", "meanings", "max_new_tokens")]  # fmt: skip
            command = [sys.executable, "-m", "benchmarks.quality", "--child", contender, "--seed", str(seed)]
            subprocess.run([*command, *shared, "--model", str(model), "--json", str(result)], check=True)
            report["runs"].append(json.loads(result.read_text(encoding="utf-8")))
            write(report, args.json)
            print(table(report), flush=True)
    finish(report, args.json)


if __name__ == "__main__":
    main()
