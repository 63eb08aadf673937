"""Negative log-likelihood (nats) and Brier score of class probabilities."""

import datasets
import evaluate
import torch

from jeidnn_hf.metrics import brier_score, negative_log_likelihood


class ProperScores(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Gneiting and Raftery, Strictly proper scoring rules, JASA 2007",
            inputs_description="predictions: class probabilities of each sample; references: labels.",
            features=datasets.Features(
                {"predictions": datasets.Sequence(datasets.Value("float64")), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        probs, labels = torch.as_tensor(predictions, dtype=torch.float64), torch.as_tensor(references)
        nll = negative_log_likelihood(probs.log(), labels)
        return {"nll": float(nll), "brier": float(brier_score(probs, labels))}
