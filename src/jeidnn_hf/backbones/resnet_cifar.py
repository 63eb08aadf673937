"""ResNets for 32 x 32 images (He et al., 2015, Sec. 4.2, https://arxiv.org/abs/1512.03385), for timm.

Importing this module registers ``resnet20_cifar``, ``resnet32_cifar``, ``resnet44_cifar`` and ``resnet56_cifar``.
Shortcuts carry no parameters (option A of the paper).
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch.nn.functional as F
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .staged import StagedBackbone, register_family


def shortcut(x: Tensor, channels: int, stride: int) -> Tensor:
    """Option A: keep every ``stride``-th pixel and add zero channels, half before and half after x.

    ``(B, C, H, W) -> (B, channels, ceil(H / stride), ceil(W / stride))``; nothing changes at stride 1 and equal width.
    """
    before = (channels - x.shape[1]) // 2
    after = channels - x.shape[1] - before
    return F.pad(x[:, :, ::stride, ::stride], (0, 0, 0, 0, before, after))


class CifarBlock(nn.Module):
    """Two 3 x 3 convolutions and an option-A shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, H, W) -> (B, channels, ceil(H / stride), ceil(W / stride))."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(out + shortcut(x, self.channels, self.stride))


class CifarResNet(nn.Module):
    """Three stages of 16, 32 and 64 channels, each of (depth - 2) / 6 blocks, for images of any size.

    Args:
        depth: weighted layers, 6 n + 2.
        in_chans: channels of the input images.
        num_classes: size of the classifier; 0 for none.
        drop_rate: dropout before the classifier.
    """

    def __init__(self, depth: int = 20, in_chans: int = 3, num_classes: int = 10, drop_rate: float = 0.0) -> None:
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"Expected depth to be 6 n + 2 with n >= 1 but got {depth}.")
        self.in_chans, self.num_classes, self.num_features = in_chans, num_classes, 64
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, 1, depth // 6)
        self.layer2 = _stage(16, 32, 2, depth // 6)
        self.layer3 = _stage(32, 64, 2, depth // 6)
        self.head_drop = nn.Dropout(drop_rate)
        self.linear = nn.Linear(64, num_classes) if num_classes > 0 else nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> the first block's input (B, 16, H, W)."""
        return F.relu(self.bn1(self.conv1(x)))

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> feature map (B, 64, ceil(H / 4), ceil(W / 4))."""
        return self.layer3(self.layer2(self.layer1(self.embed(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Feature map (B, 64, H, W) -> logits (B, num_classes), or pooled features (B, 64) if ``pre_logits``."""
        x = self.head_drop(x.mean((2, 3)))
        return x if pre_logits else self.linear(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.linear

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the final layer by a new one; ``num_classes=0`` removes it. Only the average is ever pooled."""
        if global_pool not in (None, "avg"):
            raise ValueError(f"Expected global_pool to be 'avg' but got {global_pool!r}.")
        self.num_classes = num_classes
        self.linear = nn.Linear(64, num_classes) if num_classes > 0 else nn.Identity()
        self.linear.to(self.conv1.weight)


def _stage(in_channels: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
    first = CifarBlock(in_channels, channels, stride)
    return nn.Sequential(first, *(CifarBlock(channels, channels) for _ in range(blocks - 1)))


_CFG = {"input_size": (3, 32, 32), "pool_size": (8, 8), "crop_pct": 1.0, "interpolation": "bilinear"}
_CFG |= {"num_classes": 10, "first_conv": "conv1", "classifier": "linear", "paper_ids": "arXiv:1512.03385"}
default_cfgs = generate_default_cfgs({f"resnet{depth}_cifar": _CFG for depth in (20, 32, 44, 56)})


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """CIFAR ResNet of 20 layers: 9 blocks."""
    return build_model_with_cfg(CifarResNet, "resnet20_cifar", pretrained, depth=20, **kwargs)


@register_model
def resnet32_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """CIFAR ResNet of 32 layers: 15 blocks."""
    return build_model_with_cfg(CifarResNet, "resnet32_cifar", pretrained, depth=32, **kwargs)


@register_model
def resnet44_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """CIFAR ResNet of 44 layers: 21 blocks."""
    return build_model_with_cfg(CifarResNet, "resnet44_cifar", pretrained, depth=44, **kwargs)


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """CIFAR ResNet of 56 layers: 27 blocks."""
    return build_model_with_cfg(CifarResNet, "resnet56_cifar", pretrained, depth=56, **kwargs)


@register_family(CifarResNet)
class CifarResNetBackbone(StagedBackbone):
    """An exit after every block; the state is the map ``(B, C, H, W)``."""

    channels_last = True

    @cached_property
    def _blocks(self) -> list[nn.Module]:
        return [*self.model.layer1, *self.model.layer2, *self.model.layer3]

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def embed(self, pixel_values: Tensor) -> Tensor:
        return self.model.embed(pixel_values)

    def block(self, i: int, state: Tensor) -> Tensor:
        return self._blocks[i](state)

    def feature_map(self, state: Tensor) -> tuple[Tensor, None]:
        return state, None

    def finish(self, state: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(state, pre_logits=pre_logits)
