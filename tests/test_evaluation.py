"""evaluation.py: every field of a report, recomputed sample by sample."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, fields
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from jeidnn_hf import EvaluationReport, ExitRecord, JEIDNNConfig, JEIDNNForImageClassification, evaluate
from jeidnn_hf.costs import ExitCosts
from jeidnn_hf.gates import ExitPolicy, LearnedGates, LinearGates, SharedGates
from jeidnn_hf.splits import SplitInfo

COSTS = ExitCosts(backbone=(100, 230, 390, 600), pooling=(1, 2, 3, 3), heads=(5, 10, 15, 20), gates=(2, 4, 6, 6))
SPLIT = SplitInfo("toy", "validation", "train", 97, "ab" * 32)


class FirstLogit(ExitPolicy):
    """Leaves exit l where the first class has a logit above ``threshold`` + lambda."""

    def __init__(self, num_exits: int, threshold: float):
        super().__init__(num_exits)
        self.threshold = threshold

    def step(self, l: int, logits: Tensor, carry: Any = None, lam=None):
        return logits[:, 0] > self.threshold + (lam or 0.0), None


def record_of(samples: int = 97, exits: int = 4, classes: int = 5, seed: int = 0) -> ExitRecord:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (samples,), generator=random)
    favoured = torch.nn.functional.one_hot(labels, classes)[:, None] * torch.linspace(0.5, 2.5, exits)[:, None]
    costs = ExitCosts(**{name: values[-exits:] for name, values in asdict(COSTS).items()})
    logits = torch.randn(samples, exits, classes, generator=random) + favoured
    return ExitRecord(logits, labels, costs, SPLIT)


def error_of(confidence: list[float], right: list[bool]) -> float:
    """ECE with 15 bins of ranks."""
    order, count = np.argsort(confidence, kind="stable"), len(right)
    bins = [order[count * b // 15 : count * (b + 1) // 15] for b in range(15)]
    return sum(abs(sum(float(right[i]) - confidence[i] for i in rows)) for rows in bins) / count


def by_hand(record: ExitRecord, chosen: list[int], lam: float | None) -> dict[str, Any]:
    logits, labels = record.logits.double().numpy(), record.labels.tolist()
    count, exits, _ = logits.shape
    probs = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    right = [[bool(logits[i, l].argmax() == labels[i]) for l in range(exits)] for i in range(count)]
    top = [[float(probs[i, l].max()) for l in range(exits)] for i in range(count)]
    table = record.costs
    total = [table.backbone[l] + table.pooling[l] + table.heads[l] + table.gates[l] for l in range(exits)]
    at = [[i for i in range(count) if chosen[i] == l] for l in range(exits)]
    return {
        "lam": lam,
        "accuracy": sum(right[i][chosen[i]] for i in range(count)) / count,
        "ece": error_of([top[i][chosen[i]] for i in range(count)], [right[i][chosen[i]] for i in range(count)]),
        "mul_adds": sum(total[l] for l in chosen) / count,
        "normalised_mul_adds": sum(total[l] for l in chosen) / count / table.backbone[-1],
        "num_samples": count,
        "share_by_exit": [len(rows) / count for rows in at],
        "exit_accuracy": [sum(row[l] for row in right) / count for l in range(exits)],
        "exit_ece": [error_of([row[l] for row in top], [row[l] for row in right]) for l in range(exits)],
        "exited_accuracy": [sum(right[i][l] for i in at[l]) / len(at[l]) if at[l] else None for l in range(exits)],
        "exit_mul_adds": [cost / table.backbone[-1] for cost in total],
        "dataset": "toy",
        "role": "validation",
        "split_sha256": "ab" * 32,
        "schema_version": 1,
    }


def assert_report(report: EvaluationReport, expected: dict[str, Any]) -> None:
    assert [field.name for field in fields(report)] == list(expected)
    for name, value in asdict(report).items():
        if isinstance(expected[name], list):
            for found, wanted in zip(value, expected[name], strict=True):
                assert found is None if wanted is None else found == pytest.approx(wanted, abs=2e-6), name
        elif isinstance(expected[name], float):
            assert value == pytest.approx(expected[name], rel=2e-6), name
        else:
            assert value == expected[name] and type(value) is type(expected[name]), name


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
    assert_report(evaluate(record, policy, 0.7), by_hand(record, chosen, 0.7))


class HastyGates(torch.nn.Module):
    """The dearer the Mul-Adds, the less sure one need be."""

    def forward(self, statistics: Tensor, lam=None, exits=None) -> Tensor:
        return 10 * (statistics[..., 0] - 0.95 + 0.5 * lam)


def test_lambda_reaches_the_policy():
    record, policy = record_of(), LearnedGates(HastyGates(), 4, "stick")
    reports = [evaluate(record, policy, lam) for lam in (0.01, 0.1, 1.0)]
    assert reports[0].mul_adds > reports[1].mul_adds > reports[2].mul_adds
    for report, lam in zip(reports, (0.01, 0.1, 1.0), strict=True):
        assert_report(report, by_hand(record, policy.decide(record.logits, lam).tolist(), lam))


def test_gates_for_a_range_of_lambdas_ask_for_one():
    with pytest.raises(ValueError, match="lam"):
        evaluate(record_of(), LearnedGates(SharedGates(3, 5, (0.01, 1.0)), 4, "stick"))


def test_one_exit_and_two_classes():
    record = record_of(20, exits=1, classes=2)
    report = evaluate(record, FirstLogit(1, 0.0))
    assert report.share_by_exit == [1.0] and report.normalised_mul_adds == pytest.approx((600 + 3 + 20 + 6) / 600)
    assert_report(report, by_hand(record, [0] * 20, None))


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
    assert content == asdict(report) and content["schema_version"] == 1 and content["lam"] == lam
    assert (None in content["exited_accuracy"]) == (threshold == 99.0)
    assert all(math.isfinite(value) for value in content["exit_ece"])


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_schema_is_refused(tmp_path, version):
    path = tmp_path / "report.json"
    evaluate(record_of(), FirstLogit(4, 0.4)).save(path)
    content = json.loads(path.read_text())
    content.pop("schema_version")
    path.write_text(json.dumps(content if version is None else {**content, "schema_version": version}))
    with pytest.raises(ValueError, match=f"^Expected a report of schema 1, but .*/report.json has {version!r}; "):
        EvaluationReport.load(path)
