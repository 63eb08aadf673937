"""Active exits: the few at which samples leave, chosen on held-out answers, and what that choice changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..gates import ExitPolicy
from ..record import ExitRecord


@dataclass(frozen=True)
class ActiveExits:
    """A choice of exits, from 0, and for each lambda accuracy and mean cost (share of the backbone's) on the record,
    with all exits and with these. Costs are those of the full table: what is saved at the other exits comes on top."""

    exits: list[int]
    lams: list[float | None]
    accuracy: list[tuple[float, float]]
    cost: list[tuple[float, float]]

    def __str__(self) -> str:
        lines = [f"active exits, from 0: {self.exits}"]
        for lam, accuracy, cost in zip(self.lams, self.accuracy, self.cost, strict=True):
            (before, after), (all_cost, cost) = accuracy, cost
            lines.append(
                f"lambda {lam}: accuracy {100 * before:.2f} -> {100 * after:.2f} % at {all_cost:.3f} -> {cost:.3f}"
            )
        return "\n".join(lines)


@torch.no_grad()
def choose_active_exits(
    record: ExitRecord, policy: ExitPolicy, lams: Sequence[float | None], *, most: int | None = None
) -> ActiveExits:
    """The exits at which samples of a held-out record leave at one of the lambdas, or the ``most`` that are taken by
    most samples; the last one always. For ``model.set_active_exits``.

    Args:
        record: of the role ``validation``.
        policy: gates, with ``active`` exits. It is left as it was.
        lams: that the choice has to serve; ``[None]`` for gates of one lambda.
        most: how many at most, the last one included. Samples that would have left at another exit go on.

    Raises:
        ValueError: no lambda, ``most`` below 1, a policy that asks every exit.
    """
    if not lams:
        raise ValueError("Expected lambdas to choose exits for, but got none; [None] for gates of one lambda.")
    if most is not None and (type(most) is not int or most < 1):
        raise ValueError(f"Expected most to be 1 or more, but got {most!r}.")
    if not hasattr(policy, "active"):
        raise ValueError(f"Expected gates, but got {type(policy).__name__}, which asks every exit.")
    rows, right = torch.arange(len(record.labels)), record.logits.argmax(-1) == record.labels[:, None]

    def outcomes() -> tuple[list[torch.Tensor], list[float], list[float]]:
        chosen = [record.exits_taken(policy, lam) for lam in lams]
        accuracy = [float(right[rows, exits].double().mean()) for exits in chosen]
        return chosen, accuracy, [float(record.normalised_costs[exits].double().mean()) for exits in chosen]

    before = policy.active
    try:
        policy.active = None
        chosen, accuracy, cost = outcomes()
        taken = torch.stack([torch.bincount(exits, minlength=record.num_exits) for exits in chosen]).amax(0)
        taken[-1] = len(rows) + 1
        order = taken.argsort(descending=True, stable=True)
        policy.active = sorted(order[: min(int((taken > 0).sum()), most or record.num_exits)].tolist())
        _, after, dearer = outcomes()
        pairs = list(zip(accuracy, after, strict=True)), list(zip(cost, dearer, strict=True))
        return ActiveExits(policy.active, list(lams), *pairs)
    finally:
        policy.active = before
