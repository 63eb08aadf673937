"""Reports kept as curves in a run's folder: one method and one seed at several operating points."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .costs import ExitCosts
from .evaluation import EvaluationReport
from .files import read_json, write_text

FOLDER = "reports"
Curves = Mapping[str, Mapping[int, Sequence[EvaluationReport]]]
"""Method -> seed of the training -> reports, one per operating point."""


def save_curve(path: str | Path, method: str, seed: int, reports: Sequence[EvaluationReport]) -> None:
    """Writes one curve as JSON, making its folder; a ValueError without reports."""
    if not reports:
        raise ValueError(f"Expected reports of {method!r}, but got none; evaluate at one lambda at least.")
    curve = {"method": method, "seed": seed, "reports": [report.to_dict() for report in reports]}
    write_text(path, json.dumps(curve, indent=1, allow_nan=False))


def load_curves(run_dir: str | Path) -> dict[str, dict[int, list[EvaluationReport]]]:
    """Reads every curve in ``run_dir/reports``, in the order of the file names.

    Raises:
        ValueError: no curve, a file that is none, a report of another schema, one method and seed twice.
    """
    paths = sorted(Path(run_dir, FOLDER).glob("*.json"))
    if not paths:
        where = str(Path(run_dir, FOLDER))
        raise ValueError(f"Expected reports in {where!r}, but found none; run `jeidnn evaluate` on this folder first.")
    curves: dict[str, dict[int, list[EvaluationReport]]] = {}
    for path in paths:
        curve = read_json(path, "JSON")
        try:
            method, seed, reports = str(curve["method"]), int(curve["seed"]), list(curve["reports"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"Expected a curve as it was saved, but {path} has {error!r}; evaluate again.") from error
        if not reports or seed in curves.get(method, {}):
            what = "a second curve of that method and seed" if reports else "no reports"
            raise ValueError(f"Expected one curve of {method!r}, seed {seed}, but {path} has {what}; remove it.")
        curves.setdefault(method, {})[seed] = [EvaluationReport.from_dict(values, str(path)) for values in reports]
    return curves


def load_logs(run_dir: str | Path) -> dict[str, list[dict[str, Any]]]:
    """The trainer's log of every model in a run's folder, by the model's name; empty where none was kept."""
    paths = sorted(Path(run_dir).glob("*/checkpoints/trainer_state.json"))
    try:
        return {path.parent.parent.name: read_json(path, "JSON")["log_history"] for path in paths}
    except (KeyError, TypeError) as error:
        raise ValueError(f"Expected logs of a trainer in {str(run_dir)!r}, but one has no {error}.") from error


def load_costs(run_dir: str | Path) -> dict[str, ExitCosts]:
    """The cost tables of the saved models in a run's folder; models of the same table share it, their names joined."""
    names: dict[ExitCosts, list[str]] = {}
    for path in sorted(Path(run_dir).glob("*/config.json")):
        if table := read_json(path, "JSON").get("mul_adds"):
            names.setdefault(ExitCosts.from_dict(table), []).append(path.parent.name)
    return {", ".join(models): table for table, models in names.items()}


def at_budget(curves: Curves, budget: float) -> dict[str, EvaluationReport]:
    """Of each method, the report of its first seed whose mean normalised Mul-Adds are nearest to ``budget``."""
    return {
        method: min(next(iter(seeds.values())), key=lambda report: abs(report.normalised_mul_adds - budget))
        for method, seeds in curves.items()
    }


def check_comparable(curves: Curves) -> EvaluationReport:
    """Any of the reports; a ValueError where there is none, or where two are not of the same images or in one unit."""
    reports = [report for seeds in curves.values() for reports in seeds.values() for report in reports]
    empty = [method for method, seeds in curves.items() if not all(seeds.values()) or not seeds]
    if empty or not reports:
        raise ValueError(f"Expected reports of every method, but got none of {empty or 'any'}; evaluate first.")
    splits = sorted({(r.dataset, r.role, r.split_sha256[:8]) for r in reports})
    if len(splits) > 1:
        raise ValueError(f"Expected reports on the same images, but got {splits}; draw them in separate figures.")
    units = sorted({report.cost_unit for report in reports})
    if len(units) > 1:
        raise ValueError(f"Expected costs in one unit, but got {units}; draw them in separate figures.")
    return reports[0]
