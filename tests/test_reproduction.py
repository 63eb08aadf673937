"""reproduction.py: each switch against values worked out by hand, and the table of them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jeidnn_hf import ExitRecord
from jeidnn_hf import reproduction as repro
from jeidnn_hf.costs import ExitCosts
from jeidnn_hf.gates import ExitPolicy
from jeidnn_hf.metrics import bootstrap_interval, disjoint_subsets, expected_calibration_error
from known_records import record_with

IMAGES, CLASSES = 1000, 10


def records_of(logits: Tensor, labels: Tensor) -> dict[str, ExitRecord]:
    """The same answers in every role, as from other images; four exits of a million Mul-Adds each."""
    record = record_with(logits, labels)
    backbone, zeros = tuple(10**6 * (l + 1) for l in range(4)), (0,) * 4
    record = replace(record, costs=ExitCosts(backbone, zeros, zeros, zeros))
    roles = ("validation", "calibration", "test")
    return {role: replace(record, split=replace(record.split, role=role, source=role)) for role in roles}


def by_quantity(rows: list[dict], switch: str | None = None) -> dict[str, dict]:
    return {row["quantity"]: row for row in rows if switch in (None, row["switch"])}


@pytest.fixture(scope="module")
def sure() -> dict[str, ExitRecord]:
    """Four exits, right on 9 of 10 images and 90 % sure of each answer."""
    labels = torch.arange(IMAGES) % CLASSES
    answers = torch.where(torch.arange(IMAGES) // CLASSES % 10 == 0, (labels + 1) % CLASSES, labels)
    probs = torch.where(F.one_hot(answers, CLASSES) > 0, 0.9, 0.1 / (CLASSES - 1))
    order = torch.from_numpy(np.random.default_rng(0).permutation(IMAGES))
    return records_of(probs.log()[order, None].repeat(1, 4, 1), labels[order])


def test_a_second_softmax_caps_the_confidence(sure):
    """Probabilities .9 and nine times .0111 over T: the answer has 1 / (1 + 9 exp(-(.9 - .0111) / T))."""
    rows = repro.double_softmax(sure)
    found = by_quantity(rows, "double softmax")
    (temperature,) = repro.short_search(sure["test"].logits.double().softmax(-1), sure["test"].labels).unique().tolist()
    confidence = 1 / (1 + 9 * math.exp(-(0.9 - 0.1 / 9) / temperature))
    assert found["ECE"]["right"] == pytest.approx(0, abs=1e-5)
    assert found["ECE"]["published"] == pytest.approx(0.9 - confidence, abs=1e-6)
    cap = found["confidence, at most"]["published"]
    e = math.exp(1 / temperature)
    assert confidence < cap == pytest.approx(e / (e + 9)) and cap < 0.25
    # the best temperature makes it .9: everything is right again
    (searched,) = by_quantity(rows, "double softmax, temperatures searched to the end").values()
    assert searched["published"] == pytest.approx(0, abs=1e-5)


def test_the_published_search_stops_near_its_start():
    """Where sharp answers are all right the best temperature is 0; fifty steps of rate .01 end above 1."""
    labels = torch.arange(100) % 5
    probs = F.one_hot(labels, 5).double()[:, None].repeat(1, 2, 1)
    first, second = repro.short_search(probs, labels).tolist()
    assert first == second and 1.0 < first < 1.5


def test_the_cap_is_that_of_the_closed_form():
    probs = F.one_hot(torch.tensor([3]), 100).double()
    for temperature in (0.5, 1.0, 1.5):
        expected = float((probs / temperature).softmax(-1).max())
        assert repro.confidence_cap(temperature, 100) == pytest.approx(expected)
    assert repro.confidence_cap(1.25, 100) == pytest.approx(0.022, abs=5e-4)


@pytest.fixture(scope="module")
def graded() -> dict[str, ExitRecord]:
    """Four exits with costs of a quarter each; exit l is right on a share (l + 1) / 4, the same images first at each;
    the confidence of an image is its own at every exit, so that the quotas decide alone."""
    labels = torch.zeros(IMAGES, dtype=torch.int64)
    right_until = torch.arange(IMAGES)[:, None] < IMAGES * torch.arange(1, 5) / 4
    confidence = torch.linspace(0.99, 0.6, IMAGES)[:, None].expand(-1, 4)
    answers = torch.where(right_until, 0, 1)
    probs = torch.where(F.one_hot(answers, 3) > 0, confidence[..., None], (1 - confidence[..., None]) / 2)
    return records_of(probs.log(), labels)


def test_without_a_last_quota_the_last_exit_is_for_nobody(graded):
    """At p = 39 the shares of the first three of four exits, of costs 1/4, 2/4, 3/4, are 1 : 2.6 : 6.76."""
    rows = repro.no_last_quota(graded)
    highest = by_quantity(rows)["highest cost"]

    def cost(ratio: float, exits: int) -> float:
        shares = [ratio**l / sum(ratio**j for j in range(exits)) for l in range(exits)]
        return sum(share * (l + 1) / 4 for l, share in enumerate(shares))

    for how, expected in (("published", cost(39 / 15, 3)), ("right", cost(39 / 20, 4))):
        assert highest[how] == pytest.approx(expected, abs=0.01)  # of temperatures and whole images
    assert highest["published"] < 0.75 < highest["right"]
    assert {row["quantity"] for row in rows[1:]} == {"accuracy at 0.5", "accuracy at 0.7", "accuracy at 0.9"}


def test_what_a_curve_does_not_reach_is_none():
    row = repro._row("s", "q", float("nan"), torch.tensor(0.5))
    assert row == {"switch": "s", "quantity": "q", "published": None, "right": 0.5}
    assert repro.to_markdown([{"model": "m", **row}]).splitlines()[-1] == "| m | s | q | - | 0.5000 | - |"
    row |= {"published": 0.25}
    assert repro.to_markdown([{"model": "m", **row}]).splitlines()[-1] == "| m | s | q | 0.2500 | 0.5000 | -0.2500 |"


def test_nested_prefixes_are_nested_and_narrow(sure):
    found = [part.tolist() for part in repro.prefixes(25)]
    assert [len(part) for part in found] == [2, 5, 7, 10, 12, 15, 17, 20, 22, 25]
    assert all(one == other[: len(one)] for one, other in zip(found, found[1:], strict=False))
    row = by_quantity(repro.nested_prefixes(sure))["interval width, accuracy"]
    test = sure["test"]
    right = (test.logits[:, 0].argmax(-1) == test.labels).double().numpy()  # at every exit alike
    nested = [right[: IMAGES * i // 10].mean() for i in range(1, 11)]
    disjoint = [right[part.numpy()].mean() for part in disjoint_subsets(IMAGES)]
    for how, values in (("published", nested), ("right", disjoint)):
        low, high = bootstrap_interval(values)
        assert row[how] == pytest.approx(high - low)
    assert row["published"] < row["right"]


def test_a_long_tail_class_by_class():
    """Two classes of 100 images, imbalance 100: 100 of the first, then 1 of the second."""
    labels = torch.arange(200) % 2
    rows = repro.class_sorted_tail(labels, 2)
    assert rows.tolist() == [*range(0, 200, 2), 1]
    three = repro.class_sorted_tail(torch.arange(300) % 3, 3)
    assert torch.bincount(three % 3).tolist() == [100, 10, 1] and (labels[rows].diff() >= 0).all()


def test_frequent_classes_come_first():
    """Only the first of three classes is known: 100 of 111 images, and alone in the first nine tenths."""
    labels = torch.arange(300) % 3
    logits = torch.tensor([4.0, 0.0, 0.0]).expand(300, 4, 3)
    whole, balanced = repro.class_sorted(records_of(logits.clone(), labels))
    sizes = [111 * i // 10 for i in range(1, 11)]
    expected = np.mean([min(size, 100) / size for size in sizes])
    assert whole["published"] == balanced["published"] == pytest.approx(expected)
    assert whole["right"] == pytest.approx(100 / 111) and balanced["right"] == pytest.approx(1 / 3)


def test_batches_have_a_larger_ece(sure):
    """Right on 90 % of images that are 90 % sure: no error in all, but chance in batches of 64."""
    batched, uncalibrated = repro.ece_of_batches(sure)
    test = sure["test"]
    probs = test.logits[:, 0].softmax(-1)
    each = [expected_calibration_error(probs[i : i + 64], test.labels[i : i + 64]) for i in range(0, IMAGES, 64)]
    assert batched["published"] == pytest.approx(float(torch.stack(each).mean()), abs=1e-4) and batched["right"] < 1e-4
    assert batched["published"] > 0.01
    sharp = {role: replace(record, logits=3 * record.logits) for role, record in sure.items()}
    _, uncalibrated = repro.ece_of_batches(sharp)
    confidence = 0.9**3 / (0.9**3 + 9 * (0.1 / 9) ** 3)
    assert uncalibrated["published"] == pytest.approx(confidence - 0.9, abs=1e-5)
    assert uncalibrated["right"] == pytest.approx(0, abs=1e-4)


def test_the_counter_moves_early_exits_most():
    shifts = [row["published"] - row["right"] for row in repro.counter()]
    assert shifts == pytest.approx([0.051, 0.041, 0.031, 0.021, 0.011, 0.001, 0])


class Always(ExitPolicy):
    """Leaves at one exit."""

    def __init__(self, exit_index: int):
        super().__init__(4)
        self.exit_index = exit_index

    def decide(self, logits: Tensor, lam=None) -> Tensor:
        return torch.full((len(logits),), self.exit_index)

    def mul_adds(self, num_labels: int) -> int:
        return 0


def test_two_models_are_measured_as_they_decide(graded):
    rows = by_quantity(repro.cancelling_weights((Always(0), None, graded), (Always(2), None, graded)))
    assert (rows["accuracy"]["published"], rows["accuracy"]["right"]) == pytest.approx((0.25, 0.75))
    assert (rows["cost"]["published"], rows["cost"]["right"]) == pytest.approx((0.25, 0.75))
