"""Trains the exits of a frozen backbone, run after run, as a YAML or JSON file says; the same as `jeidnn train`.

    accelerate launch --cpu examples/train.py --config examples/configs/cifar10_resnet56.yaml
    python examples/train.py --config examples/configs/paper/cifar10_t2t_vit_7.yaml --dry_run

The backbone passes once over the images, into a feature cache; every run trains from the cache and is saved in its own
folder. A run that is already saved is left alone, an interrupted one goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jeidnn_hf.cli import add_command, exit_status, parse_options
from jeidnn_hf.commands import train


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_command(parser, train)
    options = parse_options(parser, argv)
    return exit_status("train.py", lambda: options.run(options), debug=options.debug)


if __name__ == "__main__":
    sys.exit(main())
