"""All figures and tables of a run, with a page ``figures.md`` that shows them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import plots, tables
from .costs import ExitCosts
from .evaluation import EvaluationReport
from .files import write_text
from .panels import save_figure
from .reports import Curves, at_budget, check_comparable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = "figures.md"
BANDS = "Bands: 95 % bootstrap intervals of the mean over 10 disjoint subsets. Each seed is a line of its own."


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
    groups: Mapping[str, Sequence[int]] | None = None,
) -> list[Path]:
    """Draws everything that the reports give into a folder and writes ``figures.md``; returns the paths of all files.

    Args:
        curves: method -> seed -> reports, see ``reports.load_curves``; all on the same images.
        formats: of png and svg.
        alpha: of the conformal sets that the figures and tables show.
        sets: the method of these sets.
        budgets: shares of the backbone's Mul-Adds: decompositions and reliability diagrams are drawn at each method's
            operating point nearest to each of them, what else is exit by exit at the middle one.
        backbone_accuracy: of the frozen backbone, a fraction.
        logs: run -> the trainer's ``log_history``, for the training curves.
        costs: network -> cost table, for Tables 2 and 3.
        trainings: method -> what its training took, for Table 1.
        groups: name -> class numbers, for accuracy and coverage by group of classes.

    Raises:
        ValueError: no reports, reports on different images, conformal sets in some of them only, an unknown format, an
            alpha or sets that were not evaluated.
        ImportError: matplotlib is not installed.
    """
    first, reports = check_comparable(curves), _all_reports(curves)
    without = [method for method, found in reports.items() if not all(report.sets for report in found)]
    if without and any(report.sets for found in reports.values() for report in found):
        raise ValueError(f"Expected conformal sets in all reports or in none, but {without} lack some; calibrate them.")
    for report in sum(reports.values(), []) if not without else ():
        report.set_at(alpha, sets)
    if not formats or set(formats) - {"png", "svg"}:
        raise ValueError(f'Expected formats among ("png", "svg"), but got {tuple(formats)!r}; give one or both.')
    if not budgets:
        raise ValueError("Expected a budget at least, but got none; 0.5 is half of the backbone's Mul-Adds.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    title = f"{first.dataset}, {first.role} role, {first.num_samples:,} images"
    page, written = [f"# Figures and tables: {title}", ""], []

    def show(stem: str, figure: Figure, caption: str) -> None:
        paths = [folder / f"{stem}.{suffix}" for suffix in formats]
        for path in paths:
            save_figure(figure, path)
        links = ", ".join(f"[{path.suffix[1:]}]({path.name})" for path in paths)
        page.extend([f"## {stem.replace('_', ' ')}", "", f"![{stem}]({paths[0].name})", "", f"{caption} {links}", ""])
        written.extend(paths)

    for drawn in _curve_figures(curves, title, backbone_accuracy):
        show(*drawn)
    for drawn in _set_figures(curves, title, alpha, sets) if first.sets else ():
        show(*drawn)
    for drawn in _exit_figures(curves, title, budgets):
        show(*drawn)
    if logs:
        caption = "Validation accuracy of the exits taken, by epoch of training (the paper's Figure 10)."
        show("training", plots.plot_training(logs), caption)
    if not first.sets:
        page += ["There are no conformal sets: the reports were made without calibration data.", ""]
    for heading, table in _tables(curves, alpha, sets, _middle(budgets), costs or {}, trainings or {}):
        page += [f"## {heading}", "", table]
    if groups:
        reports = at_budget(curves, _middle(budgets))
        page += ["## Groups of classes", "", tables.class_groups_table(reports, groups, alpha, sets)]
    write_text(folder / PAGE, "\n".join(page))
    return [*written, folder / PAGE]


Drawn = Iterator[tuple[str, "Figure", str]]


def _curve_figures(curves: Curves, title: str, backbone_accuracy: float | None) -> Drawn:
    figure = plots.plot_frontier(curves, backbone_accuracy=backbone_accuracy, title=title)
    yield "accuracy", figure, f"Accuracy against Mul-Adds (the paper's Figures 2, 9, 11, 15, 16, 19). {BANDS}"
    caption = "Expected calibration error of the exits taken, 15 equal-mass bins, after temperature scaling"
    yield "ece", plots.plot_ece(curves, title=title), f"{caption} (Figures 5a, 12)."


def _set_figures(curves: Curves, title: str, alpha: float, sets: str) -> Drawn:
    what = f"Mean size of the conformal sets ({sets} thresholds) and their empirical coverage"
    figure = plots.plot_inefficiency(curves, alpha=alpha, sets=sets, title=title)
    yield "inefficiency", figure, f"{what}, α = {alpha:g} (Figures 5b, 13). {BANDS}"
    if any(r.oracle_alpha(alpha, sets) for reports in _all_reports(curves).values() for r in reports):
        figure = plots.plot_inefficiency(curves, alpha=alpha, sets=sets, oracle=True, title=title)
        rule = (
            f"at the largest evaluated α whose coverage on these very images exceeds {1 - alpha:g}: the paper's rule "
            "for Figures 5b and 13, which looks at test labels. Operating points without such an α are left out."
        )
        yield "inefficiency_oracle", figure, f"{what}, {rule}"
    figure = plots.plot_miscoverage(curves, sets=sets, title=title)
    caption = "Empirical miscoverage, averaged over operating points and seeds, against the one requested"
    yield "miscoverage", figure, f"{caption}; {sets} thresholds (Figure 5c)."
    for panel, figure_number in (("policy", 7), ("sets", 8)):
        figure = plots.plot_conformal_methods(curves, alpha=alpha, panel=panel, title=title)
        each = "policy" if panel == "policy" else "conformal method"
        caption = f"Mean size of the conformal sets, α = {alpha:g}, a panel per {each} (Figure {figure_number})."
        yield f"inefficiency_by_{panel}", figure, caption


def _exit_figures(curves: Curves, title: str, budgets: Sequence[float]) -> Drawn:
    before: list[EvaluationReport] = []
    for budget in budgets:
        reports = at_budget(curves, budget)
        if list(reports.values()) == before:  # the same operating points as at the last budget
            continue
        before = list(reports.values())
        where = f"First seed of each method, its operating point nearest to {budget:g} of the Mul-Adds."
        caption = (
            "Accuracy of each exit on the samples that leave there (a) and on all (b). The area of a marker is the "
            f"share of samples that leave there, the dotted line the final accuracy (Figures 3, 17, 18). {where}"
        )
        yield f"decomposition_{budget:g}", plots.plot_decomposition(reports, title=title), caption
        caption = f"Accuracy against confidence of the exits taken, 15 equal-mass bins. {where}"
        yield f"reliability_{budget:g}", plots.plot_reliability(reports, title=title), caption
    reports = at_budget(curves, _middle(budgets))
    caption = "ECE of each exit on all samples, before and after its temperature (Figure 4). First seed of each method."
    yield "ece_by_exit", plots.plot_exit_ece(reports, title=title), caption
    caption = "Accuracy of each exit on the samples that the exit before gets right, and on all (Figure 20)."
    yield "conditional_accuracy", plots.plot_conditional_accuracy(reports, title=title), caption


def _tables(
    curves: Curves,
    alpha: float,
    sets: str,
    budget: float,
    costs: Mapping[str, ExitCosts],
    trainings: Mapping[str, tables.TrainingCost],
) -> Iterator[tuple[str, str]]:
    yield "Operating points", tables.operating_points_table(curves, alpha, sets)
    for name, report in at_budget(curves, budget).items():
        heading = f"Exits of {name}, first seed, at {report.normalised_mul_adds:.3f} of the Mul-Adds"
        yield heading, tables.exits_table(report, alpha, sets)
    if trainings:
        yield "Training time and memory (Table 1)", tables.training_table(trainings)
    for name, table in costs.items():
        yield f"Cumulative Mul-Adds per exit of {name} (Tables 2, 3)", tables.costs_table(table)
    yield "Methods (Table 4)", tables.methods_table()


def _all_reports(curves: Curves) -> dict[str, list[EvaluationReport]]:
    return {method: [r for reports in seeds.values() for r in reports] for method, seeds in curves.items()}


def _middle(budgets: Sequence[float]) -> float:
    return budgets[len(budgets) // 2]
