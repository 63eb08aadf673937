"""im_training/l2w_den.py: weights, greedy shares, the exact meta gradient, what phi learns, what a checkpoint keeps."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jeidnn_hf.heads import ExitHeads
from jeidnn_hf.im_training import Phase
from jeidnn_hf.im_training.l2w_den import L2WDEN, Members, greedy_shares
from jeidnn_hf.im_training.plain import Plain
from jeidnn_hf.objectives import task_cost
from resumed_training import whole_and_resumed
from toy_training import differing, toy_model, toy_trainer

DIMS, CLASSES = (5, 4), 3


def method(native_head: bool = True, exits: int = 3, **options) -> L2WDEN:
    defaults = {"epsilon": 0.8, "center": "col", "interval": 1, "ratio": 0.75}
    args = {f"l2w_{k}": options.pop(k, v) for k, v in defaults.items()} | {"warmup_weighting": "uniform", **options}
    made = L2WDEN(SimpleNamespace(seed=0, **args), exits, native_head).double()
    made.learning_rate = 0.3
    return made


def heads_of(kind: str = "linear", native_head: bool = True) -> ExitHeads:
    torch.manual_seed(0)
    return ExitHeads([*DIMS, CLASSES], CLASSES, kind, head_dim=4, native_head=native_head).double()


def batch(n: int, seed: int = 1) -> tuple[list[Tensor], Tensor]:
    random = torch.Generator().manual_seed(seed)
    features = [torch.randn(n, d, dtype=torch.float64, generator=random) for d in (*DIMS, CLASSES)]
    return features, torch.randint(CLASSES, (n,), generator=random)


def loss_of(made, heads, features, labels) -> Tensor:
    return made.loss(SimpleNamespace(heads=heads), features, labels, Phase.WARMUP, None)


def test_greedy_shares_by_hand():
    """p = 1/2: quotas 4/7, 2/7 and the rest, of 7 samples 4, 2 and 1."""
    first = torch.tensor([0.9, 0.1, 0.8, 0.3, 0.7, 0.2, 0.6])
    second = torch.tensor([0.99, 0.5, 0.99, 0.3, 0.99, 0.4, 0.99])  # those that are taken count no more
    confidence = torch.stack([first, second, torch.ones(7)], 1)
    expected = torch.zeros(7, 3)
    expected[[0, 2, 4, 6], 0], expected[[1, 5], 1], expected[3, 2] = 1 / 4, 1 / 2, 1.0
    assert torch.equal(greedy_shares(confidence, 0.5), expected)


@pytest.mark.parametrize("n", [1, 2, 3, 10, 64])
@pytest.mark.parametrize("ratio", [0.3, 0.75, 1.0, 1.5])
def test_every_sample_is_taken_once_and_every_exit_counts_alike(n, ratio):
    shares = greedy_shares(torch.rand(n, 5, generator=torch.Generator().manual_seed(n)), ratio)
    assert ((shares > 0).sum(1) == 1).all()
    counts, quotas = (shares > 0).sum(0), ratio ** torch.arange(1, 6, dtype=torch.float64)
    assert counts[:4].tolist() == (n * quotas / quotas.sum() + 1e-9).floor()[:4].tolist()
    torch.testing.assert_close(shares.sum(0), (counts > 0).float())


@pytest.mark.parametrize("native_head", [True, False])
def test_weights_average_one(native_head):
    features, labels = batch(12)
    task, trained = task_cost(heads_of(native_head=native_head).members(features), labels), 2 if native_head else 3
    ones = torch.ones(12, dtype=torch.float64)
    col, mat = (method(native_head, center=center).weights(task).detach() for center in ("col", "mat"))
    for weights in (col, mat):
        assert weights.shape == (12, 3) and torch.equal(weights[:, trained:], torch.ones_like(weights[:, trained:]))
        assert (weights[:, :trained] - 1).abs().max() > 0.01
    torch.testing.assert_close(col[:, :trained].mean(1), ones)
    torch.testing.assert_close(mat[:, :trained].mean(), ones[0])
    assert (mat[:, :trained].mean(1) - 1).abs().max() > 1e-3
    u = method(native_head).weight_net(task[:, :trained]).detach()
    torch.testing.assert_close(col[:, :trained], 1 + 0.8 * (u - u.mean(1, keepdim=True)))
    torch.testing.assert_close(mat[:, :trained], 1 + 0.8 * (u - u.mean()))


@pytest.mark.parametrize("weighting", ["uniform", "position"])
def test_at_epsilon_0_it_is_plain_to_the_bit(weighting):
    heads, (features, labels) = heads_of(), batch(9)
    made = method(epsilon=0.0, warmup_weighting=weighting)
    found = loss_of(made, heads, features, labels)
    expected = loss_of(Plain(made.args, 3), heads, features, labels)
    assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(loss, heads.member_parameters()) for loss in (found, expected)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("center", ["col", "mat"])
def test_the_meta_gradient_is_the_closed_form(center):
    """dL_meta/dphi = -(eta epsilon / n) sum_il <grad_theta' L_meta, grad_theta CE_il> d(u_il - mean u)/dphi."""
    made, heads, n = method(center=center), heads_of(), 4
    (features, labels), (meta_features, meta_labels) = batch(n), batch(6, seed=2)
    found = made.meta_gradient(Members(heads), features, labels, meta_features, meta_labels)

    theta = [p.detach().clone().requires_grad_() for p in heads.member_parameters()]  # W1, b1, W2, b2

    def ce(theta, features, labels):
        logits = [F.linear(z, theta[2 * l], theta[2 * l + 1]) for l, z in enumerate(features[:2])] + [features[2]]
        return torch.stack([F.cross_entropy(o, labels, reduction="none") for o in logits], 1), logits

    losses, _ = ce(theta, features, labels)
    u = made.weight_net(losses[:, :2].detach())
    centred = u - (u.mean(1, keepdim=True) if center == "col" else u.mean())
    weighted = ((1 + 0.8 * centred.detach()) * losses[:, :2]).sum() / n
    gradient = torch.autograd.grad(weighted, theta, retain_graph=True)
    moved = [(p - 0.3 * g).detach().requires_grad_() for p, g in zip(theta, gradient, strict=True)]
    meta, logits = ce(moved, meta_features, meta_labels)
    shares = greedy_shares(torch.stack(logits, 1).detach().softmax(-1).amax(-1), 0.75)
    direction = torch.autograd.grad((shares * meta).sum(), moved)
    expected = [torch.zeros_like(p) for p in made.weight_net.parameters()]
    for i in range(n):
        for l in range(2):
            own = torch.autograd.grad(losses[i, l], theta, retain_graph=True, materialize_grads=True)
            product = sum((a * b).sum() for a, b in zip(own, direction, strict=True))
            slope = torch.autograd.grad(centred[i, l], made.weight_net.parameters(), retain_graph=True)
            for total, s in zip(expected, slope, strict=True):
                total -= 0.3 * 0.8 / n * product * s
    assert max(e.abs().max() for e in expected) > 1e-5
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(0.3 * f, e)


