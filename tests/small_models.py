"""A small network whose gates let images out at every exit, calibrated, and pictures for it."""

from __future__ import annotations

import numpy as np
import PIL.Image
import torch

from jeidnn_hf import ExitRecord, JEIDNNConfig, JEIDNNForImageClassification, OperatingPoint
from jeidnn_hf.conformal import ConformalScore
from jeidnn_hf.preprocessing import Preprocessing
from jeidnn_hf.splits import SplitInfo

NAMES = ["ant", "bee", "cat", "dog", "eel"]


def pictures(count: int, seed: int = 0, mode: str = "RGB") -> list[PIL.Image.Image]:
    """Of odd sizes."""
    random = np.random.default_rng(seed)
    sizes = random.integers(33, 61, (count, 2))
    blobs = (random.integers(0, 256, (4, 4, 3), dtype=np.uint8) for _ in range(count))
    return [PIL.Image.fromarray(b).resize(tuple(size), 3).convert(mode) for b, size in zip(blobs, sizes, strict=True)]


@torch.no_grad()
def small_model(backbone: str = "test_vit", **options) -> JEIDNNForImageClassification:
    defaults = {"image_size": 32, "recipe": "paper", "native_head": False, "id2label": dict(enumerate(NAMES))}
    torch.manual_seed(0)
    model = JEIDNNForImageClassification(JEIDNNConfig(backbone=backbone, **{**defaults, **options})).eval()
    features = model.backbone(pixels(model, 60))
    for head, z in zip(model.heads.modules_by_exit, features, strict=True):
        head.weight.normal_().mul_(3 / z.std(0).mean() / z.shape[1] ** 0.5)
        head.bias.copy_(-head.weight @ z.mean(0))
    gates, logits = model.policy.gates, model.heads(features)
    gates.weight.normal_()
    for l in range(model.backbone.num_exits - 1):
        distance = {}
        for bias in torch.linspace(-8, 8, 161).tolist():
            gates.bias[l] = bias
            exits = model.policy.decide(logits, model.config.current_lam)
            distance[bias] = abs(float((exits[exits >= l] == l).float().mean()) - 0.4)
        gates.bias[l] = min(distance, key=distance.get)
    return model


def pixels(model: JEIDNNForImageClassification, count: int, seed: int = 0) -> torch.Tensor:
    return Preprocessing.from_dict(model.config.preprocessing)(pictures(count, seed))


@torch.no_grad()
def record(model: JEIDNNForImageClassification, role: str, seed: int) -> ExitRecord:
    """Labels are the last exit's answers, a third of them changed."""
    logits = model(pixels(model, 80, seed), output_all_exits=True).all_logits
    labels = logits[:, -1].argmax(-1)
    labels[::3] = (labels[::3] + 1) % len(NAMES)
    return ExitRecord(logits, labels, model.costs, SplitInfo("toy", role, role, 80, role))


def operating_point(model: JEIDNNForImageClassification, score: ConformalScore | None = None) -> OperatingPoint:
    records = record(model, "validation", 1), record(model, "calibration", 2)
    return OperatingPoint.fit(model.policy, *records, lam=model.config.current_lam, score=score, min_group=10)
