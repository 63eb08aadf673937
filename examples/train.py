"""Trains the exits of a frozen backbone, one run after another, from a YAML file.

    accelerate launch --cpu examples/train.py --config examples/configs/cifar10_resnet56.yaml

The backbone passes once over the images, into a feature cache; every run trains from the cache and is saved in its own
folder. A run that is already saved is left alone, an interrupted one goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from transformers import set_seed

from jeidnn_hf import JEIDNNForImageClassification
from jeidnn_hf.backbones import pretrained_cfg
from jeidnn_hf.data import Preprocessing, load_source, read_labels
from jeidnn_hf.feature_cache import cached_role
from jeidnn_hf.splits import make_splits
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
    state = PartialState(cpu=not torch.accelerator.is_available())  # the processes that torchrun or accelerate started

    data = config["data"]
    sources = load_source(data["dataset"], data_files=data.get("data_files"), data_dir=data.get("data_dir"))
    labels = {name: read_labels(rows) for name, rows in sources.items()}
    num_classes = sources["train"].features["label"].num_classes
    splits = make_splits(data["dataset"], labels, num_classes=num_classes, **data.get("splits", {}))
    if state.is_main_process:
        (output_dir / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
        splits.save(output_dir / "splits.json")

    for name in options.run or config["runs"]:
        run = config["runs"][name]
        if (output_dir / name / "model.safetensors").exists():
            state.print(f"{name}: already trained, in {output_dir / name}")
            continue
        started = time.perf_counter()
        training = {**config.get("training", {}), **run.get("training", {})}
        set_seed(training.get("seed", 42))
        names = sources["train"].features["label"].names
        model = JEIDNNForImageClassification.from_backbone_pretrained(
            **{"id2label": dict(enumerate(names)), **config["model"], **run.get("model", {})}
        )
        cfg = pretrained_cfg(model.config.backbone)
        preprocessing = Preprocessing.from_pretrained_cfg(cfg, model.config.image_size, model.config.num_channels)
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
        if state.is_main_process:
            model.save_pretrained(folder)
            print(
                f"{name}: validation accuracy {metrics['eval_accuracy']:.4f} at {metrics['eval_mul_adds']:.3f} of the "
                f"Mul-Adds, {time.perf_counter() - started:.0f} s, saved in {folder}"
            )


if __name__ == "__main__":
    main()
