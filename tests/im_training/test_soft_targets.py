"""im_training/soft_targets.py: the loss by hand, its draws, its limit, and a resumed training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax

from jeidnn_hf.im_training import Phase
from jeidnn_hf.im_training.soft_targets import SoftTargets, mix
from jeidnn_hf.training_args import JEIDNNTrainingArguments
from resumed_training import whole_and_resumed
from toy_training import batch_of, differing, toy_model, toy_trainer, trained

HARD = {"soft_mixup": 0.0, "soft_teaching": 0.0}


def training_at(step: int, alpha: float = 0.2, seed: int = 0, data_seed: int | None = None) -> SoftTargets:
    args = JEIDNNTrainingArguments("out", soft_mixup=alpha, seed=seed, data_seed=data_seed, report_to="none")
    training = SoftTargets(args, num_exits=4)
    training.step = step
    return training


@pytest.mark.parametrize("boosting", [0.0, 0.5])
@pytest.mark.parametrize("native_head", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"soft_teaching": 0.5, "soft_temperature": 2.0}, {"soft_mixup": 0.4},
     {"soft_mixup": 1.0, "soft_teaching": 0.7, "soft_temperature": 3.0}],
)  # fmt: skip
def test_the_loss_by_hand(options, native_head, boosting, tmp_path):
    """Each row is mixed with the one beside it, at all exits alike, and so are its labels; boosted exits add half of
    the logits before."""
    model = toy_model(native_head=native_head, boosting=boosting)
    features, labels = batch_of(model)
    options = {**HARD, "soft_temperature": 1.0, **options}
    training = toy_trainer(
        model, tmp_path, im_training="soft_targets", warmup_weighting="uniform", **options
    ).im_training
    training.step = 3
    s, g, t = training.share, *(options[f"soft_{name}"] for name in ("teaching", "temperature"))
    assert 0 < s < 1 if options["soft_mixup"] else s == 1
    classes = np.eye(4)[labels.numpy()]
    others = [min(i ^ 1, len(labels) - 1) for i in range(len(labels))]
    target = s * classes + (1 - s) * classes[others]
    logits = []
    for l, z in enumerate(features):
        z = z.double().numpy()
        z = s * z + (1 - s) * z[others]
        if l < 3 or not native_head:
            head = model.heads.modules_by_exit[l]
            z = z @ head.weight.detach().double().numpy().T + head.bias.detach().double().numpy()
        logits.append(z + boosting * logits[-1] if logits else z)
    losses = [-(target * log_softmax(o, axis=-1)).sum(-1).mean() for o in logits]
    trained_exits, early = (3, 1) if native_head else (4, 2)
    late = np.mean([log_softmax(o, axis=-1) for o in logits[early:trained_exits]], axis=0)
    teacher = softmax(late / t, axis=-1)
    for l in range(early):
        kl = (teacher * (np.log(teacher) - log_softmax(logits[l] / t, axis=-1))).sum(-1).mean()
        losses[l] = (1 - g) * losses[l] + g * t**2 * kl
    loss = training.objective(model, features, labels, Phase.WARMUP, None)
    assert float(loss.detach()) == pytest.approx(sum(losses), rel=1e-5)


def test_late_exits_teach_and_are_not_taught(tmp_path):
    """Taught alone, the first exit learns from no label, and nothing that it answers moves the others."""
    model = toy_model()
    features, labels = batch_of(model)
    training = toy_trainer(model, tmp_path, im_training="soft_targets", **{**HARD, "soft_teaching": 1.0}).im_training
    training.step = 0
    gradients = []
    for y, shift in ((labels, 0.0), ((labels + 1) % 4, 0.0), (labels, 1.0)):
        model.heads.zero_grad()
        training.loss(model, [features[0] + shift, *features[1:]], y, Phase.WARMUP, None).backward()
        gradients.append([head.weight.grad.clone() for head in model.heads.modules_by_exit])
    plain, relabelled, shifted = gradients
    assert torch.equal(plain[0], relabelled[0]) and not torch.equal(plain[1], relabelled[1])
    assert not torch.equal(plain[0], shifted[0])
    assert torch.equal(plain[1], shifted[1]) and torch.equal(plain[2], shifted[2])


def test_shares_are_of_a_beta_distribution_and_of_step_and_seed_alone():
    shares = np.array([training_at(step).share for step in range(4000)])
    assert shares.mean() == pytest.approx(0.5, abs=0.02)
    assert shares.var() == pytest.approx(1 / (4 * 1.4), abs=0.01)  # of Beta(a, a): 1 / (4 (2 a + 1))
    assert training_at(7).share == shares[7] == training_at(7, seed=5, data_seed=0).share
    assert training_at(7, seed=5).share != shares[7]


def test_rows_are_mixed_with_the_one_beside():
    z = torch.tensor([[0.0], [1.0], [3.0]])
    torch.testing.assert_close(mix(z, 0.75), torch.tensor([[0.25], [0.75], [3.0]]))


def test_without_any_softness_it_is_plain(tmp_path):
    plain, hard = trained(tmp_path), trained(tmp_path, im_training="soft_targets", **HARD)
    assert plain.keys() == hard.keys()
    for name in plain:
        torch.testing.assert_close(hard[name], plain[name], rtol=1e-4, atol=1e-5, msg=name)
    soft = trained(tmp_path, im_training="soft_targets")
    assert {f"heads.modules_by_exit.{l}.weight" for l in (0, 1, 2)} <= set(differing(plain, soft))


@pytest.mark.parametrize("name", ["plain", "boosted", "imta", "l2w_den"])
def test_no_other_way_to_train_is_softened(name, tmp_path):
    model_options = {"boosting": 0.5} if name == "boosted" else {}
    other = {"soft_mixup": 5.0, "soft_teaching": 1.0}
    ends = [trained(tmp_path, model_options, im_training=name, **options) for options in (HARD, other)]
    assert differing(*ends) == []


@pytest.mark.parametrize("stop_at", [3, 5])
def test_a_resumed_run_is_an_uninterrupted_one(stop_at, tmp_path):
    whole, resumed = whole_and_resumed(tmp_path, stop_at, im_training="soft_targets")
    assert differing(whole, resumed) == []


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("soft_mixup", -0.1, "to be finite and not negative"),
        ("soft_mixup", float("inf"), "to be finite and not negative"),
        ("soft_teaching", float("nan"), r"in \[0, 1\]"),
        ("soft_temperature", 0.0, "to be positive"),
    ],
)
def test_what_is_out_of_range(name, value, message, tmp_path):
    with pytest.raises(ValueError, match=f"^Expected {name} {message}, but got"):
        toy_trainer(toy_model(), tmp_path, im_training="soft_targets", **{name: value})


@pytest.mark.parametrize("method", ["plain", "soft_targets", "jeidnn"])
def test_training_in_bfloat16_comes_near_that_in_float32(method, tmp_path):
    joint = {"gates_on": "validation"} if method != "jeidnn" else {"warmup_epochs": 1, "bi_switch": 2}
    whole, half = (
        trained(tmp_path, {"exit_head": "recurrent"}, im_training=method, bf16=bf16, **joint)
        for bf16 in (False, True)
    )
    assert differing(whole, half) and all(tensor.dtype is torch.float32 for tensor in half.values())
    for name, tensor in whole.items():
        if name.startswith("heads."):
            assert (half[name] - tensor).norm() < 0.02 * tensor.norm() + 1e-6, name
