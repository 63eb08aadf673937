"""Where images come from: files, the environment's data folder, or the Hub; known data sets and any other.

    sources = load_source("cifar10")             # {"train": Dataset, "test": Dataset}
    splits = split_source("cifar10", sources)    # the paper's roles: 45,000 / 2,500 + 2,500 / 10,000
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from glob import escape, glob
from inspect import signature
from pathlib import Path
from typing import Any, Self

import datasets
import numpy as np
import pyarrow as pa

from .splits import Splits, check_labels, make_splits

Paths = str | os.PathLike | Sequence[str | os.PathLike]

_STREAM_ROWS = 256  # pictures in memory at a time
_LABEL_ROWS = 1 << 16


@dataclass(frozen=True)
class DatasetSpec:
    """A data set as the Hub stores it, and how the paper (Appendix 9.1.1) splits it. What is None is found out.

    ``held_out``: training images set aside, half for validation and half for calibration. ``imbalance``: of the
    training images, see ``splits.make_splits``.
    """

    name: str
    hub_id: str
    hub_config: str | None = None
    image_column: str | None = None
    label_column: str | None = None
    num_classes: int | None = None
    train_split: str = "train"
    test_split: str | None = None
    held_out: int = 5000
    imbalance: float = 1.0


_CIFAR100 = DatasetSpec("cifar100", "uoft-cs/cifar100", None, "img", "fine_label", 100, test_split="test")
DATASETS: dict[str, DatasetSpec] = {
    "cifar10": DatasetSpec("cifar10", "uoft-cs/cifar10", None, "img", "label", 10, test_split="test"),
    "cifar100": _CIFAR100,
    "cifar100-lt": replace(_CIFAR100, imbalance=100.0),
    "svhn": DatasetSpec("svhn", "ufldl-stanford/svhn", "cropped_digits", "image", "label", 10, test_split="test"),
    "imagenet": DatasetSpec(
        "imagenet", "ILSVRC/imagenet-1k", None, "image", "label", 1000, test_split="validation", held_out=50_000
    ),
}


class StreamedRows:
    """A source split read from front to back, on the Hub or from parquet: in memory are its labels and a few pictures.

    ``rows[numbers]`` gives ``{"image": encoded pictures}``. A number before the last one starts a new pass, so the
    numbers must ascend within a call; ``feature_cache`` asks in that order.

    Attributes:
        features: of the columns ``image`` and ``label``.
        labels: int64 ``(N,)``, -1 where empty.
    """

    def __init__(self, images: datasets.IterableDataset, labels: np.ndarray, label: Any) -> None:
        (self._column,) = images.column_names
        self._images = images.cast_column(self._column, datasets.Image(decode=False)).with_format("arrow")
        self.labels, self.features = labels, datasets.Features({"image": datasets.Image(), "label": label})
        self._rewind()

    def cast_column(self, column: str, feature: Any) -> Self:
        """As of ``datasets.Dataset``."""
        self.features[column] = feature
        return self

    def _rewind(self) -> None:
        self._tables = self._images.iter(_STREAM_ROWS)
        self._start, self._table = 0, ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Sequence[int]) -> dict[str, list[Any]]:
        if (np.diff(rows) < 0).any():
            raise ValueError(
                f"Expected ascending rows of a streamed source, but got {list(rows)[:5]}...; extract its features "
                "first (feature_cache.cached_role), or load it without streaming."
            )
        pictures = []
        for row in rows:
            if row < self._start:
                self._rewind()
            while row >= self._start + len(self._table):
                self._start, self._table = self._start + len(self._table), next(self._tables)
            pictures.append(self._table[self._column][int(row) - self._start].as_py())
        return {"image": pictures}


Source = datasets.Dataset | StreamedRows


def load_source(
    name: str,
    *,
    data_files: Mapping[str, Paths] | None = None,
    data_dir: str | os.PathLike | None = None,
    streaming: bool = False,
    hub_config: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
) -> dict[str, Source]:
    """The source splits of a data set, each with the columns ``image`` (Image) and ``label`` (ClassLabel).

    The first that is given is used, and never another: ``data_files``, from split name to parquet path(s) or glob(s);
    ``data_dir``, a folder of ``SPLIT-*.parquet``, or of ``SPLIT/CLASS/`` folders of pictures; the environment variable
    ``JEIDNN_DATA_DIR``, a folder holding one such folder per data set name; the Hub. Splits are named as on the Hub,
    here and in files; the train and test split become "train" and "test", further ones keep their names, and those
    without any label are left out. Shards are read in name order.

    Args:
        name: one of DATASETS, or the Hub id of any other ("org/name"); with files of one's own, any name.
        streaming: read parquet from front to back, instead of first making the copy that is memory-mapped; each role
            and view is then one pass of ``feature_cache.cached_role``. See ``StreamedRows``.
        hub_config: configuration ("subset") of the Hub data set.
        image_column: default, the data set's, or the only column of images.
        label_column: default, the data set's, or the only column of class labels.
        train_split: default, the data set's, or "train".
        test_split: default, the data set's, or the first of test, validation, val; a data set without any of these has
            no "test".

    Raises:
        ValueError: unknown name; files, splits or columns not found; other classes than expected, or a label out of
            range; nothing to be had from the Hub.
    """
    given = {
        "hub_config": hub_config, "image_column": image_column, "label_column": label_column,
        "train_split": train_split, "test_split": test_split,
    }  # fmt: skip
    spec = replace(_spec(name), **{field: value for field, value in given.items() if value is not None})
    if data_files is None and data_dir is None and (root := os.environ.get("JEIDNN_DATA_DIR")):
        data_dir = Path(root, spec.name)
    kind, options = _locate(spec, data_files, data_dir)
    if kind == "imagefolder":
        spec = replace(spec, image_column="image", label_column="label")
    loaded = _load(spec, kind, options, streaming=streaming)
    names = _split_names(spec, loaded)
    sources = {}
    for split, stored in names.items():
        features, where = loaded[stored].features, f"split {stored!r} of {spec.name}"
        image = _column(spec.image_column, features, datasets.Image, ("image", "img"), "image_column", where)
        label = _column(spec.label_column, features, datasets.ClassLabel, ("label", "labels"), "label_column", where)
        if streaming:
            images, labels = (
                _load(spec, kind, options, streaming=True, columns=[column])[stored] for column in (image, label)
            )
            rows = StreamedRows(images, _stream_labels(labels, label), features[label])
        else:
            rows = loaded[stored].select_columns([image, label]).rename_columns({image: "image", label: "label"})
            rows = rows.cast_column("image", datasets.Image())
        if split in ("train", "test") or (read_labels(rows) >= 0).any():
            sources[split] = rows
    label = sources["train"].features["label"]
    num_classes = spec.num_classes or getattr(label, "num_classes", None)
    num_classes = num_classes or 1 + max(int(read_labels(rows).max(initial=-1)) for rows in sources.values())
    return {
        split: _with_classes(rows, num_classes, f"split {names[split]!r} of {spec.name}")
        for split, rows in sources.items()
    }


def source_options(data: Mapping[str, Any]) -> dict[str, Any]:
    """Of the ``data`` section of a YAML config, the options of ``load_source``."""
    return {key: data[key] for key in signature(load_source).parameters if key in data}


def split_source(name: str, sources: Mapping[str, Source], **options: Any) -> Splits:
    """``make_splits`` of a loaded data set: the paper's sizes and imbalance, where ``options`` name no others."""
    spec = _spec(name)
    half = spec.held_out // 2
    defaults = {
        "validation": half, "calibration": half, "imbalance": spec.imbalance,
        "num_classes": sources["train"].features["label"].num_classes,
    }  # fmt: skip
    return make_splits(name, {split: read_labels(rows) for split, rows in sources.items()}, **{**defaults, **options})


