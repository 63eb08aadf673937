"""The alternation, its objectives, resuming, early stopping, and what the default recipe fits after the IMs."""

import json
import math
from copy import deepcopy
from functools import partial

import datasets
import numpy as np
import PIL.Image
import pytest
import torch
import torch.nn.functional as F
from transformers import TrainerCallback, set_seed

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, JEIDNNTrainer, JEIDNNTrainingArguments
from jeidnn_hf.data import ImageView, Preprocessing
from jeidnn_hf.exits import exit_decision, exit_distribution, exit_probability
from jeidnn_hf.feature_cache import CachedFeatures, cache_features
from jeidnn_hf.objectives import class_imbalance_weights, gate_targets
from jeidnn_hf.record import collect_logits
from jeidnn_hf.trainer import Phase, phase_at

PREPROCESSING = Preprocessing(16, 1.0, "bilinear", (0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope="module")
def images():
    """240 pictures of four classes: a bright patch in one of the quarters, under noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(240) % 4
    pixels = rng.integers(0, 140, (240, 16, 16, 3), dtype=np.uint8)
    for picture, label in zip(pixels, labels, strict=True):
        top, left = 8 * (label // 2), 8 * (label % 2)
        picture[top : top + 8, left : left + 8] += 60
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(num_classes=4)})
    pictures = [PIL.Image.fromarray(picture) for picture in pixels]
    return datasets.Dataset.from_dict({"image": pictures, "label": labels}, features=features)


def build(recipe="paper", **options):
    set_seed(0)
    options.setdefault("lam", 0.5 if recipe == "paper" else [0.01, 1.0])
    config = JEIDNNConfig(
        backbone="resnet20_cifar", num_labels=4, image_size=16, exit_stages=[1, 4, 6, 8], recipe=recipe, head_dim=8,
        **options,
    )  # fmt: skip
    return JEIDNNForImageClassification(config)


@pytest.fixture(scope="module")
def data(images, tmp_path_factory):
    """(train, validation) features for a recipe, made once."""
    made = {}

    def features(model):
        key = json.dumps(model.config.exit_pooling)
        if key not in made:
            folder = tmp_path_factory.mktemp("cache")
            roles = {"train": (range(160), (0, 1)), "validation": (range(160, 240), (None,))}
            made[key] = [
                CachedFeatures(
                    [
                        cache_features(
                            model.backbone, ImageView(images, rows, PREPROCESSING, views=(view,)), role, folder,
                            dtype=torch.float32,
                        )  # fmt: skip
                        for view in views
                    ]
                )
                for role, (rows, views) in roles.items()
            ]
        return made[key]

    return features


def arguments(folder, **options):
    defaults = {
        "recipe": "paper", "num_train_epochs": 3, "per_device_train_batch_size": 32, "warmup_epochs": 1, "bi_switch": 6,
        "report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True, "seed": 1,
    }  # fmt: skip
    return JEIDNNTrainingArguments(output_dir=str(folder), **{**defaults, **options})


def exit_state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if not k.startswith("backbone.")}


def assert_same(a, b):
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


class Recorder(TrainerCallback):
    """Notes, before every step, the phase and a copy of the parameters."""

    def __init__(self):
        self.trainer, self.phases, self.states = None, [], []

    def on_step_begin(self, args, state, control, model, **kwargs):
        self.phases.append(self.trainer.phase)
        self.states.append({k: v.detach().clone() for k, v in model.named_parameters()})


def test_phases_alternate_from_the_gates_and_keep_their_count_across_epochs():
    phases = [phase_at(step, 5, 3) for step in range(15)]
    w, g, i = Phase.WARMUP, Phase.GATE, Phase.IM
    assert phases == [w] * 5 + [g] * 3 + [i] * 3 + [g] * 3 + [i]


def test_only_the_parameters_of_the_phase_move_and_the_backbone_never(data, tmp_path):
    model = build()
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    recorder = Recorder()
    trainer = JEIDNNTrainer(model, arguments(tmp_path), *data(model), callbacks=[recorder])
    recorder.trainer = trainer
    trainer.train()
    recorder.states.append({k: v.detach().clone() for k, v in model.named_parameters()})
    assert recorder.phases == [phase_at(step, 10, 6) for step in range(30)]
    for phase, old, new in zip(recorder.phases, recorder.states[:-1], recorder.states[1:], strict=True):
        moved = {k.split(".")[0] for k in old if not torch.equal(old[k], new[k])}
        assert moved == ({"policy"} if phase is Phase.GATE else {"heads"})
    assert all(torch.equal(before[k], v) for k, v in model.backbone.state_dict().items())


def test_the_papers_optimiser_and_schedule(data, tmp_path):
    model = build()
    args = JEIDNNTrainingArguments(output_dir=str(tmp_path), recipe="paper", report_to="none", use_cpu=True)
    trainer = JEIDNNTrainer(model, args, *data(model))
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.Adam
    assert {(g["lr"], g["weight_decay"]) for g in optimizer.param_groups} == {(0.01, 5e-4)}
    schedule = trainer.create_scheduler(100)
    for _ in range(3):
        optimizer.step()
        schedule.step()
        assert {g["lr"] for g in optimizer.param_groups} == {0.01}
    assert (args.per_device_train_batch_size, args.max_grad_norm, args.bi_switch, args.num_train_epochs) == (
        64, 0, 200, 15,
    )  # fmt: skip
    args = arguments(tmp_path, head_learning_rate=0.1, gate_learning_rate=0.2)
    groups = JEIDNNTrainer(model, args, *data(model)).create_optimizer().param_groups
    assert [group["lr"] for group in groups] == [0.1, 0.2]


def test_default_recipe_uses_adamw_and_one_cycle(data, tmp_path):
    model = build("default")
    args = JEIDNNTrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    trainer = JEIDNNTrainer(model, args, *data(model))
    assert type(trainer.create_optimizer()) is torch.optim.AdamW
    rates = []
    schedule = trainer.create_scheduler(100)
    for _ in range(99):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        schedule.step()
    assert 20 < int(np.argmax(rates)) < 40 and rates[-1] < rates[0] < max(rates) == pytest.approx(2e-3, rel=1e-3)
    assert (args.per_device_train_batch_size, args.num_train_epochs, args.gates_on) == (512, 6, "validation")


def batch_of(model, data, rows=range(32)):
    batch = data(model)[0].__getitems__(list(rows))
    return model.split_features(batch["exit_features"]), batch["labels"]


def by_hand(model, features, labels):
    """Everything the objectives are made of, from the module's parameters alone."""
    logits = torch.stack(
        [*(head(z, None)[0] for head, z in zip(model.heads.modules_by_exit, features, strict=False)), features[-1]], 1
    )
    ce = torch.stack([F.cross_entropy(logits[:, l], labels, reduction="none") for l in range(4)], 1)
    p = logits[:, :-1].softmax(-1)
    top = p.sort(descending=True).values
    sharp = p**2 / (p**2).sum(-1, keepdim=True)
    stats = torch.stack(
        [top[..., 0], -(p * p.log()).sum(-1), -(sharp * sharp.log()).sum(-1), top[..., 0] - top[..., 1]], -1
    )
    return logits, ce, (stats * model.policy.gates.weight).sum(-1) + model.policy.gates.bias


def test_the_objectives_are_the_papers(data, tmp_path):
    model = build()
    trainer = JEIDNNTrainer(model, arguments(tmp_path), *data(model))
    features, labels = batch_of(model, data)
    with torch.no_grad():
        logits, ce, gate_logits = by_hand(model, features, labels)

    def loss(phase):
        return float(trainer.im_training.loss(model, features, labels, phase, 0.5).detach())

    cost = ce + 0.5 * model.normalised_costs
    warm = sum((4 - l) * ce[:, l - 1].mean() for l in range(1, 4))
    assert loss(Phase.WARMUP) == pytest.approx(float(warm), rel=1e-5)
    weighted = (ce * exit_distribution(gate_logits.sigmoid())).sum(1).mean()
    assert loss(Phase.IM) == pytest.approx(float(weighted), rel=1e-5)
    targets = (torch.arange(3) >= cost.argmin(1, keepdim=True)).float()
    trainer.im_training.pos_weight.copy_(torch.tensor([0.5, 2.0, 4.0]))
    bce = F.binary_cross_entropy_with_logits(gate_logits, targets, pos_weight=torch.tensor([0.5, 2.0, 4.0]))
    assert loss(Phase.GATE) == pytest.approx(3 * float(bce), rel=1e-5)
    trainer.args.full_gradient = True
    joint = (cost * exit_distribution(gate_logits.sigmoid())).sum(1).mean()
    assert loss(Phase.IM) == pytest.approx(float(joint), rel=1e-5)
    trainer.args.gate_objective = "expected_cost"
    assert loss(Phase.GATE) == pytest.approx(float(joint), rel=1e-5)


def test_gradients_of_the_im_phase_with_and_without_the_path_through_the_gates(data, tmp_path):
    model = build()
    features, labels = batch_of(model, data)
    grads = {}
    for full in (False, True):
        trainer = JEIDNNTrainer(model, arguments(tmp_path, full_gradient=full), *data(model))
        model.zero_grad()
        loss = partial(trainer.im_training.loss, phase=Phase.IM, lam=0.5)
        model(exit_features=features, labels=labels, objective=loss).backward()
        grads[full] = model.heads.modules_by_exit[0].weight.grad.clone()
        assert (model.policy.gates.weight.grad is None) is not full
    logits, ce, gate_logits = by_hand(model, features, labels)
    weights = exit_distribution(gate_logits.sigmoid()).detach()
    expected = torch.autograd.grad((ce * weights).sum(1).mean(), model.heads.modules_by_exit[0].weight)[0]
    assert torch.allclose(grads[False], expected, atol=1e-6)
    assert not torch.allclose(grads[True], expected, atol=1e-4)


def test_class_imbalance_weights_come_from_validation_once_an_epoch(data, tmp_path):
    model = build()
    seen = []

    class Spy(JEIDNNTrainer):
        def _weigh_classes(self):
            before = self._weighed_epoch
            super()._weigh_classes()
            if self._weighed_epoch != before:
                logits, labels = collect_logits(self.model, self.eval_dataset, members=True)
                ce = F.cross_entropy(logits.movedim(1, 2), labels[:, None].expand(-1, 4), reduction="none")
                targets = gate_targets(ce + 0.5 * self.model.normalised_costs)
                weights = self.im_training.pos_weight.tolist(), class_imbalance_weights(targets).tolist()
                seen.append((self.state.global_step, *weights))

    Spy(model, arguments(tmp_path, num_train_epochs=4, bi_switch=7), *data(model)).train()
    # 10 steps an epoch; gates in steps 10-16, 24-30 and 38-39
    assert [step for step, _, _ in seen] == [10, 24, 30]
    for _, used, expected in seen:
        assert used == pytest.approx(expected) and all(0.2 <= w <= 5 for w in used)


@pytest.mark.parametrize("recipe", ["paper", "default"])
@pytest.mark.parametrize("stop_at", [4, 13, 19, 22])
def test_a_resumed_run_is_bit_identical_to_an_uninterrupted_one(data, tmp_path, recipe, stop_at):
    """Stops in the warm-up (4), in a gate phase (13), in an IM phase (19), and where the phase changes (22)."""
    options = {"save_strategy": "steps", "save_steps": stop_at, "recipe": recipe, "gate_steps": 5}

    class Stop(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            control.should_training_stop = True

    model = build(recipe)
    whole = JEIDNNTrainer(model, arguments(tmp_path / "whole", **options), *data(model))
    whole.train()
    expected = exit_state(model)

    model = build(recipe)
    first = JEIDNNTrainer(model, arguments(tmp_path / "part", **options), *data(model), callbacks=[Stop()])
    first.train()
    assert first.state.global_step == stop_at
    model = build(recipe)
    resumed = JEIDNNTrainer(model, arguments(tmp_path / "part", **options), *data(model))
    resumed.train(resume_from_checkpoint=str(tmp_path / "part" / f"checkpoint-{stop_at}"))
    assert resumed.state.global_step == whole.state.global_step == 30
    assert_same(whole.im_training.state_dict(), resumed.im_training.state_dict())
    assert_same(expected, exit_state(model))


def test_pixels_and_cache_train_the_same_exits(data, images, tmp_path):
    model = build()
    train, validation = data(model)
    JEIDNNTrainer(model, arguments(tmp_path, num_train_epochs=2), train, validation).train()
    cached = exit_state(model)
    model = build()
    pixels = ImageView(images, range(160), PREPROCESSING, views=(0, 1))
    held_out = ImageView(images, range(160, 240), PREPROCESSING)
    JEIDNNTrainer(model, arguments(tmp_path, num_train_epochs=2), pixels, held_out).train()
    for name, value in exit_state(model).items():
        assert torch.allclose(value, cached[name], atol=2e-4), name


def test_evaluation_reports_what_the_gates_do(data, tmp_path):
    model = build()
    train, validation = data(model)
    trainer = JEIDNNTrainer(model, arguments(tmp_path), train, validation)
    trainer.train()
    metrics = trainer.evaluate()
    features = model.split_features(validation.__getitems__(range(len(validation)))["exit_features"])
    with torch.no_grad():
        logits, ce, gate_logits = by_hand(model, features, validation.labels)
        gates = gate_logits.sigmoid()
        chosen = exit_decision(exit_probability(gates))
        mass_left = 1 - exit_distribution(gates).cumsum(-1) + exit_distribution(gates)
    rows, costs = torch.arange(len(chosen)), model.normalised_costs
    right = (logits.argmax(-1) == validation.labels[:, None]).float()
    assert metrics["eval_accuracy"] == pytest.approx(float(right[rows, chosen].mean()))
    assert metrics["eval_mul_adds"] == pytest.approx(float(costs[chosen].mean()))
    assert metrics["eval_cost"] == pytest.approx(float((ce[rows, chosen] + 0.5 * costs[chosen]).mean()), rel=1e-5)
    for l in range(4):
        name = f"eval_exit_{l + 1:02d}"
        assert metrics[f"{name}/accuracy"] == pytest.approx(float(right[:, l].mean()))
        assert metrics[f"{name}/share"] == pytest.approx(float((chosen == l).float().mean()))
        assert metrics[f"{name}/mass_left"] == pytest.approx(float(mass_left[:, l].mean()), abs=1e-5)
        if l < 3:
            assert metrics[f"{name}/gate"] == pytest.approx(float(gates[:, l].mean()), rel=1e-5)


def test_the_best_state_by_validation_cost_is_restored_and_warm_up_does_not_count(data, tmp_path):
    model = build()
    args = arguments(
        tmp_path, num_train_epochs=6, warmup_epochs=2, eval_strategy="epoch", save_strategy="epoch", learning_rate=0.05,
        load_best_model_at_end=True, metric_for_best_model="cost", greater_is_better=False,
    )  # fmt: skip
    trainer = JEIDNNTrainer(model, args, *data(model))
    trainer.train()
    costs = {log["step"]: log["eval_cost"] for log in trainer.state.log_history if "eval_cost" in log}
    after_warmup = {step: cost for step, cost in costs.items() if step > 20}
    assert sorted(costs) == [10, 20, 30, 40, 50, 60]
    best = min(after_warmup, key=after_warmup.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    assert trainer.evaluate()["eval_cost"] == pytest.approx(after_warmup[best], rel=1e-6)


def test_early_stopping_begins_after_the_warm_up(data, tmp_path):
    model = build()
    args = arguments(
        tmp_path, num_train_epochs=12, warmup_epochs=4, eval_strategy="epoch", save_strategy="epoch",
        load_best_model_at_end=True, metric_for_best_model="cost", greater_is_better=False, early_stopping_patience=2,
        learning_rate=1e-12,
    )  # fmt: skip
    trainer = JEIDNNTrainer(model, args, *data(model))
    trainer.train()
    assert trainer.state.global_step == 10 * (4 + 1 + 2)


def test_default_recipe_fits_standardisation_ensemble_and_gates(data, tmp_path):
    model = build("default")
    train, validation = data(model)
    trainer = JEIDNNTrainer(model, arguments(tmp_path, recipe="default", gate_steps=60), train, validation)
    gates = deepcopy(model.policy.gates.state_dict())
    trainer.train()
    everything = torch.cat([view.features for view in train.views])
    for l, z in enumerate(everything.split(train.exit_dims, dim=1)[:-1]):
        assert torch.allclose(model.heads.norms[l].mean, z.mean(0), atol=1e-5)
        assert torch.allclose(model.heads.norms[l].std, z.std(0, correction=0).clamp_min(1e-6), atol=1e-4)
    assert not torch.equal(model.heads.ensemble.weight, torch.eye(4))
    assert not torch.equal(model.heads.ensemble.temperature, torch.ones(4))
    assert any(not torch.equal(gates[k], v) for k, v in model.policy.gates.state_dict().items())
    logged = next(log for log in trainer.state.log_history if "gate_fit_last_cost" in log)
    assert logged["gate_fit_last_cost"] < logged["gate_fit_first_cost"]


def test_logs_name_the_phase(data, tmp_path):
    model = build()
    trainer = JEIDNNTrainer(model, arguments(tmp_path, logging_steps=5), *data(model))
    trainer.train()
    logs = [(log["step"], log["phase"]) for log in trainer.state.log_history if "loss" in log]
    assert logs == [(5, 0), (10, 0), (15, 1), (20, 2), (25, 1), (30, 2)]


def test_a_loss_that_is_not_finite_ends_the_run(data, tmp_path):
    model = build()
    trainer = JEIDNNTrainer(model, arguments(tmp_path, logging_steps=1), *data(model))
    with torch.no_grad():
        model.heads.modules_by_exit[0].bias[0] = math.nan
    with pytest.raises(ValueError, match="Expected a finite loss, but got nan by step 1"):
        trainer.train()


def test_wrong_data_and_arguments(data, images, tmp_path):
    model = build()
    train, validation = data(model)
    one_class = ImageView(images, range(0, 240, 4), PREPROCESSING)
    with pytest.raises(ValueError, match=r"Expected every class in the validation data, but got none of \[1, 2, 3\]"):
        JEIDNNTrainer(model, arguments(tmp_path), train, one_class)
    with pytest.raises(ValueError, match="Expected gates_on='validation', but got 'train': plain trains no gates"):
        arguments(tmp_path, im_training="plain")
    model.config.problem_type = "regression"
    with pytest.raises(ValueError, match="^Expected a model of single labels, but got problem_type='regression'"):
        JEIDNNTrainer(model, arguments(tmp_path), train, validation)
    for wrong, message in {
        "bi_switch": "Expected bi_switch to be positive, but got 0",
        "warmup_epochs": "Expected warmup_epochs not to be negative, but got -1",
        "gate_targets": "Expected gate_targets to be one of",
        "recipe": "Expected recipe to be one of",
        "imbalance_low": "Expected 0 <= imbalance_low <= imbalance_high, but got 9",
    }.items():
        value = {"bi_switch": 0, "warmup_epochs": -1, "imbalance_low": 9.0}.get(wrong, "nonsense")
        with pytest.raises(ValueError, match=message):
            arguments(tmp_path, **{wrong: value})
