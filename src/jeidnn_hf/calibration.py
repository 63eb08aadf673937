"""Temperature scaling (Guo et al. 2017): one temperature per exit, by negative log-likelihood on held-out data."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

_LOG_T = math.log(20.0)


@torch.no_grad()
def fit_temperatures(logits: Tensor, labels: Tensor, steps: int = 60) -> Tensor:
    """argmin_T NLL(logits / T) for each exit, ``(N, L, K)`` and ``(N,)`` to ``(L,)``.

    The likelihood is convex in 1/T, so it has one minimum over log T, which a golden-section search finds to 1e-9,
    for all exits at once, within T in [1/20, 20].
    """
    logits = logits.double()
    low = torch.full(logits.shape[1:2], -_LOG_T, dtype=torch.float64, device=logits.device)
    high, golden = -low, (math.sqrt(5) - 1) / 2
    target = labels[:, None].expand(logits.shape[:2]).flatten()

    def nll(log_t: Tensor) -> Tensor:
        scaled = (logits / log_t.exp()[:, None]).flatten(0, 1)
        return F.cross_entropy(scaled, target, reduction="none").unflatten(0, logits.shape[:2]).mean(0)

    a, b = high - golden * (high - low), low + golden * (high - low)
    at_a, at_b = nll(a), nll(b)
    for _ in range(steps):
        left = at_a < at_b
        high, low = torch.where(left, b, high), torch.where(left, low, a)
        new = torch.where(left, high - golden * (high - low), low + golden * (high - low))
        at_new = nll(new)
        a, b = torch.where(left, new, b), torch.where(left, a, new)
        at_a, at_b = torch.where(left, at_new, at_b), torch.where(left, at_a, at_new)
    return ((low + high) / 2).exp().to(torch.get_default_dtype())
