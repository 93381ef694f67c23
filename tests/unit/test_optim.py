"""Schedules, groups, optimizers and clipping give what transformers gives."""

from __future__ import annotations

import itertools
import warnings
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    get_scheduler,
)
from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS
from transformers.trainer_pt_utils import get_parameter_names
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames

from etude.errors import ConfigError, MissingDependencyError, ModelError, UnknownArgumentError
from etude.optim import (
    OPTIMIZER_NAMES,
    SCHEDULE_NAMES,
    clip_gradients,
    create_optimizer,
    create_scheduler,
    decay_parameter_names,
    factor,
    optimizer_class_and_kwargs,
    parameter_groups,
)
from etude.optim.optimizers import OPTIMIZERS, NotBuilt

# peft asks a model for the old name of a property that transformers has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")


def arguments(**changes: Any) -> SimpleNamespace:
    defaults = {
        "optim": "adamw_torch",
        "optim_args": None,
        "learning_rate": 2e-4,
        "weight_decay": 0.01,
        "adam_beta1": 0.9,
        "adam_beta2": 0.98,
        "adam_epsilon": 1e-7,
    }
    return SimpleNamespace(**{**defaults, **changes})


def tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            attention_bias=True,
        )
    )  # fmt: skip


def tiny_bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(
        BertConfig(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    )


# ---------------------------------------------------------------- schedules

SCHEDULES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {}),
    ("cosine", {}),
    ("cosine", {"num_cycles": 1.5}),
    ("cosine_with_restarts", {}),
    ("cosine_with_restarts", {"num_cycles": 3}),
    ("polynomial", {}),
    ("polynomial", {"lr_end": 1e-5, "power": 2.0}),
    ("constant", {}),
    ("constant_with_warmup", {}),
    ("inverse_sqrt", {}),
    ("inverse_sqrt", {"timescale": 50}),
    ("cosine_with_min_lr", {"min_lr": 3e-5}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.1, "num_cycles": 1.0}),
    ("cosine_warmup_with_min_lr", {"min_lr_rate": 0.1}),
    ("cosine_warmup_with_min_lr", {"min_lr": 1e-5, "warmup_lr_rate": 0.2}),
    ("warmup_stable_decay", {"num_decay_steps": 20}),
    ("warmup_stable_decay", {"num_decay_steps": 20, "num_stable_steps": 9, "min_lr_ratio": 0.1}),
    *[
        ("warmup_stable_decay", {"num_decay_steps": 31, "warmup_type": warmup, "decay_type": decay})
        for warmup, decay in itertools.product(("linear", "cosine", "1-sqrt"), repeat=2)
    ],
]


def learning_rates(scheduler: Any, optimizer: torch.optim.Optimizer, num_steps: int) -> list[float]:
    """The rate used at each step: read before the update, as a trainer logs it."""
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(("name", "kwargs"), SCHEDULES)
@pytest.mark.parametrize(("num_warmup_steps", "num_training_steps"), [(0, 97), (10, 97), (33, 300)])
def test_learning_rates_equal_those_of_transformers_bit_for_bit(
    name: str, kwargs: dict[str, Any], num_warmup_steps: int, num_training_steps: int
) -> None:
    ours, theirs = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2e-4) for _ in range(2))
    our_scheduler = create_scheduler(name, ours, num_warmup_steps, num_training_steps, kwargs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # theirs complains that num_stable_steps wins
        their_scheduler = get_scheduler(name, theirs, num_warmup_steps, num_training_steps, dict(kwargs))
    num_steps = num_training_steps + 5
    our_rates = learning_rates(our_scheduler, ours, num_steps)
    assert our_rates == learning_rates(their_scheduler, theirs, num_steps)
    base = {"lr_init": 2e-4} if name in ("polynomial", "cosine_with_min_lr", "cosine_warmup_with_min_lr") else {}
    pure = [2e-4 * factor(name, k, num_warmup_steps, num_training_steps, **kwargs, **base) for k in range(num_steps)]
    assert pure == our_rates


def test_every_schedule_of_transformers_is_known() -> None:
    assert set(SCHEDULE_NAMES) == {member.value for member in SchedulerType}


def test_a_scheduler_is_a_torch_scheduler_and_takes_the_enum_name() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    assert isinstance(create_scheduler(SchedulerType.COSINE, optimizer, 0, 10), torch.optim.lr_scheduler.LambdaLR)


def test_a_scheduler_state_goes_to_transformers_and_back() -> None:
    ours, theirs = (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1) for _ in range(2))
    our_scheduler = create_scheduler("linear", ours, 2, 10)
    their_scheduler = get_scheduler("linear", theirs, 2, 10)
    learning_rates(our_scheduler, ours, 4)
    their_scheduler.load_state_dict(our_scheduler.state_dict())
    assert their_scheduler.get_last_lr() == our_scheduler.get_last_lr()
    our_scheduler.load_state_dict(their_scheduler.state_dict())
    assert our_scheduler.last_epoch == 4


