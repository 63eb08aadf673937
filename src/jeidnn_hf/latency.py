"""What each exit costs in milliseconds on this device: the table that gates, policies and reports can go by instead of
Mul-Adds."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from .costs import ExitCosts
from .fused import FusedExits

if TYPE_CHECKING:
    from .modeling_jeidnn import JEIDNNForImageClassification


@torch.inference_mode()
def exit_latency(model: JEIDNNForImageClassification, *, batch_size: int = 1, repetitions: int = 20) -> ExitCosts:
    """Milliseconds an image up to each exit, backbone, pooling, head and gate timed one by one along one pass.

    Every piece is the one that early exit runs, at a batch of constant size; a fused exit is one piece, and stands with
    the heads. Medians over the repetitions; the table says where it was measured. ``model.set_costs`` puts it in use.

    Args:
        model: on the device and in the type to measure.
        batch_size: images at a time; small batches pay more for every operation.
        repetitions: passes, after two that are not counted.

    Raises:
        ValueError: a number below 1.
    """
    for name, number in (("batch_size", batch_size), ("repetitions", repetitions)):
        if type(number) is not int or number < 1:
            raise ValueError(f"Expected {name} of at least 1, but got {number!r}.")
    passes = [_timed_pass(model, batch_size) for _ in range(repetitions + 2)][2:]
    columns = {}
    for part in passes[0]:
        each = [statistics.median(times) for times in zip(*(timed[part] for timed in passes), strict=True)]
        columns[part] = tuple(accumulate(1e3 * seconds / batch_size for seconds in each))
    return ExitCosts(**columns, unit="ms", measured=_where(model, batch_size, repetitions))


def _timed_pass(model: JEIDNNForImageClassification, batch_size: int) -> dict[str, list[float]]:
    """Seconds of each part at each exit."""
    backbone, config, active = model.backbone, model.config, set(model.active_exits)
    exits = model.exits(batch_size)
    device, last = model.device, backbone.num_exits - 1
    shape = (batch_size, config.num_channels, config.image_size, config.image_size)
    pixels = torch.zeros(shape, dtype=backbone.model_dtype, device=device)
    seconds: dict[str, list[float]] = {"backbone": [], "pooling": [], "heads": [], "gates": []}

    def timed(part: str, work: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        result = work(*arguments)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds[part].append(time.perf_counter() - started)
        return result

    state, carry = timed("backbone", backbone.stem, pixels), exits.begin(batch_size, config.current_lam)
    stem = seconds["backbone"].pop()
    for l in range(last + 1):
        state = timed("backbone", backbone.stage, l, state)
        seconds["backbone"][-1] += stem if l == 0 else 0.0
        ask = l in active
        if ask or exits.remembers:
            if isinstance(exits, FusedExits):
                *_, carry = timed("heads", exits.step, l, state, carry, config.current_lam, ask)
            else:
                # the last exit's feature is the network's own answer
                feature = timed("backbone" if l == last else "pooling", exits.feature, l, state)
                if l == last:
                    seconds["backbone"][-2] += seconds["backbone"].pop()
                logits, head_carry = timed("heads", exits.heads.step, l, feature, carry[0], ask)
                policy_carry = carry[1]
                if ask and l < last:
                    _, policy_carry = timed("gates", exits.policy.step, l, logits, carry[1], config.current_lam)
                carry = head_carry, policy_carry
        for column in seconds.values():
            column += [0.0] * (l + 1 - len(column))
    return seconds


def _where(model: JEIDNNForImageClassification, batch_size: int, repetitions: int) -> dict[str, Any]:
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "device": f"{device.type}: {name}",
        "threads": torch.get_num_threads(),
        "batch_size": batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
        "repetitions": repetitions,
        "torch": torch.__version__,
    }
