"""calibration.py: temperatures against the goldens, closed forms and a one-dimensional search."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from torch import Tensor

from jeidnn_hf.calibration import fit_temperatures

GOLDENS = Path(__file__).parent / "goldens"
SEEDS = (0, 1, 3, 4, 6)
quick = settings(max_examples=25, deadline=None, derandomize=True, database=None)


@pytest.fixture(params=SEEDS)
def golden(request) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"seed{request.param}.npz") as file:
        stored = dict(file)
    stored["logits"] = stored["exit_logits"].transpose(1, 0, 2)
    return stored


def nll(logits: Tensor, labels: Tensor, temperatures: Tensor) -> Tensor:
    """Mean negative log-likelihood per exit, exit by exit, in float64."""
    scaled = logits.double() / temperatures.double()[:, None]
    return torch.stack([F.cross_entropy(scaled[:, l], labels) for l in range(logits.shape[1])])


def problem(seed: int, samples: int = 150, exits: int = 3, classes: int = 5) -> tuple[Tensor, Tensor]:
    """Logits that favour the label, ever more so and ever more confidently with the exit; right in part."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=random)
    noise = torch.randn(samples, exits, classes, generator=random, dtype=torch.float64)
    favoured = F.one_hot(labels, classes)[:, None] * torch.linspace(0.8, 1.6, exits)[:, None]
    return (noise + favoured) * torch.linspace(0.7, 3, exits)[:, None], labels


# ---- goldens


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 2e-6)])
def test_temperatures_of_all_samples(golden, dtype, tolerance):
    found = fit_temperatures(torch.tensor(golden["logits"], dtype=dtype), torch.tensor(golden["labels"]))
    np.testing.assert_allclose(found.numpy(), golden["temperature_paper"], rtol=tolerance, atol=0)


def test_temperatures_of_the_calibration_half(golden):
    half = golden["calibration_index"]
    found = fit_temperatures(torch.tensor(golden["logits"][half]), torch.tensor(golden["labels"][half]))
    np.testing.assert_allclose(found.numpy(), golden["temperature_cal_paper"], rtol=1e-6, atol=0)
    assert np.abs(golden["temperature_cal_paper"] / golden["temperature_paper"] - 1).max() > 0.01


def test_likelihood_at_the_temperatures(golden):
    logits, labels = torch.tensor(golden["logits"]), torch.tensor(golden["labels"])
    reached = nll(logits, labels, fit_temperatures(logits, labels))
    np.testing.assert_allclose(reached.numpy(), golden["nll_temperature_paper"], rtol=0, atol=1e-10)
    assert (reached <= nll(logits, labels, torch.ones(logits.shape[1])) + 1e-12).all()


# ---- closed forms and properties


@pytest.mark.parametrize("right", [0.55, 0.8, 0.99])
@pytest.mark.parametrize("margin", [0.3, 2.0, 9.0])
def test_two_classes_in_closed_form(right, margin):
    """Every sample prefers a class by the same margin, rightly in a share p: sigmoid(margin / T) = p."""
    expected = margin / math.log(right / (1 - right))
    labels = torch.arange(200) % 2
    sign = torch.where(torch.arange(200) < round(200 * right), 1.0, -1.0)
    logits = F.one_hot(labels, 2).double() * sign[:, None] * margin
    found = fit_temperatures(logits[:, None], labels)
    assert found.shape == (1,) and float(found) == pytest.approx(min(max(expected, 0.05), 20), rel=1e-6)


@quick
@given(st.integers(0, 999), st.floats(0.2, 5))
def test_scaled_logits_have_scaled_temperatures(seed, factor):
    logits, labels = problem(seed)
    plain = fit_temperatures(logits, labels)
    assert ((plain > 0.26) & (plain < 3.9)).all()  # so that no bound is met after scaling
    torch.testing.assert_close(fit_temperatures(logits * factor, labels), plain * factor, rtol=1e-6, atol=0)


@quick
@given(st.integers(0, 999))
def test_other_searches_find_the_same(seed):
    logits, labels = problem(seed, samples=60, exits=2, classes=3)
    for l, found in enumerate(fit_temperatures(logits, labels).tolist()):
        z, rows = logits[:, l].numpy(), np.arange(60)

        def loss(inverse, z=z, rows=rows):
            return np.mean(logsumexp(z * inverse, axis=1) - z[rows, labels.numpy()] * inverse)

        best = minimize_scalar(loss, bounds=(0.05, 20), method="bounded", options={"xatol": 1e-10})
        assert found == pytest.approx(1 / best.x, rel=1e-5)


@quick
@given(st.integers(0, 999))
def test_exits_are_apart_and_order_and_shifts_do_not_matter(seed):
    logits, labels = problem(seed)
    together = fit_temperatures(logits, labels)
    for l in range(3):
        alone = fit_temperatures(logits[:, l : l + 1], labels)
        torch.testing.assert_close(alone, together[l : l + 1], rtol=1e-6, atol=0)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    shifted = logits[order] + torch.randn(len(labels), 3, 1)
    torch.testing.assert_close(fit_temperatures(shifted, labels[order]), together, rtol=1e-6, atol=0)


# ---- the ends


@pytest.mark.parametrize("classes", [2, 10])
def test_separable_data_hits_the_lower_end(classes):
    labels = torch.arange(40) % classes
    logits = F.one_hot(labels, classes).double()[:, None]
    found = fit_temperatures(torch.cat([logits, 0.5 * logits], dim=1), labels)
    assert found.tolist() == pytest.approx([0.05, 0.05], rel=1e-5)


def test_data_that_is_always_wrong_hits_the_upper_end():
    labels = torch.arange(40) % 4
    found = fit_temperatures(F.one_hot((labels + 1) % 4, 4).double()[:, None] * 7, labels)
    assert found.tolist() == pytest.approx([20.0], rel=1e-5)


@pytest.mark.parametrize("scale", [0.0, 20.0, 1e4, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_logits_give_a_temperature_in_bounds_that_loses_nothing(scale, dtype):
    labels = torch.arange(40) % 4
    logits = F.one_hot(labels, 4).to(dtype)[:, None] * scale
    found = fit_temperatures(logits, labels)
    assert 0.05 * (1 - 1e-6) <= float(found) <= 20 * (1 + 1e-6)
    best = min(float(nll(logits, labels, torch.tensor([t]))) for t in np.geomspace(0.05, 20, 50))
    assert float(nll(logits, labels, found)) <= best + 1e-9


def test_one_sample():
    found = fit_temperatures(torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])[:1], torch.tensor([0]))
    assert float(found) == pytest.approx(0.05, rel=1e-5)


def test_the_answer_is_a_plain_tensor_of_the_default_type():
    logits, labels = problem(0)
    found = fit_temperatures(logits.requires_grad_(), labels)
    assert found.dtype == torch.get_default_dtype() and found.shape == (3,) and not found.requires_grad
