"""The same on a GPU; skipped where there is none."""

import copy

import pytest
import torch

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, evaluate
from jeidnn_hf.operating_point import OperatingPoint
from jeidnn_hf.policies import LearnedGates
from known_records import noise
from toy_training import exit_state, toy_model, toy_trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def default(**options) -> dict:
    return {"recipe": "default", "standardize_features": False, **options}


@pytest.mark.parametrize(
    ("im_training", "options"),
    [
        *((name, {"recipe": "paper"}) for name in ("plain", "l2w_den", "imta", "jeidnn")),
        ("boosted", {"recipe": "paper", "boosting": 0.5}),
        ("soft_targets", default()),
        ("boosted", default()),
        *((name, default(boosting=0.0)) for name in ("plain", "l2w_den", "imta", "jeidnn", "diffbranch")),
    ],
)  # fmt: skip
def test_a_training_is_that_of_the_cpu(im_training, options, tmp_path):
    states = []
    for use_cpu in (True, False):
        model = toy_model(**options)
        toy_trainer(model, tmp_path / str(use_cpu), im_training=im_training, use_cpu=use_cpu).train()
        assert model.device.type == ("cpu" if use_cpu else "cuda")
        states.append({name: tensor.cpu() for name, tensor in exit_state(model).items()})
    for name, of_cpu in states[0].items():
        torch.testing.assert_close(states[1][name], of_cpu, rtol=1e-3, atol=1e-3, msg=f"{name} differs")


@pytest.mark.parametrize(
    ("im_training", "options"),
    [("jeidnn", {"recipe": "paper"}), ("soft_targets", default(lam=(0.05, 3.0)))],
)
def test_no_step_waits_for_the_device(im_training, options, tmp_path):
    trainer = toy_trainer(toy_model(**options), tmp_path, im_training=im_training, use_cpu=False)
    step, steps = trainer.training_step, []

    def watched(*args, **kwargs):
        steps.append(trainer.state.global_step)
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 1 else "default")  # the first one sets things up
        try:
            return step(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    trainer.training_step = watched
    trainer.train()
    assert len(steps) == 10


@pytest.mark.parametrize("recipe", ["default", "paper"])
@torch.no_grad()
def test_early_exit(recipe):
    torch.manual_seed(0)
    model = JEIDNNForImageClassification(JEIDNNConfig(backbone="resnet20_cifar", num_labels=10, recipe=recipe)).eval()
    pixels = torch.randn(64, 3, 32, 32)
    leaving = model(pixels, output_all_exits=True)
    for l in range(8):  # the gate of each exit opens for about a third of the images
        logits = model.policy.gate_logits(leaving.all_logits, model.config.current_lam)[:, l]
        model.policy.gates.bias[l] -= logits.quantile(0.66)
    there = copy.deepcopy(model).cuda()
    here, early, full = model(pixels), there(pixels.cuda()), there(pixels.cuda(), output_all_exits=True)
    assert len(here.exit_index.unique()) > 4
    assert early.exit_index.equal(full.exit_index)
    assert (early.exit_index.cpu() == here.exit_index).float().mean() > 0.95
    torch.testing.assert_close(early.logits, full.logits, rtol=1e-3, atol=1e-3)
    with torch.autocast("cuda", torch.bfloat16):
        assert there(pixels.cuda()).logits.isfinite().all()


def test_a_policy_on_the_gpu_judges_answers_on_the_cpu():
    record = noise()
    policy = LearnedGates.fit(record, lam=(0.1, 1.0))
    found, points = [], []
    for device in ("cpu", "cuda"):
        policy.to(device)
        points.append(OperatingPoint.fit(policy, record, lam=0.3))
        found.append(evaluate(record, policy, 0.3))
    assert points[1] == points[0]
    assert found[1].share_by_exit == found[0].share_by_exit and found[1].gate_auroc == found[0].gate_auroc
