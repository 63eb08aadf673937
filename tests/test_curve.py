"""curve.py: the curve beside the weights, from reports and back, between its points, and what is none."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest

from jeidnn_hf.costs import ExitCosts
from jeidnn_hf.curve import AccuracyCostCurve
from toy_reports import curve as toy_reports

POINTS = {"lam": [0.01, 0.1, 1.0], "accuracy": [0.9, 0.8, 0.5], "normalised_mul_adds": [0.8, 0.5, 0.1]}
IMAGES = {"dataset": "toy", "role": "test", "num_samples": 300, "split_sha256": "0" * 64}
CURVE = AccuracyCostCurve(**POINTS, **IMAGES, exit_mul_adds=[0.1, 1.1], backbone_accuracy=0.95)


def test_a_measured_point_and_one_between():
    assert CURVE.at(0.1) == pytest.approx((0.5, 0.8))
    between = CURVE.at(math.sqrt(0.1 * 1.0))  # in the middle, by the logarithm
    assert between == pytest.approx(((0.5 + 0.1) / 2, (0.8 + 0.5) / 2))
    assert CURVE.at(0.01 * (1 - 1e-9)) == pytest.approx((0.8, 0.9))


@pytest.mark.parametrize("lam", [0.0, 0.009, 1.1])
def test_outside_of_what_was_measured_there_is_no_point(lam):
    assert CURVE.at(lam) is None


def test_reports_become_a_curve_in_the_order_of_lambda(tmp_path):
    reports = [replace(report, lam=lam) for report, lam in zip(toy_reports(), (3, 1, 2, 0), strict=True)]
    curve = AccuracyCostCurve.of_reports(reports, backbone_accuracy=0.5)
    assert curve.lam == [0, 1, 2, 3]
    assert curve.accuracy == [reports[i].accuracy for i in (3, 1, 2, 0)]
    assert curve.normalised_mul_adds == [reports[i].normalised_mul_adds for i in (3, 1, 2, 0)]
    curve.save(tmp_path)
    assert AccuracyCostCurve.load(tmp_path) == curve
    assert (tmp_path / "curve.json").stat().st_size < 2000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "a curve of format 1, but got 2"),
        ({"lam": [0.1, 0.01, 1.0]}, "rise"),
        ({"lam": [0.01, 0.1]}, "one whole point"),
        ({"lam": [], "accuracy": [], "normalised_mul_adds": []}, "one whole point"),
        ({"accuracy": [90, 80, 50]}, "accuracy of a curve in .* got 90"),
        ({"accuracy": [0.9, None, 0.5]}, "accuracy of a curve in .* got None"),
        ({"normalised_mul_adds": [0.8, math.nan, 0.1]}, "normalised_mul_adds"),
        ({"backbone_accuracy": 2}, "accuracy of a curve"),
        ({"colour": "red"}, "colour"),
        ({"role": None}, "role"),
    ],
)
def test_what_is_no_curve_is_refused_on_reading(tmp_path, changes, message):
    (tmp_path / "curve.json").write_text(json.dumps(CURVE.to_dict() | changes))
    with pytest.raises(ValueError, match=f"^Expected .*{message}"):
        AccuracyCostCurve.load(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "null"])
def test_a_broken_file_is_refused(tmp_path, text):
    (tmp_path / "curve.json").write_text(text)
    with pytest.raises(ValueError, match="^Expected a"):
        AccuracyCostCurve.load(tmp_path)


def test_a_curve_of_another_model_is_refused():
    CURVE.check_is_of(ExitCosts((10, 100), (0, 0), (0, 5), (0, 5)))
    for table in (((10, 100), (0, 0), (0, 5), (0, 6)), ((110,), (0,), (0,), (0,))):
        with pytest.raises(ValueError, match="^Expected a curve of this model"):
            CURVE.check_is_of(ExitCosts(*table))
