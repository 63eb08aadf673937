"""Epochs of JEIDNNTrainer from the feature cache against a bare PyTorch loop over the same tensors.

    python benchmarks/trainer_overhead.py

Both gather the same random batches from a memory-mapped matrix, compute the same warm-up loss and take the same Adam
step; alternating repetitions in one process; the ratio is of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, JEIDNNTrainer, JEIDNNTrainingArguments
from jeidnn_hf.feature_cache import CachedFeatures, FeatureCache
from jeidnn_hf.objectives import task_cost, warmup_loss

EPOCHS = 5


def synthetic_cache(folder: Path, rows: int, dims: tuple[int, ...], num_labels: int) -> CachedFeatures:
    generator = torch.Generator().manual_seed(0)
    path = folder / f"features-{rows}-{sum(dims)}.safetensors"
    tensors = {
        "features": torch.randn(rows, sum(dims), generator=generator).half(),
        "labels": torch.arange(rows) % num_labels,
        "index": torch.arange(rows),
    }
    save_file(tensors, path, {"format": "pt", "key": json.dumps({"exit_dims": list(dims)})})
    return CachedFeatures([FeatureCache(path)])


def bare_epochs(model, train: CachedFeatures, batch_size: int) -> float:
    optimizer = torch.optim.Adam(model.heads.parameters(), lr=0.01, weight_decay=5e-4, fused=True)
    started = time.perf_counter()
    for rows in (rows for _ in range(EPOCHS) for rows in torch.randperm(len(train)).split(batch_size)):
        batch = train.__getitems__(rows)
        features = model.split_features(batch["exit_features"])
        loss = warmup_loss(task_cost(model.heads.members(features), batch["labels"]))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return time.perf_counter() - started


def trainer_epochs(model, train: CachedFeatures, validation: CachedFeatures, batch_size: int, folder: str) -> float:
    args = JEIDNNTrainingArguments(
        output_dir=folder, recipe="paper", num_train_epochs=EPOCHS, warmup_epochs=EPOCHS,
        per_device_train_batch_size=batch_size,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = JEIDNNTrainer(model, args, train, validation)
    trainer.create_optimizer()
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40_000)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    cases = {
        "resnet56, 9 exits, linear, batch 64": ({"recipe": "paper", "exit_stages": list(range(2, 27, 3))}, 64),
        "resnet56, 27 exits, linear, batch 64": ({"recipe": "paper"}, 64),
        "resnet56, 27 exits, recurrent on F, batch 512": ({"recipe": "default"}, 512),
    }
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name, (config, batch_size) in cases.items():
            model = JEIDNNForImageClassification(JEIDNNConfig(backbone="resnet56_cifar", num_labels=10, **config))
            rows = options.rows if batch_size < 512 else options.rows // 2
            model.config.lam = model.config.current_lam = 1.0
            if model.heads.norms is not None:
                model.heads.norms = None  # the statistics of a synthetic cache are known: mean 0, deviation 1
            train = synthetic_cache(Path(folder), rows, model.backbone.exit_dims, 10)
            validation = synthetic_cache(Path(folder), 100, model.backbone.exit_dims, 10)
            bare, trained = [], []
            for _ in range(options.repetitions):
                bare.append(bare_epochs(model, train, batch_size))
                trained.append(trainer_epochs(model, train, validation, batch_size, folder))
            steps = EPOCHS * -(-rows // batch_size)
            row = {
                "case": name,
                "bare_ms_per_step": 1e3 * statistics.median(bare) / steps,
                "trainer_ms_per_step": 1e3 * statistics.median(trained) / steps,
                "ratio": statistics.median(trained) / statistics.median(bare),
                "spread": [min(trained) / max(bare), max(trained) / min(bare)],
            }
            results.append(row)
            print(
                "{case:<46} bare {bare_ms_per_step:6.2f} ms, Trainer {trainer_ms_per_step:6.2f} ms a step, "
                "ratio {ratio:.2f}".format(**row)
            )
    if options.output:
        options.output.write_text(json.dumps({"threads": torch.get_num_threads(), "cases": results}, indent=1))


if __name__ == "__main__":
    main()