def test_the_plateau_schedule_is_torch_s_own_and_follows_the_metric() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = create_scheduler("reduce_lr_on_plateau", optimizer, 0, 10, {"patience": 0, "factor": 0.5})
    assert isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)
    scheduler.step(1.0)
    scheduler.step(2.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)


def test_the_greedy_schedule_is_that_of_transformers() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler: Any = create_scheduler("greedy", optimizer, 0, 10, {"patience": 0, "factor": 0.5})
    scheduler.step(1.0)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("name", "kwargs", "message"),
    [
        ("cosin", {}, "did you mean 'cosine'"),
        ("cosine", {"num_cicles": 2}, "did you mean 'num_cycles'"),
        ("linear", {"power": 2}, "it takes none"),
        ("cosine_with_min_lr", {}, "exactly one of min_lr and min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, "exactly one of min_lr and min_lr_rate"),
        ("polynomial", {"lr_end": 1.0}, "must be below learning_rate"),
        ("warmup_stable_decay", {}, "needs 'num_decay_steps'"),
        ("warmup_stable_decay", {"num_decay_steps": 3, "decay_type": "sudden"}, "not one of linear, cosine, 1-sqrt"),
        ("reduce_lr_on_plateau", {"patients": 1}, "did you mean 'patience'"),
    ],
)
def test_a_wrong_schedule_setting_is_named(name: str, kwargs: dict[str, Any], message: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ConfigError, match=message):
        create_scheduler(name, optimizer, 2, 10, kwargs)


def test_an_unknown_schedule_option_is_also_a_type_error_as_in_transformers() -> None:
    with pytest.raises(UnknownArgumentError):
        factor("linear", 0, 0, 10, power=2.0)
    with pytest.raises(ConfigError, match="follows a metric"):
        factor("greedy", 0, 0, 10)


def test_ignored_options_of_the_constant_schedules_are_announced() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.warns(UserWarning, match="are not used by 'constant'"):
        create_scheduler("constant", optimizer, 0, 10, {"num_cycles": 2})


def test_a_run_that_is_all_warm_up_has_a_rate_at_every_step() -> None:
    assert [factor("polynomial", k, 4, 4, lr_init=0.1) for k in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


# ---------------------------------------------------------------- groups

THEIR_PATTERNS = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]


class Awkward(nn.Module):
    """Names that a careless pattern gets wrong, a norm that only its type betrays, and one at the root."""

    def __init__(self) -> None:
        super().__init__()
        self.normalizer = nn.Linear(2, 2, bias=False)
        self.norm = nn.Linear(2, 2, bias=False)
        self.q_norm = nn.Linear(2, 2, bias=False)
        self.scale = nn.LayerNorm(2)
        self.Bias_free = nn.Linear(2, 2, bias=False)
        self.free = nn.Parameter(torch.zeros(2))


@pytest.mark.parametrize("build", [tiny_llama, tiny_bert, Awkward])
def test_decaying_names_equal_those_of_transformers(build: Any) -> None:
    model = build()
    theirs = get_parameter_names(model, [nn.LayerNorm], THEIR_PATTERNS)
    assert sorted(decay_parameter_names(model)) == sorted(theirs)
    assert theirs


