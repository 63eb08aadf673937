"""README.md and docs/: the quick start prints what is printed below it, and what they name exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from jeidnn_hf.cli import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NUMBER = re.compile(r"\d+\.?\d*")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```$|`[^`\n]+`", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(text: str) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", without_code(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_the_quick_start_prints_what_the_readme_says(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = PAGES[0].read_text(encoding="utf-8").split("## Quick start")[1].split("\n## ")[0]
    (code,), (printed,) = blocks(section, "python"), blocks(section, "text")
    with torch.random.fork_rng():
        exec(compile(code, "README.md", "exec"), {})
    lines = capsys.readouterr().out.splitlines()
    found = "".join(f"{line}\n" for line in lines if line.startswith("lambda"))  # without the trainer's log
    assert NUMBER.sub("#", found) == NUMBER.sub("#", printed)
    for got, said in zip(NUMBER.findall(found), NUMBER.findall(printed), strict=True):
        slack = 1 if said.isdigit() else 0.02  # per cent, and shares: other processors add in another order
        assert float(got) == pytest.approx(float(said), abs=slack)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_pictures_are_there(page):
    targets = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))
    for target in targets:
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        other = (page.parent / path).resolve() if path else page
        assert other.exists(), target
        if anchor:
            assert anchor in anchors(other.read_text(encoding="utf-8")), target


def test_pages_name_commands_and_examples_that_exist():
    commands, files = set(), set()
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        lines = [line for block in blocks(text, "bash") for line in block.splitlines()]
        lines += re.findall(r"`([^`\n]+)`", text)
        commands |= {line.split()[1] for line in lines if re.match(r"jeidnn [a-z]", line)}
        files |= set(re.findall(r"\bexamples/[\w./-]*\w", text))
    assert len(commands) > 5 and commands <= set(COMMANDS)
    assert len(files) > 5 and [name for name in sorted(files) if not (ROOT / name).exists()] == []


def test_every_module_is_in_the_api_reference():
    source = ROOT / "src" / "jeidnn_hf"
    paths = [path for path in source.rglob("*.py") if path.read_text(encoding="utf-8").strip()]
    parts = [("jeidnn_hf", *path.relative_to(source).with_suffix("").parts) for path in paths]
    modules = {".".join(names).removesuffix(".__init__") for names in parts}
    reference = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    assert sorted(re.findall(r"^::: (\S+)$", reference, re.MULTILINE)) == sorted(modules)
