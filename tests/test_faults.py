"""Runs that are killed, also while they save, go on to the very weights of a run that was not; so do those on a full
disk, and what was written before stays good."""

import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import PIL.Image
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import set_seed

from jeidnn_hf import ExitRecord, JEIDNNConfig, JEIDNNForImageClassification, JEIDNNTrainer, JEIDNNTrainingArguments
from jeidnn_hf.costs import ExitCosts
from jeidnn_hf.data import ImageView, Preprocessing
from jeidnn_hf.feature_cache import CachedFeatures, FeatureCache, cache_features
from jeidnn_hf.splits import SplitInfo
from jeidnn_hf.trainer import last_checkpoint

SCRIPT = """
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
"""


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


# ---- full disks: a limit on the size of files, which every Unix has, and a small file system where one can be mounted


def make_model() -> JEIDNNForImageClassification:
    set_seed(0)
    config = JEIDNNConfig(
        backbone="resnet20_cifar", num_labels=4, image_size=16, exit_stages=[2, 5, 8], exit_pooling=["avg1"],
        recipe="paper", lam=0.5,
    )  # fmt: skip
    return JEIDNNForImageClassification(config).eval()


def make_trainer(folder: Path, out: Path, kind: type = JEIDNNTrainer, **options) -> JEIDNNTrainer:
    data = [CachedFeatures([FeatureCache(folder / f"{role}.safetensors")]) for role in ("train", "validation")]
    args = JEIDNNTrainingArguments(
        output_dir=str(out), recipe="paper", num_train_epochs=1, bi_switch=2, warmup_epochs=0, save_strategy="steps",
        save_steps=2, per_device_train_batch_size=16, report_to="none", disable_tqdm=True, use_cpu=True,
    )  # fmt: skip
    return kind(make_model(), args, *data, **options)


def make_images(rows: int = 200) -> ImageView:
    pictures = []
    for colour in range(rows):
        buffer = io.BytesIO()
        PIL.Image.new("RGB", (16, 16), (colour, 0, 255 - colour)).save(buffer, format="PNG")
        pictures.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)})
    columns = {"image": pictures, "label": [i % 4 for i in range(rows)]}
    preprocessing = Preprocessing(16, 1.0, "bilinear", (0.5,) * 3, (0.5,) * 3)
    return ImageView(datasets.Dataset.from_dict(columns, features=features), range(rows), preprocessing)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def answers(model) -> torch.Tensor:
    with torch.no_grad():
        pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
        return model(pixels, output_all_exits=True).all_logits


@pytest.fixture
def limit():
    """``limit(size)``: from now on a write past that many bytes of a file fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("moment", ["model", "optimizer", "state"])
def test_a_checkpoint_that_does_not_fit(folder, tmp_path, limit, moment):
    """The run ends in an error that names it and the last good one; from there it goes on to the same weights."""

    class Full(JEIDNNTrainer):
        def fill(self, at: str, size: int) -> None:
            if moment == at and self.state.global_step == 6:
                limit(size)

        def _save_checkpoint(self, model, trial):
            self.fill("model", 100_000)
            super()._save_checkpoint(model, trial)

        def _save_optimizer_and_scheduler(self, output_dir):
            self.fill("optimizer", 600)
            super()._save_optimizer_and_scheduler(output_dir)

        def _save_rng_state(self, output_dir):
            super()._save_rng_state(output_dir)
            self.fill("state", 30)

    whole = make_trainer(folder, tmp_path / "whole")
    whole.train()
    out = tmp_path / "full"
    with pytest.raises(OSError) as caught:
        make_trainer(folder, out, Full).train()
    limit(resource.RLIM_INFINITY)
    message, good = str(caught.value), str(out / "checkpoint-4")
    assert message.startswith(f"Expected to write {str(out / 'checkpoint-6')!r}, but got: ") and "\n" not in message
    assert "Make room" in message and message.endswith(f"the run can go on from {good}.")
    assert sorted(path.name for path in out.iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert last_checkpoint(out) == good
    assert torch.isfinite(answers(JEIDNNForImageClassification.from_pretrained(good))).all()
    resumed = make_trainer(folder, out)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step == 8
    assert torch.equal(answers(resumed.model.eval()), answers(whole.model.eval()))


def test_a_model_that_does_not_fit_leaves_the_one_before_it(tmp_path, limit):
    model = make_model()
    model.save_pretrained(tmp_path / "model")
    before, expected = contents(tmp_path), answers(model)
    with torch.no_grad():
        model.heads.modules_by_exit[0].bias.add_(1)
    for target in ("model", "new/model"):
        limit(100_000)
        with pytest.raises(OSError, match=r"^Expected to write '.*/model', but got: .*MB free\); it takes .* room\.$"):
            model.save_pretrained(tmp_path / target)
        limit(resource.RLIM_INFINITY)
    assert contents(tmp_path) == before and not (tmp_path / "new").exists()
    assert torch.equal(answers(JEIDNNForImageClassification.from_pretrained(tmp_path / "model")), expected)
    model.save_pretrained(tmp_path / "model")
    assert not torch.equal(answers(JEIDNNForImageClassification.from_pretrained(tmp_path / "model")), expected)


def test_a_model_saved_where_a_file_is(tmp_path):
    (tmp_path / "model").write_text("mine")
    with pytest.raises(OSError, match=r"^Expected to write '.*/model', but got: File exists "):
        make_model().save_pretrained(tmp_path / "model")
    assert contents(tmp_path) == {"model": b"mine"}


@pytest.mark.parametrize("size", [1000, 2500])
def test_a_record_that_does_not_fit_leaves_the_one_before_it(tmp_path, limit, size):
    """Neither where its tensors do not fit nor where its description does not: the two belong together."""
    costs, many = ExitCosts((10, 20), (0, 0), (1, 1), (1, 1)), SplitInfo("d" * 3000, "test", "test", 40, "0")
    labels = torch.arange(40) % 4
    ExitRecord(torch.zeros(40, 2, 4), labels, costs, many).save(tmp_path)
    before = contents(tmp_path)
    limit(size)
    with pytest.raises(OSError, match="^Expected to write .* but got: "):
        ExitRecord(torch.ones(40, 2, 4), labels, costs, many).save(tmp_path)
    limit(resource.RLIM_INFINITY)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("when", ["at the start", "on the way"])
def test_features_that_do_not_fit(tmp_path, limit, when):
    """No file is taken for a good one; with room again the same call makes the features of an undisturbed one."""
    model, images = make_model(), make_images()
    expected = cache_features(model.backbone, images, "split", tmp_path / "whole", dtype=torch.float32)

    def fill(module, inputs):
        limit(20_000)

    if when == "at the start":
        limit(20_000)
    else:
        handle = model.backbone.register_forward_pre_hook(fill)
    with pytest.raises(OSError, match=r"^Expected to write '.*\.partial', but got: .*MB free\); it takes .* room\.$"):
        cache_features(model.backbone, images, "split", tmp_path / "cut", dtype=torch.float32, batch_size=16)
    limit(resource.RLIM_INFINITY)
    assert list((tmp_path / "cut").glob("*.safetensors")) == []
    if when == "on the way":
        handle.remove()
    found = cache_features(model.backbone, images, "split", tmp_path / "cut", dtype=torch.float32)
    assert torch.equal(found.features, expected.features) and torch.equal(found.labels, expected.labels)


SMALL_DISK = """
import os, sys
from pathlib import Path

