"""Results of an evaluation that never was, in the form of `results.json`: plausible numbers for tests of the report."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from fewstep.lab.evaluation import FORMAT

STEPS, WEIGHTS = [16, 8, 4, 2, 1], [0.0, 1.0, 3.0]


def measured(w: float, error: float) -> dict[str, Any]:
    """A row that is worse the larger its error to the teacher is."""
    return {
        "samples": 1000,
        "fid_heldout": 1.31 + 0.9 * w + 40 * error**2,
        "fid_train": 1.02 + 0.9 * w + 41 * error**2,
        "kid": 0.011 + error**2,
        "kid_std": 0.002,
        "is": 8.4 + 0.3 * w - 6 * error**2,
        "precision": 0.9 - error,
        "recall": 0.8 - error - 0.1 * w,
        "accuracy": min(1.0, 0.981 + 0.006 * w) - 0.5 * error**2,
    }


def cost(model: str, sampler: str, steps: int, w: float, branches: int = 1) -> dict[str, Any]:
    nfe = steps * (branches if w > 0 else 1)
    described = {"model": model, "sampler": sampler, "steps": steps, "w": w, "nfe": nfe}
    return {**described, "images_per_second": 7000 / nfe}


def paired(error: float) -> dict[str, Any]:
    return {"paired_error": error, "paired_stderr": error / 40, "paired_noises": 128}


def student_error(steps: int, w: float) -> float:
    return (0.05 + 0.11 / steps**0.8) * (1 + 0.25 * w)


def baseline_error(calls: int, w: float, sampler: str) -> float:
    return (0.52 if sampler == "ddim" else 0.44) * (1 + 0.2 * w) / calls**0.7


def results() -> dict[str, Any]:
    rows, ratios, distances = [], [], []
    for w, steps in itertools.product(WEIGHTS, STEPS):
        error = student_error(steps, w)
        common = {"stage": "halve", "student_steps": steps}
        rows.append(
            {
                "role": "student",
                **common,
                **cost(f"halve/steps_{steps}", "ddim", steps, w),
                **measured(w, error),
                **paired(error),
                "teacher_distance": 20 * error**2,
            }
        )
        calls = steps if w == 0 else max(1, steps // 2)
        for sampler in ("ddim", "dpmpp_2m"):
            off = baseline_error(calls, w, sampler)
            rows.append(
                {
                    "role": "baseline",
                    "stage": "teacher",
                    "student_steps": steps,
                    **cost("teacher", sampler, calls, w, 2),
                    **measured(w, off),
                    **paired(off),
                    "teacher_distance": 22 * off**2,
                }
            )
        for found, measure in ((ratios, "paired_error"), (distances, "teacher_distance")):
            student, _, best = (row[measure] for row in rows[-3:])
            found.append(
                {
                    "w": w,
                    "steps": steps,
                    "nfe": steps,
                    "student": student,
                    "baseline": best,
                    "baseline_sampler": "dpmpp_2m",
                    "baseline_steps": calls,
                    "baseline_nfe": rows[-1]["nfe"],
                    "ratio": student / best,
                }
            )
    small = {"role": "other", "stage": "halve_small", "student_steps": 4}
    rows.append(
        {
            **small,
            **cost("halve_small/steps_4", "ddim", 4, 1.0),
            **measured(1.0, 0.1),
            **paired(0.1171),
            "teacher_distance": 0.31,
        }
    )
    return {
        "format": FORMAT,
        "experiment": "digits",
        "features": "digit-classifier features, not Inception",
        "settings": {
            "weights": WEIGHTS,
            "steps": STEPS,
            "headline": 4,
            "num_samples": 1000,
            "paired_noises": 128,
            "chunk": 250,
            "reference": {"sampler": "dpmpp_2m", "steps": 64},
            "truth": {"sampler": "ddim", "steps": 512},
            "curve_reference": {"sampler": "dpmpp_2m", "steps": 64},
            "curve_samples": 0,
            "check_noises": 64,
            "seed": 1,
            "kid_subsets": 50,
            "floor": False,
            "timing": {"repeats": 5, "teacher_steps": 8, "batches": [1, 64, 256]},
        },
        "judge": {"accuracy_heldout": 0.9911, "accuracy_train": 1.0},
        "data": {"name": "digits", "classes": 10, "train": 1347, "heldout": 450},
        "reference_check": [
            {"w": w, "sampler": "dpmpp_2m 64", "against": "ddim 512", **paired(0.0042 + 0.0011 * w)} for w in WEIGHTS
        ],
        "teacher": [
            {**cost("teacher", "dpmpp_2m", 64, w, 2), **measured(w, 0.0), "floor": 0.021 + 0.004 * w} for w in WEIGHTS
        ],
        "teacher_data": {
            "teacher": {**measured(0.0, 0.0), "samples": 1347},
            "ratio": 1.12,
            "training_images": {**measured(0.0, 0.0), "fid_heldout": 1.17, "samples": 1347},
        },
        "rows": rows,
        "paired_ratios": ratios,
        "distance_ratios": distances,
        "guidance_response": [
            {
                "steps": n,
                "w": 3.0,
                "w_none": 0.0,
                "noises": 128,
                "student": 0.31 - 0.03 / n,
                "teacher": 0.312,
                "ratio": (0.31 - 0.03 / n) / 0.312,
            }
            for n in STEPS
        ],
        "stage_one": [
            {"w": w, "sampler": s, "steps": 64, "nfe": 64, **paired(0.05 + 0.004 * w)}
            for w in WEIGHTS
            for s in ("ddim", "dpmpp_2m")
        ],
        "stage_shares": [row for w in WEIGHTS for row in shares(w)],
        "curve": [
            {
                "student_steps": n,
                **cost("m", "ddim", n or 64, w),
                **measured(w, student_error(n, w) if n else 0.0),
                "fid_heldout": 1.3 + (w - 0.3) ** 2 + (3 / n if n else 0),
                "is": 8 + 1.7 * w / (1 + w) - (0.8 / n if n else 0),
            }
            for w in (0.0, 0.3, 0.5, 1.0, 2.0, 3.0, 4.0)
            for n in (None, *STEPS)
        ],
        "networks": {
            "teacher": {"parameters": 523_000, "bytes": 2_100_000},
            "guide": {"parameters": 541_000, "bytes": 2_170_000},
            **{f"halve/steps_{n}": {"parameters": 541_000, "bytes": 2_170_000} for n in STEPS},
            "halve_small/steps_4": {"parameters": 262_000, "bytes": 1_050_000},
        },
        "timing": [timing(batch) for batch in (1, 64, 256)],
        "stage_seconds": {"classifier": 21.0, "teacher": 140.2, "guide": 95.1, "halve": 101.7},
        "circumstances": {
            "commit": "0123456789abcdef0123456789abcdef01234567",
            "seed": 0,
            "python": "3.11.7",
            "torch": "2.15.0",
            "device": "cpu",
            "cpu": "An Example CPU",
            "threads": 2,
            "workers": 2,
            "peak_memory_bytes": 1_900_000_000,
            "peak_memory_worker_bytes": 700_000_000,
            "finished": "2026-11-21T10:00:00Z",
        },
        "targets": [
            {
                "name": "paired error over best undistilled, w = 1, 4 steps",
                "value": 0.31,
                "kind": "at_most",
                "limit": 0.45,
                "aim": False,
                "pass": True,
            },
            {
                "name": "teacher: class accuracy, w = 1",
                "value": 0.987,
                "kind": "at_least",
                "limit": 0.99,
                "aim": False,
                "pass": False,
            },
            {
                "name": "stage one alone, 64 steps: paired error, w = 1",
                "value": 0.07,
                "kind": "at_most",
                "limit": 0.06,
                "aim": True,
                "pass": False,
            },
            {
                "name": "guidance response over teacher's, w = 3 against 0, 4 steps",
                "value": 0.96,
                "kind": "within",
                "limit": 0.15,
                "aim": False,
                "pass": True,
            },
            {
                "name": "FID to held-out over teacher's, w = 0, 4 steps",
                "value": None,
                "kind": "at_most",
                "limit": 1.5,
                "aim": False,
                "pass": False,
            },
        ],
    }


def shares(w: float) -> list[dict[str, Any]]:
    chain = [("stage one", 64, 0.05, 0.05 + 0.004 * w), ("fewer steps", 32, 0.012, 0.052 + 0.004 * w)]
    chain += [("student", n, 0.02 + 0.08 / n, student_error(n, w)) for n in STEPS]
    last, before, found = chain[-1][3], 0.0, []
    for stage, steps, own, total in chain:
        share = (total**2 - before**2) / last**2
        found.append({"w": w, "stage": stage, "steps": steps, "own": own, "accumulated": total, "share": share})
        before = total
    return found


def timing(batch: int) -> dict[str, Any]:
    call = 0.004 + batch / 7000
    whole = 512 * (0.004 + 2 * batch / 7000)
    students = [
        {
            "steps": n,
            "nfe": n,
            "seconds": n * call,
            "speed_up": whole / (n * call),
            "ideal_by_calls": 512 / n,
            "ideal_by_nfe": 1024 / n,
        }
        for n in STEPS
    ]
    teacher = {"sampler": "ddim", "steps": 512, "nfe": 1024, "seconds": whole, "timed_steps": 8}
    overhead = {"steps": 4, "repeats": 20, "ddim": 4.03 * call, "calls": 4 * call, "ratio": 4.03 / 4}
    others = [{"stage": "halve_small", "steps": 4, "seconds": 2.1 * call}]
    found = {"batch": batch, "w": 3.0, "repeats": 5, "teacher": teacher, "students": students}
    return {**found, "others": others, "overhead": overhead}


def grids() -> dict[str, Tensor]:
    """Real digits, noisier the fewer the steps: what a grid of samples looks like."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    picked = [i for copy in range(2) for label in range(10) for i in [(bunch.target == label).nonzero()[0][copy]]]
    images = torch.tensor(bunch.images[picked], dtype=torch.float32).div(8).sub(1).unsqueeze(1)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    names = {"teacher": 0.0, "baseline ddim": 0.6, "baseline dpmpp_2m": 0.5}
    names |= {f"student {n}": student_error(n, 1.0) for n in STEPS}
    return {f"{w:g}/{name}": (images + off * noise).clamp(-1, 1) for w in WEIGHTS for name, off in names.items()}


def curves() -> dict[str, list[dict[str, float]]]:
    names = ("classifier", "teacher", "guide", *(f"halve {n}" for n in STEPS))
    return {name: [{"step": 50 * i, "loss": 0.4 / i**0.5} for i in range(1, 40)] for name in names}
