"""Training on a CUDA device: every precision, loss scaling, checkpoints, and a resume with the same bits."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from etude import Trainer, TrainerCallback, TrainingArguments
from etude.errors import NonFiniteError
from etude.model.adapter import read_tensors
from etude.model.graphs import GraphedLoss
from etude.optim.finite import CheckLate
from tiny import Padded, adapter_of, assert_same_bits, language_rows, tiny_llama, with_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning"),
]


def trainer(
    folder: Path, *, wide: bool = False, half: bool = False, lora_dropout: float = 0.0, **settings: Any
) -> Trainer:
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64} if wide else {}
    base = tiny_llama(**shape)
    model = with_lora(base.bfloat16() if half else base, task_type="CAUSAL_LM", lora_dropout=lora_dropout)
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "save_steps": 4,
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "disable_tqdm": True,
    }
    rows = language_rows(40, seed=1, shortest=5, longest=30)
    arguments = TrainingArguments(**(defaults | settings))
    return Trainer(model=model, args=arguments, train_dataset=rows, data_collator=Padded())


def losses(trained: Trainer) -> list[float]:
    return [row["loss"] for row in trained.state.log_history if "loss" in row]


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("fast_path", [True, False], ids=["packed", "general"])
def test_cuda_trains_like_the_cpu(tmp_path: Path, precision: dict[str, bool], fast_path: bool) -> None:
    on_gpu = trainer(tmp_path / "gpu", wide=True, fast_path=fast_path, **precision)
    on_gpu.train()
    on_cpu = trainer(tmp_path / "cpu", wide=True, use_cpu=True, fast_path=False)
    on_cpu.train()
    tolerance = 1e-4 if not precision else 2e-2
    assert losses(on_gpu) == pytest.approx(losses(on_cpu), rel=tolerance)
    assert on_gpu.args.device.type == "cuda"
    if precision and fast_path:
        assert on_gpu.path.name == "packed", on_gpu.path.reasons


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}], ids=["fp32", "bf16", "fp16"])
def test_resume_on_cuda_gives_the_same_bits(tmp_path: Path, precision: dict[str, bool]) -> None:
    whole = trainer(tmp_path / "whole", deterministic=True, **precision)
    whole.train()
    first = trainer(tmp_path / "cut", deterministic=True, **precision)
    first.train()
    again = trainer(tmp_path / "cut", deterministic=True, **precision)
    again.train(resume_from_checkpoint=str(tmp_path / "cut" / "checkpoint-4"))
    assert losses(again) == losses(whole)
    expected = read_tensors(tmp_path / "whole" / "checkpoint-12" / "adapter_model.safetensors")
    found = read_tensors(tmp_path / "cut" / "checkpoint-12" / "adapter_model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_graphs_give_what_the_layers_give_without(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"wide": True, "bf16": True, "max_steps": 24}
    graphed = trainer(tmp_path / "graphed", cuda_graphs=True, **settings)
    counts: list[int] = []

    class CountsGraphs:
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            assert graphed.graphs is not None and graphed.graphs.failure is None
            counts.append(graphed.graphs.num_graphs)

    graphed.add_callback(CountsGraphs())
    graphed.train()
    plain = trainer(tmp_path / "plain", cuda_graphs=False, **settings)
    plain.train()
    assert counts[-1] > 0
    assert losses(graphed) == pytest.approx(losses(plain), rel=2e-3)


class SeesGraphs(TrainerCallback):
    failure: str | None = None
    random: torch.Tensor

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.random = torch.cuda.get_rng_state()
        if self.trainer.graphs is not None:
            self.failure = self.trainer.graphs.failure


def test_a_recording_that_fails_changes_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the random numbers either, which LoRA dropout draws on the device."""
    run = GraphedLoss._run

    def spoiled(self: GraphedLoss, batch: Any) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            torch.randint(2, (1,), device="cuda")
            torch.cuda.synchronize()  # what no recording allows
        return run(self, batch)

    curves, randoms = [], []
    for name, cuda_graphs in (("plain", False), ("spoiled", True)):
        monkeypatch.setattr(GraphedLoss, "_run", spoiled)
        trained = trainer(tmp_path / name, wide=True, bf16=True, lora_dropout=0.1, cuda_graphs=cuda_graphs)
        seen = SeesGraphs(trained)
        trained.add_callback(seen)
        trained.train()
        curves.append(losses(trained))
        randoms.append(seen.random)
        assert (seen.failure is not None) == cuda_graphs
    assert len(curves[1]) == 12
    assert torch.equal(*randoms)
    assert curves[1] == pytest.approx(curves[0], rel=2e-3)
    assert bool(torch.randn(8, device="cuda").isfinite().all())


