"""`JEIDNNForImageClassification`: a frozen backbone, inference modules, gates, and the loop that really exits early."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput, logging

from .backbones import pretrained_cfg, staged_backbone
from .calibrated import CalibratedMixin
from .configuration_jeidnn import JEIDNNConfig
from .costs import MUL_ADDS, ExitCosts, exit_costs
from .early_exit import Exits, PreparedExits, early_exit
from .exits import STATISTICS
from .fused import FusedExits
from .gates import ExitPolicy, build_gates
from .heads import ExitHeads, boosting_of
from .latency import exit_latency
from .objectives import PROBLEM_COSTS, expected_cost, task_cost, total_cost
from .policies import POLICIES, LearnedGates, check_active_exits, policy_class
from .preprocessing import Preprocessing
from .stored import StoredModel


@dataclass
class JEIDNNOutput(ModelOutput):
    """What `JEIDNNForImageClassification` answers, rows in input order.

    Args:
        loss: a scalar, the expected cost of Eq. 6, when labels are given: with cross-entropy, unless `problem_type`
            says otherwise.
        logits: `(B, K)`, of the exit taken.
        exit_index: `(B,)`, the exit taken, 0..L-1.
        all_logits: `(B, L, K)`, of every exit, when every exit was evaluated; likewise the next two.
        gate_values: `(B, L-1)`, g^l.
        exit_distribution: `(B, L)`, P(G=l).
        mul_adds: `(B,)`, what the sample cost, in Mul-Adds.
        hidden_states: on request and from pixels, the L + 1 states before the first exit and at every exit.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    exit_index: Tensor | None = None
    all_logits: Tensor | None = None
    gate_values: Tensor | None = None
    exit_distribution: Tensor | None = None
    mul_adds: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None


logger = logging.get_logger(__name__)

_NOT_NUMBERS = "Expected {} without NaN or infinity, but got some; check the preprocessing or the data."


