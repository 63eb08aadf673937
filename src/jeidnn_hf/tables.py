"""Tables as Markdown, functions of reports, cost tables and measured numbers."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from .costs import ExitCosts
from .evaluation import EvaluationReport
from .operating_point import OperatingPoint
from .reports import Curves, check_comparable

FEATURES = ("fixed backbone", "learnable gates", "trained IMs", "adaptive IM training", "joint training")
"""What Table 4 tells methods apart by: see its caption in the paper."""

METHOD_FEATURES: dict[str, Collection[str]] = {
    "JEI-DNN, paper's recipe": FEATURES,
    "JEI-DNN, default recipe": ("fixed backbone", "learnable gates", "trained IMs"),
    "confidence threshold over trained IMs": ("fixed backbone", "trained IMs"),
}
"""What this package offers: the default recipe trains its IMs on all samples alike, and its gates after them."""


@dataclass(frozen=True)
class TrainingCost:
    """What one training took, each None where it was not measured: seconds, trained parameters, peak bytes."""

    seconds: float | None = None
    parameters: int | None = None
    peak_bytes: int | None = None


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column to the left, numbers to the right."""
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


def training_table(trainings: Mapping[str, TrainingCost]) -> str:
    """Training time, trained parameters and memory by method (Table 1)."""
    rows = [
        [name, _number(cost.seconds, ".1f", 1 / 60), _short(cost.parameters), _number(cost.peak_bytes, ".2f", 2**-30)]
        for name, cost in trainings.items()
    ]
    return markdown_table(["method", "training time (min)", "trained parameters", "peak memory (GiB)"], rows)


def costs_table(costs: ExitCosts) -> str:
    """Cumulative Mul-Adds at each exit: the backbone, what pooling, IMs and gates add, and all (Tables 2 and 3)."""
    rows = []
    for l, (total, share) in enumerate(zip(costs.total, costs.normalised, strict=True)):
        added = [f"+{_short(column[l])}" for column in (costs.pooling, costs.heads, costs.gates)]
        extra = f"{100 * (total / costs.backbone[l] - 1):.3f} %"
        rows.append([str(l + 1), _short(costs.backbone[l]), *added, _short(total), extra, f"{share:.4f}"])
    header = ["exit", "backbone", "from pooling", "from IMs", "from gates", "total", "increase", "total (share)"]
    return markdown_table(header, rows)


def methods_table(methods: Mapping[str, Collection[str]] = METHOD_FEATURES) -> str:
    """Which of FEATURES a method has (Table 4); a ValueError for another feature."""
    unknown = sorted({feature for features in methods.values() for feature in features} - set(FEATURES))
    if unknown:
        raise ValueError(f"Expected features among {FEATURES}, but got {unknown}.")
    rows = [[name, *("✓" if f in features else "" for f in FEATURES)] for name, features in methods.items()]
    return markdown_table(["method", *FEATURES], rows)


def exits_table(report: EvaluationReport, alpha: float = 0.05, sets: str = "grouped") -> str:
    """What each exit does at one operating point; the threshold of its conformal sets where there are any."""
    backbone = report.mul_adds / report.normalised_mul_adds
    thresholds = report.set_at(alpha, sets).thresholds if report.sets else None
    header = ["exit", "Mul-Adds", "share of the backbone", "samples that leave (%)", "accuracy on them (%)"]
    header += ["accuracy on all (%)", "ECE before (%)", "ECE after (%)", "temperature"]
    header += [f"threshold ({sets}, α = {alpha:g})"] if thresholds else []
    rows = []
    for l, cost in enumerate(report.exit_mul_adds):
        values = (report.share_by_exit[l], report.exited_accuracy[l], report.exit_accuracy[l])
        row = [str(l + 1), _short(backbone * cost), f"{cost:.4f}", *(_number(v, ".2f", 100) for v in values)]
        row += [_number(v, ".2f", 100) for v in (report.exit_ece_raw[l], report.exit_ece[l])]
        row.append(f"{report.temperatures[l]:.3f}")
        rows.append(row + ([f"{float(thresholds[l]):.4f}"] if thresholds else []))
    return markdown_table(header, rows)


