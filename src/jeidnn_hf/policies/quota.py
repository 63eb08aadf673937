"""Quota thresholds: of the samples that reach an exit its quota leaves there, the surest first.

The algorithm that MSDNet (Huang et al., ICLR 2018), BoostedNet (Yu et al., AAAI 2023), L2W-DEN (Han et al., ECCV 2022)
and most others share. Quotas are geometric over all L exits: leaving the last one out, as the code behind the paper's
baselines does, forces the hardest samples out one exit early.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..exits import exit_decision
from ..gates import Lambda
from ..record import ExitRecord
from .budgets import check_budget, largest_within
from .confidence import CalibratedConfidence

PUBLISHED_RATIOS = tuple(p / 20 for p in range(1, 40))
"""The ratios of the published accuracy-cost curves: below 1 early exits get more, above 1 late ones."""

LOG_RATIO = 40.0
"""Of the ratio beyond which all quotas but one are 0 in float64."""


def quotas(log_ratio: float, num_exits: int) -> Tensor:
    """``q_l = r^l / sum_j r^j`` over all L exits, ``(L,)`` float64."""
    return (torch.arange(num_exits, dtype=torch.float64) * log_ratio).softmax(0)


def quota_thresholds(scores: Tensor, shares: Tensor) -> Tensor:
    """One threshold per exit: of the samples that are left, the surest ``floor(N q_l)`` leave at exit l.

    Args:
        scores: how sure each exit is of each sample, ``(N, L)``; shares: q, ``(L,)``.

    Returns:
        ``(L,)``, for `leave_at`: -infinity at the last exit, +infinity at an exit that is closed, as its quota is
        nobody or more than are left. Ties may exceed a quota.
    """
    left = torch.ones(len(scores), dtype=torch.bool, device=scores.device)
    thresholds = scores.new_full((scores.shape[1],), math.inf)
    thresholds[-1] = -math.inf
    for l, share in enumerate(shares[:-1].tolist()):
        quota = int(len(scores) * share + 1e-9)
        candidates = scores[left, l]
        if 0 < quota <= len(candidates):
            thresholds[l] = candidates.topk(quota).values[-1]
            left &= scores[:, l] < thresholds[l]
    return thresholds


def leave_at(scores: Tensor, thresholds: Tensor) -> Tensor:
    """The first exit whose score ``(N, L)`` is at least its threshold ``(L,)``; ``(N,)`` in 0..L-1."""
    return exit_decision((scores >= thresholds).to(scores.dtype))


class QuotaThresholds(CalibratedConfidence):
    """Leaves at the first exit whose confidence, after its temperature, is at least the exit's threshold.

    Args:
        temperatures: ``(L,)``.
        thresholds: ``(L,)``, of `quota_thresholds`.
        measure: one of ``confidence.MEASURES``.
    """

    def __init__(self, temperatures: Tensor, thresholds: Tensor, measure: str = "max_probability"):
        super().__init__(temperatures, measure)
        if thresholds.shape != temperatures.shape:
            raise ValueError(
                f"Expected as many thresholds as temperatures, {len(temperatures)}, but got {tuple(thresholds.shape)}."
            )
        self.register_buffer("thresholds", thresholds)

    @classmethod
    def blank(cls, num_exits: int, num_labels: int, measure: str = "max_probability") -> QuotaThresholds:
        return cls(torch.ones(num_exits), torch.full((num_exits,), math.inf), measure)

    @classmethod
    def of_quotas(cls, record: ExitRecord, shares: Tensor, *, measure: str = "max_probability") -> QuotaThresholds:
        """With quotas q, ``(L,)``; temperatures by likelihood."""
        policy = cls.blank(record.num_exits, record.logits.shape[2], measure)
        policy.temperatures = record.temperatures.clone()
        policy.thresholds = quota_thresholds(policy.confidence(record.logits), shares)
        return policy

    @classmethod
    def of_ratio(cls, record: ExitRecord, ratio: float, *, measure: str = "max_probability") -> QuotaThresholds:
        """With the quotas of one ratio, such as those of `PUBLISHED_RATIOS`; a ValueError unless it is positive."""
        if not 0 < ratio < math.inf:
            raise ValueError(f"Expected a ratio above 0, but got {ratio}; 1 gives every exit the same quota.")
        return cls.of_quotas(record, quotas(math.log(ratio), record.num_exits), measure=measure)

    @classmethod
    def fit(cls, record: ExitRecord, *, budget: float, measure: str = "max_probability") -> QuotaThresholds:
        """The largest ratio whose mean normalised cost is within budget; temperatures by likelihood.

        The cost rises with the ratio up to the rounding of quotas to whole samples.

        Args:
            record: held-out answers.
            budget: mean Mul-Adds, as a share of the backbone's.

        Raises:
            ValueError: a budget below the first exit's cost or above the last's.
        """
        costs, exits = check_budget(record, budget), record.num_exits
        sure = cls.of_ratio(record, 1.0, measure=measure).confidence(record.logits)

        def cost_at(log_ratio: float) -> float:
            return float(costs[leave_at(sure, quota_thresholds(sure, quotas(log_ratio, exits)))].mean())

        log_ratio = largest_within(budget, cost_at, -LOG_RATIO, LOG_RATIO)
        return cls.of_quotas(record, quotas(log_ratio, exits), measure=measure)

    def step(self, l: int, logits: Tensor, carry: Any = None, lam: Lambda = None) -> tuple[Tensor, Any]:
        if l == self.num_exits - 1:
            return torch.ones_like(logits[:, 0], dtype=torch.bool), None
        return self.confidence_at(l, logits) >= self.thresholds[l], None

    def decide(self, logits: Tensor, lam: Lambda = None) -> Tensor:
        return leave_at(self.confidence(logits), self.thresholds)
