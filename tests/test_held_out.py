"""held_out.py: the ensemble against another solver, the gates against policies known in closed form."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import minimize, minimize_scalar
from scipy.special import logsumexp
from torch import Tensor

from jeidnn_hf.calibration import fit_temperatures
from jeidnn_hf.gates import LinearGates, SharedGates
from jeidnn_hf.heads import GeometricEnsemble
from jeidnn_hf.held_out import fit_ensemble, fit_gates
from jeidnn_hf.policies import LearnedGates

# ---- ensemble


def members_of(samples: int, exits: int = 3, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Exits with independent noise, so that together they know more, and each over-confident in its own way."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=random)
    noise = torch.randn(samples, exits, classes, generator=random)
    favoured = F.one_hot(labels, classes)[:, None] * torch.linspace(1.0, 1.6, exits)[:, None]
    return (noise + favoured) * torch.linspace(3, 0.6, exits)[:, None], labels


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over samples, per exit."""
    return torch.stack([F.cross_entropy(logits[:, l].double(), labels) for l in range(logits.shape[1])])


def fitted(members: Tensor, labels: Tensor, **options) -> GeometricEnsemble:
    ensemble = GeometricEnsemble(members.shape[1], members.shape[2])
    fit_ensemble(ensemble, members, labels, **options)
    return ensemble


def test_exits_together_answer_better_on_fresh_samples():
    members, labels = members_of(1500)
    fresh, truth = members_of(1500, seed=1)
    ensemble = fitted(members, labels)
    with torch.no_grad():
        before, after = cross_entropy(fresh, truth), cross_entropy(ensemble(fresh), truth)
        alone = cross_entropy(fresh / fit_temperatures(members, labels)[:, None], truth)
    assert (after < before).all()
    assert after[0] == pytest.approx(float(alone[0]), abs=0.01)  # the first exit has itself alone
    assert (after[1:] < alone[1:] - 0.05).all()
    assert after[2] < after[1] < after[0]


def test_cross_entropy_of_the_fitting_samples_falls_at_every_exit():
    members, labels = members_of(200, exits=5, seed=2)
    ensemble = GeometricEnsemble(5, 4)
    ensemble.temperature.copy_(fit_temperatures(members, labels))
    with torch.no_grad():
        before = cross_entropy(ensemble(members), labels)
        fit_ensemble(ensemble, members, labels)
        assert (cross_entropy(ensemble(members), labels) <= before + 1e-6).all()


@pytest.mark.parametrize("pull", [0.01, 0.3])
def test_another_solver_finds_the_same_ensemble(pull):
    """Objective and unknowns written out anew: w_lj for j <= l and b_lk, by BFGS with numerical gradients."""
    samples, exits, classes = 60, 2, 3
    members, labels = members_of(samples, exits, classes, seed=3)
    z, rows, truth = members.double().numpy(), np.arange(samples), labels.numpy()

    def nll(logits):
        return np.mean(logsumexp(logits, axis=1) - logits[rows, truth])

    def temperature(l):
        search = {"bounds": (math.log(0.05), math.log(20)), "method": "bounded", "options": {"xatol": 1e-9}}
        return math.exp(minimize_scalar(lambda t: nll(z[:, l] / math.exp(t)), **search).x)

    temperatures = [temperature(l) for l in range(exits)]
    log_probs = [z[:, l] / t - logsumexp(z[:, l] / t, axis=1, keepdims=True) for l, t in enumerate(temperatures)]

    def objective(unknown):
        (first, second, third), bias = unknown[:3], unknown[3:].reshape(exits, classes)
        value = nll(first * log_probs[0] + bias[0]) + nll(second * log_probs[0] + third * log_probs[1] + bias[1])
        return value + pull * ((first - 1) ** 2 + second**2 + (third - 1) ** 2 + (bias**2).sum())

    best = minimize(objective, [1, 0, 1] + [0] * 6, method="BFGS", options={"gtol": 1e-7})
    ensemble = fitted(members, labels, pull=pull)
    found = torch.cat([ensemble.weight[[0, 1, 1], [0, 0, 1]], ensemble.bias.flatten()]).detach().double().numpy()
    assert ensemble.temperature.tolist() == pytest.approx(temperatures, rel=1e-5)
    assert objective(found) == pytest.approx(best.fun, abs=1e-8)
    np.testing.assert_allclose(found, best.x, atol=1e-3)
    assert np.abs(found - [1, 0, 1, *[0] * 6]).max() > 0.05


