"""The loop that really exits early, and the forms in which exits are computed there."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backbones import StagedBackbone, select
from .backbones.staged import State
from .folded import fold
from .fused import LARGEST_BATCH, FusedExits, fuse
from .gates import ExitPolicy, Lambda
from .heads import ExitHeads


class Exits(NamedTuple):
    """What exits compute, in PyTorch: ``feature(l, state)``, ``heads.step`` on that, ``policy.step`` on the answer."""

    feature: Callable[[int, State], Tensor]
    heads: Any
    policy: Any

    @property
    def remembers(self) -> bool:
        """Whether later exits read what an exit computes that nobody asks."""
        return self.heads.remembers

    def begin(self, batch_size: int, lam: Lambda) -> tuple[None, None]:
        """What samples take to the first exit."""
        return None, None

    def step(
        self, l: int, state: State, carry: Any, lam: Lambda, ask: bool
    ) -> tuple[Tensor, Tensor | None, int | Tensor, Any]:
        """Exit l (from 0): answers ``(B, K)``; if they are to ``ask``, who leaves, ``(B,)`` bool, and how many, on the
        device; what they take to the next exit. At the last exit all leave."""
        head_carry, policy_carry = carry
        answers, head_carry = self.heads.step(l, self.feature(l, state), head_carry, answer=ask)
        if not ask:
            return answers, None, 0, (head_carry, policy_carry)
        leaves, policy_carry = self.policy.step(l, answers, policy_carry, lam)
        return answers, leaves, leaves.sum(), (head_carry, policy_carry)


class PreparedExits:
    """Exits for inference, with what their weights alone decide worked out: folded, and fused where that is faster."""

    def __init__(self, backbone: StagedBackbone, heads: ExitHeads, policy: ExitPolicy):
        self._of, self._backbone = (heads, policy), backbone
        self.folded = Exits(backbone.exit_feature, *fold(heads, policy))
        modules = [module for whole in self._of for module in whole.modules()]
        groups = [group for module in modules for group in (module._parameters, module._buffers)]
        seen = [(group, name) for group in groups for name, tensor in group.items() if tensor is not None]
        self._groups, self._names = [group for group, _ in seen], [name for _, name in seen]
        self._tensors = [group[name] for group, name in seen]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]
        self._places, self._versions = self._written()

    def are_of(self, heads: ExitHeads, policy: ExitPolicy) -> bool:
        """False as soon as a parameter or buffer was written to, moved or replaced."""
        return (
            heads is self._of[0]
            and policy is self._of[1]
            and all(map(operator.is_, map(dict.get, self._groups, self._names), self._tensors))
            and (self._places, self._versions) == self._written()
        )

    def _written(self) -> tuple[list[int], list[int]]:
        """Where tensors are, and how often they were written to."""
        return [tensor.data_ptr() for tensor in self._tensors], [tensor._version for tensor in self._counted]

    def __call__(self, batch_size: int) -> Exits | FusedExits:
        if batch_size > LARGEST_BATCH or torch.is_autocast_enabled("cpu"):
            return self.folded
        return self.fused or self.folded

    @cached_property
    def fused(self) -> FusedExits | None:
        """Made when a batch first asks for it: large ones never load numba."""
        return fuse(self._backbone, self.folded.heads, self.folded.policy)


def early_exit(
    backbone: StagedBackbone, exits: Exits | FusedExits, active: Collection[int], pixel_values: Tensor, lam: Lambda
) -> tuple[Tensor, Tensor, bool]:
    """After each exit the samples that leave are dropped from every state; the rest goes on.

    The device is asked once per active exit: how many leave, and with the first answer, whether the pixels are
    numbers; where they are not, nothing more is computed.

    Returns:
        Of each sample the answer, ``(B, K)``, and the exit that gave it, ``(B,)``; whether all pixels are numbers.
    """
    finite = torch.isfinite(pixel_values).all()
    state, carry = backbone.stem(pixel_values), exits.begin(len(pixel_values), lam)
    rows = torch.arange(len(pixel_values), device=pixel_values.device)
    exit_index, logits = torch.empty_like(rows), None
    for l in range(backbone.num_exits):
        state = backbone.stage(l, state)
        if l not in active and not exits.remembers:
            continue
        answers, leaves, leaving, carry = exits.step(l, state, carry, lam, ask=l in active)
        if l not in active:
            continue
        leaving, finite = _asked(len(rows) if l == backbone.num_exits - 1 else leaving, finite)
        if not finite:
            return pixel_values, exit_index, False
        if leaving == len(rows) == len(pixel_values):
            return answers.clone(memory_format=torch.contiguous_format), exit_index.fill_(l), True
        if not leaving:
            continue
        if logits is None:
            logits = answers.new_empty(len(pixel_values), answers.shape[1])
        if leaving == len(rows):
            logits[rows], exit_index[rows] = answers, l
            break
        order = leaves.argsort(stable=True)
        stay, leave = order[: len(rows) - leaving], order[len(rows) - leaving :]
        logits[rows[leave]], exit_index[rows[leave]] = answers[leave], l
        state, carry, rows = select((state, carry, rows), stay)
        lam = lam[stay] if isinstance(lam, Tensor) else lam
    return logits, exit_index, True


def _asked(count: int | Tensor, is_so: bool | Tensor) -> tuple[int, bool]:
    """Both as Python's numbers, by one question to the device at most."""
    if isinstance(count, Tensor) and isinstance(is_so, Tensor):
        count, is_so = torch.stack([count, is_so]).tolist()
    return int(count), bool(is_so)
