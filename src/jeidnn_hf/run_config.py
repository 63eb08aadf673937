"""YAML or JSON files that describe a training: read, and checked before anything is computed or written."""

from __future__ import annotations

import json
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
    """Which images: arguments of ``sources.load_source`` and ``splits.make_splits``, views and place of the cache.

    ``views``: how many augmented views of the training images are cached; 0 for the images as they are.
    """

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
    """The file of ``jeidnn train``; ``model``: arguments of ``from_backbone_pretrained``."""

    output_dir: str
    data: DataSection
    model: dict
    runs: dict[str, RunSection]
    training: JEIDNNTrainingArguments = field(default_factory=dict)


def read_run_config(
    path: str | Path,
    layout: type,
    output_dir: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The mapping in a YAML or JSON file, after checking it against ``layout``, a dataclass of dataclasses.

    Args:
        path: a ``.json`` file is read as JSON, any other as YAML.
        output_dir: instead of the file's.
        overrides: by dotted keys, values instead of the file's, such as ``{"training.learning_rate": 0.005}``.

    Raises:
        ValueError: not YAML or JSON, a key that is unknown or missing, a value of another type.
        OSError: no such file.
    """
    kind, read = ("JSON", json.loads) if Path(path).suffix == ".json" else ("YAML", yaml.safe_load)
    try:
        config = read(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"Expected a {kind} file at {str(path)!r}, but got: {reason}.") from error
    if isinstance(config, Mapping):
        for key, value in (overrides or {}).items():
            config = _with_value(config, key, value)
        if output_dir is not None:
            config = {**config, "output_dir": str(output_dir)}
    check_arguments(str(path), config, layout)
    return config


def _with_value(config: Mapping[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A copy with another value under a dotted key; names that are there may have dots themselves."""
    own = [name for name in config if key == name or key.startswith(f"{name}.")]
    name = max(own, key=len) if own else key.partition(".")[0]
    rest = key[len(name) + 1 :]
    if rest:
        section = config.get(name)
        if section is not None and not isinstance(section, Mapping):
            raise ValueError(f"Expected a section {name} to set {rest} in, but got {section!r}.")
        value = _with_value(section or {}, rest, value)
    return {**config, name: value}


def load_data(data: Mapping[str, Any]) -> tuple[dict[str, Source], Splits]:
    """The source splits and the roles that a data section asks for."""
    if data.get("views", 1) < 0:
        raise ValueError(f"Expected views of 0 or more, but got {data['views']}; 0 caches the images as they are.")
    check_arguments("splits", {"dataset": "", "labels": {}, **data.get("splits", {})}, make_splits)
    sources = load_source(data["dataset"], **source_options(data))
    return sources, split_source(data["dataset"], sources, **data.get("splits", {}))
