"""Metrics, as pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def expected_calibration_error(probs: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """ECE with equal-mass bins (Eq. 19), over the whole set at once.

    Samples are sorted by their maximum probability; bin b holds ranks floor(N b / B) to floor(N (b+1) / B).

    Args:
        probs: ``(N, K)`` or, for L exits at once, ``(N, L, K)``.
        labels: ``(N,)``.

    Returns:
        A scalar, or ``(L,)``; a fraction, not percent.
    """
    confidence, prediction = probs.double().max(-1)
    right = (prediction == labels.reshape(-1, *[1] * (prediction.dim() - 1))).double()
    order = confidence.argsort(dim=0, stable=True)
    gap = (right - confidence).gather(0, order)
    edges = [len(gap) * b // bins for b in range(bins + 1)]
    sums = torch.stack([gap[start:stop].sum(0) for start, stop in zip(edges[:-1], edges[1:], strict=True)])
    return sums.abs().sum(0) / len(gap)


def accuracy_at_cost(costs: Tensor, accuracies: Tensor, budget: float) -> float:
    """Accuracy that a set of operating points reaches at a mean cost, by linear interpolation along their frontier: the
    points that no cheaper point equals.

    Args:
        costs, accuracies: ``(P,)`` of the points; budget in the same unit as the costs.

    Returns:
        NaN below the cheapest point; the best accuracy above the dearest.
    """
    order = costs.argsort()
    costs, accuracies = costs[order].double(), accuracies[order].double()
    gains = accuracies > torch.cat([accuracies.new_tensor([-1.0]), accuracies.cummax(0).values[:-1]])
    costs, accuracies = costs[gains], accuracies[gains]
    if budget < costs[0]:
        return float("nan")
    right = int(torch.searchsorted(costs, budget, right=True))
    if right == len(costs):
        return float(accuracies[-1])
    left = right - 1
    share = (budget - costs[left]) / (costs[right] - costs[left])
    return float(accuracies[left] + share * (accuracies[right] - accuracies[left]))
