"""etude: train one skill into a language model with LoRA.

Public names are imported on first use, so `import etude` costs neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Trainer": "etude.trainer",
    "TrainingArguments": "etude.arguments",
    "Seq2SeqTrainer": "etude.seq2seq",
    "Seq2SeqTrainingArguments": "etude.seq2seq_arguments",
    "SFTTrainer": "etude.sft",
    "SFTConfig": "etude.sft_config",
    "DataCollatorForCompletionOnlyLM": "etude.data.completion",
    "TrainerCallback": "etude.callbacks",
    "TrainerState": "etude.callbacks",
    "TrainerControl": "etude.callbacks",
    "EarlyStoppingCallback": "etude.callbacks",
    "ProgressCallback": "etude.observe.console",
    "PrinterCallback": "etude.observe.console",
    "TrainOutput": "etude.outputs",
    "StepCheck": "etude.check_report",
    "TensorCheck": "etude.check_report",
    "PredictionOutput": "etude.outputs",
    "EvalPrediction": "etude.outputs",
    "EvalLoopOutput": "etude.outputs",
    "BestRun": "etude.outputs",
    "write_report": "etude.reporting",
    "get_peft_model": "peft",
    "LoraConfig": "peft",
}

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from peft import LoraConfig as LoraConfig
    from peft import get_peft_model as get_peft_model

    from etude.arguments import TrainingArguments as TrainingArguments
    from etude.callbacks import EarlyStoppingCallback as EarlyStoppingCallback
    from etude.callbacks import TrainerCallback as TrainerCallback
    from etude.callbacks import TrainerControl as TrainerControl
    from etude.callbacks import TrainerState as TrainerState
    from etude.check_report import StepCheck as StepCheck
    from etude.check_report import TensorCheck as TensorCheck
    from etude.data.completion import DataCollatorForCompletionOnlyLM as DataCollatorForCompletionOnlyLM
    from etude.observe.console import PrinterCallback as PrinterCallback
    from etude.observe.console import ProgressCallback as ProgressCallback
    from etude.outputs import BestRun as BestRun
    from etude.outputs import EvalLoopOutput as EvalLoopOutput
    from etude.outputs import EvalPrediction as EvalPrediction
    from etude.outputs import PredictionOutput as PredictionOutput
    from etude.outputs import TrainOutput as TrainOutput
    from etude.reporting import write_report as write_report
    from etude.seq2seq import Seq2SeqTrainer as Seq2SeqTrainer
    from etude.seq2seq_arguments import Seq2SeqTrainingArguments as Seq2SeqTrainingArguments
    from etude.sft import SFTTrainer as SFTTrainer
    from etude.sft_config import SFTConfig as SFTConfig
    from etude.trainer import Trainer as Trainer


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'etude' has no attribute {name!r}")
    from etude.collection import paused

    with paused():  # torch and transformers come with most of them
        return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return sorted(__all__)
