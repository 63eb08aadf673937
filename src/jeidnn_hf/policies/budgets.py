"""What a budget means: a mean cost, as a share of the backbone's Mul-Adds, that a policy is fitted to on a record."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..record import ExitRecord

ROUNDING = 1e-6
"""Of a cost in float32, as a model's buffers hold it."""


def check_budget(record: ExitRecord, budget: float) -> Tensor:
    """The normalised costs, ``(L,)`` float64; a ValueError for a budget below the first exit's or above the last's."""
    costs = torch.tensor(record.costs.normalised, dtype=torch.float64, device=record.logits.device)
    low, high = float(costs[0]), max(1.0, float(costs[-1]))
    if not low * (1 - ROUNDING) <= budget <= high * (1 + ROUNDING):
        raise ValueError(
            f"Expected a budget in [{low:.3f}, {high:.3f}], from the first exit to the last, but got {budget}."
        )
    return costs


def largest_within(budget: float, cost_at: Callable[[float], float], low: float, high: float, steps: int = 40) -> float:
    """The largest knob in [low, high] whose mean cost, which rises with it, is within budget; ``low`` where none is."""
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (middle, high) if cost_at(middle) <= budget else (low, middle)
    return low
