"""Gates and policies: the golden gate logits, the small network by hand, and one decision however it is computed."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification
from jeidnn_hf.backbones.staged import select
from jeidnn_hf.exits import EXIT_RULES, GATE_FORMS, STATISTICS, uncertainty_statistics
from jeidnn_hf.folded import FoldedGates
from jeidnn_hf.gates import ExitPolicy, LinearGates, SharedGates, build_gates, log_certainty
from jeidnn_hf.policies import LearnedGates

GOLDENS = Path(__file__).parent / "goldens"
SEEDS = (0, 1, 3, 4, 6)
LAM_RANGE = (0.01, 10.0)
forms = pytest.mark.parametrize("form", GATE_FORMS)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def golden(seed: int, dtype: torch.dtype) -> tuple[LearnedGates, dict[str, Tensor]]:
    """The policy with a golden file's gates, and its arrays, batch-first."""
    with np.load(GOLDENS / f"seed{seed}.npz") as file:
        stored = {name: torch.as_tensor(file[name]) for name in file}
    samples = len(stored["labels"])
    g = {k: v.transpose(0, 1) if v.dim() > 1 and v.shape[1] == samples else v for k, v in stored.items()}
    gates = LinearGates(len(g["gate_bias"])).to(dtype)
    gates.load_state_dict({"weight": g["gate_weight"], "bias": g["gate_bias"]})
    return LearnedGates(gates, len(g["costs"])), {k: v.to(dtype) if v.is_floating_point() else v for k, v in g.items()}


# What is compared with each array, and the tolerance in float32.
CHECKS = {
    "gate_logits_paper": (lambda policy, g: policy.gate_logits(g["exit_logits"]), 5e-6),
    "gate_probs_paper": (lambda policy, g: policy.gate_values(g["exit_logits"]), 1e-6),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CHECKS)
