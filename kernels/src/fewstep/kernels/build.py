"""CUDA kernels compiled by nvcc and loaded: at first use for the GPU that is there, or ahead for all.

    python -m fewstep.kernels.build --all          # sm_80, 89, 90, 90a and 100
    python -m fewstep.kernels.build sm_80 sm_90    # some architectures

An operation that has CUDA kernels has in its folder `kernel.cu` (torch-free, extern "C", written for cuda/simt.h),
perhaps further `*.cu`, `kernel.h` with what these export, and `bindings.cpp`, a pybind11 module called
fewstep_<operation>. A `*_sm90a.cu` is compiled for sm_90a only and left out where no sm_90 is asked for, so what it
exports is weak. The operation's `cuda_kernel.py` calls `build.load(operation)`. What was built stays in $FEWSTEP_CACHE,
else $XDG_CACHE_HOME/fewstep, else ~/.cache/fewstep, under a hash of sources, flags and Python; what was built ahead
needs no compiler. To build takes nvcc (a CUDA toolkit, or nvidia-cuda-nvcc from PyPI), a C++ compiler, and the extra
`fewstep-kernels[cuda]`.
"""

import argparse
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

ROOT = Path(__file__).parent
ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_90a", "sm_100")
TOOLKIT = Path("/usr/local/cuda")                # where NVIDIA's packages put it, often without a place on $PATH
FLAGS = ("-std=c++17", "-O3", "-Xcompiler=-fPIC")
_failures: dict[str, str] = {}


def operations() -> tuple[str, ...]:
    """Return the operations that have CUDA kernels."""
    return tuple(sorted(path.parent.name for path in ROOT.glob("*/kernel.cu")))


@functools.cache
def nvcc() -> Path | None:
    """Return CUDA's compiler: of $CUDA_HOME, $PATH, the wheels from PyPI, or where a toolkit stands; None without."""
    wheels = [Path(p) / "bin/nvcc" for p in sorted(Path(sysconfig.get_paths()["purelib"]).glob("nvidia/cu*"))]
    home = os.environ.get("CUDA_HOME")
    candidates = [Path(home) / "bin/nvcc"] if home else []
    found = shutil.which("nvcc")
    candidates += [Path(found)] if found else []
    return next((path for path in (*candidates, *wheels, TOOLKIT / "bin/nvcc") if path.is_file()), None)


def absence(operation: str | None = None) -> str | None:
    """Return why CUDA kernels (of an operation) are not built and cannot be built here, or None."""
    if operation in _failures:
        return _failures[operation]
    if operation is not None and _is_built(operation):
        return None
    if nvcc() is None:
        return "nvcc was not found: install a CUDA toolkit or nvidia-cuda-nvcc, or set CUDA_HOME"
    if not _is_found(cxx()):
        return f"no C++ compiler was found: install {cxx()}, or set CXX"
    missing = [name for name in ("ninja", "pybind11") if not _is_installed(name)]
    return f"{' and '.join(missing)} not installed: pip install 'fewstep-kernels[cuda]'" if missing else None


@functools.cache
def _is_built(operation: str) -> bool:
    """Return whether the module for the present GPU is there; looked for once, as the rest."""
    places = [ARCHITECTURES, *([present_architecture()] if torch.cuda.is_available() else [])]
    return any(built(operation, architectures).exists() for architectures in places)


def cxx() -> str:
    """Return the C++ compiler."""
    return os.environ.get("CXX") or "g++"


@functools.cache
def _is_found(command: str) -> bool:
    return shutil.which(command) is not None


@functools.cache
def _is_installed(name: str) -> bool:
    """Return whether a module can be imported; looked for once, since every dispatch to these kernels asks."""
    return importlib.util.find_spec(name) is not None


