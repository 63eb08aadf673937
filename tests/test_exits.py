"""Exit maths: against the golden arrays (numpy, written from the paper alone) and against properties that must hold."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from jeidnn_hf.exits import (
    GATE_FORMS,
    STATISTICS,
    exit_decision,
    exit_distribution,
    exit_mass,
    exit_probability,
    uncertainty_statistics,
)

GOLDENS = Path(__file__).parent / "goldens"
SEEDS = (0, 1, 3, 4, 6)
quick = settings(max_examples=60, deadline=None, derandomize=True)
forms = pytest.mark.parametrize("form", GATE_FORMS)


@cache
def golden(seed: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """One golden file, batch-first: ``(L, N, ...)`` becomes ``(N, L, ...)``."""
    with np.load(GOLDENS / f"seed{seed}.npz") as file:
        stored = {name: torch.as_tensor(file[name]) for name in file}
    samples = len(stored["labels"])
    batch_first = {k: v.transpose(0, 1) if v.dim() > 1 and v.shape[1] == samples else v for k, v in stored.items()}
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch_first.items()}


def exits_taken(g: dict[str, Tensor]) -> Tensor:
    return exit_decision(exit_probability(g["gate_probs_paper"]))


def predictions(g: dict[str, Tensor]) -> Tensor:
    return g["exit_logits"][torch.arange(len(g["labels"])), exits_taken(g)].argmax(-1)


# What is compared with each array, and the tolerance in float32; integers must be equal.
CHECKS = {
    "uncertainty_features_paper": (lambda g: uncertainty_statistics(g["exit_logits"][:, :-1].softmax(-1)), 2e-6),
    "exit_distribution_paper": (lambda g: exit_distribution(g["gate_probs_paper"]), 1e-6),
    "conditional_exit_probs_paper": (lambda g: exit_probability(g["gate_probs_paper"]), 5e-6),
    "exit_margin_paper": (lambda g: (exit_probability(g["gate_probs_paper"]) - 0.5).abs().amin(-1), 5e-6),
    "exit_index_paper": (exits_taken, 0),
    "exit_counts_paper": (lambda g: exits_taken(g).bincount(minlength=len(g["costs"])), 0),
    "exit_predictions_paper": (lambda g: g["exit_logits"].argmax(-1), 0),
    "predictions_paper": (predictions, 0),
    "accuracy_paper": (lambda g: (predictions(g) == g["labels"]).to(g["costs"].dtype).mean(), 1e-6),
    "exit_accuracy_paper": (
        lambda g: (g["exit_logits"].argmax(-1) == g["labels"][:, None]).to(g["costs"].dtype).mean(0),
        1e-6,
    ),
    "mean_cost_paper": (lambda g: g["costs"][exits_taken(g)].mean(), 1e-6),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CHECKS)
def test_agrees_with_the_golden_array(name, seed, dtype):
    g = golden(seed, dtype)
    compute, tolerance = CHECKS[name]
    torch.testing.assert_close(compute(g), g[name], rtol=0, atol=1e-10 if dtype == torch.float64 else tolerance)


def gate_arrays(max_gates: int = 7):
    """Gates ``(B, L-1)`` in [0, 1], float64, often exactly 0, 1/2 or 1."""
    values = st.sampled_from([0.0, 0.5, 1.0]) | st.floats(0, 1)
    shapes = st.tuples(st.integers(1, 4), st.integers(0, max_gates))
    return shapes.flatmap(lambda shape: arrays(np.float64, shape, elements=values)).map(torch.from_numpy)


def leaves_by(gates: Tensor, form: str) -> Tensor:
    """P(G <= l) of the L-1 gated exits, from the definition of each form, without a recursion over remaining mass."""
    if form == "min":
        return gates.cumsum(-1).clamp_max(1)
    if form == "cumulative":
        return gates.cummax(-1).values
    return 1 - (1 - gates).cumprod(-1)


def close(actual: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@forms
@given(gates=gate_arrays())
@quick
def test_exit_distribution_is_a_distribution(form, gates):
    p = exit_distribution(gates, form)
    assert p.shape == (len(gates), gates.shape[1] + 1) and (p >= 0).all()
    close(p.sum(-1), torch.ones(len(gates), dtype=p.dtype))


@forms
@given(gates=gate_arrays())
@quick
def test_distribution_has_the_cumulative_probabilities_of_its_form(form, gates):
    close(exit_distribution(gates, form).cumsum(-1)[:, :-1], leaves_by(gates, form))


@given(gates=gate_arrays())
@quick
def test_min_form_is_equation_8_clamped_at_zero(gates):
    for row, p in zip(gates.tolist(), exit_distribution(gates, "min").tolist(), strict=True):
        for l, g in enumerate([*row, 1.0]):  # g^L = 1
            assert p[l] == pytest.approx(max(0.0, min(g, 1 - sum(row[:l]))), abs=1e-12)


@given(gates=gate_arrays())
@quick
def test_cumulative_and_stick_masses(gates):
    cumulative, stick = exit_distribution(gates, "cumulative"), exit_distribution(gates, "stick")
    for l in range(gates.shape[1]):
        before = gates[:, :l].amax(-1) if l else torch.zeros(len(gates), dtype=gates.dtype)
        close(cumulative[:, l], (gates[:, l] - before).clamp_min(0))
        close(stick[:, l], gates[:, l] * (1 - gates[:, :l]).prod(-1))


@forms
@given(gates=gate_arrays())
@quick
def test_exit_probability_inverts_equation_4(form, gates):
    p, e = exit_distribution(gates, form), exit_probability(gates, form)
    assert ((e >= 0) & (e <= 1)).all() and (e[:, -1] == 1).all()
    for l in range(e.shape[1]):
        close(e[:, l] * (1 - e[:, :l]).prod(-1), p[:, l])


@given(gates=gate_arrays())
@quick
def test_stick_gates_are_the_exit_probabilities(gates):
    reached = exit_distribution(gates, "stick").flip(-1).cumsum(-1).flip(-1) > 0
    e = exit_probability(gates, "stick")
    close(e[:, :-1][reached[:, :-1]], gates[reached[:, :-1]])
    assert (e[~reached] == 1).all()


@forms
@given(shape=st.tuples(st.integers(1, 4), st.integers(0, 7)), bits=st.integers(0, 2**28))
@quick
def test_saturated_gates_are_the_hard_rule(form, shape, bits):
    count = shape[0] * shape[1]
    gates = torch.tensor([bits >> i & 1 for i in range(count)], dtype=torch.float64).view(shape)
    first_open = [row.index(1.0) if 1.0 in row else len(row) for row in gates.tolist()]
    assert exit_distribution(gates, form).argmax(-1).tolist() == first_open
    assert exit_distribution(gates, form).amax(-1).tolist() == [1.0] * shape[0]
    assert exit_decision(exit_probability(gates, form)).tolist() == first_open


@given(probability=gate_arrays(), threshold=st.sampled_from([0.0, 0.5, 0.9]) | st.floats(0, 1, exclude_max=True))
@quick
def test_exit_decision_is_the_first_over_the_threshold_else_the_last(probability, threshold):
    probability = torch.cat([probability, torch.zeros(len(probability), 1, dtype=torch.float64)], -1)
    thresholds = torch.linspace(0, threshold, len(probability), dtype=torch.float64)
    for t, actual in [
        ([threshold] * len(probability), exit_decision(probability, threshold)),
        (thresholds.tolist(), exit_decision(probability, thresholds[:, None])),
    ]:
        last = probability.shape[1] - 1
        expected = [next((l for l in range(last) if row[l] > t[i]), last) for i, row in enumerate(probability.tolist())]
        assert actual.tolist() == expected


@forms
def test_leading_dimensions_are_batched(form):
    gates = torch.rand(2, 3, 4, generator=torch.Generator().manual_seed(0))
    stacked = [exit_distribution(gates, form), exit_probability(gates, form)]
    one_by_one = [f(row, form) for f in (exit_distribution, exit_probability) for row in gates.flatten(0, 1)]
    close(torch.stack(stacked).flatten(0, 2), torch.stack(one_by_one), atol=0)
    assert exit_decision(exit_probability(gates, form)).shape == (2, 3)


@forms
def test_one_exit_takes_everything(form):
    gates = torch.zeros(3, 0)
    assert exit_distribution(gates, form).tolist() == exit_probability(gates, form).tolist() == [[1.0]] * 3
    assert exit_decision(exit_probability(gates, form)).tolist() == [0, 0, 0]


@forms
def test_two_exits_split_by_the_gate(form):
    gates = torch.tensor([[0.25], [0.75]])
    assert exit_distribution(gates, form).tolist() == [[0.25, 0.75], [0.75, 0.25]]
    assert exit_probability(gates, form).tolist() == [[0.25, 1.0], [0.75, 1.0]]
    assert exit_decision(exit_probability(gates, form)).tolist() == [1, 0]


def test_a_gate_at_one_half_stays_closed():
    """P(E) > 0.5, where the official code has >=: 0.5, then 0.25 of the 0.5 that is left, then all of the rest."""
    probability = exit_probability(torch.tensor([[0.5, 0.25, 0.9]]))
    assert probability.tolist() == [[0.5, 0.5, 1.0, 1.0]]
    assert exit_decision(probability).tolist() == [2]


@forms
def test_no_mass_left_is_an_open_exit_and_never_nan(form):
    """0/0 in Eq. 4 inverted; the official code has NaN there. Gradients stay finite as well."""
    gates = torch.tensor([[1.0, 0.3, 1.0, 0.0]], requires_grad=True)
    probability = exit_probability(gates, form)
    assert probability.tolist() == [[1.0] * 5]
    probability.sum().backward()
    assert gates.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_stick_gates_are_the_exit_probabilities_down_to_the_last_bit_of_mass(dtype):
    almost_open = 1 - torch.finfo(dtype).eps / 2
    e = exit_probability(torch.full((40,), almost_open, dtype=dtype), "stick")
    assert (e > 0.99).all()


def test_used_up_mass_is_exactly_used_up_in_float32():
    """1 - cumsum(P) would leave a rounded rest, and P(E) would be 0 where it is 1."""
    gates = torch.tensor([0.1] * 10 + [0.7, 0.01])
    assert (exit_probability(gates)[10:] == 1).all() and (exit_distribution(gates)[11:] == 0).all()


def test_unknown_form():
    with pytest.raises(ValueError, match=r"Expected gate_form to be one of .*'min'.*, but got 'max'"):
        exit_mass(torch.ones(1), torch.ones(1), "max")


def probabilities():
    logits = st.integers(2, 6).flatmap(lambda k: arrays(np.float64, (3, k), elements=st.floats(-60, 60)))
    return logits.map(lambda x: torch.from_numpy(x).softmax(-1))


@given(probs=probabilities())
@quick
def test_statistics_are_bounded(probs):
    classes, tiny = probs.shape[-1], 1e-12
    maximum, entropy, power_entropy, margin = uncertainty_statistics(probs).unbind(-1)
    assert ((maximum >= 1 / classes - tiny) & (maximum <= 1 + tiny)).all()
    assert ((entropy >= -tiny) & (entropy <= math.log(classes) + tiny)).all()
    assert ((power_entropy >= -tiny) & (power_entropy <= entropy + tiny)).all()  # p^2 is sharper than p
    assert ((margin >= 0) & (margin <= maximum)).all()


def test_statistics_by_hand():
    """In the paper's order (the official code has the margin before the power entropy), entropies positive, in nats."""
    assert STATISTICS == ("max_probability", "entropy", "power_entropy", "margin")
    ln2 = math.log(2)
    hand = {
        (0.25, 0.25, 0.25, 0.25): [0.25, 2 * ln2, 2 * ln2, 0.0],
        (0.0, 1.0): [1.0, 0.0, 0.0, 1.0],
        (1.0,): [1.0, 0.0, 0.0, 1.0],
        (0.25, 0.5, 0.25): [0.5, 1.5 * ln2, math.log(6) - 4 / 6 * math.log(4), 0.25],  # p^2 ~ (1, 4, 1)
    }
    for probs, expected in hand.items():
        close(uncertainty_statistics(torch.tensor(probs).double()), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("classes", [1, 2, 3, 100])
def test_gradient_is_finite_at_one_hot_probabilities(classes):
    probs = torch.eye(classes, requires_grad=True)
    uncertainty_statistics(probs).sum().backward()
    assert probs.grad.isfinite().all()
    logits = torch.tensor([[1e4] + [0.0] * (classes - 1)], requires_grad=True)
    uncertainty_statistics(logits.softmax(-1)).sum().backward()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("classes", [2, 5])
def test_gradient_of_the_statistics(classes):
    logits = torch.randn(4, classes, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(lambda x: uncertainty_statistics(x.softmax(-1)), logits.requires_grad_())
