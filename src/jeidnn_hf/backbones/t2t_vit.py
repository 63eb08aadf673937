"""T2T-ViT with performer token transformers (Yuan et al., 2021, https://arxiv.org/abs/2101.11986), for timm.

Importing this module registers ``t2t_vit_7`` and ``t2t_vit_14``. State-dict keys and shapes are those of the released
checkpoints, so ``timm.create_model("t2t_vit_7", pretrained=True, pretrained_cfg_overlay={"file": path})`` reads them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import calculate_drop_path_rates, resample_abs_pos_embed, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from .staged import StagedBackbone, register_family, tokens_to_map

PATCH_SIZE = 16


def sinusoid_positions(length: int, dim: int) -> Tensor:
    """Fixed position table ``(1, length, dim)``, float64 on CPU whatever the default device.

    Column j holds the sine (even j) or cosine (odd j) of ``position / 10000 ** (2 * (j // 2) / dim)``.
    """
    position = torch.arange(length, dtype=torch.float64, device="cpu").unsqueeze(1)
    column = torch.arange(dim, dtype=torch.float64, device="cpu")
    angle = position / 10000 ** (2 * (column // 2) / dim)
    return torch.where(column % 2 == 0, angle.sin(), angle.cos()).unsqueeze(0)


class TokenPerformer(nn.Module):
    """Single-head transformer layer of linear cost: softmax attention by positive random features (FAVOR+).

    Args:
        in_dim: width of the incoming tokens.
        dim: width of the outgoing tokens.
        num_features: random features m of the softmax kernel.
    """

    def __init__(self, in_dim: int, dim: int = 64, num_features: int = 32) -> None:
        super().__init__()
        self.register_buffer("w", torch.empty(num_features, dim))
        self.norm1 = nn.LayerNorm(in_dim)
        self.kqv = nn.Linear(in_dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def kernel_features(self, x: Tensor) -> Tensor:
        """``phi(x) = exp(w x - |x|^2 / 2) / sqrt(m)``, (B, N, dim) -> (B, N, m): E[phi(q) . phi(k)] = exp(q . k)."""
        projection = x @ self.w.t()
        return (projection - x.square().sum(-1, keepdim=True) / 2).exp() / math.sqrt(len(self.w))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, in_dim) -> (B, N, dim). The residual is the value v, as x may have another width."""
        k, q, v = self.kqv(self.norm1(x)).chunk(3, dim=-1)
        k, q = self.kernel_features(k), self.kernel_features(q)
        total = q @ k.sum(1).unsqueeze(-1)
        attended = q @ (k.transpose(1, 2) @ v) / (total + max(1e-8, torch.finfo(total.dtype).tiny))
        x = v + self.proj(attended)
        return x + self.mlp(self.norm2(x))


class TokensToToken(nn.Module):
    """Progressive tokenisation: overlapping windows become tokens, attend, and form a smaller image again, twice."""

    def __init__(self, in_chans: int, embed_dim: int, token_dim: int = 64) -> None:
        super().__init__()
        self.attention1 = TokenPerformer(in_chans * 7 * 7, token_dim)
        self.attention2 = TokenPerformer(token_dim * 3 * 3, token_dim)
        self.project = nn.Linear(token_dim * 3 * 3, embed_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> tokens (B, H/16 * W/16, embed_dim)."""
        height, width = x.shape[-2:]
        x = self.attention1(F.unfold(x, 7, stride=4, padding=2).transpose(1, 2))
        x = x.transpose(1, 2).unflatten(2, (height // 4, width // 4))
        x = self.attention2(F.unfold(x, 3, stride=2, padding=1).transpose(1, 2))
        x = x.transpose(1, 2).unflatten(2, (height // 8, width // 8))
        return self.project(F.unfold(x, 3, stride=2, padding=1).transpose(1, 2))


class T2TViT(nn.Module):
    """Tokens-to-token vision transformer with a class token.

    Args:
        img_size: side, or (height, width), of the input images; a multiple of 16.
        in_chans: channels of the input images.
        num_classes: size of the classifier; 0 for none.
        embed_dim: token width of the encoder.
        depth: encoder blocks.
        num_heads: attention heads per block.
        mlp_ratio: hidden width of the block's MLP, in units of ``embed_dim``.
        drop_rate: dropout before the classifier.
        drop_path_rate: stochastic depth of the last block, falling linearly to 0 at the first.
    """

    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 256,
        depth: int = 7,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.img_size = to_2tuple(img_size)
        if any(side < PATCH_SIZE or side % PATCH_SIZE for side in self.img_size):
            raise ValueError(f"Expected img_size to be a positive multiple of {PATCH_SIZE} but got {img_size}.")
        self.grid_size = tuple(side // PATCH_SIZE for side in self.img_size)
        self.in_chans, self.num_classes = in_chans, num_classes
        self.num_features = self.embed_dim = embed_dim

        self.tokens_to_token = TokensToToken(in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.register_buffer("pos_embed", torch.empty(1, 1 + math.prod(self.grid_size), embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, mlp_ratio, drop_path=rate, norm_layer=nn.LayerNorm)
            for rate in calculate_drop_path_rates(drop_path_rate, depth)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """(Re)initialise every weight and both kinds of fixed table."""
        self.pos_embed.copy_(sinusoid_positions(*self.pos_embed.shape[1:]))
        trunc_normal_(self.cls_token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, TokenPerformer):
                orthogonal = nn.init.orthogonal_(torch.empty_like(module.w, dtype=torch.float32))
                module.w.copy_(orthogonal * math.sqrt(len(module.w)))

    def embed(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> the first block's input (B, 1 + N, embed_dim), class token first."""
        expected = (self.in_chans, *self.img_size)
        if x.shape[1:] != expected:
            raise ValueError(f"Expected images of shape (batch, {str(expected)[1:]} but got {tuple(x.shape)}.")
        tokens = self.tokens_to_token(x)
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), tokens], dim=1) + self.pos_embed

    def forward_features(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> normalised tokens (B, 1 + N, embed_dim)."""
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normalised tokens (B, 1 + N, embed_dim) -> logits (B, num_classes), or the class token if ``pre_logits``."""
        x = self.head_drop(x[:, 0])
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Images (B, C, H, W) -> logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))

    def get_classifier(self) -> nn.Module:
        """The final linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the final layer by a new one; ``num_classes=0`` removes it. Only the class token is ever pooled."""
        if global_pool not in (None, "token"):
            raise ValueError(f"Expected global_pool to be 'token' but got {global_pool!r}.")
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.head.to(self.norm.weight)


