"""What transformers asks of any image classifier, offline; `make test-common` runs transformers' own tests of it."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from functools import lru_cache

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, JEIDNNOutput

CASES = {
    "paper": {"recipe": "paper", "gate_form": "stick", "exit_stages": [0, 2, 3]},
    "default": {"recipe": "default"},
    "traced": {
        "backbone": "test_mambaout",
        "backbone_kwargs": {},
        "recipe": "paper",
        "gate_form": "stick",
        "native_head": False,
    },
}
every_case = pytest.mark.parametrize("case", CASES)
BATCH = 24
load = JEIDNNForImageClassification.from_pretrained


def make(**options) -> JEIDNNForImageClassification:
    """Random exits; of the images that come to a gate, some leave and some go on."""
    options = {"backbone": "test_vit", "backbone_kwargs": {"depth": 4}, "image_size": 32} | options
    if "id2label" not in options:
        options.setdefault("num_labels", 5)
    torch.manual_seed(0)
    model = JEIDNNForImageClassification(JEIDNNConfig(**options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and parameter.dim() > 1:
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
        logits = model(pictures(), output_all_exits=True).all_logits
        gates = model.policy.gate_logits(logits, model.config.current_lam)
        model.policy.gates.bias.sub_(gates.quantile(0.6, dim=0) + 0.01)
    return model


@lru_cache
def zoo(case: str) -> JEIDNNForImageClassification:
    """Shared: leave it as it is."""
    return make(**CASES[case])


def pictures(batch: int = BATCH) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def classes(batch: int = BATCH) -> Tensor:
    return torch.arange(batch) % 5


@torch.no_grad()
def answers(model: JEIDNNForImageClassification, x: Tensor | None = None, **options) -> JEIDNNOutput:
    return model(pictures() if x is None else x, **options)


def assert_same(found: JEIDNNOutput, expected: JEIDNNOutput, **tolerance) -> None:
    assert found.keys() == expected.keys()
    torch.testing.assert_close(dict(found), dict(expected), **tolerance)


def assert_equal_states(found: JEIDNNForImageClassification, expected: JEIDNNForImageClassification) -> None:
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


# Outputs


@every_case
@pytest.mark.parametrize("options", [{}, {"output_all_exits": True}, {"output_hidden_states": True}])
def test_one_by_one_as_in_a_batch(case, options):
    together = answers(zoo(case), **options)
    assert len(together.exit_index.unique()) > 1
    alone = [answers(zoo(case), pictures()[i : i + 1], **options) for i in range(BATCH)]
    for name, value in together.items():
        parts = [one[name] for one in alone]
        found = tuple(map(torch.cat, zip(*parts, strict=True))) if isinstance(value, tuple) else torch.cat(parts)
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-5)


@every_case
def test_calls_are_deterministic_also_in_training(case):
    model = copy.deepcopy(zoo(case)).train()
    for options in ({}, {"output_all_exits": True}, {"labels": classes()}):
        expected = answers(zoo(case), **options)
        for _ in range(2):
            assert_same(answers(model, **options), expected, rtol=0, atol=0)


@pytest.mark.parametrize("options", [{"labels": classes()}, {"output_hidden_states": True}])
def test_a_tuple_holds_what_the_output_holds_and_in_its_order(options):
    model = copy.deepcopy(zoo("paper"))
    expected = answers(model, **options)
    model.config.return_dict = False
    found = answers(model, **options)
    assert type(found) is tuple
    torch.testing.assert_close(found, expected.to_tuple(), rtol=0, atol=0)
    order = list(inspect.signature(JEIDNNOutput).parameters)
    assert list(expected) == sorted(expected, key=order.index)
    assert type(answers(model, return_dict=True, **options)) is JEIDNNOutput


def test_the_images_are_the_first_argument():
    names = list(inspect.signature(JEIDNNForImageClassification.forward).parameters)
    assert names[1] == JEIDNNForImageClassification.main_input_name == "pixel_values"


# Hidden states


def watched(network: torch.nn.Module, modules: list[torch.nn.Module]) -> list[Tensor]:
    """What the modules put out while the network itself runs on the pictures."""
    seen = []
    hooks = [module.register_forward_hook(lambda module, inputs, output: seen.append(output)) for module in modules]
    with torch.no_grad():
        network(pictures())
    for hook in hooks:
        hook.remove()
    return seen


def test_hidden_states_are_the_networks_own():
    model = zoo("paper")
    network = model.backbone.model
    embedded, *blocks = watched(network, [network.norm_pre, *network.blocks])
    states = answers(model, output_hidden_states=True).hidden_states
    assert type(states) is tuple and all(state.shape == (BATCH, 5, 64) for state in states)
    expected = (embedded, *(blocks[i] for i in model.config.exit_stages))
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)


def test_hidden_states_of_a_traced_network_start_with_the_image():
    model = zoo("traced")
    network = model.backbone.model
    modules = [network.get_submodule(name) for name in model.backbone.exit_modules]
    states = answers(model, output_hidden_states=True).hidden_states
    assert torch.equal(states[0], pictures()) and len(states) == model.backbone.num_exits + 1 > 2
    torch.testing.assert_close(list(states[1:]), watched(network, modules), rtol=1e-5, atol=1e-5)


@every_case
def test_hidden_states_on_request_or_by_the_config(case):
    model = copy.deepcopy(zoo(case))
    asked = answers(model, output_hidden_states=True)
    every = answers(model, output_all_exits=True)
    assert "hidden_states" not in every and answers(model).hidden_states is None
    assert_same(JEIDNNOutput(**{name: asked[name] for name in every}), every, rtol=0, atol=0)
    model.config.output_hidden_states = True
    assert_same(answers(model), asked, rtol=0, atol=0)
    assert answers(model, labels=classes()).hidden_states is not None
    assert answers(model, output_hidden_states=False).keys() == answers(zoo(case)).keys()
    with torch.no_grad():
        features = model.backbone(pictures())
        assert model(exit_features=features).hidden_states is None


# Problem types


def expected_loss(output: JEIDNNOutput, costs: Tensor, model: JEIDNNForImageClassification) -> float:
    """Eq. 6 in plain numbers, from task costs (B, L)."""
    total, lam = model.costs.total, model.config.current_lam
    loss = 0.0
    for i, row in enumerate(costs.tolist()):
        for l, task in enumerate(row):
            share = total[l] / model.costs.backbone[-1]
            loss += output.exit_distribution[i, l].item() * (task + lam * share) / len(costs)
    return loss


def test_several_labels_at_once():
    model = make(recipe="paper", problem_type="multi_label_classification")
    labels = torch.rand(BATCH, 5, generator=torch.Generator().manual_seed(2)).round()
    output = answers(model, labels=labels)
    p = output.all_logits.double().sigmoid()
    chance = torch.where(labels[:, None] == 1, p, 1 - p)
    assert output.loss.item() == pytest.approx(expected_loss(output, -chance.log().mean(-1), model), rel=1e-5)
    softened = answers(model, labels=0.2 + 0.6 * labels).loss
    costs = -(0.8 * chance.log() + 0.2 * (1 - chance).log()).mean(-1)
    assert softened.item() == pytest.approx(expected_loss(output, costs, model), rel=1e-5)


def test_regression_on_several_numbers():
    model = make(recipe="paper", problem_type="regression")
    labels = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(2))
    output = answers(model, labels=labels)
    costs = torch.stack([(output.all_logits[:, l] - labels).square().sum(-1) / 5 for l in range(4)], dim=1)
    assert output.loss.item() == pytest.approx(expected_loss(output, costs, model), rel=1e-5)


def test_regression_on_one_number_and_its_gates_that_see_nothing():
    model = make(recipe="paper", problem_type="regression", num_labels=1)
    labels = torch.randn(BATCH, generator=torch.Generator().manual_seed(2))
    output = answers(model, labels=labels)
    assert output.logits.shape == (BATCH, 1) and len(output.exit_index.unique()) == 1
    costs = (output.all_logits.squeeze(-1) - labels[:, None]).square()
    assert output.loss.item() == pytest.approx(expected_loss(output, costs, model), rel=1e-5)
    assert torch.equal(answers(model, labels=labels[:, None]).loss, output.loss)
    early = answers(model)
    assert torch.equal(early.exit_index, output.exit_index)
    torch.testing.assert_close(early.logits, output.logits, rtol=1e-5, atol=1e-5)


def test_one_class_costs_only_computation():
    config = JEIDNNConfig(backbone="test_vit", backbone_kwargs={"depth": 2}, image_size=32, recipe="paper")
    config.problem_type, config.num_labels = "single_label_classification", 1
    model = JEIDNNForImageClassification(config)
    output = answers(model, labels=torch.zeros(BATCH, dtype=torch.long))
    assert output.loss.item() == pytest.approx(expected_loss(output, torch.zeros(BATCH, 2), model), rel=1e-5)


@pytest.mark.parametrize("recipe", ["paper", "default"])
@pytest.mark.parametrize(
    ("problem_type", "num_labels"), [("multi_label_classification", 3), ("regression", 3), ("regression", 1)]
)
def test_every_problem_can_be_learned(recipe, problem_type, num_labels):
    """A few steps on one batch: the loss falls below that of the best constant answer."""
    model = make(recipe=recipe, ensemble=False, problem_type=problem_type, num_labels=num_labels, native_head=False)
    if model.config.has_lam_range:
        model.set_lambda(model.config.lam[0])
    model.train()
    signal = pictures().flatten(1)[:, :num_labels].sign()
    labels = (signal + 1) / 2 if problem_type != "regression" else signal
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=0.02)
    for step in range(60):
        output = model(pictures(), labels=labels)
        optimizer.zero_grad()
        output.loss.backward()
        if step == 0:
            assert all(p.grad is not None for p in trained)
            assert all(p.grad is None for p in model.backbone.parameters())
        optimizer.step()
    logits = answers(model).logits
    if problem_type == "regression":
        assert F.mse_loss(logits, labels) < 0.5 * labels.var(0, correction=0).mean()
    else:
        assert ((logits > 0) == (labels > 0.5)).float().mean() > 0.9


@pytest.mark.parametrize(
    ("problem_type", "labels", "message"),
    [
        ("regression", torch.zeros(2), r"floating-point labels of shape \(2, 5\), but got torch\.float32 \(2,\)\.$"),
        ("regression", classes(2), r"floating-point labels of shape \(2, 5\), but got torch\.int64 \(2,\)\.$"),
        ("regression", torch.zeros(2, 4), r"floating-point labels of shape \(2, 5\), but got torch\.float32 \(2, 4\)"),
        ("regression", [0.0, 1.0], r"floating-point labels of shape \(2, 5\), but got list\.$"),
        ("regression", torch.full((2, 5), torch.nan), r"the loss without NaN or infinity, but got some; check "),
        ("multi_label_classification", torch.eye(5, dtype=torch.long)[:2], r"floating-point .* got torch\.int64 "),
        ("multi_label_classification", torch.full((2, 5), 1.5), r"labels in 0\.\.1, but got 1\.5\.$"),
        ("multi_label_classification", torch.full((2, 5), -0.5), r"labels in 0\.\.1, but got -0\.5\.$"),
        ("single_label_classification", torch.zeros(2, 5), r"integer labels of shape \(2,\), but got torch\.float32 "),
        ("single_label_classification", torch.tensor([0, 5]), r"labels in 0\.\.4, but got 5\.$"),
    ],
)
def test_labels_of_another_problem(problem_type, labels, message):
    model = copy.copy(zoo("paper"))
    model.config = copy.deepcopy(model.config)
    model.config.problem_type = problem_type
    with pytest.raises(ValueError, match=f"^Expected {message}"):
        answers(model, pictures(2), labels=labels)


# Construction


@every_case
def test_a_model_on_the_meta_device(case):
    model, config = zoo(case), JEIDNNConfig.from_dict(zoo(case).config.to_dict())
    with torch.device("meta"):
        empty = JEIDNNForImageClassification(config)
    exits = {**dict(empty.heads.named_parameters()), **dict(empty.policy.named_parameters())}
    assert exits and all(parameter.is_meta for parameter in exits.values())
    assert torch.equal(empty.exit_mul_adds, model.exit_mul_adds) and empty.config.mul_adds == model.config.mul_adds
    empty.to_empty(device="cpu")
    empty.exit_mul_adds.fill_(-1)
    empty.normalised_costs.fill_(-1)
    empty.init_weights()
    assert torch.equal(empty.exit_mul_adds, model.exit_mul_adds)
    assert torch.equal(empty.normalised_costs, model.normalised_costs)
    empty.load_state_dict(model.state_dict())
    assert_same(answers(empty, output_all_exits=True), answers(model, output_all_exits=True))


@every_case
def test_only_the_exits_are_trainable(case):
    model = zoo(case)
    exits = sum(p.numel() for p in [*model.heads.parameters(), *model.policy.parameters()])
    backbone = sum(p.numel() for p in model.backbone.model.parameters())
    assert model.num_parameters(only_trainable=True) == exits and model.num_parameters() == exits + backbone


@every_case
def test_a_model_from_its_config_and_its_state(case):
    model = zoo(case)
    again = JEIDNNForImageClassification(JEIDNNConfig.from_dict(model.config.to_dict())).eval()
    again.load_state_dict(model.state_dict(), strict=True)
    assert_same(answers(again, labels=classes()), answers(model, labels=classes()), rtol=0, atol=0)


# Precision


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_precision(case, dtype):
    exact = answers(zoo(case), labels=classes())
    cast = copy.deepcopy(zoo(case)).to(dtype)
    assert cast.exit_mul_adds.dtype == torch.int64
    full, early = answers(cast, pictures().to(dtype), labels=classes()), answers(cast, pictures().to(dtype))
    assert full.logits.dtype == full.exit_distribution.dtype == early.logits.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float64 else 16 * torch.finfo(dtype).eps
    spread = exact.all_logits.std()
    assert (full.all_logits.float() - exact.all_logits).abs().mean() < tolerance * spread
    assert full.loss.item() == pytest.approx(exact.loss.item(), rel=tolerance)
    assert (early.exit_index == exact.exit_index).float().mean() > 0.8


def test_half_in_place_and_from_a_checkpoint(tmp_path):
    model = zoo("paper")
    model.save_pretrained(tmp_path)
    loaded, cast = load(tmp_path, dtype=torch.float16), copy.deepcopy(model).half()
    assert loaded.dtype == cast.dtype == torch.float16
    assert_equal_states(loaded, cast)
    assert_same(answers(loaded, pictures().half()), answers(cast, pictures().half()))


# Checkpoints


@every_case
def test_saved_in_shards(case, tmp_path):
    model = zoo(case)
    model.save_pretrained(tmp_path, max_shard_size="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 and (tmp_path / "model.safetensors.index.json").is_file()
    assert_equal_states(load(tmp_path), model)
    assert_same(answers(load(tmp_path)), answers(model), rtol=0, atol=0)


@every_case
def test_state_and_model_survive_pickling(case):
    model, file = zoo(case), io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=True), model.state_dict(), rtol=0, atol=0)
    again = pickle.loads(pickle.dumps(model))
    assert_same(answers(again, labels=classes()), answers(model, labels=classes()), rtol=0, atol=0)
    assert not any(p.requires_grad for p in again.backbone.parameters())


def test_names_left_out_of_a_checkpoint_are_exactly_the_backbones(tmp_path):
    model = make(recipe="default")
    assert not model._keys_to_ignore_on_save and not model._keys_to_ignore_on_load_missing
    torch.save(model.backbone.model.state_dict(), tmp_path / "w.pth")
    model.config.backbone_weights = str(tmp_path / "w.pth")
    model.config.backbone_fingerprint = None
    again = JEIDNNForImageClassification(model.config)
    state = again.state_dict()
    assert again._keys_to_ignore_on_save == {key for key in state if key.startswith("backbone.")}
    assert any(not key.startswith("backbone.") for key in state)
    again.config.save_backbone = True
    again.save_pretrained(tmp_path / "whole")
    assert load_file(tmp_path / "whole" / "model.safetensors").keys() == state.keys()


# Other labels


@pytest.fixture
def three_labels(tmp_path) -> str:
    """A checkpoint whose last head is trained, as all others are."""
    model = make(recipe="default", native_head=False, id2label={0: "cat", 1: "dog", 2: "eel"})
    model.save_pretrained(tmp_path)
    return str(tmp_path)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ({"num_labels": 42}, [f"LABEL_{i}" for i in range(42)]),
        ({"id2label": {0: "a", 1: "b"}}, ["a", "b"]),
        ({"num_labels": 2, "id2label": {0: "a", 1: "b"}, "label2id": {"a": 0, "b": 1}}, ["a", "b"]),
    ],
)
def test_other_labels_start_their_heads_afresh(three_labels, labels, names):
    torch.manual_seed(0)
    model, trained = load(three_labels, ignore_mismatched_sizes=True, **labels), load(three_labels)
    assert model.config.id2label == dict(enumerate(names))
    assert model.config.label2id == {name: i for i, name in enumerate(names)}
    found, expected = model.state_dict(), trained.state_dict()
    fresh = {key for key in found if found[key].shape != expected[key].shape}
    assert fresh == {
        *(f"heads.modules_by_exit.{l}.{name}" for l in range(4) for name in ("out.weight", "out.bias", "skip.weight")),
        "heads.ensemble.bias",
    }
    for key in found:
        if key in fresh:
            assert len(found[key].movedim(-1 if key == "heads.ensemble.bias" else 0, 0)) == len(names)
            assert found[key].abs().max() < 1 and (key == "heads.ensemble.bias" or found[key].std() > 0), key
        else:
            assert torch.equal(found[key], expected[key]), key
    assert model.costs == JEIDNNForImageClassification(JEIDNNConfig.from_dict(model.config.to_dict())).costs
    assert model.costs.heads != trained.costs.heads
    assert answers(model).logits.shape == (BATCH, len(names))


def test_the_same_number_of_labels_keeps_their_names(three_labels):
    assert load(three_labels, num_labels=3).config.id2label == {0: "cat", 1: "dog", 2: "eel"}


def test_other_labels_unasked_are_the_error_of_either_library(three_labels):
    for kind in (ValueError, RuntimeError):
        with pytest.raises(kind, match=r"^Expected heads\.ensemble\.bias of shape \(4, 42\) in .* \(4, 3\); ignore_"):
            load(three_labels, num_labels=42)


def test_a_frozen_head_never_starts_afresh(tmp_path):
    """It would stay at random for good."""
    zoo("paper").save_pretrained(tmp_path)
    message = r"^Expected backbone\.model\.head\.bias of shape \(42,\) in .*, but got \(5,\); the frozen backbone "
    with pytest.raises(ValueError, match=message):
        load(tmp_path, num_labels=42, ignore_mismatched_sizes=True)


# Config


def test_every_field_of_the_config_goes_through_every_way_to_keep_it(tmp_path):
    config = zoo("default").config
    config = JEIDNNConfig.from_dict(config.to_dict() | {"problem_type": "single_label_classification"})
    config.save_pretrained(tmp_path)
    ways = {
        "dict": JEIDNNConfig.from_dict(config.to_dict()),
        "json file": JEIDNNConfig.from_json_file(tmp_path / "config.json"),
        "folder": JEIDNNConfig.from_pretrained(tmp_path),
        "pickle": pickle.loads(pickle.dumps(config)),
        "copy": copy.deepcopy(config),
    }
    for way, again in ways.items():
        assert again.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}, way
        assert again.to_json_string() == config.to_json_string(), way
    assert config.problem_type in config.to_json_string()


@pytest.mark.parametrize(
    "override",
    [
        {"exit_rule": "median"},
        {"exit_threshold": 0.25},
        {"current_lam": 0.5},
        {"output_hidden_states": True},
        {"return_dict": False},
        {"task_cost": "brier"},
    ],
)
def test_fields_can_be_overridden_on_loading(override, tmp_path):
    zoo("default").save_pretrained(tmp_path)
    model = load(tmp_path, **override)
    ((field, value),) = override.items()
    kept = zoo("default").config.to_dict() | {"_name_or_path": None}
    assert getattr(model.config, field) == value != kept[field]
    assert model.config.to_dict() | {"_name_or_path": None, field: kept[field]} == kept
    assert model.policy.rule == model.config.exit_rule and model.policy.threshold == model.config.exit_threshold
