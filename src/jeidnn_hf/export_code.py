"""Puts this package's code beside a saved model, so that `trust_remote_code=True` loads it without the package.

transformers fetches the module that `auto_map` names and the files beside it that relative imports of one dot name, and
no folders: the modules are flattened (`backbones/staged.py` becomes `backbones_staged.py`) and their imports rewritten.
The machine needs torch, transformers, timm, fvcore and safetensors.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from importlib.util import find_spec, resolve_name
from pathlib import Path

from . import __version__

PACKAGE = __package__
AUTO_MAP = {
    "config.json": {
        "AutoConfig": "configuration_jeidnn.JEIDNNConfig",
        "AutoModelForImageClassification": "modeling_jeidnn.JEIDNNForImageClassification",
    },
    "preprocessor_config.json": {"AutoImageProcessor": "image_processing_jeidnn.JEIDNNImageProcessor"},
}


def export_code(folder: str | Path) -> list[Path]:
    """Writes the modules that the model needs into a folder where it was saved, and names them in its JSON files.

    Returns the modules' paths.

    Raises:
        ValueError: no saved model in the folder.
    """
    folder = Path(folder)
    described = {folder / name: auto_map for name, auto_map in AUTO_MAP.items() if (folder / name).exists()}
    if folder / "config.json" not in described:
        raise ValueError(f"Expected a saved model in {str(folder)!r}, but it has no config.json.")
    roots = [path.split(".")[0] for auto_map in described.values() for path in auto_map.values()]
    sources = flat_modules(roots)
    for name, source in sources.items():
        (folder / f"{name}.py").write_text(source, encoding="utf-8")
    for path, auto_map in described.items():
        values = json.loads(path.read_text(encoding="utf-8"))
        text = json.dumps({**values, "auto_map": auto_map}, indent=2, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")
    return [folder / f"{name}.py" for name in sources]


def flat_modules(roots: list[str]) -> dict[str, str]:
    """The sources of modules of this package and of all that they import from it, by flat name, imports rewritten."""
    sources, waiting = {}, [f"{PACKAGE}.{root}" for root in roots]
    while waiting:
        module = waiting.pop()
        if _flat(module) not in sources:
            sources[_flat(module)], imported = _flatten(module)
            waiting.extend(imported)
    return dict(sorted(sources.items()))


def _flat(module: str) -> str:
    return module.removeprefix(f"{PACKAGE}.").replace(".", "_")


def _flatten(module: str) -> tuple[str, list[str]]:
    """The source of a module with flat imports, and the modules of this package that it imports."""
    spec = find_spec(module)
    text = Path(spec.origin).read_text(encoding="utf-8")
    lines, imported = text.splitlines(), []
    package = module if spec.submodule_search_locations else module.rpartition(".")[0]
    imports = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom) and node.level]
    for node in sorted(imports, key=lambda node: -node.lineno):
        written = list(_rewritten(node, package, imported))
        lines[node.lineno - 1 : node.end_lineno] = [" " * node.col_offset + line for line in written]
    header = f"# {module} of jeidnn-hf {__version__}, Apache-2.0; flattened by jeidnn_hf.export_code."
    return "\n".join([header, *lines]) + "\n", imported


def _rewritten(node: ast.ImportFrom, package: str, imported: list[str]) -> Iterator[str]:
    """One relative import as imports of one dot; those of whole modules twice, as transformers sees the first only."""
    parent = resolve_name("." * node.level + (node.module or ""), package)
    is_package = find_spec(parent).submodule_search_locations is not None
    plain = []
    for alias in node.names:
        module = f"{parent}.{alias.name}"
        if is_package and find_spec(module) is not None:
            imported.append(module)
            yield f"from .{_flat(module)} import __name__ as _"
            yield f"from . import {_flat(module)} as {alias.asname or alias.name}"
        else:
            plain.append(alias.name + (f" as {alias.asname}" if alias.asname else ""))
    if plain:
        imported.append(parent)
        yield f"from .{_flat(parent)} import {', '.join(plain)}"
