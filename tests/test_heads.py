"""Inference modules: each kind by hand, the ensemble by hand, and the walk from exit to exit against the whole scan."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.special import log_softmax
from torch import Tensor

from jeidnn_hf.backbones.staged import select
from jeidnn_hf.gates import LinearGates
from jeidnn_hf.heads import HEADS, Carry, ExitHeads, RecurrentHead, boosting_of

DIMS, CLASSES, HIDDEN, SAMPLES = (5, 7, 6), 4, 8, 9
kinds = pytest.mark.parametrize("kind", HEADS)
ensembles = pytest.mark.parametrize("ensemble", [False, True], ids=["plain", "ensemble"])
standardized = pytest.mark.parametrize("standardize", [False, True], ids=["raw", "standardized"])
natives = pytest.mark.parametrize("native", [False, True], ids=["trained", "native"])


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def heads_of(
    kind: str, ensemble: bool = False, standardize: bool = False, native: bool = True, **options
) -> ExitHeads:
    """Heads in float64 at four exits, nothing at its starting value."""
    dims = (*DIMS, CLASSES if native else 3)
    heads = ExitHeads(dims, CLASSES, kind, HIDDEN, native, ensemble, standardize, **options).double()
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    if ensemble:
        heads.ensemble.temperature.uniform_(0.5, 2)
    if standardize:
        trained = dims[:-1] if native else dims
        heads.set_feature_statistics([torch.randn(d) for d in trained], [torch.rand(d) + 0.1 for d in trained])
    return heads


def features_of(native: bool = True) -> tuple[Tensor, ...]:
    return tuple(torch.randn(SAMPLES, d, dtype=torch.float64) for d in (*DIMS, CLASSES if native else 3))


def arrays_of(module: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in module.state_dict().items()}


def close(actual: Tensor, expected: Tensor | np.ndarray, atol: float = 1e-10) -> None:
    torch.testing.assert_close(actual.detach(), torch.as_tensor(expected).detach(), rtol=0, atol=atol)


def assert_steps_are_the_scan(heads: ExitHeads, features: tuple[Tensor, ...]) -> None:
    """Also where samples leave on the way, and are dropped from the carry."""
    logits, rows, carry = heads(features), torch.arange(SAMPLES), None
    for l, keep in enumerate([[8, 0, 1, 5, 3], [0, 3, 4], [2, 1], [0, 1]]):
        answers, carry = heads.step(l, features[l][rows], carry)
        close(answers, logits[rows, l])
        rows, carry = select((rows, carry), torch.tensor(keep))
    assert rows.tolist() == [3, 5]


@natives
@standardized
@ensembles
@kinds
def test_step_by_step_is_the_scan(kind, ensemble, standardize, native):
    heads, features, carry = heads_of(kind, ensemble, standardize, native), features_of(native), None
    logits = heads(features)
    assert logits.shape == (SAMPLES, 4, CLASSES)
    for l, z in enumerate(features):
        answers, carry = heads.step(l, z, carry)
        close(answers, logits[:, l])
    if not ensemble:
        assert torch.equal(logits, heads.members(features))
    if native and not ensemble:
        assert torch.equal(logits[:, -1], features[-1])


@pytest.mark.parametrize(
    ("kind", "ensemble"),
    [
        ("linear", False),
        pytest.param("linear", True),
        pytest.param("recurrent", False),
        pytest.param("recurrent", True),
    ],
)
def test_samples_that_left_are_dropped_from_the_carry(kind, ensemble):
    assert_steps_are_the_scan(heads_of(kind, ensemble, standardize=True), features_of())


def test_first_steps_carry():
    """What each kind hands on: nothing, the state, and the log-probabilities of the exits so far."""
    z = features_of()[0]
    assert heads_of("linear").step(0, z)[1] == heads_of("mlp").step(0, z)[1] == Carry(None, None)
    carry = heads_of("recurrent", ensemble=True).step(0, z)[1]
    assert carry.hidden.shape == (SAMPLES, HIDDEN) and carry.log_probs.shape == (SAMPLES, 1, CLASSES)
    close(carry.log_probs.exp().sum(-1), np.ones((SAMPLES, 1)))


def test_linear_and_mlp_heads_by_hand():
    linear, mlp, features = heads_of("linear"), heads_of("mlp"), features_of()
    for l in range(3):
        z, w = features[l].numpy(), arrays_of(linear.modules_by_exit[l])
        close(linear(features)[:, l], z @ w["weight"].T + w["bias"])
        w = arrays_of(mlp.modules_by_exit[l])
        hidden = np.maximum(z @ w["hidden.weight"].T + w["hidden.bias"], 0)
        close(mlp(features)[:, l], hidden @ w["out.weight"].T + w["out.bias"])


@natives
def test_recurrent_heads_by_hand(native):
    """h_l = relu(W_l z_l + A_l h_{l-1} + b_l), logits_l = V_l h_l + S_l z_l + c_l."""
    heads, features = heads_of("recurrent", native=native), features_of(native)
    logits, state = heads(features), np.zeros((SAMPLES, HIDDEN))
    for l, module in enumerate(heads.modules_by_exit):
        w, z = arrays_of(module), features[l].numpy()
        before = state @ w["hidden.weight"].T if l else 0
        state = np.maximum(z @ w["input.weight"].T + before + w["input.bias"], 0)
        close(logits[:, l], state @ w["out.weight"].T + z @ w["skip.weight"].T + w["out.bias"])
    assert (state > 0).any() and (state == 0).any()


def test_later_exits_train_the_states_that_they_read():
    linear, recurrent, features = heads_of("linear"), heads_of("recurrent"), features_of()
    for heads in (linear, recurrent):
        heads(features)[:, 2].sum().backward()
    assert recurrent.modules_by_exit[0].input.weight.grad.abs().sum() > 0
    assert linear.modules_by_exit[0].weight.grad.abs().sum() == 0


def test_recurrence_starts_near_seven_tenths_of_the_identity():
    assert RecurrentHead(5, 4, 64, is_first=True).hidden is None
    recurrence = RecurrentHead(5, 4, 64, is_first=False).hidden
    assert recurrence.bias is None
    off = recurrence.weight.detach() - 0.7 * torch.eye(64)
    assert off.abs().max() < 0.06 and 0.009 < off.std() < 0.011


@natives
@kinds
def test_ensemble_starts_as_the_identity(kind, native):
    dims = (*DIMS, CLASSES if native else 3)
    heads, features = ExitHeads(dims, CLASSES, kind, HIDDEN, native, ensemble=True).double(), features_of(native)
    assert heads.ensemble.temperature.tolist() == [1.0] * 4
    heads.ensemble.temperature.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    tempered = heads.members(features) / torch.tensor([0.5, 1.0, 2.0, 4.0])[:, None]
    close(heads(features).softmax(-1), tempered.softmax(-1))
    assert torch.equal(heads(features).argmax(-1), heads.members(features).argmax(-1))


def test_ensemble_by_brute_force():
    """logits_l = sum_{j <= l} w_lj log softmax(o^j / T_j) + b_l; weights above the diagonal are not read."""
    heads, features = heads_of("linear", ensemble=True), features_of()
    members, w = heads.members(features).detach().numpy(), arrays_of(heads.ensemble)
    expected = np.zeros((SAMPLES, 4, CLASSES))
    for i, l in np.ndindex(SAMPLES, 4):
        expected[i, l] = w["bias"][l]
        for j in range(l + 1):
            p = np.exp(members[i, j] / w["temperature"][j])
            expected[i, l] += w["weight"][l, j] * np.log(p / p.sum())
    close(heads(features), expected)


@standardized
@kinds
def test_only_the_members_learn_from_members(kind, standardize):
    heads, features = heads_of(kind, ensemble=True, standardize=standardize), features_of()
    members, ensemble = heads.member_parameters(), list(heads.ensemble.parameters())
    assert {*map(id, members), *map(id, ensemble)} == set(map(id, heads.parameters()))
    heads.members(features).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in members)
    assert all(p.grad is None for p in ensemble)
    heads(features)[:, :, 0].square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in ensemble)
    assert not heads.ensemble.temperature.requires_grad


def test_features_are_standardised_and_clipped():
    heads = ExitHeads((2, CLASSES), CLASSES, standardize=True)
    head = heads.modules_by_exit[0]
    head.weight.data = torch.eye(4, 2)
    head.bias.data.zero_()
    rows = torch.tensor([[1.0, 2.0], [3.0, 6.0], [100.0, 2.0], [-100.0, 2.0]])
    z = (rows, torch.zeros(4, CLASSES))
    assert torch.equal(heads(z)[:, 0, :2], rows.clamp(-8, 8))  # mean 0 and deviation 1 until they are set
    heads.set_feature_statistics([torch.tensor([1.0, 2.0])], [torch.tensor([2.0, 0.0])])
    assert heads(z)[:, 0, :2].tolist() == [[0.0, 0.0], [1.0, 8.0], [8.0, 0.0], [-8.0, 0.0]]
    assert {"norms.0.mean", "norms.0.std"} <= heads.state_dict().keys()
    with pytest.raises(ValueError):
        heads.set_feature_statistics([torch.zeros(2)] * 2, [torch.ones(2)] * 2)


def test_training_features_become_standard():
    heads, features = ExitHeads((*DIMS, CLASSES), CLASSES, standardize=True), features_of()
    trained = [3 * z.float() - 1 for z in features[:-1]]
    heads.set_feature_statistics([z.mean(0) for z in trained], [z.std(0) for z in trained])
    for norm, z in zip(heads.norms, trained, strict=True):
        close(norm(z).mean(0), np.zeros(z.shape[1], np.float32), atol=1e-5)
        close(norm(z).std(0), np.ones(z.shape[1], np.float32), atol=1e-5)


@pytest.mark.parametrize(("dim", "classes", "expected"), [(256, 10, 2570), (384, 100, 38500)])
def test_linear_heads_cost_what_tables_2_and_3_say(dim, classes, expected):
    heads = ExitHeads((dim, classes), classes)
    assert heads.mul_adds(0) == dim * classes + classes == expected
    assert heads.mul_adds(1) == 0
    assert ExitHeads((dim, dim), classes, native_head=False).mul_adds(1) == expected


@pytest.mark.parametrize(("dim", "classes", "exits", "expected"), [(256, 10, 7, 15_450), (384, 100, 14, 500_565)])
def test_parameters_of_table_1(dim, classes, exits, expected):
    heads, gates = ExitHeads((*[dim] * (exits - 1), classes), classes), LinearGates(exits - 1)
    assert sum(p.numel() for module in (heads, gates) for p in module.parameters()) == expected


@natives
@standardized
@ensembles
@kinds
def test_mul_adds_by_counting(kind, ensemble, standardize, native):
    """Every weight of a head is used once, and a bias costs one; the ensemble and the standardisation are elementwise.

    The ensemble at exit l (from 0) divides by one temperature, adds l + 1 weighted rows and a bias, K wide each.
    """
    heads = heads_of(kind, ensemble, standardize, native)
    for l, d in enumerate((*DIMS, CLASSES if native else 3)):
        is_trained = l < 3 or not native
        member = sum(p.numel() for p in heads.modules_by_exit[l].parameters()) if is_trained else 0
        by_kind = {
            "linear": CLASSES * d + CLASSES,
            "mlp": HIDDEN * d + HIDDEN + CLASSES * HIDDEN + CLASSES,
            "recurrent": HIDDEN * d + HIDDEN + (HIDDEN**2 if l else 0) + CLASSES * HIDDEN + CLASSES + CLASSES * d,
        }
        assert member == (by_kind[kind] if is_trained else 0)
        elementwise = (d if standardize and is_trained else 0) + (CLASSES * (1 + (l + 1) + 1) if ensemble else 0)
        assert heads.mul_adds(l) == member + elementwise


@ensembles
def test_one_exit_is_the_native_classifier(ensemble):
    heads, z = ExitHeads((CLASSES,), CLASSES, ensemble=ensemble), torch.randn(3, CLASSES)
    expected = z.log_softmax(-1) if ensemble else z
    close(heads([z]), expected[:, None], atol=1e-6)
    close(heads.step(0, z)[0], expected, atol=1e-6)
    assert heads.member_parameters() == []


def test_unknown_kind():
    with pytest.raises(ValueError, match=r"Expected exit_head to be one of .*'mlp'.*, but got 'conv'"):
        ExitHeads((2, 2), 2, kind="conv")


# ---- what an exit reuses of the answers before


reuse = pytest.mark.parametrize(
    "options",
    [
        {"cascade": True},
        {"cascade": True, "ensemble": True, "standardize": True},
        {"boosting": 0.5},
        {"boosting": 0.5, "cascade": True},
        {"boosting": 0.5, "ensemble": True, "standardize": True},
    ],
    ids=["cascade", "ztw", "boosted", "boosted cascade", "boosted ensemble"],
)


@natives
@reuse
@kinds
def test_step_by_step_is_the_scan_with_earlier_answers(kind, options, native):
    assert_steps_are_the_scan(heads_of(kind, native=native, **options), features_of(native))


@natives
def test_boosted_answers_by_hand(native):
    heads, features = heads_of("linear", native=native, boosting=0.5), features_of(native)
    own, answers = heads.members(features), heads(features)
    close(answers[:, 0], own[:, 0])
    close(answers[:, 1], own[:, 1] + own[:, 0] / 2)
    close(answers[:, 2], own[:, 2] + own[:, 1] / 2 + own[:, 0] / 4)
    close(answers[:, 3], own[:, 3] + own[:, 2] / 2 + own[:, 1] / 4 + own[:, 0] / 8)
    close(own[:, 1], features[1] @ heads.modules_by_exit[1].weight.T + heads.modules_by_exit[1].bias)
    heads.boosting = 0.0
    assert torch.equal(heads(features), own)


def test_the_default_share_is_a_half_a_16th_of_the_network_apart():
    assert [boosting_of(exits) for exits in (27, 16, 8, 4)] == [0.5, 0.5, 0.25, 0.0625]
    assert boosting_of(12) == pytest.approx(0.397, abs=1e-3)


@natives
def test_an_ensemble_combines_boosted_answers(native):
    heads, features = heads_of("linear", ensemble=True, native=native, boosting=0.5), features_of(native)
    own, T, w, b = heads.members(features), *(arrays_of(heads.ensemble)[k] for k in ("temperature", "weight", "bias"))
    boosted = [own[:, 0], own[:, 1] + own[:, 0] / 2, own[:, 2] + own[:, 1] / 2 + own[:, 0] / 4]
    boosted.append(own[:, 3] + boosted[2] / 2)
    log_probs = [log_softmax(f.detach().numpy() / T[j], axis=-1) for j, f in enumerate(boosted)]
    for l in range(4):
        close(heads(features)[:, l], sum(w[l, j] * log_probs[j] for j in range(l + 1)) + b[l])
    close(heads.boosted(own), torch.stack(boosted, dim=1))


@pytest.mark.parametrize("options", [{"cascade": True}, {"boosting": 0.5}], ids=["cascade", "boosted"])
def test_no_gradient_goes_back_to_the_exits_before(options):
    heads, features = heads_of("linear", **options), features_of()
    heads(features)[:, 2].square().sum().backward()
    assert heads.modules_by_exit[2].weight.grad.abs().max() > 0
    for l in (0, 1):
        gradient = heads.modules_by_exit[l].weight.grad
        assert gradient is None or gradient.abs().max() == 0


@natives
def test_cascade_by_hand(native):
    heads, features = heads_of("linear", native=native, cascade=True), features_of(native)
    own = heads.members(features).detach()
    for l, module in enumerate(heads.modules_by_exit):
        w, read = arrays_of(module), features[l].numpy()
        if l:
            link, previous = arrays_of(heads.links[l - 1]), own[:, l - 1].numpy()
            centred = previous - previous.mean(1, keepdims=True)
            normal = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-5)
            read = np.concatenate([read, normal * link["weight"] + link["bias"]], axis=1)
        close(own[:, l], read @ w["weight"].T + w["bias"])
    assert len(heads.links) == len(heads.modules_by_exit) - 1
    if native:
        close(own[:, 3], features[3])


def test_links_are_trained_with_their_heads():
    heads = heads_of("mlp", cascade=True, ensemble=True)
    trained = [*heads.modules_by_exit.parameters(), *heads.links.parameters()]
    assert set(map(id, heads.member_parameters())) == set(map(id, trained)) and len(trained) == 3 * 4 + 2 * 2


@natives
def test_mul_adds_of_earlier_answers(native):
    """A link: K inputs more to a linear layer, and a LayerNorm of 5 K; boosting: K, after the first exit."""
    choices = {}, {"cascade": True}, {"boosting": 0.5}
    plain, cascade, boosted = (heads_of("linear", native=native, **options) for options in choices)
    linked = [0, 1, 1, 0 if native else 1]
    for l in range(4):
        assert cascade.mul_adds(l) - plain.mul_adds(l) == linked[l] * (CLASSES**2 + 5 * CLASSES)
        assert boosted.mul_adds(l) - plain.mul_adds(l) == (CLASSES if l else 0)


def test_what_is_not_read_is_not_carried():
    z = features_of()[0]
    assert heads_of("linear", cascade=True).step(0, z)[1].boosted is None
    carry = heads_of("linear", boosting=0.5).step(0, z)[1]
    assert carry.own is None and carry.boosted.shape == (SAMPLES, CLASSES)
