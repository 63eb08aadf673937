"""figures.py: the files of a run, and the page that shows them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from jeidnn_hf import figures
from jeidnn_hf.costs import ExitCosts
from jeidnn_hf.figures import draw_figures
from jeidnn_hf.tables import TrainingCost
from toy_reports import curve, two_methods

STEMS = ["accuracy", "ece", "inefficiency", "inefficiency_oracle", "miscoverage", "inefficiency_by_policy"]
STEMS += ["inefficiency_by_sets", "decomposition_0.5", "reliability_0.5", "ece_by_exit", "conditional_accuracy"]


@pytest.fixture
def saved(monkeypatch) -> list[str]:
    """The names of the figures, which are drawn but not written."""
    names: list[str] = []
    monkeypatch.setattr(figures, "save_figure", lambda figure, path: names.append(path.name))
    return names


def test_every_figure_and_a_page_that_shows_them(tmp_path, saved):
    logs = {"run": [{"epoch": 1.0, "eval_accuracy": 0.5}]}
    costs = {"network": ExitCosts((1000,), (0,), (0,), (0,))}
    paths = draw_figures(
        two_methods(), tmp_path, budgets=[0.5], backbone_accuracy=0.9, logs=logs, costs=costs,
        trainings={"first": TrainingCost(60.0)},
    )  # fmt: skip
    assert saved == [f"{stem}.{suffix}" for stem in [*STEMS, "training"] for suffix in ("png", "svg")]
    assert [path.name for path in paths] == [*saved, "figures.md"]
    page = paths[-1].read_text()
    assert page.startswith("# Figures and tables: toy, test role, 300 images\n")
    assert re.findall(r"!\[.*\]\((.*)\)", page) == saved[::2]
    assert all(f"[svg]({name})" in page for name in saved[1::2])
    assert page.count("\n| method | seed |") == 1 and page.count("\n| exit | Mul-Adds |") == 2
    assert "| first | 1.0 | - | - |" in page and "| 1 | 1000 | +0 |" in page and "| JEI-DNN, paper's recipe |" in page


def test_files_of_both_formats(tmp_path):
    paths = draw_figures({"a": {0: curve(0, calibrated=False)}}, tmp_path / "new" / "folder", budgets=[0.5])
    assert sorted(path.name for path in paths) == sorted(path.name for path in (tmp_path / "new" / "folder").iterdir())
    for path in paths[:-1]:
        head = path.read_bytes()[:400]
        assert head.startswith(b"\x89PNG") if path.suffix == ".png" else b"<svg" in head or b"<!DOCTYPE svg" in head


def test_without_calibration_data_there_are_no_figures_of_sets(tmp_path, saved):
    curves = {"a": {0: curve(0, calibrated=False)}}
    draw_figures(curves, tmp_path, formats=["svg"], budgets=[0.5])
    assert saved == [f"{stem}.svg" for stem in STEMS if not stem.startswith(("ineff", "misc"))]
    assert "no conformal sets" in (tmp_path / "figures.md").read_text()


def test_budgets_of_the_same_operating_points_are_drawn_once(tmp_path, saved):
    draw_figures({"a": {0: curve(0, calibrated=False)}}, tmp_path, formats=["png"], budgets=[0.0, 0.001, 0.9, 5.0])
    drawn = [name for name in saved if name.startswith("decomposition")]
    assert drawn == ["decomposition_0.png", "decomposition_0.9.png"]


def test_errors_before_a_file_is_written(tmp_path):
    reports = {"a": {0: curve(0)}}
    with pytest.raises(ValueError, match="^Expected reports of every method"):
        draw_figures({}, tmp_path / "no")
    for formats in ((), ("pdf",), ("png", "gif")):
        with pytest.raises(ValueError, match="^Expected formats among"):
            draw_figures(reports, tmp_path / "no", formats)
    with pytest.raises(ValueError, match="^Expected a budget"):
        draw_figures(reports, tmp_path / "no", budgets=())
    with pytest.raises(ValueError, match=r"^Expected conformal sets in all reports or in none, but \['b'\] lack some"):
        draw_figures({**reports, "b": {0: curve(1, calibrated=False)}}, tmp_path / "no")
    with pytest.raises(ValueError, match="^Expected reports on the same images"):
        draw_figures({**reports, "b": {0: [replace(curve(1)[0], dataset="other")]}}, tmp_path / "no")
    with pytest.raises(ValueError, match="^Expected an evaluated method and alpha"):
        draw_figures(reports, tmp_path / "no", alpha=0.03)
    assert not (tmp_path / "no").exists()
