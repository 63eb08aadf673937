"""im_training/mixup.py: the mixed loss by hand, its draws, its limit, and a resumed training."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.special import log_softmax

from jeidnn_hf.im_training import Phase
from jeidnn_hf.im_training.mixup import Mixup, mix
from resumed_training import whole_and_resumed
from toy_training import batch_of, differing, toy_model, toy_trainer, trained


def training_at(step: int, alpha: float = 0.2, seed: int = 0, data_seed: int | None = None) -> Mixup:
    training = Mixup(SimpleNamespace(mixup_alpha=alpha, seed=seed, data_seed=data_seed), num_exits=4)
    training.step = step
    return training


def test_the_loss_by_hand(tmp_path):
    """Each row is mixed with the row before it, at all exits alike, and so are its labels."""
    model = toy_model()
    features, labels = batch_of(model)
    training = toy_trainer(model, tmp_path, im_training="mixup", warmup_weighting="uniform").im_training
    training.step = 3
    s = training.share
    assert 0 < s < 1
    classes = np.eye(4)[labels.numpy()]
    mixed_classes = s * classes + (1 - s) * classes[np.arange(-1, len(classes) - 1)]
    expected = 0.0
    for l, z in enumerate(features):
        z = z.double().numpy()
        logits = s * z + (1 - s) * np.roll(z, 1, axis=0)
        if l < 3:
            head = model.heads.modules_by_exit[l]
            logits = logits @ head.weight.detach().double().numpy().T + head.bias.detach().double().numpy()
        expected -= (mixed_classes * log_softmax(logits, axis=-1)).sum(-1).mean()
    loss = training.objective(model, features, labels, Phase.WARMUP, None)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-5)


def test_shares_are_of_a_beta_distribution_and_of_step_and_seed_alone():
    shares = np.array([training_at(step).share for step in range(4000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * 1.4), abs=0.01)  # of Beta(a, a): 1 / (4 (2 a + 1))
    assert training_at(7).share == shares[7] == training_at(7, seed=5, data_seed=0).share
    assert training_at(7, seed=5).share != shares[7]


def test_rows_are_mixed_with_the_one_before():
    z = torch.tensor([[0.0], [1.0], [3.0]])
    torch.testing.assert_close(mix(z, 0.75), torch.tensor([[0.75], [0.75], [2.5]]))


def test_alpha_of_0_is_plain_to_the_bit(tmp_path):
    plain = trained(tmp_path)
    assert differing(plain, trained(tmp_path, im_training="mixup", mixup_alpha=0.0)) == []
    mixed = trained(tmp_path, im_training="mixup", mixup_alpha=0.2)
    assert {f"heads.modules_by_exit.{l}.weight" for l in (0, 1, 2)} <= set(differing(plain, mixed))


@pytest.mark.parametrize("name", ["plain", "boosted", "imta", "l2w_den"])
def test_no_other_way_to_train_is_mixed(name, tmp_path):
    model_options = {"boosting": 0.5} if name == "boosted" else {}
    ends = [trained(tmp_path, model_options, im_training=name, mixup_alpha=alpha) for alpha in (0.0, 5.0)]
    assert differing(*ends) == []


@pytest.mark.parametrize("stop_at", [3, 5])
def test_a_resumed_run_is_an_uninterrupted_one(stop_at, tmp_path):
    whole, resumed = whole_and_resumed(tmp_path, stop_at, im_training="mixup")
    assert differing(whole, resumed) == []


@pytest.mark.parametrize("alpha", [-0.1, float("inf"), float("nan")])
def test_an_alpha_that_is_none(alpha, tmp_path):
    with pytest.raises(ValueError, match="^Expected mixup_alpha to be finite and not negative, but got"):
        toy_trainer(toy_model(), tmp_path, im_training="mixup", mixup_alpha=alpha)
