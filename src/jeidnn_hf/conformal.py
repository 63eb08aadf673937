"""Conformal prediction sets for early exits (App. 9.3): four ways to find thresholds, split-conformal quantiles.

The score of a class is ``1 - p_k`` (LAC) at the exit taken; a set holds the classes whose score is at most the exit's
threshold. With exchangeable data ``general`` and ``strict`` cover the true class with probability 1 - alpha; ``gated``
falls back on the size of its own groups, and has no such statement.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

METHODS = ("general", "ims", "strict", "gated")


def conformal_quantile(scores: Tensor, alpha: float) -> float:
    """The k-th smallest of n scores ``(n,)``, k = ceil((n + 1)(1 - alpha)); +infinity where k > n."""
    _check_alpha(alpha)
    k = math.ceil((len(scores) + 1) * (1 - alpha) - 1e-9)
    return math.inf if k > len(scores) else float(scores.double().kthvalue(k).values)


def fit_thresholds(
    probs: Tensor, labels: Tensor, chosen: Tensor, alpha: float, method: str = "gated", min_samples: int = 20
) -> Tensor:
    """Thresholds of all exits, ``(L,)`` float64, from calibration data.

    ``general``: one, from the scores at the exits taken. ``ims``: one per exit, from everybody's scores there.
    ``strict``: one per exit, from those who leave there; 0 where nobody does. ``gated``: as strict, but the general one
    where fewer than ``min_samples`` leave.

    Args:
        probs: class probabilities of every exit, ``(N, L, K)``; labels ``(N,)``; chosen exits ``(N,)``.
        alpha: in (0, 1), the share of true classes that may be missed.

    Raises:
        ValueError: no calibration data, NaN, alpha or method out of range.
    """
    if method not in METHODS:
        raise ValueError(f"Expected a conformal method among {METHODS}, but got {method!r}.")
    if not len(labels):
        raise ValueError("Expected calibration data, but got none.")
    if not torch.isfinite(probs).all():
        raise ValueError("Expected probabilities without NaN or infinity, but got some.")
    scores = 1 - probs.gather(-1, labels[:, None, None].expand(-1, probs.shape[1], 1)).squeeze(-1)
    general = conformal_quantile(scores.gather(1, chosen[:, None]).squeeze(1), alpha)
    thresholds = []
    for l in range(probs.shape[1]):
        leaving = scores[chosen == l, l]
        if method == "general" or (method == "gated" and len(leaving) < min_samples):
            thresholds.append(general)
        elif method == "ims":
            thresholds.append(conformal_quantile(scores[:, l], alpha))
        else:
            thresholds.append(conformal_quantile(leaving, alpha) if len(leaving) else 0.0)
    return torch.tensor(thresholds, dtype=torch.float64, device=probs.device)


def prediction_sets(probs: Tensor, chosen: Tensor, thresholds: Tensor) -> Tensor:
    """``{k : 1 - p_k <= threshold of the exit taken}`` as a mask ``(N, K)``; probs ``(N, L, K)``, chosen ``(N,)``."""
    taken = probs[torch.arange(len(chosen), device=probs.device), chosen]
    return 1 - taken.double() <= thresholds[chosen][:, None]


def coverage_and_inefficiency(sets: Tensor, labels: Tensor) -> tuple[float, float]:
    """Share of the true classes in the sets, and the mean size of a set (Eq. 2)."""
    covered = sets.gather(1, labels[:, None]).double().mean()
    return float(covered), float(sets.sum(1).double().mean())


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"Expected alpha in (0, 1), but got {alpha!r}.")
