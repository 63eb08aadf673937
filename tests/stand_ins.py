"""Small stand-ins for data sets, in the Hub's own schemas: pictures that a seed decides, in parquet files."""

from __future__ import annotations

import io

import datasets
import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq

COUNTS = {"train": 300, "test": 200}


def picture(seed: int, width: int = 32, height: int = 32, mode: str = "RGB") -> PIL.Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3), dtype=np.uint8)
    return PIL.Image.fromarray(noise).resize((width, height), PIL.Image.Resampling.BILINEAR).convert(mode)


def encoded(image: PIL.Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    path, count, classes, label="label", style="hub", offset=0, labels=None, image="img", side=32, group=None
):
    """``style``: hub (with the Hub's feature metadata), struct (bytes and path) or binary, both without metadata."""
    cells = [encoded(picture(offset + i, side, side)) for i in range(count)]
    labels = [i % classes for i in range(count)] if labels is None else labels
    structs = [{"bytes": cell, "path": None} for cell in cells]
    columns = {image: cells if style == "binary" else structs, label: labels}
    if label == "fine_label":
        columns["coarse_label"] = [x // 5 for x in labels]
    kind = pa.binary() if style == "binary" else pa.struct({"bytes": pa.binary(), "path": pa.string()})
    names = {image: kind} | {name: pa.int64() for name in columns if name != image}
    table = pa.table({name: pa.array(columns[name], kind) for name, kind in names.items()})
    if style == "hub":
        hub = {image: datasets.Image(), label: datasets.ClassLabel(names=[f"class {k}" for k in range(classes)])}
        if label == "fine_label":
            hub["coarse_label"] = datasets.ClassLabel(num_classes=20)
        table = table.cast(datasets.Features(hub).arrow_schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)


def write_folder(folder, classes=10, label="label", style="hub", image="img"):
    for split, count in COUNTS.items():
        write_parquet(folder / f"{split}-00000-of-00001.parquet", count, classes, label, style, image=image)
    return folder
