"""Stem, blocks and head of timm's own families, each checked against the model's forward.

The token models and Swin come first, then the convolutional networks and their hybrids, whose state is one map.
There is an exit after every block; what comes before a stage's first block (its downsampling) runs with that block.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from math import prod

import torch
from timm.models.beit import Beit
from timm.models.byobnet import ByobNet
from timm.models.convnext import ConvNeXt
from timm.models.deit import VisionTransformerDistilled
from timm.models.efficientformer_v2 import EfficientFormerV2
from timm.models.efficientnet import EfficientNet
from timm.models.eva import Eva
from timm.models.hiera import Hiera
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.regnet import RegNet
from timm.models.repvit import RepVit
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .staged import StagedBackbone, register_family, tokens_to_map


@register_family(VisionTransformer, VisionTransformerDistilled)
class VisionTransformerBackbone(StagedBackbone):
    """ViT, DeiT, DINO, ...; the state is the tokens ``(B, N, C)``. An exit reads them after the shared final norm."""

    @property
    def num_blocks(self) -> int:
        return len(self.model.blocks)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches per column and row."""
        return tuple(self.model.patch_embed.dynamic_feat_size((self.image_size, self.image_size)))

    def embed(self, pixel_values: Tensor) -> Tensor:
        model = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixel_values))))

    def block(self, i: int, state: Tensor) -> Tensor:
        return self.model.blocks[i](state)

    def feature_map(self, state: Tensor) -> tuple[Tensor, Tensor | None]:
        norm = self.model.fc_norm if isinstance(self.model.norm, nn.Identity) else self.model.norm
        tokens = norm(state)
        class_token = tokens[:, 0] if getattr(self.model, "cls_token", None) is not None else None
        return tokens_to_map(tokens, self.model.num_prefix_tokens, self.grid), class_token

    def finish(self, state: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(self.model.norm(state), pre_logits=pre_logits)


@register_family(Eva)
class EvaBackbone(VisionTransformerBackbone):
    """EVA, DINOv3, Perception Encoder, ...: a ViT with rotary positions, which have no batch dimension and no state."""

    def embed(self, pixel_values: Tensor) -> Tensor:
        tokens, _ = self.model._pos_embed(self.model.patch_embed(pixel_values))
        return self.model.norm_pre(tokens)

    def block(self, i: int, state: Tensor) -> Tensor:
        return self.model.blocks[i](state, rope=self._positions(i))

    def _positions(self, i: int) -> Tensor | None:
        rope = self.model.rope
        if rope is None:
            return None
        own_grid = hasattr(rope, "feat_shape") and not self.model.dynamic_img_size
        positions = rope.get_embed() if own_grid else rope.get_embed(shape=self.grid)
        return positions[i] if getattr(self.model, "rope_mixed", False) else positions


@register_family(Beit)
class BeitBackbone(VisionTransformerBackbone):
    """BEiT: a ViT whose blocks may share one table of relative position biases."""

    def embed(self, pixel_values: Tensor) -> Tensor:
        model = self.model
        patches = model.patch_embed(pixel_values)
        tokens = torch.cat((model.cls_token.expand(len(patches), -1, -1), patches), dim=1)
        return model.pos_drop(tokens if model.pos_embed is None else tokens + model.pos_embed)

    def block(self, i: int, state: Tensor) -> Tensor:
        bias = self.model.rel_pos_bias
        return self.model.blocks[i](state, shared_rel_pos_bias=None if bias is None else bias())


@register_family(Hiera)
class HieraBackbone(StagedBackbone):
    """Hiera; the state is the tokens ``(B, N, C)`` in an order of its own, which an exit's map has undone."""

    @property
    def num_blocks(self) -> int:
        return len(self.model.blocks)

    def embed(self, pixel_values: Tensor) -> Tensor:
        model = self.model
        return model.unroll(model._pos_embed(model.patch_embed(pixel_values)))

    def block(self, i: int, state: Tensor) -> Tensor:
        return self.model.blocks[i](state)

    def feature_map(self, state: Tensor) -> tuple[Tensor, None]:
        schedule = self.model.reroll.schedule
        same_size = next(i for i, (_, size) in schedule.items() if prod(size) == state.shape[1])
        return self.model.reroll(state, same_size).permute(0, 3, 1, 2), None

    def finish(self, state: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(state, pre_logits=pre_logits)


class ChainBackbone(StagedBackbone):
    """A network whose blocks are chains of modules; the state, an exit's map as well, is one map ``(B, C, H, W)``."""

    channels_last = True

    def chains(self) -> Iterable[tuple[nn.Module, ...]]:
        """The modules of each block in turn."""
        raise NotImplementedError

    @cached_property
    def _chains(self) -> list[tuple[nn.Module, ...]]:
        return list(self.chains())

    @property
    def num_blocks(self) -> int:
        return len(self._chains)

    def embed(self, pixel_values: Tensor) -> Tensor:
        return self.model.stem(pixel_values)

    def block(self, i: int, state: Tensor) -> Tensor:
        for module in self._chains[i]:
            state = module(state)
        return state

    def feature_map(self, state: Tensor) -> tuple[Tensor, None]:
        return state, None

    def finish(self, state: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(state, pre_logits=pre_logits)


def _children(stages: Iterable[nn.Module]) -> Iterable[tuple[nn.Module, ...]]:
    """Stages that are their blocks one after the other."""
    return ((block,) for stage in stages for block in stage.children())


def _downsampled(stages: Iterable[nn.Module]) -> Iterable[tuple[nn.Module, ...]]:
    """Stages with a ``downsample`` before their ``blocks``."""
    for stage in stages:
        first, *others = stage.blocks
        yield stage.downsample, first
        yield from ((block,) for block in others)


@register_family(SwinTransformer)
class SwinBackbone(ChainBackbone):
    """Swin; the state is the map with its channels last, ``(B, H, W, C)``."""

    channels_last = False

    def chains(self) -> Iterable[tuple[nn.Module, ...]]:
        return _downsampled(self.model.layers)

    def embed(self, pixel_values: Tensor) -> Tensor:
        return self.model.patch_embed(pixel_values)

    def feature_map(self, state: Tensor) -> tuple[Tensor, None]:
        return state.permute(0, 3, 1, 2), None

    def finish(self, state: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(self.model.norm(state), pre_logits=pre_logits)


@register_family(ResNet)
class ResNetBackbone(ChainBackbone):
    """ResNet and its kin (ResNeSt, Res2Net, SKNet, ...)."""

    def chains(self) -> Iterable[tuple[nn.Module, ...]]:
        return _children(getattr(self.model, f"layer{i}") for i in (1, 2, 3, 4))

    def embed(self, pixel_values: Tensor) -> Tensor:
        model = self.model
        return model.maxpool(model.act1(model.bn1(model.conv1(pixel_values))))


@register_family(MobileNetV3)
class MobileNetV3Backbone(ChainBackbone):
    """MobileNetV3 and V4, LCNet, FBNetV3, HardCoRe-NAS."""

    def chains(self) -> Iterable[tuple[nn.Module, ...]]:
        return _children(self.model.blocks)

    def embed(self, pixel_values: Tensor) -> Tensor:
        return self.model.bn1(self.model.conv_stem(pixel_values))


@register_family(EfficientNet)
class EfficientNetBackbone(MobileNetV3Backbone):
    """EfficientNet, EfficientNet-Lite, MobileNetV2, MNASNet, ...: a last convolution before the pooling."""

    def finish(self, state: Tensor, pre_logits: bool = False) -> Tensor:
        model = self.model
        return model.forward_head(model.bn2(model.conv_head(state)), pre_logits=pre_logits)


@register_family(ConvNeXt)
class ConvNeXtBackbone(ChainBackbone):
    """ConvNeXt, V1 and V2."""

    def chains(self) -> Iterable[tuple[nn.Module, ...]]:
        return _downsampled(self.model.stages)

    def finish(self, state: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(self.model.norm_pre(state), pre_logits=pre_logits)


@register_family(RepVit)
class RepVitBackbone(ChainBackbone):
    """RepViT."""

    def chains(self) -> Iterable[tuple[nn.Module, ...]]:
        return _downsampled(self.model.stages)


@register_family(EfficientFormerV2)
class EfficientFormerV2Backbone(RepVitBackbone):
    """EfficientFormerV2."""

    def finish(self, state: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(self.model.norm(state), pre_logits=pre_logits)


@register_family(ByobNet)
class ByobNetBackbone(ChainBackbone):
    """ByobNet: GENet, RepVGG, MobileOne, MobileViT, halo and lambda networks, ..."""

    def chains(self) -> Iterable[tuple[nn.Module, ...]]:
        return _children(self.model.stages)

    def finish(self, state: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(self.model.final_conv(state), pre_logits=pre_logits)


@register_family(RegNet)
class RegNetBackbone(ByobNetBackbone):
    """RegNet X, Y, Z and V."""

    def chains(self) -> Iterable[tuple[nn.Module, ...]]:
        return _children(getattr(self.model, f"s{i}") for i in (1, 2, 3, 4))
