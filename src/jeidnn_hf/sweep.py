"""A sweep: one config trained for many lambdas, seeds and learning rates at once, in a run folder like any other.

    RUN/sweep.pt      where an interrupted sweep goes on, once an epoch; removed at the end
    RUN/sweep.json    the frontier: accuracy and Mul-Adds of every member on ``validation``

Each member is what ``jeidnn train`` would train from ``RUN/config.yaml``, to rounding: `stacked` says how.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm.auto import tqdm
from transformers import set_seed

from .configuration_jeidnn import check_lam
from .files import write_text, written_whole
from .held_out import fit_held_out
from .im_training import IM_TRAININGS
from .modeling_jeidnn import JEIDNNForImageClassification
from .oracle import outcome
from .record import ExitRecord
from .run_config import DataSection, load_data
from .splits import Splits
from .stacked import Member, StackedTraining
from .training_args import JEIDNNTrainingArguments
from .training_runs import cached_features, fresh_model, plan_runs

STATE_NAME, REPORT_NAME = "sweep.pt", "sweep.json"

_UNSUPPORTED = {
    "early_stopping_patience": None, "load_best_model_at_end": False, "gradient_accumulation_steps": 1, "max_steps": -1,
    "max_grad_norm": 0.0, "fp16": False, "bf16": False, "torch_compile": False, "dataloader_drop_last": False,
    "push_to_hub": False,
}  # fmt: skip
"""Arguments of a single training that a sweep does not have, and what they must be."""


@dataclass
class SweepSection:
    """What is swept; members are the product.

    Args:
        lambdas: one training each; None: the model's lambda or range.
        seeds: of the initial weights, and of gates fitted on held-out answers.
        learning_rates: None: that of the training.
    """

    lambdas: list | None = None
    seeds: list = field(default_factory=lambda: [0])
    learning_rates: list | None = None


@dataclass
class SweepConfig:
    """The file of ``jeidnn sweep``; ``model``: arguments of ``from_backbone_pretrained``."""

    output_dir: str
    data: DataSection
    model: dict
    sweep: SweepSection
    training: JEIDNNTrainingArguments = field(default_factory=dict)


def swept(config: Mapping[str, Any]) -> dict[str, Member]:
    """The members of a sweep by name, such as ``paper-lam0.3-seed0``.

    Raises:
        ValueError: an empty list, a repetition, a lambda that is negative, infinite or a range, a seed that is no whole
            number, a learning rate that is not positive; learning rates beside one of the heads or gates alone.
    """
    section, training = SweepSection(**config["sweep"]), config.get("training", {})
    for what in ("lambdas", "seeds", "learning_rates"):
        values = getattr(section, what)
        if values is not None and (not values or len(set(map(str, values))) < len(values)):
            raise ValueError(f"Expected {what} to sweep over, none of them twice, but got {values}.")
    for lam in section.lambdas or ():
        if isinstance(check_lam(lam), list):
            raise ValueError(f"Expected lambdas that are numbers, but got {lam}; a sweep trains one model for each.")
    for seed in section.seeds:
        if type(seed) is not int or seed < 0:
            raise ValueError(f"Expected seeds that are whole numbers of 0 or more, but got {seed!r}.")
    for rate in section.learning_rates or ():
        if not isinstance(rate, Real) or isinstance(rate, bool) or not (math.isfinite(rate) and rate > 0):
            raise ValueError(f"Expected learning_rates that are positive, but got {rate!r}.")
    own = [name for name in ("head_learning_rate", "gate_learning_rate") if training.get(name) is not None]
    if section.learning_rates and own:
        raise ValueError(f"Expected learning_rates without {own[0]}, which they would not change; leave it out.")
    kind, members = config["model"].get("recipe", "default"), {}
    for rate, lam, seed in product(section.learning_rates or [None], section.lambdas or [None], section.seeds):
        name = kind if rate is None else f"{kind}-lr{_written(rate)}"
        name += f"-seed{seed}" if lam is None else f"-lam{_written(lam)}-seed{seed}"
        members[name] = Member(None if lam is None else float(lam), seed, rate)
    if len(members) < len(section.lambdas or [0]) * len(section.seeds) * len(section.learning_rates or [0]):
        raise ValueError(f"Expected values to sweep over, none of them twice, but got {config['sweep']}.")
    return members


def train_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The ``run_config.TrainConfig`` whose runs are the members; a ValueError as of `swept`."""
    members, runs = swept(config), {}
    data_seed = config.get("training", {}).get("data_seed")
    for name, member in members.items():
        model = {} if member.lam is None else {"lam": member.lam}
        training = {"seed": member.seed}
        training |= {} if member.learning_rate is None else {"learning_rate": member.learning_rate}
        runs[name] = {"model": model, "training": training}
    common = {"report_to": "none", "save_strategy": "no", **config.get("training", {})}
    common["data_seed"] = next(iter(members.values())).seed if data_seed is None else data_seed
    common.setdefault("recipe", config["model"].get("recipe", "default"))
    return {**{key: config[key] for key in ("output_dir", "data", "model")}, "training": common, "runs": runs}


