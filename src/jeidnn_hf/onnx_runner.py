"""Runs an exported model on onnxruntime, segment by segment, and stops for each image where it leaves.

It needs the folder that ``jeidnn export`` wrote, numpy and onnxruntime; neither torch nor the model's code.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1
REQUIRED = ("format", "input_shape", "exits", "total_mul_adds", "lam", "lam_range", "labels", "segments")


class EarlyExits(NamedTuple):
    """Of each image, rows in input order: the logits ``(B, K)`` of the exit taken, the exit ``(B,)`` in 0..L-1, and
    what it cost in Mul-Adds ``(B,)``."""

    logits: np.ndarray
    exit_index: np.ndarray
    mul_adds: np.ndarray


class OnnxEarlyExit:
    """An exported model that really exits early.

    Args:
        folder: with ``manifest.json`` and its segments.
        providers: of onnxruntime; default, the CPU.
        threads: of one operation; default, onnxruntime's choice.

    Raises:
        ValueError: a folder that is not whole: a segment missing or changed, a manifest of another version.
        ImportError: onnxruntime missing.
    """

    def __init__(self, folder: str | Path, providers: Sequence[str] | None = None, threads: int | None = None):
        try:
            import onnxruntime
        except ImportError as error:
            raise ImportError("Expected onnxruntime to run this model; pip install 'jeidnn-hf[onnx]'.") from error
        self.manifest = read_manifest(folder)
        if self.manifest["format"] != "onnx":
            raise ValueError(f"Expected segments in onnx, but got {self.manifest['format']!r}; export them again.")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # sessions would spin side by side
        if threads is not None:
            options.intra_op_num_threads = threads
        self.total_mul_adds = np.array(self.manifest["total_mul_adds"])
        self._ort_value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._segments = [
            (
                segment,
                onnxruntime.InferenceSession(
                    str(Path(folder) / segment["file"]), options, providers=list(providers or ["CPUExecutionProvider"])
                ),
            )
            for segment in self.manifest["segments"]
        ]

    def __call__(self, pixel_values: np.ndarray, lam: float | np.ndarray | None = None) -> EarlyExits:
        """Classifies images, each at the exit that its gates choose.

        Args:
            pixel_values: ``(B, C, S, S)`` float32, after the manifest's preprocessing.
            lam: lambda, a number or ``(B,)``, within the manifest's range; default, the manifest's ``lam``.

        Raises:
            ValueError: another shape or type, NaN or infinity, a lambda out of range.
        """
        self._check_pixels(pixel_values)
        live = {"pixel_values": self._ort_value(np.ascontiguousarray(pixel_values))}
        lam = self._check_lam(lam, len(pixel_values))
        rows = np.arange(len(pixel_values))
        logits = np.empty((len(rows), len(self.manifest["labels"])), dtype=np.float32)
        exit_index = np.empty(len(rows), dtype=np.int64)
        for segment, session in self._segments:
            if "lam" in segment["inputs"]:
                live["lam"] = self._ort_value(lam)
            outputs = session.run_with_ort_values(None, {name: live[name] for name in segment["inputs"]})
            live = dict(zip(segment["outputs"], outputs, strict=True))
            answers = live.pop("logits").numpy()
            leaves = live.pop("leaves").numpy() if "leaves" in live else np.ones(len(rows), dtype=bool)
            if not leaves.any():
                continue
            logits[rows[leaves]], exit_index[rows[leaves]] = answers[leaves], segment["exit"]
            if leaves.all():
                break
            stay = np.flatnonzero(~leaves)
            live = {name: self._ort_value(value.numpy().take(stay, axis=0)) for name, value in live.items()}
            rows, lam = rows[stay], lam[stay]
        return EarlyExits(logits, exit_index, self.total_mul_adds[exit_index])

    def _check_pixels(self, pixels: np.ndarray) -> None:
        expected = ", ".join(map(str, self.manifest["input_shape"]))
        if not isinstance(pixels, np.ndarray) or pixels.dtype != np.float32:
            got = pixels.dtype if isinstance(pixels, np.ndarray) else type(pixels).__name__
            raise ValueError(f"Expected pixel_values as a numpy array of float32, but got {got}.")
        if pixels.ndim != 4 or not len(pixels) or list(pixels.shape[1:]) != self.manifest["input_shape"]:
            raise ValueError(f"Expected pixel_values of shape (batch, {expected}), but got {pixels.shape}.")
        if not np.isfinite(pixels).all():
            raise ValueError("Expected pixel_values without NaN or infinity, but got some; check the preprocessing.")

    def _check_lam(self, lam: float | np.ndarray | None, batch: int) -> np.ndarray:
        """Lambda of each image, ``(B,)`` float32."""
        low_high, default = self.manifest["lam_range"], self.manifest["lam"]
        lams = np.asarray(default if lam is None else lam, dtype=np.float64)
        if lams.shape not in ((), (1,), (batch,)):
            raise ValueError(f"Expected lam to be a number or of shape ({batch},), but got {lams.shape}.")
        low, high = low_high or (default, default)
        if not ((low * (1 - 1e-6) <= lams) & (lams <= high * (1 + 1e-6))).all():
            allowed = f"in [{low:g}, {high:g}]" if low_high else f"of {low:g}, the only one exported"
            raise ValueError(f"Expected a lambda {allowed}, but got {lam}.")
        return np.broadcast_to(lams, (batch,)).astype(np.float32)


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """The manifest of an exported folder, after a look at every file that it names.

    It holds ``version``, ``jeidnn_hf``, ``format``, ``backbone``, ``input_shape`` (C, S, S), ``exits`` (0-based, those
    where images can leave), ``mul_adds`` and ``total_mul_adds`` of all exits, ``lam`` and ``lam_range`` (None for one
    lambda), ``labels``, ``preprocessing``, and ``segments`` in order: ``file``, ``sha256``, ``exit``, ``inputs``,
    ``outputs``.

    Raises:
        ValueError: no manifest, one of another version, a file missing or changed.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected a manifest at {str(path)!r}, but it cannot be read: {error}.") from error
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != MANIFEST_VERSION:
        raise ValueError(
            f"Expected a manifest of version {MANIFEST_VERSION}, but got {version}; export the model again."
        )
    if missing := [name for name in REQUIRED if name not in manifest]:
        raise ValueError(f"Expected {missing} in {str(path)!r}, but it has none; export the model again.")
    segments = manifest["segments"]
    if [segment["exit"] for segment in segments] != manifest["exits"]:
        raise ValueError(f"Expected one segment for each of the exits {manifest['exits']}, but got {len(segments)}.")
    for segment in segments:
        file = Path(folder) / segment["file"]
        if not file.is_file():
            raise ValueError(f"Expected the segment {str(file)!r}, but it is missing; export the model again.")
        if sha256_of_file(file) != segment["sha256"]:
            raise ValueError(f"Expected {str(file)!r} as exported, but its sha256 differs; export the model again.")
    return manifest


def sha256_of_file(path: str | Path) -> str:
    """In hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
