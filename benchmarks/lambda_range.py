"""What one training for a whole range of lambdas costs, against a training for one of them, from the feature cache.

    python benchmarks/lambda_range.py

JEI-DNN's alternation (warm-up, gates, IMs) on resnet56's features; the paper's gates, one linear layer per exit, for
lambda 1, and gates that take lambda, for [.003, 3]. Alternating repetitions in one process; the ratio is
of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, JEIDNNTrainer, JEIDNNTrainingArguments
from trainer_overhead import synthetic_cache

GATES = {
    "one lambda": {"gate": "linear", "gate_form": "min", "lam": 1.0},
    "a range": {"gate": "shared", "gate_form": "cumulative", "exit_rule": "median", "lam": [0.003, 3.0]},
}
HEADS = {
    "paper": ({"exit_stages": list(range(2, 27, 3))}, 64),
    "default": ({}, 512),
}
EPOCHS = 6


def seconds_of(heads: str, gates: str, rows: int, folder: str) -> float:
    config, batch_size = HEADS[heads]
    torch.manual_seed(0)
    model = JEIDNNForImageClassification(
        JEIDNNConfig(backbone="resnet56_cifar", num_labels=10, recipe=heads, task_cost="cross_entropy", **config,
                     **GATES[gates])
    )  # fmt: skip
    data = [synthetic_cache(Path(folder), count, model.backbone.exit_dims, 10) for count in (rows, 2_500)]
    args = JEIDNNTrainingArguments(
        output_dir=folder, recipe=heads, num_train_epochs=EPOCHS, warmup_epochs=2, im_training="jeidnn",
        gates_on="train", gate_objective="surrogate", schedule="constant", bi_switch=rows // batch_size,
        per_device_train_batch_size=batch_size,
        report_to="none", disable_tqdm=True, save_strategy="no", logging_strategy="no",
    )  # fmt: skip
    trainer = JEIDNNTrainer(model, args, *data)
    started = time.perf_counter()
    trainer.train()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for heads in HEADS:
            seconds = {gates: [] for gates in GATES}
            for _ in range(options.repetitions):
                for gates, found in seconds.items():
                    found.append(seconds_of(heads, gates, options.rows, folder))
            one, whole = (statistics.median(found) for found in seconds.values())
            results.append({"heads": heads, "one_lambda_s": one, "range_s": whole, "ratio": whole / one})
            print(f"{heads} heads: one lambda {one:.1f} s, a range {whole:.1f} s, ratio {whole / one:.2f}", flush=True)
    if options.output:
        options.output.write_text(json.dumps({"threads": torch.get_num_threads(), "cases": results}, indent=1))


if __name__ == "__main__":
    main()