def test_a_strong_pull_keeps_the_identity_and_a_weak_one_does_not():
    members, labels = members_of(200)
    kept, free = fitted(members, labels, pull=1e6), fitted(members, labels, pull=1e-4)
    torch.testing.assert_close(kept.weight, torch.eye(3), rtol=0, atol=1e-5)
    assert kept.bias.abs().max() < 1e-5
    with torch.no_grad():
        calibrated = (members / fit_temperatures(members, labels)[:, None]).log_softmax(-1)
        torch.testing.assert_close(kept(members), calibrated, rtol=0, atol=1e-4)
    assert (free.weight - torch.eye(3)).abs().max() > 0.2


def test_weights_are_lower_triangular_and_temperatures_set():
    members, labels = members_of(300, exits=5, seed=4)
    ensemble = GeometricEnsemble(5, 4)
    with torch.no_grad():  # whatever it was before
        for tensor in (ensemble.weight, ensemble.bias, ensemble.temperature):
            tensor.uniform_(1, 2)
    fit_ensemble(ensemble, members, labels)
    assert (ensemble.weight.triu(1) == 0).all() and (ensemble.weight.tril() != 0).sum() == 15
    torch.testing.assert_close(ensemble.temperature, fit_temperatures(members, labels))
    assert ensemble.temperature[0] > 2 > 0.8 > ensemble.temperature[-1]
    again = fitted(members, labels)
    for name, tensor in ensemble.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])


def test_parameters_stay_parameters_and_inputs_stay_as_they_were():
    members, labels = members_of(50)
    with torch.inference_mode():  # as they come from ExitRecord.of
        given, truth = members + 0, labels + 0
    ensemble = fitted(given, truth)
    assert torch.equal(given, members) and isinstance(ensemble.weight, torch.nn.Parameter)
    assert ensemble.weight.requires_grad and ensemble.weight.dtype == torch.float32
    F.cross_entropy(ensemble(members)[:, -1], labels).backward()
    assert ensemble.weight.grad.abs().sum() > 0


# ---- gates


THREE = torch.tensor([0.4, 1.0])


def logits_of(confidence: Tensor, top: Tensor, classes: int = 3) -> Tensor:
    """Logits whose softmax gives the class ``top`` that confidence and the others the rest in equal shares."""
    rest = ((1 - confidence) / (classes - 1))[:, None].expand(-1, classes)
    return torch.where(F.one_hot(top, classes).bool(), confidence[:, None], rest).log()


