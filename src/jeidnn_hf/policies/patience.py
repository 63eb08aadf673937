"""Patience: leave once several exits in a row have given the same answer (PABEE, Zhou et al., NeurIPS 2020)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..exits import exit_decision
from ..gates import ExitPolicy, Lambda
from ..record import ExitRecord
from .budgets import check_budget


class Patience(ExitPolicy):
    """Leaves at the first exit that, like the ``patience - 1`` before it, answers as the exit before.

    A counter rises with every exit that agrees with the one before and is 0 after one that does not; a sample leaves
    when it reaches ``patience``, which is at exit ``patience + 1`` or later.

    Args:
        num_exits: L.
        patience: in 0..L-1; with 0 everybody leaves at the first exit, with L - 1 nobody before the last.
    """

    def __init__(self, num_exits: int, patience: int):
        super().__init__(num_exits)
        if not 0 <= patience < num_exits:
            raise ValueError(f"Expected a patience in 0..{num_exits - 1}, but got {patience}.")
        self.register_buffer("patience", torch.tensor(patience))

    @classmethod
    def blank(cls, num_exits: int, num_labels: int) -> Patience:
        return cls(num_exits, num_exits - 1)

    @classmethod
    def fit(cls, record: ExitRecord, *, budget: float) -> Patience:
        """The largest patience whose mean normalised cost is within budget. Only L costs are to be had.

        Args:
            record: held-out answers.
            budget: mean Mul-Adds, as a share of the backbone's.

        Raises:
            ValueError: a budget below the first exit's cost or above the last's.
        """
        costs, agreements = check_budget(record, budget), consecutive_agreements(record.logits)
        within = [
            p for p in range(record.num_exits) if costs[exit_decision(agreements + 1, p)].mean() <= budget or p == 0
        ]
        return cls(record.num_exits, within[-1]).to(record.logits.device)

    def step(self, l: int, logits: Tensor, carry: Any = None, lam: Lambda = None) -> tuple[Tensor, Any]:
        answer = logits.argmax(-1)
        count, before = (torch.zeros_like(answer), None) if carry is None else carry
        if before is not None:
            count = torch.where(answer == before, count + 1, 0)
        leaves = torch.ones_like(answer, dtype=torch.bool) if l == self.num_exits - 1 else count >= self.patience
        return leaves, (count, answer)

    def decide(self, logits: Tensor, lam: Lambda = None) -> Tensor:
        return exit_decision(consecutive_agreements(logits) + 1, self.patience)

    def mul_adds(self, num_labels: int) -> int:
        """The maximum over K classes."""
        return num_labels


def consecutive_agreements(logits: Tensor) -> Tensor:
    """How many exits in a row, up to each, answer as the exit before: ``(N, L, K)`` to ``(N, L)``, 0 at the first."""
    answers = logits.argmax(-1)
    exits = torch.arange(answers.shape[1], device=answers.device).expand_as(answers)
    changed = torch.ones_like(answers, dtype=torch.bool)
    changed[:, 1:] = answers[:, 1:] != answers[:, :-1]
    return exits - torch.where(changed, exits, 0).cummax(1).values
