"""The file of a feature cache: one safetensors matrix ``features (N, D)``, mapped into memory, with checksums.

Rows are written, checked and made again in blocks. Each has a checksum, written after it: the CRC32 of its features,
labels and index, plus 1, for 0 is a block that is not written yet.
"""

from __future__ import annotations

import json
import mmap
import warnings
import weakref
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = {"version": 2, "block_rows": 256}
"""The entry "format" in the key of a file that has checksums."""

RESIDENT_BYTES = 512 * 2**20
"""So much of mapped files may be in this process's memory, about."""

_ROWS_AT_ONCE = 64  # a row may bring up to 2 MB of its neighbours into memory
_TYPES = {"F16": torch.float16, "F32": torch.float32, "I64": torch.int64}
_ROW_WISE = ("features", "labels", "index")  # in the order of the checksum

_mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_least = float("inf")  # bytes of files in memory, since the last time that pages were dropped


def drop_pages() -> None:
    """Takes the pages of mapped files out of this process's memory, once ``RESIDENT_BYTES`` have come in.

    They stay in the disk's cache while there is room. On Linux; elsewhere the system alone decides what stays.
    """
    global _least
    resident = _resident()
    _least = min(_least, resident)
    if resident - _least > RESIDENT_BYTES:
        for mapping in list(_mapped):
            mapping.madvise(mmap.MADV_DONTNEED)
        _least = _resident()


def _resident() -> int:
    """Bytes of files in this process's memory, 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:
            return int(file.read().split()[2]) * mmap.PAGESIZE
    except OSError:
        return 0


def gather(features: Tensor, rows: Tensor) -> Tensor:
    """A copy of rows ``(B,)`` of a mapped matrix ``(N, D)``, in any order."""
    gathered = features.new_empty(len(rows), features.shape[1])
    for part, target in zip(rows.split(_ROWS_AT_ONCE), gathered.split(_ROWS_AT_ONCE), strict=True):
        torch.index_select(features, 0, part, out=target)
        drop_pages()
    return gathered


def checksum(*parts: Any) -> int:
    """The checksum of a block, from the bytes of its features, labels and index."""
    code = 0
    for part in parts:
        code = zlib.crc32(part, code)
    return code + 1


def header_of(rows: int, dtype: torch.dtype, key: Mapping[str, Any]) -> tuple[bytes, int]:
    """The head of a file, and the size of the whole file in bytes."""
    blocks = -(-rows // key["format"]["block_rows"])
    shapes = {"labels": [rows], "index": [rows], "checksums": [blocks], "features": [rows, sum(key["exit_dims"])]}
    names = {kind: name for name, kind in _TYPES.items()}
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", "key": json.dumps(key, sort_keys=True)}}
    end = 0
    for name, shape in shapes.items():  # the widest numbers first, as safetensors wants them aligned
        kind = dtype if name == "features" else torch.int64
        start, end = end, end + kind.itemsize * int(np.prod(shape))
        entries[name] = {"dtype": names[kind], "shape": shape, "data_offsets": [start, end]}
    body = json.dumps(entries).encode()
    body += b" " * (-len(body) % 8)
    return len(body).to_bytes(8, "little") + body, 8 + len(body) + end


class FeatureFile:
    """A file, mapped; the tensors are views of it to be read only: writing to one would kill the process.

    Attributes:
        header: the bytes before the tensors.
        key: what the file was made from.
        features: ``(N, D)``.
        labels, index: ``(N,)`` int64.
        checksums: one per block, int64, or None in a file made without.

    Raises:
        Exception: of whatever kind; the file is broken.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        with open(path, "rb") as file:
            self._bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        _mapped.add(self._bytes)
        start = 8 + int.from_bytes(self._bytes[:8], "little")
        if not 8 < start <= len(self._bytes):
            raise ValueError("no safetensors header")
        self.header = self._bytes[:start]
        entries = json.loads(self.header[8:])
        self.key: dict[str, Any] = json.loads(entries.pop("__metadata__")["key"])
        ends = [start + entry["data_offsets"][1] for entry in entries.values()]
        if max(ends) != len(self._bytes):
            raise ValueError(f"{max(ends)} bytes are announced, {len(self._bytes)} there")
        self._starts = {name: start + entry["data_offsets"][0] for name, entry in entries.items()}
        self.features, self.labels, self.index = (self._tensor(name, entries[name]) for name in _ROW_WISE)
        rows, width = self.features.shape
        if sum(self.key["exit_dims"]) != width or not len(self.labels) == len(self.index) == rows:
            raise ValueError("features, labels, index and exits do not match")
        self.checksums = None
        if "format" in self.key:
            self.checksums = self._tensor("checksums", entries["checksums"])
            if len(self.checksums) != -(-rows // self.key["format"]["block_rows"]):
                raise ValueError(f"{len(self.checksums)} checksums of {rows} rows")

    @classmethod
    def lay_out(cls, path: str | Path, rows: int, dtype: torch.dtype, key: Mapping[str, Any]) -> FeatureFile:
        """A new file of the full size with no block written; the key has the entries "format" and "exit_dims"."""
        header, size = header_of(rows, dtype, key)
        with open(path, "wb") as file:
            file.write(header)
            file.truncate(size)
        return cls(path)

    def _tensor(self, name: str, entry: dict[str, Any]) -> Tensor:
        dtype, shape, count = _TYPES[entry["dtype"]], entry["shape"], int(np.prod(entry["shape"]))
        start, end = entry["data_offsets"]
        if end - start != count * dtype.itemsize:
            raise ValueError(f"{end - start} bytes of {name} {shape}")
        numbers = np.frombuffer(self._bytes, np.dtype(str(dtype).removeprefix("torch.")), count, self._starts[name])
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it cannot be written to
            return torch.from_numpy(numbers.reshape(shape))

    def rows_of(self, block: int) -> range:
        size = self.key["format"]["block_rows"]
        return range(block * size, min((block + 1) * size, len(self.labels)))

    def _range(self, name: str, block: int) -> tuple[int, int]:
        """Where a block of a tensor starts and ends in the file."""
        rows, size, start = self.rows_of(block), getattr(self, name)[:1].nbytes, self._starts[name]
        return start + rows.start * size, start + rows.stop * size

    def wrong_blocks(self) -> list[int]:
        """Blocks that are not written, or differ from their checksum."""
        wrong = []
        with memoryview(self._bytes) as view:
            for block, expected in enumerate(self.checksums.tolist()):
                ranges = [self._range(name, block) for name in _ROW_WISE]
                if not expected or checksum(*(view[start:stop] for start, stop in ranges)) != expected:
                    wrong.append(block)
                drop_pages()
        return wrong

    def write_block(self, block: int, features: Tensor, labels: Tensor, index: Tensor) -> None:
        """Writes a block, then its checksum; several processes may write at once, each its own blocks.

        By ordinary writes, since a full disk under a memory map would kill the process.
        """
        parts = [tensor.contiguous().numpy().tobytes() for tensor in (features, labels, index)]
        with open(self.path, "r+b") as file:
            for name, part in zip(_ROW_WISE, parts, strict=True):
                file.seek(self._range(name, block)[0])
                file.write(part)
            file.flush()
            file.seek(self._starts["checksums"] + 8 * block)
            file.write(checksum(*parts).to_bytes(8, "little"))
