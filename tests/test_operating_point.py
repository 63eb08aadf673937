"""operating_point.py: what is fitted on which images, and the file it is kept in."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import pytest
import torch

from jeidnn_hf.calibration import fit_temperatures
from jeidnn_hf.conformal import METHODS, ConformalScore, exit_groups, fit_thresholds
from jeidnn_hf.costs import ExitCosts
from jeidnn_hf.operating_point import ALPHAS, OperatingPoint
from jeidnn_hf.policies import ConfidenceThreshold
from jeidnn_hf.record import ExitRecord
from jeidnn_hf.splits import SplitInfo

COSTS = ExitCosts(backbone=(40, 100, 200), pooling=(1, 2, 2), heads=(5, 10, 15), gates=(2, 4, 4))
POLICY = ConfidenceThreshold(torch.tensor([1.0, 1.2, 0.9]), 0.7)


def record_of(role: str, rows, *, seed: int = 0, **options) -> ExitRecord:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(4, (len(rows),), generator=random)
    logits = 3 * torch.randn(len(rows), 3, 4, generator=random) + 3 * torch.eye(4)[labels][:, None]
    split = SplitInfo("toy", role, "train", len(rows), role[0] * 64)
    return ExitRecord(logits, labels, COSTS, split, options.get("backbone"), torch.tensor(rows))


VALIDATION, CALIBRATION = record_of("validation", range(300)), record_of("calibration", range(300, 420), seed=1)


@pytest.fixture(scope="module")
def point() -> OperatingPoint:
    return OperatingPoint.fit(POLICY, VALIDATION, CALIBRATION, lam=0.25, min_group=40)


def test_what_is_fitted(point):
    assert point.lam == 0.25 and point.backbone is None
    assert point.temperatures == fit_temperatures(VALIDATION.logits, VALIDATION.labels).tolist()
    assert point.groups == exit_groups(POLICY.decide(VALIDATION.logits), 3, 40) and len(set(point.groups)) > 1
    assert (point.validation, point.calibration) == (VALIDATION.split, CALIBRATION.split)
    chosen = POLICY.decide(CALIBRATION.logits)
    assert point.calibration_by_exit == [int((chosen == l).sum()) for l in range(3)]
    probs = torch.stack([(CALIBRATION.logits[:, l] / t).softmax(-1) for l, t in enumerate(point.temperatures)], dim=1)
    torch.testing.assert_close(point.probabilities(CALIBRATION.logits), probs)
    assert list(point.thresholds) == list(METHODS)
    for method in METHODS:
        assert list(point.thresholds[method]) == list(ALPHAS)
        for alpha in ALPHAS:
            expected = fit_thresholds(probs, CALIBRATION.labels, chosen, alpha, method, groups=point.groups)
            assert point.thresholds_at(alpha, method) == pytest.approx(expected.tolist(), abs=1e-6)


def test_options_reach_the_thresholds():
    score = ConformalScore("raps", 2, 0.1, seed=4)
    options = {"alphas": (0.2,), "methods": ("strict", "general"), "score": score, "quantile": "plain"}
    point = OperatingPoint.fit(POLICY, VALIDATION, CALIBRATION, **options)
    assert list(point.thresholds) == ["strict", "general"] and point.score == score and point.lam is None
    chosen, probs = POLICY.decide(CALIBRATION.logits), point.probabilities(CALIBRATION.logits)
    expected = fit_thresholds(probs, CALIBRATION.labels, chosen, 0.2, "strict", score=score, quantile="plain")
    assert point.thresholds_at(0.2, "strict") == pytest.approx(expected.tolist(), abs=1e-12)


@pytest.mark.parametrize("name", ["lac", "aps"])
def test_a_calibration_sample_at_the_threshold_is_in_its_set(name):
    """Thresholds are scores of calibration samples: to the last bit of float64, or the quantile is one too low."""
    score, alphas = ConformalScore(name, seed=None), (0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4)
    point = OperatingPoint.fit(POLICY, VALIDATION, CALIBRATION, alphas=alphas, score=score)
    chosen = POLICY.decide(CALIBRATION.logits)
    probs = point.probabilities(CALIBRATION.logits)
    for alpha in alphas:
        sets = point.prediction_sets(probs, chosen, alpha, "general")
        assert int(sets.gather(1, CALIBRATION.labels[:, None]).sum()) == math.ceil(121 * (1 - alpha) - 1e-9)
    for i in (0, 50, 119):
        l = int(chosen[i])
        expected = score(probs[i, l][None])[0] <= point.thresholds_at(0.4, "general")[l]
        assert sets[i].tolist() == expected.tolist()


def test_without_calibration_there_are_temperatures_only(tmp_path):
    point = OperatingPoint.fit(POLICY, VALIDATION)
    assert point.thresholds == {} and point.calibration is None and point.calibration_by_exit == []
    point.save(tmp_path)
    assert OperatingPoint.load(tmp_path) == point
    with pytest.raises(ValueError, match=r"^Expected a calibrated method among \[\], but got 'grouped'.$"):
        point.thresholds_at(0.1)


def test_only_what_was_calibrated_can_be_asked_for(point):
    with pytest.raises(ValueError, match="^Expected a calibrated method among .*, but got 'mondrian'.$"):
        point.thresholds_at(0.1, "mondrian")
    for alpha in (0.2, 0.0, math.nan):
        with pytest.raises(ValueError, match=rf"^Expected a calibrated alpha among .*0.05, 0.1\], but got {alpha}"):
            point.prediction_sets(torch.zeros(2, 3, 4), torch.zeros(2, dtype=torch.int64), alpha)


def test_bad_input_is_refused():
    def refused(match: str, *records: ExitRecord, **options):
        with pytest.raises(ValueError, match=match):
            OperatingPoint.fit(POLICY, *records, **options)

    for alpha in (0.0, 1.0, -0.1, math.nan):
        refused(r"^Expected alpha in \(0, 1\), but got", VALIDATION, CALIBRATION, alphas=(0.1, alpha))
    refused("^Expected a conformal method among", VALIDATION, CALIBRATION, methods=("strict", "mondrian"))
    refused("^Expected a quantile among", VALIDATION, CALIBRATION, quantile="linear")
    refused("^Expected a record of held-out images, but got one of", VALIDATION, record_of("train", [1]))
    refused("without a common image, but got 2 images", VALIDATION, record_of("calibration", range(298, 330)))
    refused("of the same backbone, but got a+ and None", VALIDATION, record_of("calibration", [301], backbone="a" * 64))


# ---- the file


def test_it_comes_back_from_json(point, tmp_path):
    point.save(tmp_path)
    loaded = OperatingPoint.load(str(tmp_path))
    assert loaded == point and asdict(loaded) == asdict(point)
    text = (tmp_path / "calibration.json").read_text()
    content = json.loads(text, parse_constant=lambda name: pytest.fail(name))
    assert content["format_version"] == 1 and content["score"]["name"] == "lac"
    infinite = [method for method in METHODS if math.inf in point.thresholds_at(0.01, method)]
    assert infinite and all("inf" in content["thresholds"][method]["0.01"] for method in infinite)
    assert loaded.thresholds_at(0.01, infinite[0]) == point.thresholds_at(0.01, infinite[0])


@pytest.mark.parametrize(
    "change",
    [
        {"format_version": 2},
        {"format_version": None},
        {"surprise": 1},
        {"score": {"name": "margin"}},
        {"score": {"surprise": 1}},
        {"score": None},
        {"temperatures": [1.0, 2.0]},
        {"temperatures": [1.0, 0.0, 1.0]},
        {"temperatures": ["a", 1.0, 1.0]},
        {"groups": [0, 0]},
        {"thresholds": {"strict": {"0.1": [1.0, 2.0]}}},
        {"thresholds": {"strict": {"0.1": [1.0, 2.0, "nan"]}}},
        {"thresholds": {"strict": {"0.1": [1.0, 2.0, None]}}},
        {"thresholds": {"strict": {"a": [1.0, 2.0, 3.0]}}},
        {"thresholds": {"strict": {"1.5": [1.0, 2.0, 3.0]}}},
        {"thresholds": {"mondrian": {"0.1": [1.0, 2.0, 3.0]}}},
        {"thresholds": [1.0]},
        {"validation": None},
        {"validation": {"dataset": "toy"}},
        {"calibration": {"dataset": "toy"}},
    ],
    ids=str,
)
def test_an_edited_file_is_refused(point, tmp_path, change):
    path = tmp_path / "calibration.json"
    path.write_text(json.dumps(point.to_dict() | change))
    with pytest.raises(ValueError, match="^Expected an operating point of format 1 as it was saved, but got "):
        OperatingPoint.load(tmp_path)


@pytest.mark.parametrize("missing", ["format_version", "temperatures", "groups", "score", "thresholds", "validation"])
def test_a_file_with_less_is_refused(point, tmp_path, missing):
    content = point.to_dict()
    content.pop(missing)
    (tmp_path / "calibration.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="^Expected an operating point of format 1 as it was saved"):
        OperatingPoint.load(tmp_path)


def test_a_file_that_is_none_is_refused(point, tmp_path):
    with pytest.raises(ValueError, match="^Expected an operating point at '.*calibration.json', but it cannot be read"):
        OperatingPoint.load(tmp_path)
    for text in ("", json.dumps(point.to_dict())[:-5]):
        (tmp_path / "calibration.json").write_text(text)
        with pytest.raises(ValueError, match="cannot be read"):
            OperatingPoint.load(tmp_path)
    (tmp_path / "calibration.json").write_text("[1]")
    with pytest.raises(ValueError, match="^Expected an operating point of format 1 as it was saved"):
        OperatingPoint.load(tmp_path)
