"""comparison.py: curves played between their points, paired differences and who wins."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jeidnn_hf.comparison import Curve, accuracy_table, area_above, measure_table, paired_differences, verdict


def curve(costs, accuracies, images: int = 1000, seed: int = 0, held_out=None) -> Curve:
    """Points at these costs; on test images exactly the accuracies, on held-out ones those or ``held_out``."""
    random = torch.Generator().manual_seed(seed)
    right = torch.zeros(len(costs), images, dtype=torch.bool)
    for row, accuracy in zip(right, accuracies, strict=True):
        row[torch.randperm(images, generator=random)[: round(accuracy * images)]] = True
    costs = torch.tensor(costs, dtype=torch.float64)
    held_out = torch.tensor(held_out or accuracies, dtype=torch.float64)
    return Curve(costs, held_out, costs, right, {"ece": costs / 10})


def test_between_two_points_one_or_the_other_is_played():
    found = curve([0.2, 0.6, 1.0], [0.5, 0.7, 0.9])
    weights = found.weights([0.1, 0.2, 0.3, 0.6, 0.9, 1.0, 1.3])
    expected = [[math.nan] * 3, [1, 0, 0], [0.75, 0.25, 0], [0, 1, 0], [0, 0.25, 0.75], [0, 0, 1], [0, 0, 1]]
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float64), equal_nan=True)
    accuracies = accuracy_table({"one": [found]}, [0.1, 0.3, 0.9])["one"]
    assert math.isnan(accuracies[0]) and accuracies[1:] == pytest.approx([0.55, 0.85])
    assert measure_table({"one": [found]}, "ece", [0.3])["one"] == pytest.approx([0.03])
    right = found.right_at([0.3])[0]
    torch.testing.assert_close(right, 0.75 * found.right[0].double() + 0.25 * found.right[1].double())


def test_held_out_images_choose_the_points():
    """The third point shines on the test images only, the second on the held-out ones only."""
    found = curve([0.2, 0.4, 0.6, 1.0], [0.5, 0.45, 0.99, 0.9], held_out=[0.5, 0.6, 0.55, 0.9])
    assert found.frontier().tolist() == [0, 1, 3]
    assert accuracy_table({"one": [found]}, [0.4])["one"] == pytest.approx([0.45])


def test_a_budget_is_spent_unless_that_does_more_harm_than_chance():
    """Of 800 images at .9, a difference has a standard error of sqrt(2 * .9 * .1 / 800) = .015."""
    found = curve([0.2, 0.4, 0.6, 1.0], [0.5] * 4, held_out=[0.5, 0.9, 0.884, 0.886])
    assert found.frontier().tolist() == [0, 1]
    found.held_out_images = 800
    assert found.frontier().tolist() == [0, 1, 3]


@given(st.lists(st.tuples(st.floats(0.01, 1), st.floats(0, 1)), min_size=1, max_size=8), st.floats(0, 1.2))
def test_points_mix_to_the_budget(points, budget):
    costs, accuracies = zip(*points, strict=True)
    found = curve(list(costs), list(accuracies), images=20)
    (weights,) = found.weights([budget])
    frontier = found.costs[found.frontier()]
    if budget < frontier.min():
        assert weights.isnan().all()
        return
    assert weights.sum() == pytest.approx(1) and (weights >= 0).all() and (weights > 0).sum() <= 2
    assert float(weights @ found.costs) == pytest.approx(min(budget, float(frontier.max())))


def test_a_paired_interval_is_that_of_the_difference_not_of_the_accuracies():
    """The same images right but for 20 of 1,000: a difference of 2 points with s.e. sqrt(.02 * .98 / 1000) = .44."""
    base = curve([0.5], [0.8])
    better = Curve(base.held_out_costs, base.held_out_accuracies, base.costs, base.right.clone())
    wrong = (~base.right[0]).nonzero().squeeze(1)
    better.right[0, wrong[:20]] = True
    found = paired_differences({"base": [base], "better": [better]}, "base", [0.5], resamples=8000)["better"]
    assert found.mean == pytest.approx([0.02])
    assert found.low == pytest.approx([0.02 - 1.96 * 0.00443], abs=0.0012)
    assert found.high == pytest.approx([0.02 + 1.96 * 0.00443], abs=0.0012)
    assert verdict(found) == ["better"]
    back = paired_differences({"base": [base], "better": [better]}, "better", [0.5, 0.4])["base"]
    assert verdict(back) == ["worse", "-"]
    same = paired_differences({"base": [base], "same": [base, base]}, "base", [0.5])["same"]
    assert (same.mean, same.low, same.high) == ([0], [0], [0]) and verdict(same) == ["tie"]


def test_the_interval_covers_a_difference_that_is_there():
    covered = 0
    for seed in range(200):
        random = torch.Generator().manual_seed(seed)
        first, second = (torch.rand(1, 400, generator=random) < p for p in (0.70, 0.75))
        ones = torch.ones(1, dtype=torch.float64)
        methods = {"a": [Curve(ones, ones, ones, first)], "b": [Curve(ones, ones, ones, second)]}
        found = paired_differences(methods, "a", [1.0], resamples=400)["b"]
        covered += found.low[0] <= 0.05 <= found.high[0]
    assert 180 <= covered <= 199


def test_the_area_above_a_floor():
    flat = {"flat": [curve([0.5], [0.9])], "low": [curve([0.1], [0.3])]}
    areas = area_above(flat, 0.7)
    assert areas["flat"] == pytest.approx(0.2 * 0.5, abs=0.002) and areas["low"] == 0


def test_seeds_are_averaged_image_by_image():
    one, two = curve([0.5], [0.6], seed=1), curve([0.5], [0.8], seed=2)
    assert accuracy_table({"both": [one, two]}, [0.5])["both"] == pytest.approx([0.7])


@pytest.mark.parametrize("images", [math.inf, 2500])
def test_saved_and_loaded(images, tmp_path):
    found = curve([0.2, 0.6], [0.5, 0.7])
    found.held_out_images = images
    found.save(tmp_path / "curves" / "one.safetensors")
    loaded = Curve.load(tmp_path / "curves" / "one.safetensors")
    assert torch.equal(loaded.right, found.right) and torch.equal(loaded.measures["ece"], found.measures["ece"])
    assert loaded.held_out_images == images
    (tmp_path / "curves" / "one.safetensors").write_bytes(b"half")
    with pytest.raises(ValueError, match=r"^Expected a curve at .*; remove the file\.$"):
        Curve.load(tmp_path / "curves" / "one.safetensors")


def test_what_cannot_be_compared():
    one, other = curve([0.5], [0.6]), curve([0.5], [0.6], images=900)
    with pytest.raises(ValueError, match="^Expected a reference among"):
        paired_differences({"one": [one]}, "two", [0.5])
    with pytest.raises(ValueError, match=r"^Expected curves on the same images, but got \[900, 1000\]"):
        paired_differences({"one": [one], "other": [other]}, "one", [0.5])
    with pytest.raises(ValueError, match=r"^Expected \(P,\) numbers and \(P, N\) answers"):
        Curve(one.costs, one.costs, one.costs, one.right[0])