BAD_STEP = 6
HALF: dict[str, Any] = {"wide": True, "half": True, "bf16": True}


class Spoil(TrainerCallback):
    """Puts a NaN into a frozen weight when a step begins, and remembers the adapter as it was then."""

    adapter: dict[str, torch.Tensor]
    check: Any = None

    def __init__(self, trainer: Trainer, part_of_name: str | None) -> None:
        self.trainer, self.part_of_name = trainer, part_of_name

    @torch.no_grad()
    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == BAD_STEP:
            self.adapter = adapter_of(kwargs["model"])
            self.check = self.trainer._run.gradient.finite_check
            assert self.trainer.path.name == "packed" and len(self.trainer.path.plan.blocks) == 2
            for name, parameter in kwargs["model"].named_parameters():
                if self.part_of_name is not None and self.part_of_name in name:
                    parameter.fill_(math.nan)


def assert_stopped(trained: Trainer, spoil: Spoil) -> NonFiniteError:
    trained.add_callback(spoil)
    with pytest.raises(NonFiniteError) as caught:
        trained.train()
    assert isinstance(spoil.check, CheckLate)
    assert caught.value.step == BAD_STEP and str(caught.value).startswith(f"step {BAD_STEP}")
    assert_same_bits(adapter_of(trained.model), spoil.adapter)
    assert all(math.isfinite(loss) for loss in losses(trained))
    folder = Path(trained.args.output_dir)
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-4"]
    return caught.value


@pytest.mark.parametrize("logging_steps", [1, 100], ids=["logged", "after the next step"])
@pytest.mark.parametrize(
    "settings", [{}, HALF | {"cuda_graphs": False}, HALF | {"cuda_graphs": True}], ids=["fp32", "bf16", "graphs"]
)
@pytest.mark.parametrize("max_steps", [12, BAD_STEP], ids=["midway", "in the last step"])
def test_a_nan_stops_the_run_before_its_update(
    tmp_path: Path, settings: dict[str, Any], logging_steps: int, max_steps: int
) -> None:
    """Whether the answer is read at once or only when the next step has been computed."""
    trained = trainer(tmp_path, logging_steps=logging_steps, max_steps=max_steps, **settings)
    error = assert_stopped(trained, Spoil(trained, "model.norm.weight"))
    assert "the loss is nan" in str(error) and error.micro_batch == 0 and error.rows


def test_a_nan_in_the_gradient_alone(tmp_path: Path) -> None:
    trained = trainer(tmp_path, logging_steps=100, cuda_graphs=False, **HALF)

    def spoil(gradient: torch.Tensor) -> torch.Tensor | None:
        return gradient * math.nan if trained.state.global_step + 1 == BAD_STEP else None

    next(p for name, p in trained.model.named_parameters() if "lora_B" in name).register_hook(spoil)
    assert "the gradient norm is nan" in str(assert_stopped(trained, Spoil(trained, None)))


def test_hooks_on_parameters_are_called(tmp_path: Path) -> None:
    """Those who have some keep autograd's accumulation; the others add to their gradients in place."""
    plain = trainer(tmp_path / "plain", cuda_graphs=False, **HALF)
    plain.train()
    hooked = trainer(tmp_path / "hooked", cuda_graphs=False, **HALF)
    arrived: list[torch.Tensor] = []
    parameter = next(p for name, p in hooked.model.named_parameters() if "k_proj.lora_A" in name)
    parameter.register_post_accumulate_grad_hook(arrived.append)
    hooked.train()
    assert len(arrived) >= 12 and all(tensor is parameter for tensor in arrived)
    assert losses(hooked) == pytest.approx(losses(plain), rel=2e-3)