@pytest.mark.parametrize("weighting", ["uniform", "position"])
@pytest.mark.parametrize("center", ["col", "mat"])
@pytest.mark.parametrize(("kind", "native_head"), [("linear", True), ("recurrent", False), ("mlp", True)])
def test_the_meta_gradient_is_the_slope_of_the_meta_loss(kind, native_head, center, weighting):
    made, heads = method(native_head, center=center, warmup_weighting=weighting), heads_of(kind, native_head)
    (features, labels), (meta_features, meta_labels) = batch(5), batch(8, seed=2)
    found = made.meta_gradient(Members(heads), features, labels, meta_features, meta_labels)

    def meta_loss() -> Tensor:
        """Takes the virtual step on copies, and puts theta back."""
        task, theta = task_cost(heads.members(features), labels), heads.member_parameters()
        gradient = torch.autograd.grad(made.weighted(made.weights(task).detach() * task), theta)
        with torch.no_grad():
            before = [p.clone() for p in theta]
            for p, g in zip(theta, gradient, strict=True):
                p -= 0.3 * g
            logits = heads.members(meta_features)
            shares = greedy_shares(logits.softmax(-1).amax(-1), 0.75)
            value = (task_cost(logits, meta_labels) * shares).sum()
            for p, b in zip(theta, before, strict=True):
                p.copy_(b)
        return value

    torch.manual_seed(5)
    for _ in range(3):
        directions = [torch.randn_like(p) for p in made.weight_net.parameters()]
        step, values = 1e-6, []  # so small that no ReLU crosses 0
        for sign in (1, -2):
            with torch.no_grad():
                for p, d in zip(made.weight_net.parameters(), directions, strict=True):
                    p += sign * step * d
            values.append(meta_loss())
        with torch.no_grad():
            for p, d in zip(made.weight_net.parameters(), directions, strict=True):
                p += step * d
        slope = sum((f * d).sum() for f, d in zip(found, directions, strict=True))
        torch.testing.assert_close(0.3 * slope, (values[0] - values[1]) / (2 * step), rtol=1e-6, atol=1e-8)


