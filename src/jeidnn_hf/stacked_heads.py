"""The inference modules of S members of a sweep as one: parameters with a member axis, logits ``(S, B, L, K)``.

`stack_heads` chooses between `GroupedLinear`, the paper's IMs in one product per width of exit, and `VmappedHeads`, any
kind. Both have ``parameters``; ``axis``, where their members lie; and ``load_member(s, heads)``, which puts member s
into heads of its own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from .heads import ExitHeads, LinearHead
from .im_training.l2w_den import Members


class GroupedLinear:
    """Linear IMs: weights ``(G, S, K, d)`` and biases ``(G, S, K)`` for each width d, of G exits."""

    axis = 1

    def __init__(self, heads: Sequence[ExitHeads]):
        self.native_head = heads[0].native_head
        by_width = defaultdict(list)
        for l, head in enumerate(heads[0].modules_by_exit):
            by_width[head.in_features].append(l)
        self.groups = list(by_width.values())
        exits = [l for group in self.groups for l in group]
        exits += [len(exits)] * self.native_head
        self.order = None if exits == sorted(exits) else torch.tensor(exits).argsort().tolist()
        self.parameters = [
            nn.Parameter(torch.stack([self._of_exits(one, group, name) for one in heads], dim=1))
            for group in self.groups
            for name in ("weight", "bias")
        ]

    @staticmethod
    def _of_exits(heads: ExitHeads, group: Sequence[int], name: str) -> Tensor:
        return torch.stack([getattr(heads.modules_by_exit[l], name).detach() for l in group])

    def __call__(self, features: Sequence[Tensor]) -> Tensor:
        """``(S, B, L, K)``, in memory as ``(S, K, B, L)``, which is what sums over the classes want."""
        logits = []
        for group, weight, bias in zip(self.groups, self.parameters[::2], self.parameters[1::2], strict=True):
            z = torch.stack([features[l] for l in group])
            of_group = torch.baddbmm(bias.flatten(1)[..., None], weight.flatten(1, 2), z.mT)  # (G, S K, B)
            logits.append(of_group.permute(1, 2, 0))
        members, classes = self.parameters[1].shape[1:]
        if self.native_head:
            logits.append(features[-1].mT.repeat(members, 1)[..., None])
        logits = torch.cat(logits, dim=-1)
        if self.order is not None:
            logits = logits[..., self.order]
        return logits.unflatten(0, (members, classes)).permute(0, 2, 3, 1)

    @torch.no_grad()
    def load_member(self, s: int, heads: ExitHeads) -> None:
        for group, weight, bias in zip(self.groups, self.parameters[::2], self.parameters[1::2], strict=True):
            for i, l in enumerate(group):
                heads.modules_by_exit[l].weight.copy_(weight[i, s])
                heads.modules_by_exit[l].bias.copy_(bias[i, s])


class VmappedHeads:
    """Heads of any kind, which the members share but for their parameters, ``(S, ...)`` each."""

    axis = 0

    def __init__(self, heads: Sequence[ExitHeads]):
        self.members = Members(heads[0])
        self.names = list(self.members.trained)
        trained = [Members(one).trained for one in heads]
        self.parameters = [nn.Parameter(torch.stack([one[name].detach() for one in trained])) for name in self.names]

    def __call__(self, features: Sequence[Tensor]) -> Tensor:
        def logits(parameters: dict[str, Tensor]) -> Tensor:
            return functional_call(self.members, parameters, (features,), tie_weights=False)

        return vmap(logits)(dict(zip(self.names, self.parameters, strict=True)))

    @torch.no_grad()
    def load_member(self, s: int, heads: ExitHeads) -> None:
        own = Members(heads).trained
        for name, parameter in zip(self.names, self.parameters, strict=True):
            own[name].copy_(parameter[s])


def stack_heads(heads: Sequence[ExitHeads]) -> GroupedLinear | VmappedHeads:
    """The heads of members of one config."""
    first = heads[0]
    linear = all(isinstance(head, LinearHead) for head in first.modules_by_exit)
    return (GroupedLinear if linear and first.norms is None and first.links is None else VmappedHeads)(heads)
