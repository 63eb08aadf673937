"""Reports of a toy network for the tests of figures and tables."""

from __future__ import annotations

from functools import cache

import torch

from jeidnn_hf import EvaluationReport, ExitRecord, evaluate
from jeidnn_hf.costs import ExitCosts
from jeidnn_hf.operating_point import OperatingPoint
from jeidnn_hf.policies import ConfidenceThreshold
from jeidnn_hf.splits import SplitInfo

ALPHAS = (0.02, 0.05, 0.1)
THRESHOLDS = (0.9, 0.35, 0.6, 0.0)  # not in the order of their costs; at 0 everybody leaves at the first exit


def record_of(role: str, seed: int, exits: int = 4, classes: int = 5, samples: int = 300) -> ExitRecord:
    random = torch.Generator().manual_seed(10 * seed + ("validation", "calibration", "test").index(role))
    labels = torch.randint(classes, (samples,), generator=random)
    favoured = torch.nn.functional.one_hot(labels, classes)[:, None] * torch.linspace(1.0, 3.0, exits)[:, None]
    logits = 2 * torch.randn(samples, exits, classes, generator=random) + 2 * favoured
    costs = [tuple(each * (l + 1) for l in range(exits)) for each in (100_000_000, 5000, 200_000, 400)]
    split = SplitInfo("toy", role, role, samples, role.ljust(64, "0"))
    return ExitRecord(logits, labels, ExitCosts(*costs), split, "network", torch.arange(samples))


@cache
def curve(seed: int = 0, exits: int = 4, calibrated: bool = True) -> tuple[EvaluationReport, ...]:
    """One report per threshold."""
    validation, calibration, test = (record_of(role, seed, exits) for role in ("validation", "calibration", "test"))
    reports = []
    for threshold in THRESHOLDS:
        policy = ConfidenceThreshold(torch.ones(exits), threshold)
        point = OperatingPoint.fit(policy, validation, calibration, alphas=ALPHAS) if calibrated else None
        reports.append(evaluate(test, policy, point=point, seed=seed))
    return tuple(reports)


def two_methods() -> dict[str, dict[int, tuple[EvaluationReport, ...]]]:
    """One method of two seeds, and another of one."""
    return {"first": {0: curve(0), 1: curve(1)}, "second | third": {0: curve(2)[:3]}}
