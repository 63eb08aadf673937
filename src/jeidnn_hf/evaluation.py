"""From an ExitRecord and a policy to an EvaluationReport."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .checks import check_arguments
from .files import write_text
from .gates import ExitPolicy
from .metrics import expected_calibration_error
from .record import ExitRecord

SCHEMA_VERSION = 1


@dataclass
class EvaluationReport:
    """What a policy achieves on a split, at one operating point.

    Args:
        lam: lambda, or None for a policy that has none.
        accuracy, ece: of the exits taken, fractions.
        mul_adds, normalised_mul_adds: mean per sample, in Mul-Adds and as a share of the bare backbone's.
        share_by_exit, exit_accuracy, exit_ece: per exit 1..L: share of the samples that leave there, and accuracy and
            ECE on all samples; exit_mul_adds: what it costs to leave there, as a share of the backbone's.
        exited_accuracy: accuracy on the samples that leave there; None where nobody does.
    """

    lam: float | None
    accuracy: float
    ece: float
    mul_adds: float
    normalised_mul_adds: float
    num_samples: int
    share_by_exit: list[float]
    exit_accuracy: list[float]
    exit_ece: list[float]
    exited_accuracy: list[float | None]
    exit_mul_adds: list[float]
    dataset: str
    role: str
    split_sha256: str
    schema_version: int = SCHEMA_VERSION

    def save(self, path: str | Path) -> None:
        write_text(path, json.dumps(asdict(self), indent=1))

    @classmethod
    def load(cls, path: str | Path) -> EvaluationReport:
        """Reads what ``save`` wrote; a ValueError for a report of another schema version, or no report."""
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"Expected a report in {str(path)!r}, but it cannot be read: {error}.") from error
        found = values.get("schema_version") if isinstance(values, dict) else None
        if found != SCHEMA_VERSION:
            raise ValueError(f"Expected a report of schema {SCHEMA_VERSION}, but {path} has {found!r}; evaluate again.")
        check_arguments(str(path), values, cls)
        return cls(**values)


@torch.inference_mode()
def evaluate(record: ExitRecord, policy: ExitPolicy, lam: float | None = None) -> EvaluationReport:
    """Accuracy, cost and calibration of the exits that ``policy`` takes on a record."""
    if policy.num_exits != record.num_exits:
        raise ValueError(f"Expected a policy of {record.num_exits} exits, but got one of {policy.num_exits}.")
    chosen = policy.decide(record.logits, lam)
    rows = torch.arange(len(chosen))
    right = record.logits.argmax(-1) == record.labels[:, None]
    exited = [right[chosen == l, l] for l in range(record.num_exits)]
    total, costs = torch.tensor(record.costs.total, dtype=torch.float64), record.normalised_costs.double()
    return EvaluationReport(
        lam=lam,
        accuracy=float(right[rows, chosen].double().mean()),
        ece=float(expected_calibration_error(record.logits[rows, chosen].softmax(-1), record.labels)),
        mul_adds=float(total[chosen].mean()),
        normalised_mul_adds=float(costs[chosen].mean()),
        num_samples=len(chosen),
        share_by_exit=[len(at_exit) / len(chosen) for at_exit in exited],
        exit_accuracy=right.double().mean(0).tolist(),
        exit_ece=expected_calibration_error(record.logits.softmax(-1), record.labels).tolist(),
        exited_accuracy=[float(at_exit.double().mean()) if len(at_exit) else None for at_exit in exited],
        exit_mul_adds=costs.tolist(),
        dataset=record.split.dataset,
        role=record.split.role,
        split_sha256=record.split.sha256,
    )
