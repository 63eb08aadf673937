"""policies/threshold.py: the most demanding threshold within a budget, and a network that leaves by it."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jeidnn_hf import ExitRecord, JEIDNNConfig, JEIDNNForImageClassification, evaluate
from jeidnn_hf.calibration import fit_temperatures
from jeidnn_hf.costs import ExitCosts
from jeidnn_hf.gates import ExitPolicy
from jeidnn_hf.policies import ConfidenceThreshold
from jeidnn_hf.splits import SplitInfo

quick = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def record_of(samples: int = 80, exits: int = 4, classes: int = 5, seed: int = 0, dtype=torch.float32) -> ExitRecord:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=random)
    favoured = F.one_hot(labels, classes)[:, None] * torch.linspace(1.0, 2.5, exits)[:, None]
    noise = torch.randn(samples, exits, classes, generator=random)
    scale = torch.linspace(3.0, 0.5, exits)[:, None]  # over-confident at first, shy at last
    backbone = tuple(64 * (l + 1) for l in range(exits))
    zeros = (0,) * exits
    costs = ExitCosts(backbone, zeros, zeros, zeros)
    split = SplitInfo("toy", "validation", "train", samples, "0" * 64)
    return ExitRecord(((noise + favoured) * scale).to(dtype), labels, costs, split)


def first_above(confidence: Tensor, threshold: float) -> list[int]:
    last = confidence.shape[1] - 1
    return [next((l for l in range(last) if row[l] > threshold), last) for row in confidence.tolist()]


def mean_cost(record: ExitRecord, chosen: list[int]) -> float:
    shares = [cost / record.costs.backbone[-1] for cost in record.costs.total]
    return sum(shares[l] for l in chosen) / len(chosen)


@quick
@given(st.integers(0, 99), st.floats(0.25, 1.0), st.integers(2, 6))
def test_the_most_demanding_threshold_within_budget(seed, budget, exits):
    record = record_of(seed=seed, exits=exits)
    budget = max(budget, 1 / exits)
    policy = ConfidenceThreshold.fit(record, budget=budget)
    torch.testing.assert_close(policy.temperatures, fit_temperatures(record.logits, record.labels))
    confidence = torch.stack(
        [(record.logits[:, l] / policy.temperatures[l]).softmax(-1).max(-1).values for l in range(exits)], dim=1
    )
    chosen = policy.decide(record.logits)
    assert chosen.tolist() == first_above(confidence, policy.threshold)
    assert mean_cost(record, chosen.tolist()) <= budget + 1e-6
    assert evaluate(record, policy).normalised_mul_adds <= budget + 1e-6
    above = confidence[:, :-1][confidence[:, :-1] > policy.threshold]
    if len(above):  # the next threshold that changes anything is too dear
        dearer = mean_cost(record, first_above(confidence, float(above.min())))
        assert dearer > budget - 1e-6
        assert dearer > mean_cost(record, chosen.tolist())
    else:
        assert chosen.tolist() == [exits - 1] * 80


def test_temperatures_are_fitted_and_matter():
    record = record_of()
    policy = ConfidenceThreshold.fit(record, budget=0.5)
    assert policy.temperatures[0] > 1.5 and policy.temperatures[-1] < 1
    plain = ConfidenceThreshold(torch.ones(4), policy.threshold)
    assert not torch.equal(plain.decide(record.logits), policy.decide(record.logits))


def test_budgets_in_order_give_thresholds_and_costs_in_order():
    record = record_of(400)
    policies = [ConfidenceThreshold.fit(record, budget=b) for b in (0.25, 0.4, 0.6, 0.8, 1.0)]
    thresholds = [policy.threshold for policy in policies]
    costs = [evaluate(record, policy).normalised_mul_adds for policy in policies]
    assert thresholds == sorted(thresholds) and len(set(thresholds)) == 5
    assert costs == pytest.approx([0.25, 0.4, 0.6, 0.8, 1.0], abs=0.002) and costs == sorted(costs)
    assert evaluate(record, policies[0]).share_by_exit == [1, 0, 0, 0]
    assert evaluate(record, policies[-1]).share_by_exit == [0, 0, 0, 1]


@pytest.mark.parametrize("budget", [0.2499, 0.0, -1.0, math.nan, 1.01])
def test_a_budget_below_the_first_exit_or_above_the_last_is_refused(budget):
    with pytest.raises(ValueError, match=r"^Expected a budget in \[0\.250, 1\.000\], from the .*, but got .*\.$"):
        ConfidenceThreshold.fit(record_of(), budget=budget)


@pytest.mark.parametrize("exits", [2, 3, 7])
def test_a_budget_of_just_the_first_exit_is_enough(exits):
    """Also where the share, such as 1/3, is larger once rounded to float32."""
    record = record_of(exits=exits)
    policy = ConfidenceThreshold.fit(record, budget=record.costs.normalised[0])
    assert (policy.decide(record.logits) == 0).all()


@quick
@given(st.integers(0, 99), st.floats(-0.1, 1.1), st.integers(1, 6), st.integers(2, 5))
def test_steps_one_after_the_other_are_the_decision(seed, threshold, exits, classes):
    record = record_of(seed=seed, exits=exits, classes=classes, dtype=torch.float64)
    policy = ConfidenceThreshold(torch.linspace(0.5, 2, exits, dtype=torch.float64), threshold)
    decided = policy.decide(record.logits)
    assert torch.equal(ExitPolicy.decide(policy, record.logits), decided)
    exit_index, there, carry = torch.full((80,), -1), torch.arange(80), None
    for l in range(exits):
        leaves, carry = policy.step(l, record.logits[there, l], carry)
        assert leaves.dtype == torch.bool and leaves.shape == there.shape
        exit_index[there[leaves]] = l
        there = there[~leaves]
    assert torch.equal(exit_index, decided) and not len(there)
    assert torch.equal(policy.distribution(record.logits).argmax(-1), decided)
    assert policy.distribution(record.logits).sum(-1).eq(1).all() and policy.gate_values(record.logits) is None
    exit_index, distribution, gate_values = policy(record.logits)
    assert torch.equal(exit_index, decided) and gate_values is None
    assert torch.equal(distribution, policy.distribution(record.logits))


def test_confidence_is_the_calibrated_maximum_and_the_inequality_strict():
    logits = torch.tensor([[[0.0, math.log(3.0)], [0.0, 0.0]], [[math.log(9.0) * 2, 0.0], [0.0, 0.0]]])
    policy = ConfidenceThreshold(torch.tensor([2.0, 1.0]), 0.75)
    three = 3**0.5 / (1 + 3**0.5)
    torch.testing.assert_close(policy.confidence(logits), torch.tensor([[three, 0.5], [0.9, 0.5]]))
    assert policy.decide(logits).tolist() == [1, 0]
    sure = torch.tensor([[[0.0, 0.0], [0.0, 0.0]]])
    for threshold, taken in ((0.5, 1), (0.499, 0)):
        policy = ConfidenceThreshold(torch.ones(2), threshold)
        assert policy.decide(sure).tolist() == ExitPolicy.decide(policy, sure).tolist() == [taken]


def test_cost_of_a_decision():
    assert ConfidenceThreshold(torch.ones(3), 0.5).mul_adds(10) == 20
    assert ConfidenceThreshold(torch.ones(3), 0.5, "entropy").mul_adds(10) == 30
    assert ConfidenceThreshold(torch.ones(3), 0.5, "margin").mul_adds(10) == 21


def coloured(count: int) -> Tensor:
    """Pictures that even random features tell apart."""
    return 2 * torch.randn(count, 3, 1, 1) + torch.randn(count, 3, 32, 32)


@pytest.mark.parametrize("head", ["linear", "recurrent"])
def test_a_network_leaves_early_with_the_answers_of_all_exits(head):
    torch.manual_seed(0)
    config = {"backbone": "resnet20_cifar", "num_labels": 4, "exit_stages": [1, 3, 6, 8], "exit_head": head}
    model = JEIDNNForImageClassification(JEIDNNConfig(recipe="paper", head_dim=16, **config)).eval()
    with torch.no_grad():
        logits = model(coloured(60), output_all_exits=True).all_logits
    labels = torch.where(torch.rand(60) < 0.7, logits.softmax(-1).mean(1).argmax(-1), torch.randint(4, (60,)))
    split = SplitInfo("toy", "validation", "train", 60, "0" * 64)
    record, fresh = ExitRecord(logits, labels, model.costs, split), coloured(40)
    policy = ConfidenceThreshold.fit(record, budget=0.6)
    model.policy = policy
    reached = []
    stage = model.backbone.stage
    model.backbone.stage = lambda l, state: (reached.append(len(state)), stage(l, state))[1]
    with torch.no_grad():
        early = model(fresh)
        rows_seen = reached.copy()
        every = model(fresh, output_all_exits=True)
        labelled = model(fresh, labels=torch.zeros(40, dtype=torch.int64))
    margin = (policy.confidence(every.all_logits)[:, :-1] - policy.threshold).abs().amin(1)
    clear = margin > 1e-4
    assert clear.sum() > 30
    assert torch.equal(early.exit_index[clear], every.exit_index[clear])
    torch.testing.assert_close(early.logits[clear], every.logits[clear], rtol=1e-4, atol=1e-4)
    assert torch.equal(early.mul_adds, model.exit_mul_adds[early.exit_index])
    assert len(every.exit_index.unique()) >= 2
    left = [int((early.exit_index >= l).sum()) for l in range(4)]
    assert rows_seen == left and left[-1] < left[0] == 40  # who left is computed no further
    assert early.all_logits is None and every.gate_values is None
    assert torch.equal(every.exit_distribution.argmax(-1), every.exit_index)
    assert torch.equal(labelled.exit_index, every.exit_index)
    cost = F.cross_entropy(labelled.logits, torch.zeros(40, dtype=torch.int64))
    expected = cost + model.config.current_lam * model.normalised_costs[labelled.exit_index].mean()
    assert float(labelled.loss) == pytest.approx(float(expected), rel=1e-5)
