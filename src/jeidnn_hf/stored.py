"""A model in its checkpoint: built on a pretrained backbone, loaded as trained or not at all, saved whole, pushed."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Self

import safetensors.torch
import torch
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import cached_file, logging

from .backbones import build_model, fingerprint, pretrained_cfg
from .backbones.loading import HUB_WEIGHTS, STORED_WEIGHTS
from .checkpoints import FROM_THE_HUB, check_checkpoint, fetch, one_line_errors
from .configuration_jeidnn import JEIDNNConfig
from .files import written_whole
from .image_processing_jeidnn import JEIDNNImageProcessor
from .operating_point import FILE_NAME as CALIBRATION_NAME
from .operating_point import OperatingPoint

logger = logging.get_logger(__name__)

_DECIDE_COSTS = {"backbone", "backbone_kwargs", "image_size", "num_channels", "exit_stages", "native_head"}
_OF_A_PUSH = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr", "tags")


class MismatchedShapes(ValueError, RuntimeError):
    """A ValueError, as all of ours, that is also the RuntimeError of transformers, for code that expects that."""


class StoredModel(PreTrainedModel):
    """How a model with a staged `backbone`, `heads`, `policy` and `operating_point` is stored and loaded."""

    config_class = JEIDNNConfig
    _weights_file: str | None = None

    @classmethod
    def from_backbone_pretrained(
        cls, backbone: str, num_labels: int | None = None, weights: str | None = None, **config: Any
    ) -> Self:
        """A pretrained frozen backbone with fresh exits.

        Args:
            backbone: timm model name, with or without a pretrained tag.
            num_labels: number of classes; the backbone's own by default.
            weights: a local file of weights; by default timm's pretrained tag, from the Hub or its cache.
            config: other fields of `JEIDNNConfig`.

        Raises:
            ValueError: weights that cannot be had or that are of another network; options out of range.
        """
        weights = HUB_WEIGHTS if weights is None else str(weights)
        model = cls(fresh_config(backbone, num_labels, weights, **config))
        model._restore_backbone()
        return model.eval()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """As in transformers, but everything is as trained or it is an error, of one line: nothing is left at random.

        Raises:
            ValueError: no JEI-DNN checkpoint, or of a newer format; weights broken, missing, in a pickle, or of another
                backbone.
            OSError: a repository, revision or file that cannot be had.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        takes_other_shapes = kwargs.pop("ignore_mismatched_sizes", False)
        save_backbone = kwargs.pop("save_backbone", None)  # says how to save, not how this checkpoint was saved
        if kwargs.get("backbone_weights") is not None:
            kwargs["backbone_weights"] = str(kwargs["backbone_weights"])
        if _DECIDE_COSTS & kwargs.keys():
            kwargs.setdefault("mul_adds", None)
        if {"backbone", "num_channels"} & kwargs.keys():
            kwargs.setdefault("preprocessing", None)
        if kwargs.get("use_safetensors") is False:
            raise ValueError("Expected use_safetensors=True, but got False; weights are never loaded from a pickle.")
        kwargs["use_safetensors"] = True
        where = {key: kwargs[key] for key in FROM_THE_HUB if key in kwargs}
        weights_file = None
        try:
            with one_line_errors():
                if pretrained_model_name_or_path is not None and not kwargs.keys() & {"state_dict", "variant"}:
                    check_checkpoint(pretrained_model_name_or_path, where)
                model, info = super().from_pretrained(
                    pretrained_model_name_or_path,
                    *args,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,
                    **kwargs,
                )
                if model.config.backbone_weights == STORED_WEIGHTS and not model.config.save_backbone:
                    weights_file = cached_file(pretrained_model_name_or_path, STORED_WEIGHTS, **where)
                calibration = pretrained_model_name_or_path and fetch(
                    pretrained_model_name_or_path, CALIBRATION_NAME, where
                )
        except SafetensorError as error:
            raise ValueError(
                f"Expected complete weights in {str(pretrained_model_name_or_path)!r}, but got a broken file "
                f"({error}); fetch it again."
            ) from error
        except (OSError, HFValidationError) as error:
            if str(error).startswith("Expected "):
                raise
            raise OSError(
                f"Expected a checkpoint with model.safetensors at {str(pretrained_model_name_or_path)!r}, but got: "
                f"{' '.join(str(error).split())}"
            ) from error
        for key, found, expected in sorted(info["mismatched_keys"]):
            if takes_other_shapes and not key.startswith("backbone."):
                continue
            way_out = "ignore_mismatched_sizes=True starts such tensors afresh"
            if key.startswith("backbone."):
                way_out = "the frozen backbone never starts afresh, so train a new model, with native_head=False"
            raise MismatchedShapes(
                f"Expected {key} of shape {tuple(expected)} in {str(pretrained_model_name_or_path)!r}, but got "
                f"{tuple(found)}; {way_out}."
            )
        wrong = {key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys") if info[key]}
        if wrong:
            raise ValueError(
                f"Expected a checkpoint of this network in {str(pretrained_model_name_or_path)!r}, but got "
                + " and ".join(f"{len(names)} {key.replace('_', ' ')} like {names[0]}" for key, names in wrong.items())
                + "."
            )
        if not model.config.save_backbone and model.config.backbone_weights is not None:
            model._restore_backbone(weights_file)
        for name, tensor in chain(model.named_parameters(), model.heads.named_buffers()):
            if not torch.isfinite(tensor).all():
                raise ValueError(
                    f"Expected finite weights in {str(pretrained_model_name_or_path)!r}, but got NaN or infinity in "
                    f"{name}; train it again with a smaller learning rate."
                )
        model.backbone.freeze()
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.device.type == "cpu":
                tensor.data = tensor.data.clone()  # not where the file maps it: sums round by the place in memory, too
        if calibration:
            model.operating_point = OperatingPoint.load(Path(calibration).parent)
        if save_backbone is not None:
            model.config.save_backbone = save_backbone
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory, is_main_process=True, *args, **kwargs):
        """As in transformers, but whole or not at all: an earlier model in the folder stays until this one is complete.

        Preprocessing and operating point go beside the weights. The backbone is stored only where it cannot be rebuilt
        from its name and weights.

        Raises:
            WriteError: (an OSError) a full disk, a folder that is a file or cannot be written to.
        """
        if self.backbone.model_dtype is torch.float32:
            found = fingerprint(self.backbone.model.state_dict())
            if found != self.config.backbone_fingerprint and self.config.backbone_weights is not None:
                logger.warning("The backbone's weights have changed since they were loaded: storing them as well.")
                self.config.save_backbone = True
            self.config.backbone_fingerprint = found
        self._choose_what_is_stored()
        if self._auto_class is None:  # this code is not beside the weights; export_code says where it is
            vars(self.config).pop("auto_map", None)
        push_to_hub = kwargs.pop("push_to_hub", False)
        push = {key: kwargs.pop(key) for key in _OF_A_PUSH if key in kwargs}
        with written_whole(save_directory) as temporary:
            super().save_pretrained(temporary, is_main_process, *args, **kwargs)
            if is_main_process:
                self._save_beside_the_weights(temporary)
        if push_to_hub and is_main_process:
            self.push_to_hub(**{"repo_id": Path(save_directory).name, **push})

    def _save_beside_the_weights(self, folder: Path) -> None:
        if self.config.backbone_weights == STORED_WEIGHTS and not self.config.save_backbone:
            self._save_backbone(folder)
        if self.config.preprocessing is not None:
            JEIDNNImageProcessor(**self.config.preprocessing).save_pretrained(folder)
        if self.operating_point is not None:
            self.operating_point.save(folder)

    def push_to_hub(self, *args, **kwargs):
        """As in transformers, with our card where the repository has none. A backbone from a local file goes along, in
        a file that a second push leaves alone."""
        with portable(self), one_line_errors():
            return super().push_to_hub(*args, **kwargs)

    def _upload_modified_files(self, working_dir, repo_id: str, *args, **kwargs):
        """transformers' last step of a push; it has just written the repository's card, or a stub, beside the model."""
        try:
            from jeidnn_hf.model_card import replace_stub  # by its full name: not for code that goes along with a model

            replace_stub(working_dir, repo_id, self.config, self.operating_point)
        except ImportError:
            logger.warning("Without the package jeidnn_hf the repository gets a card that says little.")
        return super()._upload_modified_files(working_dir, repo_id, *args, **kwargs)

    def _build_backbone(self, weights: str | None) -> nn.Module:
        config = self.config
        return build_model(
            config.backbone,
            num_classes=config.num_labels if config.native_head else 0,
            image_size=config.image_size,
            num_channels=config.num_channels,
            weights=weights,
            **(config.backbone_kwargs or {}),
        )

    def _restore_backbone(self, weights_file: str | None = None) -> None:
        """Gives the backbone the weights that the config names, after checking that they are the very same."""
        self._weights_file = weights_file or self.config.backbone_weights
        with torch.device("cpu"):
            model = self._build_backbone(self._weights_file)
        found = fingerprint(model.state_dict())
        if self.config.backbone_fingerprint not in (None, found):
            raise ValueError(
                f"Expected backbone weights with fingerprint {self.config.backbone_fingerprint[:12]}, but got "
                f"{found[:12]} from {self.config.backbone_weights!r}; pass backbone_weights= the file trained on."
            )
        self.config.backbone_fingerprint = found
        self.backbone.model.load_state_dict(model.state_dict())
        self.backbone.freeze()

    def _save_backbone(self, folder: str | os.PathLike) -> None:
        """The frozen weights in a file of their own, in float32 also where the model is not."""
        exact = self.backbone.model_dtype is torch.float32
        model = self.backbone.model if exact else self._build_backbone(self._weights_file)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        safetensors.torch.save_file(state, Path(folder, STORED_WEIGHTS), metadata={"format": "pt"})

    def _choose_what_is_stored(self) -> None:
        rebuildable = not self.config.save_backbone and self.config.backbone_weights is not None
        frozen = {f"backbone.{key}" for key in self.backbone.state_dict()}
        self._keys_to_ignore_on_save = frozen if rebuildable else set(self._further_names())
        self._keys_to_ignore_on_load_missing = [r"^backbone\."] if rebuildable else []

    def _further_names(self) -> dict[str, str]:
        """Of tensors that the backbone holds under several names: each further name to the first, which is stored."""
        first: dict[int, str] = {}
        tensors = self.state_dict(keep_vars=True).items()
        return {name: first[id(tensor)] for name, tensor in tensors if first.setdefault(id(tensor), name) != name}

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """What transformers has to tie on loading: the shared parameters. Shared buffers come with their modules."""
        parameters = dict(self.named_parameters(remove_duplicate=False))
        return {name: first for name, first in self._further_names().items() if name in parameters}

    def _move_missing_keys_from_meta_to_device(self, *args, **kwargs) -> None:
        """transformers replaces non-persistent buffers by uninitialised memory on loading; ours hold real values."""
        kept = {name: buffer.clone() for name, buffer in self.named_non_persistent_buffers() if not buffer.is_meta}
        super()._move_missing_keys_from_meta_to_device(*args, **kwargs)
        for name, buffer in self.named_non_persistent_buffers():
            if name in kept:
                buffer.copy_(kept[name])


@contextmanager
def portable(model: StoredModel) -> Iterator[None]:
    """Within, the model is saved with all that another machine lacks: a backbone from a local file is stored."""
    weights = model.config.backbone_weights
    if model.config.backbone_is_local:
        model.config.backbone_weights = STORED_WEIGHTS
    try:
        yield
    finally:
        model.config.backbone_weights = weights


def fresh_config(
    backbone: str, num_labels: int | None = None, weights: str | None = None, **config: Any
) -> JEIDNNConfig:
    """The config of a model to be trained; arguments as of `from_backbone_pretrained`, but weights=None for random."""
    known = {field.name for field in dataclasses.fields(JEIDNNConfig)}
    if unknown := sorted(config.keys() - known):
        raise ValueError(f"Expected fields of JEIDNNConfig, but got {unknown}; known: {sorted(known)}.")
    if num_labels is None and "id2label" not in config:
        num_labels = pretrained_cfg(backbone)["num_classes"]
    if num_labels is not None:
        config["num_labels"] = num_labels
    return JEIDNNConfig(backbone=backbone, backbone_weights=weights, **config)
