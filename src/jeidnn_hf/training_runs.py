"""The runs of a `run_config.TrainConfig`, trained one after another from a feature cache, or tried without images."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import PartialState
from torch import Tensor
from transformers import PrinterCallback, ProgressCallback, set_seed

from .data import Preprocessing
from .feature_cache import CachedFeatures, cached_role
from .files import write_text
from .modeling_jeidnn import JEIDNNForImageClassification
from .run_config import load_data
from .sources import DATASETS, Source
from .splits import Splits
from .stored import fresh_config
from .trainer import JEIDNNTrainer
from .training_args import JEIDNNTrainingArguments

_DRY_RUN = {
    "max_steps": 2, "num_train_epochs": 2, "warmup_epochs": 1, "gate_steps": 2, "report_to": "none",
    "eval_strategy": "no", "save_strategy": "no", "load_best_model_at_end": False, "early_stopping_patience": None,
    "push_to_hub": False, "disable_tqdm": True,
}  # fmt: skip
"""A step of the inference modules and a step of the gates, and nothing beside them."""


def train_runs(config: Mapping[str, Any], only: Sequence[str] | None = None, quiet: bool = False) -> list[dict]:
    """Trains each run and saves it in ``output_dir/RUN``; prints a line for each, where it ends.

    The backbone passes once over the images, into a feature cache. A run that is already saved is left alone, an
    interrupted one goes on from its last checkpoint. Runs in every process that torchrun or accelerate started.

    Args:
        config: as ``read_run_config`` gives it.
        only: names of the runs to train; default, all.
        quiet: print nothing.

    Returns:
        For each run ``{"run", "folder", "accuracy", "mul_adds", "seconds"}``: on validation, Mul-Adds as a share of
        the backbone's; only the first two where it was trained before.

    Raises:
        ValueError: an unknown run, one without a backbone, options out of range, images or weights that cannot be had.
    """
    output_dir, data = Path(config["output_dir"]), config["data"]
    state = PartialState(cpu=not torch.accelerator.is_available())  # the processes that torchrun or accelerate started
    names, models, trainings = plan_runs(config, only, output_dir)
    sources, splits = _begin_folder(config, is_writing=state.is_main_process)
    done = []
    for name in names:
        folder = output_dir / name
        if (folder / "model.safetensors").exists():
            done.append({"run": name, "folder": str(folder)})
            if not quiet:
                state.print(f"{name}: already trained, in {folder}")
            continue
        started = time.perf_counter()
        set_seed(trainings[name].seed)
        model = fresh_model(models[name], sources)
        features, validation = cached_features(model, sources, splits, data, output_dir)
        trainer = JEIDNNTrainer(model, trainings[name], features, validation)
        if quiet:
            _silence(trainer)
        trainer.train(resume_from_checkpoint=True)
        metrics = trainer.evaluate()
        trainer.save_state()
        row = {"accuracy": metrics["eval_accuracy"], "mul_adds": metrics["eval_mul_adds"]}
        done.append({"run": name, "folder": str(folder), **row, "seconds": time.perf_counter() - started})
        if state.is_main_process:
            model.save_pretrained(folder)
            if not quiet:
                print(
                    f"{name}: validation accuracy {row['accuracy']:.4f} at {row['mul_adds']:.3f} of the Mul-Adds, "
                    f"{done[-1]['seconds']:.0f} s, saved in {folder}"
                )
    return done


def prepare_runs(config: Mapping[str, Any], names: Sequence[str]) -> None:
    """Makes the run folder, with the features that these runs train on in its cache; trains nothing.

    Raises:
        ValueError: as of ``train_runs``.
    """
    output_dir = Path(config["output_dir"])
    _, models, _ = plan_runs(config, names, output_dir)
    sources, splits = _begin_folder(config)
    for name in names:
        cached_features(fresh_model(models[name], sources), sources, splits, config["data"], output_dir)


def _begin_folder(config: Mapping[str, Any], is_writing: bool = True) -> tuple[dict[str, Source], Splits]:
    sources, splits = load_data(config["data"])
    if is_writing:
        output_dir = Path(config["output_dir"])
        write_text(output_dir / "config.yaml", yaml.safe_dump(config, sort_keys=False))
        splits.save(output_dir / "splits.json")
    return sources, splits


def fresh_model(options: Mapping[str, Any], sources: Mapping[str, Source]) -> JEIDNNForImageClassification:
    """An untrained model of the classes of the images; ``options`` of ``from_backbone_pretrained``."""
    classes = {"id2label": dict(enumerate(sources["train"].features["label"].names))}
    return JEIDNNForImageClassification.from_backbone_pretrained(**{**classes, **options})


def cached_features(
    model: JEIDNNForImageClassification,
    sources: Mapping[str, Source],
    splits: Splits,
    data: Mapping[str, Any],
    output_dir: Path,
) -> tuple[CachedFeatures, CachedFeatures]:
    """The features to train on, in all views, and those of ``validation``, from the cache or into it."""
    preprocessing = Preprocessing.from_dict(model.config.preprocessing)
    cache = Path(data.get("cache_dir") or output_dir / "cache")
    views = range(data.get("views", 1)) or (None,)
    features = cached_role(model.backbone, sources, splits, "train", preprocessing, cache, views=views)
    return features, cached_role(model.backbone, sources, splits, "validation", preprocessing, cache)


def dry_run(config: Mapping[str, Any], only: Sequence[str] | None = None, quiet: bool = False) -> list[dict]:
    """Tries each run without its images and weights: builds all of it and trains for two steps; prints a line for each.

    The backbone is random. Two random images of the right size pass through it, and their features come under every
    label. Nothing is written but below a temporary folder.

    Returns:
        For each run ``{"run", "backbone", "image_size", "num_labels", "lam", "exits", "loss", "first_exit_mul_adds"}``:
        the mean loss of the steps, and the Mul-Adds of the first exit as a share of the backbone's.

    Raises:
        ValueError: as of ``train_runs``, where no images or weights are needed to see it.
    """
    known = DATASETS.get(config["data"]["dataset"])
    classes = {"num_labels": known.num_classes} if known else {}
    done = []
    with tempfile.TemporaryDirectory() as temporary:
        names, models, trainings = plan_runs(config, only, Path(temporary))
        for name in names:
            training = {**_training_of(config, name), **_DRY_RUN, "output_dir": temporary}
            set_seed(trainings[name].seed)
            options = {**classes, **models[name]}
            if "id2label" in options:
                options.pop("num_labels", None)
            model = JEIDNNForImageClassification(fresh_config(**{**options, "weights": None})).eval()
            size, channels, labels = model.config.image_size, model.config.num_channels, model.config.num_labels
            with torch.inference_mode():
                features = model.backbone(torch.randn(2, channels, size, size))
            data = CachedFeatures([_SyntheticFeatures(torch.cat(features, dim=1), labels, model.backbone.exit_dims)])
            trainer = JEIDNNTrainer(model, JEIDNNTrainingArguments(**training), data, data)
            _silence(trainer)
            loss = trainer.train().training_loss
            row = {
                "run": name, "backbone": model.config.backbone, "image_size": size, "num_labels": labels,
                "lam": model.config.lam, "exits": model.backbone.num_exits, "loss": loss,
                "first_exit_mul_adds": float(model.exit_costs().normalised[0]),
            }  # fmt: skip
            done.append(row)
            if not quiet:
                print(
                    "{run}: {backbone}, {image_size} px, {num_labels} classes, lambda {lam}, {exits} exits, the first "
                    "at {first_exit_mul_adds:.3f} of the Mul-Adds; two steps, loss {loss:.3f}".format(**row),
                    flush=True,
                )
    return done


@dataclasses.dataclass
class _SyntheticFeatures:
    """In the place of a ``feature_cache.FeatureCache``: one row per label, the images in turn."""

    images: Tensor
    num_labels: int
    exit_dims: tuple[int, ...]

    def __post_init__(self) -> None:
        self.labels = self.index = torch.arange(self.num_labels)
        self.features = self.images.clone()[self.labels % len(self.images)]

    def __len__(self) -> int:
        return self.num_labels

    def statistics(self) -> tuple[Tensor, Tensor]:
        return self.features.mean(0), self.features.std(0, correction=0)


def plan_runs(
    config: Mapping[str, Any], only: Sequence[str] | None, output_dir: Path
) -> tuple[list[str], dict[str, dict[str, Any]], dict[str, JEIDNNTrainingArguments]]:
    """The names of the runs asked for; of all runs, what the model and the trainer are made from."""
    runs = config["runs"]
    if unknown := sorted(set(only or ()) - runs.keys()):
        raise ValueError(f"Expected runs among {list(runs)}, but got {unknown}.")
    models, trainings = {}, {}
    for name, run in runs.items():
        models[name] = {**config["model"], **run.get("model", {})}
        if "backbone" not in models[name]:
            raise ValueError(f"Expected a backbone in the model of {name}, but got {list(models[name])} only.")
        options = {"output_dir": str(output_dir / name / "checkpoints"), **_training_of(config, name)}
        trainings[name] = JEIDNNTrainingArguments(**options)
    return list(only or runs), models, trainings


def _silence(trainer: JEIDNNTrainer) -> None:
    """Takes away what prints its logs on standard output."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


def _training_of(config: Mapping[str, Any], run: str) -> dict[str, Any]:
    return {**config.get("training", {}), **config["runs"][run].get("training", {})}
