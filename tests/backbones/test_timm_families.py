"""timm's families with a view of their own: the model's own forward in pieces, an exit after every block."""

from __future__ import annotations

from functools import lru_cache, partial

import pytest
import timm
import torch
from torch import Tensor, nn

from jeidnn_hf.backbones import StagedBackbone, build_model, staged_backbone
from networks import assert_close, assert_surviving_rows_go_on, images_of, spread_out

SMALL_SWIN = {"depths": (1, 2, 2, 1), "embed_dim": 24, "num_heads": (1, 2, 3, 6)}
CASES = {  # view, model, image size, options, blocks, channels of the first and of the last block
    "eva02": ("Eva", "eva02_tiny_patch14_224", 56, {"depth": 4}, 4, 192, 192),
    "eva_dinov3": ("Eva", "vit_small_patch16_dinov3", 64, {"depth": 4}, 4, 384, 384),
    "eva_rope_mixed": ("Eva", "vit_small_patch16_rope_mixed_224", 64, {"depth": 4}, 4, 384, 384),
    "eva_dynamic": ("Eva", "vit_small_patch16_rope_224", 64, {"depth": 4, "dynamic_img_size": True}, 4, 384, 384),
    "beit": ("Beit", "beit_base_patch16_224", 64, {"depth": 3, "embed_dim": 192}, 3, 192, 192),
    "beit_shared": ("Beit", "beitv2_base_patch16_224", 64,
                    {"depth": 3, "embed_dim": 192, "use_rel_pos_bias": False, "use_shared_rel_pos_bias": True,
                     "use_abs_pos_emb": True}, 3, 192, 192),
    "hiera": ("Hiera", "hiera_tiny_224", 64, {"stages": (1, 2, 2, 1), "embed_dim": 24}, 6, 24, 192),
    "swin": ("Swin", "swin_tiny_patch4_window7_224", 56, SMALL_SWIN, 6, 24, 192),
    "efficientnet_lite": ("EfficientNet", "tf_efficientnet_lite0", 64, {}, 16, 16, 320),
    "mobilenetv2": ("EfficientNet", "mobilenetv2_100", 64, {}, 17, 16, 320),
    "mobilenetv3": ("MobileNetV3", "mobilenetv3_small_050", 64, {}, 12, 8, 288),
    "mobilenetv4": ("MobileNetV3", "mobilenetv4_conv_small_050", 64, {}, 17, 16, 480),
    "convnext": ("ConvNeXt", "convnext_atto", 64, {"depths": (2, 2, 3, 2)}, 9, 40, 320),
    "convnextv2": ("ConvNeXt", "convnextv2_atto", 64, {"depths": (1, 2, 2, 1)}, 6, 40, 320),
    "efficientformer_v2": ("EfficientFormerV2", "efficientformerv2_s0", 64, {}, 14, 32, 176),
    "repvit": ("RepVit", "repvit_m0_9", 64, {"depth": (1, 2, 3, 1)}, 7, 48, 384),
    "byobnet": ("ByobNet", "test_byobnet", 64, {}, 4, 32, 256),
    "mobilevit": ("ByobNet", "mobilevit_xxs", 64, {}, 10, 16, 80),
    "regnet": ("RegNet", "regnetx_002", 64, {}, 13, 24, 368),
    "resnest": ("ResNet", "resnest14d", 64, {}, 4, 256, 2048),
    "res2net": ("ResNet", "res2net50_14w_8s", 64, {"layers": (1, 2, 2, 1)}, 6, 256, 2048),
}  # fmt: skip
TOKENS = {"Eva", "Beit"}

cases = pytest.mark.parametrize("case", CASES)


def build(case: str, **options) -> nn.Module:
    _, name, size, own, *_ = CASES[case]
    return spread_out(build_model(name, image_size=size, **({"num_classes": 7} | own | options)))


@lru_cache
def cut(case: str) -> StagedBackbone:
    return staged_backbone(build(case), image_size=CASES[case][2])


