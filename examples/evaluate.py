"""Evaluates every model that ``train.py`` saved in a folder, on the test role: table, figure, JSON.

    python examples/evaluate.py runs/cifar10_resnet56

Each model is loaded with ``from_pretrained``. A checkpoint for a range of lambdas is asked at ten of them. For every
kind of exits, one calibrated max-probability threshold over the same heads is fitted on the validation role.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import yaml

from jeidnn_hf import EvaluationReport, ExitRecord, JEIDNNForImageClassification, evaluate
from jeidnn_hf.data import ImageView, Preprocessing
from jeidnn_hf.feature_cache import cached_role
from jeidnn_hf.metrics import accuracy_at_cost
from jeidnn_hf.plots import plot_frontier
from jeidnn_hf.policies import ConfidenceThreshold
from jeidnn_hf.sources import load_source, source_options
from jeidnn_hf.splits import Splits

BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output_dir of train.py")
    parser.add_argument("--num_lambdas", type=int, default=10)
    parser.add_argument("--speed_images", type=int, default=1024, help="images to time; 0: none")
    options = parser.parse_args()
    run_config = yaml.safe_load((options.folder / "config.yaml").read_text())
    data = run_config["data"]
    sources = load_source(data["dataset"], **source_options(data))
    splits = Splits.load(options.folder / "splits.json")
    names = sorted(path.parent.name for path in options.folder.glob("*/model.safetensors"))
    if not names:
        raise SystemExit(f"Expected saved models in {options.folder}, but found none; run train.py first.")

    methods: dict[str, list[list[EvaluationReport]]] = defaultdict(list)
    results, native = [], None
    for name in names:
        model = JEIDNNForImageClassification.from_pretrained(options.folder / name)
        choice = {**run_config["model"], **run_config["runs"].get(name, {}).get("model", {})}
        preprocessing = Preprocessing.of_backbone(
            model.config.backbone, model.config.image_size, model.config.num_channels, choice.get("preprocessing")
        )
        cache = Path(data.get("cache_dir") or options.folder / "cache")
        records = {}
        for role in ("validation", "test"):
            dtype = torch.float16 if role == "validation" else torch.float32
            features = cached_role(model.backbone, sources, splits, role, preprocessing, cache, dtype=dtype)
            records[role] = ExitRecord.of(model, features, splits.info(role))
            if role == "test":
                last = features.views[0].features[:, -model.backbone.exit_dims[-1] :]
                native = float((last.argmax(1) == records[role].labels).float().mean())
        test, config = records["test"], model.config
        if config.has_lam_range:
            lams, dense = (np.geomspace(*config.lam, n).tolist() for n in (options.num_lambdas, 61))
        else:
            lams = dense = [config.lam]
        reports = [evaluate(test, model.policy, lam) for lam in lams]
        kind = re.sub(r"-(lam|seed).*", "", name)
        gated = [evaluate(test, model.policy, lam) for lam in dense]
        if config.has_lam_range or kind not in methods:
            methods[kind].append(gated)
        else:
            methods[kind][0] += gated
        costs = test.normalised_costs
        budgets = np.linspace(float(costs[0]) + 0.02, float(costs[-1]), 40)
        threshold = [evaluate(test, ConfidenceThreshold.fit(records["validation"], budget=float(b))) for b in budgets]
        methods[f"{kind} heads, threshold"].append(threshold)
        print(f"\n{name}: {model.backbone.num_exits} exits")
        print(f"  {'lambda':>8} {'accuracy':>9} {'Mul-Adds':>9} {'ECE':>7}   share of samples (%) by exit")
        for report in reports:
            shares = " ".join(f"{100 * s:.0f}" for s in report.share_by_exit)
            print(
                f"  {report.lam:>8.4g} {100 * report.accuracy:>8.2f}% {report.normalised_mul_adds:>9.3f} "
                f"{100 * report.ece:>6.2f}%   {shares}"
            )
        result = {"name": name, "reports": [asdict(report) for report in reports]}
        if options.speed_images:
            half = min(reports, key=lambda report: abs(report.normalised_mul_adds - 0.5))
            source, rows = splits.roles["test"]
            images = ImageView(sources[source], rows[: options.speed_images], preprocessing)
            result["speed"] = speed(model, images, half.lam)
            print(
                "  lambda {lam:.4g}: {early:.0f} images/s with early exit, {full:.0f} without; {mul_adds:.3f} of the "
                "Mul-Adds; same exits and classes: {agree:.4f}".format(**result["speed"])
            )
        results.append(result)

    print("\ntest accuracy (%) at a share of the backbone's Mul-Adds, by interpolation")
    print(f"frozen backbone: {100 * native:.2f} at 1.0")
    print(f"{'method':<28}" + "".join(f"{b:>8.1f}" for b in BUDGETS))
    table = {}
    for method, runs in sorted(methods.items()):
        curves = [[torch.tensor(values) for values in zip(*map(_point, run), strict=True)] for run in runs]
        table[method] = [float(np.mean([accuracy_at_cost(*curve, b) for curve in curves])) for b in BUDGETS]
        print(f"{method:<28}" + "".join("       -" if np.isnan(a) else f"{100 * a:>8.2f}" for a in table[method]))
    plot_frontier(
        {method: runs[0] for method, runs in sorted(methods.items())},
        options.folder / "frontier.png",
        backbone_accuracy=native,
        title=f"{data['dataset']}, test role",
    )
    summary = {"backbone_accuracy": native, "budgets": BUDGETS, "accuracy_at_budget": table, "runs": results}
    (options.folder / "evaluation.json").write_text(json.dumps(summary, indent=1))
    print(f"written: {options.folder / 'evaluation.json'}, {options.folder / 'frontier.png'}")


def _point(report: EvaluationReport) -> tuple[float, float]:
    return report.normalised_mul_adds, report.accuracy


@torch.inference_mode()
def speed(model: JEIDNNForImageClassification, images: ImageView, lam: float, batch_size: int = 64) -> dict[str, float]:
    """Images per second from pixels, stopping early and not, and how often both agree."""
    batches = [
        images.__getitems__(range(start, min(start + batch_size, len(images))))["pixel_values"]
        for start in range(0, len(images), batch_size)
    ]
    answers, seconds = {}, {"early": [], "full": []}
    for _ in range(3):
        for name, all_exits in (("early", None), ("full", True)):
            started = time.perf_counter()
            answers[name] = [model(pixels, lam=lam, output_all_exits=all_exits) for pixels in batches]
            seconds[name].append(time.perf_counter() - started)
    agree, spent = [], []
    for early, full in zip(answers["early"], answers["full"], strict=True):
        same = (early.exit_index == full.exit_index) & (early.logits.argmax(-1) == full.logits.argmax(-1))
        agree.append(same)
        spent.append(early.mul_adds)
    return {
        "lam": lam,
        "early": len(images) / min(seconds["early"]),
        "full": len(images) / min(seconds["full"]),
        "mul_adds": float(torch.cat(spent).double().mean()) / model.costs.backbone[-1],
        "agree": float(torch.cat(agree).float().mean()),
    }


if __name__ == "__main__":
    main()
