"""What the repository itself must and must not hold."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# written so that no pattern matches itself: this file is tracked too
REGISTRY_HOSTS = r"py[p]i\.org|python[h]osted\.org|download\.py[t]orch\.org|registry\.n[p]mjs|conda\.[a]naconda"
MACHINE_PATHS = r"/wor[k]/(main|shared)|/opt/(pyp[i]|wheel[s])|/roo[t]/\.pyenv"
PICKLE_STARTS = tuple(b"\x80" + bytes([protocol]) for protocol in range(2, 6))
PICKLE_SUFFIXES = {".pkl", ".pickle", ".pt", ".pth", ".ckpt", ".bin", ".joblib"}


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Files under version control."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def matches(pattern: str, files: list[Path]) -> list[str]:
    """Where a pattern occurs, as path: text."""
    found = ((path, re.search(pattern, path.read_text(errors="ignore"))) for path in files)
    return [f"{path.relative_to(ROOT)}: {match[0]}" for path, match in found if match]


def test_no_registry_is_named(tracked: list[Path]) -> None:
    """A committed registry host sends every user's installation there, whatever mirror they use."""
    assert matches(REGISTRY_HOSTS, tracked) == []


def test_no_path_of_a_machine(tracked: list[Path]) -> None:
    """A path of the machine that something was written on works nowhere else."""
    assert matches(f"{MACHINE_PATHS}|{re.escape(str(ROOT))}/", tracked) == []


def test_nothing_generated_is_tracked(tracked: list[Path]) -> None:
    """Locks name registries; environments, caches and runs belong to one machine."""
    parts = {part for path in tracked for part in path.relative_to(ROOT).parts}
    assert parts & {"uv.lock", ".venv", ".uv", "__pycache__", "runs", "dist", "build"} == set()


def test_no_pickle(tracked: list[Path]) -> None:
    """Opening a pickle runs whatever it holds; weights are safetensors here."""
    suspicious = [p for p in tracked if p.suffix in PICKLE_SUFFIXES or p.read_bytes().startswith(PICKLE_STARTS)]
    assert suspicious == []


def test_no_source_reads_pickles(tracked: list[Path]) -> None:
    """A checkpoint from a stranger must not be able to run code: no unpickling, and torch.load for tensors only."""
    sources = [p for p in tracked if p.suffix == ".py" and "src" in p.relative_to(ROOT).parts]
    assert matches(r"^\s*(import|from) (pickle|cloudpickle|dill|joblib)\b", sources) == []
    unsafe = r"(?<!safetensors\.)torch\.load\((?![^)]*weights_only=True)"
    assert matches(unsafe, sources) == []


def test_the_namespace_stays_open() -> None:
    """One fewstep/__init__.py would hide every other distribution's subpackage from import."""
    assert list(ROOT.glob("packages/*/src/fewstep/__init__.py")) + list(ROOT.glob("kernels/src/fewstep/*.py")) == []


@pytest.mark.parametrize("folder", ["packages/*", "kernels"])
def test_each_distribution_is_laid_out_alike(folder: str) -> None:
    """fewstep-<name> is found in .../<name>/src/fewstep/<name>, typed, with a README: tools and people rely on it."""
    for home in ROOT.glob(folder):
        package = home / "src/fewstep" / home.name
        assert f'name = "fewstep-{home.name}"' in (home / "pyproject.toml").read_text()
        assert (package / "py.typed").is_file()
        assert [p.name for p in (home / "src/fewstep").iterdir() if p.name != "__pycache__"] == [home.name]
        assert f"# fewstep-{home.name}" in (home / "README.md").read_text()
