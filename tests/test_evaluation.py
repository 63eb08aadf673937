"""evaluation.py: every field of a report, recomputed sample by sample; what a report refuses; how long it takes."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jeidnn_hf import EvaluationReport, ExitRecord, JEIDNNConfig, JEIDNNForImageClassification, evaluate
from jeidnn_hf.conformal import METHODS, ConformalScore
from jeidnn_hf.costs import COLUMNS, ExitCosts
from jeidnn_hf.gates import ExitPolicy, LinearGates, SharedGates
from jeidnn_hf.metrics import bootstrap_interval, disjoint_subsets
from jeidnn_hf.operating_point import OperatingPoint
from jeidnn_hf.policies import LearnedGates
from jeidnn_hf.splits import SplitInfo

COSTS = ExitCosts(backbone=(100, 230, 390, 600), pooling=(1, 2, 3, 3), heads=(5, 10, 15, 20), gates=(2, 4, 6, 6))
SPLIT = SplitInfo("toy", "test", "test", 97, "ab" * 32)


class FirstLogit(ExitPolicy):
    """Leaves exit l where the first class has a logit above ``threshold`` + lambda."""

    def __init__(self, num_exits: int, threshold: float):
        super().__init__(num_exits)
        self.threshold = threshold

    def step(self, l: int, logits: Tensor, carry: Any = None, lam=None):
        return logits[:, 0] > self.threshold + (lam or 0.0), None


def record_of(
    samples: int = 97, exits: int = 4, classes: int = 5, seed: int = 0, split: SplitInfo = SPLIT, **options
) -> ExitRecord:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=random)
    favoured = torch.nn.functional.one_hot(labels, classes)[:, None] * torch.linspace(0.5, 2.5, exits)[:, None]
    costs = ExitCosts(*(getattr(COSTS, name)[-exits:] for name in COLUMNS))
    logits = torch.randn(samples, exits, classes, generator=random) + favoured
    return ExitRecord(logits, labels, costs, split, **options)


def mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def bins_of(confidence: list[float], right: list[bool]) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy and size of the 15 bins of ranks that are not empty."""
    order, count = np.argsort(confidence, kind="stable"), len(right)
    bins = [order[count * b // 15 : count * (b + 1) // 15] for b in range(15)]
    return [(mean(confidence[i] for i in b), mean(float(right[i]) for i in b), len(b)) for b in bins if len(b)]


def error_of(confidence: list[float], right: list[bool]) -> float:
    return sum(size * abs(right - sure) for sure, right, size in bins_of(confidence, right)) / len(confidence)


def area_of(scores: list[float], targets: list[bool]) -> float | None:
    samples = list(zip(scores, targets, strict=True))
    pairs = [(a, b) for a, positive in samples if positive for b, other in samples if not other]
    return mean(float(a > b) + (a == b) / 2 for a, b in pairs)


def by_hand(
    record: ExitRecord,
    chosen: list[int],
    lam: float | None,
    point: OperatingPoint | None = None,
    gates: list[list[float]] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    raw, labels, temperatures = record.logits.double().numpy(), record.labels.tolist(), [1.0] * record.num_exits
    count, exits, classes = raw.shape
    if point is not None:
        temperatures = point.temperatures
    logits = raw / np.array(temperatures)[:, None]

    def softmax(z):
        return np.exp(z) / np.exp(z).sum(-1, keepdims=True)

    probs, raw_probs = softmax(logits), softmax(raw)
    samples = range(count)
    right = [[bool(raw[i, l].argmax() == labels[i]) for l in range(exits)] for i in samples]
    table = record.costs
    total = [table.backbone[l] + table.pooling[l] + table.heads[l] + table.gates[l] for l in range(exits)]
    shares = [cost / table.backbone[-1] for cost in total]
    at = [[i for i in samples if chosen[i] == l] for l in range(exits)]
    of_class = [[i for i in samples if labels[i] == k] for k in range(classes)]

    def sure(probs, l, rows=samples):
        return [float(probs[i, l if isinstance(l, int) else l[i]].max()) for i in rows]

    def hits(l, rows=samples):
        return [right[i][l if isinstance(l, int) else l[i]] for i in rows]

    taken = np.stack([probs[i, l] for i, l in enumerate(chosen)])
    measures = {
        "accuracy": lambda rows: mean(map(float, hits(chosen, rows))),
        "normalised_mul_adds": lambda rows: mean(shares[chosen[i]] for i in rows),
        "ece": lambda rows: error_of(sure(probs, chosen, rows), hits(chosen, rows)),
        "nll": lambda rows: mean(-math.log(taken[i, labels[i]]) for i in rows),
        "brier": lambda rows: mean(sum((taken[i, k] - (k == labels[i])) ** 2 for k in range(classes)) for i in rows),
    }
    parts = [part.tolist() for part in disjoint_subsets(count, min(10, count), seed)]
    subsets = {name: [measure(rows) for rows in parts] for name, measure in measures.items()}
    sets = []
    for method, by_alpha in (point.thresholds if point else {}).items():
        scores = point.score(torch.tensor(taken)).numpy()
        for alpha, thresholds in by_alpha.items():
            inside = [[scores[i, k] <= thresholds[chosen[i]] for k in range(classes)] for i in samples]
            covered, size = [float(inside[i][labels[i]]) for i in samples], [float(sum(row)) for row in inside]
            sets.append(
                {
                    "method": method,
                    "alpha": alpha,
                    "score": point.score.name,
                    "coverage": mean(covered),
                    "inefficiency": mean(size),
                    "exit_coverage": [mean(covered[i] for i in rows) for rows in at],
                    "exit_inefficiency": [mean(size[i] for i in rows) for rows in at],
                    "class_coverage": [mean(covered[i] for i in rows) for rows in of_class],
                    "thresholds": ["inf" if math.isinf(t) else t for t in thresholds],
                    "intervals": {
                        name: list(bootstrap_interval([mean(values[i] for i in rows) for rows in parts], seed=seed))
                        for name, values in (("coverage", covered), ("inefficiency", size))
                    },
                }
            )
    auroc = None
    if gates is not None:
        cost = [[-math.log(raw_probs[i, l, labels[i]]) + lam * shares[l] for l in range(exits)] for i in samples]
        targets = [[cost[i][l] <= min(cost[i][l + 1 :]) for i in samples] for l in range(exits - 1)]
        auroc = [area_of([gates[i][l] for i in samples], targets[l]) for l in range(exits - 1)]
    drawn = bins_of(sure(probs, chosen), hits(chosen))
    return {
        "lam": lam,
        **{name: measures[name](samples) for name in ("accuracy", "nll", "brier", "ece")},
        "ece_raw": error_of(sure(raw_probs, chosen), hits(chosen)),
        "mul_adds": mean(total[l] for l in chosen),
        "normalised_mul_adds": measures["normalised_mul_adds"](samples),
        "num_samples": count,
        "share_by_exit": [len(rows) / count for rows in at],
        "exit_accuracy": [mean(map(float, hits(l))) for l in range(exits)],
        "exit_ece": [error_of(sure(probs, l), hits(l)) for l in range(exits)],
        "exit_ece_raw": [error_of(sure(raw_probs, l), hits(l)) for l in range(exits)],
        "exited_accuracy": [mean(float(right[i][l]) for i in at[l]) for l in range(exits)],
        "conditional_accuracy": [None]
        + [mean(float(right[i][l]) for i in samples if right[i][l - 1]) for l in range(1, exits)],
        "exit_mul_adds": shares,
        "class_accuracy": [mean(float(right[i][chosen[i]]) for i in rows) for rows in of_class],
        "temperatures": temperatures,
        "gate_auroc": auroc,
        "reliability": dict(zip(("confidence", "accuracy", "count"), map(list, zip(*drawn, strict=True)), strict=True)),
        "sets": sets,
        "subsets": subsets,
        "intervals": {name: list(bootstrap_interval(values, seed=seed)) for name, values in subsets.items()},
        "dataset": "toy",
        "role": "test",
        "split_sha256": "ab" * 32,
        "validation_sha256": point and "cd" * 32,
        "calibration_sha256": point and point.calibration and "ef" * 32,
        "seed": seed,
        "images_per_second": {},
        "cost_unit": "Mul-Adds",
        "schema_version": 2,
    }


def assert_same(found: Any, expected: Any, where: str = "") -> None:
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for name, value in expected.items():
            assert_same(found[name], value, f"{where}.{name}")
    elif isinstance(expected, list):
        assert isinstance(found, list) and len(found) == len(expected), where
        for i, value in enumerate(expected):
            assert_same(found[i], value, f"{where}[{i}]")
    elif isinstance(expected, float):
        assert isinstance(found, float) and found == pytest.approx(expected, rel=2e-6, abs=1e-6), where
    else:
        assert found == expected and type(found) is type(expected), where


def assert_report(report: EvaluationReport, expected: dict[str, Any]) -> None:
    assert [field.name for field in fields(report)] == list(expected)
    assert_same(asdict(report), expected)


@pytest.mark.parametrize("lam", [None, 0.5])
@pytest.mark.parametrize("threshold", [-1.0, 0.4, 1.2, 99.0])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_field_by_hand(threshold, lam, seed):
    record = record_of(seed=seed)
    least, chosen = threshold + (lam or 0.0), []
    for row in record.logits.tolist():
        chosen.append(next((l for l in range(3) if row[l][0] > least), 3))
    report = evaluate(record, FirstLogit(4, threshold), lam)
    assert_report(report, by_hand(record, chosen, lam))
    assert sum(report.share_by_exit) == pytest.approx(1, abs=1e-12)
    left = [(s, a) for s, a in zip(report.share_by_exit, report.exited_accuracy, strict=True) if s]
    assert sum(s * a for s, a in left) == pytest.approx(report.accuracy, abs=1e-12)
    assert all((a is None) == (s == 0) for s, a in zip(report.share_by_exit, report.exited_accuracy, strict=True))


@pytest.mark.parametrize(("form", "rule"), [("min", "conditional"), ("cumulative", "median"), ("stick", "conditional")])
def test_learned_gates_by_hand(form, rule):
    torch.manual_seed(0)
    record, policy = record_of(), LearnedGates(LinearGates(3), 4, form, rule)
    with torch.no_grad():
        policy.gates.weight.copy_(torch.tensor([8.0, 0.0, 0.0, 1.0]).expand(3, 4))
        sure = 8 * record.logits[:, :-1].softmax(-1).amax(-1)
        policy.gates.bias.copy_(-sure.quantile(torch.tensor(0.8), dim=0))
        gates = policy.gate_values(record.logits).tolist()
    chosen = []
    for row in gates:
        rest, exit_ = 1.0, 3
        for l, g in enumerate(row):
            mass = {"min": min(g, rest), "cumulative": max(0.0, g - (1 - rest)), "stick": g * rest}[form]
            if (mass / rest if rule == "conditional" else 1 - (rest - mass)) > 0.5:
                exit_ = l
                break
            rest -= mass
        chosen.append(exit_)
    assert len(set(chosen)) > 2
    report = evaluate(record, policy, 0.7)
    assert_report(report, by_hand(record, chosen, 0.7, gates=gates))
    assert all(0 < area < 1 for area in report.gate_auroc)
    assert evaluate(record, policy, 0.7, kind="error").gate_auroc != report.gate_auroc


# ---- with an operating point

VALIDATION = SplitInfo("toy", "validation", "train", 400, "cd" * 32)
CALIBRATION = SplitInfo("toy", "calibration", "train", 150, "ef" * 32)


def fitted(policy: ExitPolicy, lam: float | None = None, classes: int = 5, **options) -> OperatingPoint:
    validation = record_of(400, policy.num_exits, classes, 1, VALIDATION, index=torch.arange(400))
    calibration = record_of(150, policy.num_exits, classes, 2, CALIBRATION, index=torch.arange(400, 550))
    validation.logits, calibration.logits = 2 * validation.logits, 2 * calibration.logits
    return OperatingPoint.fit(policy, validation, calibration, lam=lam, **options)


@pytest.mark.parametrize("name", ["lac", "raps"])
@pytest.mark.parametrize(("threshold", "seed"), [(2.0, 0), (3.0, 7), (99.0, 0)])
def test_an_operating_point_by_hand(name, threshold, seed):
    record, policy = record_of(), FirstLogit(4, threshold)
    record.logits = 2 * record.logits
    score = ConformalScore(name, penalty=0.02, seed=3)
    point = fitted(policy, 0.5, alphas=(0.01, 0.1), score=score, min_group=60)
    chosen = policy.decide(record.logits, 0.5).tolist()
    report = evaluate(record, policy, 0.5, point=point, seed=seed)
    assert_report(report, by_hand(record, chosen, 0.5, point, seed=seed))
    assert [(s.method, s.alpha) for s in report.sets] == [(m, a) for m in METHODS for a in (0.01, 0.1)]
    assert report.temperatures[0] > 1.5 and report.exit_ece[0] < report.exit_ece_raw[0]
    assert report.set_at(0.1, "strict") is report.sets[5] and report.set_at(0.1) is report.sets[9]
    assert len({s.coverage for s in report.sets}) > 1
    for method, alpha in (("gated", 0.05), ("mondrian", 0.1)):
        with pytest.raises(ValueError, match="^Expected an evaluated method and alpha among .*, but got "):
            report.set_at(alpha, method)
    assert report == evaluate(record, policy, 0.5, point=point, seed=seed)
    assert report.intervals != evaluate(record, policy, 0.5, point=point, seed=seed + 1).intervals
    for interval, value in ((report.intervals["accuracy"], report.accuracy), (report.intervals["nll"], report.nll)):
        assert interval[0] < value < interval[1]


def test_only_temperatures():
    policy = FirstLogit(4, 2.0)
    validation = record_of(400, seed=1, split=VALIDATION)
    point = OperatingPoint.fit(policy, validation)
    report = evaluate(record_of(), policy, point=point, images_per_second={"early": 12.5})
    expected = by_hand(record_of(), policy.decide(record_of().logits).tolist(), None, point)
    assert_report(report, {**expected, "images_per_second": {"early": 12.5}})
    assert report.sets == [] and report.calibration_sha256 is None
    with pytest.raises(ValueError, match=r"among \[\], but got \('grouped', 0.1\)"):
        report.set_at(0.1)


def test_classes_that_nobody_has():
    """Not in the test set: None. Not in calibration: coverage is measured all the same."""
    record, policy = record_of(classes=5), FirstLogit(4, 0.4)
    record.labels = record.labels % 4
    validation, calibration = record_of(400, seed=1, split=VALIDATION), record_of(150, seed=2, split=CALIBRATION)
    calibration.labels = calibration.labels.clamp_max(2)
    point = OperatingPoint.fit(policy, validation, calibration, alphas=(0.1,))
    report = evaluate(record, policy, point=point)
    assert_report(report, by_hand(record, policy.decide(record.logits).tolist(), None, point))
    assert report.class_accuracy[4] is None and report.set_at(0.1).class_coverage[4] is None
    assert 0 <= report.set_at(0.1).class_coverage[3] <= 1


def test_oracle_alpha_is_the_largest_that_covers_these_samples():
    policy = FirstLogit(4, 2.0)
    record = record_of(300)
    record.logits = 2 * record.logits
    alphas = [0.1 - 0.005 * i for i in range(19)]
    report = evaluate(record, policy, point=fitted(policy, alphas=alphas))
    for target in (0.05, 0.1):
        for method in ("general", "gated"):
            tried = {a: report.set_at(a, method).coverage for a in sorted(alphas) if a <= target}
            expected = max(a for a, coverage in tried.items() if coverage > 1 - target)
            assert report.oracle_alpha(target, method).alpha == expected
    assert report.oracle_alpha(0.001) is None


def test_an_operating_point_of_something_else_is_refused():
    policy, record = FirstLogit(4, 2.0), record_of()
    point = fitted(policy, 0.5)
    with pytest.raises(ValueError, match="^Expected an operating point of lambda 0.7, but got one of 0.5; fit"):
        evaluate(record, policy, 0.7, point=point)
    with pytest.raises(ValueError, match="^Expected an operating point of 3 exits, but got one of 4.$"):
        evaluate(record_of(exits=3), FirstLogit(3, 2.0), 0.5, point=point)
    with pytest.raises(ValueError, match=f"^Expected an operating point of backbone {'a' * 64}, but got one of None.$"):
        evaluate(record_of(backbone="a" * 64), policy, 0.5, point=point)
    for split in (VALIDATION, CALIBRATION):
        with pytest.raises(ValueError, match=f"^Expected other images than .* but got its own: {split.role}.$"):
            evaluate(record_of(split=split), policy, 0.5, point=point)


def test_images_that_something_was_fitted_on_are_refused():
    policy, record = FirstLogit(4, 2.0), record_of(index=torch.arange(97))
    other = SplitInfo("toy", "train", "test", 30, "09" * 32)
    evaluate(record, policy, others=[record_of(30, split=other, index=torch.arange(97, 127))])
    with pytest.raises(ValueError, match="^Expected test and train records without a common image, but got 20 images"):
        evaluate(record, policy, others=[record_of(30, split=other, index=torch.arange(77, 107))])
    with pytest.raises(ValueError, match="of the same backbone"):
        evaluate(record, policy, others=[record_of(30, split=VALIDATION, backbone="a" * 64)])


# ---- policies


class HastyGates(torch.nn.Module):
    """The dearer the Mul-Adds, the less sure one need be."""

    def forward(self, statistics: Tensor, lam=None, exits=None) -> Tensor:
        return 10 * (statistics[..., 0] - 0.95 + 0.5 * lam)


def test_lambda_reaches_the_policy():
    record, policy = record_of(), LearnedGates(HastyGates(), 4, "stick")
    reports = [evaluate(record, policy, lam) for lam in (0.01, 0.1, 1.0)]
    assert reports[0].mul_adds > reports[1].mul_adds > reports[2].mul_adds
    for report, lam in zip(reports, (0.01, 0.1, 1.0), strict=True):
        gates = policy.gate_values(record.logits, lam).tolist()
        assert_report(report, by_hand(record, policy.decide(record.logits, lam).tolist(), lam, gates=gates))


def test_gates_for_a_range_of_lambdas_ask_for_one():
    with pytest.raises(ValueError, match="lam"):
        evaluate(record_of(), LearnedGates(SharedGates(3, 5, (0.01, 1.0)), 4, "stick"))


def test_one_exit_and_two_classes():
    record = record_of(20, exits=1, classes=2)
    report = evaluate(record, FirstLogit(1, 0.0))
    assert report.share_by_exit == [1.0] and report.normalised_mul_adds == pytest.approx((600 + 3 + 20 + 6) / 600)
    assert_report(report, by_hand(record, [0] * 20, None))
    policy = FirstLogit(1, 0.0)
    point = fitted(policy, classes=2, alphas=(0.2,))
    assert_report(evaluate(record, policy, point=point), by_hand(record, [0] * 20, None, point))


def test_one_sample():
    record = record_of(1)
    assert_report(evaluate(record, FirstLogit(4, 99.0)), by_hand(record, [3], None))


def test_a_report_leaves_the_policy_as_it_was():
    policy = LearnedGates(LinearGates(3), 4)
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    evaluate(record_of(), policy)
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
    assert all(p.requires_grad and not p.is_inference() for p in policy.parameters())


def test_the_models_own_policy_takes_the_models_exits():
    torch.manual_seed(0)
    config = JEIDNNConfig(backbone="resnet20_cifar", num_labels=5, exit_stages=[1, 4, 6, 8], recipe="paper")
    model = JEIDNNForImageClassification(config).eval()
    pixels = 2 * torch.randn(30, 3, 32, 32)
    with torch.no_grad():
        model.policy.gates.weight.mul_(20)
        output = model(pixels, output_all_exits=True)
    labels = torch.arange(30) % 5
    report = evaluate(ExitRecord(output.all_logits, labels, model.costs, SPLIT), model.policy, 1.0)
    assert report.accuracy == pytest.approx(float((output.logits.argmax(-1) == labels).double().mean()))
    assert report.mul_adds == pytest.approx(float(output.mul_adds.double().mean()))
    assert report.share_by_exit == (torch.bincount(output.exit_index, minlength=4) / 30).tolist()


@pytest.mark.parametrize("exits", [1, 3, 5])
def test_a_policy_of_other_exits_is_refused(exits):
    with pytest.raises(ValueError, match=f"^Expected a policy of 4 exits, but got one of {exits}\\.$"):
        evaluate(record_of(), FirstLogit(exits, 0.0))


# ---- files


@pytest.mark.parametrize(("threshold", "lam"), [(99.0, None), (0.4, 0.25)])
def test_a_report_comes_back_from_json(tmp_path, threshold, lam):
    report = evaluate(record_of(), FirstLogit(4, threshold), lam)
    report.save(tmp_path / "report.json")
    assert EvaluationReport.load(str(tmp_path / "report.json")) == report
    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert content == asdict(report) and content["schema_version"] == 2 and content["lam"] == lam
    assert (None in content["exited_accuracy"]) == (threshold == 99.0)
    assert all(math.isfinite(value) for value in content["exit_ece"])


@pytest.mark.parametrize("version", [0, 1, 3, "2", None])
def test_another_schema_is_refused(tmp_path, version):
    path = tmp_path / "report.json"
    evaluate(record_of(), FirstLogit(4, 0.4)).save(path)
    content = json.loads(path.read_text())
    content.pop("schema_version")
    path.write_text(json.dumps(content if version is None else {**content, "schema_version": version}))
    with pytest.raises(ValueError, match=f"^Expected a report of schema 2, but .*/report.json has {version!r}; "):
        EvaluationReport.load(path)


def test_sets_come_back_from_json(tmp_path):
    policy = FirstLogit(4, 2.0)
    point = fitted(policy, 0.5)
    report = evaluate(record_of(), policy, 0.5, point=point)
    assert any("inf" in sets.thresholds for sets in report.sets)
    report.save(tmp_path / "report.json")
    assert EvaluationReport.load(tmp_path / "report.json") == report


def test_a_file_that_is_no_report_is_refused(tmp_path):
    path = tmp_path / "report.json"
    with pytest.raises(ValueError, match="^Expected a report at '.*report.json', but it cannot be read: "):
        EvaluationReport.load(path)
    report = evaluate(record_of(), FirstLogit(4, 0.4))
    for text in ("", "[1", json.dumps(report.to_dict())[:-9]):
        path.write_text(text)
        with pytest.raises(ValueError, match="cannot be read"):
            EvaluationReport.load(path)
    path.write_text("[]")
    with pytest.raises(ValueError, match="^Expected a report of schema 2, but .*report.json has None; "):
        EvaluationReport.load(path)
    for change in ({"surprise": 1}, {"sets": [{"method": "strict"}]}, {"sets": 3}):
        path.write_text(json.dumps(report.to_dict() | change))
        with pytest.raises(ValueError, match="^Expected a report as it was saved, but .*report.json is not: "):
            EvaluationReport.load(path)
    for missing in ("accuracy", "sets"):
        path.write_text(json.dumps({name: v for name, v in report.to_dict().items() if name != missing}))
        with pytest.raises(ValueError, match=f"^Expected a report as it was saved, but .*{missing}"):
            EvaluationReport.load(path)


# ---- time


def test_ten_thousand_samples_at_27_exits_in_five_seconds():
    """Temperatures, thresholds of all methods at three alphas, all metrics and intervals; seconds of one core."""
    exits = range(1, 28)
    costs = ExitCosts(*(tuple(n * l for l in exits) for n in (100, 1, 2, 3)))
    records = []
    for seed, role in enumerate(("validation", "calibration", "test")):
        small = record_of(10_000, 1, 10, seed)
        random = torch.Generator().manual_seed(seed)
        logits = small.logits + torch.randn(10_000, 27, 10, generator=random)
        split = SplitInfo("toy", role, role, 10_000, role[0] * 64)
        records.append(ExitRecord(logits, small.labels, costs, split))
    policy = LearnedGates(LinearGates(26), 27)
    start = time.process_time()
    point = OperatingPoint.fit(policy, *records[:2], lam=0.1)
    report = evaluate(records[2], policy, 0.1, point=point)
    spent = time.process_time() - start
    assert len(report.sets) == 15 and len(report.gate_auroc) == 26
    assert spent < 5
