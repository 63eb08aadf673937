"""examples/train.py and its configs: dry runs of the paper's rows, options over files, TensorBoard."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import yaml
from safetensors.torch import save_file

from jeidnn_hf import JEIDNNForImageClassification
from jeidnn_hf.backbones import build_model
from jeidnn_hf.cli import main
from jeidnn_hf.commands.train import parse_overrides
from jeidnn_hf.feature_cache import FeatureCache
from jeidnn_hf.run_config import TrainConfig, read_run_config
from jeidnn_hf.training_args import JEIDNNTrainingArguments
from stand_ins import write_folder

EXAMPLES = Path(__file__).parents[1] / "examples"
PAPER = {
    # classes, image size, exits, epochs, batch size; the first exit's share of the Mul-Adds, in Tables 2 and 3
    "cifar10_t2t_vit_7": (10, 224, 7, 15, 64, 0.358),
    "svhn_t2t_vit_7": (10, 32, 7, 15, 256, None),
    "cifar100_lt_t2t_vit_7": (100, 224, 7, 15, 64, 0.358),
    "cifar10_t2t_vit_14": (10, 224, 14, 15, 64, 0.130),
    "cifar100_t2t_vit_14": (100, 224, 14, 30, 64, 0.130),
    "cifar100_lt_t2t_vit_14": (100, 224, 14, 20, 64, 0.130),
    "imagenet_t2t_vit_14": (1000, 224, 14, 15, 64, 0.130),
}
LAMBDAS = [0.01, 0.05, 0.1, 0.5, 1.0, 3.0, 10.0]


def train(*arguments) -> int:
    spec = importlib.util.spec_from_file_location("example_train", EXAMPLES / "train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(argument) for argument in arguments])


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_every_row_of_the_paper_has_a_config():
    assert {path.stem for path in (EXAMPLES / "configs" / "paper").iterdir()} == PAPER.keys()


@pytest.mark.parametrize("name", PAPER)
def test_a_row_of_the_paper(name, tmp_path, monkeypatch, capsys):
    """The parameters of its Appendix 9.1.2, and one of its runs tried; nothing is read or written here."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("JEIDNN_WEIGHTS_DIR", raising=False)
    monkeypatch.setattr("jeidnn_hf.training_runs.load_data", lambda *_: pytest.fail("the images were read"))
    classes, size, exits, epochs, batch, share = PAPER[name]
    path = EXAMPLES / "configs" / "paper" / f"{name}.yaml"
    config = read_run_config(path, TrainConfig)
    assert [run["model"]["lam"] for run in config["runs"].values()] == LAMBDAS
    args = JEIDNNTrainingArguments(output_dir="x", **config["training"])
    assert (args.num_train_epochs, args.per_device_train_batch_size) == (epochs, batch)
    assert (args.optimizer, args.learning_rate, args.weight_decay, args.schedule) == ("adam", 0.01, 5e-4, "constant")
    assert (args.gates_on, args.gate_objective, args.bi_switch) == ("train", "surrogate", 200)
    assert 1 <= args.warmup_epochs <= epochs / 2 and config["model"]["recipe"] == "paper"

    assert train("--config", path, "--dry_run", "--only", "lam1", "--json") == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["run"], row["lam"], row["num_labels"], row["image_size"]) == ("lam1", 1.0, classes, size)
    assert row["exits"] == exits and row["backbone"] == config["model"]["backbone"]
    assert share is None or row["first_exit_mul_adds"] == pytest.approx(share, abs=1e-3)
    assert files(tmp_path) == []


SMALL = {
    "output_dir": "out",
    "data": {"dataset": "cifar10", "splits": {"validation": 50, "calibration": 20, "train": 60, "test": 40}},
    "model": {"backbone": "resnet20_cifar", "exit_stages": [2, 5, 8], "weights": "absent.safetensors"},
    "training": {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "num_train_epochs": 1},
    "runs": {
        "paper-lam0.1": {"model": {"recipe": "paper", "lam": 0.1}, "training": {"recipe": "paper", "warmup_epochs": 0}},
        "any": {"model": {"recipe": "default"}, "training": {"recipe": "default"}},
    },
}


def write_config(path: Path, **changes) -> Path:
    config = {**SMALL, **changes}
    path.write_text(json.dumps(config) if path.suffix == ".json" else yaml.safe_dump(config, sort_keys=False))
    return path


