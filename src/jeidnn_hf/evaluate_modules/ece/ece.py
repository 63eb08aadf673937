"""Expected calibration error with equal-mass bins, over the whole set at once."""

import datasets
import evaluate
import torch

from jeidnn_hf.metrics import expected_calibration_error


class ECE(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=expected_calibration_error.__doc__,
            citation="Regol, Chataoui and Coates, JEI-DNN, ICLR 2024, Eq. 19",
            inputs_description="predictions: class probabilities of each sample; references: labels; bins: 15.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references, bins=15):
        probs, labels = torch.as_tensor(predictions, dtype=torch.float64), torch.as_tensor(references)
        return {"ece": float(expected_calibration_error(probs, labels, bins))}
