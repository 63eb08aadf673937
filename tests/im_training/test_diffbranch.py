"""im_training/diffbranch.py: the mixture in log space, its two forms, its gradient, and training by it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from jeidnn_hf.exits import exit_decision, exit_distribution, exit_log_distribution, exit_probability
from jeidnn_hf.gates import LinearGates, SharedGates
from jeidnn_hf.im_training import Phase
from jeidnn_hf.im_training.diffbranch import DiffBranch
from jeidnn_hf.im_training.jeidnn import draw_lambda
from jeidnn_hf.im_training.plain import Plain
from jeidnn_hf.objectives import expected_cost, mixture_cost, task_cost, total_cost
from jeidnn_hf.policies import LearnedGates
from resumed_training import whole_and_resumed
from toy_training import batch_of, differing, exit_state, toy_model, toy_trainer

COSTS = torch.tensor([0.25, 0.5, 1.0], dtype=torch.float64)


def method(mixture: str = "probabilities") -> DiffBranch:
    return DiffBranch(SimpleNamespace(mixture=mixture, warmup_weighting="uniform"), 3)


def model_of(gates: torch.nn.Module, lam: float | list[float] = 0.7) -> SimpleNamespace:
    """One whose exits answer with their features."""
    config = SimpleNamespace(lam=lam, current_lam=0.7, has_lam_range=isinstance(lam, list))
    heads = SimpleNamespace(members=lambda features: torch.stack(list(features), dim=1))
    return SimpleNamespace(
        config=config, heads=heads, policy=LearnedGates(gates, 3, form="stick"), normalised_costs=COSTS
    )


def batch(scale: float = 1.0) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    return [scale * torch.randn(6, 4, dtype=torch.float64) for _ in range(3)], torch.tensor([0, 1, 2, 3, 0, 1])


def test_the_log_distribution_is_that_of_stick_breaking_gates():
    gate_logits = 4 * torch.randn(50, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = exit_log_distribution(gate_logits)
    torch.testing.assert_close(found.exp(), exit_distribution(gate_logits.sigmoid(), "stick"))
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(50, dtype=torch.float64))


def test_by_hand():
    """Gates of 1/2 and 1/4: 1/2, 1/8 and 3/8 of the mass."""
    log_distribution = exit_log_distribution(torch.tensor([[0.0, -torch.tensor(3.0).log()]]))
    torch.testing.assert_close(log_distribution.exp(), torch.tensor([[0.5, 0.125, 0.375]]))
    found = mixture_cost(-torch.tensor([[0.8, 0.4, 0.2]]).log(), log_distribution)
    torch.testing.assert_close(found, -torch.tensor([0.4 + 0.05 + 0.075]).log())


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30, float("inf")])
def test_saturated_gates_are_the_hard_rule(size):
    signs = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)])
    gate_logits = size * signs
    distribution = exit_log_distribution(gate_logits).exp()
    hard = exit_decision(exit_probability(gate_logits.sigmoid(), "stick"))
    torch.testing.assert_close(distribution, torch.nn.functional.one_hot(hard, 4).float())


@pytest.mark.parametrize("size", [1e2, 1e4])
def test_the_loss_and_its_gradient_are_finite_where_the_direct_formula_is_not(size):
    """The only exits that the gates leave open give the label a probability that underflows."""
    gate_logits = (size * torch.tensor([[1.0, 1.0], [-1.0, 1.0], [-1.0, -1.0]])).requires_grad_()
    logits = size * torch.eye(4)[torch.tensor([[1, 2, 3]] * 3)]
    labels = torch.zeros(3, dtype=torch.long)
    logits.requires_grad_()
    loss = mixture_cost(task_cost(logits, labels), exit_log_distribution(gate_logits)).mean()
    gradients = torch.autograd.grad(loss, [gate_logits, logits])
    torch.testing.assert_close(loss.detach(), torch.tensor(size), rtol=0.02, atol=0)
    assert all(g.isfinite().all() for g in gradients) and gradients[1].abs().max() > 0.01
    direct = (logits.softmax(-1)[..., 0] * exit_distribution(gate_logits.sigmoid(), "stick")).sum(-1)
    assert (direct.log() == -torch.inf).any() == (size > 100)


def test_the_loss_is_the_direct_formula():
    features, labels = batch()
    model = model_of(LinearGates(2).double())
    logits = model.heads.members(features)
    pi = model.policy.distribution(logits)
    answers = logits.softmax(-1)[torch.arange(6), :, labels]
    price = (pi * COSTS).sum(1)
    expected = (-(pi * answers).sum(1).log() + 0.7 * price).mean()
    torch.testing.assert_close(method().loss(model, features, labels, Phase.JOINT, 0.7), expected)
    cost = expected_cost(total_cost(-answers.log(), COSTS, 0.7), pi)
    torch.testing.assert_close(method("losses").loss(model, features, labels, Phase.JOINT, 0.7), cost)
    assert expected < cost  # Jensen


def test_warm_up_is_plain():
    features, labels = batch()
    model = model_of(LinearGates(2).double())
    found = method().loss(model, features, labels, Phase.WARMUP, None)
    assert torch.equal(found, Plain(method().args, 3).loss(model, features, labels, Phase.WARMUP, None))


def test_of_a_range_every_sample_has_its_own_lambda():
    features, labels = batch()
    model = model_of(SharedGates(2, 4, (0.1, 10.0)).double(), [0.1, 10.0])
    torch.manual_seed(3)
    found = method().loss(model, features, labels, Phase.JOINT, draw_lambda(model.config, labels))
    torch.manual_seed(3)
    lam = 0.1 * 100 ** torch.rand(6)
    logits = model.heads.members(features)
    pi = model.policy.distribution(logits, lam)
    mixed = -(pi * logits.softmax(-1)[torch.arange(6), :, labels]).sum(1).log()
    torch.testing.assert_close(found, ((mixed + lam * (pi * COSTS).sum(1)) / (1 + lam)).mean(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("mixture", ["probabilities", "losses"])
def test_gradients_reach_answers_and_gates(mixture):
    features, labels = batch()
    torch.manual_seed(1)
    model = model_of(LinearGates(2).double())
    inputs = [*(z.requires_grad_() for z in features), *model.policy.gates.parameters()]
    assert torch.autograd.gradcheck(
        lambda *_: method(mixture).loss(model, features, labels, Phase.JOINT, 0.7), inputs, atol=1e-7
    )
    gradients = torch.autograd.grad(method(mixture).loss(model, features, labels, Phase.JOINT, 0.7), inputs)
    assert all(g.abs().max() > 1e-4 for g in gradients)


STICK = {"gate_form": "stick"}
JOINTLY = {"im_training": "diffbranch", "gates_on": "train", "warmup_epochs": 1}


def test_steps_after_the_warm_up_move_exits_and_gates_and_lower_the_loss(tmp_path):
    model = toy_model(**STICK)
    run = toy_trainer(model, tmp_path, **JOINTLY, logging_steps=1, num_train_epochs=4)
    features, labels = batch_of(model, 160)

    def loss() -> float:
        return float(run.im_training.loss(model, features, labels, Phase.JOINT, 0.5).detach())

    before, first = exit_state(model), loss()
    run.train()
    phases = [log["phase"] for log in run.state.log_history if "loss" in log]
    assert phases == [Phase.WARMUP] * 5 + [Phase.JOINT] * 15
    after = exit_state(model)
    assert sorted(differing(before, after)) == sorted(after)
    assert loss() < 0.7 * first


def test_a_resumed_run_is_bit_identical(tmp_path):
    assert differing(*whole_and_resumed(tmp_path, 7, STICK, **JOINTLY)) == []


def test_wrong_options(tmp_path):
    with pytest.raises(ValueError, match="^Expected gate_form='stick' for im_training='diffbranch', but got 'min'"):
        toy_trainer(toy_model(), tmp_path, **JOINTLY)
    with pytest.raises(ValueError, match="^Expected mixture to be one of .*, but got 'logits'"):
        toy_trainer(toy_model(**STICK), tmp_path, **JOINTLY, mixture="logits")
