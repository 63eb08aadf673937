"""What early exit really saves, and what exits cost when nobody leaves, against the same backbone without exits.

    python benchmarks/early_exit.py

The denominator is this package's own fastest path without exits: `model.backbone.model` on pixels already in its memory
layout. Samples leave where a schedule says, spread evenly over the first exits to half of the Mul-Adds; pooling, head,
statistics and gate of every exit passed are computed all the same. Weights are random: nothing here depends on their
values. Alternating repetitions in one process; ratios are of medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import timm
import torch

from jeidnn_hf import JEIDNNConfig, JEIDNNForImageClassification, __version__

CASES: dict[str, dict[str, Any]] = {
    "resnet56, 27 exits": {"backbone": "resnet56_cifar"},
    "resnet56, 9 exits": {"backbone": "resnet56_cifar", "exit_stages": list(range(2, 27, 3))},
    "resnet56, 27 exits, 9 of them active": {
        "backbone": "resnet56_cifar", "recipe": "default", "active_exits": list(range(2, 27, 3)),
    },
    "resnet56, 27 exits, paper's recipe": {"backbone": "resnet56_cifar", "recipe": "paper"},
    "t2t_vit_7, 7 exits, 224 px": {"backbone": "t2t_vit_7"},
    "vit_tiny, 12 exits, 224 px": {"backbone": "vit_tiny_patch16_224"},
    "efficientnet_lite0, 16 exits, 96 px": {"backbone": "tf_efficientnet_lite0", "image_size": 96},
}


class Scheduled:
    """A model's exits, computed and overruled: sample i leaves at exit ``schedule[i]``."""

    def __init__(self, exits: Any, classes: int):
        self.exits, self.classes, self.remembers = exits, classes, exits.remembers
        self.schedule = torch.empty(0)

    def begin(self, batch_size, lam):
        return self.exits.begin(batch_size, lam), self.schedule

    def step(self, l, state, carry, lam, ask):
        own, schedule = carry
        answers, _, _, own = self.exits.step(l, state, own, lam, ask)
        leaves = schedule == l
        answers = torch.zeros(len(schedule), self.classes, device=schedule.device) if answers is None else answers
        return answers, leaves, int(leaves.count_nonzero()), (own, schedule)


def scheduled_model(config: dict[str, Any]) -> JEIDNNForImageClassification:
    torch.manual_seed(0)
    model = JEIDNNForImageClassification(JEIDNNConfig(num_labels=10, **config)).eval()
    exits_of, made = model.exits, {}

    def exits(batch_size: int) -> Scheduled:
        own = exits_of(batch_size)
        return made.setdefault(id(own), Scheduled(own, 10))

    model.exits = exits
    return model


def evenly_spread(model: JEIDNNForImageClassification, count: int) -> torch.Tensor:
    """``count`` exit numbers in mixed order, spread evenly over the first active exits, so many that the mean cost is
    nearest to a half."""
    active = torch.tensor(model.active_exits)
    costs = model.normalised_costs.cpu()[active]
    means = costs.cumsum(0) / torch.arange(1, len(costs) + 1)
    exits = int((means - 0.5).abs().argmin()) + 1
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    return active[(torch.arange(count) * exits // count)[order]]


def measure(model: JEIDNNForImageClassification, batch_size: int, repetitions: int) -> dict[str, Any]:
    """Milliseconds an image without exits, with all exits and nobody leaving, and leaving by the schedule."""
    exits, size = model.backbone.num_exits, model.config.image_size
    count = batch_size if batch_size > 1 else 2 * exits
    schedule = evenly_spread(model, count)
    images = torch.randn(count, 3, size, size, device=model.device)
    schedule = schedule.to(model.device)
    if model.backbone.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
    batches = list(zip(images.split(batch_size), schedule.split(batch_size), strict=True))
    taken = []
    synchronize = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None

    def early(schedule_of):
        for pixels, exits_of in batches:
            model.exits(len(pixels)).schedule = schedule_of(exits_of)
            taken.append(model(pixels).exit_index)

    runs = {
        "bare": lambda: [model.backbone.model(pixels) for pixels, _ in batches],
        "nobody leaves": lambda: early(lambda exits_of: torch.full_like(exits_of, exits - 1)),
        "early exit": lambda: early(lambda exits_of: exits_of),
    }
    seconds = defaultdict(list)
    with torch.inference_mode():
        for run in runs.values():
            run()
        del taken[:]
        runs["early exit"]()
        assert torch.equal(torch.cat(taken), schedule)
        for _ in range(repetitions):
            for name, run in runs.items():
                synchronize()
                started = time.perf_counter()
                run()
                synchronize()
                seconds[name].append(time.perf_counter() - started)
    cost = float(model.normalised_costs[schedule].mean())
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    time_share = medians["early exit"] / medians["bare"]
    ratios = sorted(a / b for a, b in zip(seconds["early exit"], seconds["bare"], strict=True))
    return {
        "ms_per_image": {name: 1e3 * value / count for name, value in medians.items()},
        "mul_adds": cost,
        "time": time_share,
        "time_spread": [ratios[0], ratios[-1]],
        "realised_saving": (1 - time_share) / (1 - cost),
        "realised_speed_up": cost / time_share,
        "exits_extra": medians["nobody leaves"] / medians["bare"] - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), help="words that a case's name has to start with")
    parser.add_argument("--batch-sizes", type=int, nargs="*", default=[1, 8, 64])
    parser.add_argument("--threads", type=int, nargs="*", default=[1, 2])
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    results = []
    for name in (name for name in CASES if name.startswith(tuple(options.cases))):
        model = scheduled_model(CASES[name]).to(options.device)
        for threads in options.threads:
            torch.set_num_threads(threads)
            for batch_size in options.batch_sizes:
                row = {"case": name, "device": options.device, "batch_size": batch_size, "threads": threads}
                row |= measure(model, batch_size, options.repetitions * (2 if batch_size == 1 else 1))
                results.append(row)
                print(
                    "{case:<36} batch {batch_size:>2}, {threads} threads: {mul_adds:.2f} of the Mul-Adds in {time:.2f} "
                    "of the time, {realised_saving:.2f} of the saving, {realised_speed_up:.2f} of the speed-up; "
                    "exits add {exits_extra:.1%} when nobody leaves".format(**row),
                    flush=True,
                )
    if options.output:
        about = {
            "denominator": "backbone.model(pixels), the same weights and memory layout, no exits",
            "versions": {"torch": torch.__version__, "timm": timm.__version__, "jeidnn_hf": __version__},
            "repetitions": options.repetitions,
        }
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({**about, "cases": results}, indent=1))


if __name__ == "__main__":
    main()
