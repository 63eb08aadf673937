"""The objectives of JEI-DNN: warm-up, inference modules, gates, and the expected cost they all serve.

Shapes: logits ``(B, L, K)``, labels ``(B,)``, task and total costs ``(B, L)``, exit distributions ``(B, L)``,
gate logits and targets ``(B, L-1)``, Mul-Adds normalised by the backbone's ``(L,)``, lambda a number or ``(B,)``.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

TASK_COSTS = ("cross_entropy", "error", "brier")
PROBLEM_COSTS = {
    None: "cross_entropy",
    "single_label_classification": "cross_entropy",
    "multi_label_classification": "binary_cross_entropy",
    "regression": "squared_error",
}
"""The task cost of a model's loss, by the ``problem_type`` of transformers."""
GATE_TARGETS = ("subsequent", "if_min")
IM_WEIGHTS = ("exit_distribution", "cancelling")


def task_cost(logits: Tensor, labels: Tensor, kind: str = "cross_entropy") -> Tensor:
    """What a prediction costs at each exit, ``(B, L)``: cross-entropy (nats), 0/1 error, or the Brier score.

    For labels ``(B, K)``: ``binary_cross_entropy`` (nats) or ``squared_error``, the mean over the K.
    """
    labels = labels[:, None].expand(-1, logits.shape[1], *labels.shape[1:])
    if kind == "cross_entropy":
        return cross_entropy(logits, labels)
    if kind == "error":
        return (logits.argmax(-1) != labels).to(logits.dtype)
    if kind == "brier":
        return (logits.softmax(-1) - F.one_hot(labels, logits.shape[-1])).square().sum(-1)
    if kind == "binary_cross_entropy":
        return F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)
    if kind == "squared_error":
        return (logits - labels).square().mean(-1)
    raise ValueError(f"Expected task_cost to be one of {TASK_COSTS}, but got {kind!r}.")


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """``-log softmax(logits)[labels]``, ``(..., K)`` and ``(...)`` to ``(...)``.

    Logits whose classes come first in memory stay so: with few classes sums then run over whole vectors of samples.
    """
    by_class = logits.movedim(-1, 0)
    if by_class.is_contiguous():
        return -by_class.log_softmax(0).gather(0, labels[None]).squeeze(0)
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none").unflatten(0, labels.shape)


def total_cost(task: Tensor, mul_adds: Tensor, lam: float | Tensor) -> Tensor:
    """C^l = task cost + lambda IC^l_norm (Eq. 5), ``(B, L)``; lambda may differ from sample to sample."""
    return task + _per_exit(lam, task) * mul_adds.to(task.dtype)