def lambdas_table(reports: Sequence[EvaluationReport]) -> str:
    """What one checkpoint achieves at each lambda, in the order given."""
    rows = [
        [
            _number(report.lam, ".4g"), f"{100 * report.accuracy:.2f}", f"{report.normalised_mul_adds:.4f}",
            _short(report.mul_adds), f"{100 * report.ece:.2f}",
        ]
        for report in reports
    ]  # fmt: skip
    return markdown_table(["λ", "accuracy (%)", "Mul-Adds (share)", "Mul-Adds", "ECE (%)"], rows)


def thresholds_table(point: OperatingPoint, alphas: Sequence[float], method: str = "grouped") -> str:
    """The conformal thresholds of every exit at those of ``alphas`` that were calibrated; ∞ where there is none."""
    known = [alpha for alpha in alphas if alpha in point.thresholds.get(method, {})]
    if not known:
        raise ValueError(f"Expected {method!r} thresholds at some of {list(alphas)}, but got none; calibrate them.")
    columns = [["∞" if t == math.inf else f"{t:.4f}" for t in point.thresholds_at(alpha, method)] for alpha in known]
    exits, groups = [str(l + 1) for l in range(len(point.groups))], [str(group + 1) for group in point.groups]
    left = [str(count) for count in point.calibration_by_exit] or ["-"] * len(exits)
    header = ["exit", "group", "calibration images that leave", *(f"threshold (α = {alpha:g})" for alpha in known)]
    return markdown_table(header, list(zip(exits, groups, left, *columns, strict=True)))


def operating_points_table(curves: Curves, alpha: float = 0.05, sets: str = "grouped") -> str:
    """Every operating point of every method, from cheap to dear; intervals are 95 % bootstrap intervals."""
    check_comparable(curves)
    header = ["method", "seed", "λ", "Mul-Adds (share)", "Mul-Adds", "accuracy (%)", "95 % interval", "ECE before (%)"]
    header += ["ECE after (%)", "NLL (nats)", "Brier", f"coverage (%, {sets}, α = {alpha:g})", "inefficiency (classes)"]
    rows = []
    for method, seeds in curves.items():
        for seed, reports in seeds.items():
            for report in sorted(reports, key=lambda report: report.normalised_mul_adds):
                found = report.set_at(alpha, sets) if report.sets else None
                low, high = (f"{100 * end:.2f}" for end in report.intervals["accuracy"])
                rows.append(
                    [
                        method, str(seed), _number(report.lam, ".4g"), f"{report.normalised_mul_adds:.4f}",
                        _short(report.mul_adds), f"{100 * report.accuracy:.2f}", f"{low} to {high}",
                        f"{100 * report.ece_raw:.2f}", f"{100 * report.ece:.2f}", f"{report.nll:.4f}",
                        f"{report.brier:.4f}", _number(found and found.coverage, ".2f", 100),
                        _number(found and found.inefficiency, ".3f"),
                    ]
                )  # fmt: skip
    return markdown_table(header, rows)


def class_groups_table(
    reports: Mapping[str, EvaluationReport],
    groups: Mapping[str, Sequence[int]],
    alpha: float = 0.05,
    sets: str = "grouped",
) -> str:
    """Accuracy at the exits taken, and coverage, mean over the classes of each group (many, medium, few images).

    Args:
        reports: method -> report; coverage where they have conformal sets.
        groups: name -> class numbers, see ``splits.class_groups``.
    """
    header = ["method", "Mul-Adds (share)"]
    header += [f"{name} ({len(classes)}): {what} (%)" for name, classes in groups.items() for what in ("acc.", "cov.")]
    rows = []
    for method, report in reports.items():
        row = [method, f"{report.normalised_mul_adds:.3f}"]
        covered = report.set_at(alpha, sets).class_coverage if report.sets else None
        for classes in groups.values():
            row += [_number(_mean_of(values, classes), ".2f", 100) for values in (report.class_accuracy, covered)]
        rows.append(row)
    return markdown_table(header, rows)


def _mean_of(values: Sequence[float | None] | None, classes: Sequence[int]) -> float | None:
    known = [values[k] for k in classes if values[k] is not None] if values else []
    return sum(known) / len(known) if known else None


def _number(value: float | None, form: str, scale: float = 1.0) -> str:
    return "-" if value is None else format(scale * value, form)


def _short(count: float | None) -> str:
    """A count as the paper writes it: 15420, 38.5K, 414.3M."""
    if count is None:
        return "-"
    for unit, size, least in (("G", 1e9, 1e10), ("M", 1e6, 1e6), ("K", 1e3, 2e4)):
        if count >= least:
            return f"{count / size:.4g}{unit}"
    return f"{count:.0f}"
