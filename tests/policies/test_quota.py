"""policies/quota.py: the quota algorithm against one written out, and quotas that reach from one exit to the other."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jeidnn_hf.gates import ExitPolicy
from jeidnn_hf.policies import QuotaThresholds
from jeidnn_hf.policies.quota import LOG_RATIO, PUBLISHED_RATIOS, leave_at, quota_thresholds, quotas
from known_records import accuracy_of, cost_of, easy_and_hard, noise, record_with


def written_out(scores: list[list[float]], shares: list[float]) -> list[int]:
    """Who leaves where, sample by sample."""
    exits, exit_of = len(shares), {}
    for l in range(exits - 1):
        ranked = sorted((i for i in range(len(scores)) if i not in exit_of), key=lambda i: -scores[i][l])
        quota = math.floor(len(scores) * shares[l] + 1e-9)
        if quota and quota <= len(ranked):
            least = scores[ranked[quota - 1]][l]
            exit_of.update({i: l for i in ranked if scores[i][l] >= least})
    return [exit_of.get(i, exits - 1) for i in range(len(scores))]


@given(st.floats(0.02, 50), st.integers(1, 30))
def test_quotas_are_geometric_and_sum_to_one_over_all_exits(ratio, exits):
    shares = quotas(math.log(ratio), exits)
    assert shares.shape == (exits,) and float(shares.sum()) == pytest.approx(1)
    powers = [ratio**l for l in range(1, exits + 1)]
    assert shares.tolist() == pytest.approx([p / sum(powers) for p in powers])


def test_the_last_exit_has_a_quota_and_extreme_ratios_leave_one_exit_alone():
    assert quotas(0.0, 4).tolist() == pytest.approx([0.25] * 4)
    assert quotas(math.log(2), 3).tolist() == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert quotas(-LOG_RATIO, 5)[0] == 1 and quotas(LOG_RATIO, 5)[-1] == 1


def test_thresholds_by_hand():
    """Six samples, quotas 1/3 each: two leave at exit 1, the surest; of the four left two leave at exit 2."""
    scores = torch.tensor([[0.9, 0.1], [0.2, 0.95], [0.8, 0.99], [0.3, 0.5], [0.4, 0.6], [0.1, 0.2]])
    scores = torch.cat([scores, torch.zeros(6, 1)], 1)
    thresholds = quota_thresholds(scores, torch.full((3,), 1 / 3))
    torch.testing.assert_close(thresholds, torch.tensor([0.8, 0.6, -math.inf]))
    assert leave_at(scores, thresholds).tolist() == [0, 1, 0, 2, 1, 2]


def test_an_exit_whose_quota_is_nobody_or_more_than_are_left_is_closed():
    scores = torch.tensor([[0.9, 0.5, 0.0], [0.9, 0.6, 0.0], [0.9, 0.7, 0.0], [0.2, 0.8, 0.0]])
    thresholds = quota_thresholds(scores, torch.tensor([0.25, 0.5, 0.25]))  # three tie where one should leave
    torch.testing.assert_close(thresholds, torch.tensor([0.9, math.inf, -math.inf]))
    assert leave_at(scores, thresholds).tolist() == [0, 0, 0, 2]
    thresholds = quota_thresholds(scores, torch.tensor([0.24, 0.26, 0.5]))
    torch.testing.assert_close(thresholds, torch.tensor([math.inf, 0.8, -math.inf]))


@given(st.integers(0, 10**6), st.integers(1, 60), st.integers(1, 6), st.integers(1, 9), st.floats(0.05, 8))
def test_it_is_the_published_algorithm_also_where_scores_tie(seed, samples, exits, levels, ratio):
    random = torch.Generator().manual_seed(seed)
    scores = torch.randint(levels, (samples, exits), generator=random).float() / levels
    shares = quotas(math.log(ratio), exits)
    assert leave_at(scores, quota_thresholds(scores, shares)).tolist() == written_out(scores.tolist(), shares.tolist())


@given(st.integers(0, 10**6), st.integers(1, 300), st.integers(2, 8), st.floats(0.05, 8))
def test_shares_are_within_one_sample_of_their_quotas(seed, samples, exits, ratio):
    scores = torch.rand(samples, exits, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shares = quotas(math.log(ratio), exits)
    left = leave_at(scores, quota_thresholds(scores, shares)).bincount(minlength=exits) / samples
    missing = shares[:-1] - left[:-1]
    assert (missing > -1e-6).all() and (missing < 1 / samples).all()


@pytest.mark.parametrize("measure", ["max_probability", "entropy", "margin"])
def test_by_every_measure_just_the_easy_leave(measure):
    record, easy = easy_and_hard()
    policy = QuotaThresholds.fit(record, budget=0.7 + 1e-6, measure=measure)
    assert torch.equal(policy.decide(record.logits) == 0, easy) and policy.options == {"measure": measure}


@pytest.mark.parametrize("exits", [2, 3, 7])
def test_a_budget_is_spent_up_to_a_sample_an_exit(exits):
    record = noise(500, exits)
    for budget in (1 / exits, 0.6, 0.8, 1.0):
        chosen = QuotaThresholds.fit(record, budget=budget).decide(record.logits)
        assert budget - exits / 500 <= cost_of(record, chosen) <= budget + 1e-9
    everybody = [QuotaThresholds.fit(record, budget=b).decide(record.logits).unique().tolist() for b in (1 / exits, 1)]
    assert everybody == [[0], [exits - 1]]


def test_the_published_ratios_make_a_curve_from_early_to_late():
    record = noise(400, 5)
    costs = [cost_of(record, QuotaThresholds.of_ratio(record, r).decide(record.logits)) for r in PUBLISHED_RATIOS]
    assert len(costs) == 39 and costs[0] < 0.25 and costs[-1] > 0.75
    assert max(before - after for before, after in zip(costs, costs[1:], strict=False)) <= 5 / 400
    uniform = QuotaThresholds.of_ratio(record, 1.0).decide(record.logits)
    assert uniform.bincount().tolist() == [80] * 5


def test_temperatures_are_the_records_and_confidence_comes_after_them():
    record = noise(200)
    policy = QuotaThresholds.fit(record, budget=0.6)
    assert torch.equal(policy.temperatures, record.temperatures) and policy.temperatures[0] != 1
    probs = (record.logits / record.temperatures[:, None]).softmax(-1).amax(-1)
    assert torch.equal(policy.decide(record.logits), leave_at(probs, policy.thresholds))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_sample_on_its_threshold_leaves_there_in_either_way_to_decide(dtype):
    record = noise(60)
    record.logits = record.logits.to(dtype)
    policy = QuotaThresholds.of_ratio(record, 1.0)
    sure: Tensor = policy.confidence(record.logits)
    on_it = (sure[:, 0] == policy.thresholds[0]).nonzero().flatten()
    assert len(on_it) == 1 and policy.decide(record.logits)[on_it] == 0
    assert torch.equal(ExitPolicy.decide(policy, record.logits), policy.decide(record.logits))


def test_answers_that_are_all_the_same_leave_together():
    record = record_with(torch.zeros(10, 3, 4), torch.zeros(10, dtype=torch.int64))
    for budget in (0.34, 0.7, 1.0):
        chosen = QuotaThresholds.fit(record, budget=budget).decide(record.logits)
        assert len(chosen.unique()) == 1 and cost_of(record, chosen) <= budget
    assert accuracy_of(record, chosen) == 1


def test_what_makes_no_sense_is_refused():
    record = noise()
    for ratio in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"^Expected a ratio above 0, but got .*; 1 gives every exit"):
            QuotaThresholds.of_ratio(record, ratio)
    with pytest.raises(ValueError, match=r"^Expected a measure among \('max_probability'.*, but got 'sure'\.$"):
        QuotaThresholds.fit(record, budget=0.5, measure="sure")
    with pytest.raises(ValueError, match=r"^Expected as many thresholds as temperatures, 4, but got \(3,\)\.$"):
        QuotaThresholds(torch.ones(4), torch.zeros(3))
