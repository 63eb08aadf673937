"""``jeidnn export``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

HELP = "write a saved model as ONNX or torch.export files, one per exit, that stop early"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="folder or id of the Hub")
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--format", default="onnx", choices=("onnx", "torch"), help="torch: also all exits in one file")
    parser.add_argument("--lam", type=float, help="lambda where a call names none; default, the model's")


def run(options: argparse.Namespace) -> None:
    from ..modeling_jeidnn import JEIDNNForImageClassification
    from ..onnx_export import export, export_all_exits

    model = JEIDNNForImageClassification.from_pretrained(options.model)
    if options.lam is not None:
        model.set_lambda(options.lam)
    manifest = export(model, options.output_dir, options.format)
    if options.format == "torch":
        export_all_exits(model, options.output_dir / "all_exits.pt2")
    if options.json:
        print(json.dumps(manifest, indent=1))
        return
    print(f"written: {options.output_dir}, {len(manifest['segments'])} segments and manifest.json")
