"""JEIDNNForImageClassification: the loop that really exits early; checkpoints that load as trained or not at all."""

from __future__ import annotations

import copy
import json
import logging
import math
import shutil
from functools import lru_cache
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, JEIDNNOutput
from jeidnn_hf.backbones import StagedBackbone, build_model, fingerprint
from jeidnn_hf.backbones.loading import WEIGHTS_DIR_VARIABLE
from jeidnn_hf.backbones.staged import register_family
from jeidnn_hf.backbones.t2t_vit import T2TViT
from jeidnn_hf.exits import exit_distribution, exit_probability
from jeidnn_hf.heads import LinearHead


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path_factory):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path_factory.getbasetemp() / "hub"))
    monkeypatch.delenv(WEIGHTS_DIR_VARIABLE, raising=False)


# Models whose gates let some images out at every exit


CASES = {
    "vit_paper": {},
    "t2t_paper": {"backbone": "t2t_vit_7"},
    "cifar_median": {
        "backbone": "resnet20_cifar",
        "exit_stages": [1, 4, 6, 8],
        "native_head": False,
        "exit_pooling": "rich",
        "gate_form": "cumulative",
        "exit_rule": "median",
    },
    "cifar_range": {
        "backbone": "resnet20_cifar",
        "exit_stages": [0, 2, 4, 6, 8],
        "exit_head": "mlp",
        "head_dim": 16,
        "standardize_features": True,
        "gate": "shared",
        "gate_form": "stick",
        "lam": [0.1, 10.0],
    },
    "vit_sample": {"exit_rule": "sample", "gate_form": "stick", "exit_stages": [0, 2, 3, 5]},
    "vit_ensemble": {"ensemble": True},
    "vit_default": {"recipe": "default"},
    "vit_boosted": {"boosting": 0.5},
    "vit_default_unboosted": {"recipe": "default", "boosting": 0},
    "vit_cascade": {"cascade": True, "ensemble": True},
}
every_case = pytest.mark.parametrize("case", list(CASES))
every_early_exit = pytest.mark.parametrize(
    "case",
    [case for case in CASES if case != "vit_sample"],
)


