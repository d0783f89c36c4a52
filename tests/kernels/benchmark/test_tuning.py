"""The tuning table that measurements give, and that dispatch then follows it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from profile_results import MADE, place

from fewstep.kernels import backend
from fewstep.kernels.benchmark.case import BACKWARD, FORWARD
from fewstep.kernels.benchmark.results import Results
from fewstep.kernels.benchmark.tuning import main, merged, table

NORM, ATTENTION = "group_norm_silu", "attention"


def case(op: str, shape: str, names: dict[str, str], us: dict[str, tuple[float, float]]) -> list[dict[str, Any]]:
    """Rows of one case: where it is filed, and forward and backward microseconds by backend."""
    pick = {"operation": op, "arch": "sm_90", "filed": names}
    found = [place(op, FORWARD, shape, "bf16", "contiguous", "auto") | pick]
    for name, both in us.items():
        for kind, value in zip((FORWARD, BACKWARD), both, strict=True):
            found.append(place(op, kind, shape, "bf16", "contiguous", name) | {
                "us": value, "rel_err": 1e-3, "limit": 1e-2, "same_bits": True,
            })
    return found


def alike(name: str) -> dict[str, str]:
    return {FORWARD: name, BACKWARD: name}


def test_a_training_step_is_what_counts_where_both_passes_share_a_place() -> None:
    rows = case(NORM, "a", alike("p"), {"triton": (1.0, 9.0), "cuda": (2.0, 4.0), "eager": (0.1, 0.1)})
    assert table(rows) == {NORM: {"sm_90": {"p": {"backend": "cuda"}}}}      # PyTorch's own cannot be dispatched to


def test_inference_and_training_are_chosen_apart_where_they_are_filed_apart() -> None:
    rows = case(ATTENTION, "a", {FORWARD: "i", BACKWARD: "t"}, {"triton": (1.0, 9.0), "reference": (2.0, 4.0)})
    assert table(rows) == {ATTENTION: {"sm_90": {"i": {"backend": "triton"}, "t": {"backend": "reference"}}}}


def test_shapes_that_share_a_place_weigh_alike() -> None:
    """By sums the large shape alone would decide; here triton is 4 times as fast on one, cuda 2 times on the other."""
    rows = case(NORM, "small", alike("p"), {"triton": (1.0, 1.0), "cuda": (4.0, 4.0)})
    rows += case(NORM, "large", alike("p"), {"triton": (200.0, 200.0), "cuda": (100.0, 100.0)})
    assert table(rows)[NORM]["sm_90"] == {"p": {"backend": "triton"}}
    rows += case(NORM, "third", alike("p"), {"cuda": (1.0, 1.0)})            # not timed with triton
    assert table(rows)[NORM]["sm_90"] == {"p": {"backend": "cuda"}}


@pytest.mark.parametrize("fault", [{"rel_err": 0.5}, {"rel_err": float("nan")}, {"same_bits": False}])
def test_a_wrong_backend_is_never_chosen(fault: dict[str, Any]) -> None:
    rows = case(NORM, "a", alike("p"), {"triton": (1.0, 1.0), "cuda": (5.0, 5.0)})
    rows[2] |= fault                                                         # triton's backward pass
    assert table(rows) == {NORM: {"sm_90": {"p": {"backend": "cuda"}}}}


def test_a_backend_that_nobody_checked_is_never_chosen() -> None:
    """A run whose time was up has times of kernels whose results it never looked at."""
    rows = case(NORM, "a", alike("p"), {"triton": (1.0, 1.0), "cuda": (5.0, 5.0)})
    del rows[2]["rel_err"]                                                   # triton's backward pass
    assert table(rows) == {NORM: {"sm_90": {"p": {"backend": "cuda"}}}}


def test_pytorchs_attention_is_chosen_where_it_is_faster() -> None:
    """Our reference of attention is PyTorch's operator; of a norm it is slower than what PyTorch's users write."""
    us = {"triton": (2.0, 9.0), "cuda": (3.0, 8.0), "eager": (1.0, 4.0), "flash": (0.5, 0.5)}
    rows = case(ATTENTION, "a", {FORWARD: "i", BACKWARD: "t"}, us)
    for row in rows:
        if row["backend"] == "eager":
            row["same_bits"] = False                                         # its backward pass has atomics
    assert table(rows) == {ATTENTION: {"sm_90": {"i": {"backend": "reference"}, "t": {"backend": "reference"}}}}
    assert table(case(NORM, "a", alike("p"), us)) == {NORM: {"sm_90": {"p": {"backend": "cuda"}}}}


def test_a_setting_goes_with_its_backend() -> None:
    rows = case(NORM, "a", alike("p"), {"cuda": (5.0, 5.0), "cuda+cluster": (1.0, 1.0)})
    assert table(rows) == {NORM: {"sm_90": {"p": {"backend": "cuda", "cluster": True}}}}


def test_rows_of_a_cpu_choose_nothing() -> None:
    rows = case(NORM, "a", alike("p"), {"triton": (1.0, 1.0)})
    assert table([{**row, "arch": None} if "arch" in row else row for row in rows]) == {}


def test_what_was_known_of_others_stays() -> None:
    old = {NORM: {"sm_80": {"p": {"backend": "triton"}}, "sm_90": {"q": {"backend": "triton"}}}}
    new = {NORM: {"sm_90": {"p": {"backend": "cuda"}}}}
    found = merged(old, new)
    assert found[NORM] == {"sm_80": old[NORM]["sm_80"], "sm_90": {"p": {"backend": "cuda"}, "q": {"backend": "triton"}}}


def test_dispatch_follows_the_written_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A place must be named in the file as a call asks for it: else every measurement is in vain, and silently."""
    q = torch.zeros(2, 3, 100, 64, dtype=torch.bfloat16)
    training = [x.clone().requires_grad_() for x in (q, q, q)]
    calls = {FORWARD: (q, q, q, 0.125, None, False), BACKWARD: (*training, 0.125, None, False)}
    names = {kind: backend.filed(ATTENTION, *call) for kind, call in calls.items()}
    results = Results(tmp_path / "gpu.json", MADE)
    for row in case(ATTENTION, "a", names, {"triton": (2.0, 1.0), "reference": (1.0, 9.0)}):
        results.add(row)
    file = tmp_path / "tuning.json"
    file.write_text("{}")
    assert main([str(results.path), "--table", str(file)]) == 0
    assert file.read_text() == "{}"
    assert f"{ATTENTION}  sm_90  {names[FORWARD]}" in capsys.readouterr().out
    assert main([str(results.path), "--table", str(file), "--write"]) == 0
    monkeypatch.setattr(backend, "_table", json.loads(file.read_text()))
    monkeypatch.setattr(backend, "_on_gpu", lambda args: True)
    monkeypatch.setattr(backend, "_absence", lambda *facts: None)
    monkeypatch.setattr(backend, "arch", lambda index: "sm_90")
    assert backend.explain(ATTENTION, *calls[FORWARD]) == backend.Choice("reference", "tuning table")
    assert backend.explain(ATTENTION, *calls[BACKWARD]) == backend.Choice("triton", "tuning table")
    capsys.readouterr()
    assert main([str(results.path), "--table", str(file)]) == 0
    assert capsys.readouterr().out == ""                                     # nothing is new any more


def test_a_file_without_a_gpu_is_said_to_be_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = Results(tmp_path / "cpu.json", MADE)
    results.write()
    assert main([str(results.path)]) == 1
    assert "no rows that a GPU was timed for" in capsys.readouterr().err
