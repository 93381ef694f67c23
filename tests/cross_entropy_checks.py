"""The fused cross entropy against float64, on any device: what the interpreter and a GPU both have to pass."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import functional

from etude.kernels import fused_cross_entropy

NOISE = 2e-5
"""Of float32 arithmetic, relative: exponentials of numbers up to 100."""

GAP = 50.0
"""Lead of a confident token: softmax - onehot in float64 would say that nothing is left to learn."""


def logits_and_targets(
    rows: int, vocabulary: int, *, device: str, dtype: torch.dtype, spread: float = 3.0
) -> tuple[Tensor, Tensor]:
    """Every third row is confident and right, every third confident and wrong; targets stand first and last, too."""
    generator = torch.Generator(device).manual_seed(rows + vocabulary)
    logits = torch.randn(rows, vocabulary, device=device, generator=generator).mul_(spread)
    targets = torch.randint(vocabulary, (rows,), device=device, generator=generator)
    targets[0], targets[-1] = 0, vocabulary - 1
    everywhere = torch.arange(rows, device=device)
    confident = everywhere % 3 == 0
    logits[everywhere[confident], targets[confident]] = logits.amax(dim=1)[confident] + GAP
    wrong = everywhere % 3 == 1
    logits[everywhere[wrong], (targets[wrong] + 1) % vocabulary] = logits.amax(dim=1)[wrong] + GAP
    return logits.to(dtype), targets


def exact_loss_and_gradient(
    logits: Tensor, targets: Tensor, softcap: float | None, scale: float
) -> tuple[Tensor, Tensor]:
    """In float64, by the odds against the target."""
    index = targets[:, None]
    scores = logits.double() * scale
    slopes = torch.full_like(scores, scale)
    if softcap is not None:
        slopes /= torch.cosh(scores / softcap).square()
        scores = torch.tanh(scores / softcap) * softcap
    target_scores = scores.gather(1, index)
    scores = scores.scatter(1, index, float("-inf"))
    others = scores.logsumexp(dim=1, keepdim=True)
    log_odds = others - target_scores
    share = log_odds.sigmoid()
    gradient = (scores - others).exp() * share
    return functional.softplus(log_odds, threshold=700.0), gradient.scatter(1, index, -share) * slopes


def assert_near(ours: Tensor, exact: Tensor) -> None:
    """`ours` is `exact` but for one rounding to its type, and noise."""
    limits = torch.finfo(ours.dtype)
    # The interpreter cuts bfloat16 off instead of rounding it.
    steps = 1.0 if ours.dtype == torch.bfloat16 and os.environ.get("TRITON_INTERPRET") == "1" else 0.5
    smallest = max(limits.tiny * limits.eps, torch.finfo(torch.float32).tiny)
    excess = (ours.double() - exact).abs() - (steps * limits.eps + NOISE) * exact.abs() - smallest
    assert bool((excess <= 0).all()), f"off by {float(excess.max()):.3g} more than rounding allows"


def check_loss_and_gradient(logits: Tensor, targets: Tensor, softcap: float | None, scale: float) -> None:
    """A few rows at a time, as float64 takes many times the memory."""
    gradient = logits.clone()
    losses = fused_cross_entropy.loss_and_gradient(gradient, targets, softcap, scale)
    assert losses.dtype == torch.float32
    assert losses.shape == (len(targets), 1)
    for rows in torch.arange(len(targets)).split(128):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        exact_losses, exact_gradient = exact_loss_and_gradient(logits[part], targets[part], softcap, scale)
        if softcap is None:
            assert_near(losses[part], exact_losses)
        else:  # the tangent is known to a few steps of one, a score to as many of the cap, at both ends of the odds
            torch.testing.assert_close(losses[part].double(), exact_losses, rtol=NOISE, atol=1e-6 * softcap)
        assert_near(gradient[part], exact_gradient)
