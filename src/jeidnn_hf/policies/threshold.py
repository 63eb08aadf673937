"""One global threshold on a calibrated confidence: leave at the first exit that is sure enough.

The rule of BranchyNet (Teerapittayanon et al. 2016) and of most early-exit networks, with one temperature per exit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..exits import exit_decision
from ..gates import Lambda
from ..record import ExitRecord
from .budgets import check_budget, largest_within
from .confidence import CalibratedConfidence


class ConfidenceThreshold(CalibratedConfidence):
    """Leaves at the first exit whose confidence, after its temperature, exceeds ``threshold``.

    Args:
        temperatures: ``(L,)``.
        threshold: in [0, 1]; at 1 nobody leaves early.
        measure: one of ``confidence.MEASURES``.
    """

    def __init__(self, temperatures: Tensor, threshold: float | Tensor, measure: str = "max_probability"):
        super().__init__(temperatures, measure)
        self.register_buffer("threshold", torch.as_tensor(threshold, dtype=temperatures.dtype))

    @classmethod
    def blank(cls, num_exits: int, num_labels: int, measure: str = "max_probability") -> ConfidenceThreshold:
        return cls(torch.ones(num_exits), 1.0, measure)

    @classmethod
    def fit(cls, record: ExitRecord, *, budget: float, measure: str = "max_probability") -> ConfidenceThreshold:
        """Temperatures by likelihood, then the most demanding threshold whose mean normalised cost is within budget.

        Args:
            record: held-out answers.
            budget: mean Mul-Adds, as a share of the backbone's.

        Raises:
            ValueError: a budget below the first exit's cost or above the last's.
        """
        costs = check_budget(record, budget)
        policy = cls(record.temperatures.clone(), 0.0, measure)
        sure = policy.confidence(record.logits)
        policy.threshold.fill_(
            largest_within(budget, lambda threshold: costs[exit_decision(sure, threshold)].mean(), 0.0, 1.0)
        )
        return policy

    def step(self, l: int, logits: Tensor, carry: Any = None, lam: Lambda = None) -> tuple[Tensor, Any]:
        if l == self.num_exits - 1:
            return torch.ones_like(logits[:, 0], dtype=torch.bool), None
        return self.confidence_at(l, logits) > self.threshold, None

    def decide(self, logits: Tensor, lam: Lambda = None) -> Tensor:
        return exit_decision(self.confidence(logits), self.threshold)
