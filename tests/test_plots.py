"""plots.py and panels.py: what is drawn is what the reports say."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PathCollection

from jeidnn_hf import plots
from jeidnn_hf.panels import save_figure, style_of
from toy_reports import ALPHAS, curve, two_methods

LAST_TO_FIRST = [3, 1, 2, 0]  # THRESHOLDS, from cheap to dear


def lines(axes) -> list:
    """What is drawn in data units over more than nothing: no reference line, no entry of the legend alone."""
    return [line for line in axes.get_lines() if line.get_transform() == axes.transData and len(line.get_xdata())]


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def assert_line(line, x, y):
    np.testing.assert_allclose(line.get_xydata(), np.column_stack([x, y]), rtol=0, atol=1e-9)


def assert_band(band, x, intervals):
    """A band's outline goes along the lower ends and back along the upper ones."""
    found = {tuple(point) for point in np.round(band.get_paths()[0].vertices, 9).tolist()}
    assert found == {(round(x_, 9), round(end, 9)) for x_, ends in zip(x, intervals, strict=True) for end in ends}


# ---- against Mul-Adds


def test_frontier_draws_accuracy_cost_and_intervals_of_every_seed():
    figure = plots.plot_frontier(two_methods(), backbone_accuracy=0.875)
    (axes,) = figure.axes
    drawn, bands = lines(axes), axes.collections
    assert texts(figure) == ["first (2 seeds)", "second | third", "frozen backbone"]
    assert len(drawn) == len(bands) == 3
    expected = [[curve(0)[i] for i in LAST_TO_FIRST], [curve(1)[i] for i in LAST_TO_FIRST]]
    expected.append([curve(2)[i] for i in LAST_TO_FIRST[1:]])
    for line, band, reports in zip(drawn, bands, expected, strict=True):
        cost = [report.normalised_mul_adds for report in reports]
        assert cost == sorted(cost)
        assert_line(line, cost, [100 * report.accuracy for report in reports])
        assert_band(band, cost, [[100 * end for end in report.intervals["accuracy"]] for report in reports])
    assert drawn[0].get_color() == drawn[1].get_color() != drawn[2].get_color()
    (reference,) = set(axes.get_lines()) - set(drawn)
    assert reference.get_ydata() == [87.5, 87.5]
    assert axes.get_ylabel() == "test accuracy (%)" and "share" in axes.get_xlabel()


def test_frontier_of_plain_lists_and_of_one_point():
    report = curve(0)[0]
    (axes,) = plots.plot_frontier({"one": [report]}).axes
    assert_line(lines(axes)[0], [report.normalised_mul_adds], [100 * report.accuracy])
    (bar,) = axes.collections[0].get_segments()
    low, high = (100 * end for end in report.intervals["accuracy"])
    np.testing.assert_allclose(bar, [[report.normalised_mul_adds, low], [report.normalised_mul_adds, high]])


def test_ece_is_that_of_all_samples_after_temperature():
    (axes,) = plots.plot_ece({"a": curve(0)}).axes
    reports = [curve(0)[i] for i in LAST_TO_FIRST]
    assert_line(lines(axes)[0], [r.normalised_mul_adds for r in reports], [100 * r.ece for r in reports])
    assert not axes.collections and axes.get_ylim()[0] == 0


def test_inefficiency_and_coverage_at_a_fixed_alpha():
    figure = plots.plot_inefficiency({"a": curve(0)}, alpha=0.1, sets="gated")
    left, right = figure.axes
    reports = [curve(0)[i] for i in LAST_TO_FIRST]
    cost, sets = [r.normalised_mul_adds for r in reports], [r.set_at(0.1, "gated") for r in reports]
    assert_line(lines(left)[0], cost, [s.inefficiency for s in sets])
    assert_band(left.collections[0], cost, [s.intervals["inefficiency"] for s in sets])
    assert_line(lines(right)[0], cost, [100 * s.coverage for s in sets])
    assert_band(right.collections[0], cost, [[100 * end for end in s.intervals["coverage"]] for s in sets])
    assert "90 %" in texts(figure)


def test_the_papers_rule_takes_the_largest_alpha_that_covers_and_leaves_out_the_rest():
    reports = [curve(seed)[i] for seed in (0, 1, 2) for i in range(4)]
    expected = []
    for report in reports:
        tried = {s.alpha: s for s in report.sets if s.method == "general" and s.alpha in (0.02, 0.05)}
        covering = [alpha for alpha in (0.05, 0.02) if tried[alpha].coverage > 0.95]
        if covering:
            expected.append((report.normalised_mul_adds, tried[covering[0]].inefficiency))
    left, _ = plots.plot_inefficiency({"a": reports}, alpha=0.05, sets="general", oracle=True).axes
    assert 0 < len(expected) < 12
    np.testing.assert_allclose(lines(left)[0].get_xydata(), sorted(expected))
    never = [replace(r, sets=[replace(s, coverage=0.5) for s in r.sets]) for r in reports]
    with pytest.raises(ValueError, match="cover more than 0.95, but got none"):
        plots.plot_inefficiency({"a": never}, oracle=True)


