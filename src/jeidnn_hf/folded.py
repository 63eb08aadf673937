"""Heads and gates for inference: what their weights alone decide is worked out beforehand, so that an exit takes few
operations. Same interfaces and same answers, up to rounding, as the `ExitHeads` and gates they are folded from.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .exits import STATISTICS
from .gates import ExitPolicy, Lambda, LinearGates, SharedGates, log_certainty
from .heads import ExitHeads, LinearHead, MLPHead, RecurrentHead


def fold(heads: ExitHeads, policy: ExitPolicy) -> tuple[Any, ExitPolicy]:
    """Both folded; what has no folded form, such as cascading heads or another policy than gates, is given back."""
    foldable = heads.links is None and _is_exact(heads)
    folded_heads = FoldedHeads(heads) if foldable else heads
    gates = getattr(policy, "gates", None)
    if isinstance(gates, (LinearGates, SharedGates)) and _is_exact(policy):
        policy = copy.copy(policy)
        policy._modules = {name: module for name, module in policy._modules.items() if name != "gates"}
        policy.gates = FoldedGates(gates)
    return folded_heads, policy


def _is_exact(module: nn.Module) -> bool:
    return all(tensor.dtype in (torch.float32, torch.float64) for tensor in module.parameters())


class FoldedCarry(NamedTuple):
    """The recurrent state ``(B, H)``; of the ensemble, what the exits so far add to this and each later exit's logits,
    ``(B, L - l, K)``; boosted logits, divided by the ensemble's temperature, ``(B, K)``."""

    hidden: Tensor | None = None
    sums: Tensor | None = None
    boosted: Tensor | None = None


class FoldedHead(NamedTuple):
    """One trained exit: ``clip`` the bounds of its feature; ``input`` weight and bias of all that reads it; ``hidden``
    and ``out`` as of `RecurrentHead`, transposed."""

    clip: tuple[Tensor, Tensor] | None
    input: tuple[Tensor, Tensor]
    hidden: Tensor | None
    out: Tensor | None
    out_bias: Tensor | None
    width: int


