"""The oracle: exits chosen with the labels at hand. What no policy can know, and a bound on what policies can gain."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .objectives import optimal_exit, task_cost, total_cost
from .record import ExitRecord


class Outcome(NamedTuple):
    """Fraction of right answers; mean cost as a share of the backbone's Mul-Adds."""

    accuracy: float
    normalised_mul_adds: float


def oracle_exits(record: ExitRecord, lam: float | None = None, kind: str = "cross_entropy") -> Tensor:
    """The best exit of each sample, ``(N,)`` in 0..L-1, the earliest on ties.

    Without lambda the cheapest exit that is right, and the first one where none is; no policy is more accurate, and
    none as accurate is cheaper. With lambda the exit of the least task cost + lambda times cost (Eq. 23), for a task
    cost of ``objectives.TASK_COSTS``.
    """
    costs = record.normalised_costs.double()
    if lam is None:
        kind, lam = "error", 0.5 / float(costs.max())  # so little that all Mul-Adds together weigh less than an error
    return optimal_exit(total_cost(task_cost(record.logits.double(), record.labels, kind), costs, lam))


def outcome(record: ExitRecord, exit_index: Tensor) -> Outcome:
    """Of leaving at ``exit_index``, ``(N,)`` in 0..L-1; a ValueError for exits of other samples."""
    if exit_index.shape != record.labels.shape:
        raise ValueError(f"Expected an exit for each of {len(record.labels)} samples, but got {len(exit_index)}.")
    rows = torch.arange(len(exit_index), device=exit_index.device)
    right = record.logits[rows, exit_index].argmax(-1) == record.labels
    costs = torch.tensor(record.costs.normalised, dtype=torch.float64, device=exit_index.device)
    return Outcome(float(right.double().mean()), float(costs[exit_index].mean()))
