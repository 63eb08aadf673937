"""Malformed input of every kind: one error of one line that says what is allowed, and nothing half-written."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from jeidnn_hf import EvaluationReport, ExitRecord, JEIDNNConfig, JEIDNNForImageClassification, evaluate
from jeidnn_hf.backbones import build_model
from jeidnn_hf.cli import main
from jeidnn_hf.costs import ExitCosts
from jeidnn_hf.data import ImageView, Preprocessing
from jeidnn_hf.feature_cache import CachedFeatures, FeatureCache, cache_features
from jeidnn_hf.policies import ConfidenceThreshold
from jeidnn_hf.sources import load_source
from jeidnn_hf.splits import SplitInfo, Splits

ROOT = Path(__file__).parents[1]
BASE = {
    "backbone": "resnet20_cifar", "num_labels": 4, "image_size": 16, "exit_stages": [2, 5, 8], "recipe": "paper",
    "exit_pooling": ["avg1"], "lam": 0.5,
}  # fmt: skip
TRAIN = "train-00000-of-00001.parquet"
NAN = float("nan")
PREPROCESSING = Preprocessing(16, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)


@pytest.fixture(autouse=True)
def no_data_at_hand(monkeypatch):
    monkeypatch.delenv("JEIDNN_DATA_DIR", raising=False)


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(call, *parts: str) -> None:
    """``call`` raises one of the errors meant for people, in one line with all the ``parts``."""
    with pytest.raises((ValueError, OSError)) as caught:
        call()
    message = str(caught.value)
    if not isinstance(caught.value, FileNotFoundError):  # Python's own says which file
        assert message.startswith("Expected ") and " but " in message, message
    assert "\n" not in message and all(part in message for part in parts), message


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A whole checkpoint, the backbone in it."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("saved")
    JEIDNNForImageClassification(JEIDNNConfig(**BASE)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(saved):
    return JEIDNNForImageClassification.from_pretrained(saved).eval()


@pytest.fixture
def checkpoint(saved, tmp_path) -> Path:
    """A copy of it to spoil."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


# ---- configs


CONFIGS = [
    ({"recipe": "best"}, "recipe", "'best'", "paper"),
    ({"recipe": ["paper"]}, "recipe", "['paper']"),
    ({"backbone": 5}, "backbone", "5"),
    ({"backbone": "resnet20_cifr"}, "'resnet20_cifr'", "resnet20_cifar"),
    ({"num_labels": "4"}, "num_labels", "'4'"),
    ({"num_labels": 1}, "num_labels", "got 1"),
    ({"image_size": -1}, "image_size", "-1"),
    ({"image_size": True}, "image_size", "True"),
    ({"num_channels": 2.5}, "num_channels", "2.5"),
    ({"exit_stages": [0, 99]}, "exit_stages", "99"),
    ({"exit_stages": "all"}, "exit_stages"),
    ({"exit_pooling": ["avg3"]}, "exit_pooling", "avg3", "avg2"),
    ({"exit_pooling": 7}, "exit_pooling", "got 7"),
    ({"exit_head": {}}, "exit_head", "{}", "linear"),
    ({"head_dim": 0}, "head_dim", "got 0"),
    ({"ensemble": "yes"}, "ensemble", "'yes'", "bool"),
    ({"native_head": "false"}, "native_head", "'false'", "bool"),
    ({"gate": "tree"}, "gate", "'tree'", "shared"),
    ({"gate_form": 1}, "gate_form", "got 1", "stick"),
    ({"exit_rule": "mean"}, "exit_rule", "'mean'", "median"),
    ({"exit_threshold": NAN}, "exit_threshold", "nan", "[0, 1)"),
    ({"task_cost": "hinge"}, "task_cost", "'hinge'", "brier"),
    ({"lam": -1}, "lambda", "-1"),
    ({"lam": NAN}, "lambda", "nan"),
    ({"lam": True}, "lambda", "True"),
    ({"lam": "0.5"}, "lambda", "'0.5'"),
    ({"lam": [1, 0.1]}, "0 < low < high", "[1, 0.1]"),
    ({"current_lam": 3.0}, "0.5", "got 3"),
    ({"mul_adds": 5}, "mul_adds", "got 5"),
    ({"mul_adds": {}}, "mul_adds", "{}"),
    ({"mul_adds": {"backbone": "abc"}}, "mul_adds", "abc"),
    ({"mul_adds": {"backbone": [3, 2, 1]}}, "mul_adds", "[3, 2, 1]"),
    ({"mul_adds": {"backbone": [1, 2]}}, "mul_adds", "3 exits", "got 2"),
    ({"format_version": 99}, "format", "99", "update"),
    ({"format_version": "1"}, "format", "'1'"),
    ({"id2label": 5}, "id2label", "got 5"),
    ({"id2label": {0: "a"}}, "id2label", "num_labels=4"),
    ({"id2label": {"x": "a", "y": "b", "z": "c", "w": "d"}}, "id2label", "'x'"),
    ({"id2label": {0: "a", 1: "b", 2: "c", 7: "d"}}, "id2label", "7"),
    ({"backbone_kwargs": [1]}, "backbone_kwargs", "[1]"),
    ({"backbone_kwargs": {"nope": 1}}, "resnet20_cifar", "nope"),
    ({"backbone_weights": 5}, "backbone_weights", "got 5"),
]


