"""tools/gpu_check.py: the dry run goes through all that a GPU run does; a killed run keeps its rows."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.kernels.benchmark import operations
from fewstep.kernels.benchmark.results import KEY, read
from fewstep.kernels.benchmark.summary import is_ours, wrong
from fewstep.lab.profile import end_to_end

TOOL = Path(__file__).parents[2] / "tools/gpu_check.py"
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
