"""A sweep of ten lambdas against one backbone pass over the training images, and against ten sweeps of one.

    python benchmarks/sweep.py

CIFAR-10 on resnet56, 27 exits, the paper's heads, batch 64, 45,000 rows of synthetic features, 15 epochs of which 5 are
the warm-up, class-imbalance weights included. Alternating repetitions in one process, ratios of medians. Each
repetition trains ``--epochs`` epochs, a third of them warm-up as in the whole, and is scaled to 15; the ten sweeps of
one are ten times one of them; the pass is over ``--images`` images, scaled to 45,000, in the memory format that is
faster. ``--epochs 15 --images 45000`` scales nothing.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, JEIDNNTrainingArguments, __version__
from jeidnn_hf.feature_cache import CachedFeatures
from jeidnn_hf.stacked import Member, StackedTraining
from trainer_overhead import synthetic_cache

LAMBDAS = (0.01, 0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 5.0)
EPOCHS, ROWS = 15, 45_000


def model_of() -> JEIDNNForImageClassification:
    config = JEIDNNConfig(backbone="resnet56_cifar", num_labels=10, recipe="paper", lam=1.0)
    return JEIDNNForImageClassification(config)


def sweep_seconds(
    lambdas: tuple[float, ...], train: CachedFeatures, validation: CachedFeatures, epochs: int, folder: str
) -> float:
    args = JEIDNNTrainingArguments(
        output_dir=folder, recipe="paper", num_train_epochs=epochs, report_to="none", data_seed=0, use_cpu=True
    )
    members = [Member(lam, 0, args.learning_rate) for lam in lambdas]
    training = StackedTraining({0: model_of()}, members, args, train, validation)
    started = time.perf_counter()
    while training.step < training.num_steps:
        for _ in training.run_epoch():
            pass
        training.drain_losses(1)
    return (time.perf_counter() - started) * EPOCHS / epochs


@torch.inference_mode()
def pass_seconds(backbone, pixels: torch.Tensor, batch_size: int = 256) -> float:
    started = time.perf_counter()
    for batch in pixels.split(batch_size):
        backbone(batch)
    return (time.perf_counter() - started) * ROWS / len(pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=3, help="of each sweep, a multiple of 3")
    parser.add_argument("--images", type=int, default=2000, help="of each pass")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    plain, last = model_of().backbone.eval(), model_of().backbone.eval().to(memory_format=torch.channels_last)
    pixels = torch.randn(options.images, 3, 32, 32)
    seconds = {name: [] for name in ("sweep of 10", "sweep of 1", "pass", "pass, channels last")}
    with tempfile.TemporaryDirectory() as folder:
        train = synthetic_cache(Path(folder), ROWS, plain.exit_dims, 10)
        validation = synthetic_cache(Path(folder), 2500, plain.exit_dims, 10)
        for _ in range(options.repetitions):
            seconds["pass"].append(pass_seconds(plain, pixels))
            seconds["sweep of 10"].append(sweep_seconds(LAMBDAS, train, validation, options.epochs, folder))
            moved = pixels.to(memory_format=torch.channels_last)
            seconds["pass, channels last"].append(pass_seconds(last, moved))
            seconds["sweep of 1"].append(sweep_seconds(LAMBDAS[-3:-2], train, validation, options.epochs, folder))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    fastest = min("pass", "pass, channels last", key=medians.get)
    sweeps = seconds["sweep of 10"]
    result = {
        "jeidnn_hf": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
        "epochs_timed": options.epochs, "images_timed": options.images,
        "seconds": {name: {"median": medians[name], "all": values} for name, values in seconds.items()},
        "ms_per_step_of_10": 1e3 * medians["sweep of 10"] / (EPOCHS * -(-ROWS // 64)),
        "sweep_to_pass": {
            "denominator": f"one {fastest} over {ROWS} images", "ratio": medians["sweep of 10"] / medians[fastest],
            "spread": [min(sweeps) / max(seconds[fastest]), max(sweeps) / min(seconds[fastest])],
        },
        "ten_singles_to_sweep": {
            "denominator": "the sweep of 10", "ratio": 10 * medians["sweep of 1"] / medians["sweep of 10"],
            "spread": [10 * min(seconds["sweep of 1"]) / max(sweeps), 10 * max(seconds["sweep of 1"]) / min(sweeps)],
        },
    }  # fmt: skip
    for name, value in medians.items():
        print(f"{name:<20} {value:7.1f} s, {min(seconds[name]):.1f} to {max(seconds[name]):.1f}")
    for name in ("sweep_to_pass", "ten_singles_to_sweep"):
        print(
            f"{name}: {result[name]['ratio']:.2f} ({result[name]['spread'][0]:.2f} to {result[name]['spread'][1]:.2f})"
        )
    if options.output:
        options.output.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
