"""Inference modules (IMs): the classifiers at the exits, walked one exit at a time or scanned over all.

``heads.step(l, z, carry)`` gives the logits of exit l and what it hands to exit l+1; ``heads(features)`` is the scan.
Where the backbone keeps its native classifier, the last exit's feature is already its logits and passes unchanged.

IMs of every kind can reuse what the exits before answered, by ``cascade`` and ``ensemble`` (together the whole of Zero
Time Waste, Wolczyk et al., NeurIPS 2021, whose IMs are trained plainly) or by ``boosting`` (BoostedNet, Yu et al., AAAI
2023). With o^l for the own logits of exit l and ``F^l = o^l + boosting F^{l-1}``, or F^l = o^l without boosting, the
network answers with F^l or with the ensemble of F^1 to F^l.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

HEADS = ("linear", "mlp", "recurrent")


class Carry(NamedTuple):
    """What exit l hands to exit l+1, each only where it is read: the recurrent state ``(B, H)``, the log-probabilities
    so far ``(B, l, K)``, its own logits o^l and its boosted ones F^l, ``(B, K)`` each."""

    hidden: Tensor | None = None
    log_probs: Tensor | None = None
    own: Tensor | None = None
    boosted: Tensor | None = None


class Standardize(nn.Module):
    """``(z - mean) / std``, clipped at +-``clip``; mean and deviation are those of the training features."""

    def __init__(self, dim: int, clip: float = 8.0):
        super().__init__()
        self.clip = clip
        self.register_buffer("mean", torch.empty(dim))
        self.register_buffer("std", torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.mean)
        nn.init.ones_(self.std)

    def forward(self, z: Tensor) -> Tensor:
        return ((z - self.mean) / self.std).clamp(-self.clip, self.clip)


class LinearHead(nn.Linear):
    """The paper's IM: one linear layer, K d + K Mul-Adds as the paper counts them."""

    def __init__(self, dim: int, num_labels: int):
        super().__init__(dim, num_labels)

    def forward(self, z: Tensor, hidden: Tensor | None) -> tuple[Tensor, None]:
        return super().forward(z), None

    @property
    def mul_adds(self) -> int:
        return _linear_mul_adds(self)


class MLPHead(nn.Module):
    """One hidden layer of ``head_dim`` ReLU units."""

    def __init__(self, dim: int, num_labels: int, head_dim: int):
        super().__init__()
        self.hidden, self.out = nn.Linear(dim, head_dim), nn.Linear(head_dim, num_labels)

    def forward(self, z: Tensor, hidden: Tensor | None) -> tuple[Tensor, None]:
        return self.out(self.hidden(z).relu()), None

    @property
    def mul_adds(self) -> int:
        return _linear_mul_adds(self.hidden, self.out)


class Recurrence(nn.Linear):
    """The A of `RecurrentHead`: starts near 0.7 I."""

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.01)
        with torch.no_grad():
            self.weight.diagonal().add_(0.7)


class RecurrentHead(nn.Module):
    """A light side network that reads the frozen one (ladder side-tuning, Sung et al. 2022)::

        h_l = relu(W_l z_l + A_l h_{l-1} + b_l),    logits_l = V_l h_l + S_l z_l + c_l

    A starts near 0.7 I; the first exit has none.
    """

    def __init__(self, dim: int, num_labels: int, head_dim: int, is_first: bool):
        super().__init__()
        self.input = nn.Linear(dim, head_dim)
        self.hidden = None if is_first else Recurrence(head_dim, head_dim, bias=False)
        self.out = nn.Linear(head_dim, num_labels)
        self.skip = nn.Linear(dim, num_labels, bias=False)

    def forward(self, z: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor]:
        state = self.input(z)
        if self.hidden is not None:
            state = state + self.hidden(hidden)
        state = state.relu()
        return self.out(state) + self.skip(z), state

    @property
    def mul_adds(self) -> int:
        return _linear_mul_adds(self.input, self.hidden, self.out, self.skip)


