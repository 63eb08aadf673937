"""``jeidnn costs``: Tables 2 and 3 of the paper, for any backbone."""

from __future__ import annotations

import argparse
import json

HELP = "print cumulative Mul-Adds per exit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--backbone", required=True, help="timm model name; no weights are loaded")
    parser.add_argument("--num-classes", type=int, required=True)
    parser.add_argument("--image-size", type=int, help="side of the images; default, the backbone's own")
    parser.add_argument("--recipe", default="paper", help="paper (default) or default")


def run(options: argparse.Namespace) -> None:
    from ..configuration_jeidnn import JEIDNNConfig
    from ..modeling_jeidnn import JEIDNNForImageClassification

    config = JEIDNNConfig(
        backbone=options.backbone, num_labels=options.num_classes, image_size=options.image_size, recipe=options.recipe
    )
    table = JEIDNNForImageClassification(config).costs
    columns = {**table.to_dict(), "total": list(table.total), "normalised": list(table.normalised)}
    if options.json:
        print(json.dumps({"name": options.backbone, "num_classes": options.num_classes, **columns}, indent=1))
        return
    print(f"{options.backbone}, {options.num_classes} classes, {config.image_size} px: cumulative Mul-Adds per exit")
    print(f"{'exit':>4} {'backbone':>15} {'+ pooling':>12} {'+ heads':>12} {'+ gates':>10} {'total':>15} {'share':>7}")
    for l, row in enumerate(zip(*columns.values(), strict=True), start=1):
        backbone, pooling, heads, gates, total, share = row
        print(f"{l:>4} {backbone:>15,} {pooling:>12,} {heads:>12,} {gates:>10,} {total:>15,} {share:>7.4f}")
