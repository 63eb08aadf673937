"""Which networks can be cut at their exits: the smallest model of each of timm's modules, and of ours, tried out."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import timm
import torch

from .loading import build_model, pretrained_cfg
from .staged import staged_backbone
from .timm_generic import TracedBackbone

SIDES = (64, 112, 128, 224)
"""Image sizes to try before the model's own, since small ones are fast."""


@dataclass(frozen=True)
class SurveyRow:
    """What became of one module's smallest model.

    Args:
        module: timm's name of it.
        model: timm's name of that model.
        view: the class that cuts it: of a family, or `TracedBackbone`; None where it is refused.
        exits: how many exits there are; 0 where it is refused.
        reason: why it is refused.
    """

    module: str
    model: str
    view: str | None
    exits: int
    reason: str | None = None

    @property
    def kind(self) -> str:
        return "refused" if self.view is None else "generic" if self.view == TracedBackbone.__name__ else "family"


def survey(modules: Sequence[str] | None = None) -> Iterator[SurveyRow]:
    """One row per module, as it comes; all of them by default.

    Raises:
        ValueError: a module that timm does not have.
    """
    known = timm.list_modules()
    if unknown := sorted(set(modules or ()) - set(known)):
        raise ValueError(f"Expected modules of timm, like {known[:3]}, but got {unknown}.")
    for module in modules or known:
        yield survey_model(module, smallest_model(module))


def smallest_model(module: str) -> str:
    """The model with the fewest parameters, the first by name among equals; counted without making any."""
    sizes = {}
    for name in timm.list_models(module=module):
        try:
            with torch.device("meta"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = timm.create_model(name)
        except Exception:  # some models read numbers of tensors, which meta tensors do not have
            continue
        sizes[name] = sum(parameter.numel() for parameter in model.parameters())
    return min(sizes, key=sizes.get) if sizes else timm.list_models(module=module)[0]


def survey_model(module: str, model: str) -> SurveyRow:
    """Builds the model with random weights and cuts it, at the smallest image size that it takes."""
    cfg = pretrained_cfg(model)
    own, network, reason = cfg["input_size"][-1], None, None
    for side in (*(side for side in SIDES if side < own), own):
        try:
            if network is None or cfg.get("fixed_input_size"):
                network = build_model(model, num_classes=10, image_size=side)
            backbone = staged_backbone(network, image_size=side)
        except ValueError as error:
            reason = str(error)
            continue
        return SurveyRow(module, model, type(backbone).__name__, backbone.num_exits)
    return SurveyRow(module, model, None, 0, reason)
