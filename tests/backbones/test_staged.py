"""Backbones cut at their exits: each family is the model's own forward, in pieces that can lose rows on the way."""

from __future__ import annotations

from collections import namedtuple
from functools import lru_cache, partial

import pytest
import timm
import torch
from torch import nn

from jeidnn_hf.backbones import StagedBackbone, select, staged_backbone
from jeidnn_hf.backbones.staged import register_family, tokens_to_map
from networks import assert_surviving_rows_go_on, images_of

FAMILIES = {
    "vit": ("test_vit", 48, {}),
    "vit_tiny": ("vit_tiny_patch16_224", 32, {"depth": 4}),
    "vit_reg_cls": ("test_vit", 48, {"reg_tokens": 3}),
    "vit_reg_gap": ("test_vit2", 48, {}),
    "vit_map_pool": ("test_vit3", 32, {}),
    "vit_rmsnorm": ("test_vit4", 32, {}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", 48, {"depth": 4, "embed_dim": 96}),
    "deit3": ("deit3_small_patch16_224", 32, {"depth": 4, "embed_dim": 96}),
    "resnet": ("test_resnet", 64, {}),
    "resnet18": ("resnet18", 64, {"channels": (8, 16, 32, 64)}),
    "t2t_vit": ("t2t_vit_7", 32, {}),
    "cifar_resnet": ("resnet20_cifar", 32, {}),
}
VITS = [family for family, (name, *_) in FAMILIES.items() if "vit" in name or "deit" in name]
WITH_TOKEN = {"vit", "vit_tiny", "vit_reg_cls", "deit_distilled", "deit3", "t2t_vit"}

families = pytest.mark.parametrize("family", FAMILIES)


@lru_cache
def network(family: str, **options) -> nn.Module:
    """The timm model with no parameter at a constant: zero biases and tiny layer scales would hide mistakes."""
    name, size, kwargs = FAMILIES[family]
    kwargs = {"num_classes": 7} | kwargs | dict(options)
    if "resnet" not in name:
        kwargs["img_size"] = size
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                centre = 1.0 if parameter.max() > 0 else 0.0
                parameter.copy_(centre + 0.2 * torch.randn(parameter.shape))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def cut(family: str, model: nn.Module | None = None, **options) -> StagedBackbone:
    return staged_backbone(model or network(family), image_size=FAMILIES[family][1], **options)


def images(family: str, batch: int = 4) -> torch.Tensor:
    return images_of(FAMILIES[family][1], batch)


def tiny() -> StagedBackbone:
    return cut("vit")


# The stages chained are the network.


@families
@torch.no_grad()
def test_chained_stages_are_the_models_forward(family):
    backbone, x = cut(family), images(family)
    assert backbone.num_exits == backbone.num_blocks > 2
    features = backbone(x)
    expected = backbone.model(x)
    assert expected.std(0).min() > 1e-4  # the images differ in their logits
    torch.testing.assert_close(features[-1], expected, atol=1e-6, rtol=1e-6)
    assert [tuple(z.shape) for z in features] == [(4, d) for d in backbone.exit_dims]
    assert all(z.std(0).max() > 1e-3 for z in features)


@families
@torch.no_grad()
def test_surviving_rows_go_on_as_if_nobody_had_left(family):
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    assert_surviving_rows_go_on(cut(family), images(family, 6), close)


@families
@torch.no_grad()
def test_a_subset_of_the_exits_sees_the_same(family):
    x, every = images(family), cut(family)
    full, last = every(x), every.num_blocks - 1
    for stages in ([0, 2, last], [1, last], [last]):
        backbone = cut(family, exit_stages=stages)
        assert backbone.exit_stages == tuple(stages) and backbone.num_exits == len(stages)
        assert backbone.exit_dims == tuple(every.exit_dims[i] for i in stages)
        assert backbone.map_shapes == tuple(every.map_shapes[i] for i in stages[:-1])
        for z, i in zip(backbone(x), stages, strict=True):
            assert torch.equal(z, full[i])


@families
@torch.no_grad()
def test_without_its_native_head_the_last_exit_gives_the_classifiers_input(family):
    name, size, kwargs = FAMILIES[family]
    options = kwargs | ({} if "resnet" in name else {"img_size": size})
    headless, x = timm.create_model(name, num_classes=0, **options), images(family)
    backbone = cut(family, headless, native_head=False)
    torch.testing.assert_close(backbone(x)[-1], headless(x), atol=1e-6, rtol=1e-6)
    with_head = cut(family, native_head=False)
    z = with_head(x)[-1]
    assert z.shape == (4, with_head.model.num_features)
    if family != "deit_distilled":  # that one averages two classifiers
        torch.testing.assert_close(with_head.model.get_classifier()(z), with_head.model(x), atol=1e-5, rtol=1e-5)


# What an exit sees.


@pytest.mark.parametrize("family", VITS)
@torch.no_grad()
def test_cell_i_j_of_the_map_is_patch_token_i_width_j(family):
    backbone, x = cut(family), images(family)
    side = FAMILIES[family][1] // 16
    state = backbone.stage(0, backbone.stem(x))
    feature_map, token = backbone.feature_map(state)
    norm = backbone.model.norm
    tokens = (backbone.model.fc_norm if isinstance(norm, nn.Identity) else norm)(state)
    prefix = backbone.model.num_prefix_tokens
    assert feature_map.shape == (4, tokens.shape[2], side, side) and tokens.shape[1] == prefix + side * side
    assert backbone.map_shapes[0] == tuple(feature_map.shape[1:])
    for i in range(side):
        for j in range(side):
            assert torch.equal(feature_map[:, :, i, j], tokens[:, prefix + i * side + j])
    assert backbone.has_class_token == (token is not None) == (family in WITH_TOKEN)
    if token is not None:
        assert torch.equal(token, tokens[:, 0])


@torch.no_grad()
def test_cell_i_j_of_the_map_is_where_the_image_has_it():
    """A patch that changes in the image changes its own cell alone before any attention."""
    backbone, x = tiny(), images("vit", 1)
    changed = x.clone()
    changed[:, :, 0:16, 32:48] += 1
    difference = backbone.embed(changed) - backbone.embed(x)
    moved = tokens_to_map(difference, 1, (3, 3)).abs().sum((0, 1)) > 0
    assert moved.nonzero().tolist() == [[0, 2]]


@torch.no_grad()
def test_token_exits_read_the_tokens_after_the_shared_final_norm():
    backbone, x = tiny(), images("vit")
    model, state = backbone.model, backbone.stem(x)
    for l in range(backbone.num_exits - 1):
        state = model.blocks[l](state)
        torch.testing.assert_close(backbone(x)[l], model.norm(state)[:, 0])


@torch.no_grad()
def test_convolutional_exits_read_the_blocks_output():
    backbone, x = cut("cifar_resnet"), images("cifar_resnet")
    model = backbone.model
    torch.testing.assert_close(backbone(x)[2], model.layer1(model.embed(x)).mean((2, 3)))
    assert [shape[0] for shape in backbone.map_shapes] == [16] * 3 + [32] * 3 + [64] * 2


@families
def test_plain_pooling_is_the_class_token_or_the_average(family):
    backbone = cut(family, exit_pooling="plain")
    name = "cls" if family in WITH_TOKEN else "avg1"
    assert backbone.exit_pooling == ((name,),) * (backbone.num_exits - 1)
    assert backbone.exit_dims == (*(channels for channels, *_ in backbone.map_shapes), 7)


def test_rich_pooling_goes_by_the_size_of_the_map():
    large, small = ("avg4", "max2"), ("avg2", "max2")
    backbone = cut("cifar_resnet", exit_pooling="rich")
    assert backbone.exit_pooling == (large,) * 6 + (small,) * 2
    assert backbone.exit_dims == (16 * 20,) * 3 + (32 * 20,) * 3 + (64 * 8,) * 2 + (7,)
    assert cut("vit", exit_pooling="rich").exit_pooling == (("cls", *small),) * 5
    assert cut("vit_reg_gap", exit_pooling="rich").exit_pooling == (small,) * 7
    point = staged_backbone(timm.create_model("test_vit", img_size=16), image_size=16, exit_pooling="rich")
    assert point.exit_pooling == (("cls", "avg1"),) * 5


@torch.no_grad()
def test_pooling_by_one_list_or_one_list_per_exit():
    x = images("vit")
    same = cut("vit", exit_pooling=["avg1", "cls"])
    assert same.exit_pooling == (("avg1", "cls"),) * 5 and same.exit_dims == (128,) * 5 + (7,)
    lists = [["cls"], ["avg1"], ["max2", "cls"], ["std1"], ["avg2"]]
    each = cut("vit", exit_pooling=lists)
    assert each.exit_pooling == tuple(map(tuple, lists))
    assert each.exit_dims == (64, 64, 5 * 64, 64, 4 * 64, 7)
    features = each(x)
    assert torch.equal(features[0], cut("vit")(x)[0]) and torch.equal(features[1], same(x)[1][:, :64])


@pytest.mark.parametrize("pooling", ["plain", "rich", ["avg1"], []])
def test_a_single_exit_pools_nothing(pooling):
    backbone = cut("vit", exit_stages=[5], exit_pooling=pooling)
    assert (backbone.exit_pooling, backbone.map_shapes, backbone.exit_dims) == ((), (), (7,))


# Frozen.


@families
def test_frozen_from_the_start_and_for_good(family):
    backbone = cut(family)
    for _ in range(2):
        assert not any(parameter.requires_grad for parameter in backbone.parameters())
        assert not any(module.training for module in backbone.modules())
        assert backbone.train() is backbone
    assert not backbone(images(family))[0].requires_grad


@pytest.mark.parametrize("family", ["resnet", "cifar_resnet"])
def test_batch_norm_is_not_updated_in_train_mode(family):
    backbone = cut(family)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    assert any("running_mean" in key for key in before)
    parent = nn.Sequential(backbone).train()
    assert parent.training
    parent(images(family) + 5)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_no_dropout_or_drop_path_in_train_mode():
    rates = dict.fromkeys(("drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"), 0.5)
    model, x = timm.create_model("test_vit", img_size=48, num_classes=7, **rates), images("vit")
    expected = model.eval()(x)
    assert not torch.equal(model.train()(x), expected)
    backbone = cut("vit", model)
    backbone.train()
    torch.testing.assert_close(backbone(x)[-1], expected, atol=1e-6, rtol=1e-6)


# Families.


def test_a_registered_class_serves_its_subclasses():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])

    @register_family(Net)
    class NetBackbone(StagedBackbone):
        num_blocks = 2

        def embed(self, pixel_values):
            return {"map": pixel_values}

        def block(self, i, state):
            return {"map": self.model.layers[i](state["map"])}

        def feature_map(self, state):
            return state["map"], None

        def finish(self, state, pre_logits=False):
            return state["map"].mean((2, 3))

    class Child(Net):
        pass

    model = Child()
    backbone, x = staged_backbone(model, image_size=5), torch.randn(2, 3, 5, 5)
    assert isinstance(backbone, NetBackbone) and backbone.exit_dims == (3, 3)
    torch.testing.assert_close(backbone(x)[1], nn.Sequential(*model.layers)(x).mean((2, 3)))
    with pytest.raises(ValueError, match=r"^Expected a backbone of one of the classes .*'T2TViT'.*, but got Linear\.$"):
        staged_backbone(nn.Linear(2, 2), image_size=5)


