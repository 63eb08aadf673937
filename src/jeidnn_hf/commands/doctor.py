"""``jeidnn doctor``: whether this machine has what the package needs."""

from __future__ import annotations

import argparse
import json
import os
import sys
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

HELP = "check versions, devices, caches, and where data and weights are looked for"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """None but those of every command."""


def run(options: argparse.Namespace) -> None:
    found = diagnosis()
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print(_shown(found))
    wrong = [row["package"] for row in found["packages"] if not row["ok"]]
    if wrong:
        raise ValueError(f"Expected all packages in their ranges, but got {', '.join(wrong)}; pip install jeidnn-hf.")


def diagnosis() -> dict[str, Any]:
    """``packages`` (required version, installed one, whether that will do), ``devices``, ``caches``, ``offline``,
    ``folders`` and ``weights``."""
    import torch
    from datasets import config as datasets_config
    from huggingface_hub import constants

    from ..backbones.loading import WEIGHTS_DIR_VARIABLE
    from ..backbones.pip_weights import PIP_WEIGHTS

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = [f"cpu, {torch.get_num_threads()} threads"]
    if accelerator is not None:
        devices += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
    caches = {"hub": Path(constants.HF_HUB_CACHE), "datasets": Path(datasets_config.HF_DATASETS_CACHE)}
    variables = ("JEIDNN_DATA_DIR", WEIGHTS_DIR_VARIABLE)
    return {
        "python": sys.version.split()[0],
        "packages": package_rows(requires("jeidnn-hf") or []),
        "devices": devices,
        "caches": {name: {"path": str(path), "exists": path.is_dir()} for name, path in caches.items()},
        "offline": {
            "HF_HUB_OFFLINE": bool(constants.HF_HUB_OFFLINE),
            "HF_DATASETS_OFFLINE": bool(datasets_config.HF_DATASETS_OFFLINE),
        },
        "folders": {name: _folder(os.environ.get(name)) for name in variables},
        "weights": {name: {"package": of.package, "version": _version(of.package)} for name, of in PIP_WEIGHTS.items()},
    }


def package_rows(requirements: list[str]) -> list[dict[str, Any]]:
    """For each requirement without an extra ``{"package", "required", "installed", "ok"}``."""
    from packaging.requirements import Requirement

    rows = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        installed = _version(requirement.name)
        ok = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        required = str(requirement.specifier)
        rows.append({"package": requirement.name, "required": required, "installed": installed, "ok": ok})
    return rows


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _folder(path: str | None) -> dict[str, Any]:
    if not path:
        return {"path": None, "holds": []}
    folder = Path(path)
    return {"path": path, "holds": sorted(item.name for item in folder.iterdir()) if folder.is_dir() else None}


def _shown(found: dict[str, Any]) -> str:
    lines = [f"Python {found['python']}"]
    for row in found["packages"]:
        verdict = "ok" if row["ok"] else "WRONG"
        lines.append(f"{verdict:<6} {row['package']:<16} {row['installed'] or 'absent':<24} {row['required']}")
    lines.append("devices: " + "; ".join(found["devices"]))
    for name, cache in found["caches"].items():
        lines.append(f"{name} cache: {cache['path']}" + ("" if cache["exists"] else " (not there yet)"))
    lines += [f"{name}: {'on' if on else 'off'}" for name, on in found["offline"].items()]
    for name, folder in found["folders"].items():
        holds = "no such folder" if folder["holds"] is None else ", ".join(folder["holds"]) or "empty"
        lines.append(f"{name}: {folder['path']} ({holds})" if folder["path"] else f"{name}: not set")
    for name, of in found["weights"].items():
        installed = of["version"] or f"absent; pip install {of['package']}"
        lines.append(f"weights='pip' of {name}: {installed}")
    return "\n".join(lines)