@pytest.mark.parametrize("case", CONFIGS, ids=lambda case: str(case[0]))
def test_configs(case):
    options, *parts = case
    refused(lambda: JEIDNNForImageClassification(JEIDNNConfig(**{**BASE, **options})), *parts)


# ---- checkpoints


def _edit_json(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def _first_weight(tensors, value):
    tensors["heads.modules_by_exit.0.weight"] = value(tensors["heads.modules_by_exit.0.weight"])


def _as_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _as_pickle(name: str):
    def spoil(folder: Path) -> None:
        torch.save(load_file(folder / "model.safetensors"), folder / name)
        (folder / "model.safetensors").unlink()

    return spoil


def _weights(change):
    return lambda folder: (folder / "model.safetensors").write_bytes(
        change((folder / "model.safetensors").read_bytes())
    )


def _config(content: bytes):
    return lambda folder: (folder / "config.json").write_bytes(content)


CHECKPOINTS = {
    "config, broken JSON": (_config(b'{"model_type": "jeidnn",'), "config.json"),
    "config, empty": (_config(b""), "config.json"),
    "config, a list": (_config(b"[1, 2]"), "config.json"),
    "config, null": (_config(b"null"), "config.json"),
    "config, not UTF-8": (_config(b'{"recipe": "\xff\xfe"}'), "config.json"),
    "config, a directory": (lambda folder: _as_directory(folder / "config.json"), "config.json"),
    "config, missing": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "config, unknown recipe": (lambda folder: _edit_json(folder / "config.json", recipe="best"), "recipe", "'best'"),
    "config, of the future": (lambda folder: _edit_json(folder / "config.json", format_version=7), "format", "7"),
    "config, mul_adds": (lambda folder: _edit_json(folder / "config.json", mul_adds={"backbone": 1}), "mul_adds"),
    "config, id2label": (lambda folder: _edit_json(folder / "config.json", id2label=[1]), "id2label", "[1]"),
    "config, other backbone": (
        lambda folder: _edit_json(folder / "config.json", backbone="resnet32_cifar", exit_stages=[2, 5, 14]),
        "missing keys",
    ),
    "config, unknown backbone": (lambda folder: _edit_json(folder / "config.json", backbone="nope"), "'nope'"),
    "weights, truncated": (_weights(lambda content: content[:-100]), "complete weights"),
    "weights, truncated header": (_weights(lambda content: content[:40]), "complete weights"),
    "weights, zero bytes": (_weights(lambda content: b""), "complete weights"),
    "weights, a web page": (_weights(lambda content: b"<!DOCTYPE html><html>404</html>"), "complete weights"),
    "weights, missing": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "weights, a directory": (lambda folder: _as_directory(folder / "model.safetensors"), "model.safetensors"),
    "weights, a pickle .bin": (_as_pickle("pytorch_model.bin"), "model.safetensors"),
    "weights, a pickle .pt": (_as_pickle("model.pt"), "model.safetensors"),
    "weights, a pickle under that name": (_as_pickle("model.safetensors.tmp"), "model.safetensors"),
    "weights, other shapes": (
        lambda folder: _edit_tensors(folder, lambda t: _first_weight(t, lambda w: w[:, :3].clone())), "shape", "(4, 3)",
    ),
    "weights, keys missing": (
        lambda folder: _edit_tensors(folder, lambda t: t.pop("policy.gates.weight")), "missing", "policy.gates.weight",
    ),
    "weights, keys too many": (
        lambda folder: _edit_tensors(folder, lambda t: t.update(more=torch.ones(2))), "unexpected", "more",
    ),
    "weights, NaN": (lambda folder: _edit_tensors(folder, lambda t: _first_weight(t, lambda w: w * NAN)), "NaN"),
    "no such folder": (lambda folder: folder.rename(folder.with_name("gone")), "model"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(checkpoint, name):
    spoil, *parts = CHECKPOINTS[name]
    spoil(checkpoint)
    refused(lambda: JEIDNNForImageClassification.from_pretrained(checkpoint), *parts)


# ---- weights of backbones


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("code-was-run",)


def _backbone_state() -> dict:
    return build_model("resnet20_cifar", num_classes=4).state_dict()


WEIGHTS = {
    "truncated.safetensors": lambda p: (save_file(_backbone_state(), p), p.write_bytes(p.read_bytes()[:5000])),
    "empty.safetensors": lambda p: p.write_bytes(b""),
    "empty.pth": lambda p: p.write_bytes(b""),
    "page.pth": lambda p: p.write_bytes(b"<!DOCTYPE html><html>404</html>"),
    "page.safetensors": lambda p: p.write_bytes(b"<!DOCTYPE html><html>404</html>"),
    "code.pth": lambda p: p.write_bytes(pickle.dumps(Malicious())),
    "list.pth": lambda p: torch.save([torch.ones(2)], p),
    "other.pth": lambda p: torch.save(build_model("resnet32_cifar", num_classes=4).state_dict(), p),
    "shapes.safetensors": lambda p: save_file(build_model("resnet20_cifar", num_classes=7).state_dict(), p),
    "folder.safetensors": lambda p: p.mkdir(),
    "missing.safetensors": lambda p: None,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_backbones(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    WEIGHTS[name](tmp_path / name)
    options = {key: value for key, value in BASE.items() if key != "backbone"}
    load = JEIDNNForImageClassification.from_backbone_pretrained
    refused(lambda: load(BASE["backbone"], weights=tmp_path / name, **options), name)
    assert not (tmp_path / "code-was-run").exists()


# ---- calls of the model


IMAGES, FEATURES, LABELS = torch.zeros(2, 3, 16, 16), torch.zeros(2, 52), torch.tensor([0, 3])
CALLS = {
    "no input": ({}, "either pixel_values or exit_features"),
    "both inputs": ({"pixel_values": IMAGES, "exit_features": FEATURES}, "either"),
    "pixels, NaN": ({"pixel_values": IMAGES * NAN}, "pixel_values", "NaN"),
    "pixels, infinite": ({"pixel_values": IMAGES + float("inf")}, "pixel_values", "infinity"),
    "pixels, bytes": ({"pixel_values": IMAGES.byte()}, "pixel_values", "uint8"),
    "pixels, grey": ({"pixel_values": IMAGES[:, :1]}, "(batch, 3, 16, 16)", "(2, 1, 16, 16)"),
    "pixels, another size": ({"pixel_values": torch.zeros(2, 3, 32, 32)}, "(batch, 3, 16, 16)", "(2, 3, 32, 32)"),
    "pixels, one image without a batch": ({"pixel_values": IMAGES[0]}, "(batch, 3, 16, 16)", "(3, 16, 16)"),
    "pixels, one number": ({"pixel_values": torch.tensor(1.0)}, "pixel_values", "()"),
    "pixels, numpy": ({"pixel_values": IMAGES.numpy()}, "pixel_values", "ndarray"),
    "features, NaN": ({"exit_features": FEATURES * NAN}, "exit_features", "NaN"),
    "features, too narrow": ({"exit_features": FEATURES[:, :7]}, "(batch, 52)", "(2, 7)"),
    "features, an exit too few": ({"exit_features": list(FEATURES.split([16, 36], 1))}, "exit_features", "(2, 36)"),
    "features, whole numbers": ({"exit_features": FEATURES.long()}, "exit_features", "int64"),
    "features, none": ({"exit_features": []}, "exit_features", "[]"),
    "features, lists": ({"exit_features": [[0.0] * 16, [0.0] * 32, [0.0] * 4]}, "exit_features", "list"),
    "labels, too large": ({"pixel_values": IMAGES, "labels": LABELS + 1}, "0..3", "got 4"),
    "labels, negative": ({"pixel_values": IMAGES, "labels": LABELS - 1}, "0..3", "got -1"),
    "labels, fractions": ({"pixel_values": IMAGES, "labels": LABELS.float()}, "integer labels", "float32"),
    "labels, too few": ({"pixel_values": IMAGES, "labels": LABELS[:1]}, "(2,)", "(1,)"),
    "labels, names": ({"pixel_values": IMAGES, "labels": ["cat", "dog"]}, "labels", "list"),
    "lambda, NaN": ({"pixel_values": IMAGES, "lam": NAN}, "lambda", "nan"),
    "lambda, negative": ({"pixel_values": IMAGES, "lam": -0.5}, "lambda", "-0.5"),
    "lambda, another": ({"pixel_values": IMAGES, "lam": 0.7}, "0.5", "0.7"),
    "lambda, true": ({"pixel_values": IMAGES, "lam": True}, "lambda", "True"),
    "lambda, text": ({"pixel_values": IMAGES, "lam": "low"}, "lambda", "'low'"),
    "lambda, three for two": ({"pixel_values": IMAGES, "lam": torch.full((3,), 0.5)}, "(2,)", "(3,)"),
    "lambda, none of none": ({"pixel_values": IMAGES, "lam": torch.zeros(0)}, "(2,)", "(0,)"),
}


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_calls(model, name):
    arguments, *parts = CALLS[name]
    refused(lambda: model(**arguments), *parts)


# ---- data sets


def png(colour: int) -> dict:
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (32, 32), (colour, 0, 0)).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_cifar(folder: Path, image="img", label="label", spoil=None) -> Path:
    """30 images a split, 3 of each class."""
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        pictures, labels = [png(i) for i in range(30)], [i % 10 for i in range(30)]
        if spoil and split == "train":
            spoil(pictures, labels)
        rows = datasets.Dataset.from_dict({image: pictures, label: labels})
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


@pytest.fixture(scope="module")
def cifar(tmp_path_factory) -> Path:
    return write_cifar(tmp_path_factory.mktemp("cifar") / "cifar10")


def _read_all(folder: Path) -> None:
    rows = load_source("cifar10", data_dir=folder)["train"]
    ImageView(rows, range(len(rows)), PREPROCESSING).__getitems__(range(30))


def _put(which: str, row: int, value):
    return lambda pictures, labels: (pictures if which == "picture" else labels).__setitem__(row, value)


DATA = {
    "missing folder": (lambda folder: None, "train", "none at"),
    "empty folder": (lambda folder: folder.mkdir(), "train", "none at"),
    "not parquet": (
        lambda folder: (write_cifar(folder), (folder / TRAIN).write_bytes(b"PAR0" * 9)), "parquet",
    ),
    "truncated parquet": (
        lambda folder: (write_cifar(folder), os.truncate(folder / TRAIN, 500)), "parquet",
    ),
    "other image column": (lambda folder: write_cifar(folder, image="pixels"), "img", "pixels"),
    "other label column": (lambda folder: write_cifar(folder, label="class"), "label", "class"),
    "label too large": (lambda folder: write_cifar(folder, spoil=_put("label", 3, 10)), "[0, 10)", "got 10", "row 3"),
    "label empty": (lambda folder: write_cifar(folder, spoil=_put("label", 3, None)), "[0, 10)", "row 3"),
    "picture corrupted": (
        lambda folder: write_cifar(folder, spoil=_put("picture", 5, {"bytes": b"\x89PNG nothing", "path": None})),
        "picture", "row 5",
    ),
    "picture cut": (
        lambda folder: write_cifar(folder, spoil=_put("picture", 5, {"bytes": png(0)["bytes"][:60], "path": None})),
        "picture", "row 5",
    ),
    "picture empty": (lambda folder: write_cifar(folder, spoil=_put("picture", 5, None)), "picture", "row 5"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_data_sets(tmp_path, name):
    spoil, *parts = DATA[name]
    spoil(tmp_path / "data")
    refused(lambda: _read_all(tmp_path / "data"), *parts)


def test_an_unknown_data_set():
    refused(lambda: load_source("cifar11"), "'cifar11'", "cifar10")


# ---- saved files: feature caches, records, splits, reports


@pytest.fixture(scope="module")
def cache(model, cifar, tmp_path_factory) -> tuple:
    """A cache file, and the view and folder that it was made from."""
    images = ImageView(
        load_source("cifar10", data_dir=cifar)["train"], range(8), PREPROCESSING
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("cache")
    cache_features(model.backbone, images, "split", folder)
    (path,) = folder.glob("*.safetensors")
    return path, images, folder


def _cache_key(path: Path, **changes) -> None:
    with_header = load_file(path)
    key = {**FeatureCache(path).key, **changes}
    save_file(with_header, path, {"format": "pt", "key": json.dumps(key)})


CACHES = {
    "of another backbone": (lambda path: _cache_key(path, backbone="0" * 64), "backbone"),
    "of other preprocessing": (lambda path: _cache_key(path, preprocessing="0" * 64), "preprocessing"),
    "of other exits": (lambda path: _cache_key(path, exit_stages=[1, 8]), "exit_stages"),
    "truncated": (lambda path: os.truncate(path, path.stat().st_size - 9), "feature cache"),
    "empty": (lambda path: path.write_bytes(b""), "feature cache"),
    "without a key": (lambda path: save_file(load_file(path), path), "feature cache"),
    "key of no sense": (lambda path: save_file(load_file(path), path, {"key": "[1]"}), "feature cache"),
    "without labels": (
        lambda path: save_file({"features": torch.ones(8, 52), "index": torch.arange(8)}, path, {"key": "{}"}),
        "labels",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CACHES)
def test_feature_caches(model, cache, tmp_path, name):
    path, images, _ = cache
    (tmp_path / path.name).write_bytes(path.read_bytes())
    spoil, *parts = CACHES[name]
    spoil(tmp_path / path.name)
    before = snapshot(tmp_path)
    refused(lambda: CachedFeatures([cache_features(model.backbone, images, "split", tmp_path)]), path.name, *parts)
    assert {k: v for k, v in snapshot(tmp_path).items() if not k.endswith(".lock")} == before


@pytest.fixture
def files(tmp_path) -> Path:
    """A record, splits and a report, to spoil."""
    costs = ExitCosts((10, 20), (0, 0), (1, 1), (1, 1))
    record = ExitRecord(torch.zeros(3, 2, 4), torch.tensor([0, 1, 3]), costs, SplitInfo("d", "test", "test", 3, "0"))
    record.save(tmp_path)
    Splits("d", 0, {"train": ("train", [0, 1, 2]), "test": ("test", [0, 1])}).save(tmp_path / "splits.json")
    evaluate(record, ConfidenceThreshold(torch.ones(2), 0.5)).save(tmp_path / "report.json")
    return tmp_path


def _splits(change):
    def spoil(folder: Path) -> None:
        saved = json.loads((folder / "splits.json").read_text())
        change(saved)
        (folder / "splits.json").write_text(json.dumps(saved))

    return spoil


def _record(**changes):
    return lambda folder: save_file(
        {**load_file(folder / "record.safetensors"), **changes}, folder / "record.safetensors"
    )


def _write(name: str, content: bytes):
    return lambda folder: (folder / name).write_bytes(content)


READ = {
    "record": lambda folder: ExitRecord.load(folder),
    "splits": lambda folder: Splits.load(folder / "splits.json"),
    "report": lambda folder: EvaluationReport.load(folder / "report.json"),
}
FILES = {
    "record, truncated": (lambda folder: os.truncate(folder / "record.safetensors", 30), "ExitRecord"),
    "record, NaN": (_record(logits=torch.full((3, 2, 4), NAN)), "ExitRecord", "NaN"),
    "record, other labels": (_record(labels=torch.tensor([0, 1, 4])), "ExitRecord", "0..3"),
    "record, one exit more": (_record(logits=torch.zeros(3, 3, 4)), "ExitRecord", "3 exits"),
    "record, labels as fractions": (_record(labels=torch.tensor([0.0, 1.5, 3.0])), "ExitRecord", "integer"),
    "record, logits as bytes": (_record(logits=torch.zeros(3, 2, 4, dtype=torch.uint8)), "ExitRecord", "uint8"),
    "record, broken JSON": (_write("record.json", b"{"), "ExitRecord"),
    "record, no costs": (_write("record.json", b"{}"), "ExitRecord", "costs"),
    "record, missing": (lambda folder: (folder / "record.json").unlink(), "ExitRecord", "record.json"),
    "splits, rows edited": (_splits(lambda s: s["roles"]["train"]["indices"].append(7)), "sha256", "train"),
    "splits, rows twice": (_splits(lambda s: s["roles"]["train"]["indices"].append(1)), "disjoint", "row 1"),
    "splits, overlapping": (
        _splits(lambda s: s["roles"].update(validation={**s["roles"]["train"]})), "disjoint", "row 0",
    ),
    "splits, unknown role": (_splits(lambda s: s["roles"].update(dev={**s["roles"]["test"]})), "roles", "dev"),
    "splits, a list": (_write("splits.json", b"[]"), "Splits.save"),
    "splits, empty": (_write("splits.json", b""), "Splits.save"),
    "splits, missing": (lambda folder: (folder / "splits.json").unlink(), "splits.json"),
    "splits, not UTF-8": (_write("splits.json", b"\xff\xfe"), "Splits.save"),
    "report, another schema": (lambda folder: _edit_json(folder / "report.json", schema_version=9), "schema 2", "9"),
    "report, broken JSON": (_write("report.json", b'{"lam": '), "report.json"),
    "report, a list": (_write("report.json", b"[]"), "report.json"),
    "report, a field too many": (lambda folder: _edit_json(folder / "report.json", more=1), "report.json", "more"),
    "report, text for a number": (lambda folder: _edit_json(folder / "report.json", accuracy="high"), "accuracy"),
    "report, missing": (lambda folder: (folder / "report.json").unlink(), "report.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_saved_files(files, name):
    spoil, *parts = FILES[name]
    spoil(files)
    refused(lambda: READ[name.split(",")[0]](files), *parts)


# ---- the examples' YAML files and command lines


def example(name: str):
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module.main


def failed(capfd, name: str, status: int, *parts: str) -> None:
    """A command ended as commands do: with its status, in one line on stderr after the libraries' warnings."""
    errors = capfd.readouterr().err
    assert status == 1 and "Traceback" not in errors, errors
    (line,) = [line for line in errors.splitlines() if line.startswith(f"{name}: ")]
    assert errors.rstrip().endswith(line) and all(part in line for part in parts), errors


@pytest.fixture(scope="module")
def backbone(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "backbone.safetensors"
    save_file(build_model("resnet20_cifar", num_classes=10).state_dict(), path)
    return path


def train_config(cifar: Path, backbone: Path) -> dict:
    splits = {"held_out": "test", "validation": 10, "calibration": 10, "seed": 0}
    return {
        "data": {"dataset": "cifar10", "data_dir": str(cifar), "splits": splits},
        "model": {"backbone": "resnet20_cifar", "weights": str(backbone), "exit_stages": [2, 5, 8]},
        "training": {"report_to": "none", "use_cpu": True, "disable_tqdm": True},
        "runs": {"one": {"model": {"recipe": "default"}, "training": {"num_train_epochs": 1}}},
    }


def finetune_config(cifar: Path, backbone: Path) -> dict:
    config = train_config(cifar, backbone)
    config["model"] = {"backbone": "resnet20_cifar", "weights": str(backbone)}
    del config["runs"]
    return config


YAMLS = {
    "broken": ("data: [", "YAML"),
    "empty": ("", "mapping", "None"),
    "a list": ("- 1\n- 2", "mapping"),
    "text": ("cifar10", "mapping"),
    "not UTF-8": (b"data: \xff", "YAML"),
    "no data": ({"data": ...}, "['data']"),
    "no model": ({"model": ...}, "['model']"),
    "an unknown section": ({"dta": {}}, "dta", "data"),
    "data, null": ({"data": None}, "data", "None"),
    "data, no name": ({"data.dataset": ...}, "['dataset']"),
    "data, an unknown name": ({"data.dataset": "mnist", "data.data_dir": None}, "'mnist'", "cifar10"),
    "data, an unknown key": ({"data.view": 2}, "view", "views"),
    "data, text for a number": ({"data.views": "two"}, "views", "'two'"),
    "data, missing folder": ({"data.data_dir": "/nowhere"}, "/nowhere"),
    "splits, an unknown key": ({"data.splits.valid": 5}, "valid", "validation"),
    "splits, too large": ({"data.splits.validation": 99}, "validation", "99"),
    "splits, text": ({"data.splits.validation": "ten"}, "validation", "'ten'"),
    "splits, no such source": ({"data.splits.held_out": "dev"}, "held_out", "'dev'"),
    "model, no backbone": ({"model.backbone": ...}, "backbone"),
    "model, unknown backbone": ({"model.backbone": "resnet21_cifar"}, "'resnet21_cifar'"),
    "model, missing weights": ({"model.weights": "/nowhere.safetensors"}, "/nowhere.safetensors"),
    "training, an unknown key": ({"training.epochs": 5}, "epochs", "num_train_epochs"),
    "training, text for a number": ({"training.learning_rate": "1e-3"}, "learning_rate", "'1e-3'"),
    "training, no such strategy": ({"training.save_strategy": "often"}, "often"),
}
TRAIN_YAMLS = {
    "model, an unknown key": ({"model.exit_stage": [1]}, "exit_stage", "exit_stages"),
    "model, wrong type": ({"model.head_dim": "wide"}, "head_dim", "wide"),
    "no runs": ({"runs": ...}, "['runs']"),
    "runs, a list": ({"runs": ["one"]}, "runs", "['one']"),
    "runs, one without content": ({"runs.one": None}, "one", "None"),
    "runs, an unknown key": ({"runs.one.modle": {}}, "modle", "model"),
    "runs, an unknown recipe": ({"runs.one.model.recipe": "best"}, "'best'"),
    "runs, training wrong": ({"runs.one.training.schedule": "cosine"}, "schedule", "one_cycle"),
    "runs, negative epochs": ({"runs.one.training.num_train_epochs": -1}, "num_train_epochs", "-1"),
}
FINETUNE_YAMLS = {
    "model, an unknown key": ({"model.mix": 0.2}, "mix", "mixup"),
    "model, unknown optimizer": ({"model.optimizer": "lion"}, "optimizer", "lion", "sgd"),
    "model, preprocessing": ({"model.preprocessing": {"crop": 1}}, "crop"),
    "model, no weights": ({"model.weights": ...}, "weights"),
}
ALL_YAMLS = [("train", name, case) for name, case in {**YAMLS, **TRAIN_YAMLS}.items()]
ALL_YAMLS += [("finetune_backbone", name, case) for name, case in {**YAMLS, **FINETUNE_YAMLS}.items()]


def changed(config: dict, changes: dict) -> dict:
    for path, value in changes.items():
        *way, last = path.split(".")
        place = config
        for key in way:
            place = place[key]
        place.pop(last, None)
        if value is not ...:
            place[last] = value
    return config


@pytest.mark.parametrize(("script", "name", "case"), ALL_YAMLS, ids=lambda x: x if isinstance(x, str) else "")
def test_yaml_files(cifar, backbone, tmp_path, capfd, script, name, case):
    content, *parts = case
    if isinstance(content, dict):
        make = train_config if script == "train" else finetune_config
        content = yaml.safe_dump(changed(make(cifar, backbone), content))
    (tmp_path / "run.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    out = tmp_path / "out"
    status = example(script)(["--config", str(tmp_path / "run.yaml"), "--output_dir", str(out)])
    failed(capfd, f"{script}.py", status, *parts)
    left = snapshot(out) if out.exists() else {}
    assert left.keys() <= {"config.yaml", "splits.json"}  # whole files
    if left:
        Splits.load(out / "splits.json")


def test_the_examples_command_lines(cifar, backbone, tmp_path, capfd):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(train_config(cifar, backbone)))
    for script in ("train", "finetune_backbone"):
        status = example(script)(["--config", str(tmp_path / "absent.yaml"), "--output_dir", str(tmp_path / "out")])
        failed(capfd, f"{script}.py", status, "absent.yaml")
        status = example(script)(["--config", str(tmp_path)])
        failed(capfd, f"{script}.py", status, str(tmp_path))
    status = example("train")(["--config", str(config)])
    failed(capfd, "train.py", status, "output_dir")
    status = example("train")(["--config", str(config), "--output_dir", str(tmp_path / "out"), "--only", "two"])
    failed(capfd, "train.py", status, "'two'", "'one'")
    status = example("train")(["--config", str(config), "--output_dir", str(config)])
    failed(capfd, "train.py", status, str(config))
    assert snapshot(tmp_path).keys() == {"run.yaml"}


EVALUATED = {
    "a missing folder": (lambda folder: None, [], "config.yaml"),
    "an empty folder": (lambda folder: folder.mkdir(), [], "config.yaml"),
    "no splits": (lambda folder: (folder / "splits.json").unlink(), [], "splits.json"),
    "edited splits": (lambda folder: (folder / "splits.json").write_text("{}"), [], "splits.json"),
    "no models": (lambda folder: None, [], "models", "train.py"),
    "a broken model": (lambda folder: _broken_model(folder), ["--json"], "run/one"),
    "a broken config": (lambda folder: (folder / "config.yaml").write_text("data: 5"), [], "config.yaml"),
    "no lambdas": (lambda folder: None, ["--num-lambdas", "0"], "num_lambdas", "0"),
}


def _broken_model(folder: Path) -> None:
    (folder / "one").mkdir()
    (folder / "one" / "model.safetensors").write_bytes(b"")


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluate(cifar, backbone, tmp_path, capfd, name):
    spoil, options, *parts = EVALUATED[name]
    folder = tmp_path / "run"
    if "folder" not in name:
        folder.mkdir()
        (folder / "config.yaml").write_text(yaml.safe_dump({**train_config(cifar, backbone), "output_dir": "x"}))
        Splits("cifar10", 0, {"train": ("train", range(30)), "test": ("test", range(30))}).save(folder / "splits.json")
    spoil(folder)
    before = snapshot(tmp_path)
    failed(capfd, "jeidnn evaluate", main(["evaluate", str(folder), *options]), *parts)
    assert snapshot(tmp_path) == before


# ---- jeidnn


def _t2t(path: Path, **changes) -> None:
    torch.save({"pos_embed": torch.zeros(1, 5, 256), "head.weight": torch.zeros(4, 256), **changes}, path)


COMMANDS = {
    "unknown model": (["costs", "--backbone", "nope", "--num-classes", "10"], "'nope'"),
    "unknown recipe": (["costs", "--backbone", "resnet20_cifar", "--num-classes", "10", "--recipe", "x"], "'x'"),
    "one class": (["costs", "--backbone", "resnet20_cifar", "--num-classes", "1"], "num_labels", "1"),
    "no pixels": (["costs", "--backbone", "resnet20_cifar", "--num-classes", "9", "--image-size", "-3"], "-3"),
    "unknown module": (["backbones", "--module", "nope"], "nope"),
    "convert, missing file": (["convert", "absent.pth", "out", "--backbone", "t2t_vit_7"], "absent.pth"),
    "convert, a folder": (["convert", ".", "out", "--backbone", "t2t_vit_7"], "weights file"),
    "convert, garbage": (["convert", "garbage.pth", "out", "--backbone", "t2t_vit_7"], "garbage.pth"),
    "convert, code": (["convert", "code.pth", "out", "--backbone", "t2t_vit_7"], "code.pth"),
    "convert, other net": (["convert", "other.pth", "out", "--backbone", "t2t_vit_7"], "pos_embed"),
    "convert, parts": (["convert", "parts.pth", "out", "--backbone", "t2t_vit_7"], "parts.pth"),
    "convert, odd table": (["convert", "odd.pth", "out", "--backbone", "t2t_vit_7"], "pos_embed"),
    "convert, no lambda": (["convert", "exits.pth", "out", "--backbone", "t2t_vit_7"], "lambda"),
    "convert, lambda": (["convert", "exits.pth", "out", "--backbone", "t2t_vit_7", "--lam", "-1"], "-1"),
    "convert, unknown": (["convert", "parts.pth", "out", "--backbone", "t2t_vit_99"], "'t2t_vit_99'"),
    "convert, not T2T": (["convert", "parts.pth", "out", "--backbone", "resnet20_cifar"], "parts.pth"),
    "demo into a file": (["demo", "--output_dir", "garbage.pth"], "garbage.pth"),
    "demo below a file": (["demo", "--output_dir", "garbage.pth/out"], "garbage.pth"),
}


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "garbage.pth").write_bytes(np.random.default_rng(0).bytes(2000))
    (tmp_path / "code.pth").write_bytes(pickle.dumps(Malicious()))
    torch.save(_backbone_state(), tmp_path / "other.pth")
    _t2t(tmp_path / "parts.pth")
    _t2t(tmp_path / "odd.pth", pos_embed=torch.zeros(3))
    _t2t(tmp_path / "exits.pth", **{"gates.0.linear.weight": torch.zeros(1, 4)})
    return tmp_path


@pytest.mark.parametrize("name", COMMANDS)
def test_commands(folder, capfd, name):
    arguments, *parts = COMMANDS[name]
    before = snapshot(folder)
    failed(capfd, f"jeidnn {arguments[0]}", main(arguments), *parts)
    assert snapshot(folder) == before and sorted(p.name for p in folder.iterdir()) == sorted(before)


@pytest.mark.parametrize(
    "arguments",
    [["prices"], ["costs"], ["costs", "--backbone", "x", "--num-classes", "ten"], ["demo", "--seed", "1.5"],
     ["convert"],     ["convert", "a", "b", "--backbone", "t2t_vit_7", "--lam", "low"], ["backbones", "--modul"]],
)  # fmt: skip
def test_wrong_usage(folder, capfd, arguments):
    before = snapshot(folder)
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    errors = capfd.readouterr().err
    assert exit_.value.code == 2 and "usage: jeidnn" in errors and "Traceback" not in errors
    assert snapshot(folder) == before


def test_in_a_process_of_its_own(folder):
    before = snapshot(folder)
    answer = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "train.py"), "--config", "garbage.pth"],
        capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
    )  # fmt: skip
    assert answer.returncode == 1 and answer.stdout == "" and "Traceback" not in answer.stderr
    assert answer.stderr.splitlines()[-1].startswith("train.py: Expected a YAML file at 'garbage.pth', but ")
    assert snapshot(folder) == before
