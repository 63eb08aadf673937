"""im_training/boosted.py: each exit learns the residual of the exits before; gates see the boosted answers."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from jeidnn_hf import held_out
from jeidnn_hf.im_training import IM_TRAININGS, Phase
from jeidnn_hf.im_training.boosted import Boosted
from jeidnn_hf.im_training.plain import Plain
from jeidnn_hf.record import collect_logits
from toy_training import StopAtSave, batch_of, differing, exit_state, toy_model, toy_trainer, trained


def loss_of(model, folder, **options) -> torch.Tensor:
    features, labels = batch_of(model)
    training = toy_trainer(model, folder, **options).im_training
    return training.loss(model, features, labels, Phase.WARMUP, None)


@pytest.mark.parametrize("native", [True, False], ids=["native", "trained"])
def test_the_loss_by_hand(native, tmp_path):
    """sum_l mean CE(y, o^l + alpha F^{l-1}), and of exit l a gradient in IM l alone."""
    model = toy_model(boosting=0.5, native_head=native)
    features, labels = batch_of(model)
    loss_of(model, tmp_path, im_training="boosted").backward()
    before, total = torch.zeros(24, 4), 0.0
    for l, z in enumerate(features):
        if native and l == 3:
            total += float(F.cross_entropy(z + before, labels))
            break
        head = model.heads.modules_by_exit[l]
        weight, bias = head.weight.detach().requires_grad_(), head.bias.detach().requires_grad_()
        answers = z @ weight.T + bias + before
        cross_entropy = F.cross_entropy(answers, labels)
        gradient = torch.autograd.grad(cross_entropy, (weight, bias))
        torch.testing.assert_close(head.weight.grad, gradient[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(head.bias.grad, gradient[1], rtol=1e-5, atol=1e-6)
        before, total = 0.5 * answers.detach(), total + float(cross_entropy.detach())
    assert float(loss_of(model, tmp_path, im_training="boosted").detach()) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("weighting", ["uniform", "position"])
def test_the_loss_at_alpha_of_0_is_plain_to_the_bit(weighting, tmp_path):
    plain = loss_of(toy_model(), tmp_path, warmup_weighting=weighting)
    model = toy_model()
    features, labels = batch_of(model)
    args = toy_trainer(model, tmp_path, warmup_weighting=weighting).args
    assert torch.equal(plain, Boosted(args, 4).loss(model, features, labels, Phase.WARMUP, None))


def test_a_training_at_alpha_of_0_is_plain_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(Boosted, "check", Plain.check)  # its own asks for an alpha above 0
    plain, nothing_added = (trained(tmp_path, {}, im_training=name) for name in ("plain", "boosted"))
    monkeypatch.undo()
    boosted = trained(tmp_path, {"boosting": 0.5}, im_training="boosted")
    heads = [f"heads.modules_by_exit.{l}.weight" for l in range(3)]
    assert differing(plain, nothing_added) == []
    assert [name for name in heads if name in differing(plain, boosted)] == heads[1:]  # the first has none before it


def test_a_step_down_the_residual_betters_the_answers(tmp_path):
    model = toy_model(boosting=0.5)
    trainer = toy_trainer(model, tmp_path, im_training="boosted")
    before = [trainer.evaluate()[f"eval_exit_{l:02d}/accuracy"] for l in (1, 2, 3)]
    trainer.train()
    after = [trainer.evaluate()[f"eval_exit_{l:02d}/accuracy"] for l in (1, 2, 3)]
    assert after[0] < after[1] < after[2] and all(b > a + 0.1 for a, b in zip(before, after, strict=True))


def test_gates_are_fitted_to_the_boosted_answers(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(held_out, "fit_gates", lambda policy, logits, *_, **__: seen.append(logits) or [0.0])
    model = toy_model(boosting=0.5)
    trainer = toy_trainer(model, tmp_path, im_training="boosted")
    held_out.fit_held_out(trainer.model, trainer.eval_dataset, trainer.args)
    answers, members = (collect_logits(model, trainer.eval_dataset, members=m)[0] for m in (False, True))
    assert torch.equal(seen[0], answers) and not torch.allclose(answers[:, 1:], members[:, 1:], atol=0.1)
    assert torch.equal(answers[:, 0], members[:, 0])
    torch.testing.assert_close(answers[:, 2], members[:, 2] + members[:, 1] / 2 + members[:, 0] / 4)


def test_an_ensemble_is_fitted_to_the_boosted_answers_and_trains_no_one(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(held_out, "fit_ensemble", lambda ensemble, logits, labels, pull: seen.append(logits))
    model, alone = toy_model(boosting=0.5, ensemble=True), toy_model(boosting=0.5)
    torch.nn.init.normal_(model.heads.ensemble.weight)
    losses = [loss_of(one, tmp_path, im_training="boosted") for one in (model, alone)]
    assert torch.equal(*losses)
    trainer = toy_trainer(model, tmp_path, im_training="boosted")
    held_out.fit_held_out(trainer.model, trainer.eval_dataset, trainer.args)
    members = collect_logits(model, trainer.eval_dataset, members=True)[0]
    torch.testing.assert_close(seen[0][:, 1], members[:, 1] + members[:, 0] / 2)


def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(tmp_path):
    options = {"im_training": "boosted", "save_strategy": "steps", "save_steps": 3}
    whole = trained(tmp_path / "whole", {"boosting": 0.5}, **options)
    first = toy_trainer(toy_model(boosting=0.5), tmp_path / "part", callbacks=[StopAtSave()], **options)
    first.train()
    assert first.state.global_step == 3 and differing(whole, exit_state(first.model))
    resumed = str(tmp_path / "part" / "checkpoint-3")
    assert differing(whole, trained(tmp_path / "part", {"boosting": 0.5}, resume=resumed, **options)) == []


def test_model_and_training_go_together(tmp_path):
    with pytest.raises(ValueError, match=r"^Expected a model with boosting for im_training='boosted', but got boo"):
        toy_trainer(toy_model(), tmp_path, im_training="boosted")
    with pytest.raises(ValueError, match="^Expected gates_on='validation', but got 'train': boosted trains no gates"):
        toy_trainer(toy_model(boosting=0.5), tmp_path, im_training="boosted", gates_on="train")
    boosted = toy_model(boosting=0.5)
    for name in ("plain", "jeidnn", "imta"):
        message = rf"^Expected im_training='boosted' or 'soft_targets' for boosting=0\.5, but got {name}, which trains"
        with pytest.raises(ValueError, match=f"(?i){message}"):
            toy_trainer(boosted, tmp_path, im_training=name)
        IM_TRAININGS[name].check(toy_model().config)
