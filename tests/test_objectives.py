"""The objectives against the golden arrays, from the inputs to losses and gradients, and against cases by hand.

Where the official code departs from the paper in these formulas, a test says which of the two is meant here.
"""

from __future__ import annotations

import runpy
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from jeidnn_hf.exits import exit_distribution, uncertainty_statistics
from jeidnn_hf.gates import LinearGates
from jeidnn_hf.objectives import (
    class_imbalance_weights,
    cross_entropy,
    expected_cost,
    gate_loss,
    gate_targets,
    optimal_exit,
    task_cost,
    total_cost,
    warmup_loss,
)

GOLDENS = Path(__file__).parent / "goldens"
SEEDS = (0, 1, 3, 4, 6)
quick = settings(max_examples=60, deadline=None, derandomize=True)

# The gate losses that the goldens have: targets, and the weights of the positives.
GATE_LOSSES = {
    "unweighted": ("subsequent", None),
    "weighted": ("subsequent", "gate_pos_weight_paper"),
    "exactcount": ("subsequent", "gate_pos_weight_exactcount_paper"),
    "ifmin_unweighted": ("if_min", None),
    "ifmin_weighted": ("if_min", "gate_pos_weight_ifmin_paper"),
}


class Golden:
    """One golden file, batch-first, and what the package makes of its inputs."""

    def __init__(self, seed: int, dtype: torch.dtype):
        with np.load(GOLDENS / f"seed{seed}.npz") as file:
            stored = {name: torch.as_tensor(file[name]) for name in file}
        self.samples = len(stored["labels"])
        self.arrays = {k: v.to(dtype) if v.is_floating_point() else v for k, v in stored.items()}
        self.logits = self["exit_logits"].requires_grad_()
        self.gates = LinearGates(self.logits.shape[1] - 1).to(dtype)
        with torch.no_grad():
            self.gates.weight.copy_(self["gate_weight"])
            self.gates.bias.copy_(self["gate_bias"])

    def __getitem__(self, name: str) -> Tensor:
        array = self.arrays[name]
        return array.transpose(0, 1) if array.dim() > 1 and array.shape[1] == self.samples else array

    @cached_property
    def ce(self) -> Tensor:
        return task_cost(self.logits, self["labels"])

    @cached_property
    def cost(self) -> Tensor:
        return total_cost(self.ce, self["costs"], self["lam"])

    @cached_property
    def gate_logits(self) -> Tensor:
        return self.gates(uncertainty_statistics(self.logits[:, :-1].softmax(-1)))

    @cached_property
    def distribution(self) -> Tensor:
        return exit_distribution(self.gate_logits.sigmoid())

    @property
    def im_loss(self) -> Tensor:
        return expected_cost(self.ce, self.distribution.detach())

    @property
    def unweighted_im_loss(self) -> Tensor:
        """The plain mean over samples and the L-1 trained exits: what the official code comes down to."""
        trained = self.ce[:, :-1]
        return expected_cost(trained, torch.full_like(trained, 1 / trained.shape[1]))

    @property
    def joint_loss(self) -> Tensor:
        return expected_cost(self.cost, self.distribution)

    def gate_loss(self, kind: str, gates: slice = slice(None)) -> Tensor:
        rule, weights = GATE_LOSSES[kind]
        targets = gate_targets(self.cost, rule)
        return gate_loss(self.gate_logits[:, gates], targets[:, gates], self[weights][gates] if weights else None)

    def gate_loss_per_gate(self, kind: str) -> Tensor:
        return torch.stack([self.gate_loss(kind, slice(l, l + 1)) for l in range(self.gate_logits.shape[1])])


golden = cache(Golden)


def gradient(value: Tensor, of: Tensor) -> Tensor:
    return torch.autograd.grad(value, of, retain_graph=True)[0]


def cheapest_later(cost: Tensor) -> Tensor:
    return torch.stack([cost[:, l + 1 :].amin(-1) for l in range(cost.shape[1] - 1)], -1)


