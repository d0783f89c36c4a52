"""Each distribution, installed from its wheel into an environment of its own, with what it declares and nothing else.

torch is 5 GB, so these environments do not download it: the third-party distributions that a package declares, and
those which these require in turn, are linked in from the test environment, entry by entry. What is not declared is not
there to be imported. The fewstep distributions come from freshly built wheels, chosen by the resolver from the declared
metadata alone. `test_real_installation` takes no such short cut.
"""

import importlib.metadata as metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.packaging

ROOT = Path(__file__).parents[2]
FOLDERS = {name: ROOT / "packages" / name for name in ("schedules", "models", "samplers", "distill", "lab")}
FOLDERS["kernels"] = ROOT / "kernels"
LIBRARIES = ("schedules", "kernels", "models", "samplers", "distill")
NEEDS = {  # what may come along, itself included: the floors of the design
    "schedules": {"schedules"},
    "kernels": {"kernels"},
    "models": {"models", "schedules", "kernels"},
    "samplers": {"samplers", "schedules", "kernels"},
    "distill": {"distill", "samplers", "schedules", "kernels"},
    "lab": set(FOLDERS),
}
FOREIGN = {  # declared third-party distributions, by the design; lab may declare what it likes
    "schedules": {"torch"},
    "kernels": {"torch"},
    "models": {"torch", "safetensors"},
    "samplers": {"torch"},
    "distill": {"torch"},
}


def run(*command: str | Path, cwd: Path | None = None) -> str:
    """What a command printed; it runs without this session's Python settings, and its failure is the test's."""
    ours = ("PYTHONPATH", "VIRTUAL_ENV", "TRITON_INTERPRET")  # Triton's interpreter, set by conftest, asks for numpy
    environment = {k: v for k, v in os.environ.items() if k not in ours}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}"
    return done.stdout


def uv(*arguments: str | Path, cwd: Path | None = None) -> str:
    """Run the Makefile's uv, else the one on PATH, else the one that the Makefile fetched."""
    return run(os.environ.get("UV") or shutil.which("uv") or ROOT / ".uv/bin/uv", *arguments, cwd=cwd)


@dataclass(frozen=True)
class Wheel:
    """A built distribution: path and declared requirements."""

    path: Path

    @property
    def names(self) -> list[str]:
        with zipfile.ZipFile(self.path) as archive:
            return archive.namelist()

    def requirements(self, extras: Collection[str] = ()) -> list[Requirement]:
        """What it declares, with what these extras add."""
        with zipfile.ZipFile(self.path) as archive:
            text = archive.read(next(n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))).decode()
        declared = map(Requirement, re.findall(r"^Requires-Dist: (.+)$", text, re.MULTILINE))
        return [r for r in declared if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in ("", *extras))]


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Wheel]]:
    """All six, built from the working tree."""
    out = tmp_path_factory.mktemp("wheels")
    for folder in FOLDERS.values():
        uv("build", "--wheel", "--out-dir", out, folder)
    yield {name: Wheel(next(out.glob(f"fewstep_{name}-*.whl"))) for name in FOLDERS}
    shutil.rmtree(out)


def foreign_closure(wheel: Wheel, wheels: dict[str, Wheel]) -> set[str]:
    """The third-party distributions that a wheel's metadata leads to, through its siblings' metadata and their own."""
    found: set[tuple[str, str]] = set()
    waiting = wheel.requirements()
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if name.startswith("fewstep-"):
            waiting += wheels[name.removeprefix("fewstep-")].requirements(requirement.extras)
            continue
        for extra in {"", *requirement.extras} - {e for n, e in found if n == name}:
            found.add((name, extra))
            needed = map(Requirement, metadata.requires(name) or ())
            waiting += [r for r in needed if r.marker is None or r.marker.evaluate({"extra": extra})]
    return {name for name, _ in found}


def link_distribution(name: str, site: Path) -> None:
    """Link an installed distribution into another site-packages, by its top-level entries. Metadata is copied: uv takes
    no notice of linked metadata.
    """
    for top in {file.parts[0] for file in metadata.files(name) or ()} - {"..", "__pycache__"}:
        original = Path(sysconfig.get_path("purelib")) / top
        if top.endswith(".dist-info"):
            shutil.copytree(original, site / top)
        elif not top.endswith(".pth") and not (site / top).exists():
            (site / top).symlink_to(original)


@dataclass(frozen=True)
class Alone:
    """An environment in which one distribution was installed."""

    name: str
    python: Path

    def run(self, code: str, cwd: Path, then: str = "") -> str:
        """Run code and, in a namespace of its own, more code: one import of torch is enough for both."""
        return run(self.python, "-I", "-c", f"exec({code!r}, {{}})\nexec({then!r}, {{}})", cwd=cwd)


@pytest.fixture(scope="module", params=FOLDERS)
def alone(
    request: pytest.FixtureRequest, wheels: dict[str, Wheel], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Alone]:
    """One distribution in a fresh environment."""
    name: str = request.param
    home = tmp_path_factory.mktemp(f"alone-{name}")
    uv("venv", "--quiet", "--python", sys.executable, home)
    site = next(home.glob("lib/python*/site-packages"))
    for distribution in foreign_closure(wheels[name], wheels):
        link_distribution(distribution, site)
    built = wheels[name].path.parent  # as working directory: the workspace's own pins must not help
    uv("pip", "install", "--no-index", "--no-cache", "-f", built, "--python", home, f"fewstep-{name}", cwd=built)
    yield Alone(name, home / "bin/python")
    shutil.rmtree(home)


