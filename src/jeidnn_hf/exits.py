"""Exit maths: from gate values to who leaves where. Pure tensor functions, batched over any leading dimensions.

Notation of the paper: ``g^l`` is the l-th gate value, ``P(G=l)`` the probability of exiting at l, ``P(E^l)`` the
probability that exit l is open for a sample that reached it (Eq. 3-4). The last exit has no gate: it takes the rest.

The three gate forms share one recursion over the remaining mass ``r_l = 1 - sum_{j<l} P(G=j)``, ``r_1 = 1``::

    P(G=l) = share(g^l, r_l),    r_{l+1} = r_l - P(G=l),    P(E^l) = P(G=l) / r_l,    P(G=L) = r_L
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

GATE_FORMS = ("min", "cumulative", "stick")
EXIT_RULES = ("conditional", "median", "sample")
STATISTICS = ("max_probability", "entropy", "power_entropy", "margin")


def class_probabilities(logits: Tensor) -> Tensor:
    """Softmax over the last dimension, laid out in memory with the classes first: sums over few classes, which all that
    reads it takes, then run over whole vectors of samples."""
    return logits.movedim(-1, 0).contiguous().softmax(0).movedim(0, -1)


def uncertainty_statistics(probs: Tensor) -> Tensor:
    """The gate's input m(x) of App. 9.9: ``[max p, H(p), H(p^2 / sum p^2), p_(1) - p_(2)]``, entropies in nats.

    Args:
        probs: class probabilities ``(..., K)``, fastest as `class_probabilities` gives them. A single class has a
            runner-up of probability 0.

    Returns:
        ``(..., 4)``, in the order of ``STATISTICS``. Differentiable, also where a probability underflows to 0.
    """
    probs = probs.movedim(-1, 0).contiguous()
    surprise = -probs.clamp_min(torch.finfo(probs.dtype).tiny).log()
    squares = probs.square()
    power = squares.sum(0)
    power_entropy = power.log() + 2 * (squares * surprise).sum(0) / power
    top, at = probs.max(0, keepdim=True)
    runner_up = probs.scatter(0, at, 0.0).amax(0)
    return torch.stack([top[0], (probs * surprise).sum(0), power_entropy, top[0] - runner_up], dim=-1)


def entropy(probs: Tensor) -> Tensor:
    """``-sum p log p`` in nats over the last dimension, 0 log 0 = 0, with a finite gradient everywhere."""
    return -(probs * probs.clamp_min(torch.finfo(probs.dtype).tiny).log()).sum(-1)


def exit_mass(gate: Tensor, remaining: Tensor, form: str) -> Tensor:
    """P(G=l) from the gate value ``g^l`` and the remaining mass ``r_l``, both ``(...,)`` in [0, 1].

    ``min``: min(g, r), Eq. 8 with the clamp at 0 that it needs once the gates sum past 1.
    ``cumulative``: g read as P(G <= l), so P(G=l) = max(0, g^l - max_{j<l} g^j).
    ``stick``: g read as P(E^l), so P(G=l) = g^l prod_{j<l} (1 - g^j).
    """
    if form == "min":
        return torch.minimum(gate, remaining)
    if form == "cumulative":
        return (gate - (1 - remaining)).clamp_min(0)
    if form == "stick":
        return gate * remaining
    raise ValueError(f"Expected gate_form to be one of {GATE_FORMS}, but got {form!r}.")


def _masses(gates: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """P(G=l) and r_l of all exits, each ``(..., L)``, from gates ``(..., L-1)``: the recursion in closed form."""
    certain = gates.new_ones(*gates.shape[:-1], 1)
    if form == "min":
        after = (1 - gates.cumsum(-1)).clamp_min(0)
    elif form == "cumulative":
        after = 1 - gates.cummax(-1).values if gates.shape[-1] else gates
    else:
        after = (1 - gates).cumprod(-1)
    remaining = torch.cat([certain, after], -1)
    masses = torch.cat([exit_mass(gates, remaining[..., :-1], form), remaining[..., -1:]], -1)
    return masses, remaining


def exit_distribution(gates: Tensor, form: str = "min") -> Tensor:
    """P(G=l | x), Eq. 7-8 for ``form="min"``: gates ``(..., L-1)`` to a distribution ``(..., L)`` that sums to 1."""
    return _masses(gates, form)[0]


def exit_log_distribution(gate_logits: Tensor) -> Tensor:
    """log P(G=l) for ``form="stick"`` from the gates before their sigmoid, ``(..., L-1)`` to ``(..., L)``::

        log P(G=l) = log sigmoid(a^l) + sum_{j<l} log sigmoid(-a^j),    a^L = infinity

    Finite, with a finite gradient, also where a gate is open or shut for sure.
    """
    certain = torch.zeros_like(gate_logits[..., :1])
    leave = torch.cat([F.logsigmoid(gate_logits), certain], -1)
    arrive = torch.cat([certain, F.logsigmoid(-gate_logits).cumsum(-1)], -1)
    return leave + arrive


def exit_probability(gates: Tensor, form: str = "min") -> Tensor:
    """P(E^l), Eq. 4 inverted: gates ``(..., L-1)`` to ``(..., L)``; 1 at the last exit, and where no mass is left."""
    return open_probability(*_masses(gates, form))


def exited_probability(gates: Tensor, form: str = "min") -> Tensor:
    """P(G <= l | x) = 1 - r_{l+1}: gates ``(..., L-1)`` to ``(..., L)``; 1 at the last exit."""
    mass, remaining = _masses(gates, form)
    return 1 - (remaining - mass)


def open_probability(mass: Tensor, remaining: Tensor) -> Tensor:
    """P(E^l) = P(G=l) / r_l, and 1 where r_l = 0."""
    is_left = remaining > 0
    return torch.where(is_left, mass / torch.where(is_left, remaining, 1.0), 1.0)


def exit_decision(probability: Tensor, threshold: float | Tensor = 0.5) -> Tensor:
    """The first exit whose ``probability`` ``(..., L)`` passes ``threshold`` (a number or ``(..., 1)``); else the last.

    With P(E^l) this is the paper's deterministic rule ``P(E^l) > 0.5``; with P(G <= l) it is the median rule, and with
    P(G <= l) and a uniform draw as threshold it samples from P(G). Returns indices ``(...,)`` in 0..L-1.
    """
    is_open = probability[..., :-1] > threshold
    return (is_open.cumsum(-1) == 0).sum(-1)
