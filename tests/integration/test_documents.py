"""README.md, CONTRIBUTING.md, docs/, other READMEs: what they show must run, what they name must exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fewstep.lab.compose import compose

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
FOLDERS = ("packages/*", "kernels", "experiments/*")
READMES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/README.md"))
ALL = [*PAGES, *READMES, ROOT / "CHANGELOG.md"]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
STAND_ALONE = {"README.md"}  # each block of these is a program; the blocks of another page are one program


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def programs(page: Path) -> list[str]:
    """The page's python blocks as programs."""
    blocks = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return blocks if page_id(page) in STAND_ALONE else ["\n".join(blocks)] if blocks else []


EXAMPLES = [pytest.param(code, id=f"{page_id(page)}-{i}") for page in PAGES for i, code in enumerate(programs(page))]


@pytest.mark.parametrize("code", EXAMPLES)
def test_examples_run(code: str, tmp_path: Path) -> None:
    """Code that a reader copies must work as it stands, in an empty folder."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ALL, ids=page_id)
def test_links_and_pictures_lead_somewhere(page: Path) -> None:
    """A link to a file that was moved or never committed is a dead end."""
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)|src=\"([^\"]+)\"", page.read_text())
    local = [a or b for a, b in links if "://" not in a + b]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", ALL, ids=page_id)
def test_make_targets_exist(page: Path) -> None:
    """A command that the text tells to type must be there."""
    assert set(re.findall(r"\bmake ([a-z][a-z-]+)`", page.read_text())) <= TARGETS
    assert set(re.findall(r"^make ([a-z-]+)", page.read_text(), re.MULTILINE)) <= TARGETS


RUNS = re.findall(r"^\.venv/bin/fewstep run (\S+)([^#\n]*)", (ROOT / "README.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("experiment", "overrides"), RUNS)
def test_runs_compose(experiment: str, overrides: str) -> None:
    """A key or preset that was renamed would fail in the reader's first minute."""
    compose(ROOT / experiment, overrides.split())


def test_the_test_can_fail() -> None:
    """The patterns above must see what they look for, or every page passes."""
    assert {"quickstart", "test", "test-fast", "lint", "docs", "gpu-check"} <= TARGETS
    assert EXAMPLES
    assert RUNS
