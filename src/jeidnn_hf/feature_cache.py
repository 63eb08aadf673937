"""The feature cache: exit features on disk, one file per split and augmented view, so that training never sees a pixel.

A file is one safetensors matrix ``features (N, sum_l d_l)``, see ``feature_file``. Its name and header carry the key:
backbone weights, exits, preprocessing, images, view and seed. Processes that torchrun or accelerate started share an
extraction; one that is interrupted goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from torch import Tensor
from tqdm.auto import tqdm

from .backbones import StagedBackbone, fingerprint
from .data import ImageView, Preprocessing
from .feature_file import FORMAT, FeatureFile, drop_pages, gather, header_of
from .files import clear_write_errors
from .processes import in_each, rank_and_number
from .sources import Source
from .splits import Splits


def cache_key(backbone: StagedBackbone, images: ImageView, split: str, dtype: torch.dtype) -> dict[str, Any]:
    """What decides the numbers in a cache file; ``split`` is the hash of a split role, ``images`` has one view."""
    (view,) = images.views
    key = {
        "format": FORMAT,
        "network": getattr(backbone.model, "build_options", type(backbone.model).__name__),
        "backbone": fingerprint(backbone.model.state_dict()),
        "exit_stages": list(backbone.exit_stages),
        "exit_pooling": [list(names) for names in backbone.exit_pooling],
        "native_head": backbone.native_head,
        "image_size": backbone.image_size,
        "preprocessing": images.preprocessing.fingerprint,
        "split": split,
        "images": images.content_hash(),
        "view": view,
        "seed": images.seed if view is not None else None,
        "dtype": str(dtype).removeprefix("torch."),
        "exit_dims": list(backbone.exit_dims),
    }
    return json.loads(json.dumps(key, default=str))


def cache_features(
    backbone: StagedBackbone,
    images: ImageView,
    split: str,
    folder: str | Path,
    *,
    dtype: torch.dtype = torch.float16,
    batch_size: int = 256,
    description: str = "features",
) -> FeatureCache:
    """Runs the backbone over one view of a split, once; later calls with the same key open the file.

    Args:
        backbone: on the device to compute on.
        images: one view of the split.
        split: hash of the split role, ``Splits.info(role).sha256``.
        folder: where cache files live.
        dtype: what is stored; float16 halves the size, float32 keeps every bit.
        batch_size: images at once, within blocks of 256 rows.

    Processes that work together all have to call this, with the same folder.

    Raises:
        ValueError: not enough room on the disk for the file.
        WriteError: (an OSError) no room left on the way; a later call goes on from what was written.
        RuntimeError: another of the processes failed.
    """
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"Expected dtype float16 or float32, but got {dtype}.")
    if len(images.views) != 1:
        raise ValueError(f"Expected images in one view, but got {len(images.views)}; cache each by itself.")
    folder = Path(folder)

    def prepare() -> dict[str, Any]:
        with clear_write_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
        return cache_key(backbone, images, split, dtype)

    keys = in_each(prepare)
    key = keys[0]
    if other := sorted(name for name in key if any(each[name] != key[name] for each in keys)):
        raise ValueError(f"Expected features with the same {other} in every process, but got different ones.")
    path = folder / f"features-{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.safetensors"
    _extract(backbone, images, key, path, dtype, batch_size, description)
    return FeatureCache(path, key)


def cached_role(
    backbone: StagedBackbone,
    sources: Mapping[str, Source],
    splits: Splits,
    role: str,
    preprocessing: Preprocessing,
    folder: str | Path,
    *,
    views: Sequence[int | None] = (None,),
    dtype: torch.dtype = torch.float16,
    seed: int = 0,
) -> CachedFeatures:
    """The features of one split role, in one or more views, from the cache or into it; arguments as of
    ``cache_features`` and ``data.ImageView``."""
    source, indices = splits.roles[role]
    caches = []
    for view in views:
        images = ImageView(sources[source], indices, preprocessing, views=(view,), seed=seed)
        what = f"features {role}" + ("" if view is None else f" view {view}")
        split = splits.info(role).sha256
        caches.append(cache_features(backbone, images, split, folder, dtype=dtype, description=what))
    return CachedFeatures(caches)


def _extract(backbone, images, key, path: Path, dtype, batch_size: int, description: str) -> None:
    """Writes the file, unless it is there; processes that work together share its blocks, the main one says which."""
    lock, partial = FileLock(path.with_suffix(".lock")), path.with_suffix(".partial")
    rank, processes = rank_and_number()

    def start() -> list[int] | None:
        if rank == 0:
            lock.acquire()
            return None if path.exists() else _start(partial, len(images), key, dtype, description)

    try:
        todo, *_ = in_each(start)
        if todo is not None:
            in_each(lambda: _write(backbone, images, partial, todo[rank::processes], dtype, batch_size, description))
            in_each(lambda: partial.replace(path) if rank == 0 else None)
    finally:
        lock.release()


def _start(partial: Path, rows: int, key: dict[str, Any], dtype: torch.dtype, description: str) -> list[int]:
    """The blocks to write, into a file laid out for them or left by an earlier call; says how large it will be."""
    header, size = header_of(rows, dtype, key)
    try:
        file = FeatureFile(partial)
        todo = file.wrong_blocks() if file.header == header else None
    except Exception:  # there is none, or none of use
        todo = None
    there = 0 if todo is None else rows - sum(len(file.rows_of(block)) for block in todo)
    resumed = f"; {there:,} rows are there" if there else ""
    shape = f"{rows:,} x {sum(key['exit_dims']):,} {key['dtype']}"
    tqdm.write(f"{description}: {shape}, {size / 1e9:.2f} GB in {partial.parent}{resumed}", file=sys.stderr)
    need, free = size - there * (size // rows), shutil.disk_usage(partial.parent).free
    if free < need:
        raise ValueError(
            f"Expected {need / 1e9:.2f} GB free for the features in {partial.parent}, but got {free / 1e9:.2f} GB."
        )
    if todo is None:
        with clear_write_errors(partial):
            todo = FeatureFile.lay_out(partial, rows, dtype, key).wrong_blocks()
    return todo


@torch.inference_mode()
def _write(backbone, images, partial: Path, blocks: Sequence[int], dtype, batch_size: int, description: str) -> None:
    device, labels, index = next(backbone.parameters()).device, images.labels, images.index
    with clear_write_errors(partial):
        file = FeatureFile(partial)
    total, (rank, _) = sum(len(file.rows_of(block)) for block in blocks), rank_and_number()
    with tqdm(total=total, desc=description, unit="img", disable=rank > 0) as bar:
        for block in blocks:
            rows, pieces = file.rows_of(block), []
            for start in range(0, len(rows), batch_size):
                pixels = images.__getitems__(rows[start : start + batch_size])["pixel_values"].to(device)
                pieces.append(torch.cat(backbone(pixels), dim=1).to(dtype).cpu())
                bar.update(len(pixels))
            features = torch.cat(pieces)
            if not torch.isfinite(features).all():
                raise ValueError(
                    f"Expected finite features within {dtype}, but got others in rows {rows[0]} to {rows[-1]}; "
                    "check the images, or pass dtype=torch.float32."
                )
            with clear_write_errors(partial):
                file.write_block(block, features, labels[rows.start : rows.stop], index[rows.start : rows.stop])


_verified: set[tuple[str, int, int]] = set()
"""Path, time of change and size of the files that this process has read through."""


class FeatureCache:
    """One cache file, memory-mapped.

    Attributes:
        key: what it was made from.
        features: ``(N, sum_l d_l)`` in the stored type; to be read only, ``feature_file.gather`` keeps memory low.
        labels, index: ``(N,)`` int64.
        exit_dims: width of each exit's part.
    """

    def __init__(self, path: str | Path, key: dict[str, Any] | None = None):
        """Opens a file, and reads it through the first time in a process.

        Raises:
            ValueError: it is broken, or made under another ``key``, or rows differ from their checksum.
        """
        try:
            file = FeatureFile(path)
            self.key, self.features, self.exit_dims = file.key, file.features, tuple(file.key["exit_dims"])
        except Exception as error:
            raise ValueError(
                f"Expected a feature cache at {str(path)!r}, but it cannot be read: {error}; remove the file."
            ) from error
        if key is not None and key != self.key:
            other = sorted(name for name in key if key[name] != self.key.get(name))
            raise ValueError(
                f"Expected features made with the same {other} in {str(path)!r}, but got others; remove the file."
            )
        status = file.path.stat()
        version = str(file.path.resolve()), status.st_mtime_ns, status.st_size
        if file.checksums is not None and version not in _verified:
            for block in file.wrong_blocks():
                rows = file.rows_of(block)
                raise ValueError(
                    f"Expected features as they were written in {str(path)!r}, but rows {rows[0]} to {rows[-1]} "
                    "differ from their checksum; remove the file."
                )
            _verified.add(version)
        self.labels, self.index = file.labels.clone(), file.index.clone()

    def __len__(self) -> int:
        return len(self.labels)

    def statistics(self, chunk: int = 256) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every feature over the rows, ``(sum_l d_l,)`` float32 each."""
        total, squares = torch.zeros(2, self.features.shape[1], dtype=torch.float64)
        for rows in self.features.split(chunk):
            rows, ones = rows.double(), torch.ones(len(rows), dtype=torch.float64)
            total += ones @ rows  # sums, four times as fast as sum(0)
            squares += ones @ rows.square()
            drop_pages()
        mean = total / len(self)
        return mean.float(), (squares / len(self) - mean.square()).clamp_min(0).sqrt().float()


