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
    within T in [1/20, 20]. Beside the logits it holds those of one exit, in float64.
    """
    low = torch.full(logits.shape[1:2], -_LOG_T, dtype=torch.float64, device=logits.device)
    high, golden = -low, (math.sqrt(5) - 1) / 2

    def nll(log_t: Tensor) -> Tensor:
        exits = zip(logits.unbind(1), log_t.exp(), strict=True)
        return torch.stack([F.cross_entropy(answers.double() / t, labels) for answers, t in exits])

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
