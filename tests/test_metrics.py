"""metrics.py: the calibration error against goldens, a loop over ranks and theory; accuracy at a cost."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jeidnn_hf.metrics import accuracy_at_cost, expected_calibration_error

GOLDENS = Path(__file__).parent / "goldens"
SEEDS = (0, 1, 3, 4, 6)
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


@pytest.fixture(params=SEEDS)
def golden(request) -> dict[str, Tensor]:
    with np.load(GOLDENS / f"seed{request.param}.npz") as file:
        stored = {name: torch.as_tensor(file[name]) for name in file}
    stored["logits"] = stored["exit_logits"].transpose(0, 1)
    return stored


# ---- expected calibration error


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-6)])
def test_every_exit(golden, dtype, tolerance):
    probs = golden["logits"].to(dtype).softmax(-1)
    found = expected_calibration_error(probs, golden["labels"])
    torch.testing.assert_close(found, golden["ece_paper"], rtol=0, atol=tolerance)
    for l in range(probs.shape[1]):
        alone = expected_calibration_error(probs[:, l], golden["labels"])
        assert alone.shape == () and float(alone) == pytest.approx(float(found[l]), abs=1e-12)
        kept = expected_calibration_error(probs[:, l : l + 1], golden["labels"])
        assert kept.tolist() == pytest.approx([float(alone)], abs=1e-12)


def test_after_temperatures_and_of_the_exits_taken(golden):
    scaled = golden["logits"] / golden["temperature_paper"][:, None]
    found = expected_calibration_error(scaled.softmax(-1), golden["labels"])
    torch.testing.assert_close(found, golden["ece_temperature_paper"], rtol=0, atol=1e-10)
    taken = golden["logits"][torch.arange(len(golden["labels"])), golden["exit_index_paper"]]
    gated = expected_calibration_error(taken.softmax(-1), golden["labels"])
    torch.testing.assert_close(gated, golden["ece_gated_paper"], rtol=0, atol=1e-10)


def test_where_the_bins_are_of_equal_size(golden):
    count = len(golden["labels"]) // 15 * 15
    found = expected_calibration_error(golden["logits"][:count].softmax(-1), golden["labels"][:count])
    torch.testing.assert_close(found, golden["ece_first15n_paper"], rtol=0, atol=1e-10)


def answers(confidence: Tensor, right: Tensor, classes: int = 2) -> tuple[Tensor, Tensor]:
    """Probabilities with the given maxima, of class 0, and labels that make them right or wrong."""
    rest = ((1 - confidence) / (classes - 1))[..., None].expand(*confidence.shape, classes - 1)
    return torch.cat([confidence[..., None], rest], dim=-1), (~right).long()


def by_ranks(confidence: list[float], right: list[bool], bins: int) -> float:
    """Eq. 19 sample by sample: the one of rank r is in the bin b with floor(N b / B) <= r < floor(N (b + 1) / B)."""
    count, sums, sizes = len(right), Counter(), Counter()
    for rank, i in enumerate(sorted(range(count), key=lambda i: confidence[i])):
        (b,) = [b for b in range(bins) if count * b // bins <= rank < count * (b + 1) // bins]
        sums[b] += Fraction(right[i]) - Fraction(confidence[i])
        sizes[b] += 1
    assert sum(sizes.values()) == count
    assert max(sizes.values()) - min(sizes[b] for b in range(bins)) <= 1  # equal mass
    return float(sum(map(abs, sums.values())) / count)


@quick
@given(st.data(), st.integers(1, 80), st.integers(1, 20), st.integers(2, 5))
def test_bins_hold_equal_numbers_of_samples(data, count, bins, classes):
    confidence = data.draw(st.lists(st.floats(0.51, 1.0), min_size=count, max_size=count))
    right = data.draw(st.lists(st.booleans(), min_size=count, max_size=count))
    confidence_ = torch.tensor(confidence, dtype=torch.float64)
    found = expected_calibration_error(*answers(confidence_, torch.tensor(right), classes), bins=bins)
    assert float(found) == pytest.approx(by_ranks(confidence, right, bins), abs=1e-12)


@quick
@given(st.data(), st.integers(1, 60))
def test_one_bin_and_as_many_bins_as_samples(data, count):
    confidence = torch.tensor(data.draw(st.lists(st.floats(0.51, 1.0), min_size=count, max_size=count)))
    right = torch.tensor(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    probs, labels = answers(confidence, right)
    gap = right.double() - confidence.double()
    one, all_ = (float(expected_calibration_error(probs, labels, bins=bins)) for bins in (1, count))
    assert one == pytest.approx(float(gap.mean().abs()), abs=1e-12)
    assert all_ == pytest.approx(float(gap.abs().mean()), abs=1e-12)
    assert one <= float(expected_calibration_error(probs, labels)) + 1e-12 <= all_ + 2e-12
    assert float(expected_calibration_error(probs, labels, bins=count + 7)) == pytest.approx(all_, abs=1e-12)


def test_a_calibrated_classifier_has_the_error_of_its_noise():
    """A bin's mean gap is normal with variance v B / N, so E[ECE] = sqrt(2 / pi) mean_b sqrt(v_b B / N) ~ N^-1/2."""
    random, bins, mean = torch.Generator().manual_seed(0), 15, {}
    for count in (450, 1800, 7200):
        confidence = 0.5 + 0.5 * torch.rand(count, 60, generator=random, dtype=torch.float64)
        right = torch.rand(count, 60, generator=random, dtype=torch.float64) < confidence
        found = torch.stack([expected_calibration_error(*answers(confidence[:, i], right[:, i])) for i in range(60)])
        edges = 0.5 + 0.5 * torch.linspace(0, 1, bins + 1, dtype=torch.float64)
        low, high = edges[:-1], edges[1:]
        variance = (low + high) / 2 - (low.square() + low * high + high.square()) / 3  # mean of c (1 - c) in the bin
        theory = math.sqrt(2 / math.pi) * float((variance * bins / count).sqrt().mean())
        mean[count] = float(found.mean())
        assert mean[count] == pytest.approx(theory, rel=0.06)
    assert mean[450] / mean[7200] == pytest.approx(4, rel=0.1)