def images(case: str, batch: int = 4) -> Tensor:
    return images_of(CASES[case][2], batch)


@cases
@torch.no_grad()
def test_chained_stages_are_the_models_forward(case):
    backbone, x = cut(case), images(case)
    expected = backbone.model(x)
    assert expected.std(0).min() > 1e-4 * expected.abs().max()  # the images differ in their logits
    torch.testing.assert_close(backbone(x)[-1], expected, atol=1e-5, rtol=0)


@cases
def test_an_exit_after_every_block(case):
    view, _, _, _, blocks, *_ = CASES[case]
    backbone = cut(case)
    assert type(backbone).__name__ == f"{view}Backbone"
    assert backbone.num_exits == backbone.num_blocks == blocks


@cases
@torch.no_grad()
def test_surviving_rows_go_on_as_if_nobody_had_left(case):
    assert_surviving_rows_go_on(cut(case), images(case, 6), partial(assert_close, share=1e-4))


@cases
@torch.no_grad()
def test_maps_are_what_timm_calls_the_intermediate_features(case):
    backbone, x = cut(case), images(case, 2)
    state, maps = backbone.stem(x), []
    for l in range(backbone.num_exits):
        state = backbone.stage(l, state)
        maps.append(backbone.feature_map(state)[0])
    *_, first, last = CASES[case]
    assert (maps[0].shape[1], maps[-1].shape[1]) == (first, last)
    assert backbone.map_shapes == tuple(tuple(m.shape[1:]) for m in maps[:-1])
    norm = {"norm": True} if CASES[case][0] in TOKENS and not isinstance(backbone.model.norm, nn.Identity) else {}
    expected = backbone.model.forward_intermediates(x, intermediates_only=True, **norm)
    if CASES[case][0] in TOKENS and not norm:
        expected = [backbone.model.fc_norm(m.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for m in expected]
    if case in {"mobilenetv3", "mobilenetv4", "byobnet", "mobilevit", "regnet", "resnest", "res2net"}:
        expected = expected[1:]  # the stem's
    if case in {"byobnet", "mobilevit"}:
        expected = expected[:-1]  # timm's is after the last convolution
    for feature in expected:
        assert any(m.shape == feature.shape and torch.allclose(m, feature, atol=1e-5) for m in maps)


@pytest.mark.parametrize("case", ["eva02", "eva_dinov3", "beit"])
@torch.no_grad()
def test_the_class_token_is_the_first_token_after_the_norm(case):
    backbone, x = cut(case), images(case)
    state = backbone.stage(0, backbone.stem(x))
    norm = backbone.model.fc_norm if isinstance(backbone.model.norm, nn.Identity) else backbone.model.norm
    assert backbone.has_class_token and backbone.exit_pooling[0] == ("cls",)
    assert torch.equal(backbone.exit_feature(0, state), norm(state)[:, 0])


@cases
@torch.no_grad()
def test_frozen_to_the_bit_in_train_mode(case):
    backbone, x = staged_backbone(build(case), image_size=CASES[case][2]), images(case, 2)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    expected = backbone(x)[-1]
    nn.Sequential(backbone).train()(x + 5)
    assert torch.equal(backbone(x)[-1], expected)
    assert not any(parameter.requires_grad for parameter in backbone.parameters())
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, before[key]), key


@cases
@torch.no_grad()
def test_without_its_native_head_the_last_exit_gives_the_classifiers_input(case):
    headless, x = build(case, num_classes=0), images(case, 2)
    backbone = staged_backbone(headless, image_size=CASES[case][2], native_head=False, exit_stages=[CASES[case][4] - 1])
    torch.testing.assert_close(backbone(x)[-1], headless(x), atol=1e-5, rtol=1e-5)
    assert backbone.exit_dims == (headless.head_hidden_size,)


def test_an_image_size_that_some_block_cannot_take():
    with pytest.raises(ValueError, match="^Expected an image_size and num_channels that the backbone can take, but"):
        staged_backbone(timm.create_model("efficientformerv2_s0"), image_size=64)
