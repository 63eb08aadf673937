"""Frozen networks cut at their exits. A new family is one file and one registration."""

from . import resnet_cifar, t2t_vit, timm_families, timm_generic
from .loading import build_model, fingerprint, pretrained_cfg
from .staged import StagedBackbone, select, staged_backbone

__all__ = [
    "StagedBackbone",
    "build_model",
    "fingerprint",
    "pretrained_cfg",
    "resnet_cifar",
    "select",
    "staged_backbone",
    "t2t_vit",
    "timm_families",
    "timm_generic",
]
