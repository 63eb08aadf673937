"""compare.py, its report and `jeidnn compare`: everything on a small stand-in, resumed, refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from safetensors.torch import save_file

from jeidnn_hf import compare as comparing
from jeidnn_hf.backbones import build_model
from jeidnn_hf.cli import main
from jeidnn_hf.compare import JUDGED_BY, curve_path, train_config
from jeidnn_hf.compare_methods import DEFAULT, METHODS, PAPER, POLICY_CURVES
from jeidnn_hf.comparison import Curve
from jeidnn_hf.comparison_report import name_of, summarise, to_markdown
from jeidnn_hf.configuration_jeidnn import JEIDNNConfig
from jeidnn_hf.oracle import outcome
from jeidnn_hf.policies import ConfidenceThreshold, EENetScheduler, LearnedGates
from jeidnn_hf.run_config import read_run_config
from jeidnn_hf.runs import RunFolder
from jeidnn_hf.stored import fresh_config
from jeidnn_hf.training_args import JEIDNNTrainingArguments
from jeidnn_hf.training_runs import plan_runs
from stand_ins import write_folder

SMALL = {
    "output_dir": "out",
    "data": {"dataset": "cifar10", "splits": {"validation": 60, "calibration": 40, "train": 60, "test": 40}},
    "model": {"backbone": "resnet20_cifar", "exit_stages": [2, 5, 8]},
    "training": {"use_cpu": True, "disable_tqdm": True},
    "compare": {
        "seeds": [0, 1],
        "lambdas": [0.1, 1.0],
        "methods": ["plain", "soft_targets", "jeidnn"],
        "heads": {"paper": {"training": {"num_train_epochs": 2, "warmup_epochs": 1}}, "default": {}},
    },
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> Path:
    """The output folder of a comparison."""
    folder = tmp_path_factory.mktemp("compare")
    torch.manual_seed(0)
    weights = folder / "backbone.safetensors"
    save_file(build_model("resnet20_cifar", num_classes=10).state_dict(), weights)
    write_folder(folder / "cifar10")
    config = {**SMALL, "output_dir": str(folder / "out"), "model": {**SMALL["model"], "weights": str(weights)}}
    (folder / "compare.yaml").write_text(yaml.safe_dump(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JEIDNN_DATA_DIR", str(folder))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "hf")
        cheap = {
            "gates": lambda model, record: [
                (LearnedGates.fit(record, lam=(0.01, 3.0), steps=30), lam) for lam in (0.01, 0.2, 3.0)
            ],
            "eenet": lambda model, record: [(EENetScheduler.fit(record, budget=0.7, steps=50), None)],
        }
        patch.setattr(comparing, "POLICY_CURVES", {**POLICY_CURVES, **cheap})
        assert main(["compare", str(folder / "compare.yaml"), "--jobs", "1"]) == 0
        before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("*.safetensors")}
        curve_path(folder / "out", *DEFAULT, 1).unlink()
        assert main(["compare", str(folder / "compare.yaml"), "--jobs", "1", "--no_figures", "--reproduce"]) == 0
        changed = {path for path, time in before.items() if path.stat().st_mtime_ns != time}
        assert changed == {curve_path(folder / "out", *DEFAULT, 1)}  # all else was there
    return folder / "out"


def test_every_method_has_a_curve_per_seed_and_a_row_per_table(compared):
    summary = json.loads((compared / "comparison.json").read_text())
    methods = [(name, policy) for name in ("plain", "soft_targets") for policy in METHODS[name].policies]
    expected = {f"{kind} heads: {name} + {policy}" for kind in ("paper", "default") for name, policy in methods}
    expected |= {f"{k} heads: jeidnn + own" for k in ("paper", "default")}
    assert summary["accuracy"].keys() == expected and set(summary["seeds"].values()) == {2}
    page = (compared / "comparison.md").read_text()
    assert all(page.count(f"| {name} |") >= 4 for name in expected)
    lines = [line for line in page.splitlines() if line.startswith("| default heads: jeidnn + own |")]
    assert any("[" in line for line in lines)  # an interval
    assert {path.name for path in (compared / "figures").iterdir()} == {"paper", "default"}
    drawn = {path.name for path in (compared / "figures" / "default").iterdir()}
    assert {"accuracy.png", "ece.png", "inefficiency.png", "miscoverage.png", "figures.md"} <= drawn


def test_reproduce_measures_plain_training_of_each_kind_of_heads(compared):
    rows = json.loads((compared / "reproduction.json").read_text())
    assert {row["model"] for row in rows} == {"paper-plain-seed0", "default-plain-seed0", "T2T-ViT-7"}
    assert len((compared / "reproduction.md").read_text().splitlines()) == len(rows) + 2
    with pytest.raises(ValueError, match="^Expected the method 'plain'"):
        comparing.plain_runs({**SMALL, "compare": {**SMALL["compare"], "methods": ["jeidnn"]}})


def test_a_curve_is_what_its_points_are(compared):
    """Each training of JEI-DNN is one point; thresholds and quotas cost more the later they let samples leave."""
    assert Curve.load(curve_path(compared, *PAPER, 0)).costs.shape == (2,)
    quota = Curve.load(curve_path(compared, "paper", "plain", "quota", 0))
    assert quota.costs.shape == (39,) and (quota.held_out_costs.diff() >= -1e-9).all()
    threshold = Curve.load(curve_path(compared, "default", "plain", "threshold", 0))
    assert (threshold.held_out_costs.diff() >= 0).all() and threshold.right.shape == (20, 80)
    assert (threshold.measures["coverage"] > 0.5).all() and (threshold.measures["inefficiency"] >= 1).all()


def test_accuracy_and_cost_are_those_on_test_and_calibration_images_together(compared):
    name = "default-plain-seed0"
    records = RunFolder(compared).records(name)
    policy = ConfidenceThreshold.fit(records["validation"], budget=0.8)
    point = comparing.measure(policy, None, records)
    alone = [outcome(records[role].under(policy), policy.decide(records[role].logits)) for role in JUDGED_BY]
    assert point["right"].double().mean() == pytest.approx(sum(one.accuracy for one in alone) / 2)
    assert point["costs"] == pytest.approx(sum(one.normalised_mul_adds for one in alone) / 2)
    summary = json.loads((compared / "comparison.json").read_text())
    assert summary["images"] == 80 and JUDGED_BY == ("test", "calibration")
    native = RunFolder(compared).records("paper-plain-seed0")
    right = [(native[role].logits[:, -1].argmax(-1) == native[role].labels).double().mean() for role in JUDGED_BY]
    assert summary["backbone_accuracy"] == pytest.approx(float(sum(right)) / 2)


def test_seeds_are_trainings_of_their_own(compared):
    first, second = (Curve.load(curve_path(compared, "default", "plain", "threshold", seed)) for seed in (0, 1))
    assert not torch.equal(first.right, second.right)


def plan(**changes) -> dict:
    return train_config({**SMALL, "compare": {**SMALL["compare"], **changes}})


def test_methods_of_the_same_heads_differ_in_nothing_but_the_method():
    runs = plan(methods=None, seeds=[0])["runs"]
    assert len(runs) == 2 * (len(METHODS) - 2 + 2 * 2)  # two of them once per lambda
    for kind in ("paper", "default"):
        own = [run for name, run in runs.items() if name.startswith(f"{kind}-")]
        for key in ("per_device_train_batch_size", "num_train_epochs", "learning_rate", "optimizer", "seed"):
            args = [JEIDNNTrainingArguments("out", report_to="none", **run["training"]) for run in own]
            assert len({getattr(arg, key) for arg in args}) == 1, key
        assert {run["model"]["recipe"] for run in own} == {kind}
    for name, trained_by in (("plain", "plain"), ("ztw", "plain"), ("soft_targets", "soft_targets")):
        assert runs[f"default-{name}-seed0"]["training"]["im_training"] == trained_by  # the published as published
    assert JEIDNNTrainingArguments("out", report_to="none").im_training == DEFAULT[1]
    assert runs["paper-jeidnn-lam0.1-seed0"]["model"]["lam"] == 0.1
    assert runs["default-ztw-seed0"]["model"]["cascade"]
    boosting = {name: JEIDNNConfig(**run["model"]).boosting for name, run in runs.items()}
    boosted = {"paper-boosted-seed0": 0.5, "default-soft_targets-seed0": "auto", "default-boosted-seed0": 0.5}
    assert {name: shares for name, shares in boosting.items() if shares} == boosted


def test_a_method_of_the_file_differs_from_a_known_one_in_what_it_names():
    own = {"like": "jeidnn", "model": {"exit_rule": "median"}, "training": {"warmup_epochs": 2}, "policies": ["gates"]}
    plain = {"policies": ["threshold"]}
    runs = plan(methods={"jeidnn": None, "jeidnn-late": own, "plain": plain}, seeds=[0])["runs"]
    known, late = runs["paper-jeidnn-lam0.1-seed0"], runs["paper-jeidnn-late-lam0.1-seed0"]
    assert late["model"] == {**known["model"], "exit_rule": "median"}
    assert late["training"] == {**known["training"], "warmup_epochs": 2} and known["training"]["warmup_epochs"] == 1
    assert runs["default-plain-seed0"]["training"]["im_training"] == "plain"
    methods = comparing.compared({"compare": {"methods": {"jeidnn-late": own, "plain": plain}}}).methods
    assert methods["jeidnn-late"].policies == ("gates",) and methods["jeidnn-late"].per_lambda
    assert methods["plain"].policies == ("threshold",)


CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
EXAMPLES = sorted([*CONFIGS.glob("compare_*"), *CONFIGS.glob("ablations_*")])


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_examples_can_be_planned(path):
    config = train_config(read_run_config(path, comparing.CompareConfig))
    names, models, trainings = plan_runs({**config, "training": {**config["training"], "use_cpu": True}}, None, path)
    assert len(set(map(str, zip(models.values(), map(str, trainings.values()), strict=True)))) == len(names)
    for model in models.values():
        fresh_config(**{**model, "weights": None, "num_labels": 10})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ["plane"]}, r"^Expected methods among \['plain', .*\], or like one of them, but got 'plane'\.$"),
        ({"methods": {"mine": {}}}, "^Expected methods among .* but got 'mine'"),
        ({"methods": {"mine": {"like": "plain", "policies": ["luck"]}}}, "^Expected policies of 'mine' among"),
        ({"methods": {"plain": {"trainings": {}}}}, r"^Expected the keys of methods.plain among \['like', "),
        ({"methods": {"plain": {"training": {"epochs": 3}}}}, "^Expected the keys of training in methods.plain among"),
        ({"methods": {"plain-seeded": {"like": "plain"}}}, "^Expected a method's name of words and hyphens"),
        ({"heads": {"big": {}}}, r"^Expected heads among \['paper', 'default'\], but got \['big'\]\.$"),
        ({"seeds": []}, "^Expected one seed at least, but got none"),
        ({"seeds": [1, 1]}, r"^Expected seeds and lambdas without a repetition, but got \[1, 1\]"),
        ({"lambdas": [0.1, -1.0]}, "^Expected lambda to be finite and not negative, but got -1.0"),
    ],
)
def test_what_cannot_be_compared(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


def test_who_wins_is_said_for_each_budget():
    """Right on 90 % of 2,000 images against 80 %: better, and so is the claim."""
    images, ones = 2000, torch.ones(1, dtype=torch.float64)

    def curve(accuracy: float) -> Curve:
        right = (torch.arange(images) < accuracy * images)[None]
        measures = {name: ones for name in ("ece", "inefficiency", "coverage")}
        return Curve(0.3 * ones, accuracy * ones, 0.3 * ones, right, measures)

    curves = {DEFAULT: [curve(0.9)], ("default", "plain", "quota"): [curve(0.8)], PAPER: [curve(0.7)]}
    summary = summarise(curves, 0.95, budgets=(0.2, 0.4))
    (row,) = summary["differences"]["default heads, against the default recipe's policy"].values()
    assert row["mean"] == [None, pytest.approx(-0.1)] and row["verdict"] == ["-", "worse"]
    claim = summary["default_recipe"]["default"]
    assert claim["not_beaten"] and claim["ahead_somewhere"] == ["default heads: plain + quota"]
    lead = claim["leads"]["default heads: plain + quota"]["least_lower_bound"]
    assert lead == pytest.approx(0.1 - 1.96 * 0.0067, abs=0.002)
    own = summary["differences"]["the default recipe against the paper's, each with its own heads"][name_of(DEFAULT)]
    assert own["mean"][1] == pytest.approx(0.2) and own["verdict"][1] == "better"
    assert summary["area_above_80_percent"][name_of(DEFAULT)] == pytest.approx((0.9 - 0.76) * 0.7, abs=0.002)
    page = to_markdown(summary, "toy")
    assert "**-10.00 [" in page and "At least -0.2 everywhere: yes" in page
    worse = summarise({DEFAULT: [curve(0.8)], ("default", "plain", "quota"): [curve(0.9)]}, 0.9, budgets=(0.4,))
    assert not worse["default_recipe"]["default"]["not_beaten"]
    assert all(math.isfinite(v) for v in worse["accuracy"][name_of(DEFAULT)])