def test_a_dry_run_prints_a_line_per_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = write_config(tmp_path / "run.yaml")
    assert main(["train", "--config", str(config), "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["paper-lam0.1", "any"]
    assert "lambda 0.1, 3 exits" in lines[0] and "lambda [0.003, 3.0], 3 exits" in lines[1]
    assert files(tmp_path) == [config]


def test_a_dry_run_trains_gates_and_inference_modules(tmp_path, monkeypatch):
    from jeidnn_hf import training_runs

    moved = []

    class Watched(training_runs.JEIDNNTrainer):
        def train(self, *args, **kwargs):
            before = {name: value.clone() for name, value in self.model.named_parameters()}
            output = super().train(*args, **kwargs)
            moved.append({name.split(".")[0] for name, v in self.model.named_parameters() if not v.equal(before[name])})
            assert self.state.global_step == 2
            return output

    monkeypatch.setattr(training_runs, "JEIDNNTrainer", Watched)
    rows = training_runs.dry_run(SMALL, quiet=True)
    assert moved == [{"heads", "policy"}] * 2
    assert [row["run"] for row in rows] == list(SMALL["runs"]) and all(0 < row["loss"] < 1e5 for row in rows)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--model.backbone", "nope"], ["'nope'"]),
        (["--model.exit_stages", "[2, 50]"], ["50"]),
        (["--model.colour", "red"], ["'colour'"]),
        (["--model.lam", "-1"], ["-1"]),
        (["--training.learning_rte", "1"], ["'learning_rte'"]),
        (["--training.learning_rate", "fast"], ["learning_rate", "'fast'"]),
        (["--training.bi_switch", "0"], ["bi_switch"]),
        (["--training.report_to", "carrier_pigeon"], ["report_to", "carrier_pigeon"]),
        (["--data.dataset", "org/mine", "--data.views", "2.5"], ["views", "2.5"]),
        (["--runs.any.training.schedule", "daily"], ["'daily'"]),
        (["--output_dir.x", "1"], ["output_dir", "'out'"]),
        (["--only", "one"], ["'one'"]),
    ],
)
def test_a_dry_run_finds_mistakes(tmp_path, monkeypatch, capsys, options, parts):
    monkeypatch.chdir(tmp_path)
    run = {"paper": {"model": {"recipe": "paper"}}, "any": {}}
    config = write_config(tmp_path / "run.yaml", runs=run)
    assert train("--config", config, "--dry_run", *options) == 1
    printed, errors = capsys.readouterr()
    assert errors.startswith("train.py: Expected ") and errors.count("\n") == 1 and printed == ""
    assert all(part in errors for part in parts), errors
    assert files(tmp_path) == [config]


# ---- options over files


def test_options_are_read_as_json_then_as_yaml():
    arguments = ["--training.learning_rate", "5e-3", "--data.data_dir=a=b", "--model.exit_stages", "[2, 5]"]
    arguments += ["--model.preprocessing", "{crop_pct: 1.0}", "--training.fp16", "true"]
    arguments += ["--model.lam", "-1", "--a.b", "null"]
    assert parse_overrides(arguments) == {
        "training.learning_rate": 0.005, "data.data_dir": "a=b", "model.exit_stages": [2, 5],
        "model.preprocessing": {"crop_pct": 1.0}, "training.fp16": True, "model.lam": -1, "a.b": None,
    }  # fmt: skip


def test_options_replace_what_the_file_says(tmp_path):
    config = write_config(tmp_path / "run.json")
    overrides = {
        "training.learning_rate": 0.5, "data.splits.train": 30, "model.preprocessing.crop_pct": 1.0,
        "runs.paper-lam0.1.model.lam": 3, "output_dir": "there",
    }  # fmt: skip
    changed = read_run_config(config, TrainConfig, overrides=overrides)
    expected = json.loads(config.read_text())
    expected["training"]["learning_rate"] = 0.5
    expected["data"]["splits"]["train"] = 30
    expected["model"]["preprocessing"] = {"crop_pct": 1.0}
    expected["runs"]["paper-lam0.1"]["model"]["lam"] = 3
    expected["output_dir"] = "there"
    assert changed == expected
    assert read_run_config(config, TrainConfig) == json.loads(json.dumps(SMALL))  # the file's own are left alone


