"""Scores by hand, thresholds and sets against the goldens and mapie, coverage over 500 splits, and what has none."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mapie.classification import SplitConformalClassifier
from sklearn.base import BaseEstimator, ClassifierMixin

from jeidnn_hf import conformal
from jeidnn_hf.conformal import (
    METHODS,
    SCORES,
    ConformalScore,
    choose_raps,
    conformal_quantile,
    coverage_and_inefficiency,
    exit_groups,
    fit_thresholds,
    prediction_sets,
    thresholds_of_scores,
)
from jeidnn_hf.exits import exit_decision

GOLDENS = {seed: np.load(Path(__file__).parent / "goldens" / f"seed{seed}.npz") for seed in (0, 1, 3, 4, 6)}
every_seed = pytest.mark.parametrize("seed", GOLDENS)
papers_method = pytest.mark.parametrize("method", METHODS[:4])
quick = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def halves(seed):
    golden = GOLDENS[seed]
    probs = torch.tensor(golden["exit_logits"]).movedim(0, 1).softmax(-1)
    labels, chosen = torch.tensor(golden["labels"]), torch.tensor(golden["exit_index_paper"])
    parts = [torch.tensor(golden[f"{part}_index"]) for part in ("calibration", "test")]
    return [(probs[rows], labels[rows], chosen[rows]) for rows in parts]


# ---- the paper's four methods


@every_seed
@papers_method
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
@papers_method
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


# ---- scores

DISTRIBUTION = st.lists(st.integers(0, 20), min_size=2, max_size=7).filter(any).map(lambda w: [x / sum(w) for x in w])


def test_scores_of_one_sample():
    probs = torch.tensor([[0.1, 0.6, 0.3]], dtype=torch.float64)
    expected = {"lac": [0.9, 0.4, 0.7], "aps": [1.0, 0.6, 0.9], "raps": [1.0 + 0.4, 0.6, 0.9 + 0.2]}
    for name, scores in expected.items():
        found = ConformalScore(name, free_ranks=1, penalty=0.2, seed=None)(probs)
        assert found.dtype == torch.float64 and found.tolist() == [pytest.approx(scores, abs=1e-12)]


@quick
@given(st.lists(DISTRIBUTION, min_size=1, max_size=4), st.sampled_from(SCORES), st.integers(0, 4), st.booleans())
def test_scores_class_by_class(rows, name, free, fixed):
    penalty, seed, stream = 0.25, None if fixed else 3, 1
    for i, row in enumerate(rows):
        score = ConformalScore(name, free, penalty, seed)
        found = score(torch.tensor([row] * len(rows), dtype=torch.float64), stream)[i].tolist()
        u = 1.0 if fixed else np.random.default_rng([seed, stream]).random(len(rows))[i]
        for k, p in enumerate(row):
            before = [j for j, q in enumerate(row) if q > p or (q == p and j < k)]  # ties: in the classes' order
            expected = 1 - p if name == "lac" else sum(row[j] for j in before) + u * p
            expected += penalty * max(0, len(before) + 1 - free) if name == "raps" else 0
            assert found[k] == pytest.approx(expected, abs=1e-12)


@quick
@given(DISTRIBUTION, st.sampled_from(SCORES), st.randoms(use_true_random=False))
def test_a_likelier_class_is_never_stranger(row, name, random):
    score, probs = ConformalScore(name, 1, 0.1, seed=2), torch.tensor([row], dtype=torch.float64)
    found = score(probs)[0]
    assert bool((found[probs[0].argsort(descending=True, stable=True)].diff() >= -1e-12).all())
    if len(set(row)) == len(row):  # the classes' names play no part
        order = random.sample(range(len(row)), len(row))
        torch.testing.assert_close(score(probs[:, order])[0], found[order], rtol=0, atol=1e-12)


def test_all_exits_at_once_are_the_exits_alone_with_one_u_per_sample():
    random = torch.Generator().manual_seed(0)
    probs = torch.randn(30, 4, 5, generator=random).softmax(-1)
    for name in SCORES:
        score = ConformalScore(name, penalty=0.1)
        found = score(probs, stream=1)
        for l in range(4):
            assert torch.equal(found[:, l], score(probs[:, l], stream=1))
    aps = ConformalScore("aps")
    assert torch.equal(aps(probs), aps(probs)) and not torch.equal(aps(probs), aps(probs, stream=1))
    assert not torch.equal(aps(probs), ConformalScore("aps", seed=1)(probs))
    assert torch.equal(ConformalScore("raps", penalty=0.0)(probs), aps(probs))


def test_aps_scores_of_the_true_classes_are_uniform():
    """Labels drawn from the very probabilities: the randomised score is then uniform (Romano et al., Section 1.3)."""
    random = torch.Generator().manual_seed(0)
    probs = torch.randn(20_000, 6, generator=random, dtype=torch.float64).softmax(-1)
    labels = probs.multinomial(1, generator=random)
    scores = ConformalScore("aps")(probs).gather(1, labels).squeeze(1).sort().values
    distance = (scores - (torch.arange(20_000) + 0.5) / 20_000).abs().max()  # of Kolmogorov and Smirnov
    assert float(distance) < 1.63 / math.sqrt(20_000)


def test_choose_raps():
    """Free ranks from the ranks of the true classes; of the penalties, the one of the smallest sets."""
    random = torch.Generator().manual_seed(1)
    logits, labels = torch.randn(600, 30, generator=random), torch.randint(30, (600,), generator=random)
    probs = (logits + 4 * torch.nn.functional.one_hot(labels, 30)).softmax(-1)
    score = choose_raps(probs, labels, 0.1, seed=5)
    ranks = sorted(int((row > row[y]).sum()) + 1 for row, y in zip(probs, labels.tolist(), strict=True))
    assert score.name == "raps" and score.seed == 5 and score == choose_raps(probs, labels, 0.1, seed=5)
    assert score.free_ranks == ranks[math.ceil(0.9 * 599)]
    halves = np.array_split(np.random.default_rng(5).permutation(600), 2)

    def mean_size(penalty: float) -> float:
        scores = ConformalScore("raps", score.free_ranks, penalty, 5)(probs, stream=2)
        threshold = sorted(float(scores[i, labels[i]]) for i in halves[0])[math.ceil(301 * 0.9) - 1]
        return np.mean([int((scores[i] <= threshold).sum()) for i in halves[1]])

    sizes = {penalty: mean_size(penalty) for penalty in (0.001, 0.01, 0.03, 0.1, 0.3)}
    assert sizes[score.penalty] == min(sizes.values()) < max(sizes.values())
    assert sizes[score.penalty] < mean_size(0.0)  # smaller than aps


# ---- quantile


@given(st.lists(st.floats(0, 1), min_size=0, max_size=60), st.floats(0.01, 0.99), st.booleans())
def test_the_quantile_is_the_kth_smallest_or_infinite(scores, alpha, plain):
    found = conformal_quantile(torch.tensor(scores, dtype=torch.float64), alpha, "plain" if plain else "finite_sample")
    rank, at_most = (len(scores) + (not plain)) * (1 - alpha), sum(score <= found for score in scores)
    if math.isinf(found):
        assert rank > len(scores) - 1e-6 or not scores
        assert not plain or not scores
    else:
        assert at_most >= rank - 1e-6
        assert sum(score < found for score in scores) < rank + 1e-6


def test_the_paper_s_percentile_is_numpy_s():
    scores = torch.rand(137, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for alpha in (0.01, 0.05, 0.1, 0.5):
        expected = np.quantile(scores.numpy(), 1 - alpha, method="inverted_cdf")
        assert conformal_quantile(scores, alpha, "plain") == expected <= conformal_quantile(scores, alpha)
    assert conformal_quantile(scores[:10], 0.05, "plain") == float(scores[:10].max())
    assert math.isinf(conformal_quantile(scores[:10], 0.05))
    with pytest.raises(ValueError, match="Expected a quantile among .*, but got 'linear'"):
        conformal_quantile(scores, 0.1, "linear")


def test_round_products_do_not_cost_a_rank():
    scores = torch.arange(19) / 19  # (19 + 1) 0.95 = 19.000000000000004 in floating point
    assert conformal_quantile(scores, 0.05) == pytest.approx(18 / 19)
    assert math.isinf(conformal_quantile(scores[:18], 0.05))


# ---- thresholds and groups


@pytest.mark.parametrize("quantile", ["finite_sample", "plain"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SCORES)
def test_thresholds_of_every_method_by_hand(name, method, quantile):
    random, alpha, groups = torch.Generator().manual_seed(0), 0.2, [0, 0, 1, 1, 2]
    probs, labels = torch.randn(120, 5, 4, generator=random).softmax(-1), torch.randint(4, (120,), generator=random)
    chosen = torch.multinomial(torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]), 120, replacement=True, generator=random)
    counts = torch.bincount(chosen, minlength=5).tolist()
    assert counts[4] == 0 and 0 < counts[3] < 20 <= counts[1]
    score = ConformalScore(name, 1, 0.1, seed=4)
    scores = score(probs, stream=1)

    def kth(l_of_row) -> float:
        found = sorted(float(scores[i, l, labels[i]]) for i, l in l_of_row)
        k = math.ceil((len(found) + (quantile == "finite_sample")) * (1 - alpha) - 1e-9)
        return found[k - 1] if 0 < k <= len(found) else math.inf

    taken = list(enumerate(chosen.tolist()))
    at = [[(i, l) for i, l in taken if l == exit_] for exit_ in range(5)]
    general = kth(taken)
    expected = {
        "general": [general] * 5,
        "ims": [kth([(i, l) for i in range(120)]) for l in range(5)],
        "strict": [kth(rows) if rows else 0.0 for rows in at],
        "gated": [kth(rows) if len(rows) >= 20 else general for rows in at],
        "grouped": [kth([(i, l) for i, l in taken if groups[l] == groups[exit_]]) for exit_ in range(5)],
    }[method]
    found = fit_thresholds(probs, labels, chosen, alpha, method, score=score, quantile=quantile, groups=groups)
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx(expected, abs=1e-12)
    sets = prediction_sets(probs, chosen, found, score)
    for i, l in taken:
        assert sets[i].tolist() == (score(probs)[i, l] <= expected[l] + 0).tolist()


def test_least_samples_of_gated():
    scores, chosen = torch.rand(60, 2, generator=torch.Generator().manual_seed(0)).double(), torch.arange(60) // 40
    one, other = (thresholds_of_scores(scores, chosen, 0.1, "gated", min_samples=n)[1] for n in (20, 21))
    assert float(one) == conformal_quantile(scores[40:, 1], 0.1)
    assert float(other) == conformal_quantile(torch.cat([scores[:40, 0], scores[40:, 1]]), 0.1)


@quick
@given(st.lists(st.integers(0, 60), min_size=1, max_size=12), st.integers(1, 80))
def test_groups_are_neighbours_and_large_enough(counts, least):
    chosen = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    groups = exit_groups(chosen, len(counts), least)
    assert len(groups) == len(counts) and groups[0] == 0
    assert all(b - a in (0, 1) for a, b in zip(groups[:-1], groups[1:], strict=True))
    sizes = [sum(c for c, g in zip(counts, groups, strict=True) if g == group) for group in range(groups[-1] + 1)]
    assert len(sizes) == 1 or min(sizes) >= least
    if sum(counts) >= 2 * (least + max(counts)):  # and no larger than they need be
        assert len(sizes) >= 2


def test_groups_of_exits():
    chosen = torch.repeat_interleave(torch.arange(5), torch.tensor([50, 60, 100, 30, 20]))
    assert exit_groups(chosen, 5) == [0, 0, 1, 1, 1]
    assert exit_groups(chosen, 5, 50) == [0, 1, 2, 3, 3]
    assert exit_groups(chosen, 5, 1000) == [0] * 5 and exit_groups(chosen[:0], 1) == [0]


# ---- against mapie


class Given(ClassifierMixin, BaseEstimator):
    """A classifier whose inputs are its probabilities."""

    def fit(self, probs, labels):
        self.classes_, self.n_features_in_ = np.unique(labels), probs.shape[1]
        return self

    def predict_proba(self, probs):
        return np.asarray(probs)

    def predict(self, probs):
        return np.asarray(probs).argmax(1)


@pytest.mark.parametrize("alpha", [0.05, 0.1, 0.3])
@pytest.mark.parametrize("name", ["lac", "aps"])
@pytest.mark.parametrize("classes", [3, 7])
def test_sets_of_mapie(name, alpha, classes, monkeypatch):
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (700,), generator=random)
    logits = torch.randn(700, 1, classes, generator=random, dtype=torch.float64)
    probs = (logits + 1.5 * torch.nn.functional.one_hot(labels, classes)[:, None]).softmax(-1)
    chosen, calibration, test = torch.zeros(700, dtype=torch.int64), slice(0, 303), slice(303, 700)
    given = Given().fit(probs[:, 0].numpy(), labels.numpy())
    theirs = SplitConformalClassifier(given, 1 - alpha, conformity_score=name, random_state=11)
    theirs.conformalize(probs[calibration, 0].numpy(), labels[calibration].numpy())
    how = {"include_last_label": "randomized"} if name == "aps" else None
    _, expected = theirs.predict_set(probs[test, 0].numpy(), how)

    def their_uniforms(self, probs, stream):  # theirs subtract u p from the sum up to p, ours add u p to the sum before
        return 1 - torch.from_numpy(np.random.RandomState(11).uniform(size=len(probs)))[:, None]

    monkeypatch.setattr(ConformalScore, "_uniforms", their_uniforms)
    parts = probs[calibration], labels[calibration], chosen[calibration]
    for method in METHODS:
        thresholds = fit_thresholds(*parts, alpha, method, score=ConformalScore(name), groups=[0])
        sets = prediction_sets(probs[test], chosen[test], thresholds, ConformalScore(name))
        assert np.array_equal(sets.numpy(), expected[:, :, 0])
    assert 0.05 < sets.double().mean() < 0.99


# ---- coverage


def clipped(scores, alpha, kind="finite_sample"):
    """What the official code does where k > n: the largest score."""
    return min(conformal_quantile(scores, alpha, kind), float(scores.max()))


def coverage_over_splits(name: str, method: str, num_calibration: int, alpha: float, runs: int = 500, **options):
    """Of ``runs`` seeded splits of one pool, by exit: excess ``(runs, L)`` of samples covered over (1 - alpha) of those
    that leave there, and the calibration samples ``(runs, L)`` that did. Hard samples leave late."""
    random = torch.Generator().manual_seed(0)
    size, exits, classes = num_calibration + 300, 3, 5
    labels = torch.randint(classes, (size,), generator=random)
    ease = torch.rand(size, 1, 1, generator=random) * torch.tensor([1.0, 1.5, 2.0])[:, None]
    logits = torch.randn(size, exits, classes, generator=random) + 4 * ease * torch.eye(classes)[labels][:, None]
    probs = logits.softmax(-1)
    chosen = exit_decision(probs.amax(-1), 0.8)
    excess, leaving = torch.zeros(runs, exits), torch.zeros(runs, exits)
    for run in range(runs):
        order, score = torch.randperm(size, generator=random), ConformalScore(name, 1, 0.05, seed=run)
        calibration, test = order[:num_calibration], order[num_calibration:]
        parts = probs[calibration], labels[calibration], chosen[calibration]
        thresholds = fit_thresholds(*parts, alpha, method, score=score, **options)
        sets = prediction_sets(probs[test], chosen[test], thresholds, score)
        covered = sets.gather(1, labels[test, None]).squeeze(1).float() - (1 - alpha)
        excess[run] = torch.zeros(exits).index_add_(0, chosen[test], covered)
        leaving[run] = torch.bincount(chosen[calibration], minlength=exits)
    return excess, leaving


def assert_covers(excess) -> None:
    """A mean excess of samples, ``(runs,)``, that is not below 0 by more than chance."""
    assert float(excess.mean()) >= -3 * float(excess.std()) / math.sqrt(len(excess))


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("method", ["general", "strict", "grouped"])
def test_coverage_over_500_splits(name, method):
    excess, leaving = coverage_over_splits(name, method, 150, 0.1, groups=[0, 1, 1])
    assert bool((leaving > 0).all()) and bool((leaving.mean(0) > 15).all())
    assert_covers(excess.sum(1))
    if method == "strict":
        for l in range(3):
            assert_covers(excess[:, l])
    if method == "grouped":
        assert_covers(excess[:, 0])
        assert_covers(excess[:, 1:].sum(1))
    if method == "general":  # and no more than there must be: 1 / (n + 1), of distinct scores
        assert float(excess.sum(1).mean()) <= 300 / 151 + 3 * float(excess.sum(1).std()) / math.sqrt(500)
        with pytest.raises(AssertionError):  # but not at each exit
            assert_covers(excess[:, 2])


@pytest.mark.parametrize(("method", "num_calibration"), [("general", 15), ("strict", 40), ("grouped", 30)])
def test_coverage_of_few_samples_and_the_clipped_quantile_that_has_none(method, num_calibration, monkeypatch):
    options = {"groups": [0, 1, 1]}
    excess, leaving = coverage_over_splits("lac", method, num_calibration, 0.05, **options)
    assert method == "general" or float(leaving.mean(0).min()) < 19  # k > n
    assert_covers(excess.sum(1))
    monkeypatch.setattr(conformal, "conformal_quantile", clipped)
    excess, _ = coverage_over_splits("lac", method, num_calibration, 0.05, **options)
    with pytest.raises(AssertionError):
        assert_covers(excess.sum(1))


def test_the_plain_quantile_covers_less():
    excess, _ = coverage_over_splits("lac", "strict", 150, 0.1, quantile="plain")
    with pytest.raises(AssertionError):
        assert_covers(excess.sum(1))


def test_gated_has_no_such_statement():
    """Half of the samples are easy and leave at exit 1; hard ones leave at 10 further exits, too few at each for a
    threshold of its own. The easy ones' own threshold gives up what they would cover beyond .95 under the general one,
    which the hard ones miss by .05: .5 x .95 + .5 x .90 = .925. General, strict and grouped cover."""
    random, alpha, easy, hard, runs = torch.Generator().manual_seed(0), 0.05, 100, 10, 200
    chosen = torch.cat([torch.zeros(easy), torch.arange(1, 11).repeat(hard)]).long()
    kind, groups = (chosen > 0).double(), [0] + [1] * 10
    covered = {method: [] for method in ("general", "strict", "gated", "grouped")}
    for _ in range(runs):
        calibration, test = (torch.rand(200, generator=random, dtype=torch.float64) / 2 + kind / 2 for _ in range(2))
        for method, found in covered.items():
            scores = calibration[:, None].expand(-1, 11)
            thresholds = thresholds_of_scores(scores, chosen, alpha, method, groups=groups)
            found.append(float((test <= thresholds[chosen]).double().mean()))
    mean = {method: float(np.mean(found)) for method, found in covered.items()}
    assert mean["gated"] == pytest.approx(0.925, abs=0.01)
    for method in ("general", "strict", "grouped"):
        assert_covers(torch.tensor(covered[method]) - (1 - alpha))


def test_strict_is_void_where_nobody_left_and_grouped_is_not():
    """The paper's threshold 0 for an exit without calibration samples makes empty sets, +infinity full ones."""
    probs = torch.full((30, 2, 3), 1 / 3)
    labels, chosen = torch.zeros(30, dtype=torch.int64), torch.zeros(30, dtype=torch.int64)
    sizes = {}
    for method in ("strict", "grouped"):
        thresholds = fit_thresholds(probs, labels, chosen, 0.1, method, groups=[0, 1])
        sizes[method] = prediction_sets(probs, chosen + 1, thresholds).sum(1).unique().tolist()
    assert sizes == {"strict": [0], "grouped": [3]}


