"""What a folder or a repository of the Hub must hold before it is loaded; errors of the Hub in one line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from .configuration_jeidnn import JEIDNNConfig

FROM_THE_HUB = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
"""Arguments of ``from_pretrained`` that say where its files are."""


def check_checkpoint(name: str | os.PathLike, where: dict[str, Any]) -> None:
    """Refuses what is no checkpoint of ours before its weights are fetched, and what has none in safetensors.

    Args:
        name: a folder or an id of the Hub.
        where: those of `FROM_THE_HUB` that were given.

    Raises:
        ValueError: another kind of model, a newer format, no weights but in a pickle, weights outside the repository.
        OSError: a repository, revision or config that cannot be had.
    """
    where = {key: value for key, value in where.items() if key != "force_download"}  # once is enough
    values, _ = JEIDNNConfig.get_config_dict(name, **where)
    if values.get("model_type") != JEIDNNConfig.model_type:
        raise ValueError(
            f"Expected a JEI-DNN checkpoint in {str(name)!r}, but got model_type {values.get('model_type')!r}."
        )
    if "transformers_weights" in values:
        raise ValueError(
            f"Expected the weights of {str(name)!r} in {SAFE_WEIGHTS_NAME}, but its config names "
            f"{values['transformers_weights']!r}."
        )
    JEIDNNConfig.from_dict(values)
    if fetch(name, SAFE_WEIGHTS_NAME, where) is not None:
        return
    index = fetch(name, SAFE_WEIGHTS_INDEX_NAME, where)
    if index is None:
        raise ValueError(
            f"Expected {SAFE_WEIGHTS_NAME} in {str(name)!r}, but there is none; push or save the trained exits there "
            "(a pickle is never loaded)."
        )
    files = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
    if outside := sorted(file for file in files if Path(file).name != file):
        raise ValueError(f"Expected the index of {str(name)!r} to name files beside it, but got {outside[0]!r}.")


def fetch(name: str | os.PathLike, file: str, where: dict[str, Any]) -> str | None:
    """The path of a file of a folder or a repository, None where it has none of that name."""
    try:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **where)
    except (OSError, ValueError):
        raise
    except Exception as error:  # of the HTTP client, whose errors are of no common kind
        raise OSError(f"Expected to fetch {file} of {str(name)!r}, but got: {error}; try again.") from error


@contextmanager
def one_line_errors() -> Iterator[None]:
    """The OSErrors of transformers and of the Hub, which go on for many lines, in one; a 403 is called so.

    Likewise, as a ValueError, what is wrong with the head of a model card of theirs.
    """
    try:
        yield
    except yaml.YAMLError as error:
        shown = " ".join(str(error).split())
        raise ValueError(f"Expected valid YAML in the head of README.md there, but got: {shown}; mend it.") from error
    except OSError as error:
        cause: BaseException | None = error
        while cause is not None and getattr(getattr(cause, "response", None), "status_code", None) != 403:
            cause = cause.__cause__
        shown = " ".join(str(cause or error).split())
        if shown == str(error):
            raise
        raise OSError(shown) from error
