"""What is fitted after the inference modules, on held-out answers: ensemble, and gates by the exact expected cost.

The IMs know their training images too well for their confidence there to mean anything; gates, temperatures and
ensemble weights learned on held-out images are calibrated (both work from logits alone, so they take seconds).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from .calibration import fit_temperatures
from .exits import class_probabilities, exit_distribution, exit_probability, uncertainty_statistics
from .gates import ExitPolicy
from .heads import GeometricEnsemble
from .objectives import draw_log_uniform, expected_cost, leave_or_go_on_loss, relative_cost, task_cost
from .record import collect_logits

if TYPE_CHECKING:
    from .training_args import JEIDNNTrainingArguments


def fit_held_out(model, validation: Dataset, args: JEIDNNTrainingArguments) -> dict[str, float]:
    """Ensemble (with its temperatures), then gates of a model, in place; the expected cost at the gates' first step and
    at their last."""
    device = next(model.heads.parameters()).device
    members, labels = (tensor.to(device) for tensor in collect_logits(model, validation, members=True))
    if model.heads.ensemble is not None:
        fit_ensemble(model.heads.ensemble, model.heads.boosted(members), labels, pull=args.ensemble_pull)
    with torch.no_grad():
        logits = model.heads.answers(members)
    losses = fit_gates(
        model.policy, logits, labels, model.normalised_costs, model.config.lam,
        kind=model.config.task_cost, steps=args.gate_steps, seed=args.seed,
    )  # fmt: skip
    return {"gate_fit_first_cost": losses[0], "gate_fit_last_cost": losses[-1]}


def fit_ensemble(ensemble: GeometricEnsemble, members: Tensor, labels: Tensor, pull: float = 0.3) -> None:
    """Fits temperatures, then weights and biases of the geometric ensemble, in place.

    Minimises the cross-entropy of every exit plus ``pull`` times the squared distance of its weights and biases from
    the identity. The problem is convex; L-BFGS in float64 solves it.

    Args:
        members: the logits that it combines, ``(N, L, K)``.
        labels: ``(N,)``.
    """
    ensemble.temperature.copy_(fit_temperatures(members, labels))
    log_probs = (members.double() / ensemble.temperature[:, None]).log_softmax(-1)
    identity = torch.eye(members.shape[1], dtype=torch.float64, device=members.device)
    weight, bias = identity.clone().requires_grad_(), torch.zeros_like(log_probs[0]).requires_grad_()
    target = labels[:, None].expand(members.shape[:2]).flatten()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=100, line_search_fn="strong_wolfe", history_size=20)

    def closure() -> Tensor:
        optimizer.zero_grad()
        logits = weight.tril() @ log_probs + bias
        loss = F.cross_entropy(logits.flatten(0, 1), target) * members.shape[1]
        loss = loss + pull * ((weight - identity).square().sum() + bias.square().sum())
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        ensemble.weight.copy_(weight.tril())
        ensemble.bias.copy_(bias)


def fit_gates(
    policy: ExitPolicy,
    logits: Tensor,
    labels: Tensor,
    mul_adds: Tensor,
    lam: float | list[float],
    *,
    kind: str = "error",
    steps: int = 400,
    learning_rate: float = 0.01,
    weight_decay: float = 0.25,
    improving: float = 0.6,
    seed: int = 0,
) -> list[float]:
    """Trains gates on fixed answers by the expected cost of Eq. 6, an exact sum over exits, in place; of two opinions
    each alone, so that what one makes of chance is not what the other does.

    For a range of lambdas each step draws log lambda uniformly for every sample and divides its cost by 1 + lambda.

    Args:
        policy: with ``gates``, a module, and their ``form``.
        logits: ``(N, L, K)`` on held-out images; labels ``(N,)``; mul_adds normalised, ``(L,)``.
        lam: one lambda or (low, high).
        kind: task cost, see ``objectives.task_cost``.
        steps: full-batch AdamW steps, at a learning rate that falls to zero on a cosine.
        learning_rate: of networks in the gates; five times that of single weights, of which gates have few.
        weight_decay: of networks.
        improving: share of the steps, the first, that minimise ``objectives.leave_or_go_on_loss`` instead: by Eq. 6 a
            gate that is shut for everybody has no gradient left to learn for whom it should open.

    Returns:
        The expected cost at every step.
    """
    if logits.shape[1] < 2:
        raise ValueError(f"Expected at least two exits to choose from, but got {logits.shape[1]}.")
    generator = torch.Generator(device=logits.device).manual_seed(seed)
    low, high = lam if isinstance(lam, Sequence) else (lam, lam)
    task = task_cost(logits, labels, kind)
    with torch.no_grad():
        statistics = uncertainty_statistics(class_probabilities(logits[:, :-1]))
    own = {"params": list(policy.gates.parameters(recurse=False)), "lr": 5 * learning_rate, "weight_decay": 0.0}
    networks = {"params": [p for network in policy.gates.children() for p in network.parameters()]}
    optimizer = torch.optim.AdamW([own, networks], lr=learning_rate, weight_decay=weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    losses = []
    for step in range(steps):
        lams = low
        if low < high:
            lams = draw_log_uniform(low, high, logits, generator)
        cost = relative_cost(task, mul_adds, lams)
        opinions = policy.gates.alone(statistics, lams)
        together = (sum(opinions) / len(opinions)).detach().sigmoid()
        losses.append(expected_cost(cost, exit_distribution(together, policy.form)))
        loss = 0.0
        for gate_logits in opinions:
            gates = gate_logits.sigmoid()
            if step < improving * steps:
                loss += leave_or_go_on_loss(gate_logits, cost, exit_probability(gates, policy.form))
            else:
                loss += expected_cost(cost, exit_distribution(gates, policy.form))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return torch.stack(losses).tolist()
