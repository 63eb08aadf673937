"""The scripts of examples/ one after another, on a stand-in: every step sees the same images."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import datasets
import torch
import yaml
from safetensors.torch import save_file

from jeidnn_hf.backbones import build_model
from jeidnn_hf.data import Preprocessing
from jeidnn_hf.feature_cache import FeatureCache
from stand_ins import write_folder

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(monkeypatch, script, *arguments):
    monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
    try:
        runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    except SystemExit as end:
        assert not end.code


def test_fine_tuning_features_and_evaluation_see_the_same_images(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setenv("JEIDNN_DATA_DIR", str(tmp_path))
    write_folder(tmp_path / "cifar10")
    torch.manual_seed(0)
    save_file(build_model("resnet20_cifar", num_classes=10).state_dict(), tmp_path / "start.safetensors")
    data = {"dataset": "cifar10", "splits": {"validation": 50, "calibration": 20, "train": 60, "test": 40}}
    network = {"backbone": "resnet20_cifar", "image_size": 16, "preprocessing": {"crop_pct": 0.8}}
    backbone = {
        "output_dir": str(tmp_path / "backbone"), "data": data,
        "model": {**network, "weights": str(tmp_path / "start.safetensors")},
        "training": {"num_train_epochs": 1, "per_device_train_batch_size": 30},
    }  # fmt: skip
    training = {"recipe": "paper", "num_train_epochs": 1, "warmup_epochs": 0, "report_to": "none"}
    exits = {
        "output_dir": str(tmp_path / "exits"), "data": {**data, "streaming": True},
        "model": {**network, "weights": str(tmp_path / "backbone" / "backbone.safetensors"), "recipe": "paper"},
        "training": training,
        "runs": {
            "a": {"model": {"exit_stages": [2, 8]}},
            "b": {"model": {"exit_stages": [2, 8], "preprocessing": {"crop_pct": 0.9}}},
        },
    }  # fmt: skip
    for name, config in (("backbone", backbone), ("exits", exits)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(config))
    run(monkeypatch, "finetune_backbone.py", "--config", tmp_path / "backbone.yaml")
    run(monkeypatch, "train.py", "--config", tmp_path / "exits.yaml")

    changed = [Preprocessing.of_backbone("resnet20_cifar", 16, changes={"crop_pct": part}) for part in (0.8, 0.9)]
    assert changed[0].resized_side == 20
    report = json.loads((tmp_path / "backbone" / "backbone.json").read_text())
    assert report["preprocessing"] == json.loads(json.dumps(changed[0].to_dict()))
    sizes = {}
    for step, expected in (("train", [50, 50, 60, 60]), ("evaluate", [40, 40, 50, 50, 60, 60])):
        if step == "evaluate":
            run(monkeypatch, "evaluate.py", tmp_path / "exits", "--speed-images", 16)
        caches = [FeatureCache(path) for path in (tmp_path / "exits" / "cache").glob("*.safetensors")]
        assert sorted(len(cache) for cache in caches) == expected
        for preprocessing in changed:
            own = [cache for cache in caches if cache.key["preprocessing"] == preprocessing.fingerprint]
            sizes[step] = sorted(len(cache) for cache in own)
            assert sizes[step] == expected[::2]