def test_an_alpha_or_sets_that_were_not_evaluated():
    for options in ({"alpha": 0.03}, {"sets": "none"}):
        with pytest.raises(ValueError, match="^Expected an evaluated method and alpha among"):
            plots.plot_inefficiency({"a": curve(0)}, **options)
    with pytest.raises(ValueError, match="^Expected an evaluated method and alpha among"):
        plots.plot_conformal_methods({"a": curve(0)}, alpha=0.03)
    bare = {"a": curve(0, calibrated=False)}
    with pytest.raises(ValueError, match="^Expected reports with conformal sets, but got none"):
        plots.plot_conformal_methods(bare)
    with pytest.raises(ValueError, match="^Expected 'grouped' sets of 'a', but got none"):
        plots.plot_miscoverage(bare)


@pytest.mark.parametrize("panel", ["policy", "sets"])
def test_conformal_methods_in_panels(panel):
    methods = ["general", "ims", "strict", "gated", "grouped"]
    curves = {"a": {0: curve(0)}, "b": {0: curve(2)}}
    figure = plots.plot_conformal_methods(curves, alpha=0.1, panel=panel)
    inside, across = (["a", "b"], methods) if panel == "policy" else (methods, ["a", "b"])
    assert [axes.get_title() for axes in figure.axes] == inside and texts(figure) == across
    for axes in figure.axes:
        for name, line in zip(across, lines(axes), strict=True):
            policy, method = (axes.get_title(), name) if panel == "policy" else (name, axes.get_title())
            reports = [curves[policy][0][i] for i in LAST_TO_FIRST]
            sizes = [report.set_at(0.1, method).inefficiency for report in reports]
            assert_line(line, [report.normalised_mul_adds for report in reports], sizes)
    with pytest.raises(ValueError, match="^Expected panel to be"):
        plots.plot_conformal_methods(curves, panel="both")


def test_miscoverage_is_averaged_over_points_and_seeds():
    (axes,) = plots.plot_miscoverage(two_methods(), sets="strict").axes
    reports = [*curve(0), *curve(1)]
    missed = [np.mean([100 - 100 * r.set_at(alpha, "strict").coverage for r in reports]) for alpha in ALPHAS]
    assert_line(lines(axes)[0], [100 * alpha for alpha in ALPHAS], missed)


# ---- of one operating point per method


def test_decomposition_has_a_marker_per_exit_of_an_area_like_its_share():
    reports = {"sure": curve(0)[0], "hasty": curve(0)[3]}
    figure = plots.plot_decomposition(reports)
    for axes, field in zip(figure.axes, ("exited_accuracy", "exit_accuracy"), strict=True):
        marks = [c for c in axes.collections if isinstance(c, PathCollection) and len(c.get_offsets())]
        for found, line, report in zip(marks, lines(axes), reports.values(), strict=True):
            kept = [l for l in range(4) if getattr(report, field)[l] is not None]
            points = [(l + 1, 100 * getattr(report, field)[l]) for l in kept]
            np.testing.assert_allclose(found.get_offsets(), points)
            np.testing.assert_allclose(line.get_xydata(), points)
            shares = [report.share_by_exit[l] for l in kept]
            np.testing.assert_allclose(found.get_sizes(), marks[0].get_sizes().sum() * np.array(shares))
        dotted = [line.get_ydata()[0] for line in axes.get_lines() if line.get_transform() != axes.transData]
        assert dotted == [100 * report.accuracy for report in reports.values()]
    assert reports["hasty"].exited_accuracy[1:] == [None] * 3


@pytest.mark.parametrize(
    ("draw", "fields"),
    [
        (plots.plot_exit_ece, ("exit_ece", "exit_ece_raw")),
        (plots.plot_conditional_accuracy, ("conditional_accuracy", "exit_accuracy")),
    ],
)
def test_two_values_per_exit(draw, fields):
    reports = {"a": curve(0)[0], "b": curve(2)[0]}
    (axes,) = draw(reports).axes
    drawn = iter(lines(axes))
    for report in reports.values():
        for field in fields:
            points = [(l + 1, 100 * y) for l, y in enumerate(getattr(report, field)) if y is not None]
            np.testing.assert_allclose(next(drawn).get_xydata(), points)
    assert next(drawn, None) is None and axes.get_xlabel() == "exit"
    assert curve(0)[0].conditional_accuracy[0] is None