# select


def test_select_keeps_rows_of_every_tensor_in_order():
    x = torch.arange(10.0).view(5, 2)
    rows = torch.tensor([3, 0])
    tree = {"a": x, "b": [x + 1, None], "c": (x[:, 0], (x,))}
    kept = select(tree, rows)
    assert torch.equal(kept["a"], x[[3, 0]]) and torch.equal(kept["b"][0], x[[3, 0]] + 1) and kept["b"][1] is None
    assert isinstance(kept["b"], list) and isinstance(kept["c"], tuple)
    assert torch.equal(kept["c"][0], torch.tensor([6.0, 0.0])) and torch.equal(kept["c"][1][0], x[[3, 0]])
    assert select(x, rows[:0]).shape == (0, 2)


def test_select_keeps_named_tuples():
    State = namedtuple("State", ["tokens", "rope"])
    kept = select(State(torch.arange(4), None), torch.tensor([2]))
    assert type(kept) is State and kept.tokens.tolist() == [2] and kept.rope is None


@pytest.mark.parametrize("leaf", [3, "rows", {1, 2}])
def test_select_refuses_other_states(leaf):
    with pytest.raises(ValueError, match=rf"^Expected a state of tensors, .*, but got {type(leaf).__name__}\.$"):
        select((torch.zeros(2), leaf), torch.tensor([0]))