# What is compared with each array.
CHECKS = {
    "ce_paper": lambda g: g.ce,
    "total_cost_per_exit_paper": lambda g: g.cost,
    "warmup_ce_per_exit_paper": lambda g: g.ce.mean(0),
    "warmup_weights_paper": lambda g: gradient(warmup_loss(g.ce), g.ce).sum(0)[:-1],
    "warmup_lr0_paper": lambda g: warmup_loss(g.ce, lr0=0.01) / warmup_loss(g.ce),
    "warmup_loss_paper": lambda g: warmup_loss(g.ce, lr0=0.01),
    "warmup_loss_no_lr_paper": lambda g: warmup_loss(g.ce),
    "warmup_loss_per_exit_paper": lambda g: (gradient(warmup_loss(g.ce, lr0=0.01), g.ce) * g.ce).sum(0)[:-1],
    "warmup_grad_logits_no_lr_paper": lambda g: gradient(warmup_loss(g.ce), g.logits),
    "im_weights_paper": lambda g: g.distribution,
    "im_loss_ce_paper": lambda g: g.im_loss,
    "im_loss_ce_trainable_paper": lambda g: expected_cost(g.ce[:, :-1], g.distribution[:, :-1]),
    "im_loss_unweighted_mean_paper": lambda g: g.unweighted_im_loss,
    "im_grad_logits_paper": lambda g: gradient(g.im_loss, g.logits),
    "im_grad_logits_full_paper": lambda g: gradient(g.joint_loss, g.logits),
    "joint_loss_paper": lambda g: g.joint_loss,
    "joint_grad_gate_logits_paper": lambda g: gradient(g.joint_loss, g.gate_logits),
    "optimal_exit_paper": lambda g: optimal_exit(g.cost),
    "optimal_exit_margin_paper": lambda g: g.cost.sort(-1).values[:, :2].diff(dim=-1)[:, 0],
    "gate_targets_subsequent_paper": lambda g: gate_targets(g.cost, "subsequent").long(),
    "gate_targets_ifmin_paper": lambda g: gate_targets(g.cost, "if_min").long(),
    "gate_targets_ifmin_margin_paper": lambda g: (g.cost[:, :-1] - cheapest_later(g.cost)).abs(),
    "gate_pos_weight_paper": lambda g: class_imbalance_weights(gate_targets(g.cost), low=0),
    "gate_pos_weight_ifmin_paper": lambda g: class_imbalance_weights(gate_targets(g.cost, "if_min"), low=0),
}
for kind in GATE_LOSSES:
    CHECKS |= {
        f"gate_loss_{kind}_paper": lambda g, kind=kind: g.gate_loss(kind),
        f"gate_loss_per_gate_{kind}_paper": lambda g, kind=kind: g.gate_loss_per_gate(kind),
        f"gate_grad_weight_{kind}_paper": lambda g, kind=kind: gradient(g.gate_loss(kind), g.gates.weight),
        f"gate_grad_bias_{kind}_paper": lambda g, kind=kind: gradient(g.gate_loss(kind), g.gates.bias),
    }

CONFORMAL_RULES = ("general", "ims", "strict", "gated")
LATER = {  # conformal sets, calibration error and temperatures: other rooms
    "conf_cal_count_per_exit_paper",
    *(
        f"conf_{what}_{rule}_{alpha}_paper"
        for what in ("tau", "set_size", "inefficiency", "coverage")
        for rule in CONFORMAL_RULES
        for alpha in ("a05", "a10")
    ),
    *(f"conf_search_{rule}_a05_paper" for rule in CONFORMAL_RULES),
    *(f"ece{which}_paper" for which in ("", "_arraysplit", "_percentile", "_first15n", "_gated", "_temperature")),
    *("temperature_paper", "temperature_cal_paper", "nll_paper", "nll_temperature_paper"),
}


@pytest.fixture
def default_dtype(dtype):
    """Weights of imbalanced targets come in the default dtype."""
    torch.set_default_dtype(dtype)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", CHECKS)
