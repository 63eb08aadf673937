"""Exits drawn by chance, whatever the image: the lower baseline, which any policy has to beat at equal cost."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..exits import exit_decision
from ..gates import ExitPolicy, Lambda
from ..record import ExitRecord
from .budgets import check_budget, largest_within
from .quota import LOG_RATIO, quotas


class RandomExits(ExitPolicy):
    """Leaves at an exit drawn once per sample from torch's global generator.

    Args:
        shares: P(G=l) of every sample, ``(L,)``.
    """

    def __init__(self, shares: Tensor):
        super().__init__(len(shares))
        self.register_buffer("shares", shares)

    @classmethod
    def blank(cls, num_exits: int, num_labels: int) -> RandomExits:
        return cls(torch.full((num_exits,), 1 / num_exits))

    @classmethod
    def fit(cls, record: ExitRecord, *, budget: float) -> RandomExits:
        """Geometric shares, see ``quota.quotas``, whose mean normalised cost is the budget.

        Args:
            record: of which only the costs are read.
            budget: mean Mul-Adds, as a share of the backbone's.

        Raises:
            ValueError: a budget below the first exit's cost or above the last's.
        """
        costs, exits = check_budget(record, budget), record.num_exits

        def cost_at(log_ratio: float) -> float:
            return float(quotas(log_ratio, exits).to(costs) @ costs)

        shares = quotas(largest_within(budget, cost_at, -LOG_RATIO, LOG_RATIO, steps=60), exits)
        return cls(shares.to(record.logits))

    def step(self, l: int, logits: Tensor, carry: Any = None, lam: Lambda = None) -> tuple[Tensor, Any]:
        draw = self._draw(logits) if carry is None else carry
        if l == self.num_exits - 1:
            return torch.ones_like(draw, dtype=torch.bool), draw
        return self.shares.cumsum(0)[l] > draw, draw

    def decide(self, logits: Tensor, lam: Lambda = None) -> Tensor:
        return exit_decision(self.shares.cumsum(0).expand(len(logits), -1), self._draw(logits)[:, None])

    def distribution(self, logits: Tensor, lam: Lambda = None) -> Tensor:
        return self.shares.to(logits.dtype).expand(len(logits), -1)

    def _draw(self, logits: Tensor) -> Tensor:
        return torch.rand(len(logits), dtype=self.shares.dtype, device=logits.device)
