"""model_card.py: what a card says against the reports it came from, its code run as printed, and what is no card."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from jeidnn_hf import ExitRecord, JEIDNNConfig, JEIDNNForImageClassification, JEIDNNTrainer, evaluate, runs
from jeidnn_hf.cli import main
from jeidnn_hf.curve import AccuracyCostCurve
from jeidnn_hf.hub import Place, index_card, push_folder
from jeidnn_hf.model_card import build_card, load_card, training_settings, write_card
from jeidnn_hf.operating_point import OperatingPoint
from jeidnn_hf.reports import save_curve
from jeidnn_hf.splits import SplitInfo, make_splits
from jeidnn_hf.training_args import JEIDNNTrainingArguments

sys.path.insert(0, str(Path(__file__).parent))
from hub_client import shake  # noqa: E402

CLASSES, EXITS, SAMPLES, SEED = 5, 4, 200, 2
NETWORK = {"backbone": "resnet20_cifar", "num_labels": CLASSES, "image_size": 8, "exit_stages": [1, 3, 5, 8]}
LAMBDAS = (0.01, 0.1, 1.0)


def record(model, role: str, seed: int, dataset: str = "cifar10") -> ExitRecord:
    random = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (SAMPLES,), generator=random)
    favoured = torch.nn.functional.one_hot(labels, CLASSES)[:, None] * torch.linspace(1.0, 3.0, EXITS)[:, None]
    logits = 2 * torch.randn(SAMPLES, EXITS, CLASSES, generator=random) + 2 * favoured
    split = SplitInfo(dataset, role, "test", SAMPLES, role.ljust(64, "0"))
    rows = torch.arange(SAMPLES) + seed * SAMPLES
    return ExitRecord(logits, labels, model.costs, split, model.config.backbone_fingerprint, rows)


def evaluated(model, lams, dataset="cifar10", alphas=(0.01, 0.05, 0.1)):
    """A report and an operating point for each lambda."""
    roles = ("validation", "calibration", "test")
    validation, calibration, test = (record(model, role, seed, dataset) for seed, role in enumerate(roles))
    fit = partial(OperatingPoint.fit, model.policy, validation, calibration, alphas=alphas, min_group=20)
    points = [fit(lam=lam) for lam in lams]
    return [evaluate(test, model.policy, lam, point=p) for lam, p in zip(lams, points, strict=True)], points


def build(folder, **config) -> JEIDNNForImageClassification:
    """A model whose gates, at random, send pictures to several exits; saved in a folder."""
    torch.manual_seed(0)
    model = JEIDNNForImageClassification(JEIDNNConfig(**NETWORK, head_dim=8, save_backbone=True, **config))
    shake(model, SEED).save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def ranged(tmp_path_factory):
    """A checkpoint for a range of lambdas, its reports, its operating point, and its card, written."""
    folder = tmp_path_factory.mktemp("models") / "ranged"
    model = build(folder, recipe="default", lam=[LAMBDAS[0], LAMBDAS[-1]])
    reports, points = evaluated(model, LAMBDAS)
    assert len({tuple(report.share_by_exit) for report in reports}) == 3 and max(reports[1].share_by_exit) < 1
    points[1].save(folder)
    settings = training_settings({"recipe": "default", "learning_rate": 0.123})
    files = write_card(folder, reports, points[1], training=settings, license="apache-2.0", tags="digits")
    return SimpleNamespace(folder=folder, model=model, reports=reports, point=points[1], files=files)


def table_after(text: str, heading: str) -> list[list[str]]:
    """The rows of the first table after a heading, without its header."""
    lines = text[text.index(heading) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| ---"))
    rows = []
    for line in lines[start + 1 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def section(text: str, heading: str) -> str:
    return text[text.index(heading) :].split("\n## ")[0]


# What it says


def test_the_head_comes_back_from_the_file(ranged):
    data = ModelCard.load(ranged.files[0]).data
    assert (data.library_name, data.pipeline_tag) == ("jeidnn-hf", "image-classification")
    assert data.license == "apache-2.0" and data.datasets == ["uoft-cs/cifar10"] and "base_model" not in data.to_dict()
    assert data.tags == ["early-exit", "conformal-prediction", "jei-dnn", "timm", "digits"]
    assert data.metrics == ["accuracy", "normalised_mul_adds", "ece", "coverage", "inefficiency"]
    own = ranged.reports[1]  # at the middle of the range in logarithm
    found = {(r.metric_type, r.metric_args.get("alpha")): r for r in data.eval_results}
    expected = {("accuracy", None): own.accuracy, ("normalised_mul_adds", None): own.normalised_mul_adds}
    expected[("ece", None)] = own.ece
    for alpha in (0.01, 0.05, 0.1):
        sets = own.set_at(alpha, "grouped")
        expected |= {("coverage", alpha): sets.coverage, ("inefficiency", alpha): sets.inefficiency}
    assert {key: result.metric_value for key, result in found.items()} == expected
    assert len(data.eval_results) == 9 and all(type(r.metric_value) is float for r in data.eval_results)
    first = data.eval_results[0]
    assert (first.dataset_type, first.dataset_name, first.dataset_split) == ("uoft-cs/cifar10", "cifar10", "test")
    assert first.dataset_args == {"num_samples": SAMPLES, "sha256": own.split_sha256}
    assert {r.metric_args["lam"] for r in data.eval_results} == {0.1}


def test_the_head_is_plain_yaml(ranged):
    head = ranged.files[0].read_text().split("---")[1]
    assert "!!" not in head and ".nan" not in head and "null" not in head
    assert yaml.safe_load(head)["model-index"][0]["name"] == "ranged"


def test_the_exits_are_those_of_the_report(ranged):
    own, rows = ranged.reports[1], table_after(ranged.files[0].read_text(), "### Exits")
    assert [row[0] for row in rows] == ["1", "2", "3", "4"]
    assert [float(row[2]) for row in rows] == pytest.approx(list(ranged.model.costs.normalised), abs=5e-5)
    percent = [own.share_by_exit, own.exited_accuracy, own.exit_accuracy, own.exit_ece_raw, own.exit_ece]
    for column, values in enumerate(percent, start=3):
        shown = [None if row[column] == "-" else float(row[column]) for row in rows]
        assert shown == [None if v is None else pytest.approx(100 * v, abs=5.1e-3) for v in values]
    assert [float(row[8]) for row in rows] == pytest.approx(ranged.point.temperatures, abs=5.1e-4)


def test_the_thresholds_are_those_of_the_operating_point(ranged):
    rows = table_after(ranged.files[0].read_text(), "## Prediction sets")
    assert [int(row[2]) for row in rows] == ranged.point.calibration_by_exit
    for column, alpha in enumerate((0.01, 0.05, 0.1), start=3):
        shown = [math.inf if row[column] == "∞" else float(row[column]) for row in rows]
        assert shown == pytest.approx(ranged.point.thresholds["grouped"][alpha], abs=5.1e-5)


def test_too_few_calibration_images_are_infinity_and_explained(ranged):
    endless = replace(ranged.point, thresholds={"grouped": {0.05: [0.5, math.inf, math.inf, 0.25]}})
    texts = [str(build_card(ranged.model.config, "x", ranged.reports, p)) for p in (ranged.point, endless)]
    assert [row[3] for row in table_after(texts[1], "## Prediction sets")] == ["0.5000", "∞", "∞", "0.2500"]
    assert ["every class is in the set" in text for text in texts] == [
        any(math.inf in ts for ts in ranged.point.thresholds["grouped"].values()), True,
    ]  # fmt: skip


def test_every_lambda_with_its_accuracy_and_cost(ranged):
    rows = table_after(ranged.files[0].read_text(), "### Operating points")
    shown = [[float(row[0]), float(row[1]), float(row[2])] for row in rows]
    expected = [[r.lam, 100 * r.accuracy, r.normalised_mul_adds] for r in ranged.reports]
    assert shown == [pytest.approx(row, abs=5.1e-3) for row in expected]
    shuffled = build_card(ranged.model.config, "x", ranged.reports[::-1], ranged.point)
    assert table_after(str(shuffled), "### Operating points") == rows


def test_figure_settings_limits_and_citation(ranged):
    text = ranged.files[0].read_text()
    assert [path.name for path in ranged.files] == ["README.md", "frontier.png", "curve.json"]
    assert "![accuracy against Mul-Adds](frontier.png)" in text
    assert ranged.files[1].read_bytes().startswith(b"\x89PNG")
    settings = dict(table_after(text, "## Training"))
    assert settings["learning_rate"] == "0.123" and settings["optimizer"] == "adamw"  # given; the recipe's
    limits = section(text, "## Limits")
    assert "not guaranteed" in limits and "λ than 0.1," in limits
    assert all(word in limits for word in ("shift", "class by class", "`gated`", "timed"))
    assert "arXiv" in text or "arxiv.org/abs/2310.09163" in text


def test_at_another_lambda_than_its_own_it_says_so(ranged):
    texts = [str(build_card(ranged.model.config, "x", reports)) for reports in (ranged.reports, ranged.reports[2:])]
    assert ["(the nearest that was evaluated)" in text for text in texts] == [False, True]
    accuracy = f"{100 * ranged.reports[2].accuracy:.2f} %"
    assert f"At λ = 1 (the nearest that was evaluated) it is right on {accuracy}" in texts[1]


# Its code


def code_of(text: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    return code


def test_the_code_runs_as_printed(ranged, capsys):
    names = {}
    exec(compile(code_of(ranged.files[0].read_text()), "card", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all(re.fullmatch(r"LABEL_\d, exit [1-4], \d\.\d{3} of .*", line) for line in lines[:4])
    with torch.inference_mode():
        output = ranged.model(names["pixel_values"], lam=ranged.point.lam)
    assert torch.equal(names["prediction"].exit_index, output.exit_index)
    scaled = output.logits / torch.tensor(ranged.point.temperatures)[output.exit_index, None]
    limits = torch.tensor(ranged.point.thresholds["grouped"][0.05])[output.exit_index, None]
    assert torch.equal(names["prediction"].sets, 1 - scaled.softmax(-1) <= limits)
    assert lines[4:] == [str([f"LABEL_{k}" for k in range(CLASSES) if row[k]]) for row in names["prediction"].sets]


def test_the_code_of_a_repository_loads_by_its_id(ranged, monkeypatch):
    card = build_card(ranged.model.config, "m", ranged.reports, ranged.point, folder="/x", repo_id="org/m")
    code = code_of(str(card))
    assert 'from_pretrained("org/m")' in code and '"/x"' not in code
    asked = []
    load = JEIDNNForImageClassification.from_pretrained
    monkeypatch.setattr(
        JEIDNNForImageClassification, "from_pretrained", lambda name: asked.append(name) or load(ranged.folder)
    )
    exec(compile(code, "card", "exec"), {})
    assert asked == ["org/m"]


def test_the_code_asks_for_sets_where_they_are_calibrated(tmp_path):
    """The checkpoint's own lambda is another, or the operating point names none."""
    model = build(tmp_path / "range", recipe="default", lam=[LAMBDAS[0], LAMBDAS[-1]])
    evaluated(model, LAMBDAS[:1])[1][0].save(tmp_path / "range")
    one = build(tmp_path / "one", recipe="paper", lam=0.5)
    replace(evaluated(one, [0.5])[1][0], lam=None).save(tmp_path / "one")
    for folder, lam in ((tmp_path / "range", "0.01"), (tmp_path / "one", "0.5")):
        (path,) = write_card(folder, point=OperatingPoint.load(folder))
        assert f"Conformal, at λ = {lam}:" in path.read_text()
        names = {}
        exec(compile(code_of(path.read_text()), "card", "exec"), names)
        assert names["model"].config.current_lam == float(lam) and names["prediction"].sets.shape == (4, CLASSES)


