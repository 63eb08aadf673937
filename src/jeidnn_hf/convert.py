"""Converters: checkpoints of the T2T-ViT authors and of the original JEI-DNN code to ours."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from .backbones.loading import fingerprint, pretrained_cfg, read_state_dict
from .configuration_jeidnn import JEIDNNConfig
from .files import written_whole
from .modeling_jeidnn import JEIDNNForImageClassification

_STATISTICS_ORDER = [0, 1, 3, 2]
"""The original gates read [max p, entropy, margin, power entropy]; ours the paper's [..., power entropy, margin]."""


def convert(source: str | Path, output_dir: str | Path, backbone: str, lam: float | None = None) -> str:
    """Converts a checkpoint, whichever of the two kinds it is.

    Args:
        source: a torch file, plain or with the state dict under one of the usual names (``state_dict``, ``net``, ...).
        output_dir: gets ``backbone.safetensors``; for a JEI-DNN checkpoint the model is saved there too.
        backbone: ``t2t_vit_7`` or ``t2t_vit_14``.
        lam: the lambda of a JEI-DNN checkpoint, which does not carry it.

    Returns:
        What was written, in one sentence.

    Raises:
        ValueError: a file that cannot be read, keys that are unknown or missing, no lambda.
    """
    pretrained_cfg(backbone)
    state = {key.removeprefix("module."): value for key, value in read_state_dict(source, nested=True).items()}
    exits = {key: state.pop(key) for key in list(state) if key.startswith(("intermediate_heads.", "gates."))}
    output_dir = Path(output_dir)
    side = _image_size(state)
    classes = state["head.weight"].shape[0] if "head.weight" in state else 0
    if exits and lam is None:
        raise ValueError("Expected the lambda that this JEI-DNN checkpoint was trained with, but got none; pass it.")
    config = JEIDNNConfig(
        backbone=backbone, num_labels=max(classes, 2), image_size=side, recipe="paper", lam=1.0 if lam is None else lam
    )
    model = JEIDNNForImageClassification(config)
    _load(model.backbone.model, state, source)
    path = output_dir / "backbone.safetensors"
    written = f"{path} ({classes} classes, {side} px, {fingerprint(model.backbone.model.state_dict())[:12]})"
    if exits:
        heads = {f"modules_by_exit.{_exit(key)}": value for key, value in exits.items() if "heads" in key}
        _load(model.heads, heads, source)
        _load(model.policy.gates, _gates(exits, model.backbone.num_exits - 1), source)
        config.backbone_weights = str(path)
        config.backbone_fingerprint = fingerprint(model.backbone.model.state_dict())
    with written_whole(output_dir) as temporary:
        tensors = {key: value.contiguous() for key, value in model.backbone.model.state_dict().items()}
        save_file(tensors, temporary / path.name)
        if exits:
            model.save_pretrained(temporary)
    return f"wrote {written}" + (f" and the model of lambda {lam:g} in {output_dir}" if exits else "")


def _exit(key: str) -> str:
    return key.removeprefix("intermediate_heads.")


def _gates(exits: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """``gates.N.linear`` of (1, 4) each, columns put in the paper's order, as one weight ``(L-1, 4)`` and one bias."""
    try:
        weight = torch.cat([exits[f"gates.{l}.linear.weight"] for l in range(count)])[:, _STATISTICS_ORDER]
        bias = torch.cat([exits[f"gates.{l}.linear.bias"] for l in range(count)])
    except KeyError as error:
        raise ValueError(f"Expected {count} gates in the checkpoint, but there is no {error}.") from error
    except (IndexError, RuntimeError) as error:
        raise ValueError(f"Expected gates of shape (1, 4) in the checkpoint, but got others: {error}.") from error
    return {"weight": weight, "bias": bias}


def _image_size(state: Mapping[str, Tensor]) -> int:
    """From the position table ``(1, 1 + (side / 16)^2, C)``."""
    if "pos_embed" not in state or state["pos_embed"].dim() != 3:
        raise ValueError(f"Expected a T2T-ViT checkpoint with 'pos_embed', but got keys like {sorted(state)[:3]}.")
    return 16 * round((state["pos_embed"].shape[1] - 1) ** 0.5)


def _load(module: torch.nn.Module, state: Mapping[str, Tensor], source) -> None:
    own = module.state_dict()
    wrong = sorted(own.keys() ^ state.keys()) or [key for key in own if own[key].shape != state[key].shape]
    if wrong:
        found = re.sub(r"[\[\]']", "", str(wrong[:3]))
        kind = type(module).__name__
        raise ValueError(f"Expected the tensors of {kind} in {str(source)!r}, but these differ: {found}.")
    module.load_state_dict(state)
