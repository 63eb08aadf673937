"""Exits on the CPU: folded heads and gates computed by the kernels of `kernels`.

At a batch of 1 an exit's arithmetic takes less time than PyTorch takes to start its operations; at a larger one most of
its time goes to looking at the feature map, which is done once here for all of its statistics.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils import logging

from .backbones.pooling import grid_size
from .backbones.staged import StagedBackbone, State
from .exits import GATE_FORMS
from .folded import FoldedCarry, FoldedGates, FoldedHeads
from .gates import Lambda
from .policies import LearnedGates

LARGEST_BATCH = 128
"""The kernels use one core; PyTorch's operations gain from more of them where there is more to do."""
LARGEST_WHOLE = 4
"""Up to this batch the product with the feature is the kernel's too."""

logger = logging.get_logger(__name__)


def fuse(backbone: StagedBackbone, heads: Any, policy: Any) -> FusedExits | None:
    """Folded heads and gates in kernels; None where there are none for them, or no numba."""
    fusable = (
        isinstance(heads, FoldedHeads)
        and all(head.out_bias is None for head in heads.exits)
        and type(policy) is LearnedGates
        and isinstance(policy.gates, FoldedGates)
        and policy.rule != "sample"
        and all(name[:3] in _KINDS for names in backbone.exit_pooling for name in names)
        and all(tensor.dtype is torch.float32 and tensor.device.type == "cpu" for tensor in backbone.parameters())
    )
    if not fusable or find_spec("numba") is None:
        return None
    try:
        from . import kernels  # noqa: F401
    except (ImportError, RuntimeError) as error:  # such as no folder for numba's cache
        logger.warning_once(f"numba cannot be used, so exits take PyTorch's operations, which are slower: {error}")
        return None
    return FusedExits(backbone, heads, policy)


class FusedExits:
    """The exits of a model: what a sample takes from one to the next is one row of numbers, see `kernels`."""

    def __init__(self, backbone: StagedBackbone, heads: FoldedHeads, policy: LearnedGates):
        from . import kernels

        self._backbone, self._heads, self._policy = backbone, heads, policy
        self.remembers, last = heads.remembers, heads.num_exits - 1
        parts = [_parts(backbone, heads, policy, l) for l in range(last)]
        self._width, self._classes = (parts[0][name] for name in ("width", "classes")) if parts else (0, 0)
        if last == len(heads.exits) and heads.ensemble is not None:  # the last exit's logits are the network's own
            parts.append(_last_parts(heads, parts))
            self._last_temperature = heads.last_temperature.numpy()
        self._weights, places = _packed(parts)
        self._plans = [_plan(kernels.PLAN, part, places) for part in parts]
        self._products = [
            tuple(torch.from_numpy(self._weights[places[id(part[name])] :][: part[name].size]).view(part[name].shape)
                  for name in ("weight", "bias"))
            for part in parts[:last]
        ]  # fmt: skip
        self._answers_at = [part["answer_at"] for part in parts]
        self._no_tokens = [np.empty((0, channels), np.float32) for channels, _, _ in backbone.map_shapes]
        self._nobody = np.empty(0, np.bool_)
        answers = torch.zeros(self._classes) if heads.ensemble is None else heads.bias.flatten()
        self._boosted = 0 if heads.boosting is None else self._classes
        self._start = torch.cat([torch.ones(1), torch.zeros(1 + self._width + self._boosted), answers])
        self._starts: dict[float | None, np.ndarray] = {}

    def begin(self, batch_size: int, lam: Lambda) -> Tensor:
        """What samples take to the first exit, ``(B, ...)``."""
        from .kernels import LOG_LAM

        gates, lam = self._policy.gates, self._policy.lam if lam is None else lam
        if isinstance(lam, Tensor) and gates.is_shared:
            carry = self._start.repeat(batch_size, 1)
            carry[:, LOG_LAM] = gates.scaled_log(lam, carry)
            return carry
        lam = lam if gates.is_shared else None
        if lam not in self._starts:
            if len(self._starts) > 1000:
                self._starts.clear()
            start = self._start.repeat(1, 1)
            if gates.is_shared:
                start[:, LOG_LAM] = gates.scaled_log(lam, start)
            self._starts[lam] = start.numpy()
        return torch.from_numpy(np.repeat(self._starts[lam], batch_size, axis=0))

    def step(
        self, l: int, state: State, carry: Tensor, lam: Lambda, ask: bool
    ) -> tuple[Tensor | None, Tensor | None, int, Tensor]:
        """As `early_exit.Exits.step`; no answers where nobody leaves."""
        from . import kernels

        if l == self._heads.num_exits - 1:
            return self._last(state, carry), None, len(carry), carry
        feature_map, class_token = self._backbone.feature_map(state)
        pixels = feature_map.permute(0, 2, 3, 1)
        pixels = (pixels if pixels.is_contiguous() else pixels.contiguous()).numpy()
        token = self._no_tokens[l] if class_token is None else class_token.contiguous().numpy()
        plan, numbers = self._plans[l], carry.numpy()
        leaves = np.empty(len(pixels), np.bool_) if ask else self._nobody
        if len(pixels) <= LARGEST_WHOLE:
            count = kernels.whole(pixels, token, self._weights, plan, numbers, leaves)
        else:
            feature = torch.empty(len(pixels), self._products[l][0].shape[1])
            kernels.pool(pixels, token, self._weights, plan, numbers, feature.numpy())
            read = F.linear(feature, *self._products[l]).numpy()
            count = kernels.answer(read, self._weights, plan, numbers, leaves)
        if 0 == count < len(pixels):
            return None, None, 0, carry
        return carry.narrow(1, self._answers_at[l], self._classes), torch.from_numpy(leaves), count, carry

    def _last(self, state: State, carry: Tensor) -> Tensor:
        from . import kernels

        last, heads = self._heads.num_exits - 1, self._heads
        feature, start = self._backbone.exit_feature(last, state), kernels.HIDDEN + self._width
        if last == len(heads.exits) and heads.ensemble is not None:  # logits, to be added to the ensemble
            read = feature.numpy() / self._last_temperature
            kernels.answer(read, self._weights, self._plans[last], carry.numpy(), self._nobody)
            return carry.narrow(1, self._answers_at[last], self._classes)
        hidden = carry[:, kernels.HIDDEN : start] if self._width else None
        boosted = carry.narrow(1, start, self._boosted) if self._boosted else None
        sums = None
        if heads.ensemble is not None and last:
            sums = carry[:, start + self._boosted :].unflatten(1, (-1, self._classes))[:, last - 1 :]
        return heads.step(last, feature, FoldedCarry(hidden, sums, boosted))[0]


