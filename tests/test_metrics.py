"""metrics.py: the calibration error against goldens, a loop over ranks and theory; scores against scikit-learn; subsets
and their bootstrap; accuracy at a cost."""

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
from sklearn.metrics import brier_score_loss, log_loss, roc_auc_score
from torch import Tensor

from jeidnn_hf.metrics import (
    accuracy_at_cost,
    auroc,
    bootstrap_interval,
    brier_score,
    disjoint_subsets,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_bins,
)

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
    """Eq. 19 sample by sample: the one of rank r is in the bin b with floor(N b / B) <= r < floor(N (b + 1) / B).

    Those of one confidence are as right as they are on average.
    """
    count, sums, sizes = len(right), Counter(), Counter()
    alike = {c: [r for r, other in zip(right, confidence, strict=True) if other == c] for c in set(confidence)}
    for rank, i in enumerate(sorted(range(count), key=lambda i: confidence[i])):
        (b,) = [b for b in range(bins) if count * b // bins <= rank < count * (b + 1) // bins]
        sums[b] += Fraction(sum(alike[confidence[i]]), len(alike[confidence[i]])) - Fraction(confidence[i])
        sizes[b] += 1
    assert sum(sizes.values()) == count
    assert max(sizes.values()) - min(sizes[b] for b in range(bins)) <= 1  # equal mass
    return float(sum(map(abs, sums.values())) / count)


CONFIDENCE = st.one_of(st.floats(0.51, 1.0), st.sampled_from([0.75, 0.8, 1.0]))  # ties too
SAMPLES = st.lists(st.tuples(CONFIDENCE, st.booleans()), min_size=1, max_size=50)


@quick
@given(SAMPLES, st.integers(1, 20), st.integers(2, 5))
def test_bins_hold_equal_numbers_of_samples(samples, bins, classes):
    confidence, right = map(list, zip(*samples, strict=True))
    confidence_ = torch.tensor(confidence, dtype=torch.float64)
    found = expected_calibration_error(*answers(confidence_, torch.tensor(right), classes), bins=bins)
    assert float(found) == pytest.approx(by_ranks(confidence, right, bins), abs=1e-12)


@quick
@given(st.lists(st.tuples(st.floats(0.51, 1.0), st.booleans()), min_size=1, max_size=40, unique_by=lambda s: s[0]))
def test_one_bin_and_as_many_bins_as_samples(samples):
    confidence, right = (torch.tensor(column) for column in zip(*samples, strict=True))
    confidence, count = confidence.double() + 1e-7 * torch.arange(len(samples)) / len(samples), len(samples)
    assert len(confidence.unique()) == count
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


def test_samples_of_one_confidence_count_with_their_mean():
    confidence, right = torch.full((60,), 0.75, dtype=torch.float64), torch.arange(60) >= 15
    assert float(expected_calibration_error(*answers(confidence, right))) == pytest.approx(0, abs=1e-12)
    wrong = torch.arange(60) >= 30
    assert float(expected_calibration_error(*answers(confidence, wrong))) == pytest.approx(0.25, abs=1e-12)


@quick
@given(SAMPLES, st.randoms(use_true_random=False))
def test_order_of_the_samples_does_not_matter(samples, random):
    found = []
    for rows in (samples, random.sample(samples, len(samples))):
        confidence, right = (torch.tensor(column) for column in zip(*rows, strict=True))
        found.append(float(expected_calibration_error(*answers(confidence.double(), right), bins=7)))
    assert found[0] == pytest.approx(found[1], abs=1e-12)


def test_exits_are_tied_apart_from_one_another():
    """One exit's ties must not run into the other's."""
    tied, free = torch.full((30,), 0.75), torch.linspace(0.55, 0.95, 30)
    right = torch.arange(30) % 3 != 0
    probs = torch.stack([answers(tied, right)[0], answers(free, right)[0]], dim=1)
    found = expected_calibration_error(probs, (~right).long())
    alone = [float(expected_calibration_error(*answers(c, right))) for c in (tied, free)]
    assert found.tolist() == pytest.approx(alone, abs=1e-12) and abs(alone[0] - alone[1]) > 0.01


def test_bins_of_the_diagram_add_up_to_the_error(golden):
    probs, labels = golden["logits"][:, 0].softmax(-1), golden["labels"]
    for rows in (len(labels), 9):
        drawn = reliability_bins(probs[:rows], labels[:rows])
        gaps = [n * abs(a - c) for n, a, c in zip(drawn["count"], drawn["accuracy"], drawn["confidence"], strict=True)]
        found = float(expected_calibration_error(probs[:rows], labels[:rows]))
        assert sum(gaps) / rows == pytest.approx(found, abs=1e-12)
        assert len(gaps) == min(rows, 15) and sum(drawn["count"]) == rows
        assert max(drawn["count"]) - min(drawn["count"]) <= 1 and min(drawn["count"]) >= 1
        assert drawn["confidence"] == sorted(drawn["confidence"])
        weighted = sum(n * a for n, a in zip(drawn["count"], drawn["accuracy"], strict=True)) / rows
        assert weighted == pytest.approx(float((probs[:rows].argmax(1) == labels[:rows]).double().mean()), abs=1e-12)


def test_probabilities_that_are_not_numbers_are_refused():
    probs = torch.full((4, 3), 1 / 3)
    probs[2, 1] = math.nan
    for measure in (expected_calibration_error, reliability_bins):
        with pytest.raises(ValueError, match="^Expected probabilities without NaN, but got some.$"):
            measure(probs, torch.zeros(4, dtype=torch.int64))


# ---- proper scores, AUROC


@pytest.mark.parametrize(("exits", "classes"), [(1, 2), (3, 6)])
def test_proper_scores_of_scikit_learn(exits, classes):
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(200, exits, classes, generator=random, dtype=torch.float64)
    labels = torch.randint(classes, (200,), generator=random)
    probs, all_ = logits.softmax(-1), list(range(classes))
    nll, brier = negative_log_likelihood(logits, labels), brier_score(probs, labels)
    assert nll.shape == brier.shape == (exits,)
    for l in range(exits):
        assert float(nll[l]) == pytest.approx(log_loss(labels, probs[:, l], labels=all_), abs=1e-10)
        loss = brier_score_loss(labels, probs[:, l], labels=all_, scale_by_half=False)
        assert float(brier[l]) == pytest.approx(loss, abs=1e-12)
        assert float(brier_score(probs[:, l], labels)) == pytest.approx(loss, abs=1e-12)
        assert float(negative_log_likelihood(logits[:, l].float(), labels)) == pytest.approx(float(nll[l]), abs=1e-6)


def test_bounds_of_the_proper_scores():
    sure = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert float(brier_score(sure, torch.tensor([0, 1]))) == 0 and float(brier_score(sure, torch.tensor([1, 0]))) == 2
    assert float(negative_log_likelihood(torch.zeros(5, 7), torch.arange(5))) == pytest.approx(math.log(7))
    assert float(negative_log_likelihood(torch.tensor([[0.0, 2000.0]]), torch.tensor([0]))) == 2000  # no log of zero


@quick
@given(st.lists(st.tuples(st.integers(-4, 4), st.booleans()), min_size=2, max_size=60))
def test_area_under_the_curve_with_ties(samples):
    scores, targets = (torch.tensor(column) for column in zip(*samples, strict=True))
    found = auroc(scores, targets)
    if targets.all() or not targets.any():
        assert found is None
        return
    assert found == pytest.approx(roc_auc_score(targets, scores), abs=1e-12)
    pairs = (scores[targets][:, None] - scores[~targets][None]).sign()
    assert found == pytest.approx(float((pairs + 1).double().mean() / 2), abs=1e-12)
    assert auroc(-scores, targets) == pytest.approx(1 - found, abs=1e-12)


def test_area_under_the_curve_of_many_floats():
    random = torch.Generator().manual_seed(0)
    scores, targets = torch.rand(5000, generator=random), torch.rand(5000, generator=random) < 0.3
    assert auroc(scores, targets) == pytest.approx(roc_auc_score(targets, scores), abs=1e-12)
    assert auroc(torch.zeros(5000), targets) == pytest.approx(0.5, abs=1e-12)


# ---- subsets and their bootstrap


@quick
@given(st.integers(0, 200), st.integers(1, 15), st.integers(0, 5))
def test_subsets_are_a_partition_into_equal_parts(count, parts, seed):
    found = disjoint_subsets(count, parts, seed)
    assert len(found) == parts and sorted(torch.cat(found).tolist()) == list(range(count))
    assert max(map(len, found)) - min(map(len, found)) <= 1
    assert all(torch.equal(a, b) for a, b in zip(found, disjoint_subsets(count, parts, seed), strict=True))
    if count > 20:  # shuffled
        assert torch.cat(found).tolist() != list(range(count))
        assert torch.cat(disjoint_subsets(count, parts, seed + 1)).tolist() != torch.cat(found).tolist()


def test_the_mean_over_equal_subsets_is_the_mean():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = [float(values[part].mean()) for part in disjoint_subsets(1000)]
    assert np.mean(means) == pytest.approx(float(values.mean()), abs=1e-12)
    low, high = bootstrap_interval(means)
    assert low < float(values.mean()) < high and (low, high) == bootstrap_interval(means)
    assert bootstrap_interval(means, seed=1) != (low, high)


def test_the_interval_is_the_percentile_one():
    """Of two values, resampled, the mean is the low, the middle or the high one with chances 1/4, 1/2, 1/4."""
    assert bootstrap_interval([1.0, 3.0]) == (1.0, 3.0) and bootstrap_interval([1.0, 3.0], confidence=0.4) == (2.0, 2.0)
    assert bootstrap_interval([0.25]) == (0.25, 0.25)
    means = np.random.default_rng(7).normal(size=10)
    spread = means.std() / math.sqrt(10)  # of a resampled mean
    low, high = bootstrap_interval(means.tolist())
    assert (high - low) / 2 == pytest.approx(1.96 * spread, rel=0.1)
    narrow = bootstrap_interval(means.tolist(), confidence=0.5)
    assert low < narrow[0] < means.mean() < narrow[1] < high


def test_the_interval_holds_a_normal_mean_as_often_as_ten_values_allow():
    """The percentile interval of 10 normal values is 1.96 sigma_hat / sqrt(10) wide with sigma_hat^2 = S / 10, that is
    P(|t_9| < 1.96 sqrt(9 / 10)) = .904: not .95, and good to know."""
    random = np.random.default_rng(0)
    held = 0
    for _ in range(1000):
        low, high = bootstrap_interval(random.normal(size=10).tolist(), resamples=1000)
        held += low <= 0 <= high
    assert held / 1000 == pytest.approx(0.90, abs=0.03)


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
