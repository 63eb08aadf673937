"""Evaluates every model that ``train.py`` saved in a folder, on the test role; the same as ``jeidnn evaluate``.

    python examples/evaluate.py runs/cifar10_resnet56 --speed-images 1024
"""

import sys

from jeidnn_hf.cli import main

if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