def cache_folder() -> Path:
    """Return where what was built stays."""
    if "FEWSTEP_CACHE" in os.environ:
        return Path(os.environ["FEWSTEP_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fewstep"


def load(operation: str) -> ModuleType:
    """Return an operation's extension module, built for the present GPU if it was not built before.

    Raises:
        RuntimeError: it cannot be built; says what is missing, or ends with the compiler's words.
    """
    return _loaded(operation, present_architecture())


@functools.cache
def _loaded(operation: str, architecture: tuple[str, ...]) -> ModuleType:
    ahead = built(operation, ARCHITECTURES)
    return import_module(operation, ahead if ahead.exists() else build([operation], architecture)[0])


def present_architecture() -> tuple[str, ...]:
    """Return the architecture of the present GPU."""
    return _architecture(torch.cuda.current_device())


@functools.cache
def _architecture(device: int) -> tuple[str, ...]:
    major, minor = torch.cuda.get_device_capability(device)
    return (f"sm_{major}{minor}",)


def import_module(operation: str, path: Path) -> ModuleType:
    """Import an extension from its file; its folder is part of its name, by which pybind11 knows a module again."""
    spec = importlib.util.spec_from_file_location(f"{path.parent.name}.fewstep_{operation}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources(operation: str) -> list[Path]:
    """Return the files that an operation's module is made of."""
    folder = ROOT / operation
    return sorted([*folder.glob("*.cu"), *folder.glob("*.cpp"), *folder.glob("*.h"), *(ROOT / "cuda").glob("*.h")])


def built(operation: str, architectures: tuple[str, ...]) -> Path:
    """Return where the module is or will be, by a hash of all that it is made of."""
    digest = hashlib.sha256(repr([sys.version, FLAGS, architectures]).encode())
    for path in sources(operation):
        digest.update(path.name.encode() + path.read_bytes())
    return cache_folder() / digest.hexdigest()[:16] / f"fewstep_{operation}{EXTENSION_SUFFIXES[0]}"


def build(wanted: list[str], architectures: tuple[str, ...]) -> list[Path]:
    """Build the modules of operations and return their paths; those that were built before are not built again.

    Raises:
        RuntimeError: a tool is missing or a compiler fails.
    """
    targets = {operation: built(operation, architectures) for operation in wanted}
    needed = {operation: path for operation, path in targets.items() if not path.exists()}
    if needed:
        reason = absence()
        if reason is not None:
            raise RuntimeError(f"CUDA kernels cannot be built: {reason}")
        with tempfile.TemporaryDirectory() as folder:
            _run_ninja(Path(folder), list(needed), architectures)
            for operation, path in needed.items():
                _put(Path(folder) / f"{operation}.so", path)
    return list(targets.values())


def _run_ninja(folder: Path, wanted: list[str], architectures: tuple[str, ...]) -> None:
    import ninja

    (folder / "build.ninja").write_text("\n".join(ninja_file(wanted, architectures)) + "\n", encoding="utf-8")
    command = [str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = f"compiling failed\n{done.stdout[-4000:]}{done.stderr[-1000:]}"
        _failures.update(dict.fromkeys(wanted, "its CUDA kernels could not be compiled"))
        raise RuntimeError(f"CUDA kernels of {', '.join(wanted)}: {reason}")


def ninja_file(wanted: list[str], architectures: tuple[str, ...]) -> list[str]:
    """Return the lines of build.ninja: objects by nvcc and g++, one shared library per operation."""
    import pybind11

    compiler = nvcc()
    assert compiler is not None
    libraries = [compiler.parent.parent / name for name in ("lib64", "lib")]        # the wheels have lib only
    lines = [
        f"nvcc = {compiler}",
        f"flags = {' '.join(FLAGS)} -I{ROOT / 'cuda'}",
        f"links = {' '.join(f'-L{path}' for path in libraries if path.is_dir())}",
        f"python = -I{sysconfig.get_paths()['include']} -I{pybind11.get_include()}",
        "rule cuda\n command = $nvcc $flags $gencode -MD -MF $out.d -c $in -o $out\n depfile = $out.d",
        f"rule cpp\n command = {cxx()} -std=c++17 -O2 -fPIC $python -c $in -o $out",
        "rule link\n command = $nvcc -shared $links $in -o $out",
    ]
    for operation in wanted:
        objects = []
        for path in sorted((ROOT / operation).glob("*.cu")):
            targets = _targets(path, architectures)
            if targets:
                objects.append(f"{operation}_{path.stem}.o")
                lines.append(f"build {objects[-1]}: cuda {path}\n gencode = {' '.join(map(_gencode, targets))}")
        lines.append(f"build {operation}_bindings.o: cpp {ROOT / operation / 'bindings.cpp'}")
        lines.append(f"build {operation}.so: link {' '.join(objects)} {operation}_bindings.o")
    return lines


def _targets(source: Path, architectures: tuple[str, ...]) -> list[str]:
    if source.stem.endswith("_sm90a"):
        return ["sm_90a"] if {"sm_90", "sm_90a"} & set(architectures) else []
    return [arch for arch in architectures if arch != "sm_90a"]


def _gencode(arch: str) -> str:
    return f"-gencode arch={arch.replace('sm', 'compute')},code={arch}"


def _put(source: Path, target: Path) -> None:
    """Move a file into place at once, since several processes may do so at the same time."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copyfile(source, beside)
    os.replace(beside, target)


def address(tensor: Tensor | None) -> int:
    """Return where a tensor starts, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def stream(tensor: Tensor) -> int:
    """Return the present CUDA stream of a tensor's device; 0 for CPU tensors (emulated kernels)."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0


def checked(code: int, what: str) -> None:
    """Raise RuntimeError if a launch returned CUDA's error code."""
    if code:
        raise RuntimeError(f"{what}: the launch failed with CUDA error {code}")


def main() -> None:
    """Build what the command line asks for and say where it is."""
    about = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m fewstep.kernels.build", description=about)
    parser.add_argument("architectures", nargs="*", metavar="sm_90", help="architectures; by default the present GPU's")
    parser.add_argument("--all", action="store_true", help=f"for {', '.join(ARCHITECTURES)}")
    chosen = parser.parse_args()
    if not chosen.all and not chosen.architectures and not torch.cuda.is_available():
        parser.error("no GPU is here: name architectures, or --all")
    unknown = [name for name in chosen.architectures if not re.fullmatch(r"sm_\d+", name)]
    if unknown:
        parser.error(f"architecture {unknown[0]!r}: must be like sm_80; sm_90 brings what needs sm_90a")
    named: list[tuple[str, ...]] = [(name,) for name in chosen.architectures]       # as `load` looks for modules
    for targets in [ARCHITECTURES] if chosen.all else named or [present_architecture()]:
        try:
            paths = build(list(operations()), targets)
        except RuntimeError as error:
            sys.exit(str(error))
        print(*paths, sep="\n")


if __name__ == "__main__":
    main()
