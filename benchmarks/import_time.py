"""Importing the package's model, Trainer and processor against importing what they are made of alone.

    python benchmarks/import_time.py

Each import runs in a fresh interpreter, in turn; the denominator is torch, timm and the transformers classes that ours
derive from.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

PARTS = (
    "import torch, timm\n"
    "from transformers import (AutoConfig, AutoImageProcessor, AutoModelForImageClassification, BaseImageProcessor,"
    " PreTrainedConfig, PreTrainedModel, Trainer, TrainingArguments)"
)
OURS = (
    "from jeidnn_hf import (JEIDNNConfig, JEIDNNForImageClassification, JEIDNNImageProcessor, JEIDNNTrainer,"
    " JEIDNNTrainingArguments)"
)


def seconds(code: str) -> float:
    started = time.perf_counter()
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    seconds(PARTS), seconds(OURS)
    pairs = [(seconds(PARTS), seconds(OURS)) for _ in range(options.repetitions)]
    parts, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(b / a for a, b in pairs)
    row = {"parts_s": parts, "ours_s": ours, "ratio": ours / parts, "spread": [ratios[0], ratios[-1]]}
    print(f"parts {parts:.2f} s, ours {ours:.2f} s, ratio {ours / parts:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps({"denominator": PARTS, "package": OURS, **row}, indent=1))


if __name__ == "__main__":
    main()
