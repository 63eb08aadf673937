"""Networks without a view of their own: recorded, cut behind their blocks, and refused where that would be wrong."""

from __future__ import annotations

import copy
import pickle
from functools import lru_cache, partial
from types import SimpleNamespace

import pytest
import timm
import torch
from torch import Tensor, nn

from jeidnn_hf.backbones import build_model, select, staged_backbone
from jeidnn_hf.backbones.timm_generic import TracedBackbone, find_layout
from networks import assert_close, assert_surviving_rows_go_on, images_of, spread_out

SMALL_SWIN = {"depths": (1, 1, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 3, 6), "window_size": 4}
CASES = {  # model, image size, options, exits, channels at the first exit, tensors in each state
    "densenet": ("densenet121", 64, {"growth_rate": 8, "block_config": (2, 2, 2, 2)}, 7, 32, [1] * 7),
    "inception_v3": ("inception_v3", 80, {}, 5, 64, [1] * 5),
    "edgenext": ("edgenext_xx_small", 64, {}, 4, 24, [1] * 4),
    "ghostnet": ("ghostnet_050", 64, {}, 10, 8, [1] * 10),
    "rexnet": ("rexnet_100", 64, {}, 17, 16, [1] * 17),
    "starnet": ("starnet_s050", 64, {}, 4, 16, [1] * 4),
    "vit_relpos": ("test_vit_relpos", 64, {}, 9, 96, [1] * 9),
    "mixer": ("gmlp_ti16_224", 64, {}, 30, 128, [1] * 30),
    "xcit": ("xcit_nano_12_p8_224", 64, {"depth": 3}, 3, 128, [1] * 3),
    "cait": ("cait_xxs24_224", 64, {"depth": 3}, 3, 192, [1] * 3),
    "coatnet": ("test_coatnet", 64, {}, 4, 32, [1] * 4),
    "channels_last": ("swinv2_tiny_window8_256", 64, SMALL_SWIN, 4, 24, [1] * 4),
    "levit": ("levit_128s", 64, {}, 3, 128, [1] * 3),
    "twins": ("twins_svt_small", 64, {"depths": (1, 1, 1, 1)}, 4, 64, [1] * 4),
    "pit": ("pit_ti_224", 64, {}, 3, 64, [2] * 3),  # a map and a class token
    "selecsls": ("selecsls42", 64, {}, 6, 64, [2] * 6),  # lists with skips
    "tnt": ("tnt_s_legacy_patch16_224", 64, {"depth": 3}, 3, 384, [2, 2, 1]),  # 16 inner tokens a patch, flattened
    "hrnet": ("hrnet_w18_small", 64, {}, 3, 16, [2, 3, 4]),  # lists that the model changes
    "coat": ("coat_tiny", 64, {"serial_depths": (1, 1, 1, 1), "parallel_depth": 1}, 4, 152, [1, 2, 3, 4]),
    "mambaout": ("test_mambaout", 64, {}, 4, 16, [1] * 4),
    "dla": ("dla46x_c", 64, {}, 6, 16, [1] * 6),
    "focalnet": ("focalnet_tiny_srf", 64, {}, 4, 96, [1] * 4),
    "pvt": ("pvt_v2_b0", 64, {}, 4, 32, [1] * 4),
    "nfnet": ("test_nfnet", 64, {}, 4, 32, [1] * 4),
    "efficientvim": ("efficientvim_m1", 64, {}, 3, 128, [3, 4, 5]),  # every stage's hidden state goes to the head
}
WITH_INTERMEDIATES = "edgenext starnet xcit cait mixer channels_last levit pit tnt".split()

cases = pytest.mark.parametrize("case", CASES)


def build(case: str, **options) -> nn.Module:
    name, size, own, *_ = CASES[case]
    return spread_out(build_model(name, image_size=size, **({"num_classes": 7} | own | options)))


@lru_cache
def cut(case: str) -> TracedBackbone:
    return staged_backbone(build(case), image_size=CASES[case][1])


def images(case: str, batch: int = 4) -> Tensor:
    return images_of(CASES[case][1], batch)


# The pieces are the network.


@cases
@torch.no_grad()
def test_chained_stages_are_the_models_forward(case):
    *_, exits, channels, _ = CASES[case]
    backbone = cut(case)
    assert type(backbone) is TracedBackbone and backbone.num_exits == len(backbone.exit_modules) == exits
    assert backbone.map_shapes[0][0] == channels
    for batch in (4, 1):
        x = images(case, batch)
        expected = backbone.model(x)
        assert batch == 1 or expected.std(0).min() > 1e-4 * expected.abs().max()  # the images differ in their logits
        assert_close(backbone(x)[-1], expected, 1e-6)


