"""The accuracy-cost curve of one checkpoint, small enough to lie beside its weights: ``curve.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np

from .checks import check_arguments
from .costs import ExitCosts
from .evaluation import EvaluationReport
from .files import read_json, write_text

FILE_NAME = "curve.json"
FORMAT_VERSION = 1
_SMALLEST = 1e-12  # stands for lambda 0 in logarithms


@dataclass(frozen=True)
class AccuracyCostCurve:
    """What a checkpoint's own gates reach at each evaluated lambda, on the same images.

    Args:
        lam: the lambdas, rising, ``(P,)``.
        accuracy: fractions, ``(P,)``.
        normalised_mul_adds: mean per image, as a share of the backbone's, ``(P,)``.
        exit_mul_adds: what it costs to leave at each exit, as a share of the backbone's, ``(L,)``.
        dataset: of the images.
        role: their split role.
        num_samples: how many there are.
        split_sha256: which they are.
        backbone_accuracy: of the frozen backbone with its own classifier, where it has one.

    Raises:
        ValueError: no point, columns of unequal length, numbers out of range, lambdas that do not rise.
    """

    lam: list[float]
    accuracy: list[float]
    normalised_mul_adds: list[float]
    exit_mul_adds: list[float]
    dataset: str
    role: str
    num_samples: int
    split_sha256: str
    backbone_accuracy: float | None = None

    def __post_init__(self) -> None:
        columns = (self.lam, self.accuracy, self.normalised_mul_adds)
        lengths = list(map(len, columns))
        if not self.lam or len(set(lengths)) != 1:
            raise ValueError(f"Expected a curve of one whole point at least, but got columns of {lengths} numbers.")
        accuracies = [*self.accuracy, *([] if self.backbone_accuracy is None else [self.backbone_accuracy])]
        ranges = {
            "lam": (self.lam, 0, math.inf),
            "accuracy": (accuracies, 0, 1),
            "normalised_mul_adds": (self.normalised_mul_adds, 0, math.inf),
            "exit_mul_adds": (self.exit_mul_adds, 0, math.inf),
        }
        for name, (values, least, most) in ranges.items():
            for value in values:
                is_number = isinstance(value, int | float) and not isinstance(value, bool)
                if not is_number or not (least <= value <= most and math.isfinite(value)):
                    raise ValueError(f"Expected {name} of a curve in [{least}, {most}], but got {value!r}.")
        if not all(low < high for low, high in pairwise(self.lam)):
            raise ValueError(f"Expected the lambdas of a curve to rise, but got {self.lam}.")

    @classmethod
    def of_reports(cls, reports: Sequence[EvaluationReport], backbone_accuracy: float | None = None) -> Self:
        """From reports of one checkpoint, one per lambda, in any order."""
        reports = sorted(reports, key=lambda report: report.lam)
        columns = {name: [getattr(r, name) for r in reports] for name in ("lam", "accuracy", "normalised_mul_adds")}
        images = {name: getattr(reports[0], name) for name in ("dataset", "role", "num_samples", "split_sha256")}
        return cls(
            **columns, **images, exit_mul_adds=reports[0].exit_mul_adds, backbone_accuracy=backbone_accuracy
        )  # fmt: skip

    def at(self, lam: float) -> tuple[float, float] | None:
        """``(normalised_mul_adds, accuracy)`` at a lambda; None outside of what was measured.

        A measured point, or one on the straight line between two, by the logarithm of lambda.
        """
        logs = np.log(np.maximum(self.lam, _SMALLEST))
        log = math.log(max(lam, _SMALLEST))
        if not logs[0] - 1e-6 <= log <= logs[-1] + 1e-6:
            return None
        columns = (self.normalised_mul_adds, self.accuracy)
        return tuple(float(np.interp(log, logs, column)) for column in columns)

    def check_is_of(self, costs: ExitCosts) -> None:
        """A ValueError unless it is of a model with this cost table."""
        costs.check_same(self.exit_mul_adds, "a curve")

    def to_dict(self) -> dict[str, Any]:
        return {"format_version": FORMAT_VERSION, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Reads what ``to_dict`` wrote; a ValueError where it cannot."""
        if not isinstance(values, dict) or values.get("format_version") != FORMAT_VERSION:
            got = values.get("format_version") if isinstance(values, dict) else values
            raise ValueError(
                f"Expected a curve of format {FORMAT_VERSION}, but got {got!r}; write it again with `jeidnn card`."
            )
        values = {name: value for name, value in values.items() if name != "format_version"}
        check_arguments("a curve", values, cls)
        return cls(**values)

    def save(self, folder: str | Path) -> None:
        """Writes ``curve.json``."""
        write_text(Path(folder, FILE_NAME), json.dumps(self.to_dict(), indent=1, allow_nan=False))

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Reads what ``save`` wrote; a ValueError where it cannot."""
        return cls.from_dict(read_json(Path(folder, FILE_NAME), "an accuracy-cost curve"))
