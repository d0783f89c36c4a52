"""Modules with a bug planted in their source: a test is worth what it catches."""

import importlib.util
from pathlib import Path
from types import ModuleType


def mutant(module: ModuleType, folder: Path, *changes: tuple[str, str]) -> ModuleType:
    """Import a copy of `module`, written to `folder`, in which the second text of each pair stands for the first."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text(encoding="utf-8")
    for right, wrong in changes:
        assert right in source, f"{module.__name__} has no {right!r}: the planted bug is out of date"
        source = source.replace(right, wrong)
    path = folder / "mutant.py"
    path.write_text(source, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    return planted
