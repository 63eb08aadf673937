"""tables.py: the numbers in the cells."""

from __future__ import annotations

from dataclasses import replace

import pytest

from jeidnn_hf.costs import ExitCosts
from jeidnn_hf.operating_point import OperatingPoint
from jeidnn_hf.splits import SplitInfo
from jeidnn_hf.tables import (
    TrainingCost,
    class_groups_table,
    costs_table,
    exits_table,
    lambdas_table,
    markdown_table,
    methods_table,
    operating_points_table,
    thresholds_table,
    training_table,
)
from toy_reports import THRESHOLDS, curve, two_methods


def cells(table: str) -> list[list[str]]:
    """Rows of cells, without the line below the header; all rows are as long as the header."""
    rows = [line.strip("|").split(" | ") for line in table.strip().split("\n")]
    assert len({len(row) for row in rows}) == 1
    return [[cell.strip() for cell in row] for i, row in enumerate(rows) if i != 1]


def test_markdown():
    assert markdown_table(["a", "b"], [["x|y", "1"]]) == "| a | b |\n| --- | --: |\n| x\\|y | 1 |\n"


def test_the_papers_table_2():
    """Of T2T-ViT-7 on CIFAR-10, its IMs of 2,570 and gates of 96 Mul-Adds."""
    backbone = (414_300_000, 538_200_000, 662_100_000, 786_000_000, 909_900_000, 1_034_000_000, 1_158_000_000)
    heads = (2570, 5140, 7710, 10280, 12850, 15420, 15420)
    table = cells(costs_table(ExitCosts(backbone, (0,) * 7, heads, (96, 192, 288, 384, 480, 576, 576))))
    assert [row[0] for row in table] == ["exit", "1", "2", "3", "4", "5", "6", "7"]
    assert [row[1] for row in table[1:]] == ["414.3M", "538.2M", "662.1M", "786M", "909.9M", "1034M", "1158M"]
    assert [row[3] for row in table[1:]] == ["+2570", "+5140", "+7710", "+10280", "+12850", "+15420", "+15420"]
    assert [row[4] for row in table[1:]] == ["+96", "+192", "+288", "+384", "+480", "+576", "+576"]
    assert table[-1][5:] == ["1158M", "0.001 %", "1.0000"]
    assert table[1][5:] == ["414.3M", "0.001 %", "0.3578"]


def test_training_time_and_memory():
    table = training_table({"a": TrainingCost(90.0, 500_560, 3 * 2**29), "b": TrainingCost(parameters=15_420)})
    assert cells(table)[1:] == [["a", "1.5", "500.6K", "1.50"], ["b", "-", "15420", "-"]]


def test_methods():
    rows = {row[0]: row[1:] for row in cells(methods_table())[1:]}
    assert rows["JEI-DNN, paper's recipe"] == ["✓"] * 5
    assert rows["JEI-DNN, default recipe"] == ["✓", "✓", "✓", "", ""]
    assert rows["confidence threshold over trained IMs"] == ["✓", "", "✓", "", ""]
    with pytest.raises(ValueError, match=r"^Expected features among .*, but got \['magic'\]"):
        methods_table({"mine": ["trained IMs", "magic"]})


@pytest.mark.parametrize("which", [0, 3])
def test_exits(which):
    report = curve(0)[which]
    header, *rows = cells(exits_table(report, alpha=0.1, sets="gated"))
    assert header[-1] == "threshold (gated, α = 0.1)" and len(rows) == 4
    thresholds = report.set_at(0.1, "gated").thresholds
    for l, row in enumerate(rows):
        total = 100_000_000 * (l + 1) + 5000 * (l + 1) + 200_000 * (l + 1) + 400 * (l + 1)
        left = report.exited_accuracy[l]
        assert row == [
            str(l + 1), f"{total / 1e6:.4g}M", f"{total / 400e6:.4f}", f"{100 * report.share_by_exit[l]:.2f}",
            "-" if left is None else f"{100 * left:.2f}", f"{100 * report.exit_accuracy[l]:.2f}",
            f"{100 * report.exit_ece_raw[l]:.2f}", f"{100 * report.exit_ece[l]:.2f}",
            f"{report.temperatures[l]:.3f}", f"{thresholds[l]:.4f}",
        ]  # fmt: skip
    assert THRESHOLDS[3] == 0 and (which == 0 or [row[4] for row in rows[1:]] == ["-"] * 3)


