"""Staged ONNX on onnxruntime against PyTorch eager, both exiting early: the same model, images and exits.

    python benchmarks/onnx_speed.py --output benchmarks/results/onnx_speed.json

Weights are random. Gates open where the greatest probability passes a threshold, set so that a pool of images takes
half of the Mul-Adds on average; the case "nobody leaves" takes those of the pool that reach the last exit. Alternating
repetitions in one process; ratios are of medians, PyTorch's over onnxruntime's, the spread from the extremes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification
from jeidnn_hf.onnx_export import export
from jeidnn_hf.onnx_runner import OnnxEarlyExit

MODELS = {
    "resnet56, 9 exits": {"backbone": "resnet56_cifar", "exit_stages": list(range(2, 27, 3))},
    "lite0 96 px, 4 exits": {"backbone": "tf_efficientnet_lite0", "image_size": 96, "exit_stages": [3, 7, 11, 15]},
    "vit_tiny, 4 exits": {"backbone": "vit_tiny_patch16_224", "exit_stages": [2, 5, 8, 11]},
    "t2t_vit_7": {"backbone": "t2t_vit_7"},
    "resnet56, 27 exits": {"backbone": "resnet56_cifar"},
}
STEEP = 1e3
"""Slope of the gates."""


@torch.no_grad()
def model_and_images(options: dict, pool: int, share: float) -> tuple[JEIDNNForImageClassification, dict[str, Tensor]]:
    """A model, and 64 images each for "nobody leaves" and for ``share`` of the Mul-Adds."""
    torch.manual_seed(0)
    config = {"num_labels": 10, "recipe": "paper", "native_head": False, "gate_form": "stick", **options}
    model = JEIDNNForImageClassification(JEIDNNConfig(**config)).eval()
    size = model.backbone.image_size
    coarse = torch.randn(pool, 3, 4, 4)
    images = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic") + 0.1 * torch.randn(
        1, 3, size, size
    )
    features = [torch.cat(z) for z in zip(*(model.backbone(x) for x in images.split(32)), strict=True)]
    for head, z in zip(model.heads.modules_by_exit, features, strict=True):
        head.weight.normal_().mul_(2 / z.std(0).mean().clamp_min(1e-6) / z.shape[1] ** 0.5)
        head.bias.copy_(-head.weight @ z.mean(0))
    gates, logits = model.policy.gates, model.heads(features)
    gates.weight.zero_()[:, 0] = STEEP
    low, high = 0.0, 1.0
    for _ in range(30):
        middle = (low + high) / 2
        gates.bias.fill_(-STEEP * middle)
        exits = model.policy.decide(logits)
        low, high = (middle, high) if model.normalised_mul_adds[exits].mean() < share else (low, middle)
    late = (exits == model.backbone.num_exits - 1).nonzero().flatten()
    return model, {"nobody leaves": images[late[torch.arange(64) % len(late)]], "half": images[:64]}


def seconds(run, batches) -> float:
    started = time.perf_counter()
    for batch in batches:
        run(batch)
    return (time.perf_counter() - started) / sum(map(len, batches))


@torch.no_grad()
def rows_of(name: str, repetitions: int, pool: int, all_threads: list[int], batch_sizes: list[int]) -> list[dict]:
    model, image_sets = model_and_images(MODELS[name], pool, 0.5)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        export(model, folder)
        print(f"{name}: exported in {time.perf_counter() - started:.0f} s", flush=True)
        for threads in all_threads:
            torch.set_num_threads(threads)
            runner = OnnxEarlyExit(folder, threads=threads)
            for case, images in image_sets.items():
                found, expected = runner(images.numpy()), model(images)
                for batch in batch_sizes:
                    of_torch = list(images[: max(batch, 24)].split(batch))
                    of_numpy = [x.numpy() for x in of_torch]
                    times = {"pytorch": [], "channels_last": [], "onnx": []}
                    for _ in range(repetitions + 1):
                        times["pytorch"].append(seconds(model, of_torch))
                        times["onnx"].append(seconds(runner, of_numpy))
                        if images.shape[-1] < 200:
                            model.backbone.to(memory_format=torch.channels_last)
                            last = [x.contiguous(memory_format=torch.channels_last) for x in of_torch]
                            times["channels_last"].append(seconds(model, last))
                            model.backbone.to(memory_format=torch.contiguous_format)
                    times = {key: value[1:] for key, value in times.items() if value}
                    median = {key: statistics.median(value) for key, value in times.items()}
                    share = model.normalised_mul_adds[expected.exit_index[: max(batch, 24)]].mean()
                    rows.append({
                        "model": name, "case": case, "batch": batch, "threads": threads, "mul_adds": float(share),
                        "same_exits": float((torch.from_numpy(found.exit_index) == expected.exit_index).float().mean()),
                        "ms_per_image": {key: 1e3 * value for key, value in median.items()},
                        "pytorch_over_onnx": median["pytorch"] / median["onnx"],
                        "spread": [
                            min(times["pytorch"]) / max(times["onnx"]), max(times["pytorch"]) / min(times["onnx"]),
                        ],
                        "fastest_pytorch_over_onnx": min(v for k, v in median.items() if k != "onnx") / median["onnx"],
                    })  # fmt: skip
                    shown = ", ".join(f"{key} {value:.2f}" for key, value in rows[-1]["ms_per_image"].items())
                    print(
                        "{model:<19} {case:<13} ({mul_adds:.2f}) batch {batch:>2}, threads {threads}: ".format(
                            **rows[-1]
                        )
                        + f"{shown} ms, "
                        + "{pytorch_over_onnx:.2f} x, {fastest_pytorch_over_onnx:.2f} x; same {same_exits:.3f}".format(
                            **rows[-1]
                        ),
                        flush=True,
                    )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--pool", type=int, default=256, help="images that the gates are set on")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    settings = options.repetitions, options.pool, options.threads, options.batch_sizes
    rows = [row for name in options.models for row in rows_of(name, *settings)]
    if options.output:
        versions = {name: version(name) for name in ("torch", "onnx", "onnxruntime", "onnxscript", "timm")}
        options.output.parent.mkdir(parents=True, exist_ok=True)
        told = {"versions": versions, "denominator": "model(pixels)", "rows": rows}
        options.output.write_text(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