def sure_problem(samples: int = 400, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Exit 1 is right exactly where its confidence is above 0.7, exit 2 always; logits, labels, that confidence."""
    random = torch.Generator().manual_seed(seed)
    confidence = 0.4 + 0.59 * torch.rand(samples, generator=random)
    labels = torch.randint(3, (samples,), generator=random)
    top = torch.where(confidence > 0.7, labels, (labels + 1) % 3)
    last = 0.5 + 0.49 * torch.rand(samples, generator=random)
    return torch.stack([logits_of(confidence, top), logits_of(last, labels)], dim=1), labels, confidence


def calibrated_problem(samples: int = 1500, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Exit 1 is right with a probability that is its confidence c, exit 2 always: leave where c > 1 - 0.6 lambda."""
    random = torch.Generator().manual_seed(seed)
    confidence = 0.4 + 0.59 * torch.rand(samples, generator=random)
    labels = torch.randint(3, (samples,), generator=random)
    right = torch.rand(samples, generator=random) < confidence
    first = logits_of(confidence, torch.where(right, labels, (labels + 1) % 3))
    return torch.stack([first, logits_of(torch.full((samples,), 0.9), labels)], dim=1), labels, confidence


def policy_of(gates: str, lam=(1.0, 1.0), exits: int = 2, classes: int = 3, form: str = "stick") -> LearnedGates:
    torch.manual_seed(0)
    network = LinearGates(exits - 1) if gates == "linear" else SharedGates(exits - 1, classes, tuple(lam))
    return LearnedGates(network, exits, form)


def cost_of(logits: Tensor, labels: Tensor, chosen: Tensor, lam: float, mul_adds: Tensor = THREE) -> float:
    """Mean error + lambda x Mul-Adds of the exits taken."""
    wrong = logits[torch.arange(len(chosen)), chosen].argmax(-1) != labels
    return float(wrong.double().mean() + lam * mul_adds[chosen].double().mean())


@pytest.mark.parametrize(("gates", "form"), [("linear", "min"), ("linear", "cumulative"), ("shared", "stick")])
def test_small_lambda_leaves_exactly_where_the_first_exit_is_right(gates, form):
    logits, labels, confidence = sure_problem()
    policy = policy_of(gates, form=form)
    losses = fit_gates(policy, logits, labels, THREE, 0.3, steps=600, learning_rate=0.1, weight_decay=0.01)
    fresh, truth, sure = sure_problem(seed=1)
    wanted, found = (sure <= 0.7).long(), policy.decide(fresh, 0.3)
    assert (found == wanted).double().mean() > (0.95 if gates == "shared" else 0.85)  # one straight line in four
    assert (found[sure > 0.85] == 0).all() and (found[sure < 0.65] == 1).all()
    best = cost_of(fresh, truth, wanted, 0.3)
    assert cost_of(fresh, truth, found, 0.3) < best + 0.03 < cost_of(fresh, truth, torch.ones_like(found), 0.3)
    assert len(losses) == 600 and all(math.isfinite(loss) for loss in losses)
    assert losses[-1] == pytest.approx(cost_of(logits, labels, (confidence <= 0.7).long(), 0.3) / 1.3, abs=0.03)


@pytest.mark.parametrize("lam", [0.1, 0.3, 3.0])
def test_loss_decreases(lam):
    logits, labels, _ = sure_problem()
    losses = fit_gates(policy_of("shared"), logits, labels, THREE, lam, steps=200)
    assert np.mean(losses[-20:]) < np.mean(losses[:20]) - 0.01 and losses[-1] < losses[0] - 0.02


def test_a_very_small_lambda_does_not_shut_the_gates():
    """Leaving rightly saves 0.06, leaving wrongly costs 0.94; with every option at its default."""
    logits, labels, confidence = sure_problem()
    policy = policy_of("shared")
    fit_gates(policy, logits, labels, THREE, 0.1)
    found, wanted = policy.decide(logits, 0.1), (confidence <= 0.7).long()
    assert (found == wanted).double().mean() > 0.95


@pytest.mark.parametrize("gates", ["linear", "shared"])
def test_large_lambda_leaves_always(gates):
    """Going on costs 0.6 lambda = 1.8 and gains one error at most."""
    logits, labels, _ = sure_problem()
    policy = policy_of(gates)
    fit_gates(policy, logits, labels, THREE, 3.0, steps=300, learning_rate=0.05)
    assert (policy.decide(logits, 3.0) == 0).all()


@pytest.mark.parametrize("gates", ["linear", "shared"])
def test_an_exit_that_is_never_right_is_never_taken(gates):
    logits, labels, _ = sure_problem()
    policy = policy_of(gates)
    fit_gates(policy, logits, (labels + 2) % 3, THREE, 0.1, steps=5, learning_rate=0.05)
    wrong_first = torch.stack([logits[:, 0], F.one_hot((labels + 2) % 3, 3) * 3.0], dim=1)
    fit_gates(policy, wrong_first, (labels + 2) % 3, THREE, 0.1, steps=300, learning_rate=0.05)
    assert (policy.decide(wrong_first, 0.1) == 1).all()


def test_lambda_of_zero_trains():
    logits, labels, _ = sure_problem(100)
    losses = fit_gates(policy_of("shared"), logits, labels, THREE, 0.0, steps=200, learning_rate=0.05)
    assert losses[-1] < 0.03 < losses[0]  # error can be avoided altogether


def test_the_task_cost_is_the_one_named():
    """Exit 1 is always right but rarely sure: no error to save by going on, but cross-entropy and Brier score."""
    random = torch.Generator().manual_seed(0)
    confidence, labels = 0.4 + 0.5 * torch.rand(400, generator=random), torch.arange(400) % 3
    logits = torch.stack([logits_of(confidence, labels), logits_of(torch.full((400,), 0.999), labels)], dim=1)
    left = {}
    for kind in ("error", "cross_entropy", "brier"):
        policy = policy_of("linear")
        fit_gates(policy, logits, labels, THREE, 0.5, kind=kind, steps=600, learning_rate=0.05, weight_decay=0.1)
        left[kind] = (policy.decide(logits) == 0).double()
    assert left["error"].mean() == 1
    saved = {"cross_entropy": -confidence.log(), "brier": 1.5 * (1 - confidence).square()}
    for kind, values in saved.items():
        wanted = (values < 0.5 * 0.6).double()
        assert (left[kind] - wanted).abs().mean() < 0.05 and 0.1 < wanted.mean() < 0.95


def test_what_one_opinion_learns_does_not_depend_on_the_other():
    logits, labels, _ = calibrated_problem(200)
    fitted = []
    for seed in (0, 1):
        policy = policy_of("shared", (0.1, 2.0))
        torch.manual_seed(seed)
        for parameter in policy.gates.fine.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
        before = [p.detach().clone() for p in policy.gates.parameters()]
        fit_gates(policy, logits, labels, THREE, [0.1, 2.0], steps=30)
        fitted.append(policy.gates)
        assert not any(torch.equal(p, b) for p, b in zip(policy.gates.parameters(), before, strict=True))
    for first, second in zip(*(gates.parameters(recurse=False) for gates in fitted), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    networks = [dict(gates.fine.named_parameters()) for gates in fitted]
    assert (networks[0]["bias"] - networks[1]["bias"]).abs().min() > 0.01


LAMBDAS = (0.25, 0.4, 0.6)


@cache
def ranged_policy() -> LearnedGates:
    logits, labels, _ = calibrated_problem()
    policy = policy_of("shared", (0.1, 2.0))
    fit_gates(policy, logits, labels, THREE, [0.1, 2.0], steps=900, learning_rate=0.02)
    return policy


def expected_cost_of(confidence: Tensor, chosen: Tensor, lam: float) -> float:
    """As ``cost_of``, in expectation over the labels of the calibrated problem."""
    return float(((1 - confidence) * (chosen == 0)).double().mean() + lam * THREE[chosen].double().mean())


@pytest.mark.parametrize("lam", LAMBDAS)
def test_a_range_of_lambdas_finds_the_best_policy_of_each(lam):
    fresh, _, confidence = calibrated_problem(seed=1)
    best = expected_cost_of(confidence, (confidence <= 1 - 0.6 * lam).long(), lam)
    trivial = min(expected_cost_of(confidence, torch.full((1500,), l), lam) for l in (0, 1))
    found = expected_cost_of(confidence, ranged_policy().decide(fresh, lam), lam)
    assert best <= found < best + 0.003 and trivial > best + 0.012


@pytest.mark.parametrize("lam", LAMBDAS)
def test_one_lambda_finds_the_policy_that_the_range_has_for_it(lam):
    logits, labels, _ = calibrated_problem()
    fresh, _, confidence = calibrated_problem(seed=1)
    policy = policy_of("shared", (lam, lam))
    fit_gates(policy, logits, labels, THREE, lam, steps=500, learning_rate=0.02)
    alone, ranged = policy.decide(fresh, lam), ranged_policy().decide(fresh, lam)
    difference = expected_cost_of(confidence, alone, lam) - expected_cost_of(confidence, ranged, lam)
    assert abs(difference) < 0.004 and (alone == ranged).double().mean() > 0.9


def test_cost_falls_as_lambda_rises():
    fresh, _, _ = calibrated_problem(seed=2)
    lams = np.geomspace(0.1, 2.0, 15).tolist()
    costs = [float(THREE[ranged_policy().decide(fresh, lam)].mean()) for lam in lams]
    assert all(a >= b - 1e-6 for a, b in zip(costs[:-1], costs[1:], strict=True))
    assert costs[0] > 0.9 and costs[-1] < 0.45 and len(set(costs)) > 8
    per_sample = torch.linspace(0.1, 2.0, 1500)  # lambda may differ from sample to sample
    mixed = ranged_policy().decide(fresh, per_sample)
    for row in (0, 300, 700, 1499):
        assert mixed[row] == ranged_policy().decide(fresh[row : row + 1], float(per_sample[row]))[0]


SEVERAL = {
    "linear, min": ("linear", "min", 0.2),
    "linear, cumulative": ("linear", "cumulative", 0.2),
    "shared, stick": ("shared", "stick", 0.2),
    "shared, stick, a range": ("shared", "stick", [0.003, 3.0]),
}


@pytest.mark.parametrize("case", SEVERAL)
def test_of_several_exits_the_first_that_is_sure_is_taken(case):
    """Each of four exits is right where it is sure; going on costs a quarter of the backbone, lambda / 4."""
    gates, form, lam = SEVERAL[case]
    random = torch.Generator().manual_seed(0)
    labels, mul_adds = torch.randint(3, (400,), generator=random), torch.tensor([0.25, 0.5, 0.75, 1.0])
    sure = torch.rand(400, 4, generator=random) < torch.tensor([0.4, 0.5, 0.6, 1.0])
    confidence = torch.where(sure, 0.9, 0.5) + 0.08 * torch.rand(400, 4, generator=random)
    exits = [logits_of(confidence[:, l], torch.where(sure[:, l], labels, (labels + 1) % 3)) for l in range(4)]
    logits, first_sure = torch.stack(exits, dim=1), sure.double().argmax(1)
    policy = policy_of(gates, lam if isinstance(lam, list) else (lam, lam), exits=4, form=form)
    decay = {"weight_decay": 0.01} if gates == "linear" else {}
    fit_gates(policy, logits, labels, mul_adds, lam, steps=500, learning_rate=0.05, **decay)
    for one in (0.05, 0.2) if isinstance(lam, list) else (lam,):
        assert (policy.decide(logits, one) == first_sure).double().mean() > 0.97


def test_the_seed_is_all_that_chance_depends_on():
    logits, labels, _ = calibrated_problem(100)
    runs = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        policy = policy_of("shared", (0.1, 2.0))
        torch.manual_seed(noise)
        runs.append((fit_gates(policy, logits, labels, THREE, [0.1, 2.0], steps=20, seed=seed), policy.state_dict()))
    assert runs[0][0] == runs[1][0] != runs[2][0]
    for name, tensor in runs[0][1].items():
        assert torch.equal(tensor, runs[1][1][name])
    fixed = [
        fit_gates(policy_of("linear"), logits, labels, THREE, 0.5, steps=20, seed=seed) for seed in (0, 1)
    ]  # fmt: skip
    assert fixed[0] == fixed[1]  # one lambda: nothing is drawn


def test_the_first_loss_is_the_expected_cost_over_one_plus_lambda():
    logits, labels, _ = calibrated_problem(200)
    policy = policy_of("linear")
    with torch.no_grad():
        leave = policy.gate_values(logits)[:, 0].double()
    wrong = (logits.argmax(-1) != labels[:, None]).double()
    cost = wrong + 0.7 * THREE.double()
    expected = float((leave * cost[:, 0] + (1 - leave) * cost[:, 1]).mean() / 1.7)
    (found,) = fit_gates(policy, logits, labels, THREE, 0.7, steps=1)
    assert found == pytest.approx(expected, rel=1e-6)


def test_lambdas_are_drawn_uniformly_in_logarithm():
    """With gates that always leave, the loss is the mean of (e + 0.4 lambda) / (1 + lambda) over the draw."""
    logits, labels, _ = calibrated_problem(1500)
    policy = policy_of("shared", (0.01, 10.0))
    with torch.no_grad():
        policy.gates.bias.fill_(50.0)
    losses = fit_gates(policy, logits, labels, THREE, [0.01, 10.0], steps=20, learning_rate=0.0)
    error = float((logits[:, 0].argmax(-1) != labels).double().mean())
    lam = np.exp(np.linspace(math.log(0.01), math.log(10), 20001))
    assert np.mean(losses) == pytest.approx(np.mean((error + 0.4 * lam) / (1 + lam)), rel=0.01)
    assert len(set(losses)) == 20


def test_logits_from_inference_mode_and_only_the_gates_move():
    logits, labels, _ = sure_problem(60)
    with torch.inference_mode():
        given, truth = logits + 0, labels + 0
    policy = policy_of("linear")
    before = policy.gates.weight.detach().clone()
    fit_gates(policy, given, truth, THREE, 0.5, steps=3)
    assert torch.equal(given, logits) and not torch.equal(policy.gates.weight, before)


def test_a_whole_number_is_a_lambda():
    logits, labels, _ = sure_problem(60)
    whole = fit_gates(policy_of("linear"), logits, labels, THREE, 1, steps=3)
    assert whole == fit_gates(policy_of("linear"), logits, labels, THREE, 1.0, steps=3)