sys.path.insert(0, sys.argv[1])
import torch
from test_faults import *

torch.set_num_threads(1)
folder, disk = Path(sys.argv[2]), Path(sys.argv[3])
model = make_model()
model.save_pretrained(disk / "model")
try:
    make_trainer(folder, disk / "run").train()
except OSError as error:
    print("run:", error)


def fill(*_):
    with open(disk / "filler", "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            pass


images = make_images()
whole = cache_features(model.backbone, images, "split", folder / "whole", dtype=torch.float32)
handle = model.backbone.register_forward_pre_hook(fill)
try:
    cache_features(model.backbone, images, "split", disk / "cache", dtype=torch.float32, batch_size=16)
except OSError as error:
    print("features:", error)
handle.remove()
try:
    model.save_pretrained(disk / "model")
except OSError as error:
    print("model:", error)
(disk / "filler").unlink()
again = cache_features(model.backbone, images, "split", disk / "cache", dtype=torch.float32)
print("same features:", torch.equal(again.features, whole.features))
"""


@pytest.mark.slow
def test_a_file_system_that_fills_up(folder, tmp_path):
    """4 MB of tmpfs: room for the model and two checkpoints."""
    disk, out = tmp_path / "disk", tmp_path / "copied"
    disk.mkdir()
    mount = f"mount -t tmpfs -o size=4m tmpfs {disk}"
    own = ["unshare", "-Urm", "sh", "-c"]
    if not shutil.which("unshare") or subprocess.run([*own, mount], capture_output=True).returncode:
        pytest.skip("this machine lets nobody mount a tmpfs in a namespace of their own")
    (tmp_path / "script.py").write_text(SMALL_DISK)
    command = f'{mount} && "$0" {tmp_path}/script.py {Path(__file__).parent} {folder} {disk}; cp -r {disk} {out}'
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([*own, command, sys.executable], env=environment, capture_output=True, text=True, timeout=240)
    lines = dict(line.split(": ", 1) for line in done.stdout.splitlines() if ": " in line)
    assert lines["same features"] == "True", done.stderr[-3000:]
    for name, path in (("run", disk / "run" / "checkpoint-6"), ("features", disk / "cache"), ("model", disk / "model")):
        assert lines[name].startswith(f"Expected to write '{path}") and "No space left on device" in lines[name]
    assert lines["run"].endswith(f"go on from {disk / 'run' / 'checkpoint-4'}.")
    assert sorted(path.name for path in (out / "run").iterdir()) == ["checkpoint-2", "checkpoint-4"]
    assert torch.equal(answers(JEIDNNForImageClassification.from_pretrained(out / "model")), answers(make_model()))
    whole, resumed = make_trainer(folder, tmp_path / "whole"), make_trainer(folder, out / "run")
    whole.train()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert torch.equal(answers(resumed.model.eval()), answers(whole.model.eval()))
