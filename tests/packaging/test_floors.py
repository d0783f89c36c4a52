"""The import contract of pyproject.toml: kept by the tree, and able to fail."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted(ROOT.glob("packages/*/src")), ROOT / "kernels/src"]
PLANTED = {  # module to plant into -> imports that a floor or a promise forbids
    "schedules": ["fewstep.kernels", "numpy"],
    "kernels": ["fewstep.samplers", "scipy"],
    "models": ["fewstep.samplers", "fewstep.lab", "hydra", "logging_of_nobody"],
    "samplers": ["fewstep.models", "matplotlib"],
    "distill": ["fewstep.models", "fewstep.lab", "safetensors"],
}
ALLOWED = {"logging_of_nobody"}  # the contract must not refuse everything either


def lint_imports(tree: Path) -> subprocess.CompletedProcess[str]:
    """Check the contract on a copy of the sources, not on the installed ones."""
    paths = os.pathsep.join(str(tree / source.relative_to(ROOT)) for source in SOURCES)
    command = [Path(sys.executable).with_name("lint-imports"), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=120)


def copy_tree(tree: Path) -> Path:
    shutil.copy(ROOT / "pyproject.toml", tree)
    for source in SOURCES:
        shutil.copytree(source, tree / source.relative_to(ROOT), ignore=shutil.ignore_patterns("__pycache__"))
    return tree


def test_the_tree_keeps_the_contract(tmp_path: Path) -> None:
    """A sampler that imports models can no longer be used with anyone else's network."""
    done = lint_imports(copy_tree(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr


def test_planted_violations_break_the_contract(tmp_path: Path) -> None:
    """A contract that names the wrong modules passes for ever: every planted import must be named as broken."""
    copy_tree(tmp_path)
    for name, modules in PLANTED.items():
        folder = next(tmp_path.glob(f"**/fewstep/{name}"))
        for module in modules:
            (folder / f"planted_{module.replace('.', '_')}.py").write_text(f"import {module}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    named = set(re.findall(r"fewstep\.(\w+)\.planted_\w+ -> (\S+)", done.stdout))
    assert named == {(name, module) for name, modules in PLANTED.items() for module in set(modules) - ALLOWED}
