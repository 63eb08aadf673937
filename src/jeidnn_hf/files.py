"""Files that are there whole or not at all, also where the disk is full or the process is killed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors import SafetensorError


class WriteError(OSError):
    """Something could not be written; the message says where, why, and what to do."""


@contextmanager
def written_whole(folder: str | Path) -> Iterator[Path]:
    """A temporary folder to write files into; when all are complete they move to ``folder``, over older ones.

    After an error ``folder`` holds what it held before.

    Raises:
        WriteError: a full disk, no permission, no folder.
    """
    folder = Path(folder)
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    with clear_write_errors(folder):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=folder, prefix=".writing-") as temporary:
                yield Path(temporary)
                for path in Path(temporary).iterdir():
                    path.replace(folder / path.name)
        except BaseException:
            with suppress(OSError):
                for path in made:
                    path.rmdir()
            raise


@contextmanager
def clear_write_errors(path: str | Path) -> Iterator[None]:
    """Around what writes below ``path``: whatever the libraries raise where that fails becomes one WriteError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "inline_container" not in str(error):  # what torch.save raises
            raise
        cause = error.__cause__ if isinstance(error, WriteError) and error.__cause__ else error
        reason = " ".join((getattr(cause, "strerror", None) or str(cause)).split())
        place = next(place for place in (Path(path).absolute(), *Path(path).absolute().parents) if place.exists())
        raise WriteError(
            f"Expected to write {str(path)!r}, but got: {reason} ({shutil.disk_usage(place).free / 1e6:.1f} MB free); "
            "it takes a folder that can be written to, and enough room."
        ) from cause


def write_text(path: str | Path, text: str) -> None:
    """One text file, whole or not at all."""
    with written_whole(Path(path).parent) as temporary:
        (temporary / Path(path).name).write_text(text, encoding="utf-8")


def read_json(path: str | Path, what: str) -> Any:
    """The value in a JSON file; a ValueError that calls it ``what`` where it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected {what} at {str(path)!r}, but it cannot be read: {error}") from error
