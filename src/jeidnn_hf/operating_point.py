"""The operating point: all that is fitted after training for one policy at one lambda, saved as ``calibration.json``.

Temperatures, and the groups of exits that share a threshold, come from ``validation``; conformal thresholds from
``calibration``, which nothing else has touched.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .conformal import (
    METHODS,
    ConformalScore,
    check_alpha,
    check_method,
    exit_groups,
    prediction_sets,
    thresholds_of_scores,
    true_scores,
)
from .files import read_json, write_text
from .gates import ExitPolicy
from .record import ExitRecord, check_disjoint
from .splits import SplitInfo

ALPHAS = (0.01, 0.05, 0.1)
FORMAT_VERSION = 1
FILE_NAME = "calibration.json"


@dataclass
class OperatingPoint:
    """One policy at one lambda, calibrated.

    Args:
        lam: lambda, or None for a policy that has none.
        temperatures: one per exit, ``(L,)``.
        groups: the group of each exit, for the method ``grouped``.
        score: the conformal score.
        thresholds: method -> alpha -> one threshold per exit; +infinity where too few samples were there.
        calibration_by_exit: number of calibration samples that leave at each exit.
        validation: the images that temperatures and groups came from.
        calibration: those that the thresholds came from.
        backbone: fingerprint of the backbone.

    Raises:
        ValueError: numbers of exits that differ, temperatures or thresholds out of range.
    """

    lam: float | None
    temperatures: list[float]
    groups: list[int]
    validation: SplitInfo
    backbone: str | None = None
    score: ConformalScore = field(default_factory=ConformalScore)
    thresholds: dict[str, dict[float, list[float]]] = field(default_factory=dict)
    calibration_by_exit: list[int] = field(default_factory=list)
    calibration: SplitInfo | None = None

    def __post_init__(self) -> None:
        for method, by_alpha in self.thresholds.items():
            check_method(method)
            for alpha in by_alpha:
                check_alpha(alpha)
        rows = [thresholds for by_alpha in self.thresholds.values() for thresholds in by_alpha.values()]
        lengths = sorted({len(row) for row in (self.temperatures, self.groups, *rows)})
        if len(lengths) != 1:
            raise ValueError(f"Expected a temperature, a group and a threshold per exit, but got {lengths} of them.")
        if not all(0 < t < math.inf for t in self.temperatures):
            raise ValueError(f"Expected positive, finite temperatures, but got {self.temperatures}.")
        if any(math.isnan(t) for row in rows for t in row):
            raise ValueError("Expected thresholds without NaN, but got some.")

    @classmethod
    @torch.inference_mode()
    def fit(
        cls,
        policy: ExitPolicy,
        validation: ExitRecord,
        calibration: ExitRecord | None = None,
        *,
        lam: float | None = None,
        alphas: Sequence[float] = ALPHAS,
        methods: Sequence[str] = METHODS,
        score: ConformalScore | None = None,
        quantile: str = "finite_sample",
        min_group: int = 100,
    ) -> OperatingPoint:
        """Temperatures on ``validation``; with ``calibration``, thresholds of every method at every alpha.

        Raises:
            ValueError: alpha or a method out of range; records of different networks, or with images in common; a
                calibration record of training images.
        """
        for alpha in alphas:
            check_alpha(alpha)
        for method in methods:
            check_method(method)
        policy.check_exits(validation.num_exits)
        groups = exit_groups(validation.exits_taken(policy, lam), validation.num_exits, min_group)
        score = score or ConformalScore()
        point = cls(lam, validation.temperatures.tolist(), groups, validation.split, validation.backbone, score)
        if calibration is None:
            return point
        check_disjoint(calibration, validation)
        chosen = calibration.exits_taken(policy, lam)
        scores = true_scores(point.probabilities(calibration.logits), calibration.labels, point.score)
        options = {"quantile": quantile, "groups": groups}
        point.thresholds = {
            method: {
                float(alpha): thresholds_of_scores(scores, chosen, alpha, method, **options).tolist()
                for alpha in alphas
            }
            for method in methods
        }
        point.calibration_by_exit = torch.bincount(chosen, minlength=calibration.num_exits).tolist()
        point.calibration = calibration.split
        return point

    def probabilities(self, logits: Tensor) -> Tensor:
        """``(N, L, K)`` logits of all exits to their probabilities, each exit after its temperature."""
        return (logits / logits.new_tensor(self.temperatures)[:, None]).softmax(-1)

    def prediction_sets(self, probs: Tensor, chosen: Tensor, alpha: float, method: str = "grouped") -> Tensor:
        """Sets at the exits taken, a mask ``(N, K)``; a ValueError for an alpha or method that was not calibrated."""
        thresholds = self.thresholds_at(alpha, method)
        return prediction_sets(probs, chosen, probs.new_tensor(thresholds, dtype=torch.float64), self.score)

    def thresholds_at(self, alpha: float, method: str = "grouped") -> list[float]:
        """One threshold per exit."""
        if method not in self.thresholds:
            raise ValueError(f"Expected a calibrated method among {list(self.thresholds)}, but got {method!r}.")
        if alpha not in self.thresholds[method]:
            raise ValueError(f"Expected a calibrated alpha among {list(self.thresholds[method])}, but got {alpha!r}.")
        return self.thresholds[method][alpha]

    def to_dict(self) -> dict[str, Any]:
        thresholds = {
            method: {repr(alpha): with_inf_as_text(ts) for alpha, ts in by_alpha.items()}
            for method, by_alpha in self.thresholds.items()
        }
        return {
            "format_version": FORMAT_VERSION,
            "lam": self.lam,
            "temperatures": self.temperatures,
            "groups": self.groups,
            "score": self.score.to_dict(),
            "thresholds": thresholds,
            "calibration_by_exit": self.calibration_by_exit,
            "validation": self.validation.to_dict(),
            "calibration": self.calibration and self.calibration.to_dict(),
            "backbone": self.backbone,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> OperatingPoint:
        """Reads what ``to_dict`` wrote; a ValueError where it cannot."""
        try:
            values = dict(values)
            if (version := values.pop("format_version")) != FORMAT_VERSION:
                raise ValueError(f"format {version!r}")
            thresholds = {
                method: {float(alpha): [float(t) for t in ts] for alpha, ts in by_alpha.items()}
                for method, by_alpha in values.pop("thresholds").items()
            }
            validation, calibration = values.pop("validation"), values.pop("calibration")
            return cls(
                **{**values, "score": ConformalScore(**values["score"])},
                thresholds=thresholds,
                validation=SplitInfo.from_dict(validation),
                calibration=calibration and SplitInfo.from_dict(calibration),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"Expected an operating point of format {FORMAT_VERSION} as it was saved, but got {error!r}."
            ) from error

    def save(self, folder: str | Path) -> None:
        """Writes ``calibration.json``, +infinity as the string "inf"."""
        text = json.dumps(self.to_dict(), indent=1, allow_nan=False)
        write_text(Path(folder, FILE_NAME), text)

    @classmethod
    def load(cls, folder: str | Path) -> OperatingPoint:
        """Reads what ``save`` wrote; a ValueError where it cannot."""
        return cls.from_dict(read_json(Path(folder, FILE_NAME), "an operating point"))


def with_inf_as_text(thresholds: Sequence[float]) -> list[float | str]:
    """For JSON, which has no infinity: "inf" in its place."""
    return ["inf" if math.isinf(t) else t for t in thresholds]
