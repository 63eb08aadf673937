"""Coverage and inefficiency of prediction sets."""

import datasets
import evaluate
import torch

from jeidnn_hf.conformal import coverage_and_inefficiency


class PredictionSets(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=coverage_and_inefficiency.__doc__,
            citation="Regol, Chataoui and Coates, JEI-DNN, ICLR 2024, Eq. 2",
            inputs_description="predictions: for each sample and class, whether it is in the set; references: labels.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("bool")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        sets = torch.as_tensor(predictions, dtype=torch.bool)
        coverage, inefficiency = coverage_and_inefficiency(sets, torch.as_tensor(references))
        return {"coverage": coverage, "inefficiency": inefficiency}
