"""Zero Time Waste: cascading IMs, trained plainly, then their ensemble. It needs no training of its own."""

from __future__ import annotations

import torch

from jeidnn_hf.im_training import Phase
from jeidnn_hf.objectives import task_cost
from jeidnn_hf.record import collect_logits
from toy_training import batch_of, differing, exit_state, toy_model, toy_trainer


def test_an_exit_learns_from_its_own_answers_alone(tmp_path):
    """The gradient of all exits' loss in one IM and its link is that of its own cross-entropy."""
    model = toy_model(cascade=True)
    features, labels = batch_of(model)
    toy_trainer(model, tmp_path).im_training.loss(model, features, labels, Phase.WARMUP, None).backward()
    for l, head in enumerate(model.heads.modules_by_exit):
        own = torch.nn.functional.cross_entropy(model.heads(features)[:, l], labels)
        parameters = [head.weight, head.bias, *(model.heads.links[l - 1].parameters() if l else [])]
        for parameter, gradient in zip(parameters, torch.autograd.grad(own, parameters), strict=True):
            assert gradient.abs().max() > 0
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6)


def test_the_whole_method(tmp_path):
    model = toy_model(cascade=True, ensemble=True)
    before, trainer = exit_state(model), toy_trainer(model, tmp_path)
    trainer.train()
    moved = set(differing(before, exit_state(model)))
    names = {f"heads.links.{i}.{name}" for i in range(2) for name in ("weight", "bias")}
    assert moved >= names | {"heads.ensemble.weight", "heads.ensemble.bias", "heads.ensemble.temperature"}
    members, labels = collect_logits(model, trainer.eval_dataset, members=True)
    answers, _ = collect_logits(model, trainer.eval_dataset)
    assert task_cost(answers, labels).mean() < task_cost(members, labels).mean()


def test_it_goes_on_top_of_the_default_recipes_heads(tmp_path):
    model = toy_model(recipe="default", cascade=True, boosting=0, standardize_features=False, lam=[0.1, 1.0])
    trainer = toy_trainer(model, tmp_path)
    assert model.heads.modules_by_exit[1].hidden is not None
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_exit_03/accuracy"] > metrics["eval_exit_01/accuracy"] > 0.3