class JEIDNNForImageClassification(CalibratedMixin, StoredModel):
    """A frozen timm backbone with an inference module and a gate at every exit.

    Without labels the network stops for each image at the first exit whose gate is open. With labels, or with
    `output_all_exits=True`, every exit is evaluated. The choice of exit is the same.

    Buffers: exit_mul_adds, what each exit costs in Mul-Adds, and normalised_costs, IC^l of the table in use, as a share
    of the backbone's; both ``(L,)``.
    """

    base_model_prefix = "jeidnn"
    main_input_name = "pixel_values"
    accepts_loss_kwargs = False

    def __init__(self, config: JEIDNNConfig):
        config.check()
        super().__init__(config)
        if config.image_size is None:
            config.image_size = pretrained_cfg(config.backbone)["input_size"][-1]
        config.preprocessing = resolve_preprocessing(config)
        with torch.device("cpu"):
            self.backbone = staged_backbone(
                self._build_backbone(weights=None),
                image_size=config.image_size,
                num_channels=config.num_channels,
                exit_stages=config.exit_stages,
                exit_pooling=config.exit_pooling,
                native_head=config.native_head,
            )
        config.exit_stages = list(self.backbone.exit_stages)
        config.exit_pooling = [list(names) for names in self.backbone.exit_pooling]
        num_exits = self.backbone.num_exits
        if config.boosting == "auto":
            config.boosting = boosting_of(num_exits)
        self.heads = ExitHeads(
            self.backbone.exit_dims,
            config.num_labels,
            kind=config.exit_head,
            head_dim=config.head_dim,
            native_head=config.native_head,
            ensemble=config.ensemble,
            standardize=config.standardize_features,
            cascade=config.cascade,
            boosting=config.boosting,
        )
        self.policy = build_policy(config, num_exits)
        self._prepared: PreparedExits | None = None
        self._count_costs()
        for module in self.backbone.modules():
            module._is_hf_initialized = True  # timm initialised it; transformers must not
        self._choose_what_is_stored()
        self.post_init()

    @property
    def costs(self) -> ExitCosts:
        """The cost table in use: cumulative Mul-Adds per exit, or milliseconds where `set_costs` put them in."""
        return ExitCosts.from_dict(self.config.latency or self.config.mul_adds)

    def exit_costs(self, kind: str = "mul_adds", **options: Any) -> ExitCosts:
        """A table of what each exit costs: ``"mul_adds"``, counted, or ``"latency"``, milliseconds measured here and
        now, with options of `latency.exit_latency`."""
        if kind not in ("mul_adds", "latency"):
            raise ValueError(f"Expected kind to be 'mul_adds' or 'latency', but got {kind!r}.")
        return exit_latency(self, **options) if kind == "latency" else ExitCosts.from_dict(self.config.mul_adds)

    def set_costs(self, costs: ExitCosts | None) -> None:
        """What computation costs from now on, for training, policies and reports: a measured table, or None for
        Mul-Adds. It is saved with the model; gates fitted to other costs have to be fitted anew.

        Raises:
            ValueError: a table of another number of exits.
        """
        if costs is not None and len(costs.total) != self.backbone.num_exits:
            raise ValueError(f"Expected costs of {self.backbone.num_exits} exits, but got {len(costs.total)}.")
        self.config.latency = None if costs is None or costs.unit == MUL_ADDS else costs.to_dict()
        self.operating_point = None
        self._count_costs()

    def set_lambda(self, lam: float) -> None:
        """The lambda in use from now on; within the trained range, else a ValueError. It is saved with the model."""
        self.config.current_lam = self.config.check_lam_in_range(lam)

    @property
    def active_exits(self) -> tuple[int, ...]:
        """The exits, from 0, at which a sample can leave; the last one always."""
        given = self.config.active_exits
        return tuple(range(self.backbone.num_exits)) if given is None else tuple(given)

    def set_active_exits(self, exits: Sequence[int] | None) -> None:
        """Lets samples leave at these exits only (rising, the last one included; None: at all). It is saved with the
        model. At the others the gates count as shut, nobody is asked, and nothing is computed that no later exit reads.

        Raises:
            ValueError: other exits than the model's, or a policy other than gates.
        """
        if not isinstance(self.policy, LearnedGates):
            raise ValueError(f"Expected policy='gates' to choose active exits, but got {self.config.policy!r}.")
        active = None if exits is None else check_active_exits(exits, self.backbone.num_exits)
        self.policy.active = self.config.active_exits = active
        self._prepared = self.operating_point = None
        self._forget_latency()
        self._count_costs()

    def set_policy(self, policy: ExitPolicy) -> None:
        """Puts a fitted policy in the place of the present one; it is saved with the model.

        The cost table counts its Mul-Adds. An operating point, which was fitted to the choices of the policy before, is
        dropped. `LearnedGates` bring their lambda with them.

        Raises:
            ValueError: a policy of another number of exits or of a kind that is not in `policies.POLICIES`; gates that
                were fitted to no lambda.
        """
        policy.check_exits(self.backbone.num_exits)
        names = [name for name, kind in POLICIES.items() if type(policy) is kind]
        if not names:
            raise ValueError(f"Expected a policy of {tuple(POLICIES)}, but got {type(policy).__name__}.")
        config = self.config
        if isinstance(policy, LearnedGates):
            low, high = policy.lam_range
            config.lam, config.current_lam = [low, high] if low < high else low, policy.lam
            config.gate, config.gate_form = policy.gates.kind, policy.form
            read = policy.gates.statistics
            config.gate_statistics = None if read == STATISTICS else list(read)
            config.exit_rule, config.exit_threshold = policy.rule, policy.threshold
        config.policy, config.policy_options = names[0], policy.options or None
        config.active_exits = getattr(policy, "active", None)
        config.check()
        self.policy = policy.to(self.device)
        self.operating_point = None
        self._forget_latency()
        self._count_costs()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of the exits; the frozen backbone, with its hundreds of tensors, never has any."""
        self.heads.zero_grad(set_to_none)
        self.policy.zero_grad(set_to_none)

    def forward(
        self,
        pixel_values: Tensor | None = None,
        exit_features: Tensor | Sequence[Tensor] | None = None,
        labels: Tensor | None = None,
        lam: float | Tensor | None = None,
        output_all_exits: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        objective: Callable[..., Tensor] | None = None,
    ) -> JEIDNNOutput | tuple | Tensor:
        """Classifies images, each at the exit that its gates choose.

        Args:
            pixel_values: ``(B, C, S, S)``, normalised as the backbone expects.
            exit_features: instead of pixels, the features of every exit, ``(B, d_l)`` each or side by side in one
                ``(B, sum_l d_l)``, as they come from a feature cache.
            labels: ``(B,)`` in 0..K-1; evaluates every exit and gives the loss. For several labels or a regression,
                numbers ``(B, K)``, in [0, 1] for the former.
            lam: lambda for this call, a number or ``(B,)``, within the trained range; default ``config.current_lam``.
            output_all_exits: evaluate every exit although the exit taken is earlier.
            output_hidden_states: likewise, and give the states on the way; default ``config.output_hidden_states``.
            return_dict: False for a plain tuple; default ``config.return_dict``.
            objective: for trainers: answer with ``objective(self, features, labels)`` instead, a loss computed inside
                forward, where data parallel wrappers see it. Inputs are not checked.

        Raises:
            ValueError: both or neither input, wrong shapes, NaN, labels or lambda out of range.
        """
        if (pixel_values is None) == (exit_features is None):
            raise ValueError("Expected either pixel_values or exit_features, but got both or neither.")
        if isinstance(exit_features, Tensor):
            exit_features = self.split_features(exit_features)
        if objective is not None:
            return objective(self, self.backbone(pixel_values) if exit_features is None else exit_features, labels)
        if exit_features is not None:
            self._check_features(exit_features)
        inputs = [pixel_values] if exit_features is None else list(exit_features)
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        early = exit_features is None and labels is None and not output_all_exits and not output_hidden_states
        for tensor in inputs:
            _check_numbers("pixel_values" if exit_features is None else "exit_features", tensor, and_finite=not early)
        batch = inputs[0].shape[:1].numel()
        lam = self._check_lam(lam, batch, inputs[0].device)
        if labels is not None:
            labels = self._check_labels(labels, batch)
        if early:
            exits = self.exits(batch)
            logits, exit_index, finite = early_exit(self.backbone, exits, set(self.active_exits), pixel_values, lam)
            if not finite:
                raise ValueError(_NOT_NUMBERS.format("pixel_values"))
            output = JEIDNNOutput(logits=logits, exit_index=exit_index, mul_adds=self.exit_mul_adds[exit_index])
        elif exit_features is not None:
            output = self._all_exits(inputs, labels, lam)
        elif output_hidden_states:
            states = list(self.backbone.states(pixel_values))
            output = self._all_exits(self.backbone.features(states), labels, lam)
            output["hidden_states"] = tuple(map(self.backbone.hidden_state, states))
        else:
            output = self._all_exits(self.backbone(pixel_values), labels, lam)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        return output if return_dict else output.to_tuple()

    def _all_exits(self, features: Sequence[Tensor], labels: Tensor | None, lam: float | Tensor) -> JEIDNNOutput:
        logits = self.heads(features)
        exit_index, distribution, gate_values = self.policy(logits, lam)
        loss = None
        if labels is not None:
            task = task_cost(logits, labels, PROBLEM_COSTS[self.config.problem_type])
            loss = expected_cost(total_cost(task, self.normalised_costs, lam), distribution)
            _check_numbers("the loss", loss)
        return JEIDNNOutput(
            loss=loss,
            logits=logits[torch.arange(len(logits), device=logits.device), exit_index],
            exit_index=exit_index,
            all_logits=logits,
            gate_values=gate_values,
            exit_distribution=distribution,
            mul_adds=self.exit_mul_adds[exit_index],
        )

    def exits(self, batch_size: int) -> Exits | FusedExits:
        """What computes the exits in early exit: folded or fused where no gradient is asked for; anew when a weight has
        changed."""
        if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
            return Exits(self.backbone.exit_feature, self.heads, self.policy)
        if self._prepared is None or not self._prepared.are_of(self.heads, self.policy):
            self._prepared = PreparedExits(self.backbone, self.heads, self.policy)
        return self._prepared(batch_size)

    def _forget_latency(self) -> None:
        if self.config.latency is not None:
            logger.warning("Milliseconds measured with other exits or another policy are dropped: costs are Mul-Adds.")
            self.config.latency = None

    def _count_costs(self) -> None:
        """Fills in the cost table, in the config and in the buffers."""
        known, exits = self.config.mul_adds and self.config.mul_adds["backbone"], self.backbone.num_exits
        if known and len(known) != exits:
            raise ValueError(f"Expected mul_adds of {exits} exits, but got {len(known)}.")
        device = self.exit_mul_adds.device if hasattr(self, "exit_mul_adds") else torch.device("cpu")
        with torch.device("cpu"):
            costs = exit_costs(self.backbone, self.heads, self.policy, self.config.num_labels, known, self.active_exits)
        self.config.mul_adds = costs.to_dict()
        for name, value in self._cost_buffers().items():
            self.register_buffer(name, value.to(device), persistent=False)

    def _cost_buffers(self) -> dict[str, Tensor]:
        with torch.device("cpu"):
            return {
                "exit_mul_adds": torch.tensor(self.exit_costs().total),
                "normalised_costs": torch.tensor(self.costs.normalised, dtype=torch.float32),
            }

    def _init_weights(self, module: nn.Module) -> None:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
        if module is self:
            for name, value in self._cost_buffers().items():
                getattr(self, name).copy_(value)

    def _check_lam(self, lam: float | Tensor | None, batch: int, device: torch.device) -> float | Tensor:
        if lam is None:
            return self.config.current_lam
        if not isinstance(lam, Tensor):
            return self.config.check_lam_in_range(lam)
        if lam.dim() > 1 or lam.numel() not in (1, batch):
            raise ValueError(f"Expected lam to be a number or of shape ({batch},), but got {tuple(lam.shape)}.")
        for end in (lam.min(), lam.max()):
            self.config.check_lam_in_range(float(end))
        return lam.to(device).expand(batch)

    def _check_labels(self, labels: Tensor, batch: int) -> Tensor:
        config, is_tensor = self.config, isinstance(labels, Tensor)
        kind, shape = ("integer", (batch,)) if config.has_classes else ("floating-point", (batch, config.num_labels))
        if is_tensor and shape == (batch, 1) and labels.dim() == 1:
            labels = labels[:, None]
        if not is_tensor or labels.shape != shape or labels.is_floating_point() == config.has_classes:
            got = f"{labels.dtype} {tuple(labels.shape)}" if is_tensor else type(labels).__name__
            raise ValueError(f"Expected {kind} labels of shape {shape}, but got {got}.")
        if config.problem_type == "regression":
            return labels
        highest = config.num_labels - 1 if config.has_classes else 1
        wrong = labels[(labels < 0) | (labels > highest)]
        if len(wrong):
            raise ValueError(f"Expected labels in 0..{highest}, but got {wrong[0].item()}.")
        return labels.long() if config.has_classes else labels

    def split_features(self, features: Tensor) -> tuple[Tensor, ...]:
        """Features side by side, ``(B, sum_l d_l)``, to one ``(B, d_l)`` per exit."""
        if features.dim() != 2 or features.shape[1] != sum(self.backbone.exit_dims):
            expected = f"(batch, {sum(self.backbone.exit_dims)})"
            raise ValueError(f"Expected exit_features of shape {expected}, but got {tuple(features.shape)}.")
        return features.split(self.backbone.exit_dims, dim=1)

    def _check_features(self, features: Sequence[Tensor]) -> None:
        if not all(isinstance(z, Tensor) for z in features):
            raise ValueError(f"Expected exit_features as tensors, but got {[type(z).__name__ for z in features]}.")
        shapes = [tuple(z.shape) for z in features]
        expected = [(shapes[0][0] if shapes else "batch", d) for d in self.backbone.exit_dims]
        if shapes != expected:
            raise ValueError(f"Expected exit_features of shapes {expected}, but got {shapes}.")


def build_policy(config: JEIDNNConfig, num_exits: int) -> ExitPolicy:
    """The policy that a config names, not fitted yet."""
    if config.policy == "gates":
        gates = build_gates(
            config.gate, num_exits - 1, config.num_labels, config.lam_range, config.gate_statistics
        )
        form, rule, threshold = config.gate_form, config.exit_rule, config.exit_threshold
        return LearnedGates(gates, num_exits, form, rule, threshold, active=config.active_exits)
    kind, options = policy_class(config.policy), config.policy_options or {}
    try:
        return kind.blank(num_exits, config.num_labels, **options)
    except TypeError as error:
        raise ValueError(f"Expected policy_options of {config.policy!r}, but got {options}: {error}.") from error


def resolve_preprocessing(config: JEIDNNConfig) -> dict[str, Any] | None:
    """Every field; None where nothing was said and timm's description of the backbone is of other pictures."""
    try:
        return Preprocessing.of_config(config).to_dict()
    except ValueError:
        if config.preprocessing is None:
            return None
        raise


def _check_numbers(name: str, tensor: Tensor, and_finite: bool = True) -> None:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise ValueError(f"Expected {name} of floating-point numbers, but got {got}.")
    if and_finite and not torch.isfinite(tensor).all():
        raise ValueError(_NOT_NUMBERS.format(name))