def test_all_lora_weights_decay_and_only_they_are_grouped() -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    decaying, rest = parameter_groups(model, 0.1)
    assert len(decaying["params"]) == 8 and rest["params"] == []
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)
    named = dict(model.named_parameters())
    assert all(named[n] is p for n, p in zip(decaying["param_names"], decaying["params"], strict=True))
    assert decaying["param_names"] == [n for n, p in model.named_parameters() if p.requires_grad]


def test_the_caller_may_decide_what_decays() -> None:
    decaying, rest = parameter_groups(Awkward(), 0.1, decay_names=["free"])
    assert decaying["param_names"] == ["free"] and len(rest["param_names"]) == 6


# ---------------------------------------------------------------- optimizers


def test_every_optimizer_of_transformers_is_known() -> None:
    assert set(OPTIMIZER_NAMES) == {member.value for member in OptimizerNames}
    assert len(OPTIMIZER_NAMES) == 41


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("adamw_torch", None),
        ("adamw_torch_fused", None),
        ("adafactor", None),
        ("sgd", None),
        ("sgd", "momentum=0.9, dampening=0, nesterov=true"),
        ("adagrad", "lr_decay=0.1,eps=1e-6"),
        ("rmsprop", "momentum=0.5,alpha=0.9,eps=1e-6,centered=yes"),
    ],
)
def test_class_and_settings_equal_those_of_transformers(name: str, options: str | None) -> None:
    from transformers.trainer_optimizer import OptimizerContext, _parse_optim_args

    args = arguments(optim=name, optim_args=options)
    adam = {"betas": (args.adam_beta1, args.adam_beta2), "eps": args.adam_epsilon}
    context = OptimizerContext(args, None, {"lr": args.learning_rate}, adam, _parse_optim_args(options))
    assert optimizer_class_and_kwargs(args) == _OPTIMIZER_HANDLERS[name](context)


@pytest.mark.parametrize("name", [name for name, recipe in OPTIMIZERS.items() if not isinstance(recipe, NotBuilt)])
def test_an_optimizer_trains_or_says_what_to_install(name: str) -> None:
    model = get_peft_model(tiny_llama(), LoraConfig(r=2))
    try:
        optimizer = create_optimizer(model, arguments(optim=name))
    except MissingDependencyError as error:
        assert "pip install bitsandbytes" in str(error)
        return
    tokens = torch.arange(8)[None]
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    after = dict(model.named_parameters())
    assert any(not torch.equal(before[n], after[n]) for n in before)
    assert optimizer.param_groups[0]["param_names"] == list(before)


@pytest.mark.parametrize("name", [name for name, recipe in OPTIMIZERS.items() if isinstance(recipe, NotBuilt)])
def test_what_is_not_built_says_how_to_pass_one_s_own(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"optim: .*'{name}'; pip install .*optimizers="):
        optimizer_class_and_kwargs(arguments(optim=name))


