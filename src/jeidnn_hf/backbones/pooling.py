"""Pooled statistics: what an exit sees of the feature map. One name, one vector per image.

``cls``: the class token. ``avgG``, ``maxG``: averages or maxima over a G x G grid of the map. ``std1``: the standard
deviation over the map. A statistic gives C, or C G^2, numbers for a map of C channels.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

POOLED_STATISTICS = ("cls", "avg1", "avg2", "avg4", "max1", "max2", "std1")


def check_statistics(names: Sequence[str]) -> tuple[str, ...]:
    names = tuple(names)
    if not names or len(set(names)) < len(names) or not set(names) <= set(POOLED_STATISTICS):
        raise ValueError(
            f"Expected exit_pooling to name some of {POOLED_STATISTICS}, each once, but got {list(names)}."
        )
    return names


@cache
def grid_size(name: str) -> int:
    """G of ``avgG`` and ``maxG``; 1 for the others."""
    digits = re.search(r"\d+$", name)
    return int(digits.group()) if digits else 1


def pooled_width(names: Sequence[str], channels: int) -> int:
    """d_l: how many numbers the statistics give for a map of ``channels`` channels."""
    return sum(channels * grid_size(name) ** 2 for name in names)


def pooling_mul_adds(names: Sequence[str], map_shape: tuple[int, int, int]) -> int:
    """One operation per element of the map (C, H, W) and statistic; the class token is free."""
    channels, height, width = map_shape
    return sum(channels * height * width for name in names if name != "cls")


def pool(feature_map: Tensor, class_token: Tensor | None, names: Sequence[str]) -> Tensor:
    """The statistics ``names`` of a map ``(B, C, H, W)`` and a class token ``(B, C)``, concatenated to ``(B, d)``."""
    return torch.cat([_statistic(feature_map, class_token, name) for name in names], dim=1)


def _statistic(feature_map: Tensor, class_token: Tensor | None, name: str) -> Tensor:
    if name == "cls":
        return class_token
    if name == "std1":
        return feature_map.flatten(2).std(-1, correction=0)
    reduce = F.adaptive_avg_pool2d if name.startswith("avg") else F.adaptive_max_pool2d
    return reduce(feature_map, grid_size(name)).flatten(1)
