"""Sweeps: each member is the run that it would be alone; resumed, refused, evaluated."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from safetensors.torch import save_file
from transformers import set_seed

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, JEIDNNTrainer, JEIDNNTrainingArguments
from jeidnn_hf.backbones import build_model
from jeidnn_hf.cli import main
from jeidnn_hf.feature_cache import CachedFeatures, FeatureCache
from jeidnn_hf.held_out import fit_held_out
from jeidnn_hf.im_training import Phase
from jeidnn_hf.run_config import read_run_config
from jeidnn_hf.stacked import Member, StackedTraining
from jeidnn_hf.sweep import STATE_NAME, SweepConfig, sweep, swept, train_config
from stand_ins import write_folder
from toy_training import CLASSES, ToyFeatures, exit_state

EPOCHS = {"num_train_epochs": 4, "warmup_epochs": 1, "per_device_train_batch_size": 32, "bi_switch": 3}
"""Of 150 samples 20 steps, every fifth on 22 of them: 5 of the warm-up, then gates and IMs, three each."""


def built(seed: int, lam, **options) -> JEIDNNForImageClassification:
    set_seed(seed)
    config = JEIDNNConfig(
        backbone="resnet20_cifar", num_labels=CLASSES, image_size=16, exit_stages=[1, 4, 6, 8],
        **{"recipe": "paper", "lam": lam, "head_dim": 8, **options},
    )  # fmt: skip
    return JEIDNNForImageClassification(config)


def features(folder: Path, dims: tuple[int, ...], samples: int, seed: int) -> CachedFeatures:
    made = ToyFeatures(dims, samples, seed)
    tensors = {"features": made.features, "labels": made.labels, "index": torch.arange(samples)}
    path = folder / f"{samples}.safetensors"
    if not path.exists():
        save_file(tensors, path, {"format": "pt", "key": json.dumps({"exit_dims": list(dims)})})
    return CachedFeatures([FeatureCache(path)])


def arguments(folder: Path, seed: int = 0, **options) -> JEIDNNTrainingArguments:
    defaults = {
        "recipe": "paper", **EPOCHS, "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True,
        "gate_steps": 20, "data_seed": 5,
    }  # fmt: skip
    return JEIDNNTrainingArguments(output_dir=str(folder), seed=seed, **{**defaults, **options})


def stacked(folder: Path, members: list[Member], model_options: dict, options: dict) -> StackedTraining:
    models = {m.seed: built(m.seed, [0.01, 1.0] if m.lam is None else m.lam, **model_options) for m in members}
    dims = models[members[0].seed].backbone.exit_dims
    data = features(folder, dims, 150, 0), features(folder, dims, 80, 1)
    rate = max(m.learning_rate for m in members)
    return StackedTraining(models, members, arguments(folder, **{**options, "learning_rate": rate}), *data)


def alone(folder: Path, member: Member, model_options: dict, options: dict) -> dict[str, torch.Tensor]:
    model = built(member.seed, [0.01, 1.0] if member.lam is None else member.lam, **model_options)
    data = features(folder, model.backbone.exit_dims, 150, 0), features(folder, model.backbone.exit_dims, 80, 1)
    args = arguments(folder, **{**options, "seed": member.seed, "learning_rate": member.learning_rate})
    JEIDNNTrainer(model, args, *data).train()
    return exit_state(model)


CASES = {
    "lambdas": ([Member(lam, 0, 0.01) for lam in (0.0, 0.3, 2.0)], {}, {}),
    "seeds": ([Member(lam, seed, 0.01) for lam in (0.2, 1.0) for seed in (3, 4)], {}, {}),
    "rates": ([Member(lam, 0, rate) for lam in (0.2, 1.0) for rate in (0.003, 0.01)], {}, {}),
    "mlp, AdamW, one cycle, Eq. 6 whole": (
        [Member(lam, 0, rate) for lam, rate in ((0.2, 0.01), (1.0, 0.01), (1.0, 0.002))],
        {"exit_head": "mlp", "native_head": False},
        {"optimizer": "adamw", "schedule": "one_cycle", "gate_objective": "expected_cost", "full_gradient": True},
    ),
    "cascade, shared gates, joint": (
        [Member(lam, 1, 0.01) for lam in (0.2, 1.0)],
        {"cascade": True, "gate": "shared", "gate_form": "stick"},
        {"im_training": "diffbranch"},
    ),
    "boosted": (
        [Member(lam, 1, 0.01) for lam in (0.2, 1.0)],
        {"boosting": 0.5}, {"im_training": "boosted", "gates_on": "validation"},
    ),
    "default": (
        [Member(lam, seed, 0.01) for lam in (0.2, 1.0) for seed in (0, 1)], {"recipe": "default"},
        {"recipe": "default"},
    ),
    "plain, one cycle": (
        [Member(lam, seed, 0.01) for lam in (0.2, 1.0) for seed in (0, 1)],
        {"recipe": "default", "boosting": 0}, {"recipe": "default", "im_training": "plain"},
    ),
    "default, a range": (
        [Member(None, seed, 0.01) for seed in (0, 1)], {"recipe": "default"}, {"recipe": "default"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_member_is_the_run_that_it_would_be_alone(case, tmp_path):
    members, model_options, options = CASES[case]
    training = stacked(tmp_path, members, model_options, options)
    phases = []
    while training.step < training.num_steps:
        for _ in training.run_epoch():
            phases.append(training.phase)
    assert training.step == 20
    if training.im_training.turns:
        assert set(phases) == {Phase.WARMUP, *training.im_training.turns}
    start = exit_state(built(0, 0.5, **model_options))
    together = []
    for s, member in enumerate(members):
        model = training.load_member(s)
        assert model.config.lam == ([0.01, 1.0] if member.lam is None else member.lam)
        if training.args.gates_on == "validation":
            fit_held_out(model, training.validation, arguments(tmp_path, **{**options, "seed": member.seed}))
        together.append(exit_state(model))
        single = alone(tmp_path, member, model_options, options)
        assert any(not torch.allclose(single[name], start[name], atol=0.01) for name in single)
        for name, value in single.items():
            torch.testing.assert_close(together[-1][name], value, atol=1e-5, rtol=1e-5)
    for first, second in zip(together, together[1:], strict=False):
        assert any(not torch.allclose(first[name], second[name], atol=1e-4) for name in first)


def test_the_warm_up_is_trained_once_for_what_has_seed_and_rate_in_common(tmp_path):
    members = [Member(lam, seed, rate) for lam in (0.2, 1.0) for seed in (0, 1) for rate in (0.01, 0.003)]
    training = stacked(tmp_path, members, {}, {})
    assert len(training.heads.parameters[0][0]) == 4
    for _ in training.run_epoch():
        assert len(training.heads.parameters[0][0]) == 4
    next(training.run_epoch())
    assert len(training.heads.parameters[0][0]) == 8


@pytest.mark.parametrize("stop_at", [2, 5, 7, 10, 13])
@pytest.mark.parametrize("case", ["rates", "mlp, AdamW, one cycle, Eq. 6 whole"])
def test_a_resumed_sweep_is_that_of_one_piece_to_the_bit(case, stop_at, tmp_path):
    whole = stacked(tmp_path, *CASES[case])
    part = stacked(tmp_path, *CASES[case])
    while part.step < stop_at:
        for _ in part.run_epoch():
            if part.step == stop_at:
                break
    torch.save(part.state_dict(), tmp_path / "state.pt")
    resumed = stacked(tmp_path, *CASES[case])
    resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for training in (whole, resumed):
        while training.step < training.num_steps:
            for _ in training.run_epoch():
                pass
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, resumed.parameters, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(whole.parameters, part.parameters, strict=True))


SMALL = {
    "data": {"dataset": "cifar10", "splits": {"validation": 60, "calibration": 40, "train": 60, "test": 40}},
    "model": {"backbone": "resnet20_cifar", "exit_stages": [2, 5, 8], "recipe": "paper"},
    "training": {"use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 16, "num_train_epochs": 3,
                 "bi_switch": 2},
    "sweep": {"lambdas": [0.1, 1.0], "seeds": [0, 1]},
}  # fmt: skip


@pytest.fixture
def config(tmp_path, monkeypatch) -> Path:
    """A file for ``jeidnn sweep`` of stand-ins for images and weights."""
    torch.manual_seed(0)
    weights = tmp_path / "backbone.safetensors"
    save_file(build_model("resnet20_cifar", num_classes=10).state_dict(), weights)
    write_folder(tmp_path / "cifar10")
    monkeypatch.setenv("JEIDNN_DATA_DIR", str(tmp_path))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    small = {**SMALL, "output_dir": str(tmp_path / "out"), "model": {**SMALL["model"], "weights": str(weights)}}
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(small))
    return tmp_path / "sweep.yaml"


NAMES = ["paper-lam0.1-seed0", "paper-lam0.1-seed1", "paper-lam1-seed0", "paper-lam1-seed1"]


def test_the_folder_is_that_of_a_training_and_can_be_evaluated(config, tmp_path, capsys):
    assert main(["sweep", str(config)]) == 0
    printed = capsys.readouterr().out
    rows = json.loads((tmp_path / "out" / "sweep.json").read_text())
    assert [row["run"] for row in rows] == NAMES and all(row["run"] in printed for row in rows)
    assert [(row["lam"], row["seed"]) for row in rows] == [(0.1, 0), (0.1, 1), (1.0, 0), (1.0, 1)]
    assert all(0 <= row["accuracy"] <= 1 and 0 < row["mul_adds"] <= 1.1 for row in rows)
    assert not (tmp_path / "out" / STATE_NAME).exists()
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("model.safetensors")}
    assert len(times) == 4
    # the file that it leaves trains the same members one by one
    one_by_one = ["--config", str(tmp_path / "out" / "config.yaml"), "--output_dir", str(tmp_path / "one")]
    assert main(["train", *one_by_one]) == 0
    for row in rows:
        one, other = (
            exit_state(JEIDNNForImageClassification.from_pretrained(tmp_path / place / row["run"]))
            for place in ("out", "one")
        )
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], atol=1e-5, rtol=1e-5)
    assert main(["sweep", str(config), "--sweep.lambdas", "[0.1, 1.0, 3]"]) == 0
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert (tmp_path / "out" / "paper-lam3-seed1" / "model.safetensors").exists()
    assert main(["evaluate", str(tmp_path / "out"), "--json"]) == 0
    summary = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert set(summary["accuracy_at_budget"]) == {"paper", "paper heads, threshold"}


def test_an_interrupted_sweep_goes_on_to_the_same_members(config, tmp_path, monkeypatch, capsys):
    def swept_in(place: str, **options) -> dict[str, torch.Tensor]:
        sweep(read_run_config(config, SweepConfig, tmp_path / place), quiet=True)
        models = (JEIDNNForImageClassification.from_pretrained(tmp_path / place / name) for name in NAMES)
        return {f"{i}.{name}": value for i, model in enumerate(models) for name, value in exit_state(model).items()}

    whole = swept_in("whole")
    take_step = StackedTraining.take_step

    def stop(self, batch):
        if self.step == 6:
            raise KeyboardInterrupt
        take_step(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(StackedTraining, "take_step", stop)
        assert main(["sweep", str(config), "--json"]) == 1
    assert "goes on" in capsys.readouterr().err
    state = tmp_path / "out" / STATE_NAME
    assert torch.load(state, weights_only=True)["training"]["step"] == 4
    assert list((tmp_path / "out").glob("*/model.safetensors")) == []
    for options in (["--sweep.lambdas", "[0.1, 2.0]"], ["--training.bi_switch", "3"]):
        before = (tmp_path / "out" / "config.yaml").read_text()
        assert main(["sweep", str(config), *options]) == 1
        assert "Expected the interrupted sweep" in capsys.readouterr().err
        assert (tmp_path / "out" / "config.yaml").read_text() == before
    again = swept_in("out")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)
    state.write_bytes(b"half")
    (tmp_path / "out" / NAMES[0] / "model.safetensors").unlink()
    assert main(["sweep", str(config)]) == 1
    assert "remove it to start anew" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sweep.lambdas", "[]"], "lambdas to sweep over"),
        (["--sweep.lambdas", "[0.1, 0.1]"], "none of them twice"),
        (["--sweep.lambdas", "[1, 1.0]"], "none of them twice"),
        (["--sweep.lambdas", "[0.1, -1]"], "lambda to be finite and not negative"),
        (["--sweep.lambdas", "[.nan]"], "lambda to be finite and not negative"),
        (["--sweep.lambdas", "['0.1']"], "lambda to be finite and not negative"),
        (["--sweep.lambdas", "[[0.1, 1.0]]"], "lambdas that are numbers"),
        (["--sweep.lambdas", "0.1"], "to be list"),
        (["--sweep.seeds", "[]"], "seeds to sweep over"),
        (["--sweep.seeds", "[1, 1]"], "none of them twice"),
        (["--sweep.seeds", "[-1]"], "whole numbers"),
        (["--sweep.learning_rates", "[0]"], "learning_rates that are positive"),
        (["--sweep.learning_rates", "[0.1, .inf]"], "learning_rates that are positive"),
        (["--sweep.learning_rates", "[0.1]", "--training.gate_learning_rate", "0.1"], "without gate_learning_rate"),
        (["--training.early_stopping_patience", "5"], "early_stopping_patience=None"),
        (["--training.gradient_accumulation_steps", "2"], "gradient_accumulation_steps=1"),
        (["--training.im_training", "l2w_den", "--training.gates_on", "validation"], "members can be stacked"),
        (["--sweep.lambdas", "null", "--model.lam", "[0.1, 1.0]"], "got the range"),
        (["--sweep.lambda", "[1]"], "the keys of sweep"),
    ],
)
def test_what_cannot_be_swept_is_refused_before_anything_is_written(options, message, config, tmp_path, capsys):
    assert main(["sweep", str(config), *options]) == 1
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1 and message in errors
    assert not (tmp_path / "out").exists()


def test_names_tell_what_a_member_has_of_its_own():
    section = {"lambdas": [1e-5, 3], "seeds": [2], "learning_rates": [1e-5, 0.1]}
    members = swept({"model": {"recipe": "paper"}, "sweep": section})
    assert list(members) == [
        "paper-lr0.00001-lam0.00001-seed2", "paper-lr0.00001-lam3-seed2", "paper-lr0.1-lam0.00001-seed2",
        "paper-lr0.1-lam3-seed2",
    ]  # fmt: skip
    assert members["paper-lr0.1-lam3-seed2"] == Member(3.0, 2, 0.1)
    assert list(swept({"model": {}, "sweep": {"seeds": [0, 1]}})) == ["default-seed0", "default-seed1"]
    plan = train_config({"output_dir": "", "data": {}, "model": {}, "sweep": {"seeds": [4, 1]}})
    assert plan["training"]["data_seed"] == 4 and plan["runs"]["default-seed1"]["training"] == {"seed": 1}
