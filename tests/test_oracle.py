"""oracle.py: the best exits by hand, and no policy above them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from jeidnn_hf.objectives import task_cost
from jeidnn_hf.oracle import oracle_exits, outcome
from jeidnn_hf.policies import ConfidenceThreshold
from known_records import accuracy_of, cost_of, noise, record_with


def test_the_cheapest_exit_that_is_right_and_the_first_where_none_is():
    answers = torch.tensor([[0, 0, 0], [1, 0, 1], [1, 1, 0], [1, 2, 1], [2, 0, 0]])
    record = record_with(F.one_hot(answers, 3).float(), torch.zeros(5, dtype=torch.int64))
    exits = oracle_exits(record)
    assert exits.tolist() == [0, 1, 2, 0, 1]
    assert outcome(record, exits) == pytest.approx((4 / 5, (1 + 2 + 3 + 1 + 2) / 3 / 5))


@pytest.mark.parametrize("kind", ["cross_entropy", "error", "brier"])
@pytest.mark.parametrize("lam", [0.0, 0.3, 5.0])
def test_with_lambda_the_least_total_cost(kind, lam):
    record = noise()
    costs = (task_cost(record.logits, record.labels, kind) + lam * torch.arange(1, 5) / 4).tolist()
    assert oracle_exits(record, lam, kind).tolist() == [min(range(4), key=row.__getitem__) for row in costs]


def test_nothing_is_better_than_the_oracle():
    record = noise(500, 5)
    best = outcome(record, oracle_exits(record))
    right = record.logits.argmax(-1) == record.labels[:, None]
    assert best.accuracy == pytest.approx(float(right.any(1).double().mean()))
    for budget in (0.2, 0.5, 0.8, 1.0):
        chosen = ConfidenceThreshold.fit(record, budget=budget).decide(record.logits)
        reached = outcome(record, chosen)
        assert reached == pytest.approx((accuracy_of(record, chosen), cost_of(record, chosen)))
        assert reached.accuracy < best.accuracy


def test_exits_of_other_samples_are_refused():
    with pytest.raises(ValueError, match=r"^Expected an exit for each of 80 samples, but got 79\.$"):
        outcome(noise(), torch.zeros(79, dtype=torch.int64))