def test_phi_moves_as_by_torchs_adam():
    made = method()
    parameters = [p.detach().clone().requires_grad_() for p in made.weight_net.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=1e-4, weight_decay=1e-4)
    torch.manual_seed(0)
    for _ in range(5):
        gradient = [torch.randn_like(p) for p in parameters]
        for p, g in zip(parameters, gradient, strict=True):
            p.grad = g.clone()
        optimizer.step()
        made.step_weights(gradient)
    for p, expected in zip(made.weight_net.parameters(), parameters, strict=True):
        torch.testing.assert_close(p.detach(), expected.detach(), rtol=1e-12, atol=1e-12)


def test_processes_share_the_mean_of_their_meta_gradients(monkeypatch):
    alone, together = method(), method()
    mine, mean = ([torch.full_like(p, x) for p in alone.weight_net.parameters()] for x in (1.0, -0.5))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda g: g.sub_(2))  # the other's is -2
    together.step_weights(mine)
    monkeypatch.undo()
    alone.step_weights(mean)
    assert differing(alone.state_dict(), together.state_dict()) == []


def test_a_step_learns_on_each_half_in_turn_and_then_weighs_all_by_the_new_phi(monkeypatch):
    made, heads, (features, labels) = method(), heads_of(), batch(7)
    gradient, seen = made.meta_gradient, []

    def spy(members, *halves):
        seen.append((halves[1].tolist(), halves[3].tolist(), made.weight_net[0].weight.detach().clone()))
        assert all(torch.equal(z[: len(part)], part) for z, part in zip(features, halves[0], strict=True)) == (
            len(halves[1]) == 3
        )
        return gradient(members, *halves)

    monkeypatch.setattr(made, "meta_gradient", spy)
    loss = loss_of(made, heads, features, labels)
    first, second = labels[:3].tolist(), labels[3:].tolist()
    assert [halves[:2] for halves in seen] == [(first, second), (second, first)]
    assert not torch.equal(seen[0][2], seen[1][2]) and not torch.equal(seen[1][2], made.weight_net[0].weight)
    task = task_cost(heads.members(features), labels)
    torch.testing.assert_close(loss, (made.weights(task) * task).mean(0).sum())
    loss.backward()
    assert all(p.grad is None for p in made.parameters()) and all(p.grad is not None for p in heads.parameters())


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_small_and_odd_batches(n):
    made, heads, (features, labels) = method(), heads_of(), batch(n)
    before = {name: value.clone() for name, value in made.state_dict().items()}
    assert loss_of(made, heads, features, labels).isfinite()
    assert made.steps.tolist() == [0.0 if n == 1 else 2.0] * 4
    moved = differing(before, made.state_dict())
    assert moved == ["batches"] if n == 1 else "weight_net.0.weight" in moved
    assert all(value.isfinite().all() for value in made.state_dict().values())