def pictures(batch: int = 96, seed: int = 1, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def make(backbone: str = "test_vit", **options) -> JEIDNNForImageClassification:
    options = {"backbone": backbone, "num_labels": 10, "image_size": 32, "recipe": "paper"} | options
    torch.manual_seed(0)
    return JEIDNNForImageClassification(JEIDNNConfig(**options)).eval()


@torch.no_grad()
def let_some_out_at_every_exit(model: JEIDNNForImageClassification) -> JEIDNNForImageClassification:
    """Random exits with unlike answers, and gate biases such that about a third of those who come leave."""
    torch.manual_seed(5)
    heads, gates, features = model.heads, model.policy.gates, model.backbone(pictures())
    trained = features[: len(heads.modules_by_exit)]
    if heads.norms is not None:
        heads.set_feature_statistics([z.mean(0) for z in trained], [z.std(0) for z in trained])
    for head, z in zip(heads.modules_by_exit, trained, strict=True):
        if isinstance(head, LinearHead):
            head.weight.normal_().div_(z.std() * z.shape[1] ** 0.5)
            head.bias.copy_(-head.weight[:, : z.shape[1]] @ z.mean(0))
    if heads.ensemble is not None:
        heads.ensemble.weight.add_(torch.randn(heads.ensemble.weight.shape), alpha=0.3)
        heads.ensemble.bias.normal_(0, 0.3)
    for parameter in gates.parameters():
        parameter.normal_(0, 2 / parameter.shape[-1] ** 0.5)
    logits = heads(features)
    for l in range(heads.num_exits - 1):
        low, high = -64.0, 64.0
        for _ in range(40):
            gates.bias[l] = (low + high) / 2
            torch.manual_seed(0)
            exits = model.policy.decide(logits, model.config.current_lam)
            left, came = int((exits == l).sum()), int((exits >= l).sum())
            if 0.2 * came <= left <= 0.45 * came:
                break
            low, high = (gates.bias[l].item(), high) if left < 0.3 * came else (low, gates.bias[l].item())
        else:
            raise AssertionError(f"no bias found for gate {l}")
    return model


@lru_cache
def zoo(case: str) -> JEIDNNForImageClassification:
    """Shared: leave it as it is."""
    return let_some_out_at_every_exit(make(**CASES[case]))


@torch.no_grad()
def answers(model: JEIDNNForImageClassification, x: Tensor | None = None, **options) -> JEIDNNOutput:
    return model(pictures() if x is None else x, **options)


def is_sure(model: JEIDNNForImageClassification, gate_values: Tensor) -> Tensor:
    """Images whose exit does not hang on rounding."""
    form, policy = model.config.gate_form, model.policy
    passed = exit_distribution(gate_values, form).cumsum(-1)
    probability = exit_probability(gate_values, form) if policy.rule == "conditional" else passed
    return ((probability[:, :-1] - policy.threshold).abs() > 1e-5).all(1)


# Early exit


@every_early_exit
def test_stopping_early_answers_as_if_every_exit_had_been_evaluated(case):
    model = zoo(case)
    early, full = answers(model), answers(model, output_all_exits=True)
    assert (early.exit_index.bincount(minlength=model.backbone.num_exits) > 0).all()
    sure = is_sure(model, full.gate_values)
    assert sure.float().mean() > 0.9
    assert torch.equal(early.exit_index[sure], full.exit_index[sure])
    torch.testing.assert_close(early.logits[sure], full.logits[sure], atol=1e-5, rtol=1e-5)
    assert torch.equal(early.mul_adds[sure], full.mul_adds[sure])
    assert early.all_logits is early.gate_values is early.exit_distribution is early.loss is None


@every_case
def test_every_exit_evaluated(case):
    model = zoo(case)
    full, rows = answers(model, output_all_exits=True), torch.arange(96)
    exits = model.backbone.num_exits
    assert full.loss is None and full.all_logits.shape == (96, exits, 10)
    assert full.gate_values.shape == (96, exits - 1) and full.exit_distribution.shape == (96, exits)
    assert torch.equal(full.logits, full.all_logits[rows, full.exit_index])
    torch.testing.assert_close(full.exit_distribution.sum(1), torch.ones(96))
    assert full.logits.std(0).min() > 1e-3  # the images differ
    if model.config.native_head and model.heads.ensemble is None and not model.config.boosting:
        torch.testing.assert_close(full.all_logits[:, -1], model.backbone.model(pictures()), atol=1e-5, rtol=1e-5)


def test_the_decision_is_equations_3_to_8():
    """Gate by gate in plain numbers: P(G=l) = min(g, rest), P(E^l) = P(G=l) / rest, leave at the first above 1/2."""
    model = zoo("vit_paper")
    full = answers(model, output_all_exits=True)
    weight, bias = model.policy.gates.weight, model.policy.gates.bias
    for i in range(96):
        rest, taken = 1.0, 5
        for l in range(5):
            p = full.all_logits[i, l].double().softmax(0)
            q = p**2 / (p**2).sum()
            top = p.topk(2).values
            m = torch.stack([top[0], -(p * p.log()).sum(), -(q * q.log()).sum(), top[0] - top[1]])
            g = (weight[l].double() @ m + bias[l]).sigmoid().item()
            assert g == pytest.approx(full.gate_values[i, l].item(), abs=1e-5)
            mass = min(g, rest)
            assert mass == pytest.approx(full.exit_distribution[i, l].item(), abs=1e-5)
            if taken == 5 and mass / rest > 0.5:
                taken = l
            rest -= mass
        assert taken == full.exit_index[i]


@pytest.mark.parametrize("case", ["vit_paper", "cifar_median", "t2t_paper"])
def test_stages_see_only_the_surviving_rows(case, monkeypatch):
    model = zoo(case)
    stage, seen = model.backbone.stage, []

    def counting(l, state):
        seen.append((l, len(state)))
        return stage(l, state)

    monkeypatch.setattr(model.backbone, "stage", counting, raising=False)
    exit_index = answers(model).exit_index
    assert seen == [(l, int((exit_index >= l).sum())) for l in range(model.backbone.num_exits)]
    seen.clear()
    first = exit_index == 0
    assert answers(model, pictures()[first]).exit_index.tolist() == [0] * int(first.sum())
    assert seen == [(0, int(first.sum()))]  # and then the network stops
    seen.clear()
    answers(model, output_all_exits=True)
    assert seen == [(l, 96) for l in range(model.backbone.num_exits)]


@pytest.mark.parametrize("case", ["vit_paper", "cifar_range"])
def test_answers_come_in_the_order_of_the_images(case):
    model, order = zoo(case), torch.randperm(96, generator=torch.Generator().manual_seed(3))
    given, shuffled = answers(model), answers(model, pictures()[order])
    assert torch.equal(shuffled.exit_index, given.exit_index[order])
    torch.testing.assert_close(shuffled.logits, given.logits[order], atol=1e-5, rtol=1e-5)
    assert torch.equal(shuffled.mul_adds, given.mul_adds[order])
    for i in range(0, 96, 16):
        alone = answers(model, pictures()[i : i + 1])
        assert alone.exit_index == given.exit_index[i]
        torch.testing.assert_close(alone.logits[0], given.logits[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", ["vit_paper", "cifar_range"])
def test_each_image_costs_what_the_table_says_of_its_exit(case):
    model, given = zoo(case), answers(zoo(case))
    total = model.costs.total
    assert given.mul_adds.tolist() == [total[l] for l in given.exit_index]
    assert given.mul_adds.dtype == torch.int64 and model.config.mul_adds == model.costs.to_dict()
    expected = torch.tensor(total).double() / model.costs.backbone[-1]
    torch.testing.assert_close(model.normalised_costs.double(), expected, atol=1e-6, rtol=0)


def test_sampled_exits_follow_the_distribution_and_use_one_draw_per_image():
    model = zoo("vit_sample")
    torch.manual_seed(0)
    early = answers(model)
    torch.manual_seed(0)
    full = answers(model, output_all_exits=True)
    assert torch.equal(early.exit_index, full.exit_index)
    x = pictures(4).repeat(500, 1, 1, 1)
    drawn = answers(model, x, output_all_exits=True)
    for i in range(4):
        share = drawn.exit_index[i::4].bincount(minlength=4) / 500
        expected = drawn.exit_distribution[i]
        assert ((share - expected).abs() < 4.5 * (expected * (1 - expected) / 500).sqrt() + 1e-6).all()


@pytest.mark.parametrize("case", ["vit_paper", "cifar_median", "vit_default"])
def test_features_from_a_cache_answer_as_their_pixels(case):
    model = zoo(case)
    with torch.no_grad():
        features = model.backbone(pictures())
    pixels = answers(model, output_all_exits=True)
    for cached in (features, list(features), torch.cat(features, dim=1)):
        assert_same(model(exit_features=cached), pixels)
    labels = torch.arange(96) % 10
    assert_same(model(exit_features=features, labels=labels), answers(model, labels=labels))


def assert_same(a: JEIDNNOutput, b: JEIDNNOutput) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=1e-6, rtol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_one_exit_is_the_backbone():
    model = make(exit_stages=[5])
    early, full = answers(model), answers(model, output_all_exits=True)
    assert set(early.exit_index.tolist()) == set(full.exit_index.tolist()) == {0}
    torch.testing.assert_close(early.logits, model.backbone.model(pictures()))
    assert torch.equal(full.exit_distribution, torch.ones(96, 1)) and full.gate_values.shape == (96, 0)


def test_an_empty_batch():
    model = zoo("cifar_median")
    for output in (answers(model, pictures()[:0]), answers(model, pictures()[:0], output_all_exits=True)):
        assert output.logits.shape == (0, 10) and output.exit_index.shape == output.mul_adds.shape == (0,)


@pytest.mark.parametrize("options", [{}, {"output_all_exits": True}, {"labels": torch.arange(96) % 10}])
def test_a_plain_tuple_on_request(options):
    model = zoo("vit_paper")
    expected = answers(model, **options)
    given = answers(model, return_dict=False, **options)
    assert type(given) is tuple and len(given) == len(expected.keys())
    assert all(torch.equal(a, b) for a, b in zip(given, expected.values(), strict=True))
    other = copy.deepcopy(model)
    other.config.return_dict = False
    assert type(answers(other, **options)) is tuple
    assert isinstance(answers(other, return_dict=True, **options), JEIDNNOutput)


# Loss


@pytest.mark.parametrize("case", ["vit_paper", "cifar_range", "vit_default"])
def test_loss_is_the_expected_cost_of_equation_6(case):
    model, labels = zoo(case), torch.arange(96) % 10
    output = answers(model, labels=labels)
    total, lam = model.costs.total, model.config.current_lam
    expected = 0.0
    for i in range(96):
        for l, cost in enumerate(total):
            cross_entropy = -output.all_logits[i, l].double().log_softmax(0)[labels[i]].item()
            own = cross_entropy + lam * cost / model.costs.backbone[-1]
            expected += output.exit_distribution[i, l].item() * own / 96
    assert output.loss.item() == pytest.approx(expected, rel=1e-5)
    assert torch.equal(output.logits, answers(model, output_all_exits=True).logits)


def test_loss_takes_the_lambda_of_each_image():
    model, labels, lam = zoo("cifar_range"), torch.arange(96) % 10, torch.linspace(0.1, 10, 12).repeat_interleave(8)
    together = answers(model, labels=labels, lam=lam).loss
    rows = torch.arange(96).split(8)
    alone = [answers(model, pictures()[i], labels=labels[i], lam=lam[i[0]].item()).loss for i in rows]
    torch.testing.assert_close(together, torch.stack(alone).mean(), atol=1e-5, rtol=1e-5)


def test_gradients_reach_the_exits_and_not_the_backbone():
    model = copy.deepcopy(zoo("vit_paper")).train()
    model(pictures(), labels=torch.arange(96) % 10).loss.backward()
    exits = [*model.heads.parameters(), *model.policy.parameters()]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in exits)
    assert all(p.grad is None for p in model.backbone.parameters())
    assert {id(p) for p in exits} == {id(p) for p in model.parameters() if p.requires_grad}


def test_an_objective_of_the_trainer_is_computed_inside_forward():
    model, labels = zoo("vit_paper"), torch.arange(96) % 10
    asked = []

    def objective(*arguments):
        asked.append(arguments)
        return torch.tensor(3.0)

    assert model(pictures(), labels=labels, objective=objective) == 3
    [(net, features, given)] = asked
    assert net is model and given is labels and len(features) == 6
    torch.testing.assert_close(features[0], model.backbone(pictures())[0])


# Lambda


def test_lambda_of_a_range_by_call_by_image_and_for_good():
    model = copy.deepcopy(zoo("cifar_range"))
    assert model.config.current_lam == pytest.approx(1.0)
    cheap, dear = answers(model, lam=0.1), answers(model, lam=10)
    assert not torch.equal(cheap.exit_index, dear.exit_index)
    assert torch.equal(answers(model).exit_index, answers(model, lam=1.0).exit_index)
    mixed = torch.where(torch.arange(96) % 2 == 0, 0.1, 10.0)
    for options in ({}, {"output_all_exits": True}):
        given = answers(model, lam=mixed, **options)
        expected = torch.where(mixed < 1, cheap.exit_index, dear.exit_index)
        assert torch.equal(given.exit_index, expected)
    for scalar in (torch.tensor(10.0), torch.tensor([10.0]), torch.tensor(10)):
        assert torch.equal(answers(model, lam=scalar).exit_index, dear.exit_index)
    model.set_lambda(10)
    assert model.config.current_lam == 10.0 and torch.equal(answers(model).exit_index, dear.exit_index)


@pytest.mark.parametrize("lam", [0.05, 10.5, -1, math.nan, math.inf, "1", True, [0.1, 1.0]])
def test_lambda_outside_the_trained_range(lam):
    model = copy.deepcopy(zoo("cifar_range"))
    for call in (lambda: model.set_lambda(lam), lambda: answers(model, pictures(2), lam=lam)):
        with pytest.raises(ValueError, match=r"^Expected [^\n]*lambda[^\n]*, but got [^\n]*\.$"):
            call()
    assert model.config.current_lam == pytest.approx(1.0)
    if isinstance(lam, int | float):
        with pytest.raises(ValueError, match=r"^Expected [^\n]*lambda[^\n]*, but got [^\n]*\.$"):
            answers(model, pictures(2), lam=torch.tensor([1.0, -1.0 if lam is True else lam]))


@pytest.mark.parametrize("shape", [(3,), (2, 1), (1, 1), (2, 2)])
def test_lambda_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"^Expected lam to be a number or of shape \(2,\), but got \([\d, ]+\)\.$"):
        answers(zoo("cifar_range"), pictures(2), lam=torch.ones(shape))


def test_one_trained_lambda_serves_no_other():
    model = zoo("vit_paper")
    assert torch.equal(answers(model, lam=1).logits, answers(model).logits)
    with pytest.raises(ValueError, match=r"^Expected a lambda of 1, the only one trained, but got 2\.$"):
        model.set_lambda(2)
    for lam in (2, 2.0, torch.tensor(2), torch.full((96,), 2.0)):
        with pytest.raises(ValueError, match=r"^Expected a lambda of 1, the only one trained, but got 2\.$"):
            answers(model, lam=lam)


# Inputs


@pytest.mark.parametrize("inputs", [{}, {"pixel_values": pictures(2), "exit_features": torch.zeros(2, 330)}])
def test_pixels_or_features_but_not_both(inputs):
    with pytest.raises(ValueError, match=r"^Expected either pixel_values or exit_features, but got both or neither\.$"):
        zoo("vit_paper")(**inputs)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 10]), r"^Expected labels in 0\.\.9, but got 10\.$"),
        (torch.tensor([-1, 3]), r"^Expected labels in 0\.\.9, but got -1\.$"),
        (torch.tensor([-100, 3]), r"^Expected labels in 0\.\.9, but got -100\.$"),
        (torch.tensor([1.0, 2.0]), r"^Expected integer labels of shape \(2,\), but got torch\.float32 \(2,\)\.$"),
        (torch.tensor([1]), r"^Expected integer labels of shape \(2,\), but got torch\.int64 \(1,\)\.$"),
        (torch.tensor([[1], [2]]), r"^Expected integer labels of shape \(2,\), but got torch\.int64 \(2, 1\)\.$"),
        (torch.eye(10)[:2], r"^Expected integer labels of shape \(2,\), but got torch\.float32 \(2, 10\)\.$"),
    ],
)
def test_labels_that_cannot_be(labels, message):
    with pytest.raises(ValueError, match=message):
        zoo("vit_paper")(pictures(2), labels=labels)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.bool])
