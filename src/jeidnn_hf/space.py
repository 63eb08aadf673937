"""A Space of the Hub that serves the page of `app.py` for a pushed model, by its id."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import yaml
from huggingface_hub import CommitInfo, HfApi

from . import __version__
from .checkpoints import one_line_errors

SDK_VERSION = "6.31.0"
"""Of gradio, which the Space installs itself."""
PYTHON_VERSION = "3.11"


def space_id(repo_id: str, subfolder: str | None = None) -> str:
    """The id of a model's Space: the model's own, and of a model in a folder that with the folder after it."""
    return f"{repo_id}-{subfolder.strip('/').replace('/', '-')}" if subfolder else repo_id


def space_files(repo_id: str, subfolder: str | None = None, revision: str | None = None) -> dict[str, str]:
    """``app.py``, ``requirements.txt`` and ``README.md`` of the Space, by name."""
    name = space_id(repo_id, subfolder)
    head = {
        "title": name.split("/")[-1],
        "emoji": "🚪",
        "colorFrom": "blue",
        "colorTo": "yellow",
        "sdk": "gradio",
        "sdk_version": SDK_VERSION,
        "python_version": PYTHON_VERSION,
        "app_file": "app.py",
        "models": [repo_id],
        "tags": ["jeidnn", "early-exit"],
    }
    arguments = [json.dumps(repo_id)]
    arguments += [f"{key}={json.dumps(v)}" for key, v in (("revision", revision), ("subfolder", subfolder)) if v]
    return {
        "app.py": (
            "from jeidnn_hf.app import serve\n\n"
            f'if __name__ == "__main__":\n    serve({", ".join(arguments)}).block_thread()\n'
        ),
        "requirements.txt": f"jeidnn-hf[app]=={__version__}\n",
        "README.md": (
            f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---\n\n# {head['title']}\n\n"
            f"Where a picture leaves the early-exit classifier `{repo_id}`, what each of its exits thinks of the "
            "picture, and what moving λ changes. If that repository is private, give this Space a secret `HF_TOKEN` "
            "that may read it.\n"
        ),
    }


def push_space(
    repo_id: str,
    subfolder: str | None = None,
    *,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
) -> CommitInfo:
    """Pushes the Space of a pushed model, in one commit; arguments as of `hub.push_folder`.

    Raises:
        OSError: the Hub's, such as for a token that may not write.
    """
    api, name = HfApi(token=token), space_id(repo_id, subfolder)
    with tempfile.TemporaryDirectory() as staged, one_line_errors():
        for file, text in space_files(repo_id, subfolder, revision).items():
            Path(staged, file).write_text(text, encoding="utf-8")
        api.create_repo(name, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
        options = {"repo_type": "space", "folder_path": staged, "commit_message": f"Show {repo_id}"}
        return api.upload_folder(repo_id=name, **options)