class FoldedHeads:
    """`ExitHeads` without links.

    The standardisation is folded into the weights that read it; the temperature into those that write, and into the
    share that is boosted, ``F^l / T_l = o^l / T_l + (boosting T_{l-1} / T_l) F^{l-1} / T_{l-1}``; the two products with
    a recurrent head's feature are one. With w the ensemble's weights, exit l adds ``w_ml log p^l`` to the logits of
    every exit m >= l as soon as it is known, so that no exit has to be remembered by itself.
    """

    def __init__(self, heads: ExitHeads):
        self.num_exits = heads.num_exits
        self.remembers = heads.remembers
        with torch.no_grad():
            self.exits = [self._folded(heads, l) for l in range(len(heads.modules_by_exit))]
            self.ensemble, self.boosting = None, None
            if heads.boosting:
                T = torch.ones(self.num_exits) if heads.ensemble is None else heads.ensemble.temperature
                self.boosting = [0.0, *(heads.boosting * T[:-1].double() / T[1:].double()).tolist()]
            if heads.ensemble is not None:
                weight = heads.ensemble.weight.detach().clone()
                self.ensemble = [weight[l:, l, None].contiguous() for l in range(self.num_exits)]
                self.bias = heads.ensemble.bias.detach().clone()
                self.last_temperature = heads.ensemble.temperature[-1].clone()

    def step(
        self, l: int, z: Tensor, carry: FoldedCarry | None = None, answer: bool = True
    ) -> tuple[Tensor, FoldedCarry]:
        """As `ExitHeads.step`."""
        hidden, sums, boosted = carry or FoldedCarry()
        if l < len(self.exits):
            logits, hidden = self._member(self.exits[l], z, hidden)
        else:
            logits = z if self.ensemble is None else z / self.last_temperature
        if self.boosting is not None:
            logits = boosted = logits if boosted is None else logits.add(boosted, alpha=self.boosting[l])
        if self.ensemble is None:
            return logits, FoldedCarry(hidden, boosted=boosted)
        sums = self.bias.expand(z.shape[0], -1, -1) if sums is None else sums[:, 1:]
        sums = torch.addcmul(sums, logits.log_softmax(-1)[:, None], self.ensemble[l])
        return sums[:, 0], FoldedCarry(hidden, sums, boosted)

    def _member(self, head: FoldedHead, z: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if head.clip is not None:
            z = torch.clamp(z, *head.clip)
        read = F.linear(z, *head.input)
        if head.out is None:
            return read, None
        if head.out_bias is not None:
            return torch.addmm(head.out_bias, read.relu_(), head.out), None
        state, skip = read.split((head.width, read.shape[1] - head.width), dim=1)
        state = state.relu() if head.hidden is None else torch.addmm(state, hidden, head.hidden).relu_()
        return torch.addmm(skip, state, head.out), state

    @staticmethod
    def _folded(heads: ExitHeads, l: int) -> FoldedHead:
        head, like = heads.modules_by_exit[l], next(heads.modules_by_exit[l].parameters())
        mean, std, clip = 0.0, 1.0, None
        if heads.norms is not None:
            norm = heads.norms[l]
            mean, std = norm.mean.double(), norm.std.double()
            clip = tuple((mean + side * norm.clip * std).to(like) for side in (-1, 1))
        scale = 1.0 if heads.ensemble is None else heads.ensemble.temperature[l].double()

        def reading(layer: nn.Linear, bias: Tensor, scale: Tensor | float = 1.0) -> tuple[Tensor, Tensor]:
            """Weight and bias of ``(layer.weight (z - mean) / std + bias) / scale``."""
            weight = layer.weight.double() / std
            shift = weight @ mean if isinstance(mean, Tensor) else 0.0
            return weight / scale, (bias.double() - shift) / scale

        if isinstance(head, LinearHead):
            weight, bias = reading(head, head.bias, scale)
            return FoldedHead(clip, (weight.to(like), bias.to(like)), None, None, None, len(bias))
        out = (head.out.weight.double() / scale).t().to(like).contiguous()
        if isinstance(head, MLPHead):
            weight, bias = reading(head.hidden, head.hidden.bias)
            out_bias = (head.out.bias.double() / scale).to(like)
            return FoldedHead(clip, (weight.to(like), bias.to(like)), None, out, out_bias, len(bias))
        assert isinstance(head, RecurrentHead)
        parts = reading(head.input, head.input.bias), reading(head.skip, head.out.bias, scale)
        weight, bias = (torch.cat(tensors).to(like) for tensors in zip(*parts, strict=True))
        hidden = None if head.hidden is None else head.hidden.weight.detach().t().contiguous()
        return FoldedHead(clip, (weight, bias), hidden, out, None, head.input.out_features)


class FoldedGates:
    """`LinearGates` or `SharedGates`, one exit at a time: what an exit and a lambda make of weights and biases is
    worked out once for each."""

    def __init__(self, gates: LinearGates | SharedGates):
        self.kind, self.is_shared = gates.kind, isinstance(gates, SharedGates)
        self._known: dict[tuple[int, float | None], tuple[Tensor, Tensor, Tensor]] = {}
        with torch.no_grad():
            self.weight = _of_all_statistics(gates.weight, gates.statistics)
            if not self.is_shared:
                self.bias = gates.bias.detach().clone()[:, None]
                return
            self.lam_range, self.scaled_log = gates.lam_range, gates.scaled_log
            self.scale = self.weight.new_tensor(gates.scale)
            self.bias = torch.stack([gates.bias + gates.fine.bias, gates.slope, gates.curvature], dim=1)
            first, _, second, _, last = gates.fine.layers
            widths = len(gates.statistics), 1, gates.fine.embedding.embedding_dim
            statistics, lam, exits = first.weight.split(widths, dim=1)
            self.first, self.of_lam = _of_all_statistics(statistics, gates.statistics) * self.scale, lam[:, 0].clone()
            self.of_exit = F.linear(gates.fine.embedding.weight, exits, first.bias)
            self.second = second.weight.detach().clone(), second.bias.detach().clone()
            self.last = last.weight.detach().clone()

    def __call__(self, statistics: Tensor, lam: Lambda = None, exits: int = 0) -> Tensor:
        """Statistics ``(B, 4)`` of one exit to its gate logits ``(B,)``."""
        if not self.is_shared:
            return torch.mv(statistics.to(self.weight), self.weight[exits]) + self.bias[exits]
        if isinstance(lam, Tensor):
            weight, bias, added = self._at(self.scaled_log(lam, statistics)[:, None], exits)
        else:
            if (exits, lam) not in self._known:
                if len(self._known) > 10_000:
                    self._known.clear()
                self._known[exits, lam] = self._at(self.scaled_log(lam, statistics[:1])[:, None], exits)
            weight, bias, added = self._known[exits, lam]
        plain = (log_certainty(statistics * self.scale) * weight).sum(1) + bias
        state = (F.linear(statistics, self.first) + added).relu_()
        return plain + F.linear(F.linear(state, *self.second).relu_(), self.last).squeeze(1)

    def _at(self, t: Tensor, exits: int) -> tuple[Tensor, Tensor, Tensor]:
        """Weights, bias and what the network's first layer adds where log lambda, scaled, is t, ``(B or 1, 1)``."""
        bias, slope, curvature = self.bias[exits]
        added = self.of_exit[exits] + t * self.of_lam
        return self.weight[0] + t * self.weight[1], (bias + t * (slope + t * curvature)).squeeze(1), added


def _of_all_statistics(weight: Tensor, read: Sequence[str]) -> Tensor:
    """Weights ``(..., len(read))`` to ``(..., 4)``, 0 for the statistics that are not read."""
    spread = weight.new_zeros(*weight.shape[:-1], len(STATISTICS))
    spread[..., [STATISTICS.index(name) for name in read]] = weight
    return spread
