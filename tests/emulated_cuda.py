"""CUDA kernels on the CPU: a `kernel.cu` compiled by g++ against simt_emulator.h, behind the same Python as on a GPU.

`emulated()` makes backend "cuda" run emulated kernels on CPU tensors, so that a test written for one fused backend
serves both. `schedules()` are what every kernel must give the same bits under. `sanitized("module:function", "thread")`
runs a function of a helper module in tests/ in a process where kernels are watched by ThreadSanitizer or
AddressSanitizer, and returns the report, empty if there is none; by hand:

    python tests/emulated_cuda.py thread guided_update_cases:run
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import os
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING
from unittest import mock

import pybind11

from fewstep.kernels import backend, build, use_backend

if TYPE_CHECKING:                                                  # not needed under a sanitizer
    import pytest
    from torch import Tensor

HERE = Path(__file__).parent
BUILT = HERE.parent / ".pytest_cache" / "emulated"
SANITIZERS = {"thread": ("-fsanitize=thread", "-DSIMT_TSAN"), "address": ("-fsanitize=address",), None: ()}
Plant = tuple[str, str] | None
SUPPRESSIONS = "race_top:simt::\n"


@functools.cache
def module(operation: str, sanitizer: str | None = None, plant: Plant = None) -> ModuleType:
    """Return an operation's extension module with emulated kernels; see `emulated`."""
    texts = _planted(operation, plant)
    headers = {name: text for name, text in texts.items() if name.endswith(".h")}
    objects = [
        _compiled({name: text, **headers}, name, ("-O1", "-g", *SANITIZERS[sanitizer]) if name.endswith(".cu") else ())
        for name, text in sorted(texts.items()) if name not in headers
    ]
    folder = BUILT / _digest([path.parent.name for path in objects], sanitizer)
    target = folder / f"fewstep_{operation}{EXTENSION_SUFFIXES[0]}"
    if not target.exists():
        _run(["g++", *SANITIZERS[sanitizer], "-shared", *map(str, objects)], target)
    return build.import_module(operation, target)


def _planted(operation: str, plant: Plant) -> dict[str, str]:
    """Return the operation's files by name, with the bug planted; those of a probe stand in tests/."""
    own = [path for path in (HERE / operation).glob("*.*") if path.suffix in (".cu", ".cpp", ".h")]
    files = [*own, *(build.ROOT / "cuda").glob("*.h")] if own else build.sources(operation)
    texts = {path.name: path.read_text(encoding="utf-8") for path in files if not path.stem.endswith("_sm90a")}
    if plant is not None:
        holders = [name for name, text in texts.items() if plant[0] in text]
        assert len(holders) == 1, f"{plant[0]!r} must stand in one file, stands in {holders}"
        texts[holders[0]] = texts[holders[0]].replace(*plant)
    return texts


def _compiled(texts: dict[str, str], name: str, flags: tuple[str, ...]) -> Path:
    """Return the object file of one source, compiled unless that was done before; texts are it and its headers."""
    flags = ("-std=c++17", "-fPIC", "-w", *flags)
    emulator = HERE / "simt_emulator.h"
    target = BUILT / _digest(flags, sorted(texts.items()), emulator.read_text(encoding="utf-8")) / f"{name}.o"
    if not target.exists():
        includes = [HERE, _cuda_headers(), sysconfig.get_paths()["include"], pybind11.get_include()]
        with tempfile.TemporaryDirectory() as folder:
            for file, text in texts.items():
                Path(folder, file).write_text(text, encoding="utf-8")
            _run(["g++", *flags, *(f"-I{path}" for path in includes), "-x", "c++", "-c", f"{folder}/{name}"], target)
    return target


def _digest(*facts: object) -> str:
    return hashlib.sha256(repr((facts, sys.version)).encode()).hexdigest()[:16]


def _run(command: list[str], target: Path) -> None:
    """Run a compiler; its result is put into place at once, since several workers may want it at the same time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.{os.getpid()}")
    done = subprocess.run([*command, "-o", str(beside)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}\n{done.stderr[-6000:]}"
    os.replace(beside, target)


def _cuda_headers() -> Path:
    """Those of the wheels in the dev group, else of a toolkit."""
    wheels = Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu*/include")
    toolkit = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    found = [path for path in (*wheels, toolkit) if (path / "cuda_bf16.h").is_file()]
    assert found, "CUDA's headers are in the dev group's wheels: nvidia-cuda-nvcc, nvidia-cuda-runtime"
    return found[0]


@contextmanager
def emulated(sanitizer: str | None = None, plant: Plant = None) -> Iterator[None]:
    """Within, backend "cuda" runs emulated kernels on CPU tensors; `use_backend` selects it.

    `plant` is a bug to plant, (text of one of the sources, what stands there instead): tests are tested with it.
    """

    def load(operation: str) -> ModuleType:
        return module(operation, sanitizer, plant)

    def absence(*facts: object) -> None:                           # a function, not a mock: torch.compile traces it
        """Everything is there."""

    with mock.patch.object(build, "load", load), mock.patch.object(backend, "_absence", absence):
        yield


def schedules() -> list[dict[str, str]]:
    """Return environments: three orders of warps and blocks, copies as late or as early as they may be."""
    return [{"SIMT_ORDER": order, "SIMT_COPIES": copies} for order in "012" for copies in ("lazy", "eager")]


def under(
    run: Callable[[], list[Tensor]], schedule: dict[str, str], monkeypatch: pytest.MonkeyPatch, plant: Plant = None
) -> list[Tensor]:
    """Return what `run` gives with emulated kernels under a schedule."""
    for name, value in schedule.items():
        monkeypatch.setenv(name, value)
    with emulated(plant=plant), use_backend("cuda"):
        return run()


def sanitized(function: str, sanitizer: str, plant: Plant = None, **environment: str) -> str:
    """Run "module:function" with backend "cuda" under a sanitizer; return its report, "" if it found nothing."""
    runtime = {"thread": "libtsan.so", "address": "libasan.so"}[sanitizer]
    preload = subprocess.run(["g++", f"-print-file-name={runtime}"], capture_output=True, text=True, check=True).stdout
    BUILT.mkdir(parents=True, exist_ok=True)
    suppressions = BUILT / "suppressions"
    suppressions.write_text(SUPPRESSIONS, encoding="utf-8")
    settings = {
        "LD_PRELOAD": preload.strip(), "OMP_NUM_THREADS": "1", "ASAN_OPTIONS": "detect_leaks=0:exitcode=66",
        "TSAN_OPTIONS": f"ignore_noninstrumented_modules=1:exitcode=66:suppressions={suppressions}",
    }
    command = [sys.executable, __file__, sanitizer, function, *(plant or ())]
    done = subprocess.run(command, env=os.environ | settings | environment, capture_output=True, text=True, check=False)
    assert done.returncode in (0, 66), f"{command}\n{done.stdout[-2000:]}{done.stderr[-6000:]}"
    return done.stderr if done.returncode else ""


def main(sanitizer: str, function: str, *plant: str) -> None:
    """Run the function here."""
    name, _, attribute = function.partition(":")
    with emulated(sanitizer, (plant[0], plant[1]) if plant else None), use_backend("cuda"):
        getattr(importlib.import_module(name), attribute)()


if __name__ == "__main__":
    main(*sys.argv[1:])
