"""onnx_export.py and onnx_runner.py: the same exits and answers as PyTorch, and folders that are not whole."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification
from jeidnn_hf.cli import main
from jeidnn_hf.onnx_export import export, export_all_exits
from jeidnn_hf.onnx_runner import MANIFEST, OnnxEarlyExit, read_manifest
from jeidnn_hf.policies import ConfidenceThreshold, EENetScheduler, Patience, QuotaThresholds, RandomExits
from small_models import pixels, small_model

STAGES = [0, 4, 8]  # of resnet20: each segment takes seconds to export


@torch.no_grad()
def varied_model(backbone: str = "resnet20_cifar", **options) -> JEIDNNForImageClassification:
    """With random heads and gates of any kind; of whom all reach the exit, about half find its gate open."""
    defaults = {"image_size": 32, "recipe": "paper", "native_head": False, "num_labels": 5, "head_dim": 8}
    if backbone == "resnet20_cifar":
        defaults["exit_stages"] = STAGES
    torch.manual_seed(0)
    model = JEIDNNForImageClassification(JEIDNNConfig(backbone=backbone, **{**defaults, **options})).eval()
    features = model.backbone(pixels(model, 60))
    if model.heads.norms is not None:
        model.heads.set_feature_statistics([z.mean(0) for z in features], [z.std(0) for z in features])
    for head in model.heads.modules_by_exit:
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    if model.heads.ensemble is not None:
        model.heads.ensemble.weight.add_(0.3 * torch.randn(model.heads.ensemble.weight.shape))
        model.heads.ensemble.temperature.uniform_(0.8, 1.5)
    gates = model.policy.gates
    for parameter in gates.parameters():
        parameter.normal_()
    gates.bias.zero_()
    middle = model.policy.gate_logits(model.heads(features), model.config.current_lam).median(0).values
    gates.bias.copy_(-middle)
    return model


def assert_same(model: JEIDNNForImageClassification, runner: OnnxEarlyExit, x: Tensor, lam=None, spread: bool = True):
    with torch.no_grad():
        early = model(x, lam=lam)
        every = model(x, lam=lam, output_all_exits=True)
    found = runner(x.numpy(), lam.numpy() if isinstance(lam, Tensor) else lam)
    assert found.exit_index.tolist() == early.exit_index.tolist() == every.exit_index.tolist()
    assert found.mul_adds.tolist() == early.mul_adds.tolist()
    assert np.abs(found.logits - early.logits.numpy()).max() < 1e-4
    assert (found.logits.argmax(-1) == early.logits.argmax(-1).numpy()).all()
    assert not spread or len(set(found.exit_index.tolist())) > 1


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> tuple[JEIDNNForImageClassification, Path]:
    model = small_model("resnet20_cifar", exit_stages=STAGES)
    folder = tmp_path_factory.mktemp("onnx") / "resnet20"
    export(model, folder)
    return model, folder


def test_a_thousand_images_leave_where_pytorch_lets_them(exported):
    model, folder = exported
    runner, x = OnnxEarlyExit(folder, threads=1), pixels(model, 1000, seed=3)
    assert_same(model, runner, x)
    assert len(set(runner(x.numpy()).exit_index.tolist())) == 3
    for batch in (1, 2, 7):  # the number of images is not built in
        assert_same(model, runner, x[:batch], spread=False)


GRAPHS = {
    "recurrent ensemble shared stick": {
        "exit_head": "recurrent", "ensemble": True, "standardize_features": True, "gate": "shared",
        "gate_form": "stick", "lam": [0.01, 10.0], "exit_pooling": ["avg2", "max2"],
    },
    "mlp cascade cumulative median": {
        "exit_head": "mlp", "cascade": True, "gate_form": "cumulative", "exit_rule": "median",
    },
    "boosting stick median": {"boosting": 0.5, "gate_form": "stick", "exit_rule": "median"},
    "boosting ensemble shared": {
        "boosting": 0.5, "ensemble": True, "exit_head": "recurrent", "standardize_features": True, "gate": "shared",
        "gate_form": "stick", "lam": [0.01, 10.0],
    },
    "native head": {"native_head": True},
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("options", GRAPHS.values(), ids=list(GRAPHS))
def test_heads_and_gates_step_as_in_pytorch(tmp_path, options):
    model = varied_model(**options)
    export(model, tmp_path)
    runner, x = OnnxEarlyExit(tmp_path), pixels(model, 200, seed=3)
    assert_same(model, runner, x)
    if model.config.has_lam_range:
        lams = torch.logspace(-2, 1, 200)
        assert_same(model, runner, x, lams)
        assert_same(model, runner, x, 0.02, spread=False)
        with pytest.raises(ValueError, match=r"lambda in \[0.01, 10\]"):
            runner(x.numpy(), 11.0)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["threshold", "quota", "patience", "eenet"])
def test_policies_step_as_in_pytorch(tmp_path, policy):
    model = small_model("resnet20_cifar", exit_stages=STAGES)
    torch.manual_seed(0)
    if policy == "threshold":
        model.set_policy(ConfidenceThreshold(torch.tensor([0.8, 1.2, 1.0]), 0.6, "margin"))
    elif policy == "quota":
        model.set_policy(QuotaThresholds(torch.ones(3), torch.tensor([0.7, 0.6, 0.0]), "entropy"))
    elif policy == "patience":
        model.set_policy(Patience(3, 1))
    else:
        scheduler = EENetScheduler(3, 5)
        for parameter in scheduler.parameters():
            nn.init.normal_(parameter)
        scheduler.thresholds = torch.tensor([0.1, 0.95, 0.0])
        model.set_policy(scheduler)
    export(model, tmp_path)
    assert_same(model, OnnxEarlyExit(tmp_path), pixels(model, 200, seed=3))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backbone", "options"),
    [
        ("t2t_vit_7", {"image_size": 32, "exit_stages": [1, 6]}),
        ("vit_tiny_patch16_224", {"image_size": 32, "exit_stages": [1, 11]}),
        ("tf_efficientnet_lite0", {"image_size": 96, "exit_stages": [2, 15]}),
        ("convnext_atto", {"image_size": 32, "exit_stages": [3, 11]}),
    ],
)
def test_families(tmp_path, backbone, options):
    model = varied_model(backbone, **options)
    export(model, tmp_path)
    assert_same(model, OnnxEarlyExit(tmp_path), pixels(model, 12, seed=3), spread=False)


@pytest.mark.slow
def test_torch_export_gives_the_same(tmp_path):
    model = small_model("resnet20_cifar", exit_stages=STAGES)
    manifest = export(model, tmp_path, "torch")
    export_all_exits(model, tmp_path / "all.pt2")
    x = pixels(model, 50, seed=3)
    with torch.no_grad():
        expected = model(x, output_all_exits=True)
        logits, exit_index = torch.export.load(tmp_path / "all.pt2").module()(x)
        assert exit_index.equal(expected.exit_index) and torch.allclose(logits, expected.all_logits, atol=1e-4)
        live = [x]
        for l, segment in enumerate(manifest["segments"]):
            logits, *live = torch.export.load(tmp_path / segment["file"]).module()(*live)
            assert torch.allclose(logits, expected.all_logits[:, l], atol=1e-4)
            live = live[1:]
    with pytest.raises(ValueError, match="onnx"):
        OnnxEarlyExit(tmp_path)


def test_all_exits_of_a_checkpoint_for_a_range_of_lambdas(tmp_path):
    """Any number of images, each with a lambda of its own."""
    config = JEIDNNConfig(backbone="resnet20_cifar", num_labels=5, exit_stages=STAGES)
    model = JEIDNNForImageClassification(config).eval()
    export_all_exits(model, tmp_path / "all.pt2")
    program = torch.export.load(tmp_path / "all.pt2").module()
    for count in (1, 7, 20):
        x, lam = pixels(model, count, seed=3), torch.linspace(0.01, 1.0, count)
        with torch.no_grad():
            expected = model(x, lam=lam, output_all_exits=True)
            logits, exit_index = program(x, lam)
        assert exit_index.equal(expected.exit_index) and torch.allclose(logits, expected.all_logits, atol=1e-4)


@pytest.mark.slow
def test_one_segment_for_each_active_exit(tmp_path):
    model = varied_model(exit_head="recurrent", ensemble=True, gate_form="stick", exit_stages=[0, 2, 4, 8])
    model.set_active_exits([1, 3])
    assert [segment["exit"] for segment in export(model, tmp_path)["segments"]] == [1, 3]
    x = pixels(model, 200, seed=3)
    assert_same(model, OnnxEarlyExit(tmp_path), x)
    assert set(OnnxEarlyExit(tmp_path)(x.numpy()).exit_index.tolist()) == {1, 3}


# ---- what is refused


@pytest.mark.parametrize("change", ["sample", "random", "half", "format"])
def test_models_that_cannot_be_exported(tmp_path, change):
    model = small_model("resnet20_cifar", exit_stages=STAGES)
    if change == "sample":
        model.policy.rule = "sample"
    elif change == "random":
        model.set_policy(RandomExits.blank(3, 5))
    elif change == "half":
        model.bfloat16()
    with pytest.raises(ValueError, match={"half": "float32", "format": "format among"}.get(change, "chance|'sample'")):
        export(model, tmp_path / "out", "jit" if change == "format" else "onnx")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    for path in exported[1].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("fault", ["missing", "changed", "version", "list", "short", "no manifest"])
def test_a_folder_that_is_not_whole(copied, fault):
    manifest = json.loads((copied / MANIFEST).read_text())
    if fault == "missing":
        (copied / "segment_01.onnx").unlink()
    elif fault == "changed":
        with open(copied / "segment_01.onnx", "ab") as file:
            file.write(b"x")
    elif fault == "no manifest":
        (copied / MANIFEST).unlink()
    else:
        changed = {"version": manifest | {"version": 99}, "list": [1], "short": manifest | {"segments": []}}
        (copied / MANIFEST).write_text(json.dumps(changed[fault]))
    with pytest.raises(ValueError, match=r"^Expected .* but ") as error:
        OnnxEarlyExit(copied)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda x: x[:, :2], "shape"),
        (lambda x: x[:0], "shape"),
        (lambda x: x.astype(np.float64), "float32"),
        (lambda x: x.tolist(), "numpy array"),
        (lambda x: x * np.where(np.arange(32) == 5, np.nan, 1).astype(np.float32), "NaN"),
    ],
)
def test_bad_pixels(exported, change, match):
    with pytest.raises(ValueError, match=match):
        OnnxEarlyExit(exported[1])(change(pixels(exported[0], 3).numpy()))


def test_bad_lambda(exported):
    runner, x = OnnxEarlyExit(exported[1]), pixels(exported[0], 3).numpy()
    for lam in (runner.manifest["lam"] * 2, float("nan"), np.ones(2)):
        with pytest.raises(ValueError, match="Expected (a lambda|lam)"):
            runner(x, lam)


def test_the_runner_needs_no_torch(exported):
    code = "import sys, jeidnn_hf.onnx_runner as r; r.OnnxEarlyExit(sys.argv[1]); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code, str(exported[1])], check=True)


@pytest.mark.slow
def test_the_command(exported, tmp_path, capsys):
    exported[0].save_pretrained(tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "out"), "--format", "torch", "--json"]) == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest == read_manifest(tmp_path / "out") and (tmp_path / "out" / "all_exits.pt2").exists()
    assert manifest["labels"] == ["ant", "bee", "cat", "dog", "eel"] and manifest["exits"] == [0, 1, 2]
    assert main(["export", str(tmp_path / "model"), str(tmp_path / "other"), "--lam", "77"]) == 1
    assert "lambda" in capsys.readouterr().err and not (tmp_path / "other").exists()