def test_a_model_of_one_lambda_without_results_has_a_card_too(tmp_path, capsys):
    build(tmp_path, recipe="paper", lam=0.5)
    (path,) = write_card(tmp_path, name="plain")
    text, data = path.read_text(), load_card(tmp_path).data
    assert data.eval_results is None and data.datasets is None and data.license is None
    assert "No evaluation of it is at hand." in text and "λ = 0.5" in text and "no conformal thresholds" in text
    assert not re.search(r"None|nan|Undefined|\n\n\n\n", text.replace("None: there are no", ""))
    assert "## Results" not in text and "## Training" not in text and "frontier" not in text
    exec(compile(code_of(text), "card", "exec"), {})
    assert capsys.readouterr().out.count(", exit ") == 4
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".png"] == []


def test_weights_of_timm_are_the_base_model(tmp_path):
    model = JEIDNNForImageClassification(JEIDNNConfig(backbone="test_vit", num_labels=5, native_head=False))
    model.config.backbone_weights = "timm"
    data = build_card(model.config, "x").data
    assert (data.base_model, data.license) == ("timm/test_vit.r160_in1k", "apache-2.0")
    assert build_card(model.config, "x", license="mit").data.license == "mit"


def test_a_data_set_of_nobody_is_not_linked(ranged):
    reports, points = evaluated(ranged.model, LAMBDAS[:1], dataset="digits")
    data = build_card(ranged.model.config, "x", reports).data
    assert data.datasets is None and data.eval_results[0].dataset_type == "digits"
    assert build_card(ranged.model.config, "x", reports, dataset="someone/digits").data.datasets == ["someone/digits"]


