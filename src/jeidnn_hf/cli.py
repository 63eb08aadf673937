"""The ``jeidnn`` command, thin over the rooms. Exit status: 0 done, 1 failed, 2 wrong usage; an error is one line."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from . import __version__


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="jeidnn", description="Early-exit image classifiers.")
    parser.add_argument("--version", action="version", version=f"jeidnn-hf {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = commands.add_parser("demo", help="train, evaluate and plot a small early-exit network on the digits")
    demo.add_argument("--output_dir", type=Path, default=Path("demo_output"))
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    costs = commands.add_parser("costs", help="print cumulative Mul-Adds per exit")
    costs.add_argument("--backbone", required=True, help="timm model name; no weights are loaded")
    costs.add_argument("--num-classes", type=int, required=True)
    costs.add_argument("--image-size", type=int, help="side of the images; default, the backbone's own")
    costs.add_argument("--recipe", default="paper", help="paper (default) or default")
    costs.set_defaults(run=_costs)

    convert = commands.add_parser("convert", help="convert a checkpoint of T2T-ViT or of the original JEI-DNN code")
    convert.add_argument("source", type=Path, help="torch file")
    convert.add_argument("output_dir", type=Path)
    convert.add_argument("--backbone", required=True, help="t2t_vit_7 or t2t_vit_14")
    convert.add_argument("--lam", type=float, help="lambda of a JEI-DNN checkpoint")
    convert.set_defaults(run=_convert)

    backbones = commands.add_parser("backbones", help="list which of timm's networks can be cut at their exits")
    backbones.add_argument("--module", nargs="+", help="only these modules of timm; trying all takes minutes")
    backbones.set_defaults(run=_backbones)

    evaluate = commands.add_parser("evaluate", help="evaluate every model of a run folder on its test images")
    evaluate.add_argument("run_dir", type=Path, help="output_dir of examples/train.py")
    evaluate.add_argument("--num-lambdas", type=int, default=20, help="of a checkpoint for a range of lambdas")
    evaluate.add_argument("--speed-images", type=int, default=0, help="images to time with and without early exit")
    evaluate.set_defaults(run=_evaluate)

    figures = commands.add_parser("figures", help="draw the figures and tables of an evaluated run folder")
    figures.add_argument("run_dir", type=Path)
    figures.add_argument("--output_dir", type=Path, help="default: RUN_DIR/figures")
    figures.set_defaults(run=_figures)

    card = commands.add_parser("card", help="write the model card of a saved model, README.md and frontier.png")
    card.add_argument("model_dir", type=Path, help="in an evaluated run folder, for the results")
    card.add_argument("--output_dir", type=Path, help="default: MODEL_DIR")
    card.add_argument("--repo-id", help="org/name, for the code that the card shows; default: MODEL_DIR")
    card.add_argument("--license", help="id of the Hub, such as apache-2.0; default: that of timm's weights")
    card.set_defaults(run=_card)

    for command in (demo, costs, convert, backbones, evaluate, figures, card):
        command.add_argument("--json", action="store_true", help="print JSON")
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    options = parser.parse_args(argv)
    warnings.filterwarnings("ignore", message=".*torch.jit.script.*", category=FutureWarning)  # timm's, on import
    return exit_status(f"jeidnn {options.command}", lambda: options.run(options), debug=options.debug)


def exit_status(name: str, run: Callable[[], None], debug: bool = False) -> int:
    """Of ``run()``: 0, or 1 after what the user did wrong, told in one line on stderr.

    ``name`` begins the line; ``debug`` raises the error instead. Any other error is ours, and is raised.
    """
    try:
        run()
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return 0


def _demo(options: argparse.Namespace) -> None:
    from .demo import run_demo

    rows = run_demo(options.output_dir, seed=options.seed, quiet=options.json)
    if options.json:
        print(json.dumps(rows, indent=1))


def _convert(options: argparse.Namespace) -> None:
    from .convert import convert

    done = convert(options.source, options.output_dir, options.backbone, options.lam)
    print(json.dumps({"done": done}) if options.json else done)


def _costs(options: argparse.Namespace) -> None:
    from .configuration_jeidnn import JEIDNNConfig
    from .modeling_jeidnn import JEIDNNForImageClassification

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


def _evaluate(options: argparse.Namespace) -> None:
    from .runs import budget_table, evaluate_run

    summary = evaluate_run(
        options.run_dir, num_lambdas=options.num_lambdas, speed_images=options.speed_images, quiet=options.json
    )
    if options.json:
        print(json.dumps(summary, indent=1))
        return
    print(f"{summary['dataset']}: test accuracy (%) at a share of the backbone's Mul-Adds, by interpolation\n")
    print(budget_table(summary))
    for name, speed in summary["speed"].items():
        print(
            "{name}, lambda {lam:.4g}: {early:.0f} images/s with early exit, {full:.0f} without; {mul_adds:.3f} of the "
            "Mul-Adds; same exits and classes: {agree:.4f}".format(name=name, **speed)
        )
    print(f"\nwritten: {options.run_dir / 'reports'}, {options.run_dir / 'evaluation.json'}")


def _figures(options: argparse.Namespace) -> None:
    from .runs import draw_run

    folder = options.output_dir or options.run_dir / "figures"
    paths = draw_run(options.run_dir, folder)
    print(json.dumps([str(path) for path in paths], indent=1) if options.json else f"{len(paths)} files in {folder}")


def _card(options: argparse.Namespace) -> None:
    from .runs import write_card_of

    paths = write_card_of(options.model_dir, options.output_dir, repo_id=options.repo_id, license=options.license)
    if options.json:
        print(json.dumps([str(path) for path in paths], indent=1))
        return
    print(f"written: {', '.join(map(str, paths))}")
    if len(paths) == 1:
        print("without results: there are no reports of this model; `jeidnn evaluate` makes them for a run folder")


def _backbones(options: argparse.Namespace) -> None:
    import dataclasses

    from .backbones.survey import survey

    rows = []
    for row in survey(options.module):
        rows.append(row)
        if not options.json:
            what = row.reason or row.view
            print(f"{row.module:<24} {row.model:<40} {row.kind:<8} {row.exits:>3}  {what}", flush=True)
    if options.json:
        print(json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    else:
        print(f"{sum(row.exits > 0 for row in rows)} of {len(rows)} can be cut at their exits.")


if __name__ == "__main__":
    sys.exit(main())
