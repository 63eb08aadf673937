"""What each exit costs (Eq. 18), cumulative, backbone, pooling, heads and gates apart: in Mul-Adds, counted here, or in
milliseconds, measured by ``latency.exit_latency``. Whatever takes the one takes the other.

The backbone is counted by fvcore, piece by piece along its stages; what fvcore misses (fused attention) is added by a
handle. Pooling, heads and gates have closed forms. One Mul-Add is one multiplication with its addition.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from math import isclose, prod
from typing import Any

import torch
from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import get_shape
from torch import nn

from .backbones.pooling import pooling_mul_adds
from .backbones.staged import StagedBackbone
from .gates import ExitPolicy
from .heads import ExitHeads

MUL_ADDS = "Mul-Adds"
COLUMNS = ("backbone", "pooling", "heads", "gates")


@dataclass(frozen=True)
class ExitCosts:
    """Costs of one image, cumulative over exits 1..L, ``(L,)`` each.

    Args:
        backbone: of its blocks.
        pooling: of the statistics of its maps.
        heads: of the inference modules.
        gates: of the decisions.
        unit: `MUL_ADDS`, or ``"ms"``.
        measured: of milliseconds, where they were measured: device, batch size, threads, ...
    """

    backbone: tuple[float, ...]
    pooling: tuple[float, ...]
    heads: tuple[float, ...]
    gates: tuple[float, ...]
    unit: str = MUL_ADDS
    measured: dict[str, Any] | None = field(default=None, compare=False)

    @property
    def total(self) -> tuple[float, ...]:
        """IC^l of Eq. 18."""
        return tuple(map(sum, zip(self.backbone, self.pooling, self.heads, self.gates, strict=True)))

    @property
    def normalised(self) -> tuple[float, ...]:
        """IC^l as a share of the bare backbone's; with exits counted the last one is a little above 1."""
        return tuple(cost / self.backbone[-1] for cost in self.total)

    def under(self, policy: ExitPolicy, num_labels: int) -> ExitCosts:
        """The table where this policy decides; at the last exit and at exits that are not active there is nothing to
        decide. Of milliseconds the same table: one decision takes about as long as another."""
        if self.unit != MUL_ADDS:
            return self
        active = getattr(policy, "active", None) or range(len(self.gates))
        each = [policy.mul_adds(num_labels) if l in active else 0 for l in range(len(self.gates) - 1)] + [0]
        return replace(self, gates=tuple(accumulate(each)))

    def check_same(self, shares: Sequence[float], what: str) -> None:
        """A ValueError that calls them ``what`` unless ``shares`` are `normalised`, up to rounding."""
        if len(shares) != len(self.total) or not all(map(isclose, shares, self.normalised)):
            expected, got = ([round(share, 4) for share in found] for found in (self.normalised, shares))
            raise ValueError(f"Expected {what} of this model, whose exits cost {expected}, but got one of {got}.")

    def to_dict(self) -> dict[str, Any]:
        table = {name: list(values) for name, values in asdict(self).items() if name in COLUMNS}
        return table if self.unit == MUL_ADDS else {**table, "unit": self.unit, "measured": self.measured}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any]) -> ExitCosts:
        return cls(**{name: tuple(values) if name in COLUMNS else values for name, values in table.items()})


def exit_costs(
    backbone: StagedBackbone,
    heads: ExitHeads,
    policy: ExitPolicy,
    num_labels: int,
    known: Sequence[int] | None = None,
    active: Sequence[int] | None = None,
) -> ExitCosts:
    """The cost table of a model. At a last exit with its native classifier there is no IM and no gate.

    ``known``: the backbone's column, where it has been counted before. ``active``: the exits at which a sample can
    leave; at the others only what later ones read is computed.
    """
    exits = backbone.num_exits
    active = set(range(exits) if active is None else active)
    seen = enumerate(zip(backbone.exit_pooling, backbone.map_shapes, strict=True))
    pooling = [pooling_mul_adds(*read) if l in active or heads.remembers else 0 for l, read in seen] + [0]
    costs = ExitCosts(
        backbone=tuple(known or backbone_mul_adds(backbone)),
        pooling=tuple(accumulate(pooling)),
        heads=tuple(accumulate(heads.mul_adds(l, answer=l in active) for l in range(exits))),
        gates=(0,) * exits,
    )
    return costs.under(policy, num_labels)


@torch.no_grad()
def backbone_mul_adds(backbone: StagedBackbone) -> tuple[int, ...]:
    """Cumulative Mul-Adds of the backbone at each exit.

    Every exit passed adds what it takes to read the map there: for ViTs the shared final norm, over all tokens.
    """
    parameter = next(backbone.parameters())
    blank = torch.zeros(
        1, backbone.num_channels, backbone.image_size, backbone.image_size,
        device=parameter.device, dtype=parameter.dtype,
    )  # fmt: skip
    last = backbone.num_exits - 1
    count, cumulative = _count(backbone.embed, blank), []
    state = backbone.embed(blank)
    for l in range(backbone.num_exits):
        count += _count(lambda state, l=l: backbone.stage(l, state), state)
        state = backbone.stage(l, state)
        read = backbone.feature_map if l < last else lambda state: backbone.exit_feature(last, state)
        count += _count(read, state)
        cumulative.append(count)
    return tuple(cumulative)


class _Piece(nn.Module):
    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, *state):
        return self.function(*state)


def _count(function: Callable, state) -> int:
    analysis = FlopCountAnalysis(_Piece(function), (state,))
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    analysis.set_op_handle("aten::scaled_dot_product_attention", _attention_mul_adds)
    analysis.set_op_handle("aten::rms_norm", _rms_norm_mul_adds)
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    return int(analysis.total())


def _attention_mul_adds(inputs: list, outputs: list) -> int:
    """q k^T and attn v: twice B h N M d, for queries (B, h, N, d) and keys (B, h, M, d)."""
    query, key = get_shape(inputs[0]), get_shape(inputs[1])
    return 2 * prod(query) * key[-2]


def _rms_norm_mul_adds(inputs: list, outputs: list) -> int:
    """4 per element, one less than the 5 of LayerNorm: no mean is subtracted."""
    return 4 * prod(get_shape(inputs[0]))