def draw_log_uniform(low: float, high: float, like: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A lambda for each of ``like``'s rows, ``(B,)``, uniform in the logarithm over [low, high]."""
    draw = torch.rand(len(like), generator=generator, device=like.device)
    return torch.exp(math.log(low) + draw * math.log(high / low))


def relative_cost(task: Tensor, mul_adds: Tensor, lam: float | Tensor) -> Tensor:
    """C^l / (1 + lambda), so that of many lambdas the dear ones do not rule; shapes as of `total_cost`."""
    return total_cost(task, mul_adds, lam) / _per_exit(1 + lam, task)


def _per_exit(lam: float | Tensor, task: Tensor) -> float | Tensor:
    """A number stays one: made into a tensor, it would be waited for on its way to the GPU in every step."""
    return lam.to(task)[..., None] if isinstance(lam, Tensor) else lam


def expected_cost(cost: Tensor, distribution: Tensor) -> Tensor:
    """Eq. 6: the mean over samples of ``sum_l C^l P(G=l)``, exact over exits.

    With the gates' graph attached to ``distribution`` its gradient is Eq. 15 for the gates and Eq. 28-29 (JEI-DNN-FULL)
    for the inference modules; with ``distribution`` detached it is Eq. 30, the weighted loss of Algorithm 1, line 15.
    """
    return (cost * distribution).sum(-1).mean()


def cancelling_cost(task: Tensor, distribution: Tensor) -> Tensor:
    """The IM loss of the published code, over the L-1 trained exits: the mean of ``P(G=l) CE^l r_i``, with
    ``r_i = sum_l CE^l_i / sum_l P(G=l) CE^l_i`` in the graph. The weights cancel: value and gradient are those of the
    unweighted mean of the cross-entropies.
    """
    task, distribution = task[:, :-1], distribution[:, :-1]
    weighted = distribution * task
    return (weighted * task.sum(-1, keepdim=True) / weighted.sum(-1, keepdim=True)).mean()


def mixture_cost(task: Tensor, log_distribution: Tensor) -> Tensor:
    """Cross-entropy of the answers mixed by P(G), ``-log sum_l P(G=l) p^l[y]`` (Scardapane et al. 2020), ``(B,)``.

    Args:
        task: cross-entropies ``(B, L)``; log_distribution: log P(G=l), ``(B, L)``.
    """
    return -(log_distribution - task).logsumexp(-1)


def warmup_loss(task: Tensor, lr0: float = 1.0) -> Tensor:
    """Eq. 17 summed over the L-1 trained exits: ``sum_l (L - l) lr0 mean_i CE^l_i``.

    ``lr0`` is a learning rate: the trainer leaves it to the optimizer and keeps 1 here.
    """
    weights = torch.arange(task.shape[-1] - 1, 0, -1, dtype=task.dtype, device=task.device)
    return (task[:, :-1].mean(0) * weights * lr0).sum()


def optimal_exit(cost: Tensor) -> Tensor:
    """l* = argmin_l C^l (Eq. 23), the earliest exit on ties; ``(B, L)`` to indices ``(B,)``."""
    is_least = cost == cost.amin(-1, keepdim=True)
    return (is_least.cumsum(-1) == 0).sum(-1)


def gate_targets(cost: Tensor, kind: str = "subsequent") -> Tensor:
    """Binary targets of the gates, ``(B, L-1)`` bool.

    ``subsequent`` (ExitSubsequent, Eq. 22 and 31): t^l = 1[l >= l*].
    ``if_min`` (ExitIfMin, the prose of App. 9.15): t^l = 1[C^l <= min_{k>l} C^k], no later exit is cheaper.
    """
    if kind == "subsequent":
        exits = torch.arange(cost.shape[-1] - 1, device=cost.device)
        return exits >= optimal_exit(cost)[:, None]
    if kind == "if_min":
        cheapest_later = cost.flip(-1).cummin(-1).values.flip(-1)[:, 1:]
        return cost[:, :-1] <= cheapest_later
    raise ValueError(f"Expected gate_targets to be one of {GATE_TARGETS}, but got {kind!r}.")


def gate_loss(gate_logits: Tensor, targets: Tensor, pos_weight: Tensor | None = None) -> Tensor:
    """Eq. 16: the sum over gates of the binary cross-entropies, mean over samples; positives times ``pos_weight``."""
    losses = F.binary_cross_entropy_with_logits(
        gate_logits, targets.to(gate_logits.dtype), pos_weight=pos_weight, reduction="none"
    )
    return losses.sum(-1).mean()


def leave_or_go_on_loss(gate_logits: Tensor, cost: Tensor, leave: Tensor) -> Tensor:
    """One step of policy improvement as L-1 binary tasks: leave here, or go on with the present policy?

    Going on from exit l costs ``V_{l+1}``, with ``V_l = P(E^l) C^l + (1 - P(E^l)) V_{l+1}`` and ``V_L = C^L``. A sample
    counts ``|V_{l+1} - C^l|``, what the better choice saves. Unlike Eq. 6 it still teaches a gate that is shut.

    Args:
        leave: P(E^l) of the present policy, ``(B, L)``, taken as given.
    """
    leave, value, going_on = leave.detach(), cost[:, -1], []
    for l in reversed(range(gate_logits.shape[1])):
        going_on.insert(0, value)
        value = leave[:, l] * cost[:, l] + (1 - leave[:, l]) * value
    saved = torch.stack(going_on, dim=1) - cost[:, :-1]
    losses = F.binary_cross_entropy_with_logits(gate_logits, (saved >= 0).to(cost.dtype), saved.abs(), reduction="none")
    return losses.sum(-1).mean()


def class_imbalance_weights(targets: Tensor, low: float = 0.2, high: float = 5.0, floor: float = 0.1) -> Tensor:
    """Weight of the positives of each gate's task, ``(L-1,)``: ``#zeros / #ones``, clipped to [low, high]; Sec. 4.1.

    ``floor`` stands in for the number of ones where there is none.
    """
    ones = targets.sum(0).to(torch.get_default_dtype())
    return ((len(targets) - ones) / ones.clamp_min(floor)).clamp(low, high)