def test_fp16_overflow_skips_the_step_and_goes_on(tmp_path: Path) -> None:
    trained = trainer(tmp_path, fp16=True)
    trained.train()
    scaler = trained._run.scaler
    assert scaler.tolerates_overflow
    assert scaler.state()["scale"] > 0
    assert all(parameter.isfinite().all() for parameter in trained.model.parameters() if parameter.requires_grad)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_classic_script_on_a_billion_parameters(tmp_path: Path, precision: str) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def build() -> Any:
        torch.manual_seed(0)
        shape = {
            "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True,
        }  # fmt: skip
        with torch.device("cuda"):
            model = LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=0)).to(torch.bfloat16)
        return get_peft_model(model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))

    def classic() -> Trainer:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "lora-output"), num_train_epochs=3, per_device_train_batch_size=4,
            gradient_accumulation_steps=4, learning_rate=2e-4, warmup_ratio=0.03, logging_steps=1,
            evaluation_strategy="epoch", save_strategy="epoch", **{precision: True},
        )  # fmt: skip
        rows = language_rows(48, seed=2, shortest=16, longest=256)
        return Trainer(model=build(), args=arguments, train_dataset=rows, eval_dataset=rows[:8], data_collator=Padded())

    whole = classic()
    output = whole.train()
    assert output.global_step == 9
    assert losses(whole)[-1] < losses(whole)[0]
    whole.model.save_pretrained(str(tmp_path / "final-adapter"))
    again = classic()
    again.train(resume_from_checkpoint=str(tmp_path / "lora-output" / "checkpoint-6"))
    assert losses(again) == pytest.approx(losses(whole), rel=2e-2)


class StepMemory(TrainerCallback):
    """Measures what steps from step 3 on need beside what lies there when step 3 begins."""

    allocated = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            torch.cuda.reset_peak_memory_stats()
            self.allocated = torch.cuda.memory_allocated()

    @property
    def needed_bytes(self) -> int:
        return torch.cuda.max_memory_allocated() - self.allocated


class LessMemory(TrainerCallback):
    """From step 3 on the device has `spare_bytes` beside what lies there when step 3 begins."""

    def __init__(self, spare_bytes: int) -> None:
        self.spare_bytes = spare_bytes
        self.fillers: list[torch.Tensor] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            torch.cuda.empty_cache()
            # What earlier tests have left free between their tensors: those of up to 1 MiB have a pool of their own.
            for size in (2**20, 2**21):
                self.fill(size)
            torch.cuda.empty_cache()
            allowed = torch.cuda.memory_reserved() + self.spare_bytes
            torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.get_device_properties(0).total_memory)

    def fill(self, size: int) -> None:
        reserved = torch.cuda.memory_reserved()
        while torch.cuda.memory_reserved() == reserved:
            self.fillers.append(torch.empty(size, dtype=torch.uint8, device="cuda"))
        self.fillers.pop()


@pytest.mark.parametrize("fast_path", [True, False], ids=["packed", "general"])
def test_a_run_goes_on_where_memory_runs_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fast_path: bool) -> None:
    curves, adapters = [], []
    notices: list[str] = []
    enough = StepMemory()
    for name in ("enough", "less"):
        torch.manual_seed(0)
        base = tiny_llama(hidden_size=512, intermediate_size=1536, head_dim=64, max_position_embeddings=1024)
        trained = Trainer(
            model=with_lora(base.bfloat16(), task_type="CAUSAL_LM"),
            args=TrainingArguments(
                output_dir=str(tmp_path / name), per_device_train_batch_size=32, max_steps=8, logging_steps=1, bf16=True,
                learning_rate=1e-3, save_strategy="no", disable_tqdm=True, fast_path=fast_path, cuda_graphs=False,
            ),
            train_dataset=language_rows(128, seed=1, shortest=800, longest=1000),
            data_collator=Padded(),
        )  # fmt: skip
        if name == "less":
            trained.add_callback(LessMemory(spare_bytes=int(0.6 * enough.needed_bytes)))
            monkeypatch.setattr(trained.notices, "say", notices.append)
        else:
            trained.add_callback(enough)
        try:
            trained.train()
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        curves.append(losses(trained))
        adapters.append(adapter_of(trained.model))
    assert any("out of memory at step 3" in line for line in notices), notices
    assert len(curves[1]) == 8
    assert curves[1] == pytest.approx(curves[0], rel=5e-3)
    assert set(adapters[0]) == set(adapters[1])
