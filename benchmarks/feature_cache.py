"""The feature cache: a training step from it against one from pixels, 14 GB of it in little memory, growth with images.

    python benchmarks/feature_cache.py --threads 1
    python benchmarks/feature_cache.py stream --stream 14

step: one step of the paper's recipe on T2T-ViT-7, 224 px, random weights: forward to the loss (Eq. 13), backward, Adam.
From the cache the features of a random batch are read from the mapped file; the step from pixels finds its batch in
memory, so neither reading nor decoding nor resizing pictures counts. The denominator is the step from the cache.
stream: a file of 14 exits x 384 numbers is opened, its checksums verified, its statistics taken, and all rows read once
in random batches of 512, in a process of its own. Its rows are one random block again and again, which no part of the
code can know. growth: extraction from pictures, and a record with its report from cached features, at 1x, 2x and 4x the
images and exits, each in a process of its own; the denominator is 1x.
"""

from __future__ import annotations

import argparse
import io
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import safetensors
import torch
import transformers

from jeidnn_hf import ExitRecord, JEIDNNConfig, JEIDNNForImageClassification
from jeidnn_hf.data import ImageView, Preprocessing
from jeidnn_hf.evaluation import evaluate
from jeidnn_hf.feature_cache import CachedFeatures, FeatureCache, cache_features
from jeidnn_hf.feature_file import FORMAT, FeatureFile
from jeidnn_hf.splits import SplitInfo
from trainer_overhead import synthetic_cache

EXITS, WIDTH, CLASSES = 14, 384, 1000


def measure_step(folder: Path, repetitions: int, cached_steps: int, batch_size: int) -> dict[str, Any]:
    """``cached_steps`` steps from the cache after each one from pixels."""
    model = JEIDNNForImageClassification(JEIDNNConfig(backbone="t2t_vit_7", num_labels=10, recipe="paper")).train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01, fused=True)
    train = synthetic_cache(folder, 20_000, model.backbone.exit_dims, 10)
    pixels = {"pixel_values": torch.randn(batch_size, 3, 224, 224), "labels": torch.arange(batch_size) % 10}

    def step(batch: dict[str, torch.Tensor]) -> None:
        batch.pop("index", None)
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def seconds(batch: Callable[[], dict[str, torch.Tensor]]) -> float:
        started = time.perf_counter()
        step(batch())
        return time.perf_counter() - started

    def cached() -> dict[str, torch.Tensor]:
        return train.__getitems__(torch.randint(len(train), (batch_size,)))

    times: dict[str, list[float]] = {"pixels": [], "cache": []}
    for repetition in range(repetitions + 1):
        now = {"pixels": [seconds(lambda: dict(pixels))], "cache": [seconds(cached) for _ in range(cached_steps)]}
        if repetition:  # the first one warms up
            times = {name: times[name] + now[name] for name in times}
    median = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "case": f"T2T-ViT-7, {model.backbone.num_exits} exits, 224 px, batch {batch_size}",
        "denominator": "the step from the cache",
        "pixels_s": median["pixels"],
        "pixels_spread_s": [min(times["pixels"]), max(times["pixels"])],
        "cache_ms": 1e3 * median["cache"],
        "cache_spread_ms": [1e3 * value for value in np.quantile(times["cache"], (0.05, 0.95))],
        "ratio": median["pixels"] / median["cache"],
    }
    print("{case}: {pixels_s:.2f} s from pixels, {cache_ms:.2f} ms from the cache, {ratio:,.0f} x".format(**result))
    return result


def measure_stream(folder: Path, gigabytes: float) -> dict[str, Any]:
    rows, path = int(gigabytes * 1e9 / (EXITS * WIDTH * 2)), folder / "stream.safetensors"
    started = time.perf_counter()
    file = FeatureFile.lay_out(path, rows, torch.float16, {"format": FORMAT, "exit_dims": [WIDTH] * EXITS})
    block = torch.randn(FORMAT["block_rows"], EXITS * WIDTH, generator=torch.Generator().manual_seed(0)).half()
    for number in range(len(file.checksums)):
        index = torch.tensor(file.rows_of(number))
        file.write_block(number, block[: len(index)], index % CLASSES, index)
    result = {"rows": rows, "gigabytes": path.stat().st_size / 1e9, "write_s": time.perf_counter() - started}
    del file
    result |= in_fresh_process(_stream, path)
    path.unlink()
    print(
        "{rows:,} rows, {gigabytes:.1f} GB: {read_rows_per_s:,.0f} rows/s in random batches of 512 ({read_s:.0f} s), "
        "opened in {open_s:.0f} s, statistics in {statistics_s:.0f} s; peak memory {peak_mb:,.0f} MB, of it "
        "{before_mb:,.0f} MB before".format(**result)
    )
    return result


