"""Folded heads and gates answer what those they are folded from answer; a changed weight folds them anew."""

import itertools

import pytest
import torch

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, early_exit
from jeidnn_hf.folded import FoldedGates, FoldedHeads, fold
from jeidnn_hf.gates import LinearGates, SharedGates
from jeidnn_hf.heads import ExitHeads
from jeidnn_hf.policies import ConfidenceThreshold, LearnedGates, choose_active_exits
from jeidnn_hf.record import ExitRecord
from jeidnn_hf.splits import SplitInfo

DIMS = (6, 9, 5, 4)


def shaken(module):
    """Every parameter and buffer away from where it starts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            noise = torch.rand(tensor.shape, generator=generator)
            tensor.copy_(0.5 + noise if name.endswith(("std", "temperature")) else tensor + noise - 0.5)
    return module


@pytest.mark.parametrize("native_head", [True, False])
@pytest.mark.parametrize("ensemble", [True, False])
@pytest.mark.parametrize("standardize", [True, False])
@pytest.mark.parametrize("boosting", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["linear", "mlp", "recurrent"])
@torch.no_grad()
def test_folded_heads_answer_the_same(kind, boosting, standardize, ensemble, native_head):
    heads = shaken(ExitHeads(DIMS, 4, kind, 7, native_head, ensemble, standardize, boosting=boosting))
    folded = FoldedHeads(heads)
    features = [10 * torch.randn(5, d, generator=torch.Generator().manual_seed(d)) for d in DIMS]  # some are clipped
    carry = folded_carry = None
    for l, z in enumerate(features):
        expected, carry = heads.step(l, z, carry)
        given, folded_carry = folded.step(l, z, folded_carry)
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=2e-5)
    assert folded.remembers == heads.remembers == (ensemble or kind == "recurrent" or boosting > 0)


@pytest.mark.parametrize("lam", [0.3, torch.tensor([0.01, 0.3, 2.0])], ids=["one lambda", "one per image"])
@torch.no_grad()
def test_folded_gates_see_the_same(lam):
    statistics = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    for gates in (LinearGates(3), SharedGates(3, 10, (0.01, 2.0)), SharedGates(3, 10, (0.5, 0.5))):
        folded = FoldedGates(shaken(gates))
        for l, _ in itertools.product(range(3), range(2)):
            torch.testing.assert_close(folded(statistics, lam, l), gates(statistics, lam, l), rtol=1e-5, atol=1e-5)


def test_what_has_no_folded_form_is_left_as_it_is():
    policy = LearnedGates(LinearGates(3), 4)
    heads = ExitHeads(DIMS, 4, cascade=True)
    assert fold(heads, policy)[0] is heads
    heads = ExitHeads(DIMS, 4).bfloat16()
    assert fold(heads, policy.bfloat16()) == (heads, policy)


def model(**options) -> JEIDNNForImageClassification:
    torch.manual_seed(0)
    config = {"backbone": "resnet20_cifar", "num_labels": 10, **options}
    return shaken_exits(JEIDNNForImageClassification(JEIDNNConfig(**config)).eval())


def shaken_exits(model):
    shaken(model.heads.modules_by_exit), shaken(model.policy)
    return model


PICTURES = torch.randn(24, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_a_changed_weight_is_seen():
    net = model(recipe="paper")
    first = net(PICTURES)
    folded = net._prepared
    assert net(PICTURES).exit_index.equal(first.exit_index) and net._prepared is folded
    net.policy.gates.bias.fill_(-50.0)
    assert net(PICTURES).exit_index.eq(8).all()
    net.policy.gates.bias.fill_(50.0)
    assert net(PICTURES).exit_index.eq(0).all()
    before = net(PICTURES).logits
    net.heads.modules_by_exit[0].bias.add_(1.0)
    torch.testing.assert_close(net(PICTURES).logits, before + 1.0)
    net.load_state_dict(model(recipe="paper").state_dict())
    assert net(PICTURES).exit_index.equal(first.exit_index)


def test_where_gradients_are_wanted_they_flow():
    net = model(recipe="paper")
    net(PICTURES).logits.sum().backward()
    assert net._prepared is None and any(head.weight.grad is not None for head in net.heads.modules_by_exit)


# Active exits


def record_of(net, count=64) -> ExitRecord:
    pictures = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        logits = net(pictures, output_all_exits=True).all_logits
    labels = torch.arange(count) % 10
    return ExitRecord(logits, labels, net.costs, SplitInfo("d", "validation", "s", count, "0" * 64))


@pytest.mark.parametrize("recipe", ["paper", "default"])
@torch.no_grad()
def test_nobody_leaves_and_nothing_is_computed_at_exits_that_are_not_active(recipe, monkeypatch):
    net = model(recipe=recipe)
    net.set_active_exits([2, 5, 8])
    early, full = net(PICTURES), net(PICTURES, output_all_exits=True)
    assert set(early.exit_index.tolist()) <= {2, 5, 8} and early.exit_index.equal(full.exit_index)
    torch.testing.assert_close(early.logits, full.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(full.exit_distribution.sum(-1), torch.ones(24))
    assert full.exit_distribution[:, [0, 1, 3, 4, 6, 7]].eq(0).all()

    read, asked = [], []
    monkeypatch.setattr(early_exit, "LARGEST_BATCH", 0)
    net._prepared = None
    monkeypatch.setattr(
        net.backbone, "exit_feature", lambda l, s, f=net.backbone.exit_feature: read.append(l) or f(l, s)
    )
    folded = net.exits(24).policy
    monkeypatch.setattr(folded, "step", lambda l, *rest, f=folded.step: asked.append(l) or f(l, *rest))
    net(PICTURES)
    needed = [2, 5, 8] if recipe == "paper" else list(range(9))  # recurrent exits read the ones before
    assert read == needed[: len(read)] and asked == [2, 5, 8][: len(asked)]


@torch.no_grad()
def test_exits_that_nobody_takes_can_be_switched_off(tmp_path):
    net = model(recipe="default")
    net.policy.gates.bias.copy_(torch.tensor([-60.0, 0, -60, 1, -60, -60, 0, -60]))
    record, lams = record_of(net), [0.01, 0.1, 1.0]
    choice = choose_active_exits(record, net.policy, lams)
    opened = choice.exits
    assert opened[-1] == 8 and set(opened) <= {1, 3, 6, 8} and net.policy.active is None
    assert all(before == after for before, after in (*choice.accuracy, *choice.cost))  # nobody took the others
    before, dearer = net(PICTURES, lam=0.1), net.costs
    net.set_active_exits(opened)
    after = net(PICTURES, lam=0.1)
    assert after.exit_index.equal(before.exit_index)
    torch.testing.assert_close(after.logits, before.logits)
    assert net.costs.gates[-1] == (len(opened) - 1) * net.policy.mul_adds(10) < dearer.gates[-1]
    assert net.costs.total[-1] < dearer.total[-1] and net.costs.pooling == dearer.pooling
    net.save_pretrained(tmp_path)
    again = JEIDNNForImageClassification.from_pretrained(tmp_path).eval()
    assert again.active_exits == tuple(opened) and again(PICTURES, lam=0.1).exit_index.equal(after.exit_index)
    again.set_active_exits(None)
    assert again.active_exits == tuple(range(9)) and again.costs == dearer


def test_linear_exits_that_are_not_active_cost_nothing():
    net = model(recipe="paper")
    every = net.costs
    net.set_active_exits([4, 8])
    assert net.costs.pooling == (0, 0, 0, 0) + (every.pooling[4] - every.pooling[3],) * 5
    assert net.costs.heads[:5] == (0, 0, 0, 0, every.heads[4] - every.heads[3])


@pytest.mark.parametrize("exits", [[], [0, 1], [8, 3], [3, 3, 8], [-1, 8], [2, 9], [1.0, 8], "8", 8])
def test_wrong_active_exits_are_refused_and_change_nothing(exits):
    net = model(recipe="paper")
    with pytest.raises(ValueError, match="Expected active exits as rising numbers from 0 to 8"):
        net.set_active_exits(exits)
    assert net.active_exits == tuple(range(9))


def test_other_policies_ask_every_exit():
    net = model(recipe="paper")
    net.set_policy(ConfidenceThreshold.fit(record_of(net), budget=0.7))
    with pytest.raises(ValueError, match="policy='gates'"):
        net.set_active_exits([8])
    with pytest.raises(ValueError, match="Expected gates, but got ConfidenceThreshold"):
        choose_active_exits(record_of(net), net.policy, [None])


@torch.no_grad()
def test_the_exits_that_most_samples_take_are_kept_and_the_difference_is_reported():
    net = model(recipe="default")
    record, lams = record_of(net), [0.01, 1.0]
    shared = net.policy.gates  # lambda matters little, so that both send images to several exits
    for of_lambda in (shared.slope, shared.curvature, shared.weight[1], shared.fine.layers[0].weight[:, 4]):
        of_lambda.mul_(0.0003)
    gates, shares = net.policy.gate_logits(record.logits, 0.1), torch.linspace(0.9, 0.3, 8)
    net.policy.gates.bias -= gates.quantile(shares, dim=0).diagonal()
    taken = torch.stack([net.policy.decide(record.logits, lam).bincount(minlength=9) for lam in lams]).amax(0)
    taken[8] = 99
    choice = choose_active_exits(record, net.policy, lams, most=3)
    others = [l for l in range(9) if l not in choice.exits]
    assert len(choice.exits) == 3 and taken[choice.exits].min() >= taken[others].max() > 0
    net.policy.active = choice.exits
    for i, lam in enumerate(lams):
        chosen = net.policy.decide(record.logits, lam)
        right = record.logits[torch.arange(64), chosen].argmax(-1) == record.labels
        assert choice.accuracy[i][1] == pytest.approx(float(right.double().mean()))
        assert choice.cost[i][1] == pytest.approx(float(record.normalised_costs[chosen].mean()), rel=1e-6)
        assert choice.cost[i][1] >= choice.cost[i][0]  # whose exit is shut goes on
    assert "active exits, from 0: " + str(choice.exits) in str(choice) and "lambda 0.01: accuracy" in str(choice)
    assert choose_active_exits(record, net.policy, lams, most=1).exits == [8]


@pytest.mark.parametrize("options, message", [({"lams": []}, "lambdas to choose"), ({"most": 0}, "most to be 1")])
def test_wrong_choices_are_refused(options, message):
    net = model(recipe="default")
    with pytest.raises(ValueError, match=message):
        choose_active_exits(record_of(net), net.policy, **{"lams": [0.1], **options})
