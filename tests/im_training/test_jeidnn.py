"""im_training/jeidnn.py: lambda drawn per sample for a range of lambdas."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from jeidnn_hf.im_training.jeidnn import draw_lambda, scaled_cost
from jeidnn_hf.objectives import cancelling_cost, expected_cost, total_cost


def config(lam, current: float = 0.5) -> SimpleNamespace:
    return SimpleNamespace(lam=lam, current_lam=current, has_lam_range=isinstance(lam, list))


def test_lambda_is_drawn_uniformly_in_its_logarithm():
    torch.manual_seed(0)
    draws = draw_lambda(config([0.01, 10.0]), torch.zeros(4000))
    assert draws.shape == (4000,) and 0.01 <= draws.min() and draws.max() <= 10
    shares = torch.histc(draws.log(), bins=6, min=math.log(0.01), max=math.log(10)) / 4000
    assert (shares - 1 / 6).abs().max() < 0.03
    assert draw_lambda(config(0.5), torch.zeros(3)) == 0.5


def test_the_cost_of_each_sample_is_at_its_own_lambda():
    task, costs = torch.rand(5, 3), torch.tensor([0.2, 0.6, 1.0])
    lam = torch.tensor([0.1, 0.5, 1.0, 2.0, 8.0])
    ranged = scaled_cost(task, costs, lam, config([0.1, 8.0]))
    for i, value in enumerate(lam.tolist()):
        torch.testing.assert_close(ranged[i], (task[i] + value * costs) / (1 + value))
    torch.testing.assert_close(scaled_cost(task, costs, 0.5, config(0.5)), total_cost(task, costs, 0.5))


def test_cancelling_weights_are_none():
    random = torch.Generator().manual_seed(0)
    task = torch.rand(6, 4, generator=random, dtype=torch.float64).requires_grad_()
    distribution = torch.rand(6, 4, generator=random, dtype=torch.float64).softmax(-1)
    loss, plain = cancelling_cost(task, distribution), task[:, :-1].mean()
    torch.testing.assert_close(loss, plain)
    found, expected = (torch.autograd.grad(value, task)[0] for value in (loss, plain))
    torch.testing.assert_close(found, expected)
    weighted = torch.autograd.grad(expected_cost(task, distribution), task)[0]
    assert (weighted[:, :-1] - expected[:, :-1]).abs().max() > 0.01
