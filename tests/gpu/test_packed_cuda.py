"""The packed path on a CUDA device against the padded path: float32 tightly, bfloat16 against a float32 reference."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from etude.kernels.attention import FLEX, FUSED, PER_SEQUENCE, VARLEN, AttentionRule, Segments, segment_attention
from etude.kernels.cross_entropy import linear_cross_entropy
from etude.model.graphs import fill_slots, slots_of
from etude.model.packing import PackedBatch, pack
from etude.model.paths import GeneralPath, PackedPath, choose_path
from tiny import IGNORED, Batch, Padded, language_rows, tiny_gemma3, tiny_llama, tiny_qwen3, with_lora

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # torch's compiler warns of its own deprecated parts
]

WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "num_hidden_layers": 3}


def tiny_gemma2() -> Gemma2ForCausalLM:
    torch.manual_seed(0)
    return Gemma2ForCausalLM(
        Gemma2Config(
            vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=32, sliding_window=8, initializer_range=0.2, attn_logit_softcapping=5.0,
            final_logit_softcapping=3.0, pad_token_id=0, attn_implementation="eager",  # others leave the caps out
        )
    )  # fmt: skip


MODELS: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "llama": (lambda: tiny_llama(**WIDE), FUSED),
    "qwen3": (lambda: tiny_qwen3(**WIDE), FUSED),
    "gemma3, window 4": (lambda: tiny_gemma3(**WIDE | {"num_hidden_layers": 2}), FUSED),
    "gemma2, soft caps": (tiny_gemma2, FUSED),
}


def adapted(name: str) -> nn.Module:
    model = with_lora(MODELS[name][0](), task_type="CAUSAL_LM", init_lora_weights=False)
    return model.eval().cuda()


def cuda_batch(side: str = "right") -> Batch:
    rows = language_rows(6, seed=3, shortest=5, longest=40)
    return {name: value.cuda() for name, value in Padded(side=side)(rows).items()}


def loss_and_gradients(model: nn.Module, loss: Tensor) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return loss.detach().double(), torch.cat([gradient.flatten() for gradient in gradients]).double()


def distance(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> tuple[float, float]:
    loss = (ours[0] - theirs[0]).abs() / theirs[0]
    return float(loss), float((ours[1] - theirs[1]).norm() / theirs[1].norm())


@pytest.fixture(autouse=True)
def full_float32() -> None:
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", MODELS)
def test_float32_equals_the_padded_model(name: str, side: str) -> None:
    model, batch = adapted(name), cuda_batch(side)
    num_items = (batch["labels"][:, 1:] != IGNORED).sum()
    path = choose_path(model, fast_path=True, overridden=(), sample_inputs=batch, training_dtype=None)
    assert isinstance(path, PackedPath), path.reasons
    assert path.kernel == PER_SEQUENCE
    ours = loss_and_gradients(model, path.loss(model, batch, num_items))
    theirs = loss_and_gradients(model, model(**batch, num_items_in_batch=num_items).loss)
    loss, gradients = distance(ours, theirs)
    assert loss < 2e-6
    assert gradients < 2e-5


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_bfloat16_is_as_close_to_float32_as_the_padded_model(name: str, autocast: bool) -> None:
    exact, batch = adapted(name), cuda_batch()
    num_items = int((batch["labels"][:, 1:] != IGNORED).sum())
    reference = loss_and_gradients(exact, exact(**batch, num_items_in_batch=num_items).loss)
    model = copy.deepcopy(exact) if autocast else copy.deepcopy(exact).bfloat16()
    dtype = torch.bfloat16 if autocast else None
    path = choose_path(model, fast_path=True, overridden=(), sample_inputs=batch, training_dtype=dtype)
    assert isinstance(path, PackedPath), path.reasons
    assert path.kernel == MODELS[name][1], path.reasons
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        ours = path.loss(model, batch, num_items)
    our_distance = distance(loss_and_gradients(model, ours), reference)
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        theirs = model(**batch, num_items_in_batch=num_items).loss
    their_distance = distance(loss_and_gradients(model, theirs), reference)
    assert our_distance[0] < 2 * their_distance[0] + 5e-3
    assert our_distance[1] < 1.5 * their_distance[1] + 1e-2


def half_path(model: nn.Module, batch: Batch) -> PackedPath:
    path = choose_path(model, fast_path=True, overridden=(), sample_inputs=batch, training_dtype=torch.bfloat16)
    assert isinstance(path, PackedPath) and path.kernel == FUSED, path.reasons
    assert path.plan.blocks, path.reasons
    return path


def half_with_float32_adapters(name: str) -> nn.Module:
    torch.manual_seed(0)
    model = with_lora(MODELS[name][0]().bfloat16(), task_type="CAUSAL_LM", init_lora_weights=False)
    return model.train().cuda()


def half_loss(path: PackedPath, model: nn.Module, batch: Batch | PackedBatch) -> Tensor:
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return path.loss(model, batch, 100)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3, window 4"])
def test_gradients_added_in_place_are_those_of_autograd(name: str) -> None:
    model, batch = half_with_float32_adapters(name), cuda_batch()
    path = half_path(model, batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    expected = loss_and_gradients(model, half_loss(path, model, batch))
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    places = [parameter.grad for parameter in trained]
    path.plan.accumulate_in_place()
    loss = half_loss(path, model, batch)
    loss.backward()
    assert all(p.grad is place for p, place in zip(trained, places, strict=True))
    added = torch.cat([(p.grad - 1).flatten() for p in trained if p.grad is not None]).double()
    off_loss, off_gradients = distance((loss.detach().double(), added), expected)
    assert off_loss < 1e-6 and off_gradients < 5e-3

    with torch.no_grad():  # an update, where they lie: all new adapters are taken over in one launch
        for parameter in trained:
            parameter.mul_(1.1)
    other = copy.deepcopy(model)
    ours = half_loss(path, model, batch).detach().double()
    path.plan.undo()
    theirs = half_loss(half_path(other, batch), other, batch).detach().double()
    assert float((ours - theirs).abs() / theirs) < 1e-6
    assert float((ours - expected[0]).abs() / theirs) > 1e-4


def test_a_copy_made_during_a_run_is_independent() -> None:
    model, batch = half_with_float32_adapters("llama"), cuda_batch()
    path = half_path(model, batch)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    path.plan.accumulate_in_place()
    half_loss(path, model, batch).backward()
    gradients = [p.grad.clone() for p in trained if p.grad is not None]
    other = copy.deepcopy(model)
    own = half_path(other, batch)
    half_loss(own, other, batch).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(trained, gradients, strict=True) if p.grad is not None)
    assert all(p.grad is not None and bool(p.grad.any()) for p in other.parameters() if p.requires_grad)


@pytest.mark.parametrize("num_samples", [33, 3])
def test_slots_that_are_left_over_change_nothing(num_samples: int) -> None:
    """Also where they are more than the longest sample: no row of them may hold what happened to be in memory."""
    model = half_with_float32_adapters("llama")
    path = half_path(model, cuda_batch())
    lengths = (1000,) * num_samples
    tokens = torch.randint(4, 64, (1, sum(lengths)))
    positions = torch.arange(1000).repeat(num_samples)[None] % 128
    ends = torch.arange(0, sum(lengths) + 1, 1000, dtype=torch.int32)
    labelled = torch.arange(0, sum(lengths) - 1, 7)
    batch = PackedBatch(tokens, positions, ends, lengths, labelled, tokens[0, labelled + 1])
    expected = loss_and_gradients(model, half_loss(path, model, batch.to("cuda")))
    junk = [torch.full((2**22,), float("nan"), device="cuda") for _ in range(64)]
    del junk
    filled = fill_slots(batch, slots_of(batch)).to("cuda")
    ours = loss_and_gradients(model, half_loss(path, model, filled))
    off_loss, off_gradients = distance(ours, expected)
    assert off_loss < 1e-4 and off_gradients < 1e-2


@pytest.mark.parametrize(
    ("kernel", "rule"),
    [
        (VARLEN, AttentionRule(scaling=0.2)),
        (VARLEN, AttentionRule(sliding_window=7)),
        (FLEX, AttentionRule(softcap=3.0)),
        (FLEX, AttentionRule(softcap=3.0, sliding_window=7)),
    ],
)
def test_kernels_agree_with_the_loop_over_samples(kernel: str, rule: AttentionRule) -> None:
    torch.manual_seed(0)
    lengths = (40, 1, 129, 22)
    ends = torch.tensor((0, *lengths)).cumsum(0).int().cuda()
    shapes = [(1, heads, sum(lengths), 64) for heads in (4, 2, 2)]
    inputs = [torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True) for shape in shapes]
    exact = [tensor.detach().float().requires_grad_() for tensor in inputs]
    ours = segment_attention(*inputs, Segments(ends, lengths, max(lengths), kernel), rule)
    theirs = segment_attention(*exact, Segments(ends, lengths, max(lengths), PER_SEQUENCE), rule)
    torch.testing.assert_close(ours.float(), theirs, rtol=2e-2, atol=2e-2)
    direction = torch.randn_like(theirs)
    our_gradients = torch.autograd.grad(ours, inputs, direction.bfloat16())
    their_gradients = torch.autograd.grad(theirs, exact, direction)
    for our_gradient, their_gradient in zip(our_gradients, their_gradients, strict=True):
        assert float((our_gradient.float() - their_gradient).norm() / their_gradient.norm()) < 2e-2


def test_the_head_in_half_precision() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(3000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(5000, 64, device="cuda", dtype=torch.bfloat16)
    targets = torch.randint(0, 5000, (3000,), device="cuda")
    exact = hidden.detach().double().requires_grad_()
    theirs = nn.functional.cross_entropy(exact @ weight.double().t(), targets, reduction="sum")
    (their_gradient,) = torch.autograd.grad(theirs, exact)
    for dtype, tolerance in ((torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)):
        rounded = hidden.detach().to(dtype).requires_grad_()
        ours = linear_cross_entropy(rounded, weight.to(dtype), targets)
        (our_gradient,) = torch.autograd.grad(ours, rounded)
        assert float((ours.detach() - theirs.detach()).abs() / theirs.detach()) < tolerance
        assert float((our_gradient.double() - their_gradient).norm() / their_gradient.norm()) < tolerance


@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
@pytest.mark.parametrize("kernel", [FUSED, VARLEN])
def test_a_packed_step_does_not_wait_for_the_device(kernel: str) -> None:
    """Packed before the copy, nothing in forward and backward reads a value back to the host."""
    model = adapted("llama").bfloat16()
    on_host = {name: value.cpu() for name, value in cuda_batch().items()}
    path = PackedPath(model, kernel=kernel, head="chunked")
    packed = pack(on_host)
    assert packed is not None
    batch = packed.to("cuda")
    path.loss(model, batch, 7).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        path.loss(model, batch, 7).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_attention_dropout_stays_on_the_general_path() -> None:
    model = with_lora(tiny_llama(attention_dropout=0.1), task_type="CAUSAL_LM").cuda()
    path = choose_path(model, fast_path=True, overridden=(), sample_inputs=cuda_batch(), training_dtype=None)
    assert isinstance(path, GeneralPath)
    assert "has no dropout" in path.reasons[0]
