"""Accuracy that a set of operating points reaches at a mean cost."""

import datasets
import evaluate
import torch

from jeidnn_hf.metrics import accuracy_at_cost


class AccuracyAtCost(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description=accuracy_at_cost.__doc__,
            citation="Regol, Chataoui and Coates, JEI-DNN, ICLR 2024, Figure 2",
            inputs_description="costs, accuracies: of each operating point; budget: in the unit of the costs.",
            features=datasets.Features({name: datasets.Value("float64") for name in ("costs", "accuracies")}),
        )

    def _compute(self, costs, accuracies, budget):
        points = [torch.as_tensor(values, dtype=torch.float64) for values in (costs, accuracies)]
        return {"accuracy": accuracy_at_cost(*points, budget)}
