"""`JEIDNNTrainer`: transformers' Trainer, whose training step alternates between inference modules and gates.

The phase is a pure function of the optimizer step, so a resumed run is in the phase that it left (Algorithm 1): warm-up
epochs, then gates, then inference modules, changing every ``bi_switch`` steps, the count kept across epochs.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, Trainer

from .backbones.loading import STORED_WEIGHTS
from .data import collate
from .feature_cache import CachedFeatures
from .files import WriteError, clear_write_errors
from .held_out import fit_held_out
from .im_training import IM_TRAININGS, Phase
from .im_training.jeidnn import draw_lambda
from .model_card import training_settings, write_card
from .modeling_jeidnn import JEIDNNForImageClassification
from .objectives import task_cost
from .optimizers import build_optimizer, build_schedule
from .record import collect_logits
from .training_args import JEIDNNTrainingArguments

STATE_NAME = "jeidnn_state.json"
METHOD_NAME = "im_training.safetensors"
_PLAIN = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)


def phase_at(step: int, warmup_steps: int, bi_switch: int, turns: tuple[Phase, ...] = (Phase.GATE, Phase.IM)) -> Phase:
    """The phase of an optimizer step, counted from 0; no turns: all of the warm-up."""
    if step < warmup_steps or not turns:
        return Phase.WARMUP
    return turns[(step - warmup_steps) // bi_switch % len(turns)]


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest checkpoint in a folder that was written to its end, or None.

    transformers writes the trainer's state last, so a run killed while saving leaves a checkpoint without it.
    """
    checkpoints = [path for path in Path(folder).glob("checkpoint-*") if path.name.split("-")[-1].isdigit()]
    for path in sorted(checkpoints, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
            return str(path)
        except (OSError, ValueError):
            continue
    return None


class JEIDNNTrainer(Trainer):
    """Trains the exits of a `JEIDNNForImageClassification`; the backbone never moves.

    Args:
        model: the model.
        args: `JEIDNNTrainingArguments`.
        train_dataset: `CachedFeatures`, or an `ImageView` to train from pixels.
        eval_dataset: the `validation` role, likewise: early stopping, class-imbalance weights, held-out fits.

    With ``push_to_hub=True`` every save is pushed, and `push_to_hub()` after `train()` pushes the trained model, as in
    transformers; a backbone from a local file goes along. `push_to_hub(reports=...)` puts results into its card.

    `evaluate()` reports, per exit, accuracy, mean gate value, share of the samples and the mass left,
    1 - sum_{j<l} P(G=j); and the realised cost: task cost + lambda x Mul-Adds of the exits taken.
    """

    def __init__(
        self,
        model: JEIDNNForImageClassification,
        args: JEIDNNTrainingArguments,
        train_dataset: Dataset,
        eval_dataset: Dataset,
        **kwargs: Any,
    ):
        if not model.config.has_classes:
            raise ValueError(f"Expected a model of single labels, but got problem_type={model.config.problem_type!r}.")
        classes = eval_dataset.labels.unique()
        if len(classes) < model.config.num_labels:
            absent = sorted(set(range(model.config.num_labels)) - set(classes.tolist()))
            raise ValueError(f"Expected every class in the validation data, but got none of {absent[:5]}.")
        if model.config.policy != "gates":
            raise ValueError(f"Expected a model with policy='gates' to train, but got {model.config.policy!r}.")
        method = IM_TRAININGS[args.im_training]
        method.check(model.config)
        if args.push_to_hub and model.config.backbone_is_local:
            model.config.backbone_weights = STORED_WEIGHTS
        super().__init__(
            model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, data_collator=collate, **kwargs
        )
        if args.early_stopping_patience is not None:
            self.add_callback(_PatientAfterWarmup(args.early_stopping_patience, self))
        self.im_training = method(args, model.backbone.num_exits, model.heads.native_head).to(args.device)
        self._weighed_epoch = -1

    # The alternation.

    @property
    def phase(self) -> Phase:
        """The phase of the coming optimizer step."""
        return self._phase_of(self.state.global_step)

    @property
    def last_phase(self) -> Phase:
        """The phase of the optimizer step just taken."""
        return self._phase_of(self.state.global_step - 1)

    def _phase_of(self, step: int) -> Phase:
        warmup_steps = round(self.args.warmup_epochs * self._steps_per_epoch)
        return phase_at(step, warmup_steps, self.args.bi_switch, self.im_training.turns)

    @property
    def _steps_per_epoch(self) -> int:
        return max(1, round(self.state.max_steps / self.args.num_train_epochs))

    def training_step(self, model, inputs: dict[str, Tensor], num_items_in_batch=None) -> Tensor:
        """One forward and backward of the current phase's objective, in which only its own parameters take part."""
        phase = self.phase
        if phase is Phase.GATE and self.args.gate_objective == "surrogate":
            self._weigh_classes()
        inputs = self._prepare_inputs(inputs)
        inputs.pop("index", None)
        self.im_training.step = self.state.global_step
        self.im_training.learning_rate = self.optimizer.param_groups[0]["lr"]
        lam = None if phase is Phase.WARMUP else draw_lambda(self.model.config, inputs["labels"])
        with self.compute_loss_context_manager():
            loss = model(**inputs, objective=partial(self.im_training.objective, phase=phase, lam=lam))
        loss = loss / self.current_gradient_accumulation_steps
        self.accelerator.backward(loss)
        return loss.detach()

    def _weigh_classes(self) -> None:
        """Class-imbalance weights from the validation data, once an epoch and before the first gate step."""
        epoch = self.state.global_step // self._steps_per_epoch
        if epoch == self._weighed_epoch:
            return
        logits, labels = collect_logits(self.model, self.eval_dataset, members=True)
        lam = draw_lambda(self.model.config, labels)
        costs = self.model.normalised_costs.cpu()
        self.im_training.weigh_classes(logits, labels, costs, self.model.config, lam)
        self._weighed_epoch = epoch

    # Optimiser and schedule.

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            heads, gates = self.model.heads.member_parameters(), self.model.policy.parameters()
            self.optimizer = build_optimizer(self.args, heads, list(gates))
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.accelerator.scaler is None and self.accelerator.distributed_type in _PLAIN:
            # accelerate's wrapper looks for an absent package at every step, which costs as much as a step itself
            self.optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        optimizer = optimizer or self.optimizer
        if self.args.schedule == "one_cycle":
            optimizer = getattr(optimizer, "optimizer", optimizer)
        self.lr_scheduler = build_schedule(self.args, optimizer, num_training_steps)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    # The run.

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """Trains; then, with ``gates_on="validation"``, fits ensemble and gates there.

        ``resume_from_checkpoint``: a checkpoint, or True for the newest complete one, from the start if there is none.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        if self.model.heads.norms is not None and not resume_from_checkpoint:
            set_feature_statistics(self.model, self.train_dataset)
        output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        if self.args.gates_on == "validation":
            self.log(fit_held_out(self.model, self.eval_dataset, self.args))
        return output

    # Evaluation, logs, checkpoints.

    @torch.inference_mode()
    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Metrics of every exit evaluated, and of the exits that the gates choose at the current lambda."""
        logits, labels = collect_logits(self.model, eval_dataset or self.eval_dataset)
        config, policy = self.model.config, self.model.policy
        logits, labels, lam = logits.to(policy.device), labels.to(policy.device), config.current_lam
        costs = self.model.normalised_costs
        chosen, distribution, gates = policy(logits, lam)
        chosen = chosen[:, None]
        right = (logits.argmax(-1) == labels[:, None]).float()
        task = task_cost(logits, labels, config.task_cost).gather(1, chosen).mean()
        metrics = {
            "cost": task + lam * costs[chosen].mean(),
            "accuracy": right.gather(1, chosen).mean(),
            "mul_adds": costs[chosen].mean(),
        }
        per_exit = {
            "accuracy": right.mean(0),
            "share": torch.bincount(chosen.flatten(), minlength=len(costs)) / len(chosen),
            "mass_left": (1 - distribution.cumsum(-1) + distribution).mean(0),
        }
        if gates is not None:
            per_exit["gate"] = gates.mean(0)
        for name, values in per_exit.items():
            metrics |= {f"exit_{l:02d}/{name}": value for l, value in enumerate(values, start=1)}
        metrics = {f"{metric_key_prefix}_{name}": float(value) for name, value in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the phase; a loss that is not finite ends the run."""
        if "loss" in logs:
            if not torch.isfinite(torch.tensor(logs["loss"])):
                raise ValueError(
                    f"Expected a finite loss, but got {logs['loss']} by step {self.state.global_step}; "
                    "check the features for NaN and the learning rate."
                )
            logs["phase"] = int(self.last_phase)
        super().log(logs, start_time)

    def _determine_best_metric(self, metrics, trial) -> bool:
        """The best state is looked for once there are trained gates to realise a cost."""
        if self.im_training.turns and self.last_phase is Phase.WARMUP:
            return False
        return super()._determine_best_metric(metrics, trial)

    def _save_checkpoint(self, model, trial) -> None:
        """One that cannot be written to its end is removed again, and ends the run in a WriteError."""
        run = self._get_output_dir(trial=trial)
        folder = os.path.join(run, f"checkpoint-{self.state.global_step}")
        try:
            with clear_write_errors(folder):
                os.makedirs(folder, exist_ok=True)
                if self.args.should_save:
                    with open(os.path.join(folder, STATE_NAME), "w", encoding="utf-8") as file:
                        json.dump({"weighed_epoch": self._weighed_epoch}, file)
                    save_file(self.im_training.state_dict(), os.path.join(folder, METHOD_NAME))
                super()._save_checkpoint(model, trial)
        except WriteError as error:
            shutil.rmtree(folder, ignore_errors=True)
            good = last_checkpoint(run) or "the beginning, as no checkpoint is complete"
            raise WriteError(f"{error} Make room and start again: the run can go on from {good}.") from error

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """transformers copies its own files only from the checkpoint to the folder that it pushes."""
        stored, pushed = (Path(folder, STORED_WEIGHTS) for folder in (checkpoint_folder, self.args.output_dir))
        if self.is_world_process_zero() and stored.exists():
            if not pushed.exists() or not filecmp.cmp(stored, pushed, shallow=False):  # it may be on its way just now
                shutil.copy(stored, pushed)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, model_name: str | None = None, **options: Any) -> None:
        """Writes our card, with these training settings, into ``output_dir``; `push_to_hub` hands it its arguments.

        ``options``: as of `model_card.write_card`: ``reports`` above all; ``point`` is the model's unless given.
        """
        if self.is_world_process_zero():
            training = training_settings(self.args.to_dict())
            known = {"config": self.model.config, "name": model_name, "repo_id": self.hub_model_id}
            known |= {"point": self.model.operating_point, "training": training}
            write_card(self.args.output_dir, **{**known, **options})

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        with open(os.path.join(resume_from_checkpoint, STATE_NAME), encoding="utf-8") as file:
            self._weighed_epoch = json.load(file)["weighed_epoch"]
        self.im_training.load_state_dict(load_file(os.path.join(resume_from_checkpoint, METHOD_NAME)))

    def _issue_warnings_after_load(self, load_result) -> None:
        """A checkpoint without the frozen backbone is complete; one without a head or a gate is not."""
        missing = [key for key in load_result.missing_keys if not key.startswith("backbone.")]
        if missing or load_result.unexpected_keys:
            raise ValueError(
                f"Expected a checkpoint of this model, but {missing[:3]} are missing and "
                f"{load_result.unexpected_keys[:3]} are unknown."
            )

    # What transformers does at every step and this Trainer has no use for.

    def floating_point_ops(self, inputs) -> int:
        return 0

    def _get_grad_norm(self, model, grad_norm=None):
        return grad_norm


def set_feature_statistics(model: JEIDNNForImageClassification, features: CachedFeatures) -> None:
    """Standardisation by the mean and deviation of the training features, over all views."""
    views = getattr(features, "views", None)
    if views is None or not hasattr(views[0], "statistics"):
        raise ValueError("Expected CachedFeatures to train on, since standardize_features needs their statistics.")
    means, stds = zip(*(view.statistics() for view in views), strict=True)
    mean = torch.stack(means).mean(0)
    square = torch.stack([m.square() + s.square() for m, s in zip(means, stds, strict=True)]).mean(0)
    std = (square - mean.square()).clamp_min(0).sqrt()
    dims, count = model.backbone.exit_dims, len(model.heads.norms)
    model.heads.set_feature_statistics(mean.split(dims)[:count], std.split(dims)[:count])


class _PatientAfterWarmup(EarlyStoppingCallback):
    """Early stopping that begins to count when the warm-up ends, where there is more than a warm-up."""

    def __init__(self, patience: int, trainer: JEIDNNTrainer):
        super().__init__(early_stopping_patience=patience)
        self._trainer = trainer

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        if not self._trainer.im_training.turns or self._trainer.last_phase is not Phase.WARMUP:
            super().on_evaluate(args, state, control, metrics, **kwargs)
