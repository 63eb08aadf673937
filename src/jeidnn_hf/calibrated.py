"""What a model answers beyond logits once it is calibrated: probabilities and prediction sets at the exit taken."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from .operating_point import OperatingPoint


@dataclass
class JEIDNNPrediction(ModelOutput):
    """What `predict_sets` answers, rows in input order.

    Args:
        sets (`(B, K)` bool): whether a class is in the image's prediction set.
        probabilities: `(B, K)`, of the exit taken, after its temperature.
        logits: as in `JEIDNNOutput`; likewise the next two.
        exit_index: the exit taken.
        mul_adds: what the image cost.
    """

    sets: Tensor | None = None
    probabilities: Tensor | None = None
    logits: Tensor | None = None
    exit_index: Tensor | None = None
    mul_adds: Tensor | None = None


class CalibratedMixin:
    """Of a model with `config`, `costs` and an early-exit `forward`."""

    _operating_point: OperatingPoint | None = None

    @property
    def operating_point(self) -> OperatingPoint | None:
        """Temperatures and conformal thresholds, saved beside the weights; None where nothing was calibrated.

        Setting one of another number of exits, or of another backbone, is a ValueError.
        """
        return self._operating_point

    @operating_point.setter
    def operating_point(self, point: OperatingPoint | None) -> None:
        if point is not None:
            exits, found = len(self.costs.total), len(point.temperatures)
            if found != exits:
                raise ValueError(f"Expected an operating point of {exits} exits, but got one of {found}; fit it again.")
            own = self.config.backbone_fingerprint
            if None not in (own, point.backbone) and own != point.backbone:
                raise ValueError(
                    f"Expected an operating point of the backbone {own[:12]}, but got one of {point.backbone[:12]}; "
                    "fit it again."
                )
        self._operating_point = point

    def probabilities(self, output) -> Tensor:
        """Of the exits taken in a `JEIDNNOutput`, `(B, K)`, after their temperatures if there is an operating point.

        A temperature is its exit's, whatever lambda is.
        """
        logits = output.logits
        if self._operating_point is not None:
            logits = logits / logits.new_tensor(self._operating_point.temperatures)[output.exit_index, None]
        return logits.softmax(-1)

    def has_sets(self, alpha: float = 0.05, method: str = "grouped", lam: float | None = None) -> bool:
        """Whether there are sets: calibrated at this alpha, by this method, and at ``lam``, by default that in use."""
        point = self._operating_point
        return point is not None and self._is_fitted_at(point, lam) and alpha in point.thresholds.get(method, ())

    def _is_fitted_at(self, point: OperatingPoint, lam: float | None = None) -> bool:
        if point.lam is None:
            return not self.config.has_lam_range or self.config.policy != "gates"
        return math.isclose(point.lam, self.config.current_lam if lam is None else lam, rel_tol=1e-6)

    @torch.inference_mode()
    def predict_sets(self, pixel_values: Tensor, alpha: float = 0.05, method: str = "grouped") -> JEIDNNPrediction:
        """Prediction sets that miss the true class of a share alpha of images like those of the calibration.

        Each image leaves where its gates say, as in `forward`. A randomised score draws anew for each image, from
        torch's generator.

        Args:
            pixel_values: ``(B, C, S, S)``, normalised as the backbone expects.
            alpha: one of those calibrated.
            method: one of those calibrated.

        Raises:
            ValueError: no operating point, or not at the lambda in use; an alpha or method that was not calibrated.
        """
        point = self._operating_point
        if point is None:
            raise ValueError("Expected an operating point, but got None; set model.operating_point to a fitted one.")
        if not self._is_fitted_at(point):
            raise ValueError(
                f"Expected the lambda of the operating point, {point.lam}, but got {self.config.current_lam:g}; "
                "set_lambda to the former, or fit an operating point at the latter."
            )
        point.thresholds_at(alpha, method)  # before the work
        output = self(pixel_values, return_dict=True)
        return JEIDNNPrediction(
            sets=self.sets_of(output, alpha, method),
            probabilities=self.probabilities(output),
            logits=output.logits,
            exit_index=output.exit_index,
            mul_adds=output.mul_adds,
        )

    def sets_of(self, output, alpha: float = 0.05, method: str = "grouped") -> Tensor:
        """As `predict_sets`, a mask ``(B, K)``, of a `JEIDNNOutput` at the lambda of the operating point."""
        point = self._operating_point
        if point.score.seed is not None:
            point = replace(point, score=replace(point.score, seed=int(torch.randint(2**62, ()))))
        at_every_exit = self.probabilities(output)[:, None].expand(-1, len(point.temperatures), -1)
        return point.prediction_sets(at_every_exit, output.exit_index, alpha, method)