# Mistakes.


@pytest.mark.parametrize("stages", [[0, 6], [5, 6], [-1, 5], [0, 0, 5], [5, 5], [], [3, 1, 5], [5, 0], [0, 4], [4]])
def test_exits_must_rise_and_end_at_the_last_block(stages):
    message = r"^Expected exit_stages to be a list of rising block numbers from 0 to 5, .*, but got \[.*\]\.$"
    with pytest.raises(ValueError, match=message):
        cut("vit", exit_stages=stages)


@pytest.mark.parametrize(
    ("family", "pooling", "message"),
    [
        ("vit", ["avg4"], r"^Expected grids that fit the 3 x 3 map of exit 1, but got \('avg4',\)\.$"),
        ("vit", [["cls"]] * 4 + [["max1", "avg4"]], r"^Expected grids that fit the 3 x 3 map of exit 5, but got .*\.$"),
        ("resnet", ["cls"], r"^Expected a backbone with a class token for the statistic 'cls' at exit 1\.$"),
        ("vit_reg_gap", [["avg1"]] * 6 + [["cls"]], r"^Expected a backbone with a class token .*'cls' at exit 7\.$"),
        ("vit", [["cls"]] * 4, r"^Expected exit_pooling to be one list or 5 lists, one per exit .*, but got 4\.$"),
        ("vit", [["cls"]] * 6, r"^Expected exit_pooling to be one list or 5 lists, one per exit .*, but got 6\.$"),
        ("vit", "poor", r"^Expected exit_pooling to be 'plain', 'rich' or a list of names, but got 'poor'\.$"),
        ("vit", [], r"^Expected exit_pooling to name some of .*, each once, but got \[\]\.$"),
        ("vit", ["avg3"], r"^Expected exit_pooling to name some of .*, each once, but got \['avg3'\]\.$"),
        ("vit", ["cls", "cls"], r"^Expected exit_pooling to name some of .*, each once, but got \['cls', 'cls'\]\.$"),
    ],
)
def test_pooling_that_the_exits_cannot_do(family, pooling, message):
    with pytest.raises(ValueError, match=message):
        cut(family, exit_pooling=pooling)