def test_labels_of_any_integer_type(dtype):
    labels = torch.tensor([0, 1])
    loss = zoo("vit_paper")(pictures(2), labels=labels.to(dtype)).loss
    assert torch.equal(loss, zoo("vit_paper")(pictures(2), labels=labels).loss)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_refused(value):
    model, x = zoo("vit_paper"), pictures(3)
    features = [z.clone() for z in model.backbone(x)]
    x[1, 2, 3, 4] = features[3][2, 1] = value
    message = r"^Expected {} without NaN or infinity, but got some; check the preprocessing or the data\.$"
    for options in ({}, {"output_all_exits": True}, {"labels": torch.tensor([1, 2, 3])}):
        with pytest.raises(ValueError, match=message.format("pixel_values")):
            model(x, **options)
        with pytest.raises(ValueError, match=message.format("exit_features")):
            model(exit_features=features, **options)


@pytest.mark.parametrize("shape", [(2, 3, 48, 48), (2, 3, 32, 16), (2, 1, 32, 32), (3, 32, 32)])
@pytest.mark.parametrize("options", [{}, {"output_all_exits": True}])
def test_images_of_another_size_or_channels(shape, options):
    message = r"^Expected pixel_values of shape \(batch, 3, 32, 32\), but got \([\d, ]+\); resize with [^\n]*\.$"
    with pytest.raises(ValueError, match=message):
        zoo("vit_paper")(torch.zeros(shape), **options)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (lambda f: f[:-1], r"^Expected exit_features of shapes \[\(3, 64\), .*\(3, 10\)\], but got \[.*\(3, 64\)\]\.$"),
        (lambda f: [*f[:-1], f[0]], r"^Expected exit_features of shapes \[.*\(3, 10\)\], but got \[.*\(3, 64\)\]\.$"),
        (lambda f: [f[0][:2], *f[1:]], r"^Expected exit_features of shapes \[.*\], but got \[\(2, 64\), .*\]\.$"),
        (lambda f: torch.cat(f, 1)[:, 1:], r"^Expected exit_features of shape \(batch, 330\), but got \(3, 329\)\.$"),
        (lambda f: f[0][0], r"^Expected exit_features of shape \(batch, 330\), but got \(64,\)\.$"),
        pytest.param(
            lambda f: [],
            r"^Expected exit_features of shapes \[.*\], but got \[\]\.$",
        ),
    ],
)
def test_features_of_other_shapes(features, message):
    model = zoo("vit_paper")
    with pytest.raises(ValueError, match=message):
        model(exit_features=features(model.backbone(pictures(3))))


