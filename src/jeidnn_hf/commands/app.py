"""``jeidnn app``: a page for a browser, see `jeidnn_hf.app`."""

from __future__ import annotations

import argparse
import json
import sys
from importlib.util import find_spec

HELP = "serve a page that shows where a picture leaves, and what lambda changes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="a saved model's folder, or an id of the Hub")
    parser.add_argument("--subfolder", default="", help="folder of the Hub's repository")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of the Hub's repository")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0 for other machines")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860")


def run(options: argparse.Namespace) -> None:
    if find_spec("gradio") is None:
        print("jeidnn app: Expected gradio, but it is not installed; pip install jeidnn-hf[app].", file=sys.stderr)
        raise SystemExit(2)
    from transformers.utils.logging import disable_progress_bar

    from ..app import serve

    disable_progress_bar()
    app = serve(options.model, options.revision, options.subfolder, options.host, options.port)
    print(json.dumps({"url": app.local_url}) if options.json else f"{app.local_url} shows it, until Ctrl-C", flush=True)
    app.block_thread()
