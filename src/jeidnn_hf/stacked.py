"""Many trainings of one config as one: the same losses, phases and optimizer as `JEIDNNTrainer`, members side by side.

A step gathers one batch of features, asks all members' heads for their logits in one go, and takes the loss of each
member by vmap over the very function that a single training calls. As no member's loss reads another's parameters, the
gradient of the sum is every member's own, and Adam and AdamW, which work number by number, keep them apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.data_loader import SeedableRandomSampler
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from .feature_cache import CachedFeatures
from .im_training import IM_TRAININGS, Phase
from .modeling_jeidnn import JEIDNNForImageClassification
from .optimizers import build_optimizer, build_schedule
from .record import collect_logits
from .stacked_heads import stack_heads
from .trainer import phase_at, set_feature_statistics
from .training_args import JEIDNNTrainingArguments


@dataclass(frozen=True)
class Member:
    """What a member of a sweep has of its own; ``lam`` None: the model's."""

    lam: float | None
    seed: int
    learning_rate: float


class StackedTraining:
    """Trains S members on one stream of cached features.

    Members start from the model of their seed. Where several have seed and learning rate in common, the warm-up, which
    reads no lambda, is trained once for them and copied when it ends. A member of another learning rate takes the step
    of the largest, scaled: steps of Adam and AdamW are linear in the rate.

    Args:
        models: the untrained model of each seed; `load_member` puts a trained member into one.
        members: lambdas, seeds, learning rates.
        args: of all members, but for seed and learning rate; ``data_seed`` is the order of the data.
        train: features to train on.
        validation: likewise, for the class-imbalance weights.

    Attributes:
        step: steps taken.
        num_steps: steps to take.
        losses: each member's loss, summed over the steps since `drain_losses`, on the device.
    """

    def __init__(
        self,
        models: dict[int, JEIDNNForImageClassification],
        members: Sequence[Member],
        args: JEIDNNTrainingArguments,
        train: CachedFeatures,
        validation: CachedFeatures,
    ):
        self.models, self.members, self.args = models, list(members), args
        self.train_data, self.validation = train, validation
        for model in models.values():
            model.to(args.device).train()
            if model.heads.norms is not None:
                set_feature_statistics(model, train)
        self.model = model = models[members[0].seed]
        method = IM_TRAININGS[args.im_training]
        method.check(model.config)
        self.im_training = method(args, model.backbone.num_exits, model.heads.native_head).to(args.device)
        starts = [(member.seed, member.learning_rate) for member in self.members]
        self.trained = [starts.index(start) for start in dict.fromkeys(starts)]
        """The members that are trained, one of each start while the warm-up lasts."""
        self.start_of = [list(dict.fromkeys(starts)).index(start) for start in starts]
        own = [models[self.members[s].seed] for s in self.trained]
        self.heads = stack_heads([one.heads for one in own])
        self.member_loss = MemberLoss(model, self.im_training)
        gates, self.buffers = stack_module_state([MemberLoss(one, self.im_training) for one in own])
        self.gates = {name: nn.Parameter(gate.detach()) for name, gate in gates.items()}
        self.optimizer = build_optimizer(args, self.heads.parameters, list(self.gates.values()))
        self.steps_per_epoch = math.ceil(len(train) / args.per_device_train_batch_size)
        self.num_steps = math.ceil(args.num_train_epochs * self.steps_per_epoch)
        phase_steps = max(1, round(self.num_steps / args.num_train_epochs))
        self.warmup_steps = round(args.warmup_epochs * phase_steps)
        self.schedule = build_schedule(args, self.optimizer, self.num_steps)
        self.step, self._phase, self._weighed_epoch = 0, None, -1
        self._reached: dict[Phase, list[bool]] = {}
        self._describe_members()

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [*self.heads.parameters, *self.gates.values()]

    @property
    def phase(self) -> Phase:
        """Of the coming step."""
        return phase_at(self.step, self.warmup_steps, self.args.bi_switch, self.im_training.turns)

    # The loop.

    def run_epoch(self) -> Iterator[None]:
        """Takes the steps that are left of this epoch, one per iteration."""
        epoch, done = divmod(self.step, self.steps_per_epoch)
        for batch in self.batches(epoch)[done : done + self.num_steps - self.step]:
            self.take_step(self.train_data.__getitems__(batch))
            yield

    def batches(self, epoch: int) -> Sequence[Tensor]:
        """The rows of each batch of an epoch, as the Trainer's data loader gives them."""
        sampler = SeedableRandomSampler(
            self.train_data, generator=torch.Generator(), data_seed=self.args.order_seed
        )
        sampler.set_epoch(epoch)
        return torch.tensor(list(sampler)).split(self.args.per_device_train_batch_size)

    def take_step(self, batch: dict[str, Tensor]) -> None:
        """One optimizer step of every member."""
        phase, device = self.phase, self.args.device
        if phase is not Phase.WARMUP and len(self.trained) < len(self.members):
            self.part_members()
        if phase is not self._phase:
            self._begin_phase(phase)
        if phase is Phase.GATE and self.args.gate_objective == "surrogate":
            self.weigh_classes()
        features = self.model.split_features(batch["exit_features"].to(device, non_blocking=True))
        labels = batch["labels"].to(device, non_blocking=True)
        self.im_training.step = self.step
        logits = self.heads(self.im_training.read(features))

        def loss(gates: dict[str, Tensor], buffers: dict[str, Tensor], logits: Tensor, lam: Tensor) -> Tensor:
            return functional_call(self.member_loss, (gates, buffers), (logits, labels, phase, lam), tie_weights=False)

        losses = vmap(loss)(self.gates, self.buffers, logits, self.lams)
        losses.sum().backward()
        self.losses += losses.detach()
        self._reached.setdefault(phase, [p.grad is not None for p in self.parameters])
        self._move()
        self.schedule.step()
        self.optimizer.zero_grad()
        self.step += 1

    def _begin_phase(self, phase: Phase) -> None:
        """Asks no gradient of parameters that the first step of such a phase did not reach."""
        self._phase = phase
        for parameter, reached in zip(
            self.parameters, self._reached.get(phase, [True] * len(self.parameters)), strict=True
        ):
            parameter.requires_grad_(reached)

    @torch.no_grad()
    def _move(self) -> None:
        if self.ratios is None:
            self.optimizer.step()
            return
        moving = [(p, axis, p.detach().clone()) for p, axis in self._with_axes() if p.grad is not None]
        self.optimizer.step()
        for p, axis, old in moving:
            p.copy_(torch.lerp(old, p, self.ratios.view(-1, *[1] * (p.dim() - axis - 1))))

    def _with_axes(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Parameters, and which of their dimensions is the members'."""
        yield from ((p, self.heads.axis) for p in self.heads.parameters)
        yield from ((p, 0) for p in self.gates.values())

    # Members.

    def part_members(self) -> None:
        """Goes on with all members, each from the parameters and the optimizer state of its start."""
        self._take([self.start_of[s] for s in range(len(self.members))])
        self.trained = list(range(len(self.members)))
        self._describe_members()

    @torch.no_grad()
    def _take(self, rows: Sequence[int]) -> None:
        rows = torch.tensor(rows, device=self.args.device)
        for p, axis in self._with_axes():
            p.data = p.data.index_select(axis, rows)
            state = self.optimizer.state.get(p, {})
            state.update({k: v.index_select(axis, rows) for k, v in state.items() if v.dim()})
        self.buffers = {name: value.index_select(0, rows) for name, value in self.buffers.items()}
        self.losses = self.losses.index_select(0, rows)

    def _describe_members(self) -> None:
        members, device = [self.members[s] for s in self.trained], self.args.device
        self.lams = torch.tensor([float(member.lam or 0) for member in members], device=device)
        rates = torch.tensor([member.learning_rate for member in members], dtype=torch.float64)
        same = bool((rates == self.args.learning_rate).all())
        self.ratios = None if same else (rates / self.args.learning_rate).float().to(device)
        if not self.step or len(self.losses) != len(members):
            self.losses = torch.zeros(len(members), device=device)

    def load_member(self, s: int) -> JEIDNNForImageClassification:
        """The model of member s, with its lambda; one object for all members of a seed."""
        member = self.members[s]
        model, row = self.models[member.seed], self.trained.index(s) if s in self.trained else self.start_of[s]
        self.heads.load_member(row, model.heads)
        gates = {name.removeprefix("policy."): gate[row] for name, gate in self.gates.items()}
        model.policy.load_state_dict(gates, strict=False)
        if member.lam is not None:
            model.config.lam = model.config.current_lam = member.lam
        return model

    def weigh_classes(self) -> None:
        """As `JEIDNNTrainer` does, for each member."""
        epoch = self.step // self.steps_per_epoch
        if epoch == self._weighed_epoch:
            return
        for s in range(len(self.members)):
            model = self.load_member(s)
            logits, labels = collect_logits(model, self.validation, members=True)
            costs = model.normalised_costs.cpu()
            self.im_training.weigh_classes(logits, labels, costs, model.config, self.members[s].lam)
            for name, value in self.im_training.named_buffers(prefix="im_training"):
                self.buffers[name][s] = value
        self._weighed_epoch = epoch

    def drain_losses(self, steps: int) -> list[float]:
        """Each member's mean loss over ``steps`` steps since the last call."""
        means = (self.losses / max(1, steps)).tolist()
        self.losses.zero_()
        return means

    # State.

    def state_dict(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "weighed_epoch": self._weighed_epoch,
            "trained": self.trained,
            "parameters": [p.detach() for p in self.parameters],
            "buffers": self.buffers,
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step, self._weighed_epoch, self.trained = state["step"], state["weighed_epoch"], state["trained"]
        device = self.args.device
        for parameter, value in zip(self.parameters, state["parameters"], strict=True):
            parameter.data = value.to(device)
        self.buffers = {name: value.to(device) for name, value in state["buffers"].items()}
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self._describe_members()
        self.losses.zero_()


class MemberLoss(nn.Module):
    """``im_training.loss`` of one member, as a function of its logits ``(B, L, K)`` and of this module's parameters and
    buffers: those of the policy, and what the training keeps beside."""

    def __init__(self, model: JEIDNNForImageClassification, im_training: nn.Module):
        super().__init__()
        self.policy, self.im_training = model.policy, im_training
        self.shared = {"config": model.config, "normalised_costs": model.normalised_costs}
        self.boosted = model.heads.boosted

    def forward(self, logits: Tensor, labels: Tensor, phase: Phase, lam: Tensor) -> Tensor:
        model = SimpleNamespace(heads=_Given(self.boosted), policy=self.policy, **self.shared)
        return self.im_training.loss(model, logits, labels, phase, lam)


class _Given:
    """In the place of heads, where the "features" are the IMs' own logits already."""

    def __init__(self, boosted):
        self.boosted = boosted

    def members(self, logits: Tensor) -> Tensor:
        return logits if torch.is_grad_enabled() else logits.detach()
