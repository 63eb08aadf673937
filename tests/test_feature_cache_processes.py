"""feature_cache.py between processes: started together by torchrun, by chance at the same moment, or killed."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pytest
import torch

from jeidnn_hf.backbones import build_model, staged_backbone
from jeidnn_hf.data import ImageView, Preprocessing
from jeidnn_hf.feature_cache import FeatureCache, cache_features
from jeidnn_hf.feature_file import FORMAT

ROWS, BLOCK = 101, 8
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path

sys.path.insert(0, sys.argv[1])
from test_feature_cache_processes import *

torch.set_num_threads(1)
FORMAT["block_rows"] = BLOCK
folder, mode, found = Path(sys.argv[2]), sys.argv[3], {}


class Counting:
    def __init__(self, backbone, at=None, do=None):
        self.rows, self.batches, self.at, self.do = 0, 0, at, do
        backbone.register_forward_pre_hook(self)

    def __call__(self, module, inputs):
        if self.batches == self.at:
            self.do()
        self.rows, self.batches = self.rows + len(inputs[0]), self.batches + 1


def fail():
    raise OverflowError("of rank 1")


def error_of(*arguments):
    try:
        extract(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


if mode == "killed":
    Counting(backbone := make_backbone(), 4, lambda: os.kill(os.getpid(), signal.SIGKILL))
    extract(backbone, folder / "killed")
elif mode == "together":
    from accelerate import PartialState
    from jeidnn_hf.processes import exit_together

    rank = PartialState(cpu=True).process_index
    counting = Counting(backbone := make_backbone())
    extract(backbone, folder / "shared")
    found["shared"] = counting.rows
    Counting(backbone := make_backbone(), 2 if rank == 1 else None, fail)
    found["failed"] = error_of(backbone, folder / "failed")
    found["left"] = sorted(path.suffix for path in (folder / "failed").iterdir())
    counting = Counting(backbone := make_backbone())
    extract(backbone, folder / "failed")
    found["resumed"] = counting.rows
    found["different"] = error_of(make_backbone(seed=rank), folder / "different")
    found["unlike folders"] = error_of(make_backbone(), folder / f"folder{rank}")
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    exit_together()
else:  # one of two that know nothing of each other
    counting = Counting(backbone := make_backbone(), 3, lambda: time.sleep(1))
    (folder / f"{mode}.ready").touch()
    while len(list(folder.glob("*.ready"))) < 2:
        time.sleep(0.01)
    cache = extract(backbone, folder / "by chance")
    print(json.dumps({"rows": counting.rows, "sum": float(cache.features.double().sum())}))
"""


def make_backbone(seed: int = 0):
    torch.manual_seed(seed)
    return staged_backbone(build_model("resnet20_cifar", num_classes=4), image_size=16, exit_stages=[2, 8])


def make_images() -> ImageView:
    random = np.random.default_rng(0)
    pictures = [PIL.Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8)) for _ in range(ROWS)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)})
    source = datasets.Dataset.from_dict({"image": pictures, "label": [i % 4 for i in range(ROWS)]}, features=features)
    return ImageView(source, range(ROWS), Preprocessing(16, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3))


def extract(backbone, folder: Path) -> FeatureCache:
    return cache_features(backbone, make_images(), "split", folder, dtype=torch.float32, batch_size=BLOCK)


def file_in(folder: Path) -> bytes:
    (path,) = folder.glob("*.safetensors")
    return path.read_bytes()


def command(folder: Path, mode: str, *launcher: str) -> list[str]:
    (folder / "script.py").write_text(SCRIPT)
    return [sys.executable, *launcher, str(folder / "script.py"), str(Path(__file__).parent), str(folder), mode]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """What one undisturbed process writes: 13 blocks, the last of 5 rows."""
    monkeypatch.setitem(FORMAT, "block_rows", BLOCK)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    extract(make_backbone(), tmp_path / "alone")
    yield file_in(tmp_path / "alone")
    torch.set_num_threads(threads)


def test_an_extraction_that_was_killed_goes_on_where_it_was(alone, tmp_path):
    done = subprocess.run(command(tmp_path, "killed"), env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    assert list((tmp_path / "killed").glob("*.safetensors")) == []
    seen, backbone = [], make_backbone()
    backbone.register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    extract(backbone, tmp_path / "killed")
    assert seen == [BLOCK] * 8 + [5]  # of 13 blocks the first four were there
    assert file_in(tmp_path / "killed") == alone


def test_of_two_that_start_at_once_one_extracts_and_one_waits(alone, tmp_path):
    pipes = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    both = [subprocess.Popen(command(tmp_path, name), **pipes) for name in ("first", "second")]
    outputs = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    found = [json.loads(out) for out, _ in outputs]
    assert sorted(one["rows"] for one in found) == [0, ROWS] and found[0]["sum"] == found[1]["sum"]
    assert file_in(tmp_path / "by chance") == alone
    assert sorted(path.suffix for path in (tmp_path / "by chance").iterdir()) == [".lock", ".safetensors"]


def test_processes_that_work_together(alone, tmp_path):
    """They share the blocks and write what one writes; where one fails all do, and all go on from what was written."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        command(tmp_path, "together", *launcher), env=ENVIRONMENT, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    main, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert (main["shared"], other["shared"]) == (53, 48)  # of 13 blocks the first, third, ...
    assert file_in(tmp_path / "shared") == alone
    assert main["failed"] == (
        "RuntimeError: Expected all processes to succeed, but process 1 got a OverflowError: of rank 1"
    )
    assert other["failed"] == "OverflowError: of rank 1"
    assert main["left"] == other["left"] == [".lock", ".partial"]
    assert (main["resumed"], other["resumed"]) == (16, 16)  # the four blocks that rank 1 had not written
    assert file_in(tmp_path / "failed") == alone
    for found in (main, other):
        assert found["different"] == (
            "ValueError: Expected features with the same ['backbone'] in every process, but got different ones."
        )
    assert "process 1 got a WriteError" in main["unlike folders"]
    assert "No such file" in other["unlike folders"] and ".partial" in other["unlike folders"]
