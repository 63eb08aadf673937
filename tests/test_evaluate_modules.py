"""evaluate_modules/: each loads offline from its folder and says what the function it calls says."""

from __future__ import annotations

import evaluate
import numpy as np
import pytest
import torch
from setuptools import find_packages

from jeidnn_hf.conformal import coverage_and_inefficiency
from jeidnn_hf.evaluate_modules import NAMES, path
from jeidnn_hf.metrics import accuracy_at_cost, brier_score, expected_calibration_error, negative_log_likelihood


@pytest.fixture
def answers():
    random = np.random.default_rng(0)
    probs = random.dirichlet(np.ones(4), 83)
    return probs, random.integers(4, size=83)


def loaded(name: str, tmp_path):
    return evaluate.load(path(name), cache_dir=str(tmp_path))


def test_calibration_error(answers, tmp_path):
    probs, labels = answers
    expected = expected_calibration_error(torch.tensor(probs), torch.tensor(labels))
    metric = loaded("ece", tmp_path)
    assert metric.compute(predictions=probs, references=labels) == {"ece": pytest.approx(float(expected), abs=1e-12)}
    for rows in (slice(0, 40), slice(40, 83)):  # in batches, and still over the whole set
        metric.add_batch(predictions=probs[rows], references=labels[rows])
    assert metric.compute()["ece"] == pytest.approx(float(expected), abs=1e-12)
    one = abs(float(np.mean((probs.argmax(1) == labels) - probs.max(1))))
    assert metric.compute(predictions=probs, references=labels, bins=1)["ece"] == pytest.approx(one, abs=1e-12)


def test_proper_scores(answers, tmp_path):
    probs, labels = answers
    found = loaded("proper_scores", tmp_path).compute(predictions=probs.tolist(), references=labels.tolist())
    tensors = torch.tensor(probs), torch.tensor(labels)
    assert found["brier"] == pytest.approx(float(brier_score(*tensors)), abs=1e-12)
    assert found["nll"] == pytest.approx(-np.log(probs[np.arange(83), labels]).mean(), abs=1e-12)
    assert found["nll"] == pytest.approx(float(negative_log_likelihood(tensors[0].log(), tensors[1])), abs=1e-12)


def test_prediction_sets(answers, tmp_path):
    probs, labels = answers
    sets = probs >= 0.2
    found = loaded("prediction_sets", tmp_path).compute(predictions=sets, references=labels)
    coverage, inefficiency = coverage_and_inefficiency(torch.tensor(sets), torch.tensor(labels))
    assert found == {"coverage": coverage, "inefficiency": inefficiency}
    assert coverage == pytest.approx(np.mean([sets[i, k] for i, k in enumerate(labels)]))


def test_accuracy_at_cost(tmp_path):
    points = {"costs": [0.9, 0.3, 0.5], "accuracies": [0.95, 0.6, 0.8]}
    found = loaded("accuracy_at_cost", tmp_path).compute(**points, budget=0.4)
    tensors = [torch.tensor(values, dtype=torch.float64) for values in points.values()]
    assert found == {"accuracy": accuracy_at_cost(*tensors, 0.4)}
    assert found["accuracy"] == pytest.approx(0.7, abs=1e-6)


def test_every_module_is_a_package_so_that_a_wheel_holds_it(request):
    found = find_packages(str(request.config.rootpath / "src"))
    assert {f"jeidnn_hf.evaluate_modules.{name}" for name in NAMES} <= set(found)


def test_another_name_is_refused():
    with pytest.raises(ValueError, match="Expected an evaluate module among .*, but got 'accuracy'"):
        path("accuracy")
