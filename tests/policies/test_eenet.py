"""policies/eenet.py: scores that tell right from wrong, quotas on the budget, the closest ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jeidnn_hf.policies import EENetScheduler, RandomExits
from jeidnn_hf.policies.eenet import _Training, quotas_within
from jeidnn_hf.policies.quota import leave_at, quota_thresholds
from known_records import accuracy_of, cost_of, easy_and_hard, noise, record_with


@pytest.fixture(scope="module")
def problem():
    """Three exits, where quotas are a matter of choice: at this budget all can be right."""
    record, easy = easy_and_hard(exits=3)
    policy = EENetScheduler.fit(record, budget=0.6 * 1 / 3 + 0.4 * 1 + 1e-6, steps=150)
    return record, easy, policy


def test_scores_are_how_likely_an_exit_is_right(problem):
    record, easy, policy = problem
    scores = policy.scores(record.logits)
    assert scores.shape == (400, 3)
    assert scores[easy, :2].min() > 0.8 and scores[~easy, :2].max() < 0.2 and scores[:, 2].min() > 0.8


def test_it_beats_chance_at_equal_cost(problem):
    record, _, policy = problem
    fresh, _ = easy_and_hard(exits=3, seed=1)
    chosen = policy.decide(fresh.logits)
    assert cost_of(record, policy.decide(record.logits)) <= 0.6 + 1e-5
    random = RandomExits.fit(record, budget=cost_of(fresh, chosen))
    torch.manual_seed(0)
    by_chance = sum(accuracy_of(fresh, random.decide(fresh.logits)) for _ in range(5)) / 5
    assert accuracy_of(fresh, chosen) > by_chance + 0.15


def test_a_score_is_the_logistic_layer_written_out():
    record = noise(50, 3, classes=4)
    policy = EENetScheduler(3, 4).requires_grad_(False)
    torch.manual_seed(0)
    for parameter in policy.parameters():
        torch.nn.init.normal_(parameter)
    expected = []
    for row in record.logits.double().softmax(-1).tolist():
        scores: list[float] = []
        for l, probs in enumerate(row):
            sure = 1 + sum(p * math.log(p) for p in probs) / math.log(4)
            inputs = [*probs, max(probs), sure]
            total = float(policy.bias[l]) + sum(w * x for w, x in zip(policy.weight[l].tolist(), inputs, strict=True))
            total += sum(w * q for w, q in zip(policy.earlier[l].tolist(), scores, strict=False))
            scores.append(1 / (1 + math.exp(-total)))
        expected.append(scores)
    torch.testing.assert_close(policy.scores(record.logits).tolist(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("budget", [0.45, 0.7])
def test_the_assignment_learns_the_budget_and_the_scores_are_those_of_the_policy(budget):
    record = noise(300, 4)
    torch.manual_seed(0)
    parts, policy = _Training(EENetScheduler.features(record.logits), hidden=8), EENetScheduler(4, 5)
    optimizer, costs = torch.optim.Adam(parts.parameters(), lr=0.05), torch.arange(1, 5) / 4
    right = (record.logits.argmax(-1) == record.labels[:, None]).float()
    for _ in range(100):
        optimizer.zero_grad()
        parts.loss(right, costs, budget, 1e-3, 1e-2).backward()
        optimizer.step()
    assert float(parts.quotas() @ costs) == pytest.approx(budget, rel=0.05)
    parts.write_scores(policy)
    torch.testing.assert_close(policy.scores(record.logits), parts()[1], rtol=1e-4, atol=1e-5)
    assert policy.earlier.abs().max() > 0.1


@pytest.mark.parametrize("budget", [0.25, 0.4, 0.9, 1.0])
def test_quotas_are_adjusted_until_the_budget_is_just_kept(budget):
    record = noise(300, 4)
    policy = EENetScheduler.fit(record, budget=budget, steps=20)
    assert budget - 4 / 300 <= cost_of(record, policy.decide(record.logits)) <= budget + 1e-9


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(0.3, 0.95))
def test_adjusted_quotas_are_the_closest_ones_of_their_cost(seed, budget):
    """At the least divergence log q'/q is linear in cost (Lagrange)."""
    random = torch.Generator().manual_seed(seed)
    scores, shares = torch.rand(400, 4, generator=random), torch.rand(4, generator=random).add(0.2)
    shares, costs = shares / shares.sum(), torch.tensor([0.2, 0.3, 0.7, 1.0], dtype=torch.float64)
    adjusted = quotas_within(scores, shares, costs, budget)
    assert float(adjusted.sum()) == pytest.approx(1)
    assert float(adjusted @ costs) == pytest.approx(budget, abs=4 / 400)
    assert costs[leave_at(scores, quota_thresholds(scores, adjusted))].mean() <= budget
    slopes = (adjusted / shares).log().diff() / costs.diff()
    torch.testing.assert_close(slopes, slopes[:1].expand(3), rtol=1e-3, atol=1e-3)


def test_a_seed_gives_one_policy_and_leaves_the_global_generator_alone():
    record = noise(100)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (EENetScheduler.fit(record, budget=0.6, steps=20, seed=5).state_dict() for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[key], second[key]) for key in first)
    other = EENetScheduler.fit(record, budget=0.6, steps=20, seed=6)
    assert not torch.equal(first["thresholds"], other.thresholds)


def test_answers_that_are_all_the_same_leave_together():
    record = record_with(torch.zeros(10, 3, 4), torch.zeros(10, dtype=torch.int64))
    chosen = EENetScheduler.fit(record, budget=0.5, steps=10).decide(record.logits)
    assert len(chosen.unique()) == 1 and cost_of(record, chosen) <= 0.5


def test_a_single_exit_is_refused():
    with pytest.raises(ValueError, match=r"^Expected at least two exits to choose from, but got 1\.$"):
        EENetScheduler.fit(noise(20, 1), budget=1.0)


def test_cost_of_a_decision():
    assert EENetScheduler(5, 10).mul_adds(10) == 10 + 20 + (10 + 2 + 3) + 1
