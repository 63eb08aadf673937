"""policies/patience.py: counters by hand and written out, and the largest patience within a budget."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from jeidnn_hf.gates import ExitPolicy
from jeidnn_hf.policies import Patience
from jeidnn_hf.policies.patience import consecutive_agreements
from known_records import accuracy_of, cost_of, easy_and_hard, noise


def answering(answers: list[list[int]], classes: int = 5) -> torch.Tensor:
    return F.one_hot(torch.tensor(answers), classes).float()


ANSWERS = [[0, 0, 0, 0, 0], [0, 1, 1, 2, 2], [0, 1, 2, 3, 4], [3, 3, 1, 1, 1], [1, 2, 1, 2, 1]]


def written_out(answers: list[int], patience: int) -> int:
    count = 0
    for l, answer in enumerate(answers):
        count = count + 1 if l and answer == answers[l - 1] else 0
        if count >= patience:
            return l
    return len(answers) - 1


def test_counters_by_hand():
    expected = [[0, 1, 2, 3, 4], [0, 0, 1, 0, 1], [0, 0, 0, 0, 0], [0, 1, 0, 1, 2], [0, 0, 0, 0, 0]]
    assert consecutive_agreements(answering(ANSWERS)).tolist() == expected


@pytest.mark.parametrize(
    ("patience", "exits"),
    [(0, [0, 0, 0, 0, 0]), (1, [1, 2, 4, 1, 4]), (2, [2, 4, 4, 4, 4]), (3, [3, 4, 4, 4, 4]), (4, [4, 4, 4, 4, 4])],
)
def test_exits_by_hand(patience, exits):
    policy = Patience(5, patience)
    assert policy.decide(answering(ANSWERS)).tolist() == exits
    assert ExitPolicy.decide(policy, answering(ANSWERS)).tolist() == exits


@given(st.lists(st.lists(st.integers(0, 1), min_size=6, max_size=6), min_size=1, max_size=20), st.integers(0, 5))
def test_it_is_the_counter_written_out(answers, patience):
    expected = [written_out(row, patience) for row in answers]
    assert Patience(6, patience).decide(answering(answers)).tolist() == expected
    assert ExitPolicy.decide(Patience(6, patience), answering(answers)).tolist() == expected


def test_the_largest_patience_within_the_budget():
    record = noise(200, 6, classes=2)
    costs = [cost_of(record, Patience(6, p).decide(record.logits)) for p in range(6)]
    assert costs == sorted(costs) and costs[0] == pytest.approx(1 / 6) and costs[-1] == pytest.approx(1)
    for p, cost in enumerate(costs):
        assert Patience.fit(record, budget=min(cost + 1e-6, 1.0)).patience == p
    for p, cost in enumerate(costs[1:]):
        assert Patience.fit(record, budget=cost - 1e-6).patience == p


def test_those_that_agree_leave_and_those_that_waver_go_on():
    record, easy = easy_and_hard(exits=4)
    policy = Patience.fit(record, budget=0.6 * 0.5 + 0.4 * 1 + 1e-6)
    chosen = policy.decide(record.logits)
    assert policy.patience == 1 and torch.equal(chosen == 1, easy) and torch.equal(chosen == 3, ~easy)
    assert accuracy_of(record, chosen) == 1


@pytest.mark.parametrize("patience", [-1, 4])
def test_a_patience_out_of_range_is_refused(patience):
    with pytest.raises(ValueError, match=rf"^Expected a patience in 0\.\.3, but got {patience}\.$"):
        Patience(4, patience)


def test_cost_of_a_decision():
    assert Patience(4, 1).mul_adds(10) == 10