def test_agrees_with_the_golden_array(name, seed, dtype):
    g = golden(seed, dtype)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(CHECKS[name](g), g[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", SEEDS)
def test_every_golden_array_of_the_paper_is_checked(seed):
    """By a test of the objectives, exits or gates, or in the rooms named above."""
    stored = {name for name in golden(seed, torch.float64).arrays if name.endswith("_paper")}
    rooms = [runpy.run_path(str(Path(__file__).with_name(f"test_{room}.py"))) for room in ("exits", "gates")]
    official = {"gate_pos_weight_exactcount_paper"}  # below: what is not done here
    parts = [set(CHECKS), LATER, official, *(set(room["CHECKS"]) for room in rooms)]
    assert set.union(*parts) == stored
    assert sum(map(len, parts)) == len(stored)


# Behaviour of the official code that is not copied.


@pytest.mark.parametrize("seed", SEEDS)
def test_the_weights_of_the_im_loss_do_not_cancel(seed):
    """The official ratio sum CE / sum P CE is not detached, so its gradient is that of the unweighted mean."""
    g = golden(seed, torch.float64)
    weighted, unweighted = gradient(g.im_loss, g.logits), gradient(g.unweighted_im_loss, g.logits)
    assert not torch.allclose(weighted / weighted.norm(), unweighted / unweighted.norm(), atol=1e-2)
    per_exit = g.distribution[:, :-1, None] * (g.logits.shape[1] - 1)
    torch.testing.assert_close(weighted[:, :-1], per_exit * unweighted[:, :-1], rtol=1e-10, atol=1e-14)


def test_the_im_loss_with_all_gates_closed_is_that_of_the_last_exit():
    """0/0 in the official code, whose sums end at exit L-1."""
    g = golden(0, torch.float64)
    logits = g["exit_logits"].detach().requires_grad_()
    distribution = exit_distribution(torch.full_like(g.gate_logits, -1000.0).sigmoid())
    loss = expected_cost(task_cost(logits, g["labels"]), distribution)
    assert loss.item() == pytest.approx(g["warmup_ce_per_exit_paper"][-1].item(), abs=1e-12)
    assert gradient(loss, logits)[:, :-1].count_nonzero() == 0
    assert gradient(loss, logits)[:, -1].count_nonzero() > 0


def test_the_expected_cost_counts_the_last_exit():
    g = golden(0, torch.float64)
    rest = (g["exit_distribution_paper"][:, -1] * g["ce_paper"][:, -1]).mean()
    assert rest > 0.01
    torch.testing.assert_close(g.im_loss - g["im_loss_ce_trainable_paper"], rest, rtol=0, atol=1e-10)


@pytest.mark.usefixtures("default_dtype")
@pytest.mark.parametrize("dtype", [torch.float64])
@pytest.mark.parametrize("seed", SEEDS)
def test_positives_are_counted_as_the_targets_are_cumulative(seed):
    """The official weights count the samples whose optimum is exactly l, so late gates see too few positives."""
    g = golden(seed, torch.float64)
    weights, exact = class_imbalance_weights(gate_targets(g.cost), low=0), g["gate_pos_weight_exactcount_paper"]
    assert weights[0] == exact[0]
    assert (weights <= exact).all() and (weights[1:] < exact[1:]).sum() >= (len(exact) - 1) // 2


@pytest.mark.parametrize("seed", SEEDS)
def test_the_gate_loss_is_a_sum_over_gates(seed):
    """Eq. 16; the official mean would make the step smaller the deeper the network is."""
    g = golden(seed, torch.float64)
    targets = gate_targets(g.cost).double()
    mean = torch.nn.functional.binary_cross_entropy(g.gate_logits.sigmoid(), targets)
    torch.testing.assert_close(g.gate_loss("unweighted"), mean * targets.shape[1], rtol=1e-10, atol=0)


def test_warmup_leaves_the_last_exit_alone():
    """(L - l) of Eq. 17, so L-1 at the first exit; the official weights are L-l+1, and 1 at the frozen head."""
    task = torch.ones(2, 4, requires_grad=True)
    warmup_loss(task).backward()
    assert (2 * task.grad).tolist() == [[3.0, 2.0, 1.0, 0.0]] * 2


@pytest.mark.parametrize("cost", [[1.0, 1.0, 1.0], [2.0, 1.0, 1.0]])
def test_the_earliest_exit_wins_a_tie(cost):
    first = cost.index(1.0)
    assert optimal_exit(torch.tensor([cost] * 5)).tolist() == [first] * 5
    assert gate_targets(torch.tensor([cost])).tolist() == [[first == 0, True]]
    assert gate_targets(torch.tensor([cost]), "if_min").tolist() == [[first == 0, True]]


def test_lambda_zero_and_saturated_cross_entropy_exit_first():
    logits = torch.tensor([0.0, 1e4]).expand(3, 4, 2)
    cost = total_cost(task_cost(logits, torch.ones(3, dtype=torch.long)), torch.linspace(0.25, 1, 4), 0.0)
    assert optimal_exit(cost).tolist() == [0, 0, 0]


# Cases by hand and by brute force.


def costs_with_ties():
    shapes = st.tuples(st.integers(1, 5), st.integers(1, 6))
    return shapes.flatmap(lambda s: arrays(np.float32, s, elements=st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.0])))


