"""The kernels' exits answer and leave as PyTorch's do."""

import sys

import numpy as np
import pytest
import torch

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, early_exit, fused
from jeidnn_hf.backbones.pooling import pool, pooled_width
from jeidnn_hf.policies import ConfidenceThreshold

kernels = pytest.importorskip("jeidnn_hf.kernels")


def pictures_for(net, count=24) -> torch.Tensor:
    side = net.config.image_size
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(3))


def model(**options) -> JEIDNNForImageClassification:
    """Random exits, with gates that open for about a third of the samples that reach them."""
    torch.manual_seed(0)
    config = {"backbone": "resnet20_cifar", "num_labels": 10, "image_size": 32, **options}
    net = JEIDNNForImageClassification(JEIDNNConfig(**config)).eval()
    with torch.no_grad():
        for module, size in ((net.heads, 0.1), (net.policy, 2.0)):
            for name, tensor in (*module.named_parameters(), *module.named_buffers()):
                noise = torch.rand(tensor.shape)
                tensor.copy_(0.5 + noise if name.endswith(("std", "temperature")) else tensor + size * (noise - 0.5))
        logits = net(pictures_for(net), output_all_exits=True).all_logits
        gates = net.policy.gate_logits(logits, net.config.current_lam)
        net.policy.gates.bias -= gates.quantile(0.66, dim=0)
        if net.config.gate_form == "cumulative":
            net.policy.gates.bias += torch.linspace(-2, 1, net.backbone.num_exits - 1)
    return net


def in_pytorch(net, monkeypatch, *arguments, **options):
    with monkeypatch.context() as patch:
        patch.setattr(early_exit, "LARGEST_BATCH", 0)
        assert isinstance(net.exits(1), early_exit.Exits)
        return net(*arguments, **options)


CASES = {
    "default": {},
    "paper": {"recipe": "paper"},
    "class token": {"backbone": "test_vit", "image_size": 160},
    "other maps": {"backbone": "tf_efficientnet_lite0", "image_size": 96},
    "trained last head": {"native_head": False},
    "no ensemble": {"ensemble": False},
    "linear, ensemble": {"recipe": "paper", "ensemble": True},
    "median": {"gate": "linear", "lam": 0.3, "gate_form": "min", "exit_rule": "median"},
    "cumulative": {"gate_form": "cumulative", "exit_rule": "median", "exit_threshold": 0.6},
    "cumulative, conditional": {"gate_form": "cumulative", "exit_threshold": 0.1, "gate": "linear", "lam": 0.3},
    "one lambda": {"lam": 0.3},
    "two statistics": {"gate_statistics": ["entropy", "margin"]},
    "one statistic": {"recipe": "paper", "gate_statistics": ["power_entropy"]},
    "two classes": {"num_labels": 2},
    "not boosted": {"boosting": 0},
    "boosted by a half": {"boosting": 0.5},
    "not boosted, no ensemble": {"boosting": 0, "ensemble": False},
    "boosted, linear": {"recipe": "paper", "boosting": 0.5},
    "9 of 100 classes": {"num_labels": 100, "exit_stages": [1, 3, 8]},
}


