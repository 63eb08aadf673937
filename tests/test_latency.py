"""Costs in milliseconds: measured along one pass, in use wherever Mul-Adds are, saved with the model."""

import copy
import json

import pytest
import torch

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, early_exit
from jeidnn_hf.cli import main
from jeidnn_hf.costs import ExitCosts
from jeidnn_hf.evaluation import evaluate
from jeidnn_hf.objectives import task_cost
from jeidnn_hf.plots import plot_frontier
from jeidnn_hf.policies import ConfidenceThreshold, LearnedGates
from jeidnn_hf.record import ExitRecord
from jeidnn_hf.splits import SplitInfo

PICTURES = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return JEIDNNForImageClassification(JEIDNNConfig(backbone="resnet20_cifar", num_labels=10)).eval()


@pytest.fixture
def model(plain):
    return copy.deepcopy(plain)


def table_of(backbone, **options) -> ExitCosts:
    rest = {"pooling": (0.0,) * 9, "heads": (0.0,) * 9, "gates": (0.0,) * 9}
    return ExitCosts(tuple(backbone), **{**rest, **options}, unit="ms", measured={"device": "here"})


def record_of(model) -> ExitRecord:
    with torch.no_grad():
        logits = model(PICTURES, output_all_exits=True).all_logits
    return ExitRecord(logits, torch.arange(40) % 10, model.costs, SplitInfo("d", "validation", "s", 40, "0" * 64))


def test_every_piece_is_timed_where_it_is_computed(model, monkeypatch):
    fused = model.exit_costs("latency", batch_size=2, repetitions=3)
    monkeypatch.setattr(early_exit, "LARGEST_BATCH", 0)
    table = model.exit_costs("latency", batch_size=2, repetitions=3)
    for name in ("backbone", "pooling", "heads", "gates"):
        column = getattr(table, name)
        assert len(column) == 9 and list(column) == sorted(column) and column[0] > 0, name
    assert table.pooling[-1] == table.pooling[-2]  # the last exit answers with the network's own classifier
    steps = torch.tensor(table.gates).diff()
    assert steps[-1] < steps[:-1].min()  # and has no gate
    assert table.unit == "ms" and table.measured["batch_size"] == 2 and table.measured["repetitions"] == 3
    assert table.measured["threads"] == torch.get_num_threads() and table.measured["device"].startswith("cpu")
    assert ExitCosts.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    assert model.costs.unit == "Mul-Adds"  # measuring changes nothing
    assert set(fused.pooling) == set(fused.gates) == {0.0}  # a fused exit is one piece
    assert list(fused.heads) == sorted(fused.heads) and 0 < fused.heads[0] and 0 < fused.backbone[0]


def test_an_exit_that_is_not_active_takes_no_time(monkeypatch):
    torch.manual_seed(0)
    model = JEIDNNForImageClassification(JEIDNNConfig(backbone="resnet20_cifar", num_labels=10, recipe="paper")).eval()
    model.set_active_exits([4, 8])
    monkeypatch.setattr(early_exit, "LARGEST_BATCH", 0)
    table = model.exit_costs("latency", repetitions=5)
    pooling = torch.tensor((0.0, *table.pooling)).diff()
    assert pooling[4] > 5 * pooling[[0, 1, 2, 3, 5, 6, 7]].max()