def test_bounds_are_reached():
    confidence, right = torch.ones(30), torch.ones(30, dtype=torch.bool)
    assert float(expected_calibration_error(*answers(confidence, right))) == 0
    assert float(expected_calibration_error(*answers(confidence, ~right))) == 1


def test_ties_stay_in_the_order_of_the_samples():
    confidence = torch.full((60,), 0.75, dtype=torch.float64)
    mixed = torch.arange(60) % 4 != 0  # every bin of 4 has its 3 right ones
    assert float(expected_calibration_error(*answers(confidence, mixed))) == pytest.approx(0, abs=1e-12)
    apart = torch.arange(60) >= 15
    expected = by_ranks(confidence.tolist(), apart.tolist(), 15)
    assert float(expected_calibration_error(*answers(confidence, apart))) == pytest.approx(expected, abs=1e-12)
    assert expected > 0.3


def test_order_of_the_samples_does_not_matter_without_ties(golden):
    order = torch.randperm(len(golden["labels"]), generator=torch.Generator().manual_seed(0))
    probs = golden["logits"].softmax(-1)
    assert torch.allclose(
        expected_calibration_error(probs[order], golden["labels"][order]),
        expected_calibration_error(probs, golden["labels"]), rtol=0, atol=1e-12,
    )  # fmt: skip


# ---- accuracy at a cost


def at(costs, accuracies, budget: float) -> float:
    return accuracy_at_cost(torch.tensor(costs, dtype=torch.float64), torch.tensor(accuracies).double(), budget)


POINTS = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 100)), min_size=1, max_size=8)


def test_between_points_in_a_straight_line():
    costs, accuracies = [0.9, 0.3, 0.5], [0.95, 0.6, 0.8]
    for budget, expected in {0.3: 0.6, 0.4: 0.7, 0.5: 0.8, 0.6: 0.8375, 0.9: 0.95, 2.0: 0.95}.items():
        assert at(costs, accuracies, budget) == pytest.approx(expected, abs=1e-6)
    assert math.isnan(at(costs, accuracies, 0.299)) and math.isnan(at([0.4], [1.0], 0.0))
    assert at([0.4], [0.7], 0.4) == at([0.4], [0.7], 9.0) == pytest.approx(0.7)


@quick
@given(POINTS, st.integers(0, 45), st.randoms(use_true_random=False))
def test_accuracy_at_cost_of_any_points(points, budget, random):
    costs, accuracies = [c / 40 for c, _ in points], [a / 100 for _, a in points]
    found = at(costs, accuracies, budget / 40)
    affordable = [a for c, a in zip(costs, accuracies, strict=True) if c <= budget / 40]
    if not affordable:
        assert math.isnan(found)
        return
    assert max(affordable) - 1e-6 <= found <= max(accuracies) + 1e-6  # never worse than a point within budget
    if budget / 40 >= max(costs):
        assert found == pytest.approx(max(accuracies), abs=1e-6)
    if any(c == budget / 40 for c in costs):
        assert found == pytest.approx(max(affordable), abs=1e-6)
    assert at(costs, accuracies, (budget + 1) / 40) >= found - 1e-6  # more money, no less accuracy
    shuffled = random.sample(points, len(points))
    again = at([c / 40 for c, _ in shuffled], [a / 100 for _, a in shuffled], budget / 40)
    assert again == pytest.approx(found, abs=1e-6)


def test_float32_points_as_reports_give_them():
    costs, accuracies = torch.tensor([0.25, 0.75]), torch.tensor([0.5, 0.9])
    assert accuracy_at_cost(costs, accuracies, 0.5) == pytest.approx(0.7, abs=1e-6)


def test_a_dominated_point_is_not_on_the_upper_frontier():
    assert at([0.2, 0.6, 1.0], [0.5, 0.4, 0.9], 0.8) == pytest.approx(at([0.2, 1.0], [0.5, 0.9], 0.8))
