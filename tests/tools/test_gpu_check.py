"""tools/gpu_check.py: the dry run goes through all that a GPU run does; a killed run keeps its rows."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from fewstep.kernels.benchmark import operations
from fewstep.kernels.benchmark.results import KEY, Results, read
from fewstep.kernels.benchmark.runner import Run
from fewstep.kernels.benchmark.summary import is_ours, wrong
from fewstep.kernels.benchmark.task import Settings
from fewstep.lab.profile import end_to_end

TOOL = Path(__file__).parents[2] / "tools/gpu_check.py"
MADE = {"device": "d", "versions": {}, "commit": "c"}
DRY = ["--dry-run", "--minutes", "20"]           # on a busy machine; alone it takes well under one


def tool(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run(
        [sys.executable, str(TOOL), *arguments], cwd=folder, env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=1300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """One dry run of everything and its file."""
    folder = tmp_path_factory.mktemp("dry")
    done = tool(*DRY, "--results", str(folder), "--commit", "abc", folder=folder)
    return done, read(folder / "dry_run.json")


@pytest.mark.slow
def test_everything_is_measured_and_right(dry_run: tuple[subprocess.CompletedProcess[str], dict[str, Any]]) -> None:
    """Time on a GPU is borrowed: the code that spends it must not be tried there first."""
    done, found = dry_run
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert found["notes"] == {}
    rows = found["rows"]
    assert {row["op"] for row in rows} == {"copy", "product", *operations.operations(), *end_to_end.operations()}
    assert [text for row in rows if (text := wrong(row)) is not None] == []
    assert sum("rel_err" in row and is_ours(row["backend"]) for row in rows) >= 15
    fused = {row["op"] for row in rows if row["backend"] == "triton"}
    assert fused == set(operations.operations())


@pytest.mark.slow
def test_rows_say_what_they_are_of(dry_run: tuple[subprocess.CompletedProcess[str], dict[str, Any]]) -> None:
    """A figure without device, versions and commit can be neither trusted nor made again."""
    for row in dry_run[1]["rows"]:
        assert row["commit"] == "abc"
        assert row["versions"]["torch"] == torch.__version__.split("+")[0]
        assert row["device"]
        assert all(row[name] for name in KEY)
    timed = [row for row in dry_run[1]["rows"] if "us" in row and row["op"] in operations.operations()]
    assert {row["pass"] for row in timed} == {"forward", "backward"}
    assert {"eager", "compile", "reference", "triton"} <= {row["backend"] for row in timed}
    assert all(row["ratio"] == pytest.approx(row["floor_us"] / row["us"]) for row in timed)


def test_a_killed_run_keeps_its_rows(tmp_path: Path) -> None:
    """A lent machine may be taken back at any moment."""
    command = [sys.executable, str(TOOL), *DRY, "--op", "guided_update", "--results", str(tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    path, patience = tmp_path / "dry_run.json", time.monotonic() + 300
    while time.monotonic() < patience and process.poll() is None:
        if path.exists() and path.read_text().count('"op"') >= 4:
            break
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert len(json.loads(path.read_text())["rows"]) >= 4
    assert all(set(KEY) <= set(row) for row in read(path)["rows"])


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The tool as a module, with tasks that need no GPU."""
    spec = importlib.util.spec_from_file_location("gpu_check", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setenv("PYTHONPATH", str(TOOL.parents[1] / "tests"))
    monkeypatch.setattr(module, "OPERATIONS", "benchmark_tasks")
    monkeypatch.setattr(module, "BUILDING", 1.0)
    monkeypatch.setattr("fewstep.kernels.build.absence", lambda: None)
    return module


def run_of(folder: Path, *names: str) -> Run:
    settings, results = Settings("cpu", "tiny", ops=names), Results(folder / "r.json", MADE)
    return Run(settings, results, time.monotonic() + 300, 60.0, print)


@pytest.mark.slow
def test_a_run_on_a_gpu_goes_through_its_stages(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a dry run leaves out: compilers before the checks, tests beside them, what was left over last."""
    code = {"fewstep.kernels.build": "print('compiling')", "pytest": "print('1 failed'); exit(1)"}
    start = check.Process
    monkeypatch.setattr(check, "Process", lambda arguments: start(["-c", code[arguments[1]]]))
    run = run_of(tmp_path, "a_good", "b_full", "late_good")
    assert check.measure(run, ["benchmark_tasks"], 300.0)          # tests failed
    assert {key[0] for key in run.results.rows} == {"a_good", "late_good"}
    assert run.failed == ["b_full triton"]                         # once beside others, and once more alone
    assert run.settings.without == ()
    assert "1 failed" in capsys.readouterr().out


COMPILERS = {
    "fail": ("print('ptxas: no'); exit(1)", "ptxas: no", "the CUDA kernels do not compile"),
    "hang": ("import time; print('one of two', flush=True); time.sleep(600)", "one of two", "1 s were not enough"),
}


@pytest.mark.parametrize("kind", COMPILERS)
def test_cuda_that_does_not_compile_is_tried_once(
    kind: str, check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else each of the workers would try, for the rest of the run, and nobody would learn why it fails."""
    code, words, note = COMPILERS[kind]
    run = run_of(tmp_path)
    check.finish_build(run, check.Process(["-c", code]))
    assert run.settings.without == ("cuda",)
    assert check.complaints(run) == [f"build cuda: {note}"]
    assert words in capsys.readouterr().out


def test_a_backend_left_out_leaves_its_variants_too() -> None:
    """Each task of CUDA kernels that do not compile would have its process compile them anew."""
    settings = Settings("cuda", "gpu", without=("cuda",))
    wanted = [settings.wants("x", "s", "bf16", name) for name in ("cuda", "cuda+cluster", "triton", "eager")]
    assert wanted == [False, False, True, True]


def test_an_unknown_operation_is_one_line_that_names_the_known(tmp_path: Path) -> None:
    """A typing error must not cost minutes of a lent machine and then measure nothing."""
    done = tool("--dry-run", "--op", "group_norm", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "--op group_norm is unknown" in done.stderr
    assert all(name in done.stderr for name in ("group_norm_silu", "attention_qkv", "unet_train_step"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    """Nothing checked must not look like everything right."""
    done = tool(folder=tmp_path)
    assert done.returncode == 0
    assert "no CUDA device" in done.stdout
    assert list(tmp_path.iterdir()) == []
