"""reports.py: curves, logs and cost tables of a run's folder."""

from __future__ import annotations

import json

import pytest

from jeidnn_hf.costs import ExitCosts
from jeidnn_hf.reports import at_budget, load_costs, load_curves, load_logs, save_curve
from toy_reports import curve


def test_curves_come_back_by_method_and_seed(tmp_path):
    save_curve(tmp_path / "reports" / "b.json", "gates", 0, curve(0))
    save_curve(tmp_path / "reports" / "c.json", "gates", 7, curve(1))
    save_curve(tmp_path / "reports" / "a.json", "threshold", 0, curve(2, calibrated=False)[:1])
    curves = load_curves(tmp_path)
    assert list(curves) == ["threshold", "gates"]
    assert curves["gates"] == {0: list(curve(0)), 7: list(curve(1))}
    assert curves["threshold"] == {0: list(curve(2, calibrated=False)[:1])}
    saved = json.loads((tmp_path / "reports" / "c.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert saved["method"] == "gates" and saved["seed"] == 7
    assert saved["reports"] == [report.to_dict() for report in curve(1)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "^Expected JSON at '.*a.json', but it cannot be read"),
        ("[]", "^Expected a curve as it was saved, but .*a.json has TypeError"),
        ({"seed": "one"}, "^Expected a curve as it was saved, but .*a.json has ValueError"),
        ({"method": None}, "has KeyError"),
        ({"reports": []}, "^Expected one curve of 'm', seed 0, but .*a.json has no reports"),
        ({"reports": [{"schema_version": 1}]}, "^Expected a report of schema 2, but .*a.json has 1; evaluate again"),
    ],
)
def test_what_is_no_curve_is_named(tmp_path, change, message):
    path = tmp_path / "reports" / "a.json"
    save_curve(path, "m", 0, curve(0)[:1])
    if isinstance(change, str):
        path.write_text(change)
    else:
        values = {**json.loads(path.read_text()), **change}
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    with pytest.raises(ValueError, match=message):
        load_curves(tmp_path)


def test_no_curve_or_one_of_the_same_seed_twice(tmp_path):
    with pytest.raises(ValueError, match="^Expected reports in .*reports', but found none; run `jeidnn evaluate`"):
        load_curves(tmp_path)
    with pytest.raises(ValueError, match="^Expected reports of 'm', but got none"):
        save_curve(tmp_path / "reports" / "a.json", "m", 0, [])
    assert not (tmp_path / "reports").exists()
    for name in "ab":
        save_curve(tmp_path / "reports" / f"{name}.json", "m", 0, curve(0)[:1])
    with pytest.raises(ValueError, match="seed 0, but .*b.json has a second curve of that method and seed"):
        load_curves(tmp_path)


def test_the_report_nearest_to_a_budget():
    costs = sorted(report.normalised_mul_adds for report in curve(0))
    between = (costs[1] + costs[2]) / 2
    curves = {"m": {3: curve(0), 4: curve(1)}}
    assert at_budget(curves, 0.0)["m"].normalised_mul_adds == costs[0]
    assert at_budget(curves, between - 0.001)["m"].normalised_mul_adds == costs[1]
    assert at_budget(curves, between + 0.001)["m"].normalised_mul_adds == costs[2]
    assert at_budget(curves, 9.0)["m"].normalised_mul_adds == costs[3]


def test_logs_of_a_folder(tmp_path):
    assert load_logs(tmp_path) == {}
    for name, history in (("one", [{"epoch": 1, "eval_accuracy": 0.5}]), ("two", [])):
        folder = tmp_path / name / "checkpoints"
        (folder / "checkpoint-1").mkdir(parents=True)
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        (folder / "checkpoint-1" / "trainer_state.json").write_text("{}")
    assert load_logs(tmp_path) == {"one": [{"epoch": 1, "eval_accuracy": 0.5}], "two": []}
    (folder / "trainer_state.json").write_text("{}")
    with pytest.raises(ValueError, match="^Expected logs of a trainer in .*, but one has no 'log_history'"):
        load_logs(tmp_path)


def test_models_of_one_cost_table_share_it(tmp_path):
    tables = {"a": ExitCosts((1,), (2,), (3,), (4,)), "b": ExitCosts((5,), (6,), (7,), (8,))}
    for name, table in (("m", tables["a"]), ("n", tables["b"]), ("o", tables["a"])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"mul_adds": table.to_dict()}))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text("{}")
    assert load_costs(tmp_path) == {"m, o": tables["a"], "n": tables["b"]}
