"""CIFAR ResNets: the option-A shortcut, layout, and (optionally) the public ResNet-56 weights."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file

from jeidnn_hf.backbones.resnet_cifar import CifarBlock, CifarResNet, shortcut


def slow_shortcut(x: np.ndarray, channels: int, stride: int) -> np.ndarray:
    batch, width, height, length = x.shape
    out = np.zeros((batch, channels, -(-height // stride), -(-length // stride)), x.dtype)
    for b, c, i, j in np.ndindex(batch, width, *out.shape[2:]):
        out[b, c + (channels - width) // 2, i, j] = x[b, c, i * stride, j * stride]
    return out


@pytest.mark.parametrize(
    ("channels", "stride", "size"), [(4, 1, (4, 4)), (8, 2, (8, 6)), (8, 2, (7, 5)), (4, 2, (4, 4)), (9, 3, (7, 7))]
)
def test_shortcut_subsamples_and_pads_channels(channels, stride, size):
    x = torch.randn(2, 4, *size)
    np.testing.assert_array_equal(shortcut(x, channels, stride), slow_shortcut(x.numpy(), channels, stride))


@torch.no_grad()
def test_block_with_silent_convolutions_is_the_rectified_shortcut():
    block, x = CifarBlock(4, 8, stride=2).eval(), torch.randn(2, 4, 6, 6)
    block.bn2.weight.zero_()
    expected = np.maximum(slow_shortcut(x.numpy(), 8, 2), 0)
    np.testing.assert_array_equal(block(x), expected)


@pytest.mark.parametrize("depth", [20, 32, 44, 56])
def test_registered_depths(depth):
    assert f"resnet{depth}_cifar" in timm.list_models("resnet*cifar")
    model = timm.create_model(f"resnet{depth}_cifar")
    weighted = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(weighted) == depth
    assert model.num_classes == 10 and model.default_cfg["input_size"] == (3, 32, 32)


def test_resnet56_layout():
    state = timm.create_model("resnet56_cifar").state_dict()
    assert sum(v.numel() for k, v in state.items() if not k.endswith("num_batches_tracked")) == 857_082
    stems = {key.rsplit(".", 1)[0] for key in state}
    layers = ("conv1", "bn1", "conv2", "bn2")
    blocks = {f"layer{s}.{i}.{layer}" for s in (1, 2, 3) for i in range(9) for layer in layers}
    assert stems == blocks | {"conv1", "bn1", "linear"}


@pytest.mark.parametrize(("size", "features"), [((32, 32), (8, 8)), ((64, 48), (16, 12)), ((30, 33), (8, 9))])
@torch.no_grad()
def test_any_image_size(size, features):
    model, x = timm.create_model("resnet20_cifar").eval(), torch.randn(2, 3, *size)
    half = tuple(-(-side // 2) for side in size)
    hidden, shapes = model.embed(x), []
    for stage in (model.layer1, model.layer2, model.layer3):
        hidden = stage(hidden)
        shapes.append(tuple(hidden.shape[1:]))
    assert shapes == [(16, *size), (32, *half), (64, *features)]
    torch.testing.assert_close(model.forward_features(x), hidden)
    torch.testing.assert_close(model(x), model.linear(hidden.flatten(2).mean(-1)))


@torch.no_grad()
def test_classifier_can_be_replaced_and_removed():
    model, x = timm.create_model("resnet20_cifar", num_classes=7, in_chans=1).eval(), torch.randn(2, 1, 32, 32)
    features = model.forward_head(model.forward_features(x), pre_logits=True)
    assert features.shape == (2, model.num_features) == (2, 64)
    torch.testing.assert_close(model(x), model.get_classifier()(features))
    model.double().reset_classifier(4)
    assert model(x.double()).shape == (2, model.num_classes) == (2, 4)
    model.float().reset_classifier(0)
    torch.testing.assert_close(model(x), features)
    with pytest.raises(ValueError, match="Expected global_pool to be 'avg' but got 'max'"):
        model.reset_classifier(4, "max")


@pytest.mark.parametrize("depth", [2, 18, 51])
def test_depth_must_be_six_n_plus_two(depth):
    with pytest.raises(ValueError, match=f"Expected depth to be 6 n \\+ 2 with n >= 1 but got {depth}"):
        CifarResNet(depth)


@pytest.mark.skipif("JEIDNN_WEIGHTS_DIR" not in os.environ, reason="set JEIDNN_WEIGHTS_DIR to check the real weights")
@torch.no_grad()
def test_public_resnet56_weights_load_strictly():
    """The logits are those of the run that scored 93.39 % on the CIFAR-10 test images."""
    state = load_file(Path(os.environ["JEIDNN_WEIGHTS_DIR"]) / "resnet56_cifar10.safetensors")
    model = timm.create_model("resnet56_cifar").eval()
    model.load_state_dict(state, strict=True)
    logits = model(torch.linspace(-2, 2, 3072).view(1, 3, 32, 32))[0]
    expected = [3.9500, -3.0633, 6.5524, 0.2858, 0.1814, -0.8510, 0.1660, -1.6786, -1.0420, -4.5273]
    np.testing.assert_allclose(logits, expected, atol=1e-3)