@given(costs=costs_with_ties())
@quick
def test_targets_by_brute_force(costs):
    optimal, last = optimal_exit(torch.from_numpy(costs)).tolist(), costs.shape[1] - 1
    subsequent = gate_targets(torch.from_numpy(costs), "subsequent").tolist()
    if_min = gate_targets(torch.from_numpy(costs), "if_min").tolist()
    for i, row in enumerate(costs.tolist()):
        assert optimal[i] == row.index(min(row))
        assert subsequent[i] == [l >= optimal[i] for l in range(last)]
        assert if_min[i] == [row[l] <= min(row[l + 1 :]) for l in range(last)]


def test_exit_if_min_can_close_a_gate_after_the_optimum():
    """The pattern of App. 9.15: 0, 0, 1, 0, 1, 1 over six gates."""
    cost = torch.tensor([[6.0, 5.0, 1.0, 4.0, 2.0, 2.0, 3.0]])
    assert gate_targets(cost, "if_min").int().tolist() == [[0, 0, 1, 0, 1, 1]]
    assert gate_targets(cost, "subsequent").int().tolist() == [[0, 0, 1, 1, 1, 1]]


def test_task_costs_by_hand():
    probs = torch.tensor([[[0.5, 0.25, 0.25], [0.125, 0.75, 0.125]]])
    labels = torch.tensor([1])
    expected = {
        "cross_entropy": [[np.log(4), np.log(4 / 3)]],
        "error": [[1.0, 0.0]],
        "brier": [[0.25 + 0.5625 + 0.0625, 2 / 64 + 0.0625]],
    }
    for kind, values in expected.items():
        cost = task_cost(probs.log(), labels, kind)
        torch.testing.assert_close(cost, torch.tensor(values, dtype=torch.float32), rtol=0, atol=1e-6)


def test_task_costs_of_several_labels_and_of_regression_by_hand():
    ln3 = np.log(3)
    logits = torch.tensor([[[ln3, 0.0], [-ln3, ln3]]], dtype=torch.float64)  # chances 3/4 1/2, then 1/4 3/4
    several = task_cost(logits, torch.tensor([[1.0, 0.0]], dtype=torch.float64), "binary_cross_entropy")
    expected = [[np.log(4 / 3) + np.log(2), np.log(4) + np.log(4)]]
    torch.testing.assert_close(several, torch.tensor(expected) / 2)
    numbers = task_cost(torch.tensor([[[1.0, 4.0], [3.0, 0.0]]]), torch.tensor([[2.0, 0.0]]), "squared_error")
    assert numbers.tolist() == [[8.5, 0.5]]


