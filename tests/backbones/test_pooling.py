"""The pooled statistics against sums over cells written out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jeidnn_hf.backbones.pooling import (
    POOLED_STATISTICS,
    check_statistics,
    grid_size,
    pool,
    pooled_width,
    pooling_mul_adds,
)


def by_hand(feature_map: torch.Tensor, class_token: torch.Tensor, name: str) -> torch.Tensor:
    """One number at a time. A cell of the grid covers the rows from floor(i H / G) to ceil((i + 1) H / G)."""
    batch, channels, height, width = feature_map.shape
    if name == "cls":
        return class_token
    if name == "std1":
        rows = []
        for image in feature_map:
            values = [[float(v) for v in channel.flatten()] for channel in image]
            means = [math.fsum(v) / len(v) for v in values]
            squares = [math.fsum((x - m) ** 2 for x in v) / len(v) for v, m in zip(values, means, strict=True)]
            rows.append([math.sqrt(s) for s in squares])
        return torch.tensor(rows, dtype=feature_map.dtype)
    grid = int(name[-1])
    rows = []
    for b in range(batch):
        row = []
        for c in range(channels):
            for i in range(grid):
                for j in range(grid):
                    cell = [
                        float(feature_map[b, c, y, x])
                        for y in range(i * height // grid, -((-(i + 1) * height) // grid))
                        for x in range(j * width // grid, -((-(j + 1) * width) // grid))
                    ]
                    row.append(max(cell) if name.startswith("max") else math.fsum(cell) / len(cell))
        rows.append(row)
    return torch.tensor(rows, dtype=feature_map.dtype)


@pytest.mark.parametrize("name", POOLED_STATISTICS)
@settings(max_examples=8, deadline=None, derandomize=True)
@given(height=st.integers(4, 7), width=st.integers(4, 7), channels=st.integers(1, 3), seed=st.integers(0, 999))
def test_each_statistic_is_what_its_name_says(name, height, width, channels, seed):
    generator = torch.Generator().manual_seed(seed)
    feature_map = torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64)
    class_token = torch.randn(2, channels, generator=generator, dtype=torch.float64)
    pooled = pool(feature_map, class_token, [name])
    assert pooled.shape == (2, pooled_width([name], channels))
    torch.testing.assert_close(pooled, by_hand(feature_map, class_token, name))


@pytest.mark.parametrize("grid", [1, 2, 4])
@pytest.mark.parametrize("kind", ["avg", "max"])
def test_a_grid_of_the_maps_own_size_is_the_map(kind, grid):
    feature_map = torch.arange(2 * 3 * grid * grid, dtype=torch.float32).view(2, 3, grid, grid)
    assert torch.equal(pool(feature_map, None, [f"{kind}{grid}"]), feature_map.flatten(1))


def test_statistics_stand_in_the_order_they_are_named():
    feature_map, class_token = torch.randn(3, 5, 4, 6), torch.randn(3, 5)
    names = ("max2", "cls", "std1", "avg4")
    pooled = pool(feature_map, class_token, names)
    assert pooled.shape == (3, 5 * (4 + 1 + 1 + 16)) == (3, pooled_width(names, 5))
    parts = pooled.split([5 * grid_size(name) ** 2 for name in names], dim=1)
    for part, name in zip(parts, names, strict=True):
        assert torch.equal(part, pool(feature_map, class_token, [name]))


def test_deviation_of_a_point_is_zero_and_not_nan():
    assert torch.equal(pool(torch.randn(2, 3, 1, 1), None, ["std1"]), torch.zeros(2, 3))


def test_widths_grids_and_mul_adds():
    assert [grid_size(name) for name in POOLED_STATISTICS] == [1, 1, 2, 4, 1, 2, 1]
    assert [pooled_width([name], 10) for name in POOLED_STATISTICS] == [10, 10, 40, 160, 10, 40, 10]
    assert [pooling_mul_adds([name], (10, 4, 6)) for name in POOLED_STATISTICS] == [0] + [240] * 6
    assert pooling_mul_adds(("cls", "avg2", "max2"), (64, 3, 5)) == 2 * 64 * 15


def test_names_are_checked():
    assert check_statistics(["avg2", "cls"]) == ("avg2", "cls")
    assert check_statistics(POOLED_STATISTICS) == POOLED_STATISTICS


@pytest.mark.parametrize("names", [[], ["avg1", "avg1"], ["avg3"], ["AVG1"], ["cls", "mean"], "avg1"])
def test_other_names_are_refused(names):
    with pytest.raises(ValueError, match=r"^Expected exit_pooling to name some of .*, each once, but got \[.*\]\.$"):
        check_statistics(names)
