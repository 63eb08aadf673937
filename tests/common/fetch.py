"""Fetches the common model tests of the installed transformers, which its wheel leaves out and its sdist carries.

    python tests/common/fetch.py FOLDER

makes the package FOLDER/transformers_tests, once per version. What the sdist itself leaves out is stubbed.
"""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path, PurePosixPath

import transformers

STUBS = {
    "__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def fetch(folder: Path) -> None:
    package, requirement = folder / "transformers_tests", f"transformers=={transformers.__version__}"
    done = package / "VERSION"
    if done.is_file() and done.read_text() == requirement:
        return
    with tempfile.TemporaryDirectory() as download:
        options = ["--no-deps", "--no-binary", "transformers", "--dest", download]
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", *options, requirement], check=True)
        (archive,) = Path(download).glob("transformers-*.tar.gz")
        with tarfile.open(archive) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if len(path.parts) == 3 and path.parts[1] == "tests" and path.suffix == ".py":
                    write(package / path.name, tar.extractfile(member).read().decode())
    for name, text in STUBS.items():
        write(package / name, text)
    done.write_text(requirement)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    fetch(Path(sys.argv[1]))
