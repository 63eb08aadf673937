"""Runs that are killed, also while they save, go on to the very weights of a run that was not."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jeidnn_hf.trainer import last_checkpoint

SCRIPT = '''
import os, signal, sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import TrainerCallback, set_seed

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, JEIDNNTrainer, JEIDNNTrainingArguments
from jeidnn_hf.feature_cache import CachedFeatures, FeatureCache

torch.set_num_threads(1)
folder, out, moment, step = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])


class Kill(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if moment == "step" and state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)


class Trainer(JEIDNNTrainer):
    def _save_rng_state(self, output_dir):
        if moment == "saving" and self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGKILL)
        super()._save_rng_state(output_dir)


set_seed(0)
config = JEIDNNConfig(
    backbone="resnet20_cifar", num_labels=4, image_size=16, exit_stages=[2, 5, 8], exit_pooling=["avg1"],
    recipe="paper", lam=0.5,
)
model = JEIDNNForImageClassification(config)
data = [CachedFeatures([FeatureCache(folder / f"{role}.safetensors")]) for role in ("train", "validation")]
args = JEIDNNTrainingArguments(
    output_dir=str(out), recipe="paper", num_train_epochs=3, warmup_epochs=1, bi_switch=3, save_strategy="steps",
    save_steps=2, save_total_limit=3, per_device_train_batch_size=16, report_to="none", disable_tqdm=True, use_cpu=True,
)
trainer = Trainer(model, args, *data, callbacks=[Kill()])
trainer.train(resume_from_checkpoint=True)
print("steps", trainer.state.global_step)
save_file({k: v for k, v in model.state_dict().items() if not k.startswith("backbone.")}, out / "final.safetensors")
'''


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder, dims = tmp_path_factory.mktemp("faults"), [16, 32, 4]
    for role, rows in (("train", 128), ("validation", 64)):
        labels = torch.arange(rows) % 4
        features = torch.randn(rows, sum(dims), generator=torch.Generator().manual_seed(rows)) + labels[:, None] * 0.3
        tensors = {"features": features, "labels": labels, "index": torch.arange(rows)}
        save_file(tensors, folder / f"{role}.safetensors", {"format": "pt", "key": json.dumps({"exit_dims": dims})})
    (folder / "script.py").write_text(SCRIPT)
    return folder


def run(folder: Path, out: Path, moment: str = "never", step: int = 0) -> subprocess.CompletedProcess:
    command = [sys.executable, str(folder / "script.py"), str(folder), str(out), moment, str(step)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def uninterrupted(folder):
    done = run(folder, folder / "whole")
    assert done.returncode == 0 and "steps 24" in done.stdout, done.stderr[-3000:]
    return load_file(folder / "whole" / "final.safetensors")


def test_a_run_killed_five_times_ends_with_the_weights_of_one_that_was_not(folder, uninterrupted):
    """In the warm-up (5), between two savings of a gate phase (10), in an IM phase (13, 21), and while saving (16)."""
    out = folder / "killed"
    for moment, step in (("step", 5), ("step", 10), ("step", 13), ("saving", 16), ("step", 21)):
        assert run(folder, out, moment, step).returncode == -signal.SIGKILL
        if moment == "saving":
            assert (out / "checkpoint-16").is_dir() and last_checkpoint(out) == str(out / "checkpoint-14")
    done = run(folder, out)
    assert done.returncode == 0 and "steps 24" in done.stdout, done.stderr[-3000:]
    found = load_file(out / "final.safetensors")
    assert found.keys() == uninterrupted.keys()
    assert [name for name in found if not torch.equal(found[name], uninterrupted[name])] == []


def test_the_last_complete_checkpoint(tmp_path):
    assert last_checkpoint(tmp_path) is None and last_checkpoint(tmp_path / "absent") is None
    for step, state in ((8, "{}"), (10, "{}"), (100, '{"cut'), (90, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if state is not None:
            (folder / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