def test_training_policies_and_reports_go_by_the_table_in_use(model, tmp_path):
    by_mul_adds = record_of(model)
    model.set_costs(table_of(range(1, 10)))
    assert model.costs.unit == "ms" and model.normalised_costs.tolist() == pytest.approx([l / 9 for l in range(1, 10)])
    with torch.no_grad():
        labelled = model(PICTURES, labels=torch.arange(40) % 10, lam=1.0)
        cost = task_cost(labelled.all_logits, torch.arange(40) % 10)
        expected = ((cost + torch.arange(1, 10) / 9) * labelled.exit_distribution).sum(1).mean()
    torch.testing.assert_close(labelled.loss, expected)
    assert labelled.mul_adds.equal(model.exit_mul_adds[labelled.exit_index])  # an output's Mul-Adds stay what they are

    record = record_of(model)
    policy = ConfidenceThreshold.fit(record, budget=0.5)
    chosen = policy.decide(record.logits)
    report = evaluate(record, policy)
    assert report.cost_unit == "ms" and report.mul_adds == pytest.approx(float((chosen + 1).double().mean()))
    assert report.normalised_mul_adds == pytest.approx(report.mul_adds / 9) and report.normalised_mul_adds <= 0.5
    figure = plot_frontier({"threshold": [report]})
    assert figure.axes[0].get_xlabel().startswith("mean ms per image")
    other = evaluate(by_mul_adds, policy)
    with pytest.raises(ValueError, match="in one unit, but got .'Mul-Adds', 'ms'."):
        plot_frontier({"ms": [report], "Mul-Adds": [other]})

    model.save_pretrained(tmp_path)
    again = JEIDNNForImageClassification.from_pretrained(tmp_path)
    assert again.costs == model.costs and again.config.latency["measured"] == {"device": "here"}
    again.set_costs(None)
    assert again.costs == by_mul_adds.costs and again.config.latency is None


def test_gates_fitted_to_time_know_what_is_slow(model):
    """Where only the first exit is cheap in time, gates that weigh time leave there, others do not."""
    record = record_of(model)
    slow = table_of([0.1, *(1 + 0.001 * l for l in range(8))])
    for costs, expected in ((slow, True), (table_of(1 + 0.001 * l for l in range(9)), False)):
        timed = ExitRecord(record.logits, record.logits[:, -1].argmax(-1), costs, record.split)
        policy = LearnedGates.fit(timed, lam=1.2, steps=100)
        leaves_first = policy.decide(record.logits).eq(0).float().mean() > 0.9
        assert bool(leaves_first) is expected


def test_a_measured_table_does_not_outlive_its_exits(model):
    for change in (lambda: model.set_active_exits([4, 8]), lambda: model.set_policy(copy.deepcopy(model.policy))):
        model.set_costs(table_of(range(1, 10)))
        if isinstance(model.policy, LearnedGates):
            model.policy.lam = 1.0
        change()
        assert model.config.latency is None and model.costs.unit == "Mul-Adds"


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"repetitions": 0}, {"batch_size": 1.5}, {"batch_size": True}])
def test_wrong_measurements_are_refused(model, options):
    with pytest.raises(ValueError, match=f"Expected {next(iter(options))} of at least 1"):
        model.exit_costs("latency", **options)
    with pytest.raises(ValueError, match="Expected kind to be 'mul_adds' or 'latency', but got 'time'"):
        model.exit_costs("time")


def test_wrong_tables_are_refused(model):
    with pytest.raises(ValueError, match="Expected costs of 9 exits, but got 2"):
        model.set_costs(ExitCosts((1.0, 2.0), (0, 0), (0, 0), (0, 0), unit="ms"))
    good = table_of(range(1, 10)).to_dict()
    for wrong in ({"unit": "s"}, {"heads": [1.0]}, {"backbone": [*range(1, 9), 1]}, {"gates": [float("nan")] * 9}):
        with pytest.raises(ValueError, match="Expected latency with rising milliseconds of 9 exits"):
            JEIDNNConfig(**{**model.config.to_diff_dict(), "latency": {**good, **wrong}})


def test_the_command_measures_and_saves(plain, tmp_path, capsys):
    plain.save_pretrained(tmp_path)
    main(["costs", str(tmp_path), "--kind", "latency", "--batch-size", "2", "--save", "--json"])
    printed = json.loads(capsys.readouterr().out)
    saved = JEIDNNForImageClassification.from_pretrained(tmp_path)
    assert printed["unit"] == saved.costs.unit == "ms" and printed["total"] == list(saved.costs.total)
    assert printed["measured"]["batch_size"] == 2 and main(["costs", str(tmp_path), "--kind", "latency"]) in (None, 0)
    text = capsys.readouterr().out
    assert "cumulative ms per exit" in text and "threads" in text
    for wrong in (["costs"], ["costs", str(tmp_path), "--save"], ["costs", "--backbone", "resnet20_cifar"]):
        with pytest.raises(SystemExit):
            main(wrong)
        assert "expected a saved model" in capsys.readouterr().err
