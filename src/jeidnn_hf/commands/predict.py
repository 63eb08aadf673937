"""``jeidnn predict``: what a model says of pictures, at which exit, and what that cost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

HELP = "classify pictures: label, confidence, prediction set, exit and Mul-Adds"
DEFAULT_ALPHA = 0.05


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a saved model's folder, or an id of the Hub")
    parser.add_argument("images", type=Path, nargs="+", help="pictures, or folders of them")
    parser.add_argument("--alpha", type=float, help=f"miscoverage of the sets; {DEFAULT_ALPHA} if calibrated for it")
    parser.add_argument("--lam", type=float, help="lambda, within the trained range; default, the saved one")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--subfolder", default="", help="folder of the Hub's repository")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the Hub's repository")


def run(options: argparse.Namespace) -> None:
    import torch
    from transformers.utils.logging import disable_progress_bar

    from ..modeling_jeidnn import JEIDNNForImageClassification

    disable_progress_bar()
    if options.batch_size < 1:
        raise ValueError(f"Expected --batch-size of at least 1, but got {options.batch_size}.")
    paths = find_pictures(options.images)
    where = {"subfolder": options.subfolder, "revision": options.revision}
    model = JEIDNNForImageClassification.from_pretrained(options.model, **where)
    if torch.accelerator.is_available():
        model.to(torch.accelerator.current_accelerator())
    if options.lam is not None:
        model.set_lambda(options.lam)
    rows = []
    for row in predictions(model, paths, options.alpha, options.batch_size):
        rows.append(row)
        if not options.json:
            members = "" if row["prediction_set"] is None else f"  {{{', '.join(row['prediction_set'])}}}"
            print(
                f"{row['image']}: {row['label']} {row['confidence']:.4f}, exit {row['exit']} of {row['exits']}, "
                f"{row['mul_adds']:,} Mul-Adds ({row['normalised_mul_adds']:.3f}){members}",
                flush=True,
            )
    if options.json:
        print(json.dumps(rows, indent=1))


def find_pictures(places: Sequence[Path]) -> list[Path]:
    """The files themselves, and those below folders whose names end as a picture's; in the order of their names.

    Raises:
        ValueError: a folder without any.
        OSError: no such file or folder.
    """
    import PIL.Image

    endings = PIL.Image.registered_extensions()
    found = []
    for place in places:
        if not place.exists():
            raise FileNotFoundError(f"Expected a picture or a folder of them, but there is no {str(place)!r}.")
        if not place.is_dir():
            found.append(place)
            continue
        below = sorted(path for path in place.rglob("*") if path.suffix.lower() in endings and path.is_file())
        if not below:
            raise ValueError(f"Expected pictures in the folder {str(place)!r}, but found none.")
        found += below
    return found


def predictions(model, paths: Sequence[Path], alpha: float | None, batch_size: int) -> Iterator[dict[str, Any]]:
    """For each picture ``{"image", "label", "confidence", "prediction_set", "exit", "exits", "mul_adds",
    "normalised_mul_adds"}``.

    The set, its likeliest label first, is None where the model has no thresholds at its lambda and ``alpha`` is None.
    """
    import torch

    from ..preprocessing import Preprocessing

    preprocessing = Preprocessing.from_dict(model.config.preprocessing)
    names, costs = model.config.id2label, model.exit_costs()
    if alpha is None and model.has_sets(DEFAULT_ALPHA):
        alpha = DEFAULT_ALPHA
    for start in range(0, len(paths), batch_size):
        batch = paths[start : start + batch_size]
        pixels = preprocessing([_open(path) for path in batch]).to(model.device)
        with torch.inference_mode():
            output = model(pixels) if alpha is None else model.predict_sets(pixels, alpha)
            probabilities = model.probabilities(output).float().cpu()
        for row, path in enumerate(batch):
            order = probabilities[row].argsort(descending=True, stable=True).tolist()
            members = None if alpha is None else [names[k] for k in order if output.sets[row, k]]
            mul_adds = int(output.mul_adds[row])
            yield {
                "image": str(path),
                "label": names[order[0]],
                "confidence": float(probabilities[row, order[0]]),
                "prediction_set": members,
                "exit": int(output.exit_index[row]) + 1,
                "exits": len(costs.total),
                "mul_adds": mul_adds,
                "normalised_mul_adds": mul_adds / costs.backbone[-1],
            }


def _open(path: Path):
    import PIL.Image

    try:
        with PIL.Image.open(path) as image:
            image.load()
            return image
    except (OSError, ValueError, SyntaxError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(f"Expected a readable picture, but got {str(path)!r}: {error}.") from error
