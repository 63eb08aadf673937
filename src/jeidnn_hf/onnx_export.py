"""Staged export: one ONNX or torch.export file for each run of blocks between two active exits, and a manifest.

A segment runs the blocks up to its exit, pools, and lets head and policy take their step::

    (state, head carry, policy carry, lambda) -> (logits, leaves, next state, next head carry, next policy carry)

Whoever runs the files one after another can drop, after each, the rows that leave (`onnx_runner`).
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import __version__
from .files import written_whole
from .modeling_jeidnn import JEIDNNForImageClassification
from .onnx_runner import MANIFEST, MANIFEST_VERSION, sha256_of_file
from .policies import LearnedGates, RandomExits

FORMATS = {"onnx": ".onnx", "torch": ".pt2"}
OPSET = 20
TRACED_BATCH = 3
"""Rows of the example; with 0 or 1 a tracer takes their number for a constant."""


class Layout(NamedTuple):
    """How a pytree is put back together from its tensors: its structure, and which of its leaves are not None."""

    spec: pytree.TreeSpec
    is_tensor: list[bool]


class Live(NamedTuple):
    """What one segment hands to the next; each a pytree of batch-first tensors and None."""

    state: Any
    head: Any = None
    policy: Any = None


class Segment(nn.Module):
    """The blocks behind exit ``before`` (-1: the stem too) up to exit ``exit``, both 0-based, and what is asked there.

    ``forward`` takes the tensors of what `step` takes, and gives those of what it gives.
    """

    def __init__(self, model: JEIDNNForImageClassification, before: int, exit: int, layout: Layout | None):
        super().__init__()
        self.backbone, self.heads, self.policy = model.backbone, model.heads, model.policy
        self.before, self.exit, self.layout = before, exit, layout
        self.is_last = exit == model.backbone.num_exits - 1
        self.reads_lambda = _reads_lambda(model) and not self.is_last
        self.lam = model.config.current_lam

    def step(self, live: Live, lam: float | Tensor) -> tuple[Tensor, Tensor | None, Live | None]:
        """Logits ``(B, K)``, who leaves ``(B,)`` bool, and what goes on; the last two None at the last exit."""
        state, carry = live.state, live.head
        if self.before < 0:
            state = self.backbone.stem(state)
        for l in range(self.before + 1, self.exit + 1):
            state = self.backbone.stage(l, state)
            if l == self.exit or self.heads.remembers:
                feature = self.backbone.exit_feature(l, state)
                logits, carry = self.heads.step(l, feature, carry, answer=l == self.exit)
        if self.is_last:
            return logits, None, None
        leaves, policy = self.policy.step(self.exit, logits, live.policy, lam)
        return logits, leaves, Live(state, carry, policy)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        lam, tensors = (tensors[-1], tensors[:-1]) if self.reads_lambda else (self.lam, tensors)
        logits, leaves, following = self.step(_unflatten(tensors, self.layout), lam)
        return (logits,) if self.is_last else (logits, leaves, *_flatten(following)[0])


class AllExits(nn.Module):
    """Pixels ``(B, C, S, S)``, and lambda ``(B,)`` where the gates read it, to the logits ``(B, L, K)`` of all exits
    and the exit taken ``(B,)``."""

    def __init__(self, model: JEIDNNForImageClassification):
        super().__init__()
        self.backbone, self.heads, self.policy = model.backbone, model.heads, model.policy
        self.lam = model.config.current_lam

    def forward(self, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        pixel_values, *lam = tensors
        logits = self.heads(self.backbone(pixel_values))
        return logits, self.policy.decide(logits, *(lam or (self.lam,)))


@torch.no_grad()
def export(model: JEIDNNForImageClassification, folder: str | Path, format: str = "onnx") -> dict[str, Any]:
    """Writes ``segment_NN.onnx`` (or ``.pt2``) files and ``manifest.json``, whole or not at all.

    Args:
        model: in float32. Its current lambda is built in, unless its gates serve a range.
        folder: it is made; files of the same names are replaced.
        format: one of `FORMATS`.

    Returns:
        The manifest, see `onnx_runner.read_manifest`.

    Raises:
        ValueError: a model that cannot be exported: exits by chance, another precision.
        ImportError: onnx or onnxscript missing.
    """
    check_exportable(model, format)
    write = _write_onnx if format == "onnx" else _write_torch
    manifest, segments = describe(model, format), []
    pixels, lam = _example(model, manifest["input_shape"])
    live, names, before = Live(pixels), ["pixel_values"], -1
    with written_whole(folder) as temporary:
        for l in manifest["exits"]:
            tensors, layout = _flatten(live)
            segment = Segment(model, before, l, layout).eval()
            _, _, live = segment.step(live, lam)
            following = [] if live is None else ["leaves", *_names(live, l)]
            inputs, outputs = names + ["lam"] * segment.reads_lambda, ["logits", *following]
            path = temporary / f"segment_{l:02d}{FORMATS[format]}"
            write(segment, path, tensors + [lam] * segment.reads_lambda, inputs, outputs)
            files = {"file": path.name, "sha256": sha256_of_file(path)}
            segments.append({**files, "exit": l, "inputs": inputs, "outputs": outputs})
            before, names = l, following[1:]
        manifest["segments"] = segments
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def export_all_exits(model: JEIDNNForImageClassification, path: str | Path) -> None:
    """Writes `AllExits` as one ``.pt2`` file, for ``torch.export.load``; errors as of `export`."""
    check_exportable(model, "torch")
    path = Path(path)
    pixels, lam = _example(model, describe(model, "torch")["input_shape"])
    with written_whole(path.parent) as temporary, torch.no_grad():
        _write_torch(AllExits(model).eval(), temporary / path.name, [pixels] + [lam] * _reads_lambda(model))


def check_exportable(model: JEIDNNForImageClassification, format: str = "onnx") -> None:
    """A ValueError for a model whose exits cannot be written down as a graph, an ImportError where onnx is missing."""
    if format not in FORMATS:
        raise ValueError(f"Expected a format among {tuple(FORMATS)}, but got {format!r}.")
    missing = [name for name in ("onnx", "onnxscript") if format == "onnx" and find_spec(name) is None]
    if missing:
        raise ImportError(f"Expected {' and '.join(missing)} to write ONNX; pip install 'jeidnn-hf[onnx]'.")
    policy = model.policy
    if isinstance(policy, RandomExits):
        raise ValueError("Expected a policy that decides without chance, but got 'random'; set another one.")
    if isinstance(policy, LearnedGates) and policy.rule == "sample":
        raise ValueError("Expected exit_rule 'conditional' or 'median', but got 'sample', which draws exits by chance.")
    dtypes = {tensor.dtype for tensor in model.parameters()}
    if dtypes != {torch.float32}:
        raise ValueError(f"Expected a model in float32, but got {sorted(map(str, dtypes))}; call model.float() first.")


def describe(model: JEIDNNForImageClassification, format: str) -> dict[str, Any]:
    """The manifest without its segments: what a runner must know of the model."""
    config = model.config
    return {
        "format": format,
        "version": MANIFEST_VERSION,
        "jeidnn_hf": __version__,
        "backbone": config.backbone,
        "input_shape": [config.num_channels, model.backbone.image_size, model.backbone.image_size],
        "exits": list(model.active_exits),
        "mul_adds": model.costs.to_dict(),
        "total_mul_adds": list(model.costs.total),
        "lam_range": list(config.lam) if config.has_lam_range else None,
        "lam": config.current_lam,
        "labels": [config.id2label[k] for k in range(config.num_labels)],
        "preprocessing": config.preprocessing,
    }


def _reads_lambda(model: JEIDNNForImageClassification) -> bool:
    return model.config.has_lam_range and getattr(getattr(model.policy, "gates", None), "kind", None) == "shared"


def _example(model: JEIDNNForImageClassification, shape: list[int]) -> tuple[Tensor, Tensor]:
    """Pixels and the lambda of each image."""
    like = next(model.backbone.parameters())
    return like.new_zeros(TRACED_BATCH, *shape), like.new_full((TRACED_BATCH,), model.config.current_lam)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's warnings about its own deprecations, and its log of operators that are not installed."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _flatten(live: Live) -> tuple[list[Tensor], Layout]:
    """The tensors of a pytree, and how to put them back; a None is part of the layout."""
    leaves, spec = pytree.tree_flatten(live)
    return [leaf for leaf in leaves if leaf is not None], Layout(spec, [leaf is not None for leaf in leaves])


def _unflatten(tensors: tuple[Tensor, ...], layout: Layout) -> Live:
    rest = iter(tensors)
    return pytree.tree_unflatten([next(rest) if there else None for there in layout.is_tensor], layout.spec)


def _names(live: Live, l: int) -> list[str]:
    """Of the tensors of a `Live` behind exit l, in the order of `_flatten`: ``state_3_0``, ``head_3_0``, ..."""
    return [
        f"{part}_{l}_{i}"
        for part, tree in live._asdict().items()
        for i in range(len([leaf for leaf in pytree.tree_leaves(tree) if leaf is not None]))
    ]


def _write_torch(module: nn.Module, path: Path, tensors: list[Tensor], *_: Any) -> None:
    torch.export.save(torch.export.export(module, tuple(tensors), dynamic_shapes=_batch_first(tensors)), path)


def _write_onnx(module: nn.Module, path: Path, tensors: list[Tensor], inputs: list[str], outputs: list[str]) -> None:
    with _quiet():
        torch.onnx.export(
            module, tuple(tensors), path, input_names=inputs, output_names=outputs, opset_version=OPSET, dynamo=True,
            dynamic_shapes=_batch_first(tensors), external_data=False, verbose=False,
        )  # fmt: skip


def _batch_first(tensors: list[Tensor]) -> tuple[tuple[dict, ...]]:
    """Of the one argument ``*tensors``: the first dimension of each is the batch."""
    return (tuple({0: torch.export.Dim.DYNAMIC} for _ in tensors),)