def importable(alone: Alone, modules: list[str], cwd: Path) -> set[str]:
    """Those of the modules that the environment can find."""
    code = f"import importlib.util as u; print(*(m for m in {modules} if u.find_spec(m)))"
    return set(alone.run(code, cwd).split())


def test_exactly_the_declared_siblings_come_along(alone: Alone, tmp_path: Path) -> None:
    """A missing declaration breaks the import of a user who installs one package; a needless one drags in a floor."""
    found = importable(alone, [f"fewstep.{name}" for name in FOLDERS], tmp_path)
    assert found == {f"fewstep.{name}" for name in NEEDS[alone.name]}


IMPORT_EVERYTHING = """
import importlib, pkgutil, sys, torch
package = importlib.import_module("fewstep.{name}")
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for module in (torch, package):
    assert module.__file__.startswith(sys.prefix), module.__file__
"""


def readme_example(name: str) -> str:
    """The first python block of a package's README."""
    example = re.search(r"^```python\n(.*?)^```$", (FOLDERS[name] / "README.md").read_text(), re.M | re.S)
    assert example, f"README.md of {name} has no ```python block"
    assert example[1].count("\n") <= 20, "the example is meant to be about ten lines"
    return example[1]


def test_what_is_not_declared_is_out_of_reach(alone: Alone, tmp_path: Path) -> None:
    """The environment itself: were the test environment's packages visible in it, the next test would prove nothing."""
    lab_alone = set() if alone.name == "lab" else {"hydra", "matplotlib", "sklearn"}
    assert importable(alone, sorted({"pytest", "diffusers", "mypy"} | lab_alone), tmp_path) == set()


def test_every_module_and_the_readme_example_run_alone(alone: Alone, tmp_path: Path) -> None:
    """Anything that needs something undeclared fails here, as it would for whoever installs this package alone; and the
    first thing that a user copies must work. lab is used from the command line and has no example in Python.
    """
    example = "" if alone.name == "lab" else readme_example(alone.name)
    alone.run(IMPORT_EVERYTHING.format(name=alone.name), tmp_path, then=example)


@pytest.mark.parametrize("alone", ["lab"], indirect=True)
def test_lab_brings_the_command(alone: Alone, tmp_path: Path) -> None:
    """`pip install` of lab must give a working `fewstep` on PATH, outside the repository."""
    assert "run" in run(alone.python.parent / "fewstep", "--help", cwd=tmp_path)


@pytest.mark.parametrize("name", LIBRARIES)
def test_declared_third_party_distributions(name: str, wheels: dict[str, Wheel]) -> None:
    """The libraries promise to need torch only (models: safetensors too); one more line here is everyone's download."""
    declared = {canonicalize_name(r.name) for r in wheels[name].requirements()}
    assert {d for d in declared if not d.startswith("fewstep-")} == FOREIGN[name]


@pytest.mark.parametrize("name", FOLDERS)
def test_wheel_holds_its_own_subpackage_whole(name: str, wheels: dict[str, Wheel]) -> None:
    """A wheel that writes outside fewstep/<name> would overwrite a sibling or close the namespace to the others; one
    that lacks a file works only from a clone.
    """
    source = FOLDERS[name] / "src"
    wanted = {str(p.relative_to(source)) for p in (source / "fewstep" / name).rglob("*") if p.is_file()}
    wanted = {p for p in wanted if "__pycache__" not in p}
    packed = {p for p in wheels[name].names if ".dist-info/" not in p}
    assert packed == wanted
    assert all(p.startswith(f"fewstep/{name}/") for p in packed)
    assert f"fewstep/{name}/py.typed" in packed, "without py.typed type checkers ignore the annotations"
    assert any(p.endswith("/licenses/LICENSE") for p in wheels[name].names), "Apache-2.0 asks that a copy come along"


@pytest.mark.slow
def test_real_installation(tmp_path: Path) -> None:
    """The README's install line, with the real torch from the registry, at the version under test."""
    home = tmp_path / "venv"
    pinned = tmp_path / "constraints.txt"
    pinned.write_text("".join(f"{d.name}=={d.version.split('+')[0]}\n" for d in third_party_installed()))
    folders = [FOLDERS[name] for name in ("kernels", "schedules", "samplers")]
    uv("venv", "--quiet", "--python", sys.executable, home)
    try:
        uv("pip", "install", "--python", home, "--constraints", pinned, *folders)
        found = importable(Alone("samplers", home / "bin/python"), [f"fewstep.{name}" for name in FOLDERS], tmp_path)
        assert found == {f"fewstep.{name}" for name in NEEDS["samplers"]}
        Alone("samplers", home / "bin/python").run(readme_example("samplers"), tmp_path)
    finally:
        shutil.rmtree(home)


def third_party_installed() -> list[metadata.Distribution]:
    """Distributions of the test environment that a registry has."""
    return [d for d in metadata.distributions() if not canonicalize_name(d.name).startswith("fewstep-")]