@pytest.mark.parametrize(
    ("name", "bits", "paged", "class_name", "extra"),
    [
        ("adamw_bnb_8bit", 8, False, "AdamW", {"betas": (0.9, 0.98), "eps": 1e-7}),
        ("paged_adamw_32bit", 32, True, "AdamW", {"betas": (0.9, 0.98), "eps": 1e-7}),
        ("lion_8bit", 8, False, "Lion", {"betas": (0.9, 0.98)}),
        (
            "paged_ademamix_8bit", 8, True, "AdEMAMix",
            {"betas": (0.9, 0.98, 0.9999), "eps": 1e-7, "alpha": 5.0},
        ),
    ],
)  # fmt: skip
def test_settings_given_to_bitsandbytes(
    monkeypatch: pytest.MonkeyPatch, name: str, bits: int, paged: bool, class_name: str, extra: dict[str, Any]
) -> None:
    classes = {n: type(n, (), {}) for n in ("AdamW", "Lion", "RMSprop", "AdEMAMix")}
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes", SimpleNamespace(optim=SimpleNamespace(**classes)))
    monkeypatch.setitem(__import__("sys").modules, "bitsandbytes.optim", SimpleNamespace(**classes))
    built_class, settings = optimizer_class_and_kwargs(arguments(optim=name))
    assert built_class is classes[class_name]
    assert settings == {"lr": 2e-4, "optim_bits": bits, "is_paged": paged, **extra}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("adamw_troch", None, "optim: unknown optimizer .* did you mean 'adamw_torch'"),
        ("sgd", "momentm=0.9", "optim_args: 'sgd' has no option 'momentm'; did you mean 'momentum'"),
        ("sgd", "momentum", "not of the form name=value"),
        ("sgd", "momentum=much", "optim_args: momentum"),
        ("sgd", "nesterov=perhaps", "neither true nor false"),
        ("adamw_torch", "momentum=0.9", "it takes none"),
    ],
)
def test_a_wrong_optimizer_setting_is_named(name: str, options: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        optimizer_class_and_kwargs(arguments(optim=name, optim_args=options))


def test_a_class_of_the_user_s_own_gets_our_groups_and_keeps_its_settings() -> None:
    settings = {"lr": 0.5}
    optimizer = create_optimizer(tiny_bert(), arguments(), (torch.optim.SGD, settings))
    assert isinstance(optimizer, torch.optim.SGD) and optimizer.param_groups[1]["weight_decay"] == 0.0
    assert settings == {"lr": 0.5}


def test_groups_of_the_user_s_own_replace_ours() -> None:
    model = tiny_bert()
    head = list(model.classifier.parameters())
    optimizer = create_optimizer(model, arguments(), (torch.optim.SGD, {"lr": 0.5, "params": head}))
    assert optimizer.param_groups[0]["params"] == head


def test_a_factory_gets_the_model() -> None:
    model = tiny_bert()

    class Factory:
        def __call__(self, whole: nn.Module, lr: float) -> torch.optim.Optimizer:
            assert whole is model
            return torch.optim.SGD(whole.parameters(), lr=lr)

    assert create_optimizer(model, arguments(), (Factory, {"lr": 0.25})).param_groups[0]["lr"] == 0.25


def test_without_anything_trainable_the_way_out_is_named() -> None:
    with pytest.raises(ModelError, match="get_peft_model"):
        create_optimizer(tiny_llama().requires_grad_(False), arguments())


def test_fused_falls_back_where_there_is_no_kernel() -> None:
    optimizer = create_optimizer(nn.Linear(2, 2, device="meta"), arguments(optim="adamw_torch_fused"))
    assert optimizer.defaults["fused"] is None


# ---------------------------------------------------------------- clipping


def with_gradients() -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.full((3,), 3.0), torch.full((2, 2), -2.0)
    return parameters  # the last one has no gradient


def test_clipping_equals_torch_s() -> None:
    ours, theirs = with_gradients(), with_gradients()
    norm = clip_gradients(iter(ours), 1.0)
    assert torch.equal(norm, torch.nn.utils.clip_grad_norm_(theirs, 1.0))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours[:2], theirs[:2], strict=True))
    assert norm.dtype == torch.float32 and norm.item() == pytest.approx(43**0.5)


def test_no_clipping_still_gives_the_norm() -> None:
    parameters = with_gradients()
    assert clip_gradients(parameters, 0.0).item() == pytest.approx(43**0.5)
    assert torch.equal(parameters[0].grad, torch.full((3,), 3.0))


def test_half_precision_gradients_give_a_float32_norm() -> None:
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    parameter.grad = torch.ones(4, dtype=torch.bfloat16)
    norm = clip_gradients([parameter], 1.0)
    assert norm.dtype == torch.float32 and norm.item() == 2.0


def test_without_gradients_the_norm_is_zero() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    assert clip_gradients([parameter], 1.0).item() == 0.0 == clip_gradients([parameter], 0.0).item()
