"""YAML files that describe a training: read, and checked before anything is computed or written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .checks import check_arguments
from .sources import Source, load_source, source_options, split_source
from .splits import Splits, make_splits
from .training_args import JEIDNNTrainingArguments


@dataclass
class DataSection:
    """Which images: arguments of ``sources.load_source`` and ``splits.make_splits``, views and place of the cache."""

    dataset: str
    data_files: dict | None = None
    data_dir: str | None = None
    streaming: bool = False
    hub_config: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    train_split: str | None = None
    test_split: str | None = None
    cache_dir: str | None = None
    views: int = 1
    splits: dict = field(default_factory=dict)


@dataclass
class RunSection:
    """What one run has of its own."""

    model: dict = field(default_factory=dict)
    training: JEIDNNTrainingArguments = field(default_factory=dict)


@dataclass
class TrainConfig:
    """The file of ``examples/train.py``; ``model``: arguments of ``from_backbone_pretrained``."""

    output_dir: str
    data: DataSection
    model: dict
    runs: dict[str, RunSection]
    training: JEIDNNTrainingArguments = field(default_factory=dict)


def read_run_config(path: str | Path, layout: type, output_dir: str | Path | None = None) -> dict[str, Any]:
    """The mapping in a YAML file, after checking it against ``layout``, a dataclass of dataclasses.

    ``output_dir``: instead of the file's.

    Raises:
        ValueError: not YAML, a key that is unknown or missing, a value of another type.
        OSError: no such file.
    """
    try:
        config = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"Expected a YAML file at {str(path)!r}, but got: {' '.join(str(error).split())}.") from error
    if output_dir is not None and isinstance(config, Mapping):
        config = {**config, "output_dir": str(output_dir)}
    check_arguments(str(path), config, layout)
    return config


def load_data(data: Mapping[str, Any]) -> tuple[dict[str, Source], Splits]:
    """The source splits and the roles that a data section asks for."""
    check_arguments("splits", {"dataset": "", "labels": {}, **data.get("splits", {})}, make_splits)
    sources = load_source(data["dataset"], **source_options(data))
    return sources, split_source(data["dataset"], sources, **data.get("splits", {}))
