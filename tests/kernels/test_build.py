"""CUDA kernels built and loaded: what is missing is named, what changed is built anew, nothing twice."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

from fewstep.kernels import build

CALL = (0,) * 5, [0] * 6, (0.0,) * 3


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_failures", {})
    return tmp_path


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to install; "auto" shows this text once and goes on with Triton."""
    assert build.absence() is None                                # the dev group has all of it
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: pytest.fail("looked for again: 100 us of a dispatch"))
    assert build.absence("attention") is None
    monkeypatch.setattr(build, "_is_installed", lambda name: name != "pybind11")
    assert build.absence() == "pybind11 not installed: pip install 'fewstep-kernels[cuda]'"
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.absence() == "no C++ compiler was found: install no-such-compiler, or set CXX"
    monkeypatch.setattr(build, "nvcc", lambda: None)
    assert str(build.absence()).startswith("nvcc was not found: install a CUDA toolkit or nvidia-cuda-nvcc")
    with pytest.raises(RuntimeError, match="CUDA kernels cannot be built: nvcc was not found"):
        build.build(["guided_update"], ("sm_90",))


def test_what_was_built_ahead_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """An image of a cluster has the modules that `--all` made and no nvcc; GPUs of two kinds get a module each."""
    ahead = build.built("attention", build.ARCHITECTURES)
    ahead.parent.mkdir(parents=True)
    ahead.touch()
    build._is_built.cache_clear()
    monkeypatch.setattr(build, "nvcc", lambda: None)
    assert build.absence("attention") is None
    assert "nvcc was not found" in str(build.absence("guided_update"))
    monkeypatch.setattr(build, "build", lambda names, architectures: [architectures])
    monkeypatch.setattr(build, "import_module", lambda name, path: path)
    build._loaded.cache_clear()
    for device in (("sm_80",), ("sm_90",), ("sm_80",)):
        monkeypatch.setattr(build, "present_architecture", lambda found=device: found)
        assert build.load("attention") == ahead
        assert build.load("guided_update") == device
    build._loaded.cache_clear()
    build._is_built.cache_clear()


def test_a_toolkit_that_is_not_on_the_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NVIDIA's packages and images put nvcc into /usr/local/cuda and leave the path to the user."""
    for name, value in (("PATH", str(tmp_path)), ("CUDA_HOME", "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(build.sysconfig, "get_paths", lambda: {"purelib": str(tmp_path)})
    monkeypatch.setattr(build, "TOOLKIT", tmp_path / "cuda")
    find = build.nvcc.__wrapped__
    assert find() is None
    (tmp_path / "cuda/bin").mkdir(parents=True)
    (tmp_path / "cuda/bin/nvcc").touch()
    assert find() == tmp_path / "cuda/bin/nvcc"


def test_a_change_of_anything_is_another_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stale kernel computes yesterday's numbers."""
    folder = tmp_path / "sources"
    for name in ("operation", "cuda"):
        (folder / name).mkdir(parents=True)
    monkeypatch.setattr(build, "ROOT", folder)
    places = [build.built("operation", ("sm_90",))]
    assert places[0] == build.built("operation", ("sm_90",))
    for file in ("operation/kernel.cu", "operation/kernel.h", "operation/bindings.cpp", "cuda/simt.h"):
        (folder / file).write_text("int x;", encoding="utf-8")
        places.append(build.built("operation", ("sm_90",)))
    places.append(build.built("operation", ("sm_80",)))
    monkeypatch.setattr(build, "FLAGS", ("-O0",))
    places.append(build.built("operation", ("sm_90",)))
    assert len(set(places)) == 7


def test_the_file_for_ninja(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What needs Hopper's own instructions is compiled for sm_90a, all else never is: it would run nowhere else."""
    (tmp_path / "operation").mkdir()
    for name in ("kernel.cu", "cluster_sm90a.cu"):
        (tmp_path / "operation" / name).touch()
    monkeypatch.setattr(build, "ROOT", tmp_path)
    asked = {build.ARCHITECTURES: ["80", "89", "90", "100"], ("sm_90",): ["90"], ("sm_80",): ["80"]}
    for architectures, plain in asked.items():
        text = "\n".join(build.ninja_file(["operation"], architectures))
        codes = {name: re.findall(r"code=sm_(\w+)", rest) for name, rest in re.findall(r"build (\S+):(.*\n.*)", text)}
        special = ["90a"] if "90" in plain else []
        assert codes["operation_kernel.o"] == plain
        assert codes.get("operation_cluster_sm90a.o", []) == special
        linked = re.findall(r"build operation.so: link (.*)", text)[0].split()
        assert ("operation_cluster_sm90a.o" in linked) == bool(special)


@pytest.mark.slow
def test_built_once_and_loaded_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """nvcc, ninja and pybind11 do their parts; a launch that fails says so by its code."""
    (path,) = build.build(["guided_update"], ("sm_90",))
    monkeypatch.setattr(build, "_run_ninja", lambda *arguments: pytest.fail("built a second time"))
    assert build.build(["guided_update"], ("sm_90",)) == [path]
    module = build.import_module("guided_update", path)
    nothing = module.Call(*CALL[0], CALL[1], *CALL[2], 0, 1, 0, 0, 0, 0)
    with pytest.raises(RuntimeError, match=r"guided_update: the launch failed with CUDA error [1-9]"):
        build.checked(module.forward(nothing, 0, 0), "guided_update")


def test_a_compiler_that_fails_is_quoted_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "FLAGS", ("--no-such-flag",))
    monkeypatch.setenv("CXX", "true")                             # not the time for the other file
    with pytest.raises(RuntimeError, match=r"CUDA kernels of guided_update: compiling failed\n[\s\S]*no-such-flag"):
        build.build(["guided_update"], ("sm_90",))
    assert build.absence("guided_update") == "its CUDA kernels could not be compiled"
    assert build.absence("attention") is None


def test_the_command_line_wants_a_gpu_or_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], cache: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["build"])
    with pytest.raises(SystemExit):
        build.main()
    assert "no GPU is here: name architectures, or --all" in capsys.readouterr().err
    asked = []
    monkeypatch.setattr(build, "build", lambda wanted, targets: asked.append(targets) or [cache / "module.so"])
    for arguments, targets in ((["--all"], [build.ARCHITECTURES]), (["sm_80", "sm_90"], [("sm_80",), ("sm_90",)])):
        asked.clear()
        monkeypatch.setattr(sys, "argv", ["build", *arguments])
        build.main()
        assert asked == targets                                   # together in one module, `load` would not find them
    assert str(cache / "module.so") in capsys.readouterr().out
    for name in ("sm90", "sm_90a"):
        monkeypatch.setattr(sys, "argv", ["build", name])
        with pytest.raises(SystemExit):
            build.main()
        assert f"architecture '{name}': must be like sm_80" in capsys.readouterr().err
