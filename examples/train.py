"""Trains the exits of a frozen backbone, one run after another, from a YAML file.

    accelerate launch --cpu examples/train.py --config examples/configs/cifar10_resnet56.yaml

The backbone passes once over the images, into a feature cache; every run trains from the cache and is saved in its own
folder. A run that is already saved is left alone, an interrupted one goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import yaml
from transformers import set_seed

from jeidnn_hf import JEIDNNForImageClassification
from jeidnn_hf.data import Preprocessing
from jeidnn_hf.feature_cache import cached_role
from jeidnn_hf.sources import load_source, source_options, split_source
from jeidnn_hf.trainer import JEIDNNTrainer
from jeidnn_hf.training_args import JEIDNNTrainingArguments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file with data, model, training and runs")
    parser.add_argument("--output_dir", type=Path, help="instead of the config's")
    parser.add_argument("--run", nargs="+", help="only these runs")
    options = parser.parse_args()
    config = yaml.safe_load(options.config.read_text())
    output_dir = options.output_dir or Path(config["output_dir"])
    output_dir.mkdir(parents=True, exist_ok=True)
    is_main = int(os.environ.get("RANK", "0")) == 0  # of the processes that torchrun or accelerate started

    data = config["data"]
    sources = load_source(data["dataset"], **source_options(data))
    splits = split_source(data["dataset"], sources, **data.get("splits", {}))
    if is_main:
        (output_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        splits.save(output_dir / "splits.json")

    for name in options.run or config["runs"]:
        run = config["runs"][name]
        if (output_dir / name / "model.safetensors").exists():
            print(f"{name}: already trained, in {output_dir / name}")
            continue
        started = time.perf_counter()
        training = {**config.get("training", {}), **run.get("training", {})}
        set_seed(training.get("seed", 42))
        names = sources["train"].features["label"].names
        choice = {"id2label": dict(enumerate(names)), **config["model"], **run.get("model", {})}
        model = JEIDNNForImageClassification.from_backbone_pretrained(**choice)
        preprocessing = Preprocessing.from_dict(model.config.preprocessing)
        cache = Path(data.get("cache_dir") or output_dir / "cache")
        views = range(data.get("views", 1))
        train = cached_role(model.backbone, sources, splits, "train", preprocessing, cache, views=views)
        validation = cached_role(model.backbone, sources, splits, "validation", preprocessing, cache)
        folder = output_dir / name
        args = JEIDNNTrainingArguments(output_dir=str(folder / "checkpoints"), **training)
        trainer = JEIDNNTrainer(model, args, train, validation)
        trainer.train(resume_from_checkpoint=True)
        metrics = trainer.evaluate()
        trainer.save_state()
        if is_main:
            model.save_pretrained(folder)
            print(
                f"{name}: validation accuracy {metrics['eval_accuracy']:.4f} at {metrics['eval_mul_adds']:.3f} of the "
                f"Mul-Adds, {time.perf_counter() - started:.0f} s, saved in {folder}"
            )


if __name__ == "__main__":
    main()