def test_agrees_with_the_golden_array(name, seed, dtype):
    policy, g = golden(seed, dtype)
    compute, tolerance = CHECKS[name]
    atol = 1e-10 if dtype == torch.float64 else tolerance
    torch.testing.assert_close(compute(policy, g), g[name], rtol=0, atol=atol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_policy_of_the_paper_on_the_golden_logits(seed, dtype):
    policy, g = golden(seed, dtype)
    exit_index = g["exit_index_paper"].tolist()
    assert policy.decide(g["exit_logits"]).tolist() == exit_index
    assert ExitPolicy.decide(policy, g["exit_logits"]).tolist() == exit_index
    torch.testing.assert_close(policy.distribution(g["exit_logits"]), g["exit_distribution_paper"], rtol=0, atol=2e-6)


def linear_gates(num_gates: int, num_labels: int) -> LinearGates:
    gates = LinearGates(num_gates)
    torch.nn.init.normal_(gates.weight, std=5)
    return gates


def shared_gates(num_gates: int, num_labels: int, lam_range: tuple[float, float] = LAM_RANGE) -> SharedGates:
    gates = SharedGates(num_gates, num_labels, lam_range)
    for parameter in gates.parameters():
        torch.nn.init.normal_(parameter)
    with torch.no_grad():  # about half of the samples leave at every exit
        gates.bias -= gates(statistics_of(200, num_gates, num_labels).float(), 0.3).median(0).values
    return gates


def compared_probability(gates: Tensor, form: str, rule: str) -> Tensor:
    """P(G <= l) or P(E^l), ``(N, L-1)``, from the definitions of the forms."""
    leaves_by = {
        "min": lambda: gates.cumsum(-1).clamp_max(1),
        "cumulative": lambda: gates.cummax(-1).values,
        "stick": lambda: 1 - (1 - gates).cumprod(-1),
    }[form]()
    if rule == "median":
        return leaves_by
    left = 1 - torch.cat([torch.zeros_like(gates[:, :1]), leaves_by[:, :-1]], -1)
    share = (leaves_by - (1 - left)) / left
    return torch.where(left > 1e-12, share, 1.0)


def dropping_scan(policy: ExitPolicy, logits: Tensor, lam: float | Tensor | None = None) -> Tensor:
    """Exits taken when the samples that left are dropped from logits, lambda and carry."""
    taken, rows, carry = torch.full((len(logits),), -1), torch.arange(len(logits)), None
    for l in range(logits.shape[1]):
        leaves, carry = policy.step(l, logits[rows, l], carry, lam[rows] if isinstance(lam, Tensor) else lam)
        taken[rows[leaves]] = l
        stay = (~leaves).nonzero()[:, 0]
        rows, carry = select((rows, carry), stay)
    return taken


@pytest.mark.parametrize(
    ("make", "threshold", "lam"),
    [(linear_gates, 0.5, None), (linear_gates, 0.8, None), (shared_gates, 0.5, 0.3), (shared_gates, 0.8, "per sample")],
)
@pytest.mark.parametrize("rule", ["conditional", "median"])
@forms
@torch.no_grad()
def test_one_decision_at_once_step_by_step_and_with_samples_dropped(form, rule, make, threshold, lam):
    logits = 2 * torch.randn(300, 6, 5, dtype=torch.float64)
    lam = torch.empty(300, dtype=torch.float64).uniform_(*LAM_RANGE) if lam == "per sample" else lam
    policy = LearnedGates(make(5, 5).double(), 6, form, rule, threshold)
    policy.gates.bias -= policy.gate_logits(logits, lam).mean(0) - torch.linspace(-1, 1, 5)  # each opens for some
    probability = compared_probability(policy.gate_values(logits, lam), form, rule)
    clear = (probability - threshold).abs().amin(-1) > 1e-5
    expected = [next((l for l, p in enumerate(row) if p > threshold), 5) for row in probability.tolist()]
    expected = torch.tensor(expected)[clear]
    assert clear.float().mean() > 0.95 and len(expected.unique()) >= 3
    for decide in (policy.decide, lambda *args: ExitPolicy.decide(policy, *args), lambda *a: dropping_scan(policy, *a)):
        assert torch.equal(decide(logits, lam)[clear], expected)


@pytest.mark.parametrize("rule", EXIT_RULES)
@forms
@torch.no_grad()
def test_a_decision_is_its_three_parts_from_one_look_at_the_gates(form, rule, monkeypatch):
    logits, lam = 2 * torch.randn(50, 6, 5), torch.empty(50).uniform_(*LAM_RANGE)
    policy = LearnedGates(shared_gates(5, 5), 6, form, rule)
    seen, forward = [], policy.gates.forward
    monkeypatch.setattr(policy.gates, "forward", lambda *args: seen.append(args) or forward(*args))
    torch.manual_seed(1)
    decision = policy(logits, lam)
    assert len(seen) == 1 and len(decision.exit_index.unique()) > 1
    torch.manual_seed(1)
    parts = policy.decide(logits, lam), policy.distribution(logits, lam), policy.gate_values(logits, lam)
    torch.manual_seed(1)
    general = ExitPolicy.forward(policy, logits, lam)
    for found, part, expected in zip(decision, parts, general, strict=True):
        assert torch.equal(found, part) and torch.equal(found, expected)


@torch.no_grad()
def test_gates_of_a_single_label_see_the_same_in_every_sample():
    for gates in (linear_gates(3, 1), shared_gates(3, 1)):
        decision = LearnedGates(gates, 4, "stick")(torch.randn(20, 4, 1), 0.5)
        assert decision.gate_values.isfinite().all()
        torch.testing.assert_close(decision.gate_values, decision.gate_values[:1].expand(20, -1))


@pytest.mark.parametrize(
    "decide",
    [
        pytest.param(LearnedGates.decide, id="at once"),
        pytest.param(ExitPolicy.decide, id="step by step"),
        pytest.param(dropping_scan, id="samples dropped"),
    ],
)
@forms
def test_sampled_exits_have_the_frequencies_of_the_exit_distribution(form, decide):
    n = 20_000
    logits = torch.randn(1, 4, 5).expand(n, 4, 5)
    policy = LearnedGates(LinearGates(3), 4, form, "sample")
    with torch.no_grad():
        policy.gates.bias.copy_(torch.tensor([-1.5, -0.5, 0.0]))
    probability = policy.distribution(logits[:1])[0]
    assert (probability > 0.02).sum() >= 3
    frequency = decide(policy, logits).bincount(minlength=4) / n
    deviation = (probability * (1 - probability) / n).sqrt()
    assert ((frequency - probability).abs() <= 5 * deviation + 1e-7).all()


@forms
def test_sampling_is_one_draw_a_sample_whichever_way_it_is_scanned(form):
    logits, policy = torch.randn(200, 5, 3), LearnedGates(linear_gates(4, 3), 5, form, "sample")
    taken = []
    for decide in (policy.decide, lambda x: ExitPolicy.decide(policy, x), lambda x: dropping_scan(policy, x)):
        torch.manual_seed(1)
        taken.append(decide(logits).tolist())
    assert taken[0] == taken[1] == taken[2] and len(set(taken[0])) >= 3


@forms
@pytest.mark.parametrize("rule", ["conditional", "median"])
def test_saturated_gates(form, rule):
    policy = LearnedGates(LinearGates(3), 4, form, rule)
    logits = torch.randn(5, 4, 3)
    for open_gate in range(4):
        policy.gates.bias.data = torch.where(torch.arange(3) == open_gate, 1000.0, -1000.0)
        assert policy.decide(logits).tolist() == ExitPolicy.decide(policy, logits).tolist() == [open_gate] * 5
        assert policy.distribution(logits)[:, open_gate].tolist() == [1.0] * 5
        leaves, _ = policy.step(3, logits[:, 3], (torch.ones(5), None))
        assert leaves.all()


@forms
@pytest.mark.parametrize("rule", ["conditional", "median"])
@pytest.mark.parametrize("make", [linear_gates, shared_gates])
def test_one_exit_needs_no_gate(form, rule, make):
    policy, logits = LearnedGates(make(0, 3), 1, form, rule), torch.randn(4, 1, 3)
    assert policy.gate_values(logits, 0.5).shape == (4, 0)
    assert policy.decide(logits, 0.5).tolist() == ExitPolicy.decide(policy, logits, 0.5).tolist() == [0] * 4
    assert policy.distribution(logits, 0.5).tolist() == [[1.0]] * 4
    assert policy.step(0, logits[:, 0], None, 0.5)[0].all()


def test_options_are_checked():
    with pytest.raises(ValueError, match=r"Expected gate_form to be one of .*'stick'.*, but got 'sticks'"):
        LearnedGates(LinearGates(1), 2, form="sticks")
    with pytest.raises(ValueError, match=r"Expected exit_rule to be one of .*'median'.*, but got 'mean'"):
        LearnedGates(LinearGates(1), 2, rule="mean")
    assert [LearnedGates(LinearGates(1), 2, rule=rule).rule for rule in EXIT_RULES] == list(EXIT_RULES)


class Patience(ExitPolicy):
    """Leaves once two exits in a row predict the same class: a policy with a carry of its own."""

    def step(self, l, logits, carry=None, lam=None):
        prediction = logits.argmax(-1)
        return torch.zeros_like(prediction, dtype=torch.bool) if carry is None else prediction == carry, prediction


def test_scan_of_any_policy():
    logits = torch.randn(100, 5, 3)
    policy, predictions = Patience(5), logits.argmax(-1).tolist()
    expected = [next((l for l in range(1, 4) if row[l] == row[l - 1]), 4) for row in predictions]
    assert policy.decide(logits).tolist() == expected
    assert policy.distribution(logits).argmax(-1).tolist() == expected
    assert policy.distribution(logits).sum().item() == 100
    assert policy.gate_values(logits) is None and policy.mul_adds(3) == 0


def test_linear_gates_start_like_linear_layers():
    gates = LinearGates(500)
    assert 0.45 < gates.weight.abs().max() <= 0.5 and 0.45 < gates.bias.abs().max() <= 0.5


def shared_gates_by_hand(gates: SharedGates, statistics: np.ndarray, lam: np.ndarray, num_labels: int) -> np.ndarray:
    p = {name: parameter.detach().numpy() for name, parameter in gates.named_parameters()}
    low, high = np.log(LAM_RANGE)
    t = ((np.log(lam) - low) / (high - low) * 2 - 1)[:, None]
    scaled = statistics / np.array([1, np.log(num_labels), np.log(num_labels), 1])
    sure = np.log(1e-4) / 2 - np.log(np.abs(np.array([1, 0, 0, 1]) - scaled) + 1e-4)
    weighed = (sure * (p["weight"][0] + t[..., None] * p["weight"][1])).sum(-1)
    plain = weighed + p["bias"] + p["slope"] * t + p["curvature"] * t**2
    inputs = np.concatenate(
        [
            scaled,
            np.broadcast_to(t[..., None], (*statistics.shape[:2], 1)),
            np.broadcast_to(p["fine.embedding.weight"], (*statistics.shape[:2], 8)),
        ],
        axis=-1,
    )
    first = np.maximum(inputs @ p["fine.layers.0.weight"].T + p["fine.layers.0.bias"], 0)
    second = np.maximum(first @ p["fine.layers.2.weight"].T + p["fine.layers.2.bias"], 0)
    return plain + (second @ p["fine.layers.4.weight"].T)[..., 0] + p["fine.bias"]


def statistics_of(samples: int, exits: int, classes: int) -> Tensor:
    return uncertainty_statistics((2 * torch.randn(samples, exits, classes, dtype=torch.float64)).softmax(-1))


def test_shared_gates_by_hand():
    gates, statistics, lam = shared_gates(4, 7).double(), statistics_of(9, 4, 7), torch.logspace(-2, 1, 9).double()
    expected = shared_gates_by_hand(gates, statistics.numpy(), lam.numpy(), 7)
    np.testing.assert_allclose(gates(statistics, lam).detach(), expected, rtol=0, atol=1e-10)
    alone = [opinion.detach().numpy() for opinion in gates.alone(statistics, lam)]
    np.testing.assert_allclose((alone[0] + alone[1]) / 2, expected, rtol=0, atol=1e-10)
    assert np.abs(alone[0] - alone[1]).min() > 0
    assert np.ptp(expected, axis=0).min() > 0.1


def test_shared_gates_start_as_one_threshold_on_the_largest_probability():
    gates, statistics = SharedGates(4, 7, LAM_RANGE), statistics_of(300, 4, 7).float()
    assert gates.bias.tolist() == gates.fine.bias.tolist() == [0.0] * 4
    maximum, shares = statistics[..., 0].flatten(), []
    for lam in torch.logspace(-2, 1, 5).tolist():
        leaves = (gates.alone(statistics, lam)[0] > 0).flatten()
        if leaves.any() and not leaves.all():
            assert maximum[leaves].min() > maximum[~leaves].max()
        shares.append(leaves.float().mean().item())
    assert shares == sorted(shares) and shares[0] == 0 and shares[-1] == 1


@pytest.mark.parametrize("lam", [LAM_RANGE[0], 0.7, LAM_RANGE[1]])
def test_lambda_is_a_number_or_one_for_each_sample(lam):
    gates, statistics = shared_gates(4, 7), statistics_of(6, 4, 7).float()
    expected = gates(statistics, lam)
    for same in (torch.tensor(lam), torch.tensor([lam]), torch.full((6,), lam), torch.full((6,), lam).double()):
        torch.testing.assert_close(gates(statistics, same), expected, rtol=1e-5, atol=1e-5)
    mixed = gates(statistics, torch.tensor([0.01, 0.1, lam, 1.0, 3.0, 10.0]))
    torch.testing.assert_close(mixed[2], expected[2], rtol=1e-5, atol=1e-5)
    assert (gates(statistics, 0.2) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("lam", [0.3, "per sample"])
@pytest.mark.parametrize("make", [linear_gates, shared_gates])
def test_one_exit_at_a_time_is_a_slice_of_all(make, lam):
    gates, statistics = make(5, 4).double(), statistics_of(6, 5, 4)
    lam = torch.logspace(-2, 1, 6) if lam == "per sample" else lam
    for l in range(5):
        one = gates(statistics[:, l], lam, l)
        assert one.shape == (6,)
        torch.testing.assert_close(one, gates(statistics, lam)[:, l], rtol=0, atol=1e-10)
    some = gates(statistics[:, 1:3], lam, slice(1, 3))
    torch.testing.assert_close(some, gates(statistics, lam)[:, 1:3], rtol=0, atol=1e-10)


def inputs_of(gates: SharedGates, statistics: Tensor, lam: float | Tensor | None) -> Tensor:
    seen = []
    handle = gates.fine.layers[0].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    gates(statistics, lam)
    handle.remove()
    return seen[0]


def test_what_the_network_of_shared_gates_sees():
    """Entropies are 1 for uniform probabilities; log lambda is -1 and 1 at the ends of its range, 0 in the middle."""
    gates, lam = shared_gates(2, 6), torch.tensor([0.01, math.sqrt(0.1), 10.0])
    uniform = uncertainty_statistics(torch.full((3, 2, 6), 1 / 6))
    inputs = inputs_of(gates, uniform, lam)
    expected = torch.tensor([[1 / 6, 1.0, 1.0, 0.0, scaled] for scaled in (-1, 0, 1)])
    torch.testing.assert_close(inputs[..., :5], expected[:, None].expand(3, 2, 5), rtol=0, atol=1e-6)
    assert torch.equal(inputs[1, :, 5:], gates.fine.embedding.weight)


@given(classes=st.integers(2, 200), doubt=st.floats(0, 1))
def test_the_scale_of_the_statistics(classes, doubt):
    """log 100 for a certain answer, - log 100 for a guess, and log 10 further with a tenth of the doubt."""
    scale = torch.tensor([1, 1 / math.log(classes), 1 / math.log(classes), 1])
    certain = log_certainty(uncertainty_statistics(torch.eye(classes)[:1]) * scale)
    torch.testing.assert_close(certain, torch.full((1, 4), math.log(100)), rtol=0, atol=2e-3)
    uniform = uncertainty_statistics(torch.full((1, classes), 1 / classes))
    guess = log_certainty(uniform * scale)[0]
    torch.testing.assert_close(guess[1:], torch.full((3,), -math.log(100)), rtol=0, atol=1e-3)
    some, less, half = (log_certainty(torch.tensor([1 - d, d, d, 1 - d])) for d in (doubt, doubt / 10, doubt / 2))
    assert (half >= some).all() and (less - some <= math.log(10) + 1e-4).all()
    if doubt > 0.1:
        assert (less - some >= math.log(10) - 0.01).all()


def test_equal_ends_of_the_range_ignore_lambda():
    gates, statistics = shared_gates(4, 7, (0.5, 0.5)), statistics_of(6, 4, 7).float()
    expected = gates(statistics, None)
    assert expected.isfinite().all() and inputs_of(gates, statistics, None)[..., 4].count_nonzero() == 0
    for lam in (0.0, 0.5, 100.0, torch.rand(6)):
        assert torch.equal(gates(statistics, lam), expected)


@pytest.mark.parametrize(("classes", "expected"), [(10, 96), (100, 906)])
def test_linear_gates_cost_what_tables_2_and_3_say(classes, expected):
    policy = LearnedGates(LinearGates(6), 7)
    assert policy.mul_adds(classes) == expected
    assert policy.mul_adds(classes) == classes + (classes + 1) + 2 * classes + 5 * classes + 5


@pytest.mark.parametrize(("classes", "width"), [(10, 32), (100, 16)])
def test_shared_gates_cost_their_statistics_and_what_they_make_of_them(classes, width):
    """4 distances, logarithms and weights and a bias; the network."""
    gates, inputs = SharedGates(6, classes, LAM_RANGE, width=width), 4 + 8 + 1
    layers = (inputs * width + width) + (width * width + width) + (width + 1)
    assert sum(p.numel() for p in gates.fine.layers.parameters()) + 1 == layers
    assert gates.mul_adds(classes) == LinearGates(6).mul_adds(classes) - 5 + 13 + layers


@pytest.mark.parametrize("kind", ["linear", "shared"])
@given(names=st.sets(st.sampled_from(STATISTICS), min_size=1))
def test_gates_that_read_some_statistics_are_those_whose_other_weights_are_0(kind, names):
    read = [name for name in STATISTICS if name in names]
    torch.manual_seed(0)
    some = build_gates(kind, 3, 5, LAM_RANGE, read).double()
    whole, statistics = build_gates(kind, 3, 5, LAM_RANGE).double(), torch.rand(6, 3, 4, dtype=torch.float64)
    columns = [STATISTICS.index(name) for name in read]
    with torch.no_grad():
        for own, parameter in zip(some.parameters(), whole.parameters(), strict=True):
            torch.nn.init.normal_(own)
            if own.shape == parameter.shape:
                parameter.copy_(own)
        whole.weight.zero_()
        whole.weight[:, columns] = some.weight
        if kind == "shared":
            first, own = whole.fine.layers[0].weight, some.fine.layers[0].weight
            first[:, :4], first[:, 4:] = 0, own[:, len(read) :]
            first[:, columns] = own[:, : len(read)]
    expected = whole(statistics, 0.3)
    torch.testing.assert_close(some(statistics, 0.3), expected)
    torch.testing.assert_close(FoldedGates(some)(statistics[:, 1], 0.3, 1), expected[:, 1])
    per_name = {"max_probability": 5, "entropy": 10, "power_entropy": 25, "margin": 6}
    of_each = 1 if kind == "linear" else 3 + 32
    saved = sum(per_name[name] for name in set(STATISTICS) - names) + (4 - len(read)) * of_each
    assert whole.mul_adds(5) - some.mul_adds(5) == saved


@pytest.mark.parametrize("names", [[], ["margin", "entropy"], ["entropy", "entropy"], ["loss"], "entropy"])
def test_statistics_that_there_are_not(names):
    with pytest.raises(ValueError, match="^Expected gate_statistics to name some of"):
        LinearGates(2, names)
    with pytest.raises(ValueError, match="gate_statistics"):
        JEIDNNConfig(gate_statistics=names)


def test_a_model_keeps_the_statistics_of_its_gates(tmp_path):
    net = JEIDNNForImageClassification(
        JEIDNNConfig(backbone="resnet20_cifar", num_labels=4, image_size=32, gate_statistics=["margin"])
    )
    assert JEIDNNConfig().gate_statistics is None and net.policy.gates.statistics == ("margin",)
    net.save_pretrained(tmp_path)
    again = JEIDNNForImageClassification.from_pretrained(tmp_path)
    assert again.policy.gates.statistics == ("margin",)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images).logits, net.eval()(images).logits)
    all_four = LearnedGates(LinearGates(net.backbone.num_exits - 1), net.backbone.num_exits)
    all_four.lam = 0.3
    net.set_policy(all_four)
    assert net.config.gate_statistics is None
