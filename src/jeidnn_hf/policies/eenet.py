"""EENet (Ilhan et al., WACV 2024): learned scores of the exits, and a quota for each from a learned assignment.

Two parts are trained on held-out answers: q_k, the probability that exit k is right, and pi, a distribution over exits
for each sample, which balances q against the budget. The mean of pi is the quota of each exit, from which thresholds
on q follow as in ``quota.quota_thresholds``. Scores and thresholds decide; the assignment is needed for fitting alone.

Departures from the published code:

* q_k is the logistic function of its linear layer. Clamped to [0, 1], as it was, it has no gradient beyond.
* pi is the softmax of the assignment network's outputs, without the sigmoid between: a softmax of numbers in [0, 1]
  never makes one exit more than e times as likely as another, so that most budgets are out of reach.
* Gradients are cleared at every step, and the best state is a copy; neither was so.
* Both parts take every step together, on all samples. The published alternation serves to keep each part's target
  fixed, which detaching the targets does.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..gates import ExitPolicy, Lambda
from ..record import ExitRecord
from .budgets import check_budget, largest_within
from .confidence import confidence
from .quota import leave_at, quota_thresholds

TOLERANCE = 0.1
"""How far the mean cost of the exits taken may be from the budget, relatively, before quotas are adjusted to it."""


class EENetScheduler(ExitPolicy):
    """Leaves at the first exit whose score q_k is at least its threshold.

    The score is the logistic function of a linear layer on the probabilities, their maximum, their confidence
    ``1 - H(p) / log K``, and the scores of the exits before.
    """

    def __init__(self, num_exits: int, num_labels: int):
        super().__init__(num_exits)
        self.weight = nn.Parameter(torch.zeros(num_exits, num_labels + 2))
        self.earlier = nn.Parameter(torch.zeros(num_exits, num_exits))
        self.bias = nn.Parameter(torch.zeros(num_exits))
        self.register_buffer("thresholds", torch.full((num_exits,), math.inf))

    @classmethod
    def blank(cls, num_exits: int, num_labels: int) -> EENetScheduler:
        return cls(num_exits, num_labels)

    @classmethod
    def fit(
        cls,
        record: ExitRecord,
        *,
        budget: float,
        steps: int = 300,
        learning_rate: float = 0.05,
        weight_decay: float = 0.1,
        hidden: int = 16,
        kl_weight: float = 1e-3,
        cost_weight: float = 1e-2,
        seed: int = 0,
    ) -> EENetScheduler:
        """Scores and quotas for one budget, kept on the record.

        The state kept is the one of the highest accuracy among those whose own quotas cost within 10 % of the budget
        (among all where there is none), each with its quotas first adjusted to the budget, see `quotas_within`.

        Args:
            record: held-out answers.
            budget: mean Mul-Adds, as a share of the backbone's.
            steps: full-batch AdamW steps, at a learning rate that falls to zero on a cosine.
            hidden: width of the assignment network.
            kl_weight: of the divergence of pi from the normalised scores.
            cost_weight: of the relative distance of pi's mean cost from the budget.

        Raises:
            ValueError: a budget below the first exit's cost or above the last's; a single exit.
        """
        if record.num_exits < 2:
            raise ValueError(f"Expected at least two exits to choose from, but got {record.num_exits}.")
        costs = check_budget(record, budget)
        right = record.logits.argmax(-1) == record.labels[:, None]
        policy = cls(record.num_exits, record.logits.shape[2]).to(record.logits.device)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            parts = _Training(policy.features(record.logits.to(policy.bias.dtype)).detach(), hidden)
        optimizer = torch.optim.AdamW(parts.parameters(), lr=learning_rate, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        correct, float_costs = right.to(policy.bias.dtype), costs.to(policy.bias.dtype)
        best, best_state = (-1.0,), {}
        for step in range(1, steps + 1):
            loss = parts.loss(correct, float_costs, budget, kl_weight, cost_weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 50 == 0 or step == steps:
                parts.write_scores(policy)
                scores, shares = policy.scores(record.logits), parts.quotas()
                spent = costs[leave_at(scores, quota_thresholds(scores, shares))].mean()
                shares = quotas_within(scores, shares, costs, budget)
                policy.thresholds = quota_thresholds(scores, shares)
                accuracy = right.gather(1, leave_at(scores, policy.thresholds)[:, None]).double().mean()
                quality = float((spent - budget).abs() < TOLERANCE * budget), float(accuracy)
                if quality > best:
                    best, best_state = quality, {key: value.clone() for key, value in policy.state_dict().items()}
        policy.load_state_dict(best_state)
        return policy

    @staticmethod
    def features(logits: Tensor) -> Tensor:
        """``[p, max p, 1 - H(p) / log K]``, ``(..., K)`` to ``(..., K + 2)``."""
        probs = logits.softmax(-1)
        measures = [confidence(probs, measure) for measure in ("max_probability", "entropy")]
        return torch.cat([probs, torch.stack(measures, dim=-1)], dim=-1)

    @torch.no_grad()
    def scores(self, logits: Tensor) -> Tensor:
        """q of all exits, ``(N, L, K)`` to ``(N, L)``; of the last one as well, which nobody needs to leave there."""
        scores = None
        for l in range(self.num_exits):
            scores = self._next_scores(l, logits[:, l], scores)
        return scores

    def step(self, l: int, logits: Tensor, carry: Any = None, lam: Lambda = None) -> tuple[Tensor, Any]:
        if l == self.num_exits - 1:
            return torch.ones_like(logits[:, 0], dtype=torch.bool), carry
        carry = self._next_scores(l, logits, carry)
        return carry[:, l] >= self.thresholds[l], carry

    def decide(self, logits: Tensor, lam: Lambda = None) -> Tensor:
        return leave_at(self.scores(logits), self.thresholds)

    def _next_scores(self, l: int, logits: Tensor, scores: Tensor | None) -> Tensor:
        """Scores of the exits before l, ``(B, l)``, and of l."""
        features = self.features(logits.to(self.bias.dtype))
        scores = features[:, :0] if scores is None else scores
        logit = (features * self.weight[l]).sum(-1) + (scores * self.earlier[l, :l]).sum(-1) + self.bias[l]
        return torch.cat([scores, logit.sigmoid()[:, None]], dim=1)

    def mul_adds(self, num_labels: int) -> int:
        """Of the last gate, which has L - 2 scores before it: maximum K, entropy 2 K, K + L weights and a bias."""
        return 4 * num_labels + self.num_exits + 1


def quotas_within(scores: Tensor, shares: Tensor, costs: Tensor, budget: float) -> Tensor:
    """The quotas ``(L,)`` closest to ``shares`` with which the samples' mean cost is the most within a budget.

    Of all quotas of one mean cost those of the least Kullback-Leibler divergence from ``shares`` are
    ``q_l exp(t c_l) / sum_j q_j exp(t c_j)``; t is found by bisection.

    Args:
        scores: ``(N, L)``; costs: ``(L,)``, rising.
    """
    log_shares = shares.double().clamp_min(1e-12).log()

    def tilted(t: float) -> Tensor:
        return (log_shares + t * (costs - costs[0])).softmax(0)

    def cost_at(t: float) -> float:
        return float(costs[leave_at(scores, quota_thresholds(scores, tilted(t)))].mean())

    steepest = 100 / float(costs.diff().min().clamp_min(1e-6))
    return tilted(largest_within(budget, cost_at, -steepest, steepest))


class _Training(nn.Module):
    """Both parts on the features ``(N, L, F)`` of one record, brought to mean 0 and deviation 1."""

    def __init__(self, features: Tensor, hidden: int):
        super().__init__()
        _, exits, width = features.shape
        self.mean, self.scale = features.mean(0), features.std(0, correction=0).clamp_min(1e-2)
        self.inputs = ((features - self.mean) / self.scale).transpose(0, 1).contiguous()

        def parameter(*shape: int, bound: float = 0.0) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape).uniform_(-bound, bound).to(features))

        self.weight, self.bias = parameter(exits, width), parameter(exits)
        self.earlier = parameter(exits, exits)
        self.hidden, self.hidden_bias = parameter(exits, width, hidden, bound=width**-0.5), parameter(exits, 1, hidden)
        self.hidden_earlier = parameter(exits, exits, hidden)
        self.out, self.out_bias = parameter(exits, hidden), parameter(exits)

    def forward(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of q, q itself without gradient, and log pi, ``(N, L)`` each."""
        from_features = torch.bmm(self.inputs, self.weight[:, :, None]).squeeze(-1).T + self.bias
        earlier = self.earlier.tril(-1)
        with torch.no_grad():
            scores = torch.zeros_like(from_features)
            for l in range(scores.shape[1]):
                scores[:, l] = (from_features[:, l] + scores @ earlier[l]).sigmoid()
        hidden_earlier = self.hidden_earlier * torch.ones_like(earlier).tril(-1)[:, :, None]
        hidden = torch.baddbmm(self.hidden_bias, self.inputs, self.hidden)
        hidden = torch.baddbmm(hidden, scores.expand(len(earlier), -1, -1), hidden_earlier).relu()
        assignment = torch.bmm(hidden, self.out[:, :, None]).squeeze(-1).T + self.out_bias
        return from_features + scores @ earlier.T, scores, assignment.log_softmax(1)

    def loss(self, correct: Tensor, costs: Tensor, budget: float, kl_weight: float, cost_weight: float) -> Tensor:
        """Cross-entropy of q, its samples weighted by pi at each exit, and what pi strives for."""
        logits, scores, log_pi = self()
        pi = log_pi.exp()
        weight = (pi / pi.sum(0)).detach()
        losses = F.binary_cross_entropy_with_logits(logits, correct, reduction="none")
        log_scores = scores.clamp_min(1e-6).log()
        divergence = (pi * (log_pi - log_scores)).sum(1) + log_scores.logsumexp(1)
        distance = ((pi @ costs).mean() - budget).abs() / budget
        return (weight * losses).sum(0).mean() + kl_weight * divergence.mean() + cost_weight * distance

    @torch.no_grad()
    def quotas(self) -> Tensor:
        """The mean of pi over the samples, ``(L,)``."""
        return self()[2].exp().mean(0)

    @torch.no_grad()
    def write_scores(self, policy: EENetScheduler) -> None:
        """The scores' layer as one on features as they are."""
        policy.weight.copy_(self.weight / self.scale)
        policy.bias.copy_(self.bias - (self.weight * self.mean / self.scale).sum(1))
        policy.earlier.copy_(self.earlier.tril(-1))