@cases
@torch.no_grad()
def test_surviving_rows_go_on_as_if_nobody_had_left(case):
    assert_surviving_rows_go_on(cut(case), images(case, 6), partial(assert_close, share=1e-4))


@cases
@torch.no_grad()
def test_a_state_is_tensors_with_one_row_per_image_and_can_be_used_again(case):
    backbone, x = cut(case), images(case, 2)
    state, sizes = backbone.stem(x), []
    for l in range(backbone.num_exits):
        before = select(state, torch.arange(2))
        again = backbone.stage(l, select(state, torch.tensor([1, 0, 1])))
        state = backbone.stage(l, before)
        for tensor, other in zip(state, again, strict=True):
            assert isinstance(tensor, Tensor) and len(tensor) == 2
            assert_close(other[[1, 0]], tensor, 1e-5)
        sizes.append(len(state))
        if l < backbone.num_exits - 1:
            assert backbone.hidden_state(state).shape[1:] == backbone._pieces.shapes[l]
    assert sizes == CASES[case][-1]


@cases
@torch.no_grad()
def test_frozen_to_the_bit_in_train_mode(case):
    backbone, x = cut(case), images(case, 2)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    expected = backbone(x)[-1]
    nn.Sequential(backbone).train()(x + 5)
    assert torch.equal(backbone(x)[-1], expected)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


@pytest.mark.parametrize("case", ["densenet", "ghostnet", "vit_relpos", "channels_last", "pit", "hrnet", "coat"])
@torch.no_grad()
def test_without_its_native_head_the_last_exit_gives_the_classifiers_input(case):
    x, headless, model = images(case, 2), build(case, num_classes=0), build(case)
    assert_close(staged_backbone(headless, image_size=CASES[case][1], native_head=False)(x)[-1], headless(x), 1e-6)
    z = staged_backbone(model, image_size=CASES[case][1], native_head=False)(x)[-1]
    assert_close(z, model.forward_head(model.forward_features(x), pre_logits=True), 1e-6)


@torch.no_grad()
def test_a_view_cut_for_logits_has_no_other_end():
    backbone = cut("starnet")
    state = backbone.stem(images("starnet"))
    for l in range(backbone.num_exits):
        state = backbone.stage(l, state)
    with pytest.raises(ValueError, match="^Expected pre_logits=False, as the view was cut, but got True"):
        backbone.finish(state, pre_logits=True)


# What an exit sees.


@pytest.mark.parametrize("case", WITH_INTERMEDIATES)
@torch.no_grad()
def test_maps_are_what_timm_calls_the_intermediate_features(case):
    backbone, x = cut(case), images(case, 2)
    norm = {"norm": True} if case in {"xcit", "cait", "mixer", "tnt"} else {}
    expected, state = backbone.model.forward_intermediates(x, intermediates_only=True, **norm), backbone.stem(x)
    assert len(expected) == backbone.num_exits
    for l, feature in enumerate(expected):
        state = backbone.stage(l, state)
        found, token = backbone.feature_map(state)
        torch.testing.assert_close(found, feature, atol=1e-5, rtol=1e-5)
        assert (token is not None) == backbone.has_class_token == (case == "tnt")


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((2, 8, 4, 4), "nchw"), ((2, 4, 4, 8), "nhwc"), ((2, 21, 8), 5), ((2, 16, 8), 0), ((2, 17, 8), 1)]
    + [((1, 8, 8, 8), "nchw"), ((2, 8), None), ((2, 3, 8), None), ((2, 4, 5, 6), None), ((2,), None)],
)
def test_layouts(shape, layout):
    assert find_layout(SimpleNamespace(num_prefix_tokens=5), shape) == layout
    if shape == (1, 8, 8, 8):
        assert find_layout(SimpleNamespace(output_fmt="NHWC"), shape) == "nhwc"


def test_several_batches_in_flight():
    backbone, x, y = cut("hrnet"), images("hrnet", 3), images("hrnet", 2) + 1
    with torch.no_grad():
        expected = [backbone.model(batch) for batch in (x, y)]
        states = [backbone.stem(batch) for batch in (x, y)]
        for l in range(backbone.num_exits):
            states = [backbone.stage(l, state) for state in states]
        for state, logits in zip(states, expected, strict=True):
            assert_close(backbone.finish(state), logits, 1e-6)


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes_reach_every_stage(mode):
    backbone, x = cut("xcit"), images("xcit", 2)
    with mode():
        logits, expected = backbone(x)[-1], backbone.model(x)
    assert logits.dtype == expected.dtype and logits.is_inference() == expected.is_inference()
    assert torch.equal(logits, expected)