class CachedFeatures(torch.utils.data.Dataset):
    """Exit features of one or more views as a data set: row r is image r % N in view r // N.

    A batch is gathered from each view's matrix in one indexing operation, and comes out collated and in float32:
    ``exit_features (B, sum_l d_l)``, ``labels`` and ``index`` ``(B,)``.
    """

    def __init__(self, views: Sequence[FeatureCache]):
        if not views or not len(views[0]):
            raise ValueError("Expected at least one view with at least one image, but got none.")
        if any(v.exit_dims != views[0].exit_dims or not torch.equal(v.index, views[0].index) for v in views):
            raise ValueError("Expected views of the same images and exits, but got different ones.")
        self.views = list(views)

    @property
    def exit_dims(self) -> tuple[int, ...]:
        return self.views[0].exit_dims

    @property
    def labels(self) -> Tensor:
        return self.views[0].labels.repeat(len(self.views))

    @property
    def index(self) -> Tensor:
        return self.views[0].index.repeat(len(self.views))

    def __len__(self) -> int:
        return len(self.views) * len(self.views[0])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        return {name: values[0] for name, values in self.__getitems__([row]).items()}

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        rows = torch.as_tensor(rows)
        if len(rows) and not (-len(self) <= int(rows.min()) and int(rows.max()) < len(self)):
            raise IndexError(f"Expected rows in [0, {len(self)}), but got {int(rows.min())} to {int(rows.max())}.")
        rows = rows % len(self)
        view, row = rows // len(self.views[0]), rows % len(self.views[0])
        if len(self.views) == 1:
            features = gather(self.views[0].features, row)
        else:
            features = self.views[0].features.new_empty(len(rows), self.views[0].features.shape[1])
            for v, cache in enumerate(self.views):
                here = (view == v).nonzero().squeeze(1)
                features[here] = gather(cache.features, row[here])
        return {
            "exit_features": features.float(),
            "labels": self.views[0].labels[row],
            "index": self.views[0].index[row],
        }