def test_exits_without_sets_and_with_infinite_thresholds():
    assert cells(exits_table(curve(0, calibrated=False)[0]))[0][-1] == "temperature"
    report = curve(0)[0]
    infinite = [replace(sets, thresholds=["inf"] * 4) for sets in report.sets]
    assert [row[-1] for row in cells(exits_table(replace(report, sets=infinite)))[1:]] == ["inf"] * 4
    with pytest.raises(ValueError, match="^Expected an evaluated method and alpha"):
        exits_table(report, alpha=0.03)


def test_operating_points_from_cheap_to_dear():
    table = operating_points_table(two_methods(), alpha=0.1, sets="general")
    assert "second \\| third" in table
    rows = cells(table.replace("\\|", "/"))[1:]
    assert [row[:3] for row in rows] == [["first", "0", "-"]] * 4 + [["first", "1", "-"]] * 4 + [
        ["second / third", "0", "-"]
    ] * 3
    report, sets = curve(1)[3], curve(1)[3].set_at(0.1, "general")
    low, high = report.intervals["accuracy"]
    assert rows[4][3:] == [
        f"{report.normalised_mul_adds:.4f}", "100.2M", f"{100 * report.accuracy:.2f}",
        f"{100 * low:.2f} to {100 * high:.2f}", f"{100 * report.ece_raw:.2f}", f"{100 * report.ece:.2f}",
        f"{report.nll:.4f}", f"{report.brier:.4f}", f"{100 * sets.coverage:.2f}", f"{sets.inefficiency:.3f}",
    ]  # fmt: skip
    cost = [float(row[3]) for row in rows[:4]]
    assert cost == sorted(cost) and cost[0] < cost[-1]
    lam = replace(curve(0, calibrated=False)[0], lam=0.0625)
    (row,) = cells(operating_points_table({"m": {0: [lam]}}))[1:]
    assert row[2] == "0.0625" and row[-2:] == ["-", "-"]


def test_lambdas_in_the_order_given():
    reports = [replace(report, lam=lam) for report, lam in zip(curve()[:2], (2.0, 0.03), strict=True)]
    header, *rows = cells(lambdas_table(reports))
    assert header == ["λ", "accuracy (%)", "Mul-Adds (share)", "Mul-Adds", "ECE (%)"]
    assert [row[0] for row in rows] == ["2", "0.03"]
    for row, report in zip(rows, reports, strict=True):
        shown = [float(row[1]) / 100, float(row[2]), float(row[3].removesuffix("M")) * 1e6, float(row[4]) / 100]
        expected = [report.accuracy, report.normalised_mul_adds, report.mul_adds, report.ece]
        assert shown == [pytest.approx(value, rel=1e-3, abs=6e-5) for value in expected]


def test_thresholds_of_an_operating_point():
    thresholds = {"grouped": {0.1: [0.25, float("inf")], 0.05: [0.5, 0.75]}}
    split = SplitInfo("toy", "validation", "test", 9, "0" * 64)
    point = OperatingPoint(0.3, [1.0, 2.0], [0, 1], split, thresholds=thresholds, calibration_by_exit=[7, 2])
    header, *rows = cells(thresholds_table(point, (0.01, 0.05, 0.1)))
    assert header[3:] == ["threshold (α = 0.05)", "threshold (α = 0.1)"]
    assert rows == [["1", "1", "7", "0.5000", "0.2500"], ["2", "2", "2", "0.7500", "∞"]]
    assert cells(thresholds_table(replace(point, calibration_by_exit=[]), (0.05,)))[1][2] == "-"
    for asked in ({"alphas": (0.01,)}, {"alphas": (0.05,), "method": "gated"}):
        with pytest.raises(ValueError, match="^Expected '(grouped|gated)' thresholds at some of"):
            thresholds_table(point, **asked)


def test_groups_of_classes():
    report = curve(0)[0]
    report = replace(report, class_accuracy=[0.5, None, 1.0, 0.25])
    covered = replace(report.set_at(0.1, "gated"), class_coverage=[0.9, 0.8, None, 0.7])
    report = replace(report, sets=[covered])
    header, row = cells(class_groups_table({"m": report}, {"many": [0, 1], "few": [2, 3]}, 0.1, "gated"))
    assert header[2:] == ["many (2): acc. (%)", "many (2): cov. (%)", "few (2): acc. (%)", "few (2): cov. (%)"]
    assert row[2:] == ["50.00", "85.00", "62.50", "70.00"]
    assert cells(class_groups_table({"m": replace(report, sets=[])}, {"medium": []}))[1][2:] == ["-", "-"]
