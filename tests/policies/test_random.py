"""policies/random.py: the budget in expectation, the same draw for all exits, blind to the images."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jeidnn_hf.policies import QuotaThresholds, RandomExits
from known_records import accuracy_of, cost_of, easy_and_hard, noise


@given(st.integers(2, 12), st.floats(0, 1))
def test_the_mean_cost_is_the_budget_and_shares_are_geometric(exits, position):
    budget = 1 / exits + position * (1 - 1 / exits)
    shares = RandomExits.fit(noise(3, exits), budget=budget).shares.double()
    costs = torch.arange(1, exits + 1, dtype=torch.float64) / exits
    assert float(shares.sum()) == pytest.approx(1) and float(shares @ costs) == pytest.approx(budget, abs=1e-6)
    torch.testing.assert_close(shares[1:-1].square(), shares[:-2] * shares[2:], atol=1e-6, rtol=0)


def test_two_exits_in_closed_form():
    policy = RandomExits.fit(noise(3, 2), budget=0.8)
    torch.testing.assert_close(policy.shares, torch.tensor([0.4, 0.6]))
    torch.testing.assert_close(policy.distribution(torch.zeros(3, 2, 5)), torch.tensor([[0.4, 0.6]] * 3))


def test_the_ends_of_the_range_leave_no_choice():
    record = noise(2000, 4)
    assert (RandomExits.fit(record, budget=0.25).decide(record.logits) == 0).all()
    assert (RandomExits.fit(record, budget=1.0).decide(record.logits) == 3).all()


def test_draws_follow_the_shares_whatever_the_image():
    record = noise(20_000, 4)
    policy = RandomExits.fit(record, budget=0.6)
    torch.manual_seed(0)
    chosen = policy.decide(record.logits)
    frequencies = chosen.bincount(minlength=4) / 20_000
    deviation = (policy.shares * (1 - policy.shares) / 20_000).sqrt()
    assert ((frequencies - policy.shares).abs() < 4 * deviation).all()
    torch.manual_seed(0)
    assert torch.equal(policy.decide(record.logits.flip(0)), chosen)
    assert not torch.equal(policy.decide(record.logits), chosen)


def test_a_sample_is_drawn_once_for_all_exits():
    policy, logits = RandomExits(torch.tensor([0.25, 0.25, 0.25, 0.25])), torch.zeros(1000, 5)
    leaves, draw = policy.step(0, logits)
    assert torch.equal(leaves, draw < 0.25)
    for l in range(1, 4):
        leaves, again = policy.step(l, logits, draw)
        assert torch.equal(again, draw) and torch.equal(leaves, draw < 0.25 * (l + 1))


def test_chance_is_the_lower_baseline():
    """The hard, two in five, are wrong unless they reach the last exit, which three in five of all do."""
    record, _ = easy_and_hard(20_000)
    random, quota = RandomExits.fit(record, budget=0.7), QuotaThresholds.fit(record, budget=0.7 + 1e-6)
    torch.manual_seed(0)
    chosen = random.decide(record.logits)
    assert cost_of(record, chosen) == pytest.approx(0.7, abs=0.01)
    assert accuracy_of(record, chosen) == pytest.approx(1 - 0.4 * 0.6, abs=0.015)
    assert accuracy_of(record, quota.decide(record.logits)) == 1