def _packed(parts: list[dict[str, Any]]) -> tuple[np.ndarray, dict[int, int]]:
    """All arrays of the parts in one, those that exits share once; where each is, by its id."""
    packed, places, known, size = [np.empty(0, np.float32)], {}, {}, 0
    for array in (value for part in parts for value in part.values() if isinstance(value, np.ndarray)):
        memory = array.ctypes.data, array.size
        if memory not in known:
            known[memory] = size
            packed.append(array.ravel())
            size += array.size
        places[id(array)] = known[memory]
    return np.concatenate(packed), places


def _plan(columns: Sequence[str], part: dict[str, Any], places: dict[int, int]) -> np.ndarray:
    values = [part[name] for name in columns[:-1]]
    return np.array([*(places.get(id(value), value) for value in values), *part[columns[-1]]], np.int64)


def _parts(backbone: StagedBackbone, heads: FoldedHeads, policy: LearnedGates, l: int) -> dict[str, Any]:
    """What the kernels read of exit l, by the names of ``kernels.PLAN``."""
    names, (channels, _, _) = backbone.exit_pooling[l], backbone.map_shapes[l]
    head, gates, order = heads.exits[l], policy.gates, _cells_first(names, channels)
    weight, bias = head.input
    width = 0 if head.out is None else head.width
    classes, recurs, has_ensemble = len(bias) - width, head.hidden is not None, heads.ensemble is not None
    weight = weight[:, order]
    if recurs:  # the hidden state is read behind the feature
        weight = torch.cat([weight, F.pad(head.hidden.t(), (0, 0, 0, classes))], dim=1)
    low, high = head.clip or (torch.full((len(order),), -torch.inf), torch.full((len(order),), torch.inf))
    floats = {
        "weight": weight,
        "bias": bias,
        "low": low[order],
        "high": high[order],
        "output": torch.empty(0) if head.out is None else head.out,
        "share": torch.tensor([0.0 if heads.boosting is None else heads.boosting[l]]),
        "ensemble": heads.ensemble[l] if has_ensemble else torch.empty(0),
        "threshold": torch.tensor([policy.threshold]),
        "gate": gates.weight if gates.is_shared else gates.weight[l],
        "gate_bias": gates.bias[l],
    }
    network = ("first", "of_exit", "of_lam", "second", "second_bias", "last")
    if gates.is_shared:
        parts = gates.first, gates.of_exit[l], gates.of_lam, *gates.second, gates.last
        floats |= dict(zip(network, parts, strict=True))
    else:
        floats |= dict.fromkeys(network, torch.empty(0))
    boosted_at = 2 + (heads.exits[0].width if heads.exits[0].out is not None else 0)
    answers_at = boosted_at + (0 if heads.boosting is None else classes)
    return {
        "width": width,
        "classes": classes,
        "gate_width": len(floats["of_exit"]),
        "feature": weight.shape[1],
        "recurs": recurs,
        "form": GATE_FORMS.index(policy.form),
        "median": policy.rule == "median",
        "ensemble_size": heads.num_exits - l if has_ensemble else 0,
        "answer_at": answers_at + (l * classes if has_ensemble else 0),
        "boosted_at": 0 if heads.boosting is None else boosted_at,
        "statistics": [number for name in names for number in (_KINDS[name[:3]], grid_size(name))],
        **{name: tensor.contiguous().float().numpy() for name, tensor in floats.items()},
    }


def _last_parts(heads: FoldedHeads, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the last exit only what adds its logits to the ensemble."""
    from . import kernels

    last, classes = heads.num_exits - 1, heads.bias.shape[1]
    start = parts[0]["answer_at"] if parts else 2
    own = {"classes": classes, "ensemble_size": 1, "answer_at": start + last * classes, "statistics": []}
    if parts and heads.boosting is not None:
        own |= {"boosted_at": parts[0]["boosted_at"], "share": np.array([heads.boosting[last]], np.float32)}
    return {**dict.fromkeys(kernels.PLAN, 0), **own, "ensemble": heads.ensemble[last].numpy()}


_KINDS = {"cls": 0, "avg": 1, "max": 2}
"""Of `kernels`."""


def _cells_first(names: Sequence[str], channels: int) -> Tensor:
    """Where each number of a fused feature is in ``pool``'s order, channels first, ``(d,)``."""
    order, at = [], 0
    for name in names:
        cells = grid_size(name) ** 2
        order.append(at + torch.arange(channels * cells).view(channels, cells).t().flatten())
        at += channels * cells
    return torch.cat(order)