# Making one


def test_a_config_alone_is_a_random_model_that_works():
    model = JEIDNNForImageClassification(JEIDNNConfig(backbone="test_vit", num_labels=10))
    assert model.config.image_size == 160 and model.config.recipe == "default"
    assert model.config.exit_stages == [0, 1, 2, 3, 4, 5] and len(model.config.exit_pooling) == 5
    output = model(pictures(3, size=160), labels=torch.tensor([1, 2, 3]))
    assert output.loss.isfinite() and output.all_logits.shape == (3, 6, 10)
    assert not torch.equal(output.logits[0], output.logits[1])


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "t2t_vit_7", "resnet20_cifar"])
def test_the_constructor_keeps_timms_initialisation(name):
    torch.manual_seed(0)
    expected = build_model(name, num_classes=10, image_size=32).state_dict()
    found = make(name, exit_stages=[8] if "cifar" in name else None).backbone.model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_the_exits_keep_their_own_initialisation():
    model = make(recipe="default")
    assert torch.equal(model.heads.ensemble.weight, torch.eye(6)) and not model.heads.ensemble.bias.any()
    assert not model.policy.gates.bias.any()
    assert model.policy.gates.weight.tolist() == [[0.5, 0, 0, 0], [0.0] * 4]
    assert model.policy.gates.fine.layers[0].weight.abs().max() <= 13**-0.5


def test_recurrent_heads_start_near_07_identity():
    hidden = make(recipe="default").heads.modules_by_exit[1].hidden.weight.detach()
    assert hidden.diagonal().mean().item() == pytest.approx(0.7, abs=0.02)
    assert (hidden - 0.7 * torch.eye(128)).abs().max() < 0.1


def test_arguments_for_timm():
    model = make(backbone_kwargs={"depth": 3, "embed_dim": 32})
    assert model.backbone.exit_dims == (32, 32, 10)
    assert answers(model).logits.shape == (96, 10)


def test_train_mode_is_for_the_exits_only():
    model = make("resnet20_cifar", exit_stages=[2, 8])
    before = {key: value.clone() for key, value in model.backbone.state_dict().items()}
    assert model.train() is model and model.training and model.heads.training and model.policy.training
    assert not any(module.training for module in model.backbone.modules())
    model(pictures(), labels=torch.arange(96) % 10)
    assert all(torch.equal(value, before[key]) for key, value in model.backbone.state_dict().items())
    assert not model.eval().heads.training


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backbone": "test_vitt"}, "^Expected the name of a timm model, but got 'test_vitt'"),
        ({"exit_stages": [0, 1]}, r"^Expected exit_stages to be a list of rising .*, but got \[0, 1\]\.$"),
        ({"exit_pooling": ["avg4"]}, r"^Expected grids that fit the 2 x 2 map of exit 1, but got .*\.$"),
        ({"image_size": 33}, "^Expected an image_size and num_channels that the backbone can take, but got 33 px"),
        (
            {"mul_adds": {"backbone": [1], "pooling": [0], "heads": [0], "gates": [0]}},
            r"^Expected mul_adds of 6 exits, but got 1\.$",
        ),
    ],
)
def test_options_that_do_not_fit_the_backbone(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize("stages", [["a", 5], [0.0, 5.0], 5])
def test_exit_stages_of_another_type(stages):
    with pytest.raises(ValueError, match="Expected exit_stages to be"):
        make(exit_stages=stages)


# Checkpoints


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    torch.manual_seed(11)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model("test_vit", num_classes=10, img_size=32).state_dict(), path)
    return path


