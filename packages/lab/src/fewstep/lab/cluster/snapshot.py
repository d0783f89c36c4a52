"""The code as it was at submission: what a job runs, however long it waits and however often it is requeued."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path

from fewstep.lab import record


def take(folder: Path) -> None:
    """Copy every installed package of fewstep into `folder`, which then comes first in the jobs' PYTHONPATH."""
    namespace = find_spec("fewstep")
    assert namespace is not None  # this module is in it
    ignored = shutil.ignore_patterns("__pycache__")
    taken = set()
    for root in map(Path, namespace.submodule_search_locations or ()):
        for package in sorted(root.iterdir()):
            if package.is_dir() and package.name not in taken and package.name != "__pycache__":
                shutil.copytree(package, folder / "fewstep" / package.name, ignore=ignored)
                taken.add(package.name)
    (folder / record.COMMIT).write_text(record.commit() + "\n")
