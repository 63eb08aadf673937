"""Figures, as pure functions of reports and training logs. Needs matplotlib (``pip install jeidnn-hf[plots]``).

Every function returns a matplotlib ``Figure``, and writes it where ``path`` is given: PNG or SVG, by the suffix. Curves
are method -> seed -> reports (``reports.Curves``), or method -> reports where there is one seed; each seed is a line of
its own. All raise a ValueError without reports, and an ImportError without matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .evaluation import EvaluationReport
from .panels import DOTTED, PathLike, draw_line, finish, nested, new_panels, style_of
from .reports import Curves, check_comparable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKER_AREA = 500.0  # of all samples, in square points
SET_SIZE = "inefficiency (mean classes per set)"

AnyCurves = Curves | Mapping[str, Sequence[EvaluationReport]]


# ---- against Mul-Adds


def plot_frontier(
    curves: AnyCurves, path: PathLike = None, *, backbone_accuracy: float | None = None, title: str = ""
) -> Figure:
    """Accuracy against normalised Mul-Adds with 95 % bands (Figures 2, 9, 11, 15, 16 and 19).

    ``backbone_accuracy``: of the frozen backbone with its own classifier, a fraction; drawn as a dotted line.
    """
    curves, first = _by_seed(curves)
    figure, (axes,) = new_panels(1, title)
    _draw_against_cost(axes, curves, lambda r: (100 * r.accuracy, _percent(r.intervals["accuracy"])))
    if backbone_accuracy is not None:
        axes.axhline(100 * backbone_accuracy, **DOTTED, label="frozen backbone")
    axes.set(xlabel=_cost_label(first), ylabel=f"{first.role} accuracy (%)")
    return finish(figure, path)


def plot_ece(curves: AnyCurves, path: PathLike = None, *, title: str = "") -> Figure:
    """Expected calibration error of the exits taken, after temperature, against Mul-Adds (Figures 5a and 12).

    Without bands: the ECE of a tenth of the samples is larger than that of all, and so is the interval of its mean.
    """
    curves, first = _by_seed(curves)
    figure, (axes,) = new_panels(1, title)
    _draw_against_cost(axes, curves, lambda r: (100 * r.ece, None))
    axes.set(xlabel=_cost_label(first), ylabel="ECE (%)")
    axes.set_ylim(bottom=0)
    return finish(figure, path)


def plot_inefficiency(
    curves: AnyCurves,
    path: PathLike = None,
    *,
    alpha: float = 0.05,
    sets: str = "grouped",
    oracle: bool = False,
    title: str = "",
) -> Figure:
    """Mean size of the conformal sets, and their coverage, against Mul-Adds, with 95 % bands (Figures 5b and 13).

    ``oracle``: the paper's rule, the largest evaluated alpha whose coverage on these very samples exceeds 1 - alpha; an
    operating point where none does is left out. It looks at test labels.

    Raises:
        ValueError: sets or an alpha that was not evaluated; with ``oracle``, no point left.
    """
    curves, first = _by_seed(curves)

    def measure(name: str, scale: float):
        def at(report: EvaluationReport):
            found = report.oracle_alpha(alpha, sets) if oracle else report.set_at(alpha, sets)
            return found and (scale * getattr(found, name), [scale * end for end in found.intervals[name]])

        return at

    figure, (left, right) = new_panels(2, title)
    drawn = _draw_against_cost(left, curves, measure("inefficiency", 1))
    if not drawn:
        wanted = f"{sets} sets of an alpha up to {alpha} that cover more than {1 - alpha:g}"
        raise ValueError(f"Expected {wanted}, but got none; evaluate at smaller alphas.")
    _draw_against_cost(right, curves, measure("coverage", 100))
    right.axhline(100 * (1 - alpha), **DOTTED, label=f"{100 * (1 - alpha):g} %")
    left.set(xlabel=_cost_label(first), ylabel=SET_SIZE)
    right.set(xlabel=_cost_label(first), ylabel="empirical coverage (%)")
    return finish(figure, path)


def plot_conformal_methods(
    curves: AnyCurves, path: PathLike = None, *, alpha: float = 0.05, panel: str = "policy", title: str = ""
) -> Figure:
    """Inefficiency against Mul-Adds by conformal method: ``panel="policy"``, one panel per policy with a line per
    conformal method (Figure 7); ``panel="sets"``, one panel per conformal method with a line per policy (Figure 8)."""
    if panel not in ("policy", "sets"):
        raise ValueError(f'Expected panel to be "policy" or "sets", but got {panel!r}.')
    curves, first = _by_seed(curves)
    methods = list(dict.fromkeys(sets.method for sets in first.sets))
    if not methods:
        raise ValueError("Expected reports with conformal sets, but got none; give evaluate() a calibrated point.")

    def measure(method: str):
        return lambda report: (report.set_at(alpha, method).inefficiency, None)

    figure, panels = new_panels(len(curves) if panel == "policy" else len(methods), title, sharey=True)
    if panel == "policy":
        for axes, (name, seeds) in zip(panels, curves.items(), strict=True):
            axes.set_title(_with_seeds(name, seeds), fontsize="medium")
            for i, method in enumerate(methods):
                _draw_curve(axes, seeds, measure(method), method, i, **nested(i, len(methods)))
    else:
        for axes, method in zip(panels, methods, strict=True):
            axes.set_title(method, fontsize="medium")
            _draw_against_cost(axes, curves, measure(method))
    for axes in panels:
        axes.set_xlabel(_cost_label(first))
    for axes in panels[::3]:
        axes.set_ylabel(SET_SIZE)
    return finish(figure, path)


# ---- of one operating point per method


def plot_decomposition(
    reports: Mapping[str, EvaluationReport], path: PathLike = None, *, title: str = ""
) -> Figure:
    """Accuracy of each exit (a) on the samples that leave there and (b) on all; the area of a marker is the share of
    samples that leave, the dotted line the final accuracy (Figures 3, 17 and 18)."""
    figure, panels = new_panels(2, title, sharey=True)
    place = _exit_axis(panels, reports)
    for axes, part in zip(panels, ("exited_accuracy", "exit_accuracy"), strict=True):
        for i, (name, report) in enumerate(reports.items()):
            colour, marker, line = style_of(i)
            points = [
                (x, 100 * y, MARKER_AREA * share)
                for x, y, share in zip(place(report), getattr(report, part), report.share_by_exit, strict=True)
                if y is not None
            ]
            x, y, area = zip(*points, strict=True)
            axes.plot(x, y, color=colour, lw=0.9, linestyle=line, alpha=0.7, zorder=2)
            axes.scatter(x, y, area, color=colour, marker=marker, alpha=0.6, lw=0, zorder=3)
            axes.axhline(100 * report.accuracy, color=colour, lw=1, linestyle=":", zorder=1)
            text = f"{name}, {report.normalised_mul_adds:.2f} Mul-Adds: {100 * report.accuracy:.1f} %"
            axes.plot([], [], color=colour, marker=marker, linestyle=line, lw=0.9, label=text)
        axes.margins(0.07)
    for share in (0.05, 0.25):
        text = f"area: {100 * share:g} % of samples leave"
        panels[0].scatter([], [], MARKER_AREA * share, color="0.5", lw=0, label=text)
    panels[0].plot([], [], **DOTTED, label="final accuracy")
    panels[0].set_ylabel("accuracy (%)")
    panels[0].set_title("a) on the samples that leave at the exit", fontsize="medium")
    panels[1].set_title("b) on all samples", fontsize="medium")
    return finish(figure, path)


def plot_exit_ece(reports: Mapping[str, EvaluationReport], path: PathLike = None, *, title: str = "") -> Figure:
    """ECE of every exit on all samples, before and after its temperature (Figure 4)."""
    pairs = {"after temperature": "exit_ece", "before": "exit_ece_raw"}
    return _plot_by_exit(reports, path, pairs, "ECE (%)", title, bottom=0)


def plot_conditional_accuracy(
    reports: Mapping[str, EvaluationReport], path: PathLike = None, *, title: str = ""
) -> Figure:
    """Accuracy of each exit on the samples that the exit before gets right, and on all samples (Figure 20)."""
    pairs = {"right at the exit before": "conditional_accuracy", "all samples": "exit_accuracy"}
    return _plot_by_exit(reports, path, pairs, "accuracy (%)", title)


def plot_reliability(reports: Mapping[str, EvaluationReport], path: PathLike = None, *, title: str = "") -> Figure:
    """Reliability diagram of the exits taken: accuracy against confidence in bins of equal mass."""
    _check_reports(reports)
    figure, (axes,) = new_panels(1, title)
    figure.set_size_inches(5.6, 5.2)
    axes.axline((0, 0), slope=1, **DOTTED, label="calibrated")
    for i, (name, report) in enumerate(reports.items()):
        x, y = ([100 * v for v in report.reliability[key]] for key in ("confidence", "accuracy"))
        draw_line(axes, x, y, i, f"{name}: ECE {100 * report.ece:.2f} % at {report.normalised_mul_adds:.2f} Mul-Adds")
    low = min(min(r.reliability["confidence"] + r.reliability["accuracy"]) for r in reports.values())
    limits = (100 * low - 2, 102)
    axes.set(xlabel="mean confidence of a bin (%)", ylabel="accuracy of a bin (%)", xlim=limits, ylim=limits)
    axes.set_aspect("equal")
    return finish(figure, path)


# ---- others


def plot_miscoverage(
    curves: AnyCurves, path: PathLike = None, *, sets: str = "grouped", title: str = ""
) -> Figure:
    """Empirical miscoverage, averaged over a method's operating points and seeds, against the alpha that was asked for
    (Figure 5c)."""
    curves, first = _by_seed(curves)
    figure, (axes,) = new_panels(1, title)
    for i, (name, seeds) in enumerate(curves.items()):
        reports = [report for reports in seeds.values() for report in reports]
        alphas = sorted({s.alpha for report in reports for s in report.sets if s.method == sets})
        if not alphas:
            raise ValueError(f"Expected {sets!r} sets of {name!r}, but got none; give evaluate() a calibrated point.")
        missed = [100 * sum(1 - r.set_at(alpha, sets).coverage for r in reports) / len(reports) for alpha in alphas]
        draw_line(axes, [100 * alpha for alpha in alphas], missed, i, name)
    axes.axline((0, 0), slope=1, **DOTTED, label="as requested")
    axes.set(xlabel="requested miscoverage α (%)", ylabel="mean empirical miscoverage (%)")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    return finish(figure, path)


def plot_training(
    logs: Mapping[str, Sequence[Mapping[str, Any]]],
    path: PathLike = None,
    *,
    metric: str = "eval_accuracy",
    label: str = "validation accuracy (%)",
    title: str = "",
) -> Figure:
    """A fraction that the trainer logged, in percent, against the epoch (Figure 10).

    Args:
        logs: run -> ``log_history`` as in ``trainer_state.json``.
    """
    if not logs:
        raise ValueError("Expected a training log at least, but got none; keep the trainer's log_history.")
    figure, (axes,) = new_panels(1, title)
    for i, (name, history) in enumerate(logs.items()):
        points = [(entry["epoch"], 100 * entry[metric]) for entry in history if metric in entry]
        if not points:
            raise ValueError(f"Expected {metric!r} in the log of {name!r}, but it has none; set eval_strategy.")
        draw_line(axes, *zip(*points, strict=True), i, name)
    axes.set(xlabel="epoch", ylabel=label)
    return finish(figure, path)


# ---- what they share


Measure = Callable[[EvaluationReport], tuple[float, Sequence[float] | None] | None]


def _draw_against_cost(axes: Axes, curves: Curves, measure: Measure) -> int:
    return sum(
        _draw_curve(axes, seeds, measure, _with_seeds(name, seeds), i)
        for i, (name, seeds) in enumerate(curves.items())
    )


def _draw_curve(
    axes: Axes, seeds: Mapping[int, Sequence[EvaluationReport]], measure: Measure, label: str, i: int, **options: Any
) -> int:
    """A line per seed and its band, a bar for a single point; ``measure`` gives a value and its interval, or None.
    Returns how many points."""
    drawn = 0
    for reports in seeds.values():
        found = [(r.normalised_mul_adds, measure(r)) for r in reports]
        points = sorted(((x, *values) for x, values in found if values), key=lambda point: point[:2])
        if not points:
            continue
        x, y, intervals = zip(*points, strict=True)
        draw_line(axes, x, y, i, label, **options)
        if None not in intervals:
            low, high = zip(*intervals, strict=True)
            if len(x) > 1:
                axes.fill_between(x, low, high, color=style_of(i)[0], alpha=0.15, lw=0)
            else:
                axes.vlines(x, low, high, color=style_of(i)[0], lw=1.4)
        drawn, label = drawn + len(points), "_same"
    return drawn


def _with_seeds(name: str, seeds: Mapping[int, Any]) -> str:
    return name if len(seeds) == 1 else f"{name} ({len(seeds)} seeds)"


def _plot_by_exit(
    reports: Mapping[str, EvaluationReport],
    path: PathLike,
    fields: Mapping[str, str],
    label: str,
    title: str,
    bottom: float | None = None,
) -> Figure:
    """Two fields per exit of each method, the first with full markers and lines, the second hollow and dotted."""
    figure, (axes,) = new_panels(1, title)
    place = _exit_axis([axes], reports)
    looks = ({"linestyle": "-"}, {"linestyle": ":", "markerfacecolor": "white"})
    for i, (name, report) in enumerate(reports.items()):
        axes.plot([], [], color=style_of(i)[0], marker=style_of(i)[1], linestyle="", label=name)
        for field, look in zip(fields.values(), looks, strict=True):
            points = [(x, 100 * y) for x, y in zip(place(report), getattr(report, field), strict=True) if y is not None]
            if points:
                draw_line(axes, *zip(*points, strict=True), i, None, **nested(i, len(reports)), **look)
    for text, look in zip(fields, looks, strict=True):
        axes.plot([], [], color="0.4", lw=1.4, linestyle=look["linestyle"], label=text)
    axes.set_ylabel(label)
    axes.set_ylim(bottom=bottom)
    return finish(figure, path)


def _exit_axis(
    panels: Sequence[Axes], reports: Mapping[str, EvaluationReport]
) -> Callable[[EvaluationReport], Iterable[float]]:
    """Where the exits lie on the x-axis: their numbers, or what they cost where the networks have not as many."""
    _check_reports(reports)
    counts = {len(report.share_by_exit) for report in reports.values()}
    for axes in panels:
        axes.set_xlabel("exit" if len(counts) == 1 else "cost of leaving there (share of the backbone's)")
        if len(counts) == 1:
            axes.set_xticks(range(1, max(counts) + 1, -(-max(counts) // 10)))
    return lambda report: range(1, max(counts) + 1) if len(counts) == 1 else report.exit_mul_adds


def _cost_label(report: EvaluationReport) -> str:
    return f"mean {report.cost_unit} per image (share of the backbone's)"


def _check_reports(reports: Mapping[str, EvaluationReport]) -> None:
    check_comparable({name: {0: [report]} for name, report in reports.items()})


def _percent(values: Iterable[float]) -> list[float]:
    return [100 * value for value in values]


def _by_seed(curves: AnyCurves) -> tuple[Curves, EvaluationReport]:
    curves = {name: runs if isinstance(runs, Mapping) else {0: runs} for name, runs in curves.items()}
    return curves, check_comparable(curves)
