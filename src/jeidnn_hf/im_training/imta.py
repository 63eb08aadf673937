"""IMTA (Li, Zhang, Qi, Yang, Huang, "Improved Techniques for Training Adaptive Deep Networks", ICCV 2019): one-for-all
distillation. The last exit, taken as given, teaches the ones before::

    CE_L + sum_{l<L} [(1 - gamma) CE_l + gamma T^2 KL(softmax(o^L / T) || softmax(o^l / T))]

KL is a sum over the classes and a mean over samples; the authors' script takes the mean over both, so that its
distillation is K times weaker. gamma = 0.1 and T = 1 are the script's.

Of the paper's other two techniques, inline collaboration (an exit reads what the one before answered) is a matter of
the model, here in the form of ``config.cascade``. Gradient equilibrium, `rescale_gradient`, balances what the exits
send into a network that they share: with a frozen backbone and independent IMs it would change nothing, and this
training does without; what recurrent IMs send through their state is not rescaled.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..gates import Lambda
from ..objectives import task_cost
from .base import Phase
from .plain import Plain


class IMTA(Plain):
    """``distillation_weight`` is gamma, ``distillation_temperature`` T. All exits count alike as published, with
    ``warmup_weighting="uniform"``. At gamma = 0 this is `Plain`."""

    def loss(self, model, features: Sequence[Tensor], labels: Tensor, phase: Phase, lam: Lambda) -> Tensor:
        logits = model.heads.members(features)
        task, gamma = task_cost(logits, labels), self.args.distillation_weight
        taught = distillation(logits[:, :-1], logits[:, -1:], self.args.distillation_temperature)
        return self.weighted(torch.cat([(1 - gamma) * task[:, :-1] + gamma * taught, task[:, -1:]], dim=1))


def distillation(students: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """``T^2 KL(softmax(teacher / T) || softmax(student / T))`` in nats, ``(..., K)`` to ``(...)``; gradients reach the
    students only. T^2 keeps them of one size at any temperature."""
    given, learned = ((logits / temperature).log_softmax(-1) for logits in (teacher.detach(), students))
    divergence = F.kl_div(learned, given.expand_as(learned), reduction="none", log_target=True).sum(-1)
    return temperature**2 * divergence


def rescale_gradient(x: Tensor, scale: float) -> Tensor:
    """``x``, through which gradients come back multiplied by ``scale``.

    Gradient equilibrium of n exits on a trained network: the state at exit i (from 0) is rescaled by 1/(n - i), read by
    the classifier, rescaled by n - i - 1, and handed on. What arrives at a state is then the mean, not the sum, of what
    the exits from there on send.
    """
    return _RescaleGradient.apply(x, scale)


class _RescaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None