def read_labels(source: Source) -> np.ndarray:
    """The ``label`` column, int64 ``(N,)``, -1 where it is empty; reads no image. ValueError if not of integers."""
    if isinstance(source, StreamedRows):
        return source.labels
    return _label_numbers(source.select_columns("label").with_format("arrow")[:]["label"].chunks)


def _stream_labels(stream: datasets.IterableDataset, column: str) -> np.ndarray:
    tables = stream.with_format("arrow").iter(_LABEL_ROWS)
    return _label_numbers(chunk for table in tables for chunk in table[column].chunks)


def _label_numbers(chunks: Iterable[pa.Array]) -> np.ndarray:
    numbers = [np.empty(0, np.int64)]
    for chunk in chunks:
        if not pa.types.is_integer(chunk.type):
            raise ValueError(f"Expected integer class labels, but got a label column of type {chunk.type}.")
        numbers.append(chunk.fill_null(-1).to_numpy().astype(np.int64))
    return np.concatenate(numbers)


def _spec(name: str) -> DatasetSpec:
    return DATASETS.get(name) or DatasetSpec(name, name)


def _locate(
    spec: DatasetSpec, data_files: Mapping[str, Paths] | None, data_dir: str | os.PathLike | None
) -> tuple[str, dict[str, Any]]:
    """What ``datasets.load_dataset`` is to be called with."""
    if data_files is not None:
        return "parquet", {"data_files": _find_files(spec, data_files)}
    if data_dir is not None:
        folder = Path(data_dir)
        found = sorted(path.name.partition("-")[0] for path in folder.glob("*-*.parquet"))
        if not found and folder.is_dir() and any(path.is_dir() for path in folder.iterdir()):
            return "imagefolder", {"data_dir": os.fspath(folder), "drop_labels": False}
        wanted = dict.fromkeys([spec.train_split, *([spec.test_split] if spec.test_split else []), *found])
        return "parquet", {"data_files": _find_files(spec, {s: f"{escape(str(folder))}/{s}-*.parquet" for s in wanted})}
    if "/" not in spec.hub_id:
        raise ValueError(
            f"Expected a data set among {sorted(DATASETS)}, a Hub id 'org/name', data_dir or data_files, but got "
            f"{spec.name!r}."
        )
    return spec.hub_id, {"name": spec.hub_config}