def _resize_pos_embed(state_dict: dict[str, Tensor], model: T2TViT) -> dict[str, Tensor]:
    """Carry the position table of a checkpoint over to another image size, by bicubic interpolation of its grid."""
    table = state_dict["pos_embed"]
    if table.shape != model.pos_embed.shape:
        table = resample_abs_pos_embed(table, list(model.grid_size), antialias=False)
    return state_dict | {"pos_embed": table}


def _create_t2t_vit(variant: str, pretrained: bool, **kwargs: Any) -> T2TViT:
    return build_model_with_cfg(T2TViT, variant, pretrained, pretrained_filter_fn=_resize_pos_embed, **kwargs)


_CFG = {"input_size": (3, 224, 224), "fixed_input_size": True, "crop_pct": 0.9, "interpolation": "bicubic"}
_CFG |= {"classifier": "head", "paper_ids": "arXiv:2101.11986"}
default_cfgs = generate_default_cfgs({"t2t_vit_7": _CFG, "t2t_vit_14": _CFG})


@register_model
def t2t_vit_7(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-7: 7 blocks of width 256, 4 heads."""
    args = {"embed_dim": 256, "depth": 7, "num_heads": 4, "mlp_ratio": 2.0}
    return _create_t2t_vit("t2t_vit_7", pretrained, **(args | kwargs))


@register_model
def t2t_vit_14(pretrained: bool = False, **kwargs: Any) -> T2TViT:
    """T2T-ViT-14: 14 blocks of width 384, 6 heads."""
    args = {"embed_dim": 384, "depth": 14, "num_heads": 6, "mlp_ratio": 3.0}
    return _create_t2t_vit("t2t_vit_14", pretrained, **(args | kwargs))


@register_family(T2TViT)
class T2TViTBackbone(StagedBackbone):
    """The state is the tokens ``(B, 1 + N, C)``; an exit reads them after the shared final norm."""

    @property
    def num_blocks(self) -> int:
        return len(self.model.blocks)

    def embed(self, pixel_values: Tensor) -> Tensor:
        return self.model.embed(pixel_values)

    def block(self, i: int, state: Tensor) -> Tensor:
        return self.model.blocks[i](state)

    def feature_map(self, state: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.model.norm(state)
        return tokens_to_map(tokens, 1, self.model.grid_size), tokens[:, 0]

    def finish(self, state: Tensor, pre_logits: bool = False) -> Tensor:
        return self.model.forward_head(self.model.norm(state), pre_logits=pre_logits)