class GeometricEnsemble(nn.Module):
    """Learned geometric ensemble of the exits so far (Zero Time Waste, Wolczyk et al. 2021)::

        logits_l = sum_{j<=l} w_lj log softmax(o^j / T_j) + b_l

    Starts as the identity: w = I, b = 0. The temperatures T are set, not trained by gradient.
    """

    def __init__(self, num_exits: int, num_labels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_exits, num_exits))
        self.bias = nn.Parameter(torch.empty(num_exits, num_labels))
        self.register_buffer("temperature", torch.empty(num_exits))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.temperature)
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)

    def log_probs(self, l: int, logits: Tensor) -> Tensor:
        return (logits / self.temperature[l]).log_softmax(-1)

    def combine(self, l: int, log_probs: Tensor) -> Tensor:
        """``(B, l+1, K)`` log-probabilities of exits 0..l to the ensemble's logits ``(B, K)``."""
        return torch.einsum("bjk,j->bk", log_probs, self.weight[l, : l + 1]) + self.bias[l]

    def forward(self, logits: Tensor) -> Tensor:
        """All exits at once, ``(B, L, K)`` to ``(B, L, K)``."""
        log_probs = (logits / self.temperature[:, None]).log_softmax(-1)
        return self.weight.tril() @ log_probs + self.bias

    def mul_adds(self, l: int) -> int:
        """At exit l (from 0): one temperature, l+1 weights and a bias for each class."""
        return (l + 3) * self.bias.shape[1]


