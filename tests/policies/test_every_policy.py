"""What holds for each of `policies.POLICIES`: budgets, one scan, what a model with it answers, saved and loaded."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from jeidnn_hf import ExitRecord, JEIDNNForImageClassification, evaluate
from jeidnn_hf.gates import ExitPolicy
from jeidnn_hf.policies import POLICIES, ConfidenceThreshold, LearnedGates
from known_records import accuracy_of, easy_and_hard
from small_models import operating_point, pixels, record, small_model

OPTIONS = {"gates": {"steps": 300}, "eenet": {"steps": 60}}
"""Of ``fit``, where its own defaults would take long."""
BUDGETS = {"patience": 0.95}
"""Where 0.7 sends everybody to one exit: a patience has only L costs."""


@pytest.fixture(scope="module")
def model() -> JEIDNNForImageClassification:
    return small_model()


@pytest.fixture(scope="module")
def answers(model) -> ExitRecord:
    return record(model, "validation", 3)


def fitted(name: str, answers: ExitRecord, budget: float = 0.7) -> ExitPolicy:
    return POLICIES[name].fit(answers, budget=budget, **OPTIONS.get(name, {}))


def decide(policy: ExitPolicy, logits: torch.Tensor, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return policy.decide(logits)


@pytest.fixture(params=list(POLICIES))
def name(request) -> str:
    return request.param


def test_the_mean_cost_is_within_the_budget(name, answers):
    costs = torch.tensor(answers.costs.normalised)
    spent = [float(costs[decide(fitted(name, answers, b), answers.logits)].mean()) for b in (0.55, 0.75, 0.95)]
    tolerance = 0.05 if name == "random" else 1e-6  # a draw, whose mean is within
    assert all(cost <= budget + tolerance for cost, budget in zip(spent, (0.55, 0.75, 0.95), strict=True))
    assert spent == sorted(spent) and spent[-1] > spent[0]


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"patience", "random"}))
@pytest.mark.parametrize("seed", [0, 1])
def test_at_the_cost_of_the_easy_samples_just_those_leave(name, seed):
    """Whatever goes by confidence finds the one policy that is always right at this cost."""
    problem, easy = easy_and_hard(seed=seed)
    options = {"eenet": {"steps": 100}}.get(name, OPTIONS.get(name, {}))
    policy = POLICIES[name].fit(problem, budget=0.6 * 0.5 + 0.4 * 1 + 1e-6, **options)
    chosen = policy.decide(problem.logits)
    assert torch.equal(chosen == 0, easy)
    assert accuracy_of(problem, chosen) == 1
    fresh, easy = easy_and_hard(seed=seed + 10)
    assert (policy.decide(fresh.logits)[~easy] == 1).all()
    assert accuracy_of(fresh, policy.decide(fresh.logits)) == 1


def test_one_exit_at_a_time_it_is_the_same_decision(name, answers):
    policy = fitted(name, answers)
    chosen = decide(policy, answers.logits)
    torch.manual_seed(0)
    assert torch.equal(ExitPolicy.decide(policy, answers.logits), chosen)
    distribution = policy.distribution(answers.logits)
    torch.testing.assert_close(distribution.sum(1), torch.ones(len(chosen)))
    assert (distribution.gather(1, chosen[:, None]) > 0).all()
    permutation = torch.randperm(len(chosen))
    if name != "random":
        assert torch.equal(policy.decide(answers.logits[permutation]), chosen[permutation])


def test_it_is_saved_with_a_model_that_leaves_early_by_it(name, answers, tmp_path):
    model = small_model()
    policy = fitted(name, answers, BUDGETS.get(name, 0.7))
    model.set_policy(policy)
    if name == "gates":
        model.set_lambda(policy.lam)
    model.save_pretrained(tmp_path)
    loaded = JEIDNNForImageClassification.from_pretrained(tmp_path)
    assert type(loaded.policy) is POLICIES[name] and loaded.config.policy == name
    for key, tensor in policy.state_dict().items():
        assert torch.equal(loaded.policy.state_dict()[key], tensor), key
    images = pixels(model, 60, seed=5)
    with torch.no_grad():
        torch.manual_seed(1)
        before = model(images)
        torch.manual_seed(1)
        after = loaded(images)
        torch.manual_seed(1)
        every = loaded(images, output_all_exits=True)
    assert torch.equal(before.exit_index, after.exit_index) and torch.equal(before.logits, after.logits)
    same = (after.exit_index == every.exit_index).float().mean()
    assert same > 0.95 and len(after.exit_index.unique()) > 1
    per_exit = policy.mul_adds(5)
    assert loaded.costs.gates[:-1] == tuple(per_exit * l for l in range(1, len(loaded.costs.gates)))


def test_it_can_be_evaluated(name, answers):
    policy = fitted(name, answers)
    torch.manual_seed(0)
    report = evaluate(answers, policy, policy.lam if name == "gates" else None)
    assert 0 < report.accuracy <= 1 and math.isclose(sum(report.share_by_exit), 1)


@pytest.mark.parametrize("budget", [0.0, 1.5, math.nan])
def test_a_budget_that_cannot_be_kept_is_refused(name, budget, answers):
    with pytest.raises(ValueError, match=r"^Expected a budget in \[0\.\d+, 1\.\d+\], from the first exit to the last"):
        fitted(name, answers, budget)


def test_a_policy_of_another_network_is_refused(name, model, answers):
    two = ExitRecord(
        answers.logits[:, :2], answers.labels, type(answers.costs)(*((1, 2), (0, 0), (0, 0), (0, 0))), answers.split
    )
    policy = fitted(name, two, budget=0.8)
    with pytest.raises(ValueError, match=r"^Expected a policy of \d exits, but got one of 2\.$"):
        model.set_policy(policy)
    with pytest.raises(ValueError, match=r"^Expected a policy of \d exits, but got one of 2\.$"):
        evaluate(answers, policy)


def test_a_model_takes_a_policy_that_it_can_save_and_forgets_what_was_calibrated_for_another(answers):
    model = small_model()
    model.operating_point = operating_point(model)

    class Mine(ExitPolicy):
        pass

    with pytest.raises(ValueError, match=r"^Expected a policy of \('gates', .*, but got Mine\.$"):
        model.set_policy(Mine(model.backbone.num_exits))
    with pytest.raises(ValueError, match=r"^Expected gates fitted to a lambda"):
        model.set_policy(LearnedGates(model.policy.gates, model.backbone.num_exits))
    assert model.operating_point is not None and isinstance(model.policy, LearnedGates)
    model.set_policy(fitted("threshold", answers))
    assert model.operating_point is None
    model.operating_point = operating_point(model)
    assert not model.has_sets() or model.predict_sets(pixels(model, 4)).sets.shape == (4, 5)


@pytest.mark.parametrize("options", [{"measure": "entropie"}, {"mesure": "entropy"}])
def test_options_of_a_policy_are_checked(options):
    with pytest.raises(ValueError, match=r"^Expected (a measure among|policy_options of 'threshold')"):
        small_config = small_model().config.to_dict() | {"policy": "threshold", "policy_options": options}
        JEIDNNForImageClassification(type(small_model().config).from_dict(small_config))


@pytest.mark.parametrize("measure", ["max_probability", "entropy", "margin"])
def test_every_measure_is_kept(measure, answers, tmp_path):
    model = small_model()
    model.set_policy(ConfidenceThreshold.fit(answers, budget=0.7, measure=measure))
    model.save_pretrained(tmp_path)
    assert JEIDNNForImageClassification.from_pretrained(tmp_path).policy.measure == measure


@pytest.mark.parametrize(("gates", "lam"), [("shared", (0.01, 3.0)), ("linear", None)])
def test_learned_gates_find_their_lambda(gates, lam, answers):
    policy = LearnedGates.fit(answers, budget=0.7, gates=gates, lam=lam, steps=300)
    costs = torch.tensor(answers.costs.normalised, dtype=torch.float64)
    assert costs[policy.decide(answers.logits)].mean() <= 0.7
    assert policy.gates.kind == gates and isinstance(policy.gates, nn.Module) and policy.lam > 0


def test_learned_gates_need_something_to_go_by(answers):
    with pytest.raises(ValueError, match=r"^Expected a budget or a lambda, but got neither\.$"):
        LearnedGates.fit(answers)
    with pytest.raises(ValueError, match=r"^Expected a budget of at least 1\.\d+, the cost at lambda 1e-06"):
        LearnedGates.fit(answers, budget=0.5, lam=(1e-7, 1e-6), steps=200)