def pretrained(weights: Path, **options) -> JEIDNNForImageClassification:
    options = {"num_labels": 10, "image_size": 32, "recipe": "paper"} | options
    model = JEIDNNForImageClassification.from_backbone_pretrained("test_vit", weights=weights, **options)
    return let_some_out_at_every_exit(model)


@pytest.fixture(scope="module")
def trained(weights) -> JEIDNNForImageClassification:
    """On a pinned file of weights. Shared: leave it as it is."""
    return pretrained(weights)


@pytest.fixture(scope="module")
def heads_only(trained, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("heads_only")
    trained.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A checkpoint that holds its (random) backbone."""
    path = tmp_path_factory.mktemp("full")
    zoo("vit_paper").save_pretrained(path)
    return path


load = JEIDNNForImageClassification.from_pretrained


def stored(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def copied(folder: Path, target: Path, change=None) -> Path:
    shutil.copytree(folder, target)
    if change is not None:
        state = stored(folder)
        change(state)
        save_file(state, target / "model.safetensors", metadata={"format": "pt"})
    return target


def same_answers(a: JEIDNNForImageClassification, b: JEIDNNForImageClassification) -> bool:
    return all(torch.equal(x, y) for x, y in zip(answers(a).values(), answers(b).values(), strict=True))


def same_config(a: JEIDNNForImageClassification, b: JEIDNNForImageClassification) -> bool:
    a, b = (model.config.to_dict() | {"_name_or_path": None} for model in (a, b))
    return a == b


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_pretrained_backbone_with_fresh_exits(trained, weights):
    assert equal(trained.backbone.model.state_dict(), load_file(weights))
    assert trained.config.backbone_weights == str(weights) and not trained.training
    assert trained.config.backbone_fingerprint == fingerprint(load_file(weights))
    assert not any(p.requires_grad for p in trained.backbone.parameters())


def test_num_labels_default_to_the_backbones(tmp_path):
    save_file(timm.create_model("resnet20_cifar").state_dict(), tmp_path / "w.safetensors")
    create = JEIDNNForImageClassification.from_backbone_pretrained
    assert create("resnet20_cifar", weights=tmp_path / "w.safetensors", exit_stages=[8]).config.num_labels == 10
    labels = {i: str(i) for i in range(10)}
    model = create("resnet20_cifar", weights=tmp_path / "w.safetensors", exit_stages=[8], id2label=labels)
    assert model.config.id2label == labels


@pytest.mark.parametrize("name", ["resnet20_cifar", "t2t_vit_7"])
def test_a_backbone_without_pretrained_weights(name):
    message = rf"^Expected weights=a file, since timm knows no pretrained weights for '{name}'\.$"
    with pytest.raises(ValueError, match=message):
        JEIDNNForImageClassification.from_backbone_pretrained(name, image_size=32, exit_stages=None, recipe="paper")


def test_only_the_exits_are_stored_where_the_backbone_has_a_file(heads_only, trained):
    state = stored(heads_only)
    assert state and not any(key.startswith("backbone") for key in state)
    exits = {key: value for key, value in trained.state_dict().items() if not key.startswith("backbone.")}
    assert equal(state, exits)
    assert (heads_only / "model.safetensors").stat().st_size < 20_000
    names = {"config.json", "model.safetensors", "preprocessor_config.json"}
    assert {path.name for path in heads_only.iterdir()} == names


def test_a_heads_only_checkpoint_loads_as_it_was(heads_only, trained, weights):
    model = load(heads_only)
    assert equal(model.state_dict(), trained.state_dict())
    assert equal(model.backbone.model.state_dict(), load_file(weights))
    assert same_answers(model, trained) and same_config(model, trained)
    assert not model.training and not any(p.requires_grad for p in model.backbone.parameters())
    assert all(p.requires_grad for p in [*model.heads.parameters(), *model.policy.parameters()])


def test_saving_a_loaded_model_again_stores_the_same(heads_only, tmp_path):
    load(heads_only).save_pretrained(tmp_path)
    assert equal(stored(tmp_path), stored(heads_only))
    first, second = (json.loads((folder / "config.json").read_text()) for folder in (heads_only, tmp_path))
    assert first == second


def test_a_trainers_state_dict_is_stored_without_the_backbone_too(trained, tmp_path):
    trained.save_pretrained(tmp_path, state_dict=trained.state_dict())
    assert not any(key.startswith("backbone") for key in stored(tmp_path)) and same_answers(load(tmp_path), trained)


def test_loading_twice_gives_the_same(heads_only, full):
    for folder in (heads_only, full):
        assert same_answers(load(folder), load(folder))


def test_info_of_the_loading_on_request(full):
    model, info = load(full, output_loading_info=True)
    assert isinstance(model, JEIDNNForImageClassification)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_a_config_object_can_be_given(heads_only, trained):
    assert same_answers(load(heads_only, config=JEIDNNConfig.from_pretrained(heads_only)), trained)


def test_the_lambda_in_use_is_saved(tmp_path):
    model = copy.deepcopy(zoo("cifar_range"))
    model.set_lambda(7)
    model.save_pretrained(tmp_path)
    assert load(tmp_path).config.current_lam == 7 and same_answers(load(tmp_path), model)
    assert same_answers(load(tmp_path, current_lam=1.0), zoo("cifar_range"))


@pytest.mark.parametrize("override", [{"current_lam": -5}, {"current_lam": 2.0}, {"lam": -1.0}])
def test_an_override_is_checked_like_the_config(heads_only, override):
    with pytest.raises(ValueError, match="^Expected .*lambda"):
        load(heads_only, **override)


@pytest.fixture
def moved(heads_only, weights, tmp_path) -> tuple[Path, Path]:
    """The heads-only checkpoint, whose config names a file that is gone, and where the file is now."""
    folder, elsewhere = copied(heads_only, tmp_path / "model"), tmp_path / "elsewhere.safetensors"
    config = json.loads((folder / "config.json").read_text())
    config["backbone_weights"] = str(tmp_path / "gone" / weights.name)
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(weights, elsewhere)
    return folder, elsewhere


def test_weights_that_are_gone(moved, weights, monkeypatch, trained):
    folder, elsewhere = moved
    with pytest.raises(ValueError, match=rf"^Expected a weights file, but there is none at .*{weights.name}, or set "):
        load(folder)
    model = load(folder, backbone_weights=str(elsewhere))
    assert same_answers(model, trained) and model.config.backbone_weights == str(elsewhere)
    monkeypatch.setenv(WEIGHTS_DIR_VARIABLE, str(weights.parent))
    assert same_answers(load(folder), trained)


def test_weights_named_by_a_path(moved, tmp_path, trained):
    folder, elsewhere = moved
    load(folder, backbone_weights=elsewhere).save_pretrained(tmp_path / "again")
    assert same_answers(load(tmp_path / "again"), trained)


def test_other_weights_are_refused(moved, weights):
    folder, elsewhere = moved
    state = load_file(weights)
    state["blocks.0.attn.qkv.weight"][0, 0] += 1e-6
    save_file(state, elsewhere)
    found, expected = fingerprint(state)[:12], fingerprint(load_file(weights))[:12]
    message = rf"^Expected backbone weights with fingerprint {expected}, but got {found} from '{elsewhere}'; pass .*\.$"
    with pytest.raises(ValueError, match=message):
        load(folder, backbone_weights=str(elsewhere))
    del state["norm.bias"]
    save_file(state, elsewhere)
    with pytest.raises(ValueError, match=r"1 tensors are missing \['norm.bias'\]"):
        load(folder, backbone_weights=str(elsewhere))
    elsewhere.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(ValueError, match="^Expected a complete weights file, but .* cannot be read"):
        load(folder, backbone_weights=str(elsewhere))


def test_weights_of_timms_tag(monkeypatch, tmp_path):
    torch.manual_seed(0)
    source = timm.create_model("test_vit").state_dict()
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *_, **__: copy.deepcopy(source))
    name, create = "test_vit.r160_in1k", JEIDNNForImageClassification.from_backbone_pretrained
    model = create(name, image_size=32, recipe="paper")
    assert (model.config.num_labels, model.config.backbone_weights, model.config.image_size) == (1000, "timm", 32)
    assert torch.equal(model.backbone.model.head.weight, source["head.weight"])
    model.save_pretrained(tmp_path)
    assert not any(key.startswith("backbone") for key in stored(tmp_path)) and same_answers(load(tmp_path), model)
    other = create(name, 10, native_head=False, image_size=32, recipe="paper")
    assert other.backbone.exit_dims[-1] == 64 and answers(other).logits.shape == (96, 10)
    source["norm.bias"] += 1
    with pytest.raises(ValueError, match="^Expected backbone weights with fingerprint"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"^Expected num_labels=1000, .*, but got 10; pass native_head=False "):
        create(name, 10, image_size=32)


def test_save_backbone_makes_the_checkpoint_whole(weights, tmp_path):
    mine = tmp_path / "mine.safetensors"
    shutil.copy(weights, mine)
    model = pretrained(mine, save_backbone=True)
    model.save_pretrained(tmp_path / "whole")
    mine.unlink()
    state = stored(tmp_path / "whole")
    assert equal(state, model.state_dict()) and any(key.startswith("backbone.") for key in state)
    again = load(tmp_path / "whole")
    assert same_answers(again, model) and equal(again.backbone.state_dict(), model.backbone.state_dict())
    assert not any(p.requires_grad for p in again.backbone.parameters())


def test_save_backbone_can_be_chosen_later(heads_only, trained, tmp_path):
    model = load(heads_only)
    model.config.save_backbone = True
    model.save_pretrained(tmp_path)
    assert equal(stored(tmp_path), trained.state_dict()) and same_answers(load(tmp_path), trained)


def test_a_random_backbone_is_stored(full):
    model = zoo("vit_paper")
    assert model.config.backbone_weights is None and equal(stored(full), model.state_dict())
    assert same_answers(load(full), model)
    with safe_open(full / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_changed_backbone_weights_are_stored_with_a_warning(weights, tmp_path, caplog):
    model = pretrained(weights)
    with torch.no_grad():
        model.backbone.model.blocks[2].mlp.fc1.weight[3, 4] += 0.5
    with caplog.at_level(logging.WARNING, logger="jeidnn_hf"):
        model.save_pretrained(tmp_path)
    assert "The backbone's weights have changed since they were loaded: storing them as well." in caplog.messages
    assert equal(stored(tmp_path), model.state_dict()) and same_answers(load(tmp_path), model)


def test_a_random_backbone_is_not_mistaken_for_the_weights_its_config_names(heads_only, tmp_path):
    model = JEIDNNForImageClassification(JEIDNNConfig.from_pretrained(heads_only)).eval()
    model.save_pretrained(tmp_path)
    assert equal(stored(tmp_path), model.state_dict()) and same_answers(load(tmp_path), model)


def test_unchanged_weights_are_saved_without_a_warning(trained, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="jeidnn_hf"):
        trained.save_pretrained(tmp_path)
    assert not caplog.messages


def test_the_papers_t2t_vit_14_with_100_classes_is_small(monkeypatch, tmp_path):
    """Table 1 counts 500,565 parameters. The values do not matter here, and their initialisation is slow."""
    monkeypatch.setattr(T2TViT, "init_weights", lambda self: [t.data.fill_(0.01) for t in self.state_dict().values()])
    save_file(timm.create_model("t2t_vit_14", num_classes=100, img_size=32).state_dict(), tmp_path / "w.safetensors")
    model = JEIDNNForImageClassification.from_backbone_pretrained(
        "t2t_vit_14", 100, weights=tmp_path / "w.safetensors", image_size=32, recipe="paper"
    )
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "w.safetensors").stat().st_size > 80e6
    assert (tmp_path / "model" / "model.safetensors").stat().st_size < 3e6
    assert sum(value.numel() for value in stored(tmp_path / "model").values()) == 500_565


# What transformers 5 does to a frozen backbone


@pytest.mark.parametrize(
    "case", ["t2t_paper", "cifar_median", "cifar_range", "vit_default", "vit_boosted", "vit_cascade"]
)
def test_a_full_checkpoint_loads_bit_for_bit(case, tmp_path):
    model = zoo(case)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert equal(again.state_dict(), model.state_dict()) and same_config(again, model)
    assert_same(answers(again, output_all_exits=True), answers(model, output_all_exits=True))


def test_the_backbone_stays_frozen_after_a_full_checkpoint(full):
    model = load(full)
    assert not any(p.requires_grad for p in model.backbone.parameters())
    assert all(p.requires_grad for p in [*model.heads.parameters(), *model.policy.parameters()])
    assert not model.training and not any(module.training for module in model.modules())
    assert not any(module.training for module in model.train().backbone.modules()) and model.heads.training


def test_the_cost_buffer_survives_loading(heads_only, full):
    for folder in (heads_only, full):
        model = load(folder)
        assert "exit_mul_adds" not in model.state_dict()
        assert model.exit_mul_adds.dtype == torch.int64 and tuple(model.exit_mul_adds.tolist()) == model.costs.total


class TableNet(nn.Module):
    """A network whose forward reads a table that is not in its state dict, as in Swin or LeViT."""

    def __init__(self, in_chans: int = 3, num_classes: int = 10) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, 8
        self.stem = nn.Conv2d(in_chans, 8, 4, 4)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 1) for _ in range(3))
        self.register_buffer("table", torch.linspace(1, 2, 8).view(1, 8, 1, 1), persistent=False)
        self.head = nn.Linear(8, num_classes) if num_classes else nn.Identity()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x).relu() * self.table
        return self.forward_head(x)


CFG = {"input_size": (3, 32, 32), "num_classes": 10, "classifier": "head", "first_conv": "stem"}
default_cfgs = generate_default_cfgs({"jeidnn_test_tablenet": CFG, "jeidnn_test_sharingnet": CFG})


@register_model
def jeidnn_test_tablenet(pretrained: bool = False, **kwargs) -> TableNet:
    return build_model_with_cfg(TableNet, "jeidnn_test_tablenet", pretrained, **kwargs)


@register_family(TableNet)
class TableNetBackbone(StagedBackbone):
    @property
    def num_blocks(self) -> int:
        return len(self.model.blocks)

    def embed(self, pixel_values: Tensor) -> Tensor:
        return self.model.stem(pixel_values)

    def block(self, i: int, state: Tensor) -> Tensor:
        return self.model.blocks[i](state).relu() * self.model.table

    def feature_map(self, state: Tensor) -> tuple[Tensor, None]:
        return state, None

    def finish(self, state: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(state, pre_logits=pre_logits)


@pytest.mark.parametrize("whole", [True, False])
def test_tables_outside_the_state_dict_survive_loading(whole, tmp_path):
    torch.manual_seed(0)
    save_file(timm.create_model("jeidnn_test_tablenet").state_dict(), tmp_path / "w.safetensors")
    model = JEIDNNForImageClassification.from_backbone_pretrained(
        "jeidnn_test_tablenet", weights=tmp_path / "w.safetensors", recipe="paper", save_backbone=whole
    )
    torch.testing.assert_close(model.backbone(pictures())[-1], model.backbone.model(pictures()))
    model.save_pretrained(tmp_path / "model")
    assert not any("table" in key for key in stored(tmp_path / "model"))
    again = load(tmp_path / "model")
    assert torch.equal(again.backbone.model.table, torch.linspace(1, 2, 8).view(1, 8, 1, 1))
    assert same_answers(again, model)


class SharingNet(TableNet):
    """Its last block has the first one's weight, and a normalisation with buffers goes by two names, as in CoaT."""

    def __init__(self, **kwargs) -> None:
        super().__init__(**kwargs)
        self.blocks[2].weight = self.blocks[0].weight
        self.norm = nn.BatchNorm2d(8)
        self.same_norm = self.norm
        self.norm.running_mean.normal_()


@register_model
def jeidnn_test_sharingnet(pretrained: bool = False, **kwargs) -> SharingNet:
    return build_model_with_cfg(SharingNet, "jeidnn_test_sharingnet", pretrained, **kwargs)


@register_family(SharingNet)
class SharingNetBackbone(TableNetBackbone):
    def embed(self, pixel_values: Tensor) -> Tensor:
        return self.model.norm(self.model.stem(pixel_values))


@pytest.mark.parametrize("whole", [True, False])
def test_shared_tensors_are_stored_once_and_shared_again(whole, tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("jeidnn_test_sharingnet").state_dict()
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "w.safetensors")
    model = JEIDNNForImageClassification.from_backbone_pretrained(
        "jeidnn_test_sharingnet", weights=tmp_path / "w.safetensors", recipe="paper", save_backbone=whole
    )
    for folder in ("model", "again"):
        model.save_pretrained(tmp_path / folder)
        model = load(tmp_path / folder)
    further = {"backbone.model.blocks.2.weight"}
    further |= {key for key in model.state_dict() if key.startswith("backbone.model.same_norm.")}
    assert len(further) == 6
    kept = {key for key in model.state_dict() if whole or not key.startswith("backbone.")} - further
    assert stored(tmp_path / "again").keys() == stored(tmp_path / "model").keys() == kept
    assert equal(model.backbone.model.state_dict(), state)
    assert model.backbone.model.blocks[2].weight is model.backbone.model.blocks[0].weight


@pytest.mark.parametrize(
    "key",
    ["heads.modules_by_exit.2.weight", "policy.gates.bias", "backbone.model.blocks.3.attn.qkv.weight"],
)
def test_a_missing_tensor_is_never_made_up(full, tmp_path, key):
    folder = copied(full, tmp_path / "model", lambda state: state.pop(key))
    message = rf"^Expected a checkpoint of this network in '{folder}', but got 1 missing keys like {key}\.$"
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_missing_statistics_and_temperatures_are_never_made_up(tmp_path):
    zoo("vit_default").save_pretrained(tmp_path / "whole")
    for i, key in enumerate(("heads.norms.1.mean", "heads.norms.1.std", "heads.ensemble.temperature")):
        folder = copied(tmp_path / "whole", tmp_path / str(i), lambda state, key=key: state.pop(key))
        with pytest.raises(ValueError, match=rf"^Expected a checkpoint .*, but got 1 missing keys like {key}\.$"):
            load(folder)


def test_missing_exits_of_a_heads_only_checkpoint(heads_only, tmp_path):
    folder = copied(heads_only, tmp_path / "model", lambda state: state.pop("policy.gates.weight"))
    with pytest.raises(ValueError, match=r"^Expected a checkpoint .*, but got 1 missing keys like policy.gates.weight"):
        load(folder)


def test_an_unknown_tensor_is_refused(full, tmp_path):
    folder = copied(full, tmp_path / "model", lambda state: state.update(extra=torch.zeros(1)))
    with pytest.raises(ValueError, match=r"^Expected a checkpoint .*, but got 1 unexpected keys like extra\.$"):
        load(folder)


def test_another_network_is_refused_in_one_sentence(full):
    message = r"^Expected a checkpoint of this network in .*, but got 20 missing keys .* and 10 unexpected keys .*\.$"
    with pytest.raises(ValueError, match=message):
        load(full, exit_head="mlp")


def test_a_tensor_of_another_shape_is_refused(full, tmp_path):
    folder = copied(full, tmp_path / "model", lambda state: state.update({"policy.gates.bias": torch.zeros(4)}))
    with pytest.raises(ValueError, match="^Expected .*policy.gates.bias"):
        load(folder)


def test_mismatched_shapes_are_taken_on_explicit_request_only(full, tmp_path):
    folder = copied(full, tmp_path / "model", lambda state: state.update({"policy.gates.bias": torch.zeros(4)}))
    with pytest.raises((ValueError, RuntimeError)):
        load(folder)
    model, info = load(folder, ignore_mismatched_sizes=True, output_loading_info=True)
    assert {key for key, *_ in info["mismatched_keys"]} == {"policy.gates.bias"}
    expected, found = zoo("vit_paper").state_dict(), model.state_dict()
    assert {key for key in found if not torch.equal(found[key], expected[key])} == {"policy.gates.bias"}
    bias = found["policy.gates.bias"]
    assert bias.shape == (5,) and bias.isfinite().all() and bias.abs().max() <= 0.5
    assert answers(model).logits.isfinite().all() and not any(p.requires_grad for p in model.backbone.parameters())


def test_what_is_missing_is_not_a_mismatch(tmp_path):
    zoo("vit_default").save_pretrained(tmp_path / "whole")
    folder = copied(tmp_path / "whole", tmp_path / "model", lambda state: state.pop("heads.norms.1.mean"))
    with pytest.raises(
        ValueError, match=r"^Expected a checkpoint .*, but got 1 missing keys like heads.norms.1.mean\.$"
    ):
        load(folder, ignore_mismatched_sizes=True)


def test_statistics_of_other_features_start_over(tmp_path):
    zoo("vit_default").save_pretrained(tmp_path)
    model = load(tmp_path, exit_pooling=["cls"], mul_adds=None, ignore_mismatched_sizes=True)
    for norm in model.heads.norms:
        assert torch.equal(norm.mean, torch.zeros(64)) and torch.equal(norm.std, torch.ones(64))


@pytest.fixture(scope="module")
def relabelled(tmp_path_factory) -> JEIDNNForImageClassification:
    folder = tmp_path_factory.mktemp("relabelled")
    zoo("cifar_median").save_pretrained(folder)
    return load(folder, id2label={i: str(i) for i in range(7)}, ignore_mismatched_sizes=True)


def test_other_classes_on_explicit_request(relabelled):
    assert relabelled.config.num_labels == 7 and answers(relabelled).logits.shape == (96, 7)
    assert relabelled.heads.modules_by_exit[0].weight.isfinite().all()
    assert equal(relabelled.backbone.state_dict(), zoo("cifar_median").backbone.state_dict())


def test_other_classes_cost_what_they_cost(relabelled):
    modules = relabelled.heads.modules_by_exit
    assert relabelled.costs.heads == tuple(sum(m.mul_adds for m in modules[: l + 1]) for l in range(4))


@pytest.mark.parametrize("kept", [0, 4, 100, -1, -5000])
@pytest.mark.parametrize("kind", ["heads_only", "full"])
def test_truncated_weights_are_refused(kind, kept, request, tmp_path):
    folder = copied(request.getfixturevalue(kind), tmp_path / "model")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = rf"^Expected complete weights in '{folder}', but got a broken file \([^\n]*\); fetch it again\.$"
    with pytest.raises(ValueError, match=message):
        load(folder)


def test_a_checkpoint_of_a_newer_format_is_refused(full, tmp_path):
    folder = copied(full, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"format_version": 3}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"^Expected a config of format 2 or older, but got 3; update jeidnn-hf\.$"):
        load(folder)