# What is refused


def test_results_of_another_model_are_refused(ranged, tmp_path):
    other = replace(ranged.reports[0], exit_mul_adds=[0.1, 0.2, 0.3, 0.4])
    outside, policy = replace(ranged.reports[0], lam=7.0), replace(ranged.reports[0], lam=None)
    short = OperatingPoint(0.1, [1.0], [0], ranged.point.validation)
    stranger = replace(ranged.point, backbone="another")
    for reports, point, message in (
        ([other], None, "^Expected a report of this model, whose exits cost"),
        ([outside], None, r"^Expected a lambda in \[0.01, 1\], but got 7"),
        ([policy], None, "^Expected results of the checkpoint's own gates"),
        ((), short, "^Expected an operating point of this model's 4 exits, but got one of 1"),
        ((), stranger, "^Expected an operating point of backbone .* but got one of another"),
        ((), replace(ranged.point, lam=None), "^Expected results of the checkpoint's own gates"),
        ([replace(ranged.reports[0], ece=math.nan)], None, "^Expected a finite ece in the report"),
    ):
        with pytest.raises(ValueError, match=message):
            write_card(ranged.folder, reports, point, output_dir=tmp_path / "no")
    assert list(tmp_path.iterdir()) == []


def test_both_files_or_neither(ranged, tmp_path, monkeypatch):
    (tmp_path / "README.md").write_text("before")

    def fails(*_, **__):
        raise ValueError("Expected a figure")

    monkeypatch.setattr("jeidnn_hf.model_card.plot_frontier", fails)
    with pytest.raises(ValueError, match="Expected a figure"):
        write_card(ranged.folder, ranged.reports, output_dir=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
    assert (tmp_path / "README.md").read_text() == "before"


@pytest.mark.parametrize(
    "head",
    [
        "tags: [early-exit\nlicense: mit",
        "license: mit\n  tags: - x",
        "- a\n- list",
        "tags: 5",
        "model-index: 5",
        "model-index:\n- name: x\n  results:\n  - task: 3",
        "license: \x00",
    ],
)
def test_a_card_with_a_broken_head_is_an_error_of_one_line(ranged, tmp_path, head):
    (tmp_path / "README.md").write_text(f"---\n{head}\n---\n\n# edited\n")
    for where in (tmp_path, tmp_path / "README.md"):
        with pytest.raises(ValueError, match="^Expected a model card with a head of .* at .*README.md") as raised:
            load_card(where)
        assert "\n" not in str(raised.value) and "jeidnn card" in str(raised.value)


def test_the_curve_beside_the_card_is_that_of_the_reports(ranged):
    curve = AccuracyCostCurve.load(ranged.folder)
    assert tuple(curve.lam) == LAMBDAS and curve.accuracy == [report.accuracy for report in ranged.reports]
    assert curve.normalised_mul_adds == [report.normalised_mul_adds for report in ranged.reports]
    assert (curve.dataset, curve.num_samples, curve.backbone_accuracy) == ("cifar10", SAMPLES, None)


def test_a_curve_that_is_broken_or_of_another_model_is_not_pushed(ranged, tmp_path):
    ranged.model.save_pretrained(tmp_path)
    replace(AccuracyCostCurve.load(ranged.folder), exit_mul_adds=[0.5]).save(tmp_path)
    with pytest.raises(ValueError, match="^Expected a curve of this model"):
        push_folder(tmp_path, "org/x")  # nothing answers there: it would be another error
    (tmp_path / "curve.json").write_text("{")
    with pytest.raises(ValueError, match="^Expected an accuracy-cost curve"):
        push_folder(tmp_path, "org/x")


def test_a_broken_card_is_not_pushed(ranged, tmp_path):
    ranged.model.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("---\ntags: [x\n---\n")
    with pytest.raises(ValueError, match="^Expected a model card with a head of valid YAML"):
        push_folder(tmp_path, "org/x")  # nothing answers there: it would be another error


# Who writes it


def test_the_trainer_pushes_this_card(ranged, tmp_path):
    """`Trainer.push_to_hub` calls `create_model_card(model_name=..., **what it was given)`."""
    trainer = object.__new__(JEIDNNTrainer)
    trainer.args = JEIDNNTrainingArguments(str(tmp_path), recipe="paper", learning_rate=0.5, use_cpu=True)
    trainer.model, trainer.hub_model_id = ranged.model, "org/mine"
    trainer.is_world_process_zero = lambda: True
    trainer.create_model_card(model_name="mine", tags=["x"])
    card = load_card(tmp_path)
    assert card.data.tags[-1] == "x" and card.text.lstrip().startswith("# mine\n")
    assert 'from_pretrained("org/mine")' in card.text
    settings = dict(table_after(card.text, "## Training"))
    assert settings["learning_rate"] == "0.5" and settings["recipe"] == "paper" and settings["bi_switch"] == "200"
    trainer.create_model_card(model_name="mine", reports=ranged.reports, point=ranged.point)
    own = ranged.reports[1]
    assert load_card(tmp_path).data.eval_results[0].metric_value == own.accuracy
    ranged.model.config.save_pretrained(tmp_path)
    (row,) = [line for line in str(index_card("all", [Place(tmp_path, "org/mine")])).splitlines() if "| [" in line]
    assert row.split(" | ")[5:7] == [f"{100 * own.accuracy:.2f}", f"{own.normalised_mul_adds:.3f}"]
    (tmp_path / "README.md").unlink()
    trainer.is_world_process_zero = lambda: False
    trainer.create_model_card()
    assert not (tmp_path / "README.md").exists()


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """Two models of one lambda each and seed 1, evaluated, and a curve of another seed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    names, reports = {"paper-lam0.1-seed1": 0.1, "paper-lam1-seed1": 1.0}, []
    for name, lam in names.items():
        model = build(folder / name, recipe="paper", lam=lam, preprocessing={"mean": [0.25, 0.5, 0.75]})
        found, points = evaluated(model, [lam])
        reports += found
        points[0].save(folder / name)
    labels = {"train": [i % 5 for i in range(100)], "test": [i % 5 for i in range(50)]}
    splits = make_splits("cifar10", labels, validation=20, calibration=10, train=40)
    splits.save(folder / "splits.json")
    config = {
        "output_dir": str(folder), "data": {"dataset": "cifar10", "views": 2},
        "model": {"backbone": "resnet20_cifar"},
        "training": {"recipe": "paper", "seed": 1, "logging_steps": 7},
        "runs": {name: {"training": {"num_train_epochs": 3}} for name in names},
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    save_curve(folder / "reports" / "a.json", "paper", 1, reports)
    save_curve(folder / "reports" / "b.json", "paper", 0, [replace(reports[0], accuracy=0.0)])
    (folder / "evaluation.json").write_text(json.dumps({"backbone_accuracy": 0.9}))
    return folder, reports


def test_the_command_finds_what_its_run_knows(run_folder, tmp_path, capsys):
    folder, reports = run_folder
    arguments = ["card", str(folder / "paper-lam1-seed1"), "--output", str(tmp_path / "cards" / "x"), "--json"]
    assert main([*arguments, "--repo-id", "org/x-lam1", "--license", "mit"]) == 0
    printed, errors = capsys.readouterr()
    paths = [tmp_path / "cards" / "x" / name for name in ("README.md", "frontier.png", "curve.json")]
    assert json.loads(printed) == [str(path) for path in paths] and errors == "" and all(p.exists() for p in paths)
    card = load_card(paths[0])
    assert card.data.license == "mit" and card.data.model_name == "x-lam1"
    results = {r.metric_type: r.metric_value for r in card.data.eval_results if "alpha" not in r.metric_args}
    assert results["accuracy"] == reports[1].accuracy
    assert {r.metric_args["lam"] for r in card.data.eval_results} == {1.0}
    settings = dict(table_after(card.text, "## Training"))
    assert settings["train images"] == "40" and settings["num_train_epochs"] == "3" and settings["seed"] == "1"
    assert settings["views of each training image"] == "2" and "logging_steps" not in settings
    assert "minus [0.25, 0.5, 0.75]" in card.text  # of the saved config
    assert "### Operating points" not in card.text
    assert not (folder / "paper-lam1-seed1" / "README.md").exists()


def test_the_figure_shows_what_the_run_compares_it_with(run_folder, tmp_path, monkeypatch):
    folder, reports = run_folder
    drawn = []
    monkeypatch.setattr("jeidnn_hf.model_card.plot_frontier", lambda *a, **options: drawn.append((a[0], options)))
    monkeypatch.setattr("jeidnn_hf.model_card.written_whole", lambda _: contextlib.nullcontext(tmp_path))
    assert main(["card", str(folder / "paper-lam0.1-seed1"), "--json"]) == 0
    ((curves, options),) = drawn
    assert {name: [r.lam for r in found] for name, found in curves.items()} == {
        "paper-lam0.1-seed1": [0.1], "paper at other λ": [1.0],
    }  # fmt: skip
    assert options["backbone_accuracy"] == 0.9


def test_the_curve_in_a_run_is_of_the_models_own_lambda_and_seed(run_folder, ranged):
    folder, reports = run_folder
    curve = runs.curve_in_run(folder / "paper-lam1-seed1")
    assert (curve.lam, curve.accuracy, curve.backbone_accuracy) == ([1.0], [reports[1].accuracy], 0.9)
    assert runs.curve_in_run(ranged.folder) is None
    build(folder / "paper-lam0.6-seed1", recipe="paper", lam=0.6)
    assert runs.curve_in_run(folder / "paper-lam0.6-seed1") is None


def test_the_command_without_a_run_and_without_a_model(ranged, tmp_path, capsys):
    ranged.model.save_pretrained(tmp_path / "alone")
    assert main(["card", str(tmp_path / "alone")]) == 0
    printed = capsys.readouterr().out
    assert str(tmp_path / "alone" / "README.md") in printed and "without results" in printed
    assert main(["card", str(tmp_path / "nothing")]) == 1
    printed, errors = capsys.readouterr()
    assert printed == "" and errors.startswith("jeidnn card: Expected ") and errors.count("\n") == 1
    (tmp_path / "alone" / "calibration.json").write_text("{")
    assert main(["card", str(tmp_path / "alone")]) == 1
    assert "Expected an operating point" in capsys.readouterr().err


def test_a_run_whose_reports_lack_this_model_is_an_error(run_folder, capsys):
    folder, _ = run_folder
    build(folder / "paper-lam0.7-seed1", recipe="paper", lam=0.7)
    assert main(["card", str(folder / "paper-lam0.7-seed1")]) == 1
    assert "Expected a report of 'paper-lam0.7-seed1'" in capsys.readouterr().err


@pytest.mark.parametrize("count", [1, 4, 5])
def test_a_range_checkpoint_is_evaluated_at_its_own_lambda_too(count):
    config = JEIDNNConfig(**NETWORK, recipe="default", lam=[0.01, 1.0])
    lams = runs.lambdas(config, count)
    assert lams == sorted(lams) and lams.count(config.current_lam) == 1
    assert all(b / a > 1.01 for a, b in zip(lams, lams[1:], strict=False))
    assert len(lams) == count + (count != 5)  # an odd number of them has the middle already
    assert runs.lambdas(JEIDNNConfig(**NETWORK, recipe="paper", lam=0.5), count) == [0.5]