def sweep(config: Mapping[str, Any], quiet: bool = False) -> list[dict[str, Any]]:
    """Trains all members that are not saved yet and saves each in ``output_dir/MEMBER``; then the frontier of all.

    An interrupted sweep goes on from its last epoch, to the bit.

    Args:
        config: as ``read_run_config`` gives it for a `SweepConfig`.
        quiet: print nothing.

    Returns:
        For each member ``{"run", "lam", "seed", "learning_rate", "accuracy", "mul_adds"}``: on validation, Mul-Adds as
        a share of the backbone's.

    Raises:
        ValueError: as of `swept`; an option or a way of training that a sweep does not have; the state of a sweep with
            other options; a loss that is not finite.
    """
    plan = train_config(config)
    members, folder = swept(config), Path(plan["output_dir"])
    _, models, trainings = plan_runs(plan, None, folder)
    members = {n: Member(m.lam, m.seed, trainings[n].learning_rate) for n, m in members.items()}
    args = max(trainings.values(), key=lambda own: own.learning_rate)
    _check_supported(args, models)
    missing = [name for name in members if not (folder / name / "model.safetensors").exists()]
    trained = _resumed_or_new(folder, plan, members, missing)
    sources, splits = load_data(plan["data"])
    write_text(folder / "config.yaml", yaml.safe_dump(plan, sort_keys=False))
    splits.save(folder / "splits.json")
    by_seed = {}
    for name, member in members.items():
        if member.seed not in by_seed:
            set_seed(member.seed)
            by_seed[member.seed] = fresh_model(models[name], sources)
    train, validation = cached_features(next(iter(by_seed.values())), sources, splits, plan["data"], folder)
    if missing:
        training = StackedTraining(by_seed, [members[name] for name in trained], args, train, validation)
        _train(training, folder, plan, trained, quiet)
        for s, name in enumerate(trained):
            if name in missing:
                model = training.load_member(s)
                if args.gates_on == "validation":
                    fit_held_out(model, validation, trainings[name])
                model.eval().save_pretrained(folder / name)
        (folder / STATE_NAME).unlink(missing_ok=True)
    rows = [_frontier_row(folder, name, members[name], validation, splits) for name in members]
    write_text(folder / REPORT_NAME, json.dumps(rows, indent=1))
    return rows


