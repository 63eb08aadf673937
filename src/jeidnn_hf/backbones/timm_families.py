"""Stem, blocks and head of timm's own families, each checked against the model's forward."""

from __future__ import annotations

from functools import cached_property

from timm.models.deit import VisionTransformerDistilled
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from .staged import StagedBackbone, register_family, tokens_to_map


@register_family(VisionTransformer, VisionTransformerDistilled)
class VisionTransformerBackbone(StagedBackbone):
    """ViT, DeiT, DINO, ...; the state is the tokens ``(B, N, C)``. An exit reads them after the shared final norm."""

    @property
    def num_blocks(self) -> int:
        return len(self.model.blocks)

    def embed(self, pixel_values: Tensor) -> Tensor:
        model = self.model
        return model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(pixel_values))))

    def block(self, i: int, state: Tensor) -> Tensor:
        return self.model.blocks[i](state)

    def feature_map(self, state: Tensor) -> tuple[Tensor, Tensor | None]:
        norm = self.model.fc_norm if isinstance(self.model.norm, nn.Identity) else self.model.norm
        tokens = norm(state)
        grid = tuple(self.model.patch_embed.dynamic_feat_size((self.image_size, self.image_size)))
        class_token = tokens[:, 0] if getattr(self.model, "cls_token", None) is not None else None
        return tokens_to_map(tokens, self.model.num_prefix_tokens, grid), class_token

    def finish(self, state: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(self.model.norm(state), pre_logits=pre_logits)


@register_family(ResNet)
class ResNetBackbone(StagedBackbone):
    """ResNet and its kin; an exit after every residual block. The state is the map ``(B, C, H, W)``."""

    @cached_property
    def _blocks(self) -> list[nn.Module]:
        return [block for i in (1, 2, 3, 4) for block in getattr(self.model, f"layer{i}")]

    @property
    def num_blocks(self) -> int:
        return len(self._blocks)

    def embed(self, pixel_values: Tensor) -> Tensor:
        model = self.model
        return model.maxpool(model.act1(model.bn1(model.conv1(pixel_values))))

    def block(self, i: int, state: Tensor) -> Tensor:
        return self._blocks[i](state)

    def feature_map(self, state: Tensor) -> tuple[Tensor, None]:
        return state, None

    def finish(self, state: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(state, pre_logits=pre_logits)
