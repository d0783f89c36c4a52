"""Imports against declarations: what a package imports it must declare, and what it declares it must import."""

import ast
import functools
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECTS = sorted([*ROOT.glob("packages/*/pyproject.toml"), ROOT / "kernels/pyproject.toml"])
NOT_IMPORTED = {"tensorboard": "torch.utils.tensorboard is torch's, and needs it"}
each_project = pytest.mark.parametrize("pyproject", PROJECTS, ids=lambda p: p.parent.name)


def project(pyproject: Path) -> dict[str, Any]:
    return tomllib.loads(pyproject.read_text())["project"]


def names(requirements: list[str]) -> set[str]:
    return {canonicalize_name(Requirement(r).name) for r in requirements}


def imports(node: ast.AST, inside: bool = False) -> Iterator[tuple[str, bool]]:
    """Absolute imports below a node as (module, whether inside a function), those for type checkers alone left out."""
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Import):
        yield from ((alias.name, inside) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        if node.module == "fewstep":
            yield from ((f"fewstep.{alias.name}", inside) for alias in node.names)
        else:
            yield node.module, inside
    for child in ast.iter_child_nodes(node):
        yield from imports(child, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


installed = functools.cache(packages_distributions)


def distribution(module: str) -> str | None:
    """The distribution that a module belongs to; None for the standard library."""
    top = module.partition(".")[0]
    if top in sys.stdlib_module_names:
        return None
    if top == "fewstep":
        return "fewstep-" + module.split(".")[1]
    return canonicalize_name(installed().get(top, [top])[0])


def imported(pyproject: Path, inside: bool) -> set[str]:
    """Distributions that a project imports at module level (inside=False) or within functions (inside=True)."""
    found = {
        distribution(module)
        for path in (pyproject.parent / "src").rglob("*.py")
        for module, where in imports(ast.parse(path.read_text()))
        # triton_kernel.py is imported only where Triton is
        if where == inside and not (path.name == "triton_kernel.py" and module.startswith("triton"))
    }
    return {name for name in found if name} - {canonicalize_name(project(pyproject)["name"])}


@each_project
def test_imports_at_module_level_are_declared(pyproject: Path) -> None:
    """An undeclared import works here, where everything is installed, and breaks for whoever installs one package."""
    assert imported(pyproject, inside=False) <= names(project(pyproject)["dependencies"])


@each_project
def test_imports_inside_functions_are_declared_or_extras(pyproject: Path) -> None:
    """An optional import that no extra brings could not be installed by the name that its error message gives."""
    declared = project(pyproject)
    optional = [r for extra in declared.get("optional-dependencies", {}).values() for r in extra]
    assert imported(pyproject, inside=True) <= names(declared["dependencies"] + optional)


@each_project
def test_declared_distributions_are_imported(pyproject: Path) -> None:
    """A dependency that nothing imports is a download for nothing."""
    used = imported(pyproject, inside=False) | imported(pyproject, inside=True)
    assert names(project(pyproject)["dependencies"]) - used - set(NOT_IMPORTED) == set()


def test_one_version_for_all() -> None:
    """The distributions are released together; a version left behind would install a mixture."""
    root = project(ROOT / "pyproject.toml")["version"]
    assert {project(p)["name"]: project(p)["version"] for p in PROJECTS if project(p)["version"] != root} == {}
    assert f"version: {root}\n" in (ROOT / "CITATION.cff").read_text()
    assert root in (ROOT / "CHANGELOG.md").read_text()