@pytest.mark.parametrize("batch", [24, 3], ids=["PyTorch's product", "whole"])
@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@torch.no_grad()
def test_the_kernels_answer_as_pytorch(options, batch, monkeypatch):
    net = model(**options)
    pictures = pictures_for(net)
    expected = in_pytorch(net, monkeypatch, pictures)
    assert isinstance(net.exits(batch), fused.FusedExits) and len(expected.exit_index.unique()) > 1
    given = [net(part) for part in pictures.split(batch)]
    assert torch.cat([output.exit_index for output in given]).equal(expected.exit_index)
    torch.testing.assert_close(torch.cat([output.logits for output in given]), expected.logits, rtol=1e-4, atol=1e-4)
    net.policy.gates.bias.fill_(-50.0)  # nobody leaves
    shut = torch.cat([net(part).logits for part in pictures.split(batch)])
    torch.testing.assert_close(shut, in_pytorch(net, monkeypatch, pictures).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_lambda_for_each_image_and_exits_that_are_not_active(monkeypatch):
    net = model()
    pictures, lams = pictures_for(net), torch.logspace(-2, 0.4, 24)
    net.policy.gates.slope.mul_(8)  # lambda matters
    for active in (None, [1, 4, 8]):
        net.set_active_exits(active)
        expected, given = in_pytorch(net, monkeypatch, pictures, lam=lams), net(pictures, lam=lams)
        assert given.exit_index.equal(expected.exit_index) and set(given.exit_index.tolist()) <= set(active or range(9))
        torch.testing.assert_close(given.logits, expected.logits, rtol=1e-4, atol=1e-4)
    one_by_one = [net(pictures[i : i + 1], lam=float(lams[i])).exit_index for i in range(24)]
    assert torch.cat(one_by_one).equal(given.exit_index)


@pytest.mark.parametrize("side", [(4, 4), (6, 5), (7, 9)])  # grids that fit, and windows that overlap
def test_pooling_looks_at_the_same_windows(side):
    names, generator = ("cls", "avg4", "max2", "avg1", "max1"), torch.Generator().manual_seed(0)
    maps, tokens = torch.randn(3, 6, *side, generator=generator), torch.randn(3, 6, generator=generator)
    width = pooled_width(names, 6)
    low, high = np.full(width, -0.9, np.float32), np.full(width, 0.8, np.float32)
    plan = np.zeros(len(kernels.PLAN) - 1, np.int64)
    plan[kernels.HIGH] = width
    statistics = [number for name in names for number in (fused._KINDS[name[:3]], fused.grid_size(name))]
    feature = np.empty((3, width), np.float32)
    pixels = maps.permute(0, 2, 3, 1).contiguous().numpy()
    plan = np.array([*plan, *statistics])
    kernels.pool(pixels, tokens.numpy(), np.concatenate([low, high]), plan, np.empty((3, 0), np.float32), feature)
    expected = pool(maps, tokens, names).clamp(-0.9, 0.8)[:, fused._cells_first(names, 6)]
    torch.testing.assert_close(torch.from_numpy(feature), expected)


@pytest.mark.parametrize("answers", [[1e4, -1e4, 0.0], [0.0, 0.0, 0.0], [-200.0, -200.0, -400.0], [3.0, 2.0, 1.0]])
@torch.no_grad()
def test_the_statistics_of_extreme_answers(answers):
    net = model(recipe="paper", num_labels=3)
    exits, answers = net.exits(1), torch.tensor([answers])
    numbers, plan = exits.begin(1, 1.0).numpy(), exits._plans[0]
    numbers[:, plan[kernels.ANSWER_AT] :][:, :3] = answers
    kernels._leaves(exits._weights, plan, numbers[0], np.empty(0, np.float32))
    gate = net.policy.gate_values(answers[:, None].expand(1, 9, 3))[0, 0]
    assert 1 - numbers[0, kernels.REMAINING] == pytest.approx(float(gate), abs=1e-6)


@torch.no_grad()
def test_what_no_kernel_serves_is_left_to_pytorch(monkeypatch):
    net = model()
    pictures = pictures_for(net)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert isinstance(net.exits(1), early_exit.Exits)
    assert isinstance(net.exits(fused.LARGEST_BATCH + 1), early_exit.Exits)
    pooling = {"exit_pooling": ["avg1", "std1"]}
    for options in ({"exit_head": "mlp"}, {"exit_rule": "sample"}, pooling, {"cascade": True}):
        assert isinstance(model(**options).exits(1), early_exit.Exits)
    assert isinstance(model().double().exits(1), early_exit.Exits)
    assert isinstance(net.exits(1), fused.FusedExits)
    net.set_policy(ConfidenceThreshold(torch.ones(9), 0.9))
    assert isinstance(net.exits(1), early_exit.Exits)

    without = model()
    expected = without(pictures)
    without._prepared = None
    monkeypatch.setattr(fused, "find_spec", lambda name: None)
    assert isinstance(without.exits(1), early_exit.Exits)
    assert without(pictures).exit_index.equal(expected.exit_index)


def test_a_numba_that_cannot_be_imported_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "jeidnn_hf.kernels", None)
    monkeypatch.delattr("jeidnn_hf.kernels")
    told = []
    monkeypatch.setattr(fused.logger, "warning_once", told.append)
    with torch.no_grad():
        assert isinstance(model().exits(1), early_exit.Exits)
    assert "numba cannot be used" in told[0]


@torch.no_grad()
def test_pixels_that_are_no_numbers_are_refused():
    net = model()
    pictures = pictures_for(net)
    pictures[3, 0, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        net(pictures)
    with pytest.raises(ValueError, match="NaN"):
        net(pictures[3:4])
