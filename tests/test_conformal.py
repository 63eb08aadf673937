"""Thresholds and sets against the golden numbers, coverage over many splits, and the clipped quantile that fails."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jeidnn_hf.conformal import (
    METHODS,
    conformal_quantile,
    coverage_and_inefficiency,
    fit_thresholds,
    prediction_sets,
)

GOLDENS = {seed: np.load(Path(__file__).parent / "goldens" / f"seed{seed}.npz") for seed in (0, 1, 3, 4, 6)}
every_seed = pytest.mark.parametrize("seed", GOLDENS)
every_method = pytest.mark.parametrize("method", METHODS)


def halves(seed):
    golden = GOLDENS[seed]
    probs = torch.tensor(golden["exit_logits"]).movedim(0, 1).softmax(-1)
    labels, chosen = torch.tensor(golden["labels"]), torch.tensor(golden["exit_index_paper"])
    parts = [torch.tensor(golden[f"{part}_index"]) for part in ("calibration", "test")]
    return [(probs[rows], labels[rows], chosen[rows]) for rows in parts]


@every_seed
@every_method
@pytest.mark.parametrize("alpha", [0.05, 0.1])
def test_thresholds_sets_coverage_and_inefficiency(seed, method, alpha):
    calibration, (probs, labels, chosen) = halves(seed)
    golden, name = GOLDENS[seed], f"{method}_a{round(100 * alpha):02d}_paper"
    thresholds = fit_thresholds(*calibration, alpha, method)
    expected = np.broadcast_to(golden[f"conf_tau_{name}"], thresholds.shape)
    np.testing.assert_allclose(thresholds.numpy(), expected, rtol=0, atol=1e-10)
    sets = prediction_sets(probs, chosen, thresholds)
    assert sets.sum(1).tolist() == golden[f"conf_set_size_{name}"].tolist()
    coverage, inefficiency = coverage_and_inefficiency(sets, labels)
    assert coverage == pytest.approx(float(golden[f"conf_coverage_{name}"]), abs=1e-10)
    assert inefficiency == pytest.approx(float(golden[f"conf_inefficiency_{name}"]), abs=1e-10)


@every_seed
def test_calibration_samples_by_exit(seed):
    (_, _, chosen), _ = halves(seed)
    counts = torch.bincount(chosen, minlength=len(GOLDENS[seed]["costs"]))
    assert counts.tolist() == GOLDENS[seed]["conf_cal_count_per_exit_paper"].tolist()


@every_seed
@every_method
def test_the_papers_search_for_alpha_on_test_labels(seed, method):
    """App. 9.3's reporting rule, which peeks: the first alpha = .05, .045, ... whose empirical coverage passes .95."""
    calibration, (probs, labels, chosen) = halves(seed)
    found = [math.nan] * 3
    for i in range(10):
        alpha = 0.05 - 0.005 * i
        sets = prediction_sets(probs, chosen, fit_thresholds(*calibration, alpha, method))
        coverage, inefficiency = coverage_and_inefficiency(sets, labels)
        if coverage > 0.95:
            found = [alpha, inefficiency, coverage]
            break
    np.testing.assert_allclose(found, GOLDENS[seed][f"conf_search_{method}_a05_paper"], rtol=0, atol=1e-10)


@given(st.lists(st.floats(0, 1), min_size=0, max_size=60), st.floats(0.01, 0.99))
def test_the_quantile_is_the_kth_smallest_or_infinite(scores, alpha):
    found = conformal_quantile(torch.tensor(scores, dtype=torch.float64), alpha)
    at_most = sum(score <= found for score in scores)
    if math.isinf(found):
        assert (len(scores) + 1) * (1 - alpha) > len(scores) - 1e-6
    else:
        assert at_most >= (len(scores) + 1) * (1 - alpha) - 1e-6
        assert sum(score < found for score in scores) < (len(scores) + 1) * (1 - alpha) + 1e-6


def test_round_products_do_not_cost_a_rank():
    scores = torch.arange(19) / 19  # (19 + 1) 0.95 = 19.000000000000004 in floating point
    assert conformal_quantile(scores, 0.05) == pytest.approx(18 / 19)
    assert math.isinf(conformal_quantile(scores[:18], 0.05))


def clipped(scores, alpha):
    """What the official code does where k > n: the largest score."""
    return min(conformal_quantile(scores, alpha), float(scores.max()))


def mean_coverage(quantile, n, alpha, runs=500):
    generator, covered = torch.Generator().manual_seed(0), []
    for _ in range(runs):
        scores = torch.rand(n, generator=generator, dtype=torch.float64)
        covered.append(min(quantile(scores, alpha), 1.0))  # of uniform scores, the share at most the threshold
    return float(np.mean(covered)), float(np.std(covered) / math.sqrt(runs))


@pytest.mark.parametrize(("n", "alpha"), [(30, 0.01), (49, 0.01), (30, 0.1), (200, 0.05)])
def test_coverage_over_500_splits(n, alpha):
    mean, error = mean_coverage(conformal_quantile, n, alpha)
    assert mean >= 1 - alpha - 3 * error


@pytest.mark.parametrize(("n", "alpha"), [(30, 0.01), (49, 0.01)])
def test_the_clipped_quantile_does_not_cover(n, alpha):
    mean, error = mean_coverage(clipped, n, alpha)
    assert mean < 1 - alpha - 3 * error


def test_mistakes():
    probs = torch.full((4, 2, 3), 1 / 3)
    labels = chosen = torch.zeros(4, dtype=torch.long)
    for alpha in (0, 1, -0.1, math.nan):
        with pytest.raises(ValueError, match=r"Expected alpha in \(0, 1\)"):
            fit_thresholds(probs, labels, chosen, alpha)
    with pytest.raises(ValueError, match="Expected a conformal method among"):
        fit_thresholds(probs, labels, chosen, 0.1, "mondrian")
    with pytest.raises(ValueError, match="Expected calibration data, but got none"):
        fit_thresholds(probs[:0], labels[:0], chosen[:0], 0.1)
    with pytest.raises(ValueError, match="without NaN"):
        fit_thresholds(probs * math.nan, labels, chosen, 0.1)
