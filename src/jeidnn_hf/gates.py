"""The interface of exit policies, who leaves where, and the gates: networks from an exit's answer to a gate value.

``policy.step(l, logits, carry, lam)`` decides for the samples that reached exit l; ``policy.decide`` is its scan. The
policies themselves are one file each in ``policies/``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .exits import STATISTICS

if TYPE_CHECKING:
    from .record import ExitRecord

Lambda = float | Tensor | None


class Decision(NamedTuple):
    """The exit taken ``(B,)`` in 0..L-1; P(G=l) ``(B, L)``; g^l ``(B, L-1)``, None for a policy without gates."""

    exit_index: Tensor
    distribution: Tensor
    gate_values: Tensor | None


class ExitPolicy(nn.Module):
    """Who leaves where.

    A policy sees the logits of the exits so far, one exit at a time; what it remembers is its carry, a pytree of
    batch-first tensors or None. Lambda is a number, ``(B,)``, or None where the policy has none.

    What it was fitted to is in its parameters and buffers, so that it is saved with a model; what it was built with
    besides, in ``options``, which JSON can hold: ``cls.blank(num_exits, num_labels, **options)`` builds it again.
    """

    def __init__(self, num_exits: int):
        super().__init__()
        self.num_exits = num_exits

    @property
    def options(self) -> dict[str, Any]:
        return {}

    @property
    def device(self) -> torch.device:
        return next(chain(self.parameters(), self.buffers()), torch.empty(0)).device

    def check_exits(self, num_exits: int) -> None:
        """A ValueError unless this policy is of a network with so many exits."""
        if num_exits != self.num_exits:
            raise ValueError(f"Expected a policy of {num_exits} exits, but got one of {self.num_exits}.")

    @classmethod
    def blank(cls, num_exits: int, num_labels: int, **options: Any) -> Self:
        """One that was fitted to nothing, to load a fitted one into."""
        raise NotImplementedError

    @classmethod
    def fit(cls, record: ExitRecord, *, budget: float, **options: Any) -> Self:
        """The best policy of its kind whose mean cost on ``record`` is within a budget.

        Args:
            record: held-out answers.
            budget: mean Mul-Adds, as a share of the backbone's.

        Raises:
            ValueError: a budget that the first exit exceeds or the last cannot spend.
        """
        raise NotImplementedError

    def step(self, l: int, logits: Tensor, carry: Any = None, lam: Lambda = None) -> tuple[Tensor, Any]:
        """Logits ``(B, K)`` of exit l (0-based) to a bool ``(B,)``, who leaves here, and the next carry."""
        raise NotImplementedError

    def decide(self, logits: Tensor, lam: Lambda = None) -> Tensor:
        """Logits ``(N, L, K)`` of all exits to the exit taken, ``(N,)`` in 0..L-1."""
        exit_index = torch.full(logits.shape[:1], self.num_exits - 1, device=logits.device)
        undecided, carry = torch.ones_like(exit_index, dtype=torch.bool), None
        for l in range(self.num_exits - 1):
            leaves, carry = self.step(l, logits[:, l], carry, lam)
            exit_index[undecided & leaves] = l
            undecided &= ~leaves
        return exit_index

    def gate_values(self, logits: Tensor, lam: Lambda = None) -> Tensor | None:
        """g^l, ``(B, L-1)``, for a policy that has gates."""
        return None

    def distribution(self, logits: Tensor, lam: Lambda = None) -> Tensor:
        """P(G=l), ``(B, L)``; one-hot for a policy that decides without chance."""
        return nn.functional.one_hot(self.decide(logits, lam), self.num_exits).to(logits.dtype)

    def forward(self, logits: Tensor, lam: Lambda = None) -> Decision:
        """``decide``, ``distribution`` and ``gate_values`` of the same logits ``(B, L, K)``."""
        return Decision(self.decide(logits, lam), self.distribution(logits, lam), self.gate_values(logits, lam))

    def mul_adds(self, num_labels: int) -> int:
        """Mul-Adds of one decision."""
        return 0


def check_statistics(names: Sequence[str] | None) -> tuple[str, ...]:
    """Names of some of `STATISTICS` in their order, None for all of them; else a ValueError."""
    if names is None:
        return STATISTICS
    if isinstance(names, str) or not names or list(names) != [name for name in STATISTICS if name in names]:
        raise ValueError(f"Expected gate_statistics to name some of {STATISTICS} in this order, but got {names!r}.")
    return tuple(names)


def statistics_mul_adds(num_labels: int, names: Sequence[str] = STATISTICS) -> int:
    """9 K + 1 for all: maximum K, margin K + 1, entropies 2 K and 5 K."""
    K = num_labels
    each = {"max_probability": K, "entropy": 2 * K, "power_entropy": 5 * K, "margin": K + 1}
    return sum(each[name] for name in names)


class LinearGates(nn.Module):
    """The paper's gates: exit l has its own linear layer on the four statistics, g^l = sigmoid(w_l . m + b_l).

    ``statistics``: those of the four that are read, see `check_statistics`.
    """

    kind = "linear"

    def __init__(self, num_gates: int, statistics: Sequence[str] | None = None):
        super().__init__()
        self.statistics = check_statistics(statistics)
        self.weight = nn.Parameter(torch.empty(num_gates, len(self.statistics)))
        self.bias = nn.Parameter(torch.empty(num_gates))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As ``nn.Linear(4, 1)`` for each gate."""
        bound = len(self.statistics) ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, statistics: Tensor, lam: Lambda = None, exits: slice | int = slice(None)) -> Tensor:
        """Statistics ``(B, L-1, 4)``, or ``(B, 4)`` for one exit, to gate logits ``(B, L-1)`` or ``(B,)``."""
        return (_read(statistics, self.statistics) * self.weight[exits]).sum(-1) + self.bias[exits]

    def alone(self, statistics: Tensor, lam: Lambda = None) -> list[Tensor]:
        """Gate logits by the one opinion that there is, see `SharedGates.alone`."""
        return [self(statistics, lam)]

    def mul_adds(self, num_labels: int) -> int:
        """9 K + 6: the statistics, and 5 for the linear layer."""
        return statistics_mul_adds(num_labels, self.statistics) + len(self.statistics) + 1


