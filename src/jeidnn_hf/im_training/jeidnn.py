"""JEI-DNN (Regol, Chataoui, Coates, ICLR 2024), Algorithm 1: after a warm-up, gates learn at which exit a sample costs
least, and IMs learn on the samples that the gates send them, in turns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..gates import Lambda
from ..objectives import (
    cancelling_cost,
    class_imbalance_weights,
    draw_log_uniform,
    expected_cost,
    gate_loss,
    gate_targets,
    relative_cost,
    task_cost,
    total_cost,
)
from .base import Phase
from .plain import Plain


class JEIDNN(Plain):
    """Of a model for a range of lambdas every sample of every step draws its own, uniformly in log lambda, and its cost
    is divided by 1 + lambda: one training serves the whole range."""

    trains_gates = True
    turns = Phase.GATE, Phase.IM

    def __init__(self, *args):
        super().__init__(*args)
        self.register_buffer("pos_weight", torch.ones(self.num_exits - 1))
        """Weights of the positives of each gate's task, from validation answers."""

    def loss(self, model, features: Sequence[Tensor], labels: Tensor, phase: Phase, lam: Lambda) -> Tensor:
        """Gates see the answers detached; IMs see the gates detached (Eq. 30), unless ``full_gradient`` (Eq. 28-29)."""
        if phase is Phase.WARMUP:
            return super().loss(model, features, labels, phase, lam)
        config, costs = model.config, model.normalised_costs
        if phase is Phase.GATE:
            with torch.no_grad():
                logits = model.heads.members(features)
                cost = scaled_cost(task_cost(logits, labels, config.task_cost), costs, lam, config)
            if self.args.gate_objective == "expected_cost":
                return expected_cost(cost, model.policy.distribution(logits, lam))
            targets = gate_targets(cost, self.args.gate_targets)
            return gate_loss(model.policy.gate_logits(logits, lam), targets, self.pos_weight)
        logits = model.heads.members(features)
        task = task_cost(logits, labels)
        if self.args.full_gradient:
            return expected_cost(scaled_cost(task, costs, lam, config), model.policy.distribution(logits, lam))
        distribution = model.policy.distribution(logits.detach(), lam).detach()
        if self.args.im_weights == "cancelling":
            return cancelling_cost(task, distribution)
        return expected_cost(task, distribution)

    @torch.no_grad()
    def weigh_classes(self, logits: Tensor, labels: Tensor, costs: Tensor, config, lam: Lambda) -> None:
        """Sets ``pos_weight`` to the imbalance of each gate's task on held-out answers ``(N, L, K)`` (Section 4.1)."""
        cost = total_cost(task_cost(logits, labels, config.task_cost), costs, lam)
        targets = gate_targets(cost, self.args.gate_targets)
        weights = class_imbalance_weights(targets, self.args.imbalance_low, self.args.imbalance_high)
        self.pos_weight.copy_(weights)


def draw_lambda(config, labels: Tensor) -> float | Tensor:
    """The lambda of a checkpoint; of one for a range, ``(B,)`` uniform in the logarithm, from torch's generator."""
    return draw_log_uniform(*config.lam, labels) if config.has_lam_range else config.current_lam


def scaled_cost(task: Tensor, costs: Tensor, lam: float | Tensor, config) -> Tensor:
    """C^l (Eq. 5), ``(B, L)``; of a range of lambdas, C^l / (1 + lambda)."""
    return (relative_cost if config.has_lam_range else total_cost)(task, costs, lam)