@pytest.mark.parametrize("kind", ["heads_only", "full"])
def test_half_precision(kind, request):
    folder = request.getfixturevalue(kind)
    exact, model = load(folder), load(folder, dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert equal(model.state_dict(), {key: value.bfloat16() for key, value in exact.state_dict().items()})
    assert not any(p.requires_grad for p in model.backbone.parameters()) and not model.train().backbone.training
    assert torch.equal(model.exit_mul_adds, exact.exit_mul_adds)
    early, full = answers(model, pictures().bfloat16()), answers(exact)
    assert early.logits.dtype == torch.bfloat16 and early.logits.isfinite().all()
    assert (early.exit_index == full.exit_index).float().mean() > 0.8
    losses = [m(pictures().to(m.dtype), labels=torch.arange(96) % 10).loss.item() for m in (model, exact)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


@pytest.mark.parametrize("case", ["vit_paper", "cifar_median"])
def test_a_deep_copy_is_a_model_of_its_own(case):
    model = zoo(case)
    twin = copy.deepcopy(model)
    assert same_answers(twin, model)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in model.parameters()}
    before = answers(model).logits
    with torch.no_grad():
        for parameter in twin.backbone.parameters():
            parameter.mul_(1.5)
    assert not same_answers(twin, model) and torch.equal(answers(model).logits, before)
    twin.config.current_lam = 3.0
    assert model.config.current_lam != 3.0
