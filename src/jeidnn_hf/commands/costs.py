"""``jeidnn costs``: Tables 2 and 3 of the paper, for any backbone."""

from __future__ import annotations

import argparse
import json

HELP = "print cumulative Mul-Adds, or milliseconds, per exit"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(misused=parser.error)
    parser.add_argument("model", nargs="?", help="a saved model, instead of the options below")
    parser.add_argument("--backbone", help="timm model name; no weights are loaded")
    parser.add_argument("--num-classes", type=int)
    parser.add_argument("--image-size", type=int, help="side of the images; default, the backbone's own")
    parser.add_argument("--recipe", default="paper", help="paper (default) or default")
    parser.add_argument("--kind", default="mul_adds", help="mul_adds (default), or latency: measured here, in ms")
    parser.add_argument("--batch-size", type=int, default=1, help="of the measurement (default 1)")
    parser.add_argument("--save", action="store_true", help="put the measured table into the saved model")


def run(options: argparse.Namespace) -> None:
    from ..configuration_jeidnn import JEIDNNConfig
    from ..costs import COLUMNS
    from ..modeling_jeidnn import JEIDNNForImageClassification

    if options.save and (options.model is None or options.kind != "latency"):
        options.misused("expected a saved model and --kind latency with --save")
    if options.model is not None:
        model = JEIDNNForImageClassification.from_pretrained(options.model).eval()
    elif options.backbone is None or options.num_classes is None:
        options.misused("expected a saved model, or --backbone and --num-classes")
    else:
        fields = {"image_size": options.image_size, "recipe": options.recipe, "num_labels": options.num_classes}
        model = JEIDNNForImageClassification(JEIDNNConfig(backbone=options.backbone, **fields)).eval()
    config, measuring = model.config, {"batch_size": options.batch_size} if options.kind == "latency" else {}
    table = model.exit_costs(options.kind, **measuring)
    if options.save:
        model.set_costs(table)
        model.save_pretrained(options.model)
    columns = {name: list(getattr(table, name)) for name in (*COLUMNS, "total", "normalised")}
    if options.json:
        about = {"unit": table.unit, "measured": table.measured} if table.measured else {}
        names = {"name": config.backbone, "num_classes": config.num_labels}
        print(json.dumps({**names, **about, **columns}, indent=1))
        return
    print(f"{config.backbone}, {config.num_labels} classes, {config.image_size} px: cumulative {table.unit} per exit")
    if table.measured:
        print("measured on " + ", ".join(f"{name} {value}" for name, value in table.measured.items()))
    print(f"{'exit':>4} {'backbone':>15} {'+ pooling':>12} {'+ heads':>12} {'+ gates':>10} {'total':>15} {'share':>7}")
    digits = ",.3f" if table.measured else ","
    for l, (*row, share) in enumerate(zip(*columns.values(), strict=True), start=1):
        widths = zip(row, (15, 12, 12, 10, 15), strict=True)
        print(f"{l:>4}", *(f"{value:>{width}{digits}}" for value, width in widths), f"{share:>7.4f}")