@pytest.mark.parametrize("shape", [(2, 3, 32, 32), (2, 3, 48, 32), (2, 1, 48, 48), (3, 48, 48), (2, 2, 3, 48, 48)])
def test_images_must_have_the_size_and_channels_that_were_said(shape):
    message = r"^Expected pixel_values of shape \(batch, 3, 48, 48\), but got \([^\n]*\); resize with [^\n]*\.$"
    with pytest.raises(ValueError, match=message):
        tiny()(torch.zeros(shape))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("vit", {"image_size": 40}),
        ("vit", {"image_size": 48, "num_channels": 1}),
        ("vit_tiny", {"image_size": 48}),
        ("t2t_vit", {"image_size": 48}),
        ("cifar_resnet", {"image_size": 32, "num_channels": 4}),
    ],
)
def test_a_size_or_channels_that_the_network_cannot_take(family, options):
    message = (
        r"^Expected an image_size and num_channels that the backbone can take, but got \d+ px, \d channels: "
        r"|^Expected images of shape \(batch, 3, 32, 32\) but got \(1, 3, 48, 48\)\.$"
    )
    with pytest.raises(ValueError, match=message):
        staged_backbone(network(family), **options)


def test_another_number_of_channels():
    model = timm.create_model("resnet20_cifar", in_chans=1)
    backbone = staged_backbone(model, image_size=30, num_channels=1)
    assert backbone.map_shapes[0] == (16, 30, 30) and backbone.map_shapes[-1] == (64, 8, 8)
    with pytest.raises(ValueError, match=r"of shape \(batch, 1, 30, 30\)"):
        backbone(torch.zeros(1, 3, 30, 30))