def test_networks_of_other_exits_are_laid_out_by_cost():
    short = curve(0, exits=3, calibrated=False)[0]
    (axes,) = plots.plot_exit_ece({"a": curve(0)[0], "b": short}).axes
    assert lines(axes)[0].get_xdata().tolist() == curve(0)[0].exit_mul_adds
    assert lines(axes)[2].get_xdata().tolist() == short.exit_mul_adds
    assert axes.get_xlabel().startswith("cost")


def test_one_exit():
    report = curve(0, exits=1, calibrated=False)[0]
    for draw in (plots.plot_decomposition, plots.plot_exit_ece, plots.plot_conditional_accuracy):
        axes = draw({"a": report}).axes[0]
        assert axes.get_xticks().tolist() == [1]


def test_reliability_shows_the_bins():
    (axes,) = plots.plot_reliability({"a": curve(0)[0]}).axes
    bins = curve(0)[0].reliability
    (line,) = [line for line in lines(axes) if len(line.get_xdata()) > 2]
    assert_line(line, [100 * c for c in bins["confidence"]], [100 * a for a in bins["accuracy"]])
    assert axes.get_xlim() == axes.get_ylim()


# ---- training logs


def test_training_curves_from_logs():
    entries = [(0.5, 0.2), (1.0, 0.6), (1.0, 0.9)]
    history = [{"epoch": 0.1, "loss": 3.0}, *({"epoch": e, "step": 1, "eval_accuracy": a} for e, a in entries)]
    (axes,) = plots.plot_training({"run": history}).axes
    assert_line(lines(axes)[0], [0.5, 1, 1], [20, 60, 90])
    with pytest.raises(ValueError, match="^Expected 'eval_accuracy' in the log of 'other', but it has none"):
        plots.plot_training({"run": history, "other": history[:1]})
    with pytest.raises(ValueError, match="^Expected a training log"):
        plots.plot_training({})


# ---- looks, files, errors


def test_methods_differ_in_grey_too():
    looks = [style_of(i) for i in range(49)]
    assert len({(colour, marker) for colour, marker, _ in looks}) == 49
    assert all(len({(marker, str(line)) for _, marker, line in looks[i : i + 7]}) == 7 for i in range(43))


@pytest.mark.parametrize(("count", "length"), [(1, 3), (9, 8), (4, 45), (14, 16)])
def test_the_legend_lies_inside_the_figure_and_below_the_panels(count, length):
    figure = plots.plot_frontier({f"{i:02d}".ljust(length, "m"): curve(0)[:2] for i in range(count)}, title="title")
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    legend = figure.legends[0].get_window_extent(renderer)
    assert 0 <= legend.x0 and legend.x1 <= figure.bbox.width and legend.y0 >= 0
    (axes,) = figure.axes
    assert legend.y1 <= axes.get_tightbbox(renderer).y0 and axes.bbox.height > 0.4 * figure.bbox.height


def test_files(tmp_path):
    for suffix in ("png", "svg"):
        for name in ("a", "b"):
            plots.plot_frontier(two_methods(), tmp_path / f"{name}.{suffix}")
        assert (tmp_path / f"a.{suffix}").read_bytes() == (tmp_path / f"b.{suffix}").read_bytes()
    assert "date" not in (tmp_path / "a.svg").read_text().lower()
    with PIL.Image.open(tmp_path / "a.png") as picture:
        assert picture.width == 1024 and np.asarray(picture.convert("L")).std() > 5
    with pytest.raises(ValueError, match="^Expected a path that ends in .png or .svg, but got 'a.gif'"):
        save_figure(plots.plot_ece({"a": curve(0)[:1]}), "a.gif")


def test_no_reports():
    for curves in ({}, {"a": []}, {"a": {}}, {"a": {0: curve(0), 1: []}}):
        with pytest.raises(ValueError, match="^Expected reports of every method, but got none of"):
            plots.plot_frontier(curves)
    with pytest.raises(ValueError, match="^Expected reports of every method"):
        plots.plot_decomposition({})


def test_reports_on_other_images_are_not_compared():
    other = replace(curve(0)[0], split_sha256="f" * 64)
    with pytest.raises(ValueError, match="^Expected reports on the same images"):
        plots.plot_frontier({"a": curve(0), "b": [other]})


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install jeidnn-hf\[plots\]"):
        plots.plot_frontier({"a": curve(0)})
