"""L2W-DEN (Han, Pu, Lai, Wang, Song, Cao, Huang, Deng, Huang, "Learning to Weight Samples for Dynamic Early-exiting
Networks", ECCV 2022): a small network phi weighs the cross-entropies of each sample at each exit, and learns to do so
from what the exits get right of the samples that would leave there.

With CE the cross-entropies ``(n, L)`` of a batch under the IMs' parameters theta::

    u = phi(CE),    w = 1 + epsilon (u - mean u),    L_train = sum_l mean_i w_il CE_il

Each half S of a batch, in turn, is used for a virtual step, and the other half, S', to judge it:

1. theta'(phi) = theta - eta grad_theta L_train(S, phi), plain gradient descent at the current learning rate eta;
2. with theta', exit 1 takes the q_1 |S'| samples of S' that it is surest of, exit 2 the surest of the rest, and so on,
   ``q_l ~ p^l``; L_meta is the sum over exits of the mean cross-entropy of what they took;
3. phi moves by Adam along dL_meta / dphi.

Then theta moves, once for both halves and by the trainer's optimizer, along L_train with the weights of the new phi.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.adam import adam

from ..gates import Lambda
from ..objectives import task_cost
from .base import Phase
from .plain import Plain

CENTERS = ("col", "mat")
HIDDEN = 500
ADAM = {"lr": 1e-4, "weight_decay": 1e-4, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8}


class L2WDEN(Plain):
    """``l2w_epsilon``; ``l2w_center``, whether weights average 1 over the exits of each sample (``"col"``) or over all
    of a batch (``"mat"``); ``l2w_interval``, batches from one meta step to the next; ``l2w_ratio``, p. Defaults are the
    original's for CIFAR; for ImageNet it has 0.3, ``"mat"``, 100, 0.75. An epsilon over 0.5 allows negative weights.

    Where this differs from the original:

    - The virtual step is gradient descent; the original's optimizer was that, with momentum, and ours is Adam.
    - dL_meta / dphi is a multiple of eta, and is taken per unit of it: Adam does not mind the scale, but phi's weight
      decay does, beside which the gradient would vanish at the learning rates of Adam. The original's eta was 0.8.
    - phi's learning rate is constant.
    - theta moves once, not after each half. All L exits take samples, but the backbone's own classifier has no weights.
    - The sum over exits is `Plain`'s, the original's if ``warmup_weighting="uniform"``; this is `Plain` at epsilon = 0.

    Every process learns the same phi, from the mean of their meta gradients.
    """

    def __init__(self, *args):
        super().__init__(*args)
        self.num_trained = self.num_exits - self.native_head
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.args.seed)
            self.weight_net = nn.Sequential(
                nn.Linear(self.num_trained, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, self.num_trained), nn.Tanh()
            )
        sizes = [p.numel() for p in self.weight_net.parameters()]
        self.register_buffer("first_moment", torch.zeros(sum(sizes)))
        self.register_buffer("second_moment", torch.zeros(sum(sizes)))
        self.register_buffer("steps", torch.zeros(len(sizes)))
        self.register_buffer("batches", torch.zeros((), dtype=torch.long))

    def loss(self, model, features: Sequence[Tensor], labels: Tensor, phase: Phase, lam: Lambda) -> Tensor:
        """A batch of one has no halves: it has no meta step."""
        half = len(labels) // 2
        if half and int(self.batches) % self.args.l2w_interval == 0:
            members = Members(model.heads)
            halves = [([z[rows] for z in features], labels[rows]) for rows in (slice(half), slice(half, None))]
            for virtual, meta in (halves, halves[::-1]):
                self.step_weights(self.meta_gradient(members, *virtual, *meta))
        self.batches += 1
        task = task_cost(model.heads.members(features), labels)
        return self.weighted(self.weights(task).detach() * task)

    def weights(self, task: Tensor) -> Tensor:
        """Cross-entropies ``(B, L)`` to weights ``(B, L)``, differentiable in phi alone; 1 where no IM is trained."""
        u = self.weight_net(task[:, : self.num_trained].detach().to(self.first_moment))
        mean = u.mean(1, keepdim=True) if self.args.l2w_center == "col" else u.mean()
        weights = 1 + self.args.l2w_epsilon * (u - mean)
        return F.pad(weights, (0, self.num_exits - self.num_trained), value=1.0)

    def meta_gradient(
        self,
        members: Members,
        features: Sequence[Tensor],
        labels: Tensor,
        meta_features: Sequence[Tensor],
        meta_labels: Tensor,
    ) -> tuple[Tensor, ...]:
        """dL_meta / dphi per unit of the learning rate, for each of phi's parameters; exact where IMs detach nothing.

        Args:
            features: of S.
            labels: of S.
            meta_features: of S'.
            meta_labels: of S'.
        """
        task = task_cost(members(features), labels)
        theta, phi = members.trained, list(self.weight_net.parameters())
        gradient = torch.autograd.grad(self.weighted(self.weights(task) * task), theta.values(), create_graph=True)
        moved = {
            name: (p.detach() - self.learning_rate * g.detach()).requires_grad_()
            for (name, p), g in zip(theta.items(), gradient, strict=True)
        }
        logits = functional_call(members, moved, (meta_features,), tie_weights=False)
        shares = greedy_shares(logits.detach().softmax(-1).amax(-1), self.args.l2w_ratio)
        direction = torch.autograd.grad((task_cost(logits, meta_labels) * shares).sum(), moved.values())
        return torch.autograd.grad(gradient, phi, grad_outputs=[-d for d in direction])

    @torch.no_grad()
    def step_weights(self, gradient: Sequence[Tensor]) -> None:
        """One step of phi by Adam, whose state is in buffers and so in checkpoints."""
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            for g in gradient:
                torch.distributed.all_reduce(g)
                g /= torch.distributed.get_world_size()
        parameters = list(self.weight_net.parameters())
        first, second = (
            [m.view_as(p) for m, p in zip(moment.split([p.numel() for p in parameters]), parameters, strict=True)]
            for moment in (self.first_moment, self.second_moment)
        )
        adam(
            parameters, list(gradient), first, second, [], list(self.steps), fused=True, amsgrad=False, maximize=False,
            **ADAM,
        )  # fmt: skip


def greedy_shares(confidence: Tensor, ratio: float) -> Tensor:
    """Which samples each exit takes, as the weights of a mean over them: ``(n, L)`` to ``(n, L)``.

    Exit 1 takes the floor(n q_1) samples of highest confidence, exit 2 floor(n q_2) of the rest, ...; the last all that
    are left. ``q_l = ratio^l / sum_j ratio^j``. The columns sum to 1, or to 0 for an exit that takes none.
    """
    n, exits = confidence.shape
    powers = [ratio**l for l in range(1, exits + 1)]
    left, shares = confidence.clone(), torch.zeros_like(confidence)
    for l, power in enumerate(powers[:-1]):
        if quota := math.floor(n * power / sum(powers)):
            taken = left[:, l].topk(quota).indices
            left[taken] = -1
            shares[taken, l] = 1 / quota
    rest = left[:, -1] >= 0
    shares[:, -1] = rest / rest.sum().clamp_min(1)
    return shares


class Members(nn.Module):
    """The IMs' own logits as a module's forward; ``trained`` are their parameters, by name."""

    def __init__(self, heads: nn.Module):
        super().__init__()
        self.heads = heads
        trained = {id(p) for p in heads.member_parameters()}
        self.trained = {name: p for name, p in self.named_parameters() if id(p) in trained}

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        return self.heads.members(features)