class GateNetwork(nn.Module):
    """Statistics, scaled log lambda and an embedding of the exit through two hidden layers, plus a bias per exit."""

    def __init__(self, num_gates: int, num_statistics: int, width: int, embedding: int):
        super().__init__()
        self.embedding = nn.Embedding(num_gates, embedding)
        first, second = nn.Linear(num_statistics + 1 + embedding, width), nn.Linear(width, width)
        self.layers = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(width, 1, bias=False))
        self.bias = nn.Parameter(torch.empty(num_gates))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, read: Tensor, t: Tensor, exits: slice | int) -> Tensor:
        """Statistics that are read ``(B, L-1, S)`` or ``(B, S)`` and t ``(B, 1)`` or ``(B,)`` to gate logits."""
        shape = read.shape[:-1]
        inputs = [read, t.expand(shape)[..., None], self.embedding.weight[exits].expand(*shape, -1)]
        return self.layers(torch.cat(inputs, dim=-1)).squeeze(-1) + self.bias[exits]


class SharedGates(nn.Module):
    """Gates that read the statistics alike at all exits and take lambda. Two opinions add up::

        g^l = sigmoid(plain + fine),    t: log lambda scaled to [-1, 1]
        plain = (w + u t) . s(m) + a_l + c_l t + q_l t^2,    s: `log_certainty`
        fine: a `GateNetwork`

    The plain one, which starts as one threshold on the largest probability that falls as lambda rises, errs little
    where held-out images say little; the fine one sees more where they say more. ``held_out.fit_gates`` fits each
    alone, so that they do not err alike.

    Args:
        num_gates: L - 1.
        num_labels: K; entropies are divided by log K.
        lam_range: (low, high); log lambda is scaled to [-1, 1] over it. Equal ends: lambda is not read.
        statistics: those of the four that are read, see `check_statistics`.
    """

    kind = "shared"

    def __init__(
        self,
        num_gates: int,
        num_labels: int,
        lam_range: tuple[float, float],
        width: int = 32,
        embedding: int = 8,
        statistics: Sequence[str] | None = None,
    ):
        super().__init__()
        self.lam_range, self.statistics = lam_range, check_statistics(statistics)
        self.weight = nn.Parameter(torch.empty(2, len(self.statistics)))
        self.bias, self.slope, self.curvature = (nn.Parameter(torch.empty(num_gates)) for _ in range(3))
        self.fine = GateNetwork(num_gates, len(self.statistics), width, embedding)
        self.scale = (1.0, 1 / math.log(max(num_labels, 2)), 1 / math.log(max(num_labels, 2)), 1.0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for parameter in (self.weight, self.bias, self.curvature):
            nn.init.zeros_(parameter)
        nn.init.constant_(self.weight[0, 0], 0.5)
        nn.init.constant_(self.slope, 2.5)

    def forward(self, statistics: Tensor, lam: Lambda = None, exits: slice | int = slice(None)) -> Tensor:
        """As ``LinearGates.forward``; lambda a number or ``(B,)``."""
        return sum(self._opinions(statistics, lam, exits))

    def alone(self, statistics: Tensor, lam: Lambda = None) -> list[Tensor]:
        """Gate logits ``(B, L-1)`` by each opinion alone: twice its share."""
        return [2 * opinion for opinion in self._opinions(statistics, lam, slice(None))]

    def _opinions(self, statistics: Tensor, lam: Lambda, exits: slice | int) -> tuple[Tensor, Tensor]:
        t = self.scaled_log(lam, statistics).reshape(-1, *[1] * (statistics.dim() - 2))
        statistics = statistics * statistics.new_tensor(self.scale)
        certainty = _read(log_certainty(statistics), self.statistics)
        weighed, by_lam = F.linear(certainty, self.weight).unbind(-1)
        plain = weighed + self.bias[exits] + t * (by_lam + self.slope[exits] + t * self.curvature[exits])
        return plain, self.fine(_read(statistics, self.statistics), t, exits)

    def scaled_log(self, lam: Lambda, like: Tensor) -> Tensor:
        """log lambda scaled to [-1, 1] over its range, one for each of ``like``'s rows."""
        low, high = map(math.log, self.lam_range)
        if low == high:
            return like.new_zeros(like.shape[0])
        if lam is None:
            raise ValueError(f"Expected a lambda in {list(self.lam_range)} for gates that read it, but got None.")
        lam = torch.as_tensor(lam, dtype=like.dtype, device=like.device).expand(like.shape[0])
        return (2 * lam.log() - (low + high)) / (high - low)

    def mul_adds(self, num_labels: int) -> int:
        """The statistics; for each its distance from certainty, the logarithm and its weight at lambda, and a bias; the
        network."""
        plain = 3 * len(self.statistics) + 1
        fine = sum(p.numel() for p in self.fine.layers.parameters()) + 1
        return statistics_mul_adds(num_labels, self.statistics) + plain + fine


SMALLEST_DOUBT = 1e-4
"""What `log_certainty` tells apart from no doubt at all."""


def log_certainty(statistics: Tensor) -> Tensor:
    """Minus the logarithm of how far statistics ``(..., 4)`` are from those of a certain answer: 4.6 for a certain one,
    -4.6 for a guess. Near certainty, where large budgets are decided, the statistics themselves hardly differ.
    Entropies come divided by log K.
    """
    maximum, entropy, power_entropy, margin = statistics.unbind(-1)
    doubts = torch.stack([1 - maximum, entropy, power_entropy, 1 - margin], dim=-1)
    return math.log(SMALLEST_DOUBT) / 2 - doubts.clamp_min(0).add(SMALLEST_DOUBT).log()


GATES = ("linear", "shared")


def build_gates(
    kind: str,
    num_gates: int,
    num_labels: int,
    lam_range: tuple[float, float],
    statistics: Sequence[str] | None = None,
) -> nn.Module:
    """Fresh gates, one of `GATES`; arguments as of `SharedGates`."""
    if kind == "linear":
        return LinearGates(num_gates, statistics)
    if kind == "shared":
        return SharedGates(num_gates, num_labels, lam_range, statistics=statistics)
    raise ValueError(f"Expected gates to be one of {GATES}, but got {kind!r}.")


def _read(statistics: Tensor, names: tuple[str, ...]) -> Tensor:
    if names == STATISTICS:
        return statistics
    return torch.stack([s for name, s in zip(STATISTICS, statistics.unbind(-1), strict=True) if name in names], dim=-1)