def to_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The frontier as Markdown, in per cent, dearest first."""
    lines = ["| member | lambda | accuracy | Mul-Adds |", "|---|---|---|---|"]
    for row in sorted(rows, key=lambda row: -row["mul_adds"]):
        lam = "-".join(f"{value:g}" for value in (row["lam"] if isinstance(row["lam"], list) else [row["lam"]]))
        lines.append(f"| {row['run']} | {lam} | {100 * row['accuracy']:.2f} | {100 * row['mul_adds']:.1f} |")
    return "\n".join(lines)


def _train(training: StackedTraining, folder: Path, plan: Mapping[str, Any], names: list[str], quiet: bool) -> None:
    path = folder / STATE_NAME
    if path.exists():
        training.load_state_dict(torch.load(path, map_location="cpu", weights_only=True)["training"])
    started, first = time.perf_counter(), training.step
    with tqdm(total=training.num_steps, initial=first, desc=f"{len(names)} members", disable=quiet) as bar:
        while training.step < training.num_steps:
            before = training.step
            for _ in training.run_epoch():
                bar.update()
            losses = training.drain_losses(training.step - before)
            if not all(map(math.isfinite, losses)):
                raise ValueError(
                    f"Expected finite losses, but got {losses} by step {training.step}; check the features for NaN "
                    "and the learning rate."
                )
            with written_whole(folder) as temporary:
                torch.save({"plan": _identity(plan), "names": names, "training": training.state_dict()},
                           temporary / STATE_NAME)  # fmt: skip
            if not quiet:
                epoch, seconds = math.ceil(training.step / training.steps_per_epoch), time.perf_counter() - started
                bar.write(
                    f"epoch {epoch}: mean loss {min(losses):.4f} to {max(losses):.4f} of {len(losses)} trained, "
                    f"{1e3 * seconds / (training.step - first):.2f} ms a step"
                )


def _resumed_or_new(folder: Path, plan: Mapping[str, Any], members: Mapping, missing: list[str]) -> list[str]:
    """The members to train: those of an interrupted sweep, else those that are missing."""
    path = folder / STATE_NAME
    if not path.exists():
        return missing
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        known, names = state["plan"], state["names"]
    except Exception as error:
        raise ValueError(
            f"Expected the state of a sweep in {str(path)!r}, but it cannot be read: {error}; remove it to start anew."
        ) from error
    if known != _identity(plan) or not set(missing) <= set(names) <= set(members):
        raise ValueError(
            f"Expected the interrupted sweep in {str(folder)!r} to go on with the same members and options, but got "
            f"others; give it those, or remove {STATE_NAME} to start anew."
        )
    return names


def _identity(plan: Mapping[str, Any]) -> str:
    """What a sweep must have in common with the one that it goes on from: all but its members and its place."""
    return json.dumps({name: plan[name] for name in ("data", "model", "training")}, sort_keys=True, default=str)


def _check_supported(args: JEIDNNTrainingArguments, models: Mapping[str, Mapping[str, Any]]) -> None:
    for name, wanted in _UNSUPPORTED.items():
        if getattr(args, name) != wanted:
            raise ValueError(
                f"Expected {name}={wanted!r} in a sweep, but got {getattr(args, name)!r}; leave it out, or train the "
                "members one by one with `jeidnn train`."
            )
    if args.world_size > 1 or args.n_gpu > 1:
        raise ValueError("Expected one process and one device for a sweep, but got more; start it without torchrun.")
    if args.im_training == "l2w_den":
        raise ValueError(
            "Expected an im_training whose members can be stacked, but got 'l2w_den', which has a network of its own "
            "for each; train the members one by one with `jeidnn train`."
        )
    lam = next(iter(models.values())).get("lam")
    if IM_TRAININGS[args.im_training].trains_gates and isinstance(lam, Sequence):
        raise ValueError(
            f"Expected lambdas to sweep over with im_training={args.im_training!r}, but got the range {list(lam)}, of "
            "which every sample would draw its own; list them under sweep.lambdas."
        )


def _frontier_row(folder: Path, name: str, member: Member, validation, splits: Splits) -> dict[str, Any]:
    model = JEIDNNForImageClassification.from_pretrained(folder / name)
    record = ExitRecord.of(model, validation, splits.info("validation"))
    with torch.inference_mode():
        found = outcome(record, record.exits_taken(model.policy, model.config.current_lam))
    return {
        "run": name, "lam": model.config.lam, "seed": member.seed, "learning_rate": member.learning_rate,
        "accuracy": found.accuracy, "mul_adds": found.normalised_mul_adds,
    }  # fmt: skip


def _written(number: float) -> str:
    """Without an exponent, whose sign would end a part of a name."""
    return np.format_float_positional(float(number), trim="-")
