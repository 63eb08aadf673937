"""One global threshold on the calibrated maximum probability: leave at the first exit that is sure enough.

The rule of BranchyNet (Teerapittayanon et al. 2016) and of most early-exit networks, with one temperature per exit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..exits import exit_decision
from ..gates import ExitPolicy, Lambda
from ..record import ExitRecord


class ConfidenceThreshold(ExitPolicy):
    """Leaves at the first exit whose maximum probability, after its temperature, exceeds ``threshold``."""

    def __init__(self, temperatures: Tensor, threshold: float):
        super().__init__(len(temperatures))
        self.register_buffer("temperatures", temperatures)
        self.threshold = threshold

    @classmethod
    def fit(cls, record: ExitRecord, *, budget: float) -> ConfidenceThreshold:
        """Temperatures by likelihood, then the most demanding threshold whose mean normalised cost is within budget.

        Args:
            record: held-out answers.
            budget: mean Mul-Adds, as a share of the backbone's.

        Raises:
            ValueError: a budget that even leaving at the first exit exceeds.
        """
        costs = torch.tensor(record.costs.normalised, dtype=torch.float64)
        if not float(costs[0]) <= budget:
            raise ValueError(f"Expected a budget of at least {float(costs[0]):.3f}, the first exit, but got {budget}.")
        policy = cls(record.temperatures.clone(), threshold=-1.0)
        confidence = policy.confidence(record.logits)
        low, high = 0.0, 1.0
        for _ in range(40):
            middle = (low + high) / 2
            within = costs[exit_decision(confidence, middle)].mean() <= budget
            low, high = (middle, high) if within else (low, middle)
        policy.threshold = low
        return policy

    def confidence(self, logits: Tensor) -> Tensor:
        """``(N, L, K)`` to the calibrated maximum probabilities ``(N, L)``."""
        return (logits / self.temperatures[:, None]).softmax(-1).amax(-1)

    def step(self, l: int, logits: Tensor, carry: Any = None, lam: Lambda = None) -> tuple[Tensor, Any]:
        if l == self.num_exits - 1:
            return torch.ones_like(logits[:, 0], dtype=torch.bool), None
        return (logits / self.temperatures[l]).softmax(-1).amax(-1) > self.threshold, None

    def decide(self, logits: Tensor, lam: Lambda = None) -> Tensor:
        return exit_decision(self.confidence(logits), self.threshold)

    def mul_adds(self, num_labels: int) -> int:
        """A temperature and a maximum over K classes."""
        return 2 * num_labels
