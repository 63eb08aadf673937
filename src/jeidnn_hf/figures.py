"""All figures and tables of a run, with a page ``figures.md`` that shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plots, tables
from .costs import ExitCosts
from .panels import save_figure
from .reports import Curves, at_budget, check_comparable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "figures.md"


def draw_figures(
    curves: Curves,
    folder: str | Path,
    formats: Sequence[str] = ("png", "svg"),
    *,
    alpha: float = 0.05,
    sets: str = "grouped",
    budgets: Sequence[float] = (0.3, 0.5, 0.7),
    backbone_accuracy: float | None = None,
    logs: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    costs: Mapping[str, ExitCosts] | None = None,
    trainings: Mapping[str, tables.TrainingCost] | None = None,
) -> list[Path]:
    """Draws everything that the reports give into a folder and writes ``figures.md``; returns the paths of all files.

    Args:
        curves: method -> seed -> reports, see ``reports.load_curves``; all on the same images.
        formats: of png and svg.
        alpha, sets: the conformal sets that the figures and tables show.
        budgets: shares of the backbone's Mul-Adds; what is drawn exit by exit is at each method's point nearest to one.
        backbone_accuracy: of the frozen backbone, a fraction.
        logs: run -> the trainer's ``log_history``, for the training curves.
        costs: network -> cost table, for Tables 2 and 3.
        trainings: method -> what its training took, for Table 1.

    Raises:
        ValueError: no reports, reports on different images, an unknown format, an alpha or sets not evaluated.
        ImportError: matplotlib is not installed.
    """
    first = check_comparable(curves)
    if not formats or set(formats) - {"png", "svg"}:
        raise ValueError(f'Expected formats among ("png", "svg"), but got {tuple(formats)!r}.')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{first.dataset}, {first.role} role, {first.num_samples:,} images"
    page, written = [f"# Figures and tables: {title}", ""], []
    drawn = _figures(curves, title, alpha, sets, budgets, backbone_accuracy, logs or {})
    for stem, figure, caption in drawn:
        paths = [folder / f"{stem}.{suffix}" for suffix in formats]
        for path in paths:
            save_figure(figure, path)
        written += paths
        links = ", ".join(f"[{path.suffix[1:]}]({path.name})" for path in paths)
        page += [f"## {stem.replace('_', ' ')}", "", f"![{stem}]({paths[0].name})", "", f"{caption} ({links})", ""]
    if not first.sets:
        page += ["No conformal sets: the reports were made without calibration data.", ""]
    for heading, table in _tables(curves, alpha, sets, budgets, costs or {}, trainings or {}):
        page += [f"## {heading}", "", table]
    (folder / PAGE).write_text("\n".join(page), encoding="utf-8")
    return [*written, folder / PAGE]


def _figures(curves, title, alpha, sets, budgets, backbone_accuracy, logs) -> Iterator[tuple[str, Figure, str]]:
    bands = "Bands: 95 % bootstrap intervals of the mean over 10 disjoint subsets; each seed is a line of its own."
    yield (
        "accuracy",
        plots.plot_frontier(curves, backbone_accuracy=backbone_accuracy, title=title),
        f"Accuracy against Mul-Adds. {bands}",
    )
    yield (
        "ece",
        plots.plot_ece(curves, title=title),
        "Expected calibration error of the exits taken, 15 equal-mass bins, after temperature scaling.",
    )
    if check_comparable(curves).sets:
        what = f"at α = {alpha:g}, {sets} thresholds"
        yield (
            "inefficiency",
            plots.plot_inefficiency(curves, alpha=alpha, sets=sets, title=title),
            f"Mean size of the conformal sets and their empirical coverage {what}. {bands}",
        )
        yield (
            "miscoverage",
            plots.plot_miscoverage(curves, sets=sets, title=title),
            f"Empirical miscoverage, averaged over operating points and seeds, against the one requested; {sets} "
            "thresholds.",
        )
        yield (
            "inefficiency_by_policy",
            plots.plot_conformal_methods(curves, alpha=alpha, panel="policy", title=title),
            f"Inefficiency of the conformal methods at α = {alpha:g}, a panel per policy.",
        )
        yield (
            "inefficiency_by_sets",
            plots.plot_conformal_methods(curves, alpha=alpha, panel="sets", title=title),
            f"Inefficiency of the policies at α = {alpha:g}, a panel per conformal method.",
        )
    for budget, reports in _at_budgets(curves, budgets):
        yield (
            f"decomposition_{budget:g}",
            plots.plot_decomposition(reports, title=title),
            "Accuracy of each exit on the samples that leave there and on all. The area of a marker is the share of "
            "samples that leave, the dotted line the final accuracy. First seed of each method, the operating point "
            f"nearest to {budget:g} of the Mul-Adds.",
        )
        yield (
            f"reliability_{budget:g}",
            plots.plot_reliability(reports, title=title),
            "Reliability of the exits taken, 15 equal-mass bins, at the same operating points.",
        )
    reports = at_budget(curves, budgets[len(budgets) // 2] if budgets else 0.5)
    yield (
        "ece_by_exit",
        plots.plot_exit_ece(reports, title=title),
        "Expected calibration error of each exit on all samples, before and after its temperature.",
    )
    yield (
        "conditional_accuracy",
        plots.plot_conditional_accuracy(reports, title=title),
        "Accuracy of each exit on the samples that the exit before gets right, and on all.",
    )
    if logs:
        yield "training", plots.plot_training(logs), "Validation accuracy of the exits taken, by epoch of training."


def _tables(curves, alpha, sets, budgets, costs, trainings) -> Iterator[tuple[str, str]]:
    yield "Operating points", tables.operating_points_table(curves, alpha, sets)
    for budget, reports in _at_budgets(curves, budgets):
        for name, report in reports.items():
            heading = f"Exits: {name}, the point nearest to {budget:g}, at {report.normalised_mul_adds:.3f}"
            yield heading, tables.exits_table(report, alpha, sets)
    if trainings:
        yield "Training time and memory", tables.training_table(trainings)
    for name, table in costs.items():
        yield f"Cumulative Mul-Adds per exit: {name}", tables.costs_table(table)
    yield "Methods", tables.methods_table()


def _at_budgets(curves: Curves, budgets: Sequence[float]) -> Iterator[tuple[float, dict]]:
    """The operating points of each budget, left out where all are those of the budget before."""
    before: list[int] = []
    for budget in budgets:
        reports = at_budget(curves, budget)
        if (these := [id(report) for report in reports.values()]) != before:
            yield budget, reports
        before = these