def _find_files(spec: DatasetSpec, data_files: Mapping[str, Paths]) -> dict[str, list[str]]:
    required = {split: () for split in (spec.train_split, spec.test_split) if split}
    files = {}
    for split, patterns in {**required, **data_files}.items():
        patterns = [patterns] if isinstance(patterns, str | os.PathLike) else patterns
        files[split] = [escape(path) for pattern in patterns for path in sorted(glob(os.fspath(pattern)))]
        if not files[split]:
            sought = [os.fspath(pattern) for pattern in patterns]
            raise ValueError(f"Expected parquet files for split {split!r} of {spec.name}, but found none at {sought}.")
    return files


def _load(spec: DatasetSpec, kind: str, options: Mapping[str, Any], **more: Any) -> Mapping[str, Any]:
    try:
        return datasets.load_dataset(kind, **options, **more)
    except (datasets.exceptions.DatasetGenerationError, pa.ArrowInvalid) as error:
        cause = " ".join(repr(error.__cause__ or error).split())
        raise ValueError(f"Expected readable {kind} files, but got {cause} from {options}.") from error
    except (TypeError, ValueError) as error:
        if "columns" not in more:
            raise
        raise ValueError(f"Expected parquet files to stream, but got others: {kind} with {options}.") from error
    except (ConnectionError, FileNotFoundError) as error:
        raise ValueError(
            f"Expected the data set {spec.name} at {options.get('data_dir', kind)!r}, but it cannot be had: {error}; "
            "pass data_dir or data_files, or set JEIDNN_DATA_DIR."
        ) from error


def _split_names(spec: DatasetSpec, loaded: Mapping[str, Any]) -> dict[str, str]:
    """Our name of each split -> its name in the data set."""
    test = spec.test_split or next((split for split in ("test", "validation", "val") if split in loaded), None)
    names = {"train": spec.train_split} | ({"test": test} if test else {})
    if absent := sorted(set(names.values()) - set(loaded)):
        raise ValueError(f"Expected the splits {list(names.values())} of {spec.name}, but {absent} are not there.")
    return names | {split: split for split in loaded if split not in {*names, *names.values()}}


def _column(
    name: str | None, features: datasets.Features, kind: type, usual: Sequence[str], option: str, where: str
) -> str:
    found = [name] if name else [column for column, feature in features.items() if isinstance(feature, kind)]
    found = [column for column in found or usual if column in features]
    if len(found) != 1:
        wanted = f"column {name!r}" if name else f"one column of type {kind.__name__} or named {' or '.join(usual)}"
        raise ValueError(f"Expected {wanted} in {where}, but found {found or list(features)}; set {option}.")
    return found[0]


def _with_classes(source: Source, num_classes: int, where: str) -> Source:
    check_labels(read_labels(source), num_classes, where)
    if not isinstance(source.features["label"], datasets.ClassLabel):
        source = source.cast_column("label", datasets.ClassLabel(num_classes=num_classes))
    if (classes := source.features["label"].num_classes) != num_classes:
        raise ValueError(f"Expected {num_classes} classes in {where}, but got {classes}.")
    return source
