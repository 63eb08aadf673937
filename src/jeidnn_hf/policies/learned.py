"""The learned gates: the paper's (Eq. 3-8), one linear gate per exit, and those that share weights and take lambda."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..configuration_jeidnn import RECIPES
from ..exits import (
    EXIT_RULES,
    GATE_FORMS,
    class_probabilities,
    exit_decision,
    exit_distribution,
    exit_mass,
    exit_probability,
    exited_probability,
    open_probability,
    uncertainty_statistics,
)
from ..gates import Decision, ExitPolicy, Lambda, build_gates
from ..held_out import fit_gates
from ..record import ExitRecord
from .budgets import check_budget, largest_within

LAMBDAS = tuple(RECIPES["default"]["lam"])
"""The range of lambdas in which a budget looks for its own."""


class LearnedGates(ExitPolicy):
    """Leaves where the learned gates say so (Eq. 3-8).

    Args:
        gates: module from statistics ``(B, L-1, 4)`` to gate logits ``(B, L-1)``.
        form: how gate values make P(G=l), see ``exits.exit_mass``.
        rule: ``conditional``, the first P(E^l) > threshold; ``median``, the first P(G <= l) > threshold; ``sample``,
            l drawn from P(G).
        threshold: 0.5 in the paper.
        active: the exits, from 0, whose gates can open; the others count as shut, g^l = 0. None: all.

    ``lam`` is the lambda in use where a call names none; None at first.
    """

    def __init__(
        self,
        gates: nn.Module,
        num_exits: int,
        form: str = "min",
        rule: str = "conditional",
        threshold: float = 0.5,
        active: Sequence[int] | None = None,
    ):
        super().__init__(num_exits)
        if form not in GATE_FORMS:
            raise ValueError(f"Expected gate_form to be one of {GATE_FORMS}, but got {form!r}.")
        if rule not in EXIT_RULES:
            raise ValueError(f"Expected exit_rule to be one of {EXIT_RULES}, but got {rule!r}.")
        self.gates, self.form, self.rule, self.threshold = gates, form, rule, threshold
        self.active = None if active is None else check_active_exits(active, num_exits)
        self.lam: float | None = None

    @classmethod
    def fit(
        cls,
        record: ExitRecord,
        *,
        budget: float | None = None,
        lam: float | Sequence[float] | None = None,
        gates: str = "shared",
        form: str = "stick",
        rule: str = "conditional",
        **options: Any,
    ) -> LearnedGates:
        """Gates by the expected cost of Eq. 6 on held-out answers, see ``held_out.fit_gates``.

        Args:
            record: held-out answers.
            budget: the lambda in use becomes the smallest whose mean normalised cost is within it; None for ``lam``.
            lam: one lambda, or (low, high). `LAMBDAS` where a budget has to find it.
            gates: ``shared`` gates take lambda as an input, and are fitted once; ``linear`` ones are fitted anew for
                each lambda tried on the way to a budget.
            form: as of the class.
            rule: as of the class.
            options: of ``fit_gates``.

        Raises:
            ValueError: neither budget nor lambda; a budget out of range, or below what the largest lambda spends.
        """
        if budget is None and lam is None:
            raise ValueError("Expected a budget or a lambda, but got neither.")
        lams = LAMBDAS if lam is None else lam
        low, high = lams if isinstance(lams, Sequence) else (lams, lams)
        classes, exits = record.logits.shape[2], record.num_exits
        record_of_policy = record.logits, record.labels, record.normalised_costs

        def fitted(lam: float | tuple[float, float]) -> LearnedGates:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(options.get("seed", 0))
                network = build_gates(gates, exits - 1, classes, (low, high))
            policy = cls(network.to(record.logits.device), exits, form, rule)
            fit_gates(policy, *record_of_policy, lam, **options)
            return policy

        shared = fitted((low, high)) if gates == "shared" else None
        if budget is None:
            policy = shared or fitted(low)
            policy.lam = low if low == high else None
            return policy
        costs = check_budget(record, budget)

        def policy_at(thrift: float) -> LearnedGates:
            lam = high * (low / high) ** thrift
            policy = shared or fitted(lam)
            policy.lam = lam
            return policy

        def cost_at(thrift: float) -> float:
            return float(costs[policy_at(thrift).decide(record.logits)].mean())

        least = cost_at(0.0)
        if least > budget:
            raise ValueError(
                f"Expected a budget of at least {least:.3f}, the cost at lambda {high:g}, but got {budget}; "
                "pass a larger lambda."
            )
        return policy_at(largest_within(budget, cost_at, 0.0, 1.0, steps=30 if shared else 8))

    @property
    def lam_range(self) -> tuple[float, float]:
        """(low, high) of the lambdas that these gates serve, equal for one; a ValueError where there is none."""
        low_high = getattr(self.gates, "lam_range", (self.lam, self.lam))
        if None in low_high:
            raise ValueError("Expected gates fitted to a lambda, but these were not; use LearnedGates.fit.")
        return low_high

    def step(self, l: int, logits: Tensor, carry: Any = None, lam: Lambda = None) -> tuple[Tensor, Any]:
        if carry is None:
            carry = torch.ones_like(logits[:, 0]), self._draw(logits)
        remaining, draw = carry
        if l == self.num_exits - 1:
            return torch.ones_like(remaining, dtype=torch.bool), carry
        if self.active is not None and l not in self.active:
            return torch.zeros_like(remaining, dtype=torch.bool), carry
        gate = self.gates(uncertainty_statistics(class_probabilities(logits)), self._lam(lam), l).sigmoid()
        if self.form == "stick" and self.rule == "conditional":
            return gate > self.threshold, carry  # P(E^l) is the gate itself
        mass = exit_mass(gate, remaining, self.form)
        left = remaining - mass
        if self.rule == "conditional":
            return open_probability(mass, remaining) > self.threshold, (left, draw)
        return 1 - left > (self.threshold if draw is None else draw), (left, draw)

    def gate_logits(self, logits: Tensor, lam: Lambda = None) -> Tensor:
        """``(B, L, K)`` to ``(B, L-1)``, before the sigmoid."""
        return self.gates(uncertainty_statistics(class_probabilities(logits[:, :-1])), self._lam(lam))

    def gate_values(self, logits: Tensor, lam: Lambda = None) -> Tensor:
        gates = self.gate_logits(logits, lam).sigmoid()
        if self.active is None:
            return gates
        is_active = torch.zeros(self.num_exits, dtype=torch.bool, device=gates.device)
        is_active[self.active] = True
        return torch.where(is_active[:-1], gates, 0.0)

    def distribution(self, logits: Tensor, lam: Lambda = None) -> Tensor:
        return exit_distribution(self.gate_values(logits, lam), self.form)

    def decide(self, logits: Tensor, lam: Lambda = None) -> Tensor:
        return self._first_open(self.gate_values(logits, lam))

    def forward(self, logits: Tensor, lam: Lambda = None) -> Decision:
        gates = self.gate_values(logits, lam)
        return Decision(self._first_open(gates), exit_distribution(gates, self.form), gates)

    def _first_open(self, gates: Tensor) -> Tensor:
        if self.rule == "conditional":
            return exit_decision(exit_probability(gates, self.form), self.threshold)
        draw = self._draw(gates)
        threshold = self.threshold if draw is None else draw[:, None]
        return exit_decision(exited_probability(gates, self.form), threshold)

    def mul_adds(self, num_labels: int) -> int:
        return self.gates.mul_adds(num_labels)

    def _lam(self, lam: Lambda) -> Lambda:
        return self.lam if lam is None else lam

    def _draw(self, like: Tensor) -> Tensor | None:
        return torch.rand(len(like), dtype=like.dtype, device=like.device) if self.rule == "sample" else None


def check_active_exits(exits: Sequence[int], num_exits: int) -> list[int]:
    """Rising exit numbers from 0 with the last one among them, as a list; else a ValueError."""
    whole = isinstance(exits, Sequence) and all(type(l) is int for l in exits)
    if not whole or list(exits) != sorted(set(exits)) or not exits or exits[0] < 0 or exits[-1] != num_exits - 1:
        raise ValueError(
            f"Expected active exits as rising numbers from 0 to {num_exits - 1}, the last one included, but got "
            f"{exits!r}."
        )
    return list(exits)
