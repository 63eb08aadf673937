"""The feature cache: exit features on disk, one file per split and augmented view, so that training never sees a pixel.

A file is one safetensors matrix ``features (N, sum_l d_l)``, memory-mapped, with ``labels`` and ``index``. Its name and
header carry the key: backbone weights, exits, preprocessing, images, view and seed. An interrupted extraction goes on
where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors import safe_open
from torch import Tensor
from tqdm.auto import tqdm

from .backbones import StagedBackbone, fingerprint
from .data import ImageView, Preprocessing
from .sources import Source
from .splits import Splits

_SAVE_EVERY = 32  # batches between notes of progress


def cache_key(backbone: StagedBackbone, images: ImageView, split: str, dtype: torch.dtype) -> dict[str, Any]:
    """What decides the numbers in a cache file; ``split`` is the hash of a split role, ``images`` has one view."""
    (view,) = images.views
    key = {
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

    Raises:
        ValueError: not enough room on the disk.
    """
    if dtype not in (torch.float16, torch.float32):
        raise ValueError(f"Expected dtype float16 or float32, but got {dtype}.")
    if len(images.views) != 1:
        raise ValueError(f"Expected images in one view, but got {len(images.views)}; cache each by itself.")
    key = cache_key(backbone, images, split, dtype)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"features-{name}.safetensors"
    with FileLock(folder / f"features-{name}.lock"):
        if not path.exists():
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
    partial, progress = path.with_suffix(".partial"), path.with_suffix(".progress.json")
    rows, width = len(images), sum(backbone.exit_dims)
    layout = {"features": (dtype, (rows, width)), "labels": (torch.int64, (rows,)), "index": (torch.int64, (rows,))}
    header, offsets, size = _header(layout, key)
    done = _rows_done(progress) if partial.exists() else 0
    if not done:
        progress.unlink(missing_ok=True)
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise ValueError(
                f"Expected {size / 1e9:.2f} GB free for the features in {path.parent}, but got {free / 1e9:.2f} GB."
            )
        with open(partial, "wb") as file:
            file.write(header)
            file.truncate(size)
        _matrix(partial, offsets["labels"], "int64", (rows,))[:] = images.labels.numpy()
        _matrix(partial, offsets["index"], "int64", (rows,))[:] = images.indices
    features = _matrix(partial, offsets["features"], key["dtype"], (rows, width))
    device = next(backbone.parameters()).device
    with torch.inference_mode(), tqdm(total=rows, initial=done, desc=description, unit="img") as bar:
        for number, start in enumerate(range(done, rows, batch_size), start=1):
            stop = min(start + batch_size, rows)
            pixels = images.__getitems__(range(start, stop))["pixel_values"].to(device)
            rows_now = torch.cat(backbone(pixels), dim=1).to(dtype).cpu()
            if not torch.isfinite(rows_now).all():
                raise ValueError(
                    f"Expected finite features within {key['dtype']}, but got others in rows {start} to {stop - 1}; "
                    "check the images, or pass dtype=torch.float32."
                )
            features[start:stop] = rows_now.numpy()
            bar.update(stop - start)
            if number % _SAVE_EVERY == 0:
                features.flush()
                progress.write_text(json.dumps({"rows": stop}))
    features.flush()
    partial.replace(path)
    progress.unlink(missing_ok=True)


def _rows_done(progress: Path) -> int:
    try:
        return json.loads(progress.read_text())["rows"]
    except (OSError, ValueError):
        return 0


def _header(layout: dict, key: dict[str, Any]) -> tuple[bytes, dict[str, int], int]:
    """The head of a safetensors file, the place of each tensor in the file, and the file's size."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "key": json.dumps(key, sort_keys=True)}}
    names, places, end = {torch.float16: "F16", torch.float32: "F32", torch.int64: "I64"}, {}, 0
    for name, (dtype, shape) in sorted(layout.items(), key=lambda item: -item[1][0].itemsize):
        start, end = end, end + dtype.itemsize * int(np.prod(shape))
        entries[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
        places[name] = start
    body = json.dumps(entries).encode()
    body += b" " * (-len(body) % 8)
    header = len(body).to_bytes(8, "little") + body
    return header, {name: start + len(header) for name, start in places.items()}, end + len(header)


def _matrix(path: Path, offset: int, dtype: str, shape: tuple[int, ...]) -> np.memmap:
    return np.memmap(path, dtype=dtype, mode="r+", offset=offset, shape=shape)


class FeatureCache:
    """One cache file, memory-mapped.

    Attributes:
        features: ``(N, sum_l d_l)`` in the stored type.
        labels, index: ``(N,)`` int64.
        exit_dims: width of each exit's part.
    """

    def __init__(self, path: str | Path, key: dict[str, Any] | None = None):
        """Opens a file; a ValueError where it is broken, or made under another ``key``."""
        try:
            with safe_open(path, framework="pt") as file:
                self.key = json.loads(file.metadata()["key"])
                self.features, self.labels, self.index = map(file.get_tensor, ("features", "labels", "index"))
            self.exit_dims = tuple(self.key["exit_dims"])
        except Exception as error:
            raise ValueError(
                f"Expected a feature cache at {str(path)!r}, but it cannot be read: {error}; remove the file."
            ) from error
        if key is not None and key != self.key:
            other = sorted(name for name in key if key[name] != self.key.get(name))
            raise ValueError(f"Expected features made with the same {other} in {str(path)!r}; remove the file.")

    def __len__(self) -> int:
        return len(self.labels)

    def statistics(self, chunk: int = 8192) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of every feature over the rows, ``(sum_l d_l,)`` float32 each."""
        total, squares = torch.zeros(2, self.features.shape[1], dtype=torch.float64)
        for rows in self.features.split(chunk):
            rows = rows.double()
            total += rows.sum(0)
            squares += rows.square().sum(0)
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
            features = self.views[0].features[row]
        else:
            features = self.views[0].features.new_empty(len(rows), self.views[0].features.shape[1])
            for v, cache in enumerate(self.views):
                here = (view == v).nonzero().squeeze(1)
                features[here] = cache.features[row[here]]
        return {
            "exit_features": features.float(),
            "labels": self.views[0].labels[row],
            "index": self.views[0].index[row],
        }