@torch.no_grad()
def test_copies_and_pickles_are_cut_again():
    backbone, x = cut("channels_last"), images("channels_last", 2)
    expected = backbone(x)[-1]
    for other in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert torch.equal(other(x)[-1], expected) and other.exit_modules == backbone.exit_modules
    other.model.head.fc.bias.add_(1)
    torch.testing.assert_close(other(x)[-1], expected + 1)


@torch.no_grad()
def test_other_weights_and_precisions_are_those_of_the_model():
    backbone, x = staged_backbone(build("pit"), image_size=64), images("pit", 2)
    backbone.model.load_state_dict({key: value * 0.5 for key, value in backbone.model.state_dict().items()})
    assert torch.equal(backbone(x)[-1], backbone.model(x))
    backbone.double()
    assert torch.equal(backbone(x.double())[-1], backbone.model(x.double()))


def test_nothing_is_left_behind_in_the_model():
    model = build("starnet")
    before, keys = dict(model.__dict__), set(model.state_dict())
    backbone = staged_backbone(model, image_size=64)
    assert set(model.__dict__) == set(before) and set(model.state_dict()) == keys
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert set(backbone.state_dict()) == {f"model.{key}" for key in keys}


# Refused.


class Net(nn.Module):
    """A network of timm's kind: four blocks on maps."""

    num_classes = 7
    feature_info = ()

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, stride=4)
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Tanh()) for _ in range(4)))
        self.head = nn.Linear(8, 7)

    def forward_features(self, x):
        return self.run_blocks(self.stem(x))

    def run_blocks(self, x):
        return self.blocks(x)

    def forward_head(self, x, pre_logits=False):
        x = x.mean((2, 3))
        return x if pre_logits else self.head(x)

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


class MixesSamples(Net):
    def run_blocks(self, x):
        for block in self.blocks:
            x = block(x - x.mean(0, keepdim=True))
        return x


class BranchesOnTheBatch(Net):
    def run_blocks(self, x):
        return self.blocks(x) if x.shape[0] % 2 else self.blocks(-x)


class BranchesOnSamples(Net):
    def run_blocks(self, x):
        return self.blocks(x if x.mean() > 0 else -x)


class RunsTwice(Net):
    def run_blocks(self, x):
        return self.blocks(self.blocks(x))


class LoopsOverSamples(Net):
    def run_blocks(self, x):
        return torch.stack([self.blocks(row[None])[0] for row in x])


class CarriesTheBatch(Net):
    def run_blocks(self, x):
        mean = x.mean()
        return self.blocks(x) + mean


class BatchSecond(Net):
    def run_blocks(self, x):
        x = x.flatten(2).permute(2, 0, 1)
        for block in self.blocks:
            x = x + block[1](x)
        return x.permute(1, 2, 0).unflatten(2, (8, 8))


class HasNoBlocks(Net):
    def __init__(self):
        super().__init__()
        self.trunk = self._modules.pop("blocks")

    def run_blocks(self, x):
        return self.trunk(x)


@torch.no_grad()
def test_a_network_of_ones_own():
    model = spread_out(Net())
    backbone, x = staged_backbone(model, image_size=32), torch.randn(5, 3, 32, 32)
    assert backbone.exit_modules == ("blocks.0", "blocks.1", "blocks.2", "blocks.3")
    assert torch.equal(backbone(x)[-1], model(x)) and backbone.exit_dims == (8, 8, 8, 7)


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        (MixesSamples, "what stays behind 'blocks.0' changes when other samples leave"),
        (BranchesOnTheBatch, "its code branches on the samples or on their number"),
        (BranchesOnSamples, "its code branches on the samples or on their number"),
        (RunsTwice, "'blocks.3' runs 2 times"),
        (LoopsOverSamples, "its code counts the samples of a batch"),
        (CarriesTheBatch, "what follows 'blocks.3' reads a tensor of shape () (mean) without rows for single samples"),
        (BatchSecond, "none of its blocks runs"),
        (HasNoBlocks, "it has no blocks that timm names"),
    ],
)
def test_what_cannot_lose_samples_is_refused_with_the_reason(network, reason):
    with pytest.raises(ValueError) as error:
        staged_backbone(spread_out(network()), image_size=32)
    expected = f"Expected a network that can lose samples on its way, but got {network.__name__}: {reason}."
    assert str(error.value) == expected


def test_an_image_size_that_the_network_cannot_take():
    with pytest.raises(ValueError, match="^Expected an image_size and num_channels that the backbone can take, but"):
        staged_backbone(timm.create_model("gmlp_ti16_224"), image_size=64)
