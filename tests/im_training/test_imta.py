"""im_training/imta.py: distillation by hand, at its limits and in its gradients; rescaled gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from jeidnn_hf.im_training import Phase
from jeidnn_hf.im_training.imta import distillation, rescale_gradient
from toy_training import batch_of, differing, toy_model, toy_trainer, trained


def loss_of(model, folder, labels=None, **options) -> torch.Tensor:
    features, truth = batch_of(model)
    training = toy_trainer(model, folder, im_training="imta", **options).im_training
    return training.loss(model, features, truth if labels is None else labels, Phase.WARMUP, None)


def cross_entropies(logits, labels):
    return [-log_softmax(o, axis=-1)[np.arange(len(o)), labels].mean() for o in logits]


@pytest.mark.parametrize(("gamma", "temperature"), [(0.1, 1.0), (0.7, 3.0)])
def test_the_loss_by_hand(gamma, temperature, tmp_path):
    model = toy_model()
    features, labels = batch_of(model)
    logits = model.heads(features).detach().double().numpy().swapaxes(0, 1)
    ce, teacher = cross_entropies(logits, labels.numpy()), softmax(logits[-1] / temperature, axis=-1)
    expected = ce[-1]
    for l in range(3):
        ratio = np.log(teacher) - log_softmax(logits[l] / temperature, axis=-1)
        kl = (teacher * ratio).sum(-1).mean()  # over classes, then over samples
        expected += (1 - gamma) * ce[l] + gamma * temperature**2 * kl
    options = {"distillation_weight": gamma, "distillation_temperature": temperature}
    assert float(loss_of(model, tmp_path, **options).detach()) == pytest.approx(expected, rel=1e-5)


def test_published_settings_are_the_defaults(tmp_path):
    args = toy_trainer(toy_model(), tmp_path, im_training="imta").args
    assert (args.distillation_weight, args.distillation_temperature) == (0.1, 1.0)


def test_gamma_of_0_is_plain_to_the_bit(tmp_path):
    plain = trained(tmp_path)
    assert differing(plain, trained(tmp_path, im_training="imta", distillation_weight=0.0)) == []
    taught = trained(tmp_path, im_training="imta", distillation_weight=0.5)
    assert {f"heads.modules_by_exit.{l}.weight" for l in (0, 1, 2)} <= set(differing(plain, taught))


def test_with_gamma_of_1_the_labels_are_the_last_exits_alone(tmp_path):
    model = toy_model()
    features, labels = batch_of(model)
    other = (labels + 1) % 4
    losses = [float(loss_of(model, tmp_path, labels=y, distillation_weight=1.0)) for y in (labels, other)]
    last = [cross_entropies([features[-1].numpy()], y.numpy())[0] for y in (labels, other)]
    assert losses[0] - losses[1] == pytest.approx(last[0] - last[1], rel=1e-4)


def test_an_exit_like_its_teacher_has_nothing_to_learn():
    teacher = torch.randn(6, 1, 5, dtype=torch.float64)
    shifted = (teacher.expand(-1, 3, -1) + torch.tensor([0.0, 1.0, -4.0])[:, None]).requires_grad_()
    divergence = distillation(shifted, teacher, temperature=2.0)
    assert divergence.shape == (6, 3)
    torch.testing.assert_close(divergence, torch.zeros_like(divergence), rtol=0, atol=1e-12)
    divergence.sum().backward()
    assert shifted.grad.abs().max() < 1e-12
    assert (distillation(torch.randn(6, 3, 5), teacher.float(), 2.0) > 0).all()


def test_gradients_reach_the_student_only():
    """Of T^2 KL it is T (softmax(student / T) - softmax(teacher / T))."""
    student, teacher = (torch.randn(7, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    distillation(student, teacher, temperature=3.0).sum().backward()
    torch.testing.assert_close(student.grad, 3 * ((student / 3).softmax(-1) - (teacher / 3).softmax(-1)).detach())
    assert teacher.grad is None


def test_a_trained_last_exit_learns_from_the_labels_alone(tmp_path):
    gradients = []
    for gamma in (0.0, 0.8):
        model = toy_model(native_head=False)
        loss_of(model, tmp_path, distillation_weight=gamma).backward()
        gradients.append([head.weight.grad for head in model.heads.modules_by_exit])
    assert torch.equal(gradients[0][3], gradients[1][3]) and gradients[0][3].abs().max() > 0
    assert all(not torch.allclose(gradients[0][l], gradients[1][l]) for l in range(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distillation_weight": -0.1}, r"Expected distillation_weight in \[0, 1\], but got -0\.1\."),
        ({"distillation_weight": 1.5}, r"Expected distillation_weight in \[0, 1\], but got 1\.5\."),
        ({"distillation_weight": float("nan")}, r"Expected distillation_weight in \[0, 1\], but got nan\."),
        ({"distillation_temperature": 0.0}, r"Expected distillation_temperature to be positive, but got 0\.0\."),
    ],
)
def test_mistakes_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=f"^{message}$"):
        toy_trainer(toy_model(), tmp_path, im_training="imta", **options)


def test_a_rescaled_gradient_leaves_the_values():
    x = torch.randn(4, 3, requires_grad=True)
    y = rescale_gradient(x, 0.25)
    assert torch.equal(x, y)
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, 0.5 * x.detach())
    double = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: rescale_gradient(x, 1.0), double)


def test_every_state_gets_the_mean_of_what_the_exits_from_there_on_send():
    exits, sent = 4, torch.tensor([1.0, 10.0, 100.0, 1000.0])
    state = torch.zeros((), requires_grad=True)
    states, loss = [], 0.0
    for i in range(exits):
        state = state * 1.0
        state.retain_grad()
        states.append(state)
        state = rescale_gradient(state, 1 / (exits - i))
        loss = loss + sent[i] * state
        state = rescale_gradient(state, exits - i - 1)
    loss.backward()
    torch.testing.assert_close(torch.stack([s.grad for s in states]), torch.stack([sent[i:].mean() for i in range(4)]))
