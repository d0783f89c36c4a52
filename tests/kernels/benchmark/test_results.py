"""Results files: floors by hand, rows that are completed and kept, files that are whole."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from fewstep.kernels.benchmark.ceilings import floor_us, rates
from fewstep.kernels.benchmark.results import Results, read

MADE = {"device": "d", "versions": {"torch": "2"}, "commit": "one"}


def ceiling(op: str, us: float, moved: int = 0, flops: int = 0, dtype: str = "fp32") -> dict[str, Any]:
    return {
        "op": op, "pass": "forward", "shape": "s", "dtype": dtype, "layout": "l", "backend": "torch", "us": us,
        "bytes": moved, "flops": flops,
    }  # fmt: skip


def timed(us: float, moved: int, flops: int, dtype: str = "bf16", backend: str = "triton") -> dict[str, Any]:
    return ceiling("norm", us, moved, flops, dtype) | {"backend": backend}


def test_floors_are_the_larger_of_two_times() -> None:
    """The ratio to the floor is the figure by which kernels are judged."""
    # 2 GB in 1 ms are 2e12 bytes/s; 4e12 flop in 8 ms are 5e14 flop/s
    known = rates([
        ceiling("copy", 1000.0, 2_000_000_000), ceiling("product", 8000.0, 0, 4 * 10**12, "bf16"),
        ceiling("product", 100_000.0, 0, 4 * 10**12, "fp32"),
    ])  # fmt: skip
    assert known == {"copy": 2e12, "bf16": 5e14, "fp16": 5e14, "fp32": 4e13}
    assert floor_us(100_000_000, 0, "bf16", known) == pytest.approx(50.0)             # 1e8 B / 2e12 B/s
    assert floor_us(100_000_000, 10**11, "bf16", known) == pytest.approx(200.0)       # 1e11 / 5e14
    assert floor_us(100_000_000, 10**9, "bf16", known) == pytest.approx(50.0)
    assert floor_us(100_000_000, 10**10, "fp32", known) == pytest.approx(250.0)       # 1e10 / 4e13
    assert floor_us(100_000_000, 10**11, "bf16", {"copy": 2e12}) is None
    assert floor_us(1, 0, "bf16", {}) is None
    assert floor_us(0, 10**11, "bf16", {"copy": 2e12, "fp32": 4e13}) == pytest.approx(2500.0)


def test_rows_are_completed_whatever_comes_first(tmp_path: Path) -> None:
    """A row measured before the ceilings would otherwise never get its floor."""
    results = Results(tmp_path / "r.json", MADE)
    early = results.add(timed(100.0, 100_000_000, 0))
    assert early["floor_us"] is None
    results.add(ceiling("copy", 1000.0, 2_000_000_000))
    late = results.add(timed(40.0, 100_000_000, 0, backend="cuda"))
    rows = {row["backend"]: row for row in read(tmp_path / "r.json")["rows"]}
    assert rows["triton"]["floor_us"] == pytest.approx(50.0)
    assert rows["triton"]["ratio"] == pytest.approx(0.5)
    assert late["ratio"] == pytest.approx(1.25)
    assert {row["commit"] for row in rows.values()} == {"one"}


def test_a_check_and_a_time_of_one_run_make_one_row_and_another_run_starts_anew(tmp_path: Path) -> None:
    """The error of one commit's kernel beside the time of another's would be a row of nothing that ever existed."""
    path = tmp_path / "r.json"
    key = {name: value for name, value in timed(1.0, 1, 0).items() if name not in ("us", "bytes", "flops")}
    results = Results(path, MADE)
    results.add({**key, "rel_err": 1e-3, "limit": 1e-2})
    assert results.add(timed(10.0, 1, 0))["rel_err"] == 1e-3
    again = Results(path, MADE)                       # the same commit and machine, later
    assert again.add(timed(11.0, 1, 0))["rel_err"] == 1e-3
    other = Results(path, {**MADE, "commit": "two"})
    other.add(timed(1.0, 1, 0, backend="eager"))
    row = other.add({**key, "rel_err": 2e-3, "limit": 1e-2})
    assert "us" not in row
    assert {r["backend"]: r["commit"] for r in read(path)["rows"]} == {"triton": "two", "eager": "two"}


def test_a_write_that_fails_leaves_the_file_before_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is killed while it writes must keep what it had."""
    path = tmp_path / "r.json"
    results = Results(path, MADE)
    results.add(timed(10.0, 1, 0))
    before = path.read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        results.add(timed(11.0, 1, 0, backend="cuda"))
    assert path.read_text() == before


def test_not_a_number_survives(tmp_path: Path) -> None:
    """An error of NaN means unwritten memory; JSON has no NaN, and a reader that chokes on it would hide the rest."""
    results = Results(tmp_path / "r.json", MADE)
    results.add({**timed(1.0, 1, 0), "rel_err": math.nan, "limit": 1e-2})
    assert math.isnan(read(tmp_path / "r.json")["rows"][0]["rel_err"])


OTHERS = ["", "[]", '{"format": 1, "rows": [{"op": "x"}]}', '{"format": 99, "rows": []}', "\x00"]


@pytest.mark.parametrize("text", OTHERS)
def test_other_files_are_refused_in_one_line(tmp_path: Path, text: str) -> None:
    """A wrong file must not end in a traceback, nor be overwritten."""
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(ValueError, match="is not a results file") as error:
        Results(path, MADE)
    assert "\n" not in str(error.value)
    assert path.read_text() == text


def test_rows_are_one_per_line(tmp_path: Path) -> None:
    """Results are committed: a changed figure must be a changed line."""
    results = Results(tmp_path / "r.json", MADE)
    for backend in ("triton", "cuda", "eager"):
        results.add(timed(1.0, 1, 0, backend=backend))
    lines = (tmp_path / "r.json").read_text().splitlines()
    assert sum('"op"' in line for line in lines) == 3
    assert json.loads("\n".join(lines))["format"] == 1
