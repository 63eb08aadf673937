"""Metrics, as pure functions of tensors. Fractions, not percent; log-likelihoods in nats."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


def expected_calibration_error(probs: Tensor, labels: Tensor, bins: int = 15) -> Tensor:
    """ECE with equal-mass bins (Eq. 19), over the whole set at once: ``sum_b |sum_{i in Q_b} right_i - conf_i| / N``.

    Samples are sorted by their maximum probability; bin b holds ranks floor(N b / B) to floor(N (b+1) / B). Samples of
    the same confidence count with their mean accuracy, so that the order of the rows plays no part.

    Args:
        probs: ``(N, K)`` or, for L exits at once, ``(N, L, K)``.
        labels: ``(N,)``.

    Returns:
        A scalar, or ``(L,)``.

    Raises:
        ValueError: NaN.
    """
    confidence, right = _sorted_confidence(probs, labels)
    gap = right - confidence
    sums = torch.stack([gap[start:stop].sum(0) for start, stop in _equal_mass(len(gap), bins)])
    return sums.abs().sum(0) / len(gap)


def reliability_bins(probs: Tensor, labels: Tensor, bins: int = 15) -> dict[str, list]:
    """The bins of ``expected_calibration_error`` for a reliability diagram: mean ``confidence``, ``accuracy`` and
    ``count`` of each bin that is not empty; probs ``(N, K)``."""
    confidence, right = _sorted_confidence(probs, labels)
    parts = [slice(*ends) for ends in _equal_mass(len(confidence), bins) if ends[0] < ends[1]]
    return {
        "confidence": [float(confidence[part].mean()) for part in parts],
        "accuracy": [float(right[part].mean()) for part in parts],
        "count": [part.stop - part.start for part in parts],
    }


def _sorted_confidence(probs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    confidence, prediction = probs.max(-1)
    if torch.isnan(confidence).any():
        raise ValueError("Expected probabilities without NaN, but got some.")
    right = (prediction == labels.reshape(-1, *[1] * (prediction.dim() - 1))).double()
    confidence, order = confidence.double().sort(dim=0, stable=True)
    right = right.gather(0, order)
    tie = torch.cat([torch.zeros_like(confidence[:1]), (confidence.diff(dim=0) > 0).double()]).cumsum(0).long()
    total = torch.zeros_like(right).scatter_add_(0, tie, right)
    count = torch.zeros_like(right).scatter_add_(0, tie, torch.ones_like(right))
    return confidence, (total / count.clamp_min(1)).gather(0, tie)


def _equal_mass(count: int, bins: int) -> list[tuple[int, int]]:
    edges = [count * b // bins for b in range(bins + 1)]
    return list(zip(edges[:-1], edges[1:], strict=True))


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean ``-log p_y``: logits ``(N, K)`` or ``(N, L, K)`` to a scalar or ``(L,)``."""
    logs = logits.double().log_softmax(-1)
    return -logs.gather(-1, _true_class(labels, logs)).squeeze(-1).mean(0)


def brier_score(probs: Tensor, labels: Tensor) -> Tensor:
    """Mean squared distance of the probabilities to the one-hot label, in [0, 2]; shapes as above."""
    probs = probs.double()
    return (probs.square().sum(-1) - 2 * probs.gather(-1, _true_class(labels, probs)).squeeze(-1) + 1).mean(0)


def _true_class(labels: Tensor, like: Tensor) -> Tensor:
    return labels.reshape(-1, *[1] * (like.dim() - 1)).expand(*like.shape[:-1], 1)


def auroc(scores: Tensor, targets: Tensor) -> float | None:
    """Probability that a positive scores above a negative, ties counting half; None where one of them is absent.

    Args:
        scores: ``(N,)``; targets: ``(N,)`` bool.
    """
    positives = int(targets.sum())
    if positives in (0, len(targets)):
        return None
    _, place, counts = scores.double().unique(return_inverse=True, return_counts=True)
    rank = counts.cumsum(0).double() - (counts - 1) / 2  # mean rank of equal scores, from 1
    rank_sum = float(rank[place][targets].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * (len(targets) - positives))


def disjoint_subsets(count: int, parts: int = 10, seed: int = 0) -> list[Tensor]:
    """A random partition of 0..count-1 into ``parts`` sets whose sizes differ by at most one."""
    order = np.random.default_rng(seed).permutation(count)
    return [torch.from_numpy(part) for part in np.array_split(order, parts)]


def bootstrap_interval(
    values: Sequence[float], confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean of ``values``, one per subset of the test set (Section 5)."""
    values = np.asarray(values, dtype=np.float64)
    rows = _resamples(len(values), resamples, seed)
    tail = 50 * (1 - confidence)
    low, high = np.percentile(values[rows].mean(1), [tail, 100 - tail])
    return float(low), float(high)


@lru_cache(maxsize=8)
def _resamples(count: int, resamples: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(count, size=(resamples, count))


def accuracy_at_cost(costs: Tensor, accuracies: Tensor, budget: float) -> float:
    """Accuracy that a set of operating points reaches at a mean cost, by linear interpolation along their frontier: the
    points that no cheaper point equals.

    Args:
        costs: of the points, ``(P,)``.
        accuracies: of the points, ``(P,)``.
        budget: in the unit of the costs.

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