def _stream(path: Path) -> dict[str, float]:
    times = [time.perf_counter()]
    data = CachedFeatures([FeatureCache(path)])
    times.append(time.perf_counter())
    data.views[0].statistics()
    times.append(time.perf_counter())
    peaks = []
    for rows in torch.randperm(len(data)).split(512):
        data.__getitems__(rows)
        peaks.append(status_mb("VmRSS"))
    times.append(time.perf_counter())
    opened, summed, read = np.diff(times).tolist()
    return {
        "open_s": opened, "statistics_s": summed, "read_s": read, "read_rows_per_s": len(data) / read,
        "resident_median_mb": statistics.median(peaks), "resident_largest_mb": max(peaks),
    }  # fmt: skip


def measure_growth(images: int, records: int) -> list[dict[str, Any]]:
    """Rows of one factor each: what grows, by how much, seconds and peak memory beyond that before."""
    rows = []
    for what, work, arguments in (
        ("extraction, images", _extract, [(images * factor,) for factor in (1, 2, 4)]),
        ("record and report, images", _evaluate, [(records * factor, 2) for factor in (1, 2, 4)]),
        ("record and report, exits", _evaluate, [(records, 2 * factor) for factor in (1, 2, 4)]),
    ):
        for factor, given in zip((1, 2, 4), arguments, strict=True):
            row = {"what": what, "factor": factor, "arguments": given, **in_fresh_process(work, *given)}
            row["above_mb"] = row["peak_mb"] - row["before_mb"]
            rows.append(row)
            print("{what:<26} {factor}x: {seconds:6.1f} s, {above_mb:6.0f} MB above {before_mb:.0f}".format(**row))
    return rows


def _extract(count: int) -> dict[str, float]:
    random, cells = np.random.default_rng(0), []
    for _ in range(count):
        buffer = io.BytesIO()
        PIL.Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        cells.append({"bytes": buffer.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=10)})
    columns = {"image": cells, "label": [i % 10 for i in range(count)]}
    source = datasets.Dataset.from_dict(columns, features=features)
    model = JEIDNNForImageClassification(JEIDNNConfig(backbone="resnet20_cifar", num_labels=10, recipe="paper"))
    view = ImageView(source, range(count), Preprocessing(32, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        cache_features(model.backbone, view, "split", folder)
        return {"seconds": time.perf_counter() - started}


def _evaluate(count: int, exits: int) -> dict[str, float]:
    stages = list(range(9 - exits, 9))
    config = JEIDNNConfig(backbone="resnet20_cifar", num_labels=100, recipe="paper", exit_stages=stages)
    model = JEIDNNForImageClassification(config).eval()
    with tempfile.TemporaryDirectory() as folder:
        data = synthetic_cache(Path(folder), count, model.backbone.exit_dims, 100)
        started = time.perf_counter()
        record = ExitRecord.of(model, data, SplitInfo("random", "test", "test", count, "0"))
        evaluate(record, model.policy, config.current_lam)
        return {"seconds": time.perf_counter() - started}


def in_fresh_process(work: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """What ``work`` measures in a process of its own, with the memory before it and the peak, MB."""
    with ProcessPoolExecutor(1, get_context("spawn"), torch.set_num_threads, (torch.get_num_threads(),)) as pool:
        before = pool.submit(status_mb, "VmRSS").result()
        found = pool.submit(work, *arguments).result()
        return {**found, "before_mb": before, "peak_mb": pool.submit(status_mb, "VmHWM").result()}


def status_mb(name: str) -> float:
    """A line of /proc/self/status in MB (10^6 bytes): VmRSS, memory resident now, files included; VmHWM, its peak."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", choices=["step", "stream", "growth"], default=["step", "stream", "growth"])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--cached_steps", type=int, default=100, help="after each step from pixels")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--stream", type=float, default=14, metavar="GB", help="size of the file to stream")
    parser.add_argument("--images", type=int, default=1000, help="of the extraction at 1x")
    parser.add_argument("--records", type=int, default=10_000, help="images of the record at 1x")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--folder", type=Path, help="where temporary files go")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    packages = (torch, transformers, safetensors, np, datasets)
    results: dict[str, Any] = {
        "threads": options.threads,
        "machine": platform.platform(),
        "versions": {package.__name__: package.__version__ for package in packages},
    }
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        if "step" in options.cases:
            step = options.repetitions, options.cached_steps, options.batch_size
            results["step"] = measure_step(Path(folder), *step)
        if "stream" in options.cases:
            results["stream"] = measure_stream(Path(folder), options.stream)
        if "growth" in options.cases:
            results["growth"] = measure_growth(options.images, options.records)
    if options.output:
        options.output.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