def test_lambda_may_differ_from_sample_to_sample():
    task, mul_adds = torch.rand(3, 2), torch.tensor([0.5, 1.0])
    cost = total_cost(task, mul_adds, torch.tensor([0.0, 1.0, 4.0]))
    torch.testing.assert_close(cost - task, torch.tensor([[0.0, 0.0], [0.5, 1.0], [2.0, 4.0]]), rtol=0, atol=1e-6)
    for i, lam in enumerate([0.0, 1.0, 4.0]):
        torch.testing.assert_close(total_cost(task, mul_adds, lam)[i], cost[i], rtol=0, atol=0)


def test_expected_cost_of_certain_exits_is_their_mean_cost():
    cost, certain = torch.tensor([[1.0, 2.0], [4.0, 8.0]]), torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert expected_cost(cost, certain).item() == 3.0


def test_gate_loss_by_hand():
    """BCE at logit 0 is ln 2 whatever the target, at log 3 it is ln 4/3 or ln 4; positives are weighted."""
    logits = torch.tensor([[0.0, 0.0], [float(np.log(3)), 0.0]])
    targets = torch.tensor([[True, False], [True, False]])
    unweighted = (3 * np.log(2) + np.log(4 / 3)) / 2
    weighted = (3 * np.log(2) + 2 * np.log(2) + 3 * np.log(4 / 3)) / 2
    assert gate_loss(logits, targets).item() == pytest.approx(unweighted, abs=1e-6)
    assert gate_loss(logits, targets, torch.tensor([3.0, 9.0])).item() == pytest.approx(weighted, abs=1e-6)


def test_class_imbalance_weights_are_clipped_on_both_sides():
    """Columns with 0, 1, 4, 7 and 8 ones of 8; all ones would otherwise weigh 0 and drop out of the loss."""
    targets = torch.arange(8)[:, None] < torch.tensor([0, 1, 4, 7, 8])
    assert class_imbalance_weights(targets).tolist() == pytest.approx([5.0, 5.0, 1.0, 0.2, 0.2])
    unclipped = class_imbalance_weights(targets, low=0.0, high=float("inf"), floor=0.1)
    assert unclipped.tolist() == pytest.approx([80.0, 7.0, 1.0, 1 / 7, 0.0])
    assert class_imbalance_weights(targets, low=0.5, high=2.0).tolist() == [2.0, 2.0, 1.0, 0.5, 0.5]
    assert class_imbalance_weights(targets, high=100.0, floor=0.5)[0] == 16.0
    logits = torch.zeros(8, 5, requires_grad=True)
    gate_loss(logits, targets, class_imbalance_weights(targets)).backward()
    assert (logits.grad[:, -1] < 0).all()


def test_one_exit_has_nothing_to_train():
    cost = torch.rand(4, 1)
    targets = gate_targets(cost, "if_min")
    assert targets.shape == gate_targets(cost).shape == (4, 0)
    assert optimal_exit(cost).tolist() == [0] * 4
    assert warmup_loss(cost).item() == 0
    assert gate_loss(torch.zeros(4, 0), targets).item() == 0
    assert class_imbalance_weights(targets).shape == (0,)


def test_unknown_kinds():
    with pytest.raises(ValueError, match=r"Expected task_cost to be one of .*'brier'.*, but got 'hinge'"):
        task_cost(torch.zeros(1, 1, 2), torch.zeros(1, dtype=torch.long), "hinge")
    with pytest.raises(ValueError, match=r"Expected gate_targets to be one of .*'if_min'.*, but got 'ifmin'"):
        gate_targets(torch.zeros(1, 2), "ifmin")


@pytest.mark.parametrize("shape", [(5, 3, 4), (7, 4)])
def test_the_cross_entropy_is_the_same_however_the_classes_lie_in_memory(shape):
    torch.manual_seed(0)
    logits, labels = torch.randn(shape, dtype=torch.float64), torch.randint(shape[-1], shape[:-1])
    expected = -logits.log_softmax(-1).gather(-1, labels[..., None])[..., 0]
    by_class = logits.movedim(-1, 0).contiguous().movedim(0, -1)
    for layout in (logits, by_class):
        torch.testing.assert_close(cross_entropy(layout.requires_grad_(), labels), expected)
        assert torch.autograd.gradcheck(lambda x: cross_entropy(x, labels), layout)