class ExitHeads(nn.Module):
    """The inference modules of all exits.

    Args:
        exit_dims: width of each exit feature.
        num_labels: K.
        kind: ``linear``, ``mlp`` or ``recurrent``.
        head_dim: width of the hidden layer or state; unused by ``linear``.
        native_head: the last exit's feature is its logits, so no IM is trained there.
        ensemble: combine the exits so far; fitted after the IMs, on held-out data.
        standardize: standardise the features first (``set_feature_statistics``).
        cascade: every trained exit but the first reads ``[z_l, LayerNorm(o^{l-1})]``. No gradient goes back that way.
        boosting: the share of F^{l-1} that exit l adds to its own logits, 0.5 published. It is detached: an exit learns
            what the ones before leave over.
    """

    def __init__(
        self,
        exit_dims: Sequence[int],
        num_labels: int,
        kind: str = "linear",
        head_dim: int = 128,
        native_head: bool = True,
        ensemble: bool = False,
        standardize: bool = False,
        cascade: bool = False,
        boosting: float = 0.0,
    ):
        super().__init__()
        trained = list(exit_dims[:-1] if native_head else exit_dims)
        self.num_exits, self.num_labels, self.native_head = len(exit_dims), num_labels, native_head
        self.boosting = boosting
        self.norms = nn.ModuleList(Standardize(d) for d in trained) if standardize else None
        self.links = nn.ModuleList(nn.LayerNorm(num_labels) for _ in trained[1:]) if cascade else None
        read = [d + num_labels if cascade and l else d for l, d in enumerate(trained)]
        self.modules_by_exit = nn.ModuleList(_head(kind, d, num_labels, head_dim, not l) for l, d in enumerate(read))
        self.ensemble = GeometricEnsemble(len(exit_dims), num_labels) if ensemble else None

    @property
    def remembers(self) -> bool:
        """Whether later exits read what this one computes."""
        is_recurrent = any(isinstance(head, RecurrentHead) for head in self.modules_by_exit)
        return is_recurrent or self.boosting > 0 or any(part is not None for part in (self.ensemble, self.links))

    def step(self, l: int, z: Tensor, carry: Carry | None = None, answer: bool = True) -> tuple[Tensor, Carry]:
        """Exit l (0-based): feature ``(B, d_l)`` and carry to logits ``(B, K)`` and the next carry.

        ``answer=False``: nobody looks at these logits, they may be those of the member alone.
        """
        carry = carry or Carry()
        logits, hidden = self._member(l, z, carry.hidden, carry.own)
        own = None if self.links is None else logits
        boosted = None
        if self.boosting:
            logits = boosted = self._boosted(logits, carry.boosted)
        if self.ensemble is None:
            return logits, Carry(hidden, own=own, boosted=boosted)
        log_probs = self.ensemble.log_probs(l, logits)[:, None]
        if carry.log_probs is not None:
            log_probs = torch.cat([carry.log_probs, log_probs], dim=1)
        combined = self.ensemble.combine(l, log_probs) if answer else logits
        return combined, Carry(hidden, log_probs, own, boosted)

    def members(self, features: Sequence[Tensor]) -> Tensor:
        """Every exit's own logits o^l, ``(B, L, K)``, before ensemble and boosting."""
        logits, hidden = [], None
        for l, z in enumerate(features):
            own, hidden = self._member(l, z, hidden, logits[-1] if logits else None)
            logits.append(own)
        return torch.stack(logits, dim=1)

    def boosted(self, members: Tensor) -> Tensor:
        """The exits' own logits to F^l, ``(B, L, K)`` each: themselves without boosting."""
        if not self.boosting:
            return members
        boosted = []
        for own in members.unbind(1):
            boosted.append(self._boosted(own, boosted[-1] if boosted else None))
        return torch.stack(boosted, dim=1)

    def answers(self, members: Tensor) -> Tensor:
        """The exits' own logits to those that the network answers with, ``(B, L, K)`` each."""
        boosted = self.boosted(members)
        return boosted if self.ensemble is None else self.ensemble(boosted)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Features of all exits to the logits ``(B, L, K)`` that the network answers with."""
        return self.answers(self.members(features))

    def member_parameters(self) -> list[nn.Parameter]:
        """The IMs' own parameters, without the ensemble's."""
        links = [] if self.links is None else self.links.parameters()
        return [*self.modules_by_exit.parameters(), *links]

    def mul_adds(self, l: int, answer: bool = True) -> int:
        """Mul-Adds of exit l alone: standardisation, IM with its link (5 K for a LayerNorm), ensemble or boosting.

        ``answer=False``: of what later exits read.
        """
        if not answer and not self.remembers:
            return 0
        count = 0
        if self.ensemble is not None:
            count += self.ensemble.mul_adds(l) if answer else self.num_labels
        count += self.num_labels if self.boosting and l else 0
        if l < len(self.modules_by_exit):
            count += self.modules_by_exit[l].mul_adds
            count += len(self.norms[l].mean) if self.norms is not None else 0
            count += 5 * self.num_labels if self.links is not None and l else 0
        return count

    @torch.no_grad()
    def set_feature_statistics(self, means: Sequence[Tensor], stds: Sequence[Tensor]) -> None:
        """Sets what ``standardize`` subtracts and divides by, one vector per trained exit."""
        if self.norms is None:
            raise ValueError("Expected heads with standardize=True, but these take the features as they are.")
        for norm, mean, std in zip(self.norms, means, stds, strict=True):
            norm.mean.copy_(mean)
            norm.std.copy_(std.clamp_min(1e-6))

    def _member(
        self, l: int, z: Tensor, hidden: Tensor | None, previous: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if l == len(self.modules_by_exit):
            return z, hidden
        if self.norms is not None:
            z = self.norms[l](z)
        if self.links is not None and l:
            z = torch.cat([z, self.links[l - 1](previous.detach())], dim=-1)
        return self.modules_by_exit[l](z, hidden)

    def _boosted(self, own: Tensor, before: Tensor | None) -> Tensor:
        """F^l of o^l and F^{l-1}, None at the first exit."""
        return own if before is None else own + self.boosting * before.detach()


def boosting_of(num_exits: int) -> float:
    """The default recipe's share: 0.5 between neighbours a 16th of the network apart, or closer; ``0.5 ** (16 / L)``
    where fewer exits lie further apart, and have less in common."""
    return 0.5 ** max(1.0, 16 / num_exits)


def _head(kind: str, dim: int, num_labels: int, head_dim: int, is_first: bool) -> nn.Module:
    if kind == "linear":
        return LinearHead(dim, num_labels)
    if kind == "mlp":
        return MLPHead(dim, num_labels, head_dim)
    if kind == "recurrent":
        return RecurrentHead(dim, num_labels, head_dim, is_first)
    raise ValueError(f"Expected exit_head to be one of {HEADS}, but got {kind!r}.")


def _linear_mul_adds(*layers: nn.Linear | None) -> int:
    """K d, and K more for a bias, as Tables 2 and 3 count an IM."""
    return sum(m.weight.numel() + (m.out_features if m.bias is not None else 0) for m in layers if m is not None)
