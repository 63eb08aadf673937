"""Trains the exits of a frozen backbone, one run after another, from a YAML file.

    accelerate launch --cpu examples/train.py --config examples/configs/cifar10_resnet56.yaml

The backbone passes once over the images, into a feature cache; every run trains from the cache and is saved in its own
folder. A run that is already saved is left alone, an interrupted one goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from transformers import set_seed

from jeidnn_hf import JEIDNNForImageClassification
from jeidnn_hf.cli import exit_status
from jeidnn_hf.data import Preprocessing
from jeidnn_hf.feature_cache import cached_role
from jeidnn_hf.files import write_text
from jeidnn_hf.run_config import TrainConfig, load_data, read_run_config
from jeidnn_hf.trainer import JEIDNNTrainer
from jeidnn_hf.training_args import JEIDNNTrainingArguments


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="YAML file with data, model, training and runs")
    parser.add_argument("--output_dir", type=Path, help="instead of the config's")
    parser.add_argument("--run", nargs="+", help="only these runs")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    return exit_status("train.py", lambda: train(options), debug=options.debug)


def train(options: argparse.Namespace) -> None:
    config = read_run_config(options.config, TrainConfig, options.output_dir)
    output_dir = Path(config["output_dir"])
    if unknown := sorted(set(options.run or ()) - config["runs"].keys()):
        raise ValueError(f"Expected runs among {list(config['runs'])}, but got {unknown}.")
    state = PartialState(cpu=not torch.accelerator.is_available())  # the processes that torchrun or accelerate started

    data = config["data"]
    sources, splits = load_data(data)
    models, trainings = {}, {}
    for name, run in config["runs"].items():
        models[name] = {**config["model"], **run.get("model", {})}
        if "backbone" not in models[name]:
            raise ValueError(f"Expected a backbone in the model of {name}, but got {list(models[name])} only.")
        training = {**config.get("training", {}), **run.get("training", {})}
        trainings[name] = JEIDNNTrainingArguments(**{"output_dir": str(output_dir / name / "checkpoints"), **training})
    if state.is_main_process:
        write_text(output_dir / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        splits.save(output_dir / "splits.json")

    for name in options.run or config["runs"]:
        if (output_dir / name / "model.safetensors").exists():
            state.print(f"{name}: already trained, in {output_dir / name}")
            continue
        started = time.perf_counter()
        set_seed(trainings[name].seed)
        names = sources["train"].features["label"].names
        choice = {"id2label": dict(enumerate(names)), **models[name]}
        model = JEIDNNForImageClassification.from_backbone_pretrained(**choice)
        preprocessing = Preprocessing.from_dict(model.config.preprocessing)
        cache = Path(data.get("cache_dir") or output_dir / "cache")
        views = range(data.get("views", 1))
        features = cached_role(model.backbone, sources, splits, "train", preprocessing, cache, views=views)
        validation = cached_role(model.backbone, sources, splits, "validation", preprocessing, cache)
        folder = output_dir / name
        trainer = JEIDNNTrainer(model, trainings[name], features, validation)
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
    sys.exit(main())
