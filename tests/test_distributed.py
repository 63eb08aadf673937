"""Two processes on one machine (gloo): the same weights on both, and those of one process at the same global batch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

SCRIPT = '''
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import set_seed

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, JEIDNNTrainer, JEIDNNTrainingArguments
from jeidnn_hf.feature_cache import CachedFeatures, FeatureCache

torch.set_num_threads(1)
folder, recipe, batch = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
state = PartialState()
set_seed(0)
config = JEIDNNConfig(
    backbone="resnet20_cifar", num_labels=4, image_size=16, exit_stages=[2, 5, 8], exit_pooling=["avg1"], recipe=recipe,
    head_dim=8, lam=0.5 if recipe == "paper" else [0.01, 1.0],
)
model = JEIDNNForImageClassification(config)
data = [CachedFeatures([FeatureCache(folder / f"{role}.safetensors")]) for role in ("train", "validation")]
args = JEIDNNTrainingArguments(
    output_dir=str(folder / "out"), recipe=recipe, num_train_epochs=3, warmup_epochs=1, bi_switch=3, gate_steps=20,
    per_device_train_batch_size=batch, report_to="none", disable_tqdm=True, save_strategy="no", use_cpu=True, seed=1,
)
trainer = JEIDNNTrainer(model, args, *data)
trainer.train()
metrics = trainer.evaluate()
tensors = {k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}
tensors["metrics"] = torch.tensor(list(metrics.values()), dtype=torch.float64)
tensors["steps"] = torch.tensor(trainer.state.global_step)
save_file(tensors, folder / f"{recipe}-{state.num_processes}-{state.process_index}.safetensors")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A training cache of 128 rows and a validation cache of 61, which two processes cannot share evenly."""
    folder, dims = tmp_path_factory.mktemp("ddp"), [16, 32, 4]
    for role, rows in (("train", 128), ("validation", 61)):
        generator = torch.Generator().manual_seed(rows)
        labels = torch.arange(rows) % 4
        features = torch.randn(rows, sum(dims), generator=generator) + labels[:, None] * 0.3
        tensors = {"features": features, "labels": labels, "index": torch.arange(rows)}
        save_file(tensors, folder / f"{role}.safetensors", {"format": "pt", "key": json.dumps({"exit_dims": dims})})
    (folder / "script.py").write_text(SCRIPT)
    return folder


def run(folder: Path, recipe: str, processes: int) -> list[dict[str, torch.Tensor]]:
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launcher, str(folder / "script.py"), str(folder), recipe, str(16 // processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return [load_file(folder / f"{recipe}-{processes}-{rank}.safetensors") for rank in range(processes)]


@pytest.mark.parametrize("recipe", ["paper", "default"])
def test_two_processes_train_what_one_does(folder, recipe):
    (alone,) = run(folder, recipe, 1)
    first, second = run(folder, recipe, 2)
    assert first["steps"] == second["steps"] == alone["steps"]
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name
        if name.startswith("heads.modules"):
            torch.testing.assert_close(tensor, alone[name], rtol=1e-3, atol=1e-4, msg=name)
    torch.testing.assert_close(first["metrics"], alone["metrics"], rtol=2e-2, atol=2e-2)
