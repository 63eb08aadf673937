"""The pipeline that says where each picture left: `pipeline("early-exit-image-classification", model=...)`."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForImageClassification, ImageClassificationPipeline
from transformers.pipelines import PIPELINE_REGISTRY

TASK = "early-exit-image-classification"


class EarlyExitImageClassificationPipeline(ImageClassificationPipeline):
    """transformers' image classification, and what early exit adds to its answer.

    For each picture a dict: `predictions`, the `top_k` (5) labels with their probabilities, after the temperature of
    the exit where the model is calibrated; `exit`, from 1; `mul_adds` spent, and `normalised_mul_adds`, their share of
    the backbone's; and with `alpha=` and maybe `method=`, when the pipeline is made or called, `prediction_set`, the
    labels in it, the likeliest first, see `JEIDNNForImageClassification.predict_sets`.
    """

    def _sanitize_parameters(self, top_k=None, timeout=None, alpha=None, method=None):
        steps = ({"timeout": timeout}, {"alpha": alpha, "method": method}, {"top_k": top_k})
        return tuple({name: value for name, value in step.items() if value is not None} for step in steps)

    def _forward(self, model_inputs, alpha: float | None = None, **method) -> dict[str, torch.Tensor]:
        pixel_values = model_inputs["pixel_values"]
        if alpha is not None:
            return dict(self.model.predict_sets(pixel_values, alpha, **method))
        output = self.model(pixel_values)
        return {**output, "probabilities": self.model.probabilities(output)}

    def postprocess(self, model_outputs, top_k: int = 5) -> dict[str, Any]:
        probabilities = model_outputs["probabilities"][0].float()
        names = self.model.config.id2label
        order = probabilities.argsort(descending=True, stable=True).tolist()
        mul_adds = int(model_outputs["mul_adds"][0])
        answer = {
            "predictions": [{"label": names[k], "score": float(probabilities[k])} for k in order[:top_k]],
            "exit": int(model_outputs["exit_index"][0]) + 1,
            "mul_adds": mul_adds,
            "normalised_mul_adds": mul_adds / self.model.exit_costs().backbone[-1],
        }
        if "sets" in model_outputs:
            answer["prediction_set"] = [names[k] for k in order if model_outputs["sets"][0, k]]
        return answer


PIPELINE_REGISTRY.register_pipeline(
    TASK, pipeline_class=EarlyExitImageClassificationPipeline, pt_model=AutoModelForImageClassification, type="image"
)