@pytest.mark.parametrize(
    "arguments",
    [["--colour", "red"], ["--training.learning_rate"], ["--training.a", "--data.b", "1"], ["--.a", "1"], ["a.b"]],
)
def test_wrong_options_are_wrong_usage(tmp_path, capsys, arguments):
    with pytest.raises(SystemExit) as exit_:
        main(["train", "--config", "run.yaml", *arguments])
    assert exit_.value.code == 2 and "usage: jeidnn" in capsys.readouterr().err


def test_a_broken_json_file(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{'data': 1}")
    assert main(["train", "--config", str(tmp_path / "run.json")]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith("jeidnn train: Expected a JSON file at ") and errors.count("\n") == 1


# ---- training


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """A JSON config with images and weights that are there."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setenv("JEIDNN_DATA_DIR", str(tmp_path))
    write_folder(tmp_path / "cifar10")
    torch.manual_seed(0)
    weights = tmp_path / "backbone.safetensors"
    save_file(build_model("resnet20_cifar", num_classes=10).state_dict(), weights)
    return write_config(
        tmp_path / "run.json", output_dir=str(tmp_path / "out"), model={**SMALL["model"], "weights": str(weights)}
    )


def test_training_by_the_command(small, tmp_path, capsys):
    """Standard output is JSON and nothing else; a second time there is nothing to train."""
    arguments = ["train", "--config", str(small), "--only", "paper-lam0.1", "--json", "--data.views", "0"]
    assert main([*arguments, "--training.learning_rate", "0"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert row["run"] == "paper-lam0.1" and 0 <= row["accuracy"] <= 1 and 0 < row["mul_adds"] < 1.1
    folder = tmp_path / "out" / "paper-lam0.1"
    model = JEIDNNForImageClassification.from_pretrained(folder)
    assert str(folder) == row["folder"] and model.config.id2label[3] == "class 3" and model.config.lam == 0.1
    assert yaml.safe_load((tmp_path / "out" / "config.yaml").read_text())["training"]["learning_rate"] == 0
    caches = [FeatureCache(path) for path in (tmp_path / "out" / "cache").glob("*.safetensors")]
    assert sorted((len(cache), cache.key["view"]) for cache in caches) == [(50, None), (60, None)]  # views: 0
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out) == [{"run": "paper-lam0.1", "folder": str(folder)}]


def test_a_number_of_views_below_zero_is_refused(small, capsys):
    assert main(["train", "--config", str(small), "--data.views", "-1"]) == 1
    assert "Expected views of 0 or more, but got -1" in capsys.readouterr().err


def test_what_tensorboard_shows(small, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    options = ["--training.report_to", "tensorboard", "--training.logging_steps", "1"]
    assert train("--config", small, "--only", "paper-lam0.1", *options, "--training.eval_strategy", "epoch") == 0
    tags = set()
    for path in (tmp_path / "out").rglob("events.out.tfevents.*"):
        tags |= set(EventAccumulator(str(path)).Reload().Tags()["scalars"])
    per_exit = {f"eval/exit_{l:02d}/{what}" for l in (1, 2, 3) for what in ("accuracy", "share", "mass_left")}
    assert tags >= {"train/loss", "train/phase", "eval/cost", *per_exit, "eval/exit_01/gate", "eval/exit_02/gate"}


def test_what_trackio_shows(small, tmp_path):
    """In a process of its own, since trackio finds its folder when it is imported."""
    pytest.importorskip("trackio", reason="trackio is not installed")
    options = ["--config", str(small), "--only", "paper-lam0.1", "--training.report_to", "trackio"]
    options += ["--training.logging_steps", "1", "--training.eval_strategy", "epoch", "--training.project", "exits"]
    env = {**os.environ, "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "train.py"), *options], env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "trackio").glob("exits*.db")
    with contextlib.closing(sqlite3.connect(file)) as connection:
        logged = [json.loads(row[0]) for row in connection.execute("SELECT metrics FROM metrics")]
    names = set().union(*logged)
    assert names >= {"train/loss", "train/phase", "eval/cost", "eval/exit_01/share", "eval/exit_02/gate"}


def test_a_tracker_that_is_not_installed_is_named_before_anything_is_read(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("jeidnn_hf.training_args.get_available_reporting_integrations", lambda: ["wandb"])
    assert train("--config", small, "--training.report_to", "tensorboard") == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith("train.py: Expected report_to among ['wandb']") and "'tensorboard'" in errors[-1]
    assert not (tmp_path / "out").exists()