def test_the_interval_counts_batches():
    made, heads = method(interval=3), heads_of()
    steps = []
    for seed in range(7):
        loss_of(made, heads, *batch(4, seed))
        steps.append(int(made.steps[0]))
    assert steps == [2, 2, 2, 4, 4, 4, 6]


@pytest.mark.parametrize("center", ["col", "mat"])
def test_where_the_first_exit_is_blind_weight_goes_to_the_second(center):
    """Exit 1 tells classes 0 and 1 and guesses between 2 and 3, whose samples it will not take; exit 2 tells all."""
    torch.manual_seed(0)
    made, heads = method(False, exits=2, center=center).float(), ExitHeads([4, 4], 4, native_head=False)
    optimizer = torch.optim.Adam(heads.parameters(), lr=0.02)

    def draw(n: int) -> tuple[list[Tensor], Tensor]:
        labels, guess = torch.randint(4, (n,)), torch.randint(2, 4, (n,))
        seen = torch.where(labels < 2, labels, guess), labels
        return [2 * F.one_hot(y, 4) + 0.5 * torch.randn(n, 4) for y in seen], labels

    for _ in range(120):
        optimizer.zero_grad()
        loss_of(made, heads, *draw(64)).backward()
        optimizer.step()
    features, labels = draw(500)
    weights = made.weights(task_cost(heads.members(features), labels)).detach()
    seen, blind = weights[labels < 2].mean(0), weights[labels >= 2].mean(0)
    assert seen[0] > blind[0] + 0.05 and blind[1] > seen[1] + 0.15 and blind[1] > blind[0] + 0.5


def test_phi_is_no_part_of_the_model_and_of_the_optimizer_and_draws_from_its_own_seed(tmp_path):
    model = toy_model()
    run = toy_trainer(model, tmp_path, im_training="l2w_den")
    own = {id(p) for p in run.im_training.parameters()}
    optimized = {id(p) for group in run.create_optimizer().param_groups for p in group["params"]}
    assert len(own) == 4 and not own & (optimized | {id(p) for p in model.parameters()})
    state = torch.get_rng_state()
    other = L2WDEN(run.args, 4, True)
    assert torch.equal(state, torch.get_rng_state())
    assert differing(other.state_dict(), run.im_training.state_dict()) == []


def test_the_trainer_tells_the_learning_rate(tmp_path):
    run = toy_trainer(toy_model(), tmp_path, im_training="l2w_den", recipe="default", logging_steps=1)
    seen, loss = [], run.im_training.loss

    def spy(*args, **kwargs):
        seen.append(run.im_training.learning_rate)
        return loss(*args, **kwargs)

    run.im_training.loss = spy
    run.train()
    logged = [log["learning_rate"] for log in run.state.log_history if "learning_rate" in log]
    assert seen == pytest.approx(logged) and len(set(seen)) == 10


@pytest.mark.parametrize("interval", [1, 3])
def test_a_resumed_run_is_bit_identical(interval, tmp_path):
    options = {"im_training": "l2w_den", "recipe": "paper", "gates_on": "validation", "l2w_interval": interval}
    whole, resumed = whole_and_resumed(tmp_path, 4, **options)
    assert differing(whole, resumed) == []
    assert whole["method.steps"].tolist() == [20.0 if interval == 1 else 8.0] * 4 and whole["method.batches"] == 10


def test_wrong_options(tmp_path):
    for name, value in {"epsilon": -0.1, "ratio": 0.0, "interval": 0}.items():
        with pytest.raises(ValueError, match="^Expected l2w_epsilon >= 0, l2w_ratio > 0 and l2w_interval >= 1, but"):
            toy_trainer(toy_model(), tmp_path, im_training="l2w_den", **{f"l2w_{name}": value})
    with pytest.raises(ValueError, match="^Expected l2w_center to be one of .*, but got 'row'"):
        toy_trainer(toy_model(), tmp_path, im_training="l2w_den", l2w_center="row")
    with pytest.raises(ValueError, match="^Expected gates_on='validation', but got 'train': l2w_den trains no gates"):
        toy_trainer(toy_model(), tmp_path, im_training="l2w_den", gates_on="train")
