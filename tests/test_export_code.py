"""A checkpoint with its code loads where this package is not, and answers the same."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from hub_server import LocalHub
from jeidnn_hf import JEIDNNForImageClassification
from jeidnn_hf.export_code import export_code, flat_modules
from small_models import operating_point, pictures, pixels, small_model

ELSEWHERE = """
import sys
sys.modules["jeidnn_hf"] = None  # as if it were not installed
import PIL.Image
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline

name = sys.argv[1]
for load in (AutoModelForImageClassification, AutoImageProcessor):
    try:
        load.from_pretrained(name, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise AssertionError("loaded without trust")
model = AutoModelForImageClassification.from_pretrained(name, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=True)
images = [PIL.Image.open(path) for path in sorted(Path(sys.argv[2]).glob("*.png"))]
values = processor(images, return_tensors="pt")["pixel_values"]
answer = dict(model.predict_sets(values, alpha=0.1))
assert pipeline("image-classification", model=name, trust_remote_code=True)(images[0])[0]["label"]
model.save_pretrained("again")
again = AutoModelForImageClassification.from_pretrained("again", trust_remote_code=True)
assert (again(values).logits == model(values).logits).all()
save_file({"pixel_values": values, **answer}, "answer.safetensors")
"""


def test_a_checkpoint_loads_without_the_package_and_answers_the_same(tmp_path):
    folder, shown, elsewhere = tmp_path / "model", tmp_path / "shown", tmp_path / "elsewhere"
    shown.mkdir(), elsewhere.mkdir()
    model = small_model("resnet20_cifar", exit_stages=[1, 4, 8])
    model.operating_point = operating_point(model)
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    written = export_code(folder)
    assert sorted(written) == sorted(folder.glob("*.py")) and folder / "backbones_resnet_cifar.py" in written
    changed = json.loads((folder / "config.json").read_text())
    assert changed.pop("auto_map")["AutoConfig"] == "configuration_jeidnn.JEIDNNConfig" and changed == config
    for number, image in enumerate(pictures(24, seed=9)):
        image.save(shown / f"{number:02}.png")
    with LocalHub() as hub:
        hub.add("org/with-code", {path.name: path.read_bytes() for path in folder.iterdir()})
        command = [sys.executable, "-c", ELSEWHERE, "org/with-code", str(shown)]
        options = {"cwd": elsewhere, "env": hub.env(elsewhere / "home"), "timeout": 300}
        done = subprocess.run(command, capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr
    answer, values = load_file(elsewhere / "answer.safetensors"), pixels(model, 24, seed=9)
    expected = model.predict_sets(values, alpha=0.1)
    assert len(expected.exit_index.unique()) == 3
    assert torch.equal(answer.pop("pixel_values"), values) and answer.keys() == expected.keys()
    for name, tensor in answer.items():
        assert torch.equal(tensor, expected[name]), name

    own = JEIDNNForImageClassification.from_pretrained(folder)  # the package is there: its own code, and no other
    assert type(own) is JEIDNNForImageClassification
    own.save_pretrained(tmp_path / "own")
    assert "auto_map" not in json.loads((tmp_path / "own" / "config.json").read_text())


def test_relative_imports_are_of_one_dot_to_files_that_are_there():
    sources = flat_modules(["modeling_jeidnn"])
    for name, source in sources.items():
        compile(source, name, "exec")
        assert "from .." not in source
        for line in source.splitlines():
            words = line.split()
            if words[:1] == ["from"] and words[1].startswith(".") and words[1] != ".":
                assert words[1][1:] in sources, f"{name}: {line}"
    assert not {"trainer", "data", "sources", "evaluation", "auto", "cli", "hub"} & sources.keys()


def test_only_a_saved_model_gets_code(tmp_path):
    with pytest.raises(ValueError, match="^Expected a saved model in .* but it has no config.json"):
        export_code(tmp_path)
    assert not list(tmp_path.iterdir())