def test_a_class_absent_from_calibration():
    """No error, and coverage over all classes together; nothing is said of the class."""
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(2, (400,), generator=random)
    probs = (torch.randn(400, 2, 3, generator=random) + 2 * torch.eye(3)[labels][:, None]).softmax(-1)
    chosen = torch.randint(2, (400,), generator=random)
    for method in METHODS:
        thresholds = fit_thresholds(probs, labels, chosen, 0.1, method, groups=[0, 1])
        assert bool(torch.isfinite(thresholds).all())
        assert coverage_and_inefficiency(prediction_sets(probs, chosen, thresholds), labels)[0] >= 0.9


def test_one_exit_and_two_classes():
    random = torch.Generator().manual_seed(0)
    probs, chosen = torch.randn(50, 1, 2, generator=random).softmax(-1), torch.zeros(50, dtype=torch.int64)
    labels = torch.randint(2, (50,), generator=random)
    for name in SCORES:
        found = [fit_thresholds(probs, labels, chosen, 0.1, m, score=ConformalScore(name), groups=[0]) for m in METHODS]
        assert all(torch.equal(found[0], other) and other.shape == (1,) for other in found)


# ---- mistakes


def test_mistakes():
    probs = torch.full((4, 2, 3), 1 / 3)
    labels = chosen = torch.zeros(4, dtype=torch.long)
    for alpha in (0, 1, -0.1, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"Expected alpha in \(0, 1\)"):
            fit_thresholds(probs, labels, chosen, alpha)
        with pytest.raises(ValueError, match=r"Expected alpha in \(0, 1\)"):
            choose_raps(probs[:, 0], labels, alpha)
    with pytest.raises(ValueError, match="Expected a conformal method among"):
        fit_thresholds(probs, labels, chosen, 0.1, "mondrian")
    with pytest.raises(ValueError, match="Expected calibration data, but got none"):
        fit_thresholds(probs[:0], labels[:0], chosen[:0], 0.1)
    with pytest.raises(ValueError, match="Expected at least 2 samples to choose raps on, but got 1"):
        choose_raps(probs[:1, 0], labels[:1], 0.1)
    for groups in (None, [0], [0, 0, 0]):
        with pytest.raises(ValueError, match="Expected the group of each of 2 exits, but got"):
            fit_thresholds(probs, labels, chosen, 0.1, "grouped", groups=groups)
    for wrong in (math.nan, math.inf):
        with pytest.raises(ValueError, match="without NaN or infinity"):
            fit_thresholds(probs * wrong, labels, chosen, 0.1)
        with pytest.raises(ValueError, match="without NaN or infinity"):
            prediction_sets(probs * wrong, chosen, torch.zeros(2))


@pytest.mark.parametrize(
    "options", [{"name": "margin"}, {"free_ranks": -1}, {"penalty": -0.1}, {"penalty": math.inf}, {"penalty": math.nan}]
)
def test_a_score_that_is_none(options):
    with pytest.raises(ValueError, match="^Expected (a conformal score among|free_ranks >= 0 and a penalty >= 0)"):
        ConformalScore(**options)
