"""Two processes on one machine (gloo) evaluate to the bit what one does, and train what it does at one global batch."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from jeidnn_hf import JEIDNNTrainingArguments

SCRIPT = '''
import json
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import set_seed

from jeidnn_hf import ExitRecord, JEIDNNConfig, JEIDNNForImageClassification, JEIDNNTrainer, JEIDNNTrainingArguments
from jeidnn_hf.data import ImageView, Preprocessing
from jeidnn_hf.feature_cache import CachedFeatures, FeatureCache, cached_role
from jeidnn_hf.processes import exit_together
from jeidnn_hf.splits import Splits

torch.set_num_threads(1)
folder, state = Path(sys.argv[1]), PartialState(cpu=True)
processes, found, seen = state.num_processes, {}, []


def note(name, tensor):
    found[name] = torch.as_tensor(tensor).clone().contiguous()


def metrics_of(trainer, *data):
    return torch.tensor(list(trainer.evaluate(*data).values()), dtype=torch.float64)


def rows_seen():
    rows = sum(seen)
    seen.clear()
    return rows


for recipe in ("paper", "default"):
    set_seed(0)
    config = JEIDNNConfig(
        backbone="resnet20_cifar", num_labels=4, image_size=16, exit_stages=[2, 5, 8], exit_pooling=["avg1"],
        recipe=recipe, head_dim=8, lam=0.5 if recipe == "paper" else [0.01, 1.0],
    )
    model = JEIDNNForImageClassification(config)
    data = [CachedFeatures([FeatureCache(folder / f"{role}.safetensors")]) for role in ("train", "validation", "test")]
    args = JEIDNNTrainingArguments(
        output_dir=str(folder / "out"), recipe=recipe, num_train_epochs=3, warmup_epochs=1, bi_switch=3, gate_steps=20,
        per_device_train_batch_size=16 // processes, report_to="none", disable_tqdm=True, save_strategy="no",
        use_cpu=True, seed=1,
    )
    trainer = JEIDNNTrainer(model, args, *data[:2])
    note(f"evaluation.{recipe}", metrics_of(trainer, data[2]))
    trainer.train()
    note(f"training.{recipe}.metrics", metrics_of(trainer))
    note(f"training.{recipe}.steps", trainer.state.global_step)
    for name, tensor in model.state_dict().items():
        if not name.startswith("backbone."):
            note(f"training.{recipe}.{name}", tensor)

set_seed(0)  # the same exits on one process and on two
model = JEIDNNForImageClassification(config).eval()
model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
random = np.random.default_rng(0)
pictures = [PIL.Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(101)]
features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)})
source = datasets.Dataset.from_dict({"image": pictures, "label": [i % 4 for i in range(101)]}, features=features)
splits = Splits("random", 0, {"test": ("train", range(101))})
preprocessing = Preprocessing(16, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)
pixels = ImageView(source, range(101), preprocessing)

record = ExitRecord.of(model, pixels, splits.info("test"), batch_size=16)
note("evaluation.record", record.logits)
note("evaluation.labels", record.labels)
note("rows.record", rows_seen())
for view in (None, 0):
    cached = cached_role(
        model.backbone, {"train": source}, splits, "test", preprocessing, folder / f"cache{processes}", views=[view]
    )
    note(f"evaluation.features.{view}", cached.views[0].features)
note("rows.features", rows_seen())
save_file(found, folder / f"{processes}-{state.process_index}.safetensors")
exit_together()
'''


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, torch.Tensor]]:
    """What one process found, and the first and the second of two; no role's rows can be shared evenly but train's."""
    folder, dims = tmp_path_factory.mktemp("ddp"), [16, 32, 4]
    for role, rows in (("train", 128), ("validation", 61), ("test", 1101)):
        generator = torch.Generator().manual_seed(rows)
        labels = torch.arange(rows) % 4
        features = torch.randn(rows, sum(dims), generator=generator) + labels[:, None] * 0.3
        tensors = {"features": features, "labels": labels, "index": torch.arange(rows)}
        save_file(tensors, folder / f"{role}.safetensors", {"format": "pt", "key": json.dumps({"exit_dims": dims})})
    (folder / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for launcher in ([], ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]):
        command = [sys.executable, *launcher, str(folder / "script.py"), str(folder)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(folder / f"{name}.safetensors") for name in ("1-0", "2-0", "2-1")]


@pytest.mark.parametrize("recipe", ["paper", "default"])
def test_two_processes_train_what_one_does(found, recipe):
    alone, first, second = found
    names = [name for name in alone if name.startswith(f"training.{recipe}.")]
    assert torch.equal(first[f"training.{recipe}.steps"], alone[f"training.{recipe}.steps"])
    for name in names:
        assert torch.equal(first[name], second[name]), name
        if ".heads.modules" in name:
            torch.testing.assert_close(first[name], alone[name], rtol=1e-3, atol=1e-4, msg=name)
    name = f"training.{recipe}.metrics"
    torch.testing.assert_close(first[name], alone[name], rtol=2e-2, atol=2e-2)


def test_two_processes_evaluate_to_the_bit_what_one_does(found):
    alone, first, second = found
    names = [name for name in alone if name.startswith("evaluation.")]
    assert len(names) == 6
    for name in names:
        assert torch.equal(first[name], alone[name]) and torch.equal(second[name], alone[name]), name
    assert len(alone["evaluation.record"]) == 101 and alone["evaluation.labels"].tolist() == [i % 4 for i in range(101)]


def test_two_processes_share_the_work(found):
    alone, *two = found
    assert int(alone["rows.record"]) == 101
    assert [int(rank["rows.record"]) for rank in two] == [53, 48]  # of seven batches the first, third, ...
    assert int(alone["rows.features"]) == sum(int(rank["rows.features"]) for rank in two) == 202


@pytest.mark.parametrize("has_accelerator", [True, False])
def test_where_there_is_no_accelerator_processes_meet_on_the_cpu(has_accelerator, monkeypatch, tmp_path):
    """accelerate makes a group of torchrun's processes on CPUs only where it is told to use them."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda *_: has_accelerator)
    args = JEIDNNTrainingArguments(output_dir=str(tmp_path), report_to="none")
    assert args.use_cpu is not has_accelerator
