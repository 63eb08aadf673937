"""From an ExitRecord and a policy to an EvaluationReport."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checks import check_arguments
from .costs import MUL_ADDS
from .files import read_json, write_text
from .gates import ExitPolicy
from .metrics import (
    auroc,
    bootstrap_interval,
    brier_score,
    disjoint_subsets,
    expected_calibration_error,
    negative_log_likelihood,
    reliability_bins,
)
from .objectives import gate_targets, task_cost, total_cost
from .operating_point import OperatingPoint, with_inf_as_text
from .record import ExitRecord, check_disjoint

SCHEMA_VERSION = 2
NUM_SUBSETS = 10


@dataclass
class SetReport:
    """Conformal prediction sets at one alpha, found by one method.

    Args:
        coverage: share of the true classes in the sets.
        inefficiency: mean size of a set (Eq. 2).
        exit_coverage: among the samples that leave at each exit; None where nobody does.
        exit_inefficiency: likewise.
        class_coverage: among the samples of each class; None where there is none.
        thresholds: of each exit, +infinity as the string "inf".
        intervals: as of the EvaluationReport.
    """

    method: str
    alpha: float
    score: str
    coverage: float
    inefficiency: float
    exit_coverage: list[float | None]
    exit_inefficiency: list[float | None]
    class_coverage: list[float | None]
    thresholds: list[float | str]
    intervals: dict[str, list[float]]


@dataclass
class EvaluationReport:
    """What a policy achieves on a split, at one operating point. Fractions; Mul-Adds per image; exits 1..L.

    Args:
        lam: lambda, or None for a policy that has none.
        accuracy: of the exits taken.
        nll: of the exits taken, probabilities after each exit's temperature; likewise the next two.
        brier: Brier score.
        ece: expected calibration error.
        ece_raw: ece before the temperatures.
        mul_adds: mean per sample; where the record's costs are milliseconds, these, likewise the next and
            ``exit_mul_adds``.
        normalised_mul_adds: as a share of the bare backbone's.
        share_by_exit: of the samples that leave there.
        exit_accuracy: of every exit on all samples; likewise the next two.
        exit_ece: after the temperatures.
        exit_ece_raw: before them.
        exited_accuracy: on the samples that leave there; None where nobody does.
        conditional_accuracy: on the samples that the exit before gets right (Figure 20); None at the first exit.
        exit_mul_adds: what it costs to leave there, as a share of the backbone's.
        class_accuracy: at the exits taken, on the samples of each class; None where there is none.
        temperatures: one per exit; 1 without an operating point.
        gate_auroc: of each gate value against "leaving here is cheapest"; None where undefined or without gates.
        reliability: bins of the diagram of the exits taken, see ``metrics.reliability_bins``.
        sets: conformal sets; empty without calibration data.
        subsets: of accuracy, normalised_mul_adds, ece, nll and brier, their values on 10 disjoint, shuffled subsets of
            the split. The ECE of a tenth of the samples is larger than that of all of them.
        intervals: the 95 % bootstrap interval of the mean over the subsets (Section 5). Percentiles over 10 values
            cover about 90 %.
        images_per_second: measured ones, by the name of what was timed, where the caller gives them.
        cost_unit: `costs.MUL_ADDS` or ``"ms"``.
    """

    lam: float | None
    accuracy: float
    nll: float
    brier: float
    ece: float
    ece_raw: float
    mul_adds: float
    normalised_mul_adds: float
    num_samples: int
    share_by_exit: list[float]
    exit_accuracy: list[float]
    exit_ece: list[float]
    exit_ece_raw: list[float]
    exited_accuracy: list[float | None]
    conditional_accuracy: list[float | None]
    exit_mul_adds: list[float]
    class_accuracy: list[float | None]
    temperatures: list[float]
    gate_auroc: list[float | None] | None
    reliability: dict[str, list]
    sets: list[SetReport]
    subsets: dict[str, list[float]]
    intervals: dict[str, list[float]]
    dataset: str
    role: str
    split_sha256: str
    validation_sha256: str | None
    calibration_sha256: str | None
    seed: int
    images_per_second: dict[str, float] = field(default_factory=dict)
    cost_unit: str = MUL_ADDS
    schema_version: int = SCHEMA_VERSION

    def set_at(self, alpha: float, method: str = "grouped") -> SetReport:
        """The conformal sets of one method at one alpha; a ValueError where they were not evaluated."""
        for sets in self.sets:
            if sets.method == method and sets.alpha == alpha:
                return sets
        known = sorted({(sets.method, sets.alpha) for sets in self.sets})
        raise ValueError(f"Expected an evaluated method and alpha among {known}, but got {(method, alpha)}.")

    def oracle_alpha(self, target: float, method: str = "gated") -> SetReport | None:
        """The paper's reporting rule (App. 9.3): the largest evaluated alpha up to ``target`` whose coverage on *these
        very samples* exceeds 1 - target. It looks at test labels: a secondary figure, no guarantee."""
        tried = [s for s in self.sets if s.method == method and s.alpha <= target and s.coverage > 1 - target]
        return max(tried, key=lambda sets: sets.alpha, default=None)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "it") -> EvaluationReport:
        """A ValueError for a report of another schema version, or one that is none."""
        found = values.get("schema_version") if isinstance(values, dict) else None
        if found != SCHEMA_VERSION:
            expected = f"a report of schema {SCHEMA_VERSION}"
            raise ValueError(f"Expected {expected}, but {where} has {found!r}; evaluate again.")
        try:
            check_arguments(where, values, cls)
            return cls(**{**values, "sets": [SetReport(**sets) for sets in values["sets"]]})
        except (TypeError, ValueError) as error:
            raise ValueError(f"Expected a report as it was saved, but {where} is not: {error}") from error

    def save(self, path: str | Path) -> None:
        write_text(path, json.dumps(self.to_dict(), indent=1, allow_nan=False))

    @classmethod
    def load(cls, path: str | Path) -> EvaluationReport:
        """Reads what ``save`` wrote; a ValueError where it cannot."""
        return cls.from_dict(read_json(path, "a report"), str(path))


@torch.inference_mode()
def evaluate(
    record: ExitRecord,
    policy: ExitPolicy,
    lam: float | None = None,
    *,
    point: OperatingPoint | None = None,
    others: Sequence[ExitRecord] = (),
    kind: str = "cross_entropy",
    seed: int = 0,
    images_per_second: dict[str, float] | None = None,
) -> EvaluationReport:
    """Accuracy, cost, calibration and prediction sets of the exits that ``policy`` takes on a record.

    Args:
        record: the test role's answers.
        policy: who leaves where.
        lam: at which lambda; None for a policy that has none.
        point: temperatures and conformal thresholds for this policy and lambda, see ``OperatingPoint.fit``. Without
            it probabilities are uncalibrated and there are no sets.
        others: the records that ``point`` was fitted on; they must share no image with ``record``.
        kind: task cost behind ``gate_auroc``.
        seed: of the subsets and the bootstrap.
        images_per_second: measured speed, put into the report.

    Raises:
        ValueError: a policy or operating point of other exits, lambda or backbone; overlapping images.
    """
    if policy.num_exits != record.num_exits:
        raise ValueError(f"Expected a policy of {record.num_exits} exits, but got one of {policy.num_exits}.")
    for other in others:
        check_disjoint(record, other)
    if point is None:
        point = OperatingPoint(lam, [1.0] * record.num_exits, [0] * record.num_exits, record.split, record.backbone)
        is_calibrated = False
    else:
        _check_point(point, record, lam)
        is_calibrated = True
    logits, labels, num_exits = record.logits, record.labels, record.num_exits
    policy.check_exits(num_exits)
    chosen = record.exits_taken(policy, lam)
    rows = torch.arange(len(chosen), device=chosen.device)
    right = logits.argmax(-1) == labels[:, None]
    right_taken = right[rows, chosen]
    scaled = logits[rows, chosen] / logits.new_tensor(point.temperatures)[chosen, None]
    taken = scaled.softmax(-1)
    total = torch.tensor(record.costs.total, dtype=torch.float64, device=logits.device)
    costs = total / record.costs.backbone[-1]
    at_exit = [chosen == l for l in range(num_exits)]
    of_class = [labels == k for k in range(logits.shape[-1])]
    parts = [part.to(logits.device) for part in disjoint_subsets(len(labels), min(NUM_SUBSETS, len(labels)), seed)]

    def per_subset(measure) -> list[float]:
        return [float(measure(part)) for part in parts]

    subsets = {
        "accuracy": per_subset(lambda part: right_taken[part].double().mean()),
        "normalised_mul_adds": per_subset(lambda part: costs[chosen[part]].mean()),
        "ece": per_subset(lambda part: expected_calibration_error(taken[part], labels[part])),
        "nll": per_subset(lambda part: negative_log_likelihood(scaled[part], labels[part])),
        "brier": per_subset(lambda part: brier_score(taken[part], labels[part])),
    }
    sets, scores = [], point.score(taken) if point.thresholds else None
    for method, by_alpha in point.thresholds.items():
        for alpha, thresholds in by_alpha.items():
            inside = scores <= scores.new_tensor(thresholds)[chosen, None]
            covered, size = inside.gather(1, labels[:, None]).squeeze(1).double(), inside.sum(1).double()
            intervals = {
                name: list(bootstrap_interval(per_subset(lambda part, v=values: v[part].mean()), seed=seed))
                for name, values in (("coverage", covered), ("inefficiency", size))
            }
            sets.append(
                SetReport(
                    method, alpha, point.score.name, float(covered.mean()), float(size.mean()),
                    _means(covered, at_exit), _means(size, at_exit), _means(covered, of_class),
                    with_inf_as_text(thresholds), intervals,
                )
            )  # fmt: skip
    return EvaluationReport(
        lam=lam,
        accuracy=float(right_taken.double().mean()),
        nll=float(negative_log_likelihood(scaled, labels)),
        brier=float(brier_score(taken, labels)),
        ece=float(expected_calibration_error(taken, labels)),
        ece_raw=float(expected_calibration_error(logits[rows, chosen].softmax(-1), labels)),
        mul_adds=float(total[chosen].mean()),
        normalised_mul_adds=float(costs[chosen].mean()),
        num_samples=len(labels),
        share_by_exit=[float(here.double().mean()) for here in at_exit],
        exit_accuracy=right.double().mean(0).tolist(),
        exit_ece=_exit_ece(record, point.temperatures),
        exit_ece_raw=_exit_ece(record, [1.0] * num_exits),
        exited_accuracy=[_mean(right[here, l]) for l, here in enumerate(at_exit)],
        conditional_accuracy=[None, *(_mean(right[right[:, l - 1], l]) for l in range(1, num_exits))],
        exit_mul_adds=costs.tolist(),
        cost_unit=record.costs.unit,
        class_accuracy=_means(right_taken, of_class),
        temperatures=list(point.temperatures),
        gate_auroc=_gate_auroc(record, policy, lam, kind),
        reliability=reliability_bins(taken, labels),
        sets=sets,
        subsets=subsets,
        intervals={name: list(bootstrap_interval(values, seed=seed)) for name, values in subsets.items()},
        dataset=record.split.dataset,
        role=record.split.role,
        split_sha256=record.split.sha256,
        validation_sha256=point.validation.sha256 if is_calibrated else None,
        calibration_sha256=point.calibration and point.calibration.sha256,
        seed=seed,
        images_per_second=images_per_second or {},
    )


def _check_point(point: OperatingPoint, record: ExitRecord, lam: float | None) -> None:
    if point.lam != lam:
        raise ValueError(f"Expected an operating point of lambda {lam}, but got one of {point.lam}; fit it there.")
    if len(point.temperatures) != record.num_exits:
        got = len(point.temperatures)
        raise ValueError(f"Expected an operating point of {record.num_exits} exits, but got one of {got}.")
    if point.backbone != record.backbone:
        raise ValueError(f"Expected an operating point of backbone {record.backbone}, but got one of {point.backbone}.")
    fitted_on = [split.sha256 for split in (point.validation, point.calibration) if split]
    if record.split.sha256 in fitted_on:
        raise ValueError(
            f"Expected other images than the operating point was fitted on, but got its own: {record.split.role}."
        )


def _mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if len(values) else None


def _means(values: Tensor, masks: Sequence[Tensor]) -> list[float | None]:
    return [_mean(values[mask]) for mask in masks]


def _exit_ece(record: ExitRecord, temperatures: Sequence[float]) -> list[float]:
    exits = zip(record.logits.unbind(1), temperatures, strict=True)  # one at a time: 50,000 x 1,000 probabilities
    return [float(expected_calibration_error((logits / t).softmax(-1), record.labels)) for logits, t in exits]


def _gate_auroc(record: ExitRecord, policy: ExitPolicy, lam: float | None, kind: str) -> list[float | None] | None:
    gates = policy.gate_values(record.logits.to(policy.device), lam)
    if gates is None or lam is None:
        return None
    gates = gates.to(record.logits.device)
    cost = total_cost(task_cost(record.logits, record.labels, kind), record.normalised_costs, lam)
    targets = gate_targets(cost, "if_min")
    return [auroc(gates[:, l], targets[:, l]) for l in range(gates.shape[1])]
