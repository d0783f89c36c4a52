"""What the evaluation measures, on models whose samples are known in closed form."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lab_configs import digits
from lab_gaussians import SHAPE, Student, Teacher, exact, noise_and_labels, options, plan, samples
from rich.console import Console

from fewstep.lab.context import Interrupted, StageContext
from fewstep.lab.data import Data, Split
from fewstep.lab.evaluation import distances, pairs, rows, timing
from fewstep.lab.evaluation.distances import Reference
from fewstep.lab.evaluation.plan import OTHER, Draw, Students, equal_calls
from fewstep.lab.metrics import Moments, frechet_distance, kernel_distance, precision_recall, standardised
from fewstep.lab.stages import evaluate
from fewstep.samplers import ddim, dpmpp_2m


@pytest.fixture
def reference() -> Reference:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(70) % 3
    images = labels[:, None, None, None] / 10 + torch.randn(70, *SHAPE, generator=generator) / 8
    data = Data(Split(images, labels), Split(images.flip(0)[:40] + 0.01, labels.flip(0)[:40]))
    return Reference.of("gaussians", data, kid_subsets=3)


@pytest.mark.parametrize(
    ("nfe", "w", "calls"), [(4, 0.0, 4), (1, 0.0, 1), (4, 1.0, 2), (16, 3.0, 8), (2, 1.0, 1), (1, 1.0, 1), (1, 0.3, 1)]
)
def test_undistilled_samplers_get_the_students_nfe(nfe: int, w: float, calls: int) -> None:
    """A guided call costs two evaluations, so as many calls would cost twice as much; none would give no sample."""
    assert equal_calls(nfe, w) == calls


def test_paired_error_is_the_known_bias(tmp_path: Path) -> None:
    """A student that is exact but for a bias of 0.1: its error is 0.1, up to that of the reference and to clamping."""
    made = samples(tmp_path, plan())
    for w in (0.0, 1.0):
        found = pairs.error_to_teacher(made, plan(), plan().student(1, w))
        noise, labels = noise_and_labels(made, 30)
        truth = exact(noise, labels, w)
        assert truth.abs().max() + 0.1 < 1  # so that nothing is clamped
        assert found["paired_error"] == pytest.approx(0.1, abs=2e-3)
        assert found["paired_noises"] == 30


def test_paired_error_compares_the_same_noise_class_and_w(tmp_path: Path) -> None:
    """The number in the table is the RMSE of ddim against the reference, both recomputed here from noise and class."""
    made = samples(tmp_path, plan())
    noise, labels = noise_and_labels(made, 30)
    for draw in plan().baselines(4, 1.0):
        sampler = {"ddim": ddim, "dpmpp_2m": dpmpp_2m}[draw.sampler]
        by_hand = sampler(Teacher(), noise, 2, labels, 1.0).clamp(-1, 1)
        truth = dpmpp_2m(Teacher(), noise, 40, labels, 1.0).clamp(-1, 1)
        expected = (by_hand - truth).square().mean().sqrt().item()
        assert pairs.error_to_teacher(made, plan(), draw)["paired_error"] == pytest.approx(expected, rel=1e-4)


def test_kid_does_not_depend_on_the_scale_of_the_judges_features(reference: Reference) -> None:
    """In features as they come it would grow with the sixth power of their scale."""
    found, heldout = reference.train.found.features, reference.heldout.found.features
    expected = kernel_distance(standardised(1000 * found, 1000 * heldout), standardised(heldout, heldout), 3)
    assert reference.of_training_images()["kid"] == pytest.approx(expected.mean, rel=1e-9)


def test_precision_and_recall_take_no_more_images_than_fit(
    reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of CIFAR-10's 50,000 training images all distances would be 10 GB, twice; FID takes all images all the same."""
    whole = reference.of_training_images()
    monkeypatch.setattr(distances, "MOST", 35)
    found = reference.of_training_images()
    train, heldout = reference.train.found.features, reference.heldout.found.features
    every = [8 * i // 7 for i in range(35)]  # 35 of 40
    assert (found["precision"], found["recall"]) == precision_recall(train[::2], heldout[every])
    assert found["fid_heldout"] == whole["fid_heldout"]


def test_the_baseline_is_the_better_undistilled_sampler(tmp_path: Path, reference: Reference) -> None:
    """Ratios against the worse of DDIM and DPM-Solver++ would flatter the student."""
    made = samples(tmp_path, plan())
    table = rows.all_rows(made, plan(), reference)
    for measure in ("paired_error", "teacher_distance"):
        for found in rows.against_best(table, measure):
            same = [r for r in table if r["role"] == "baseline" and r["student_steps"] == found["steps"]]
            errors = [r[measure] for r in same if r["w"] == found["w"]]
            assert len(errors) == 2
            assert found["baseline"] == min(errors)
            assert found["ratio"] == pytest.approx(found["student"] / min(errors))
            assert found["baseline_nfe"] == (found["nfe"] if found["w"] == 0 or found["nfe"] > 1 else 2)


def test_distance_to_the_teacher_is_between_other_noises(tmp_path: Path) -> None:
    """On shared noises a student would look closer to the teacher than two sets of the teacher's own samples are."""
    made = samples(tmp_path, plan(options(floor=True)))
    chosen = plan(options(floor=True))
    here, there = ((noise_and_labels(made, 60, noises)) for noises in (0, OTHER))
    expected = frechet_distance(*(Moments.of(exact(*pair, 1.0).clamp(-1, 1).flatten(1)) for pair in (here, there)))
    floor = distances.teacher_distance(made, chosen, chosen.reference(1.0), 60)
    assert floor == pytest.approx(expected, rel=0.1)  # the sampler has an error of its own
    biased = distances.teacher_distance(made, chosen, chosen.student(1, 1.0), 60)
    means = [exact(*pair, 1.0).mean(0) for pair in (here, there)]
    shift = ((means[0] + 0.1 - means[1]).square() - (means[0] - means[1]).square()).sum().item()
    assert biased - floor == pytest.approx(shift, rel=0.1)


def test_guidance_response(tmp_path: Path) -> None:
    """Known: w = 1 moves class c by c / 10, so the mean over balanced classes is 0.1; a deaf student does not move."""
    chosen = plan()
    one_hears, deaf = samples(tmp_path / "a", chosen), samples(tmp_path / "b", chosen, one=Student(0.1, hears=0.0))
    found = rows.select(pairs.responses(one_hears, chosen), steps=1)[0]
    assert found["teacher"] == pytest.approx(0.1, abs=1e-3)
    assert found["ratio"] == pytest.approx(1.0, abs=0.01)
    assert rows.select(pairs.responses(deaf, chosen), steps=1)[0]["student"] == 0.0
    assert pairs.responses(one_hears, plan(options(weights=[1.0], curve_weights=[]))) == []


def test_shares_of_the_stages_sum_to_the_last_students_error(tmp_path: Path) -> None:
    """Each stage's share is what the squared error grew by; `own` is measured to what the stage itself was taught."""
    made, chosen = samples(tmp_path, plan()), plan()
    found = rows.select(pairs.stage_shares(made, chosen), w=1.0)
    assert [(row["stage"], row["steps"]) for row in found] == [
        ("stage one", 40), ("fewer steps", 8), ("student", 4), ("student", 1)
    ]  # fmt: skip
    assert sum(row["share"] for row in found) == pytest.approx(1.0)
    assert found[0]["accumulated"] == pytest.approx(0, abs=1e-6)  # stage one here is the teacher itself
    assert found[1]["own"] == pytest.approx(found[1]["accumulated"], rel=1e-6)
    noise, labels = noise_and_labels(made, 30)
    four = ddim(Student(0.02), noise, 4, labels, 1.0).clamp(-1, 1)
    eight = ddim(Teacher(), noise, 8, labels, 1.0).clamp(-1, 1)
    assert found[2]["own"] == pytest.approx((four - eight).square().mean().sqrt().item(), rel=1e-4)


def test_reference_check_measures_the_reference_against_many_steps(tmp_path: Path) -> None:
    """If the reference is itself the many-step sampler, the sampler of the curve is what must be shown to be close."""
    made = samples(tmp_path, plan())
    (first, _) = pairs.check_reference(made, plan())
    assert (first["sampler"], first["against"], first["paired_noises"]) == ("dpmpp_2m 40", "ddim 200", 10)
    assert 0 < first["paired_error"] < 0.01
    same = plan(options(reference=options().truth))
    assert same.checked(1.0) == Draw("teacher", "dpmpp_2m", 40, 1.0)


def test_rows_beside_the_judged_students_keep_to_their_w(tmp_path: Path, reference: Reference) -> None:
    """A student of one fixed w is not measured at others: the number would be of no use and look like one."""
    chosen = plan(others=(Students("small", {1: "small/steps_1"}, (1.0, 1.0)),))
    (row,) = rows.select(rows.all_rows(samples(tmp_path, chosen), chosen, reference), role="other")
    assert (row["w"], row["steps"], row["stage"]) == (1.0, 1, "small")
    assert row["paired_error"] == pytest.approx(0.05, abs=2e-3)


def test_teacher_against_data_uses_as_many_samples_as_training_images(tmp_path: Path, reference: Reference) -> None:
    """FID depends on the number of samples; the bound is that of the training images, so both need 70 of them."""
    chosen = plan()
    found = distances.teacher_against_data(samples(tmp_path, chosen), chosen, reference)
    assert found is not None
    assert found["teacher"]["samples"] == found["training_images"]["samples"] == 70
    train, held = reference.train.found.features, reference.heldout.found.features
    expected = frechet_distance(Moments.of(train), Moments.of(held))
    assert found["training_images"]["fid_heldout"] == pytest.approx(expected)
    assert found["training_images"]["fid_train"] == pytest.approx(0, abs=1e-6)


def test_each_set_is_sampled_once_and_goes_on_after_an_interruption(tmp_path: Path) -> None:
    """Stopped after a chunk, then run again: the same images, and no chunk twice (teacher sets cost an hour)."""
    chosen = plan()
    quiet = Console(file=io.StringIO())
    first = samples(tmp_path, chosen)
    with pytest.raises(Interrupted):
        first.make(quiet, False, lambda: True)
    shards = list(tmp_path.rglob("*.safetensors"))
    assert len(shards) == 1
    before = shards[0].stat().st_mtime_ns
    samples(tmp_path, chosen).make(quiet, False, lambda: False)
    assert shards[0].stat().st_mtime_ns == before
    whole = samples(tmp_path / "other", chosen)
    for draw, count in chosen.requests().items():
        assert torch.equal(torch.cat(list(first.batches(draw, count))), torch.cat(list(whole.batches(draw, count))))
    assert len(list(tmp_path.glob("*/*.safetensors"))) == len(list(tmp_path.glob("other/*/*.safetensors")))


def test_larger_sets_serve_smaller_requests(tmp_path: Path) -> None:
    """The first 30 of 60 samples must come from the 60, not be sampled a second time."""
    made = samples(tmp_path, plan())
    draw = plan().student(1, 0.0)
    assert sum(len(batch) for batch in made.batches(draw, 30)) == 30
    assert sorted(path.name for path in tmp_path.rglob("*.safetensors"))[0] == "0000000-0000025.safetensors"
    assert not list(tmp_path.rglob("0000025-0000030.safetensors"))


def test_timing_rows(tmp_path: Path) -> None:
    """Ideal speed-ups by calls and by NFE at 200 guided steps; the teacher's time says that it was scaled."""
    chosen = plan()
    first, second = timing.measure(samples(tmp_path, chosen), chosen)
    assert (first["batch"], second["batch"]) == (1, 2)
    assert first["teacher"]["timed_steps"] == 2
    assert first["teacher"]["nfe"] == 400
    four = rows.select(first["students"], steps=4)[0]
    assert (four["ideal_by_calls"], four["ideal_by_nfe"]) == (50, 100)
    assert first["others"] == []
    assert four["speed_up"] == pytest.approx(first["teacher"]["seconds"] / four["seconds"])


def test_other_students_are_timed_at_a_w_of_theirs(tmp_path: Path) -> None:
    """A student of half the size is there for its time, at the same steps as the one that targets are about."""
    other = Students("small", {1: "small/steps_1"}, (0.5, 0.5))
    chosen = plan(options(headline=1), others=(other,))
    assert chosen.some_w(other) == 0.5
    (found,) = timing.measure(samples(tmp_path, chosen), chosen)[0]["others"]
    assert (found["stage"], found["steps"]) == ("small", 1)
    assert found["seconds"] > 0


def test_interleaved_medians_meet_drift_alike() -> None:
    """Jobs run in turns: one after the other, a machine that slows down would favour the first."""
    order: list[str] = []
    jobs = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    timing.interleaved_medians(jobs, 3, torch.device("cpu"))
    assert order == ["a", "b"] * 4


def test_curve_rows_are_of_equally_many_samples(tmp_path: Path, reference: Reference) -> None:
    """FID falls with the number of samples: points of one figure must not differ in it."""
    chosen = plan(replace(options(), curve_samples=40))
    found = distances.curve_rows(samples(tmp_path, chosen), chosen, reference)
    assert {row["samples"] for row in found} == {40}
    assert [(row["w"], row["student_steps"]) for row in found[:3]] == [(0.0, None), (0.0, 4), (0.0, 1)]


def test_measuring_stops_when_asked_to(tmp_path: Path, reference: Reference) -> None:
    """Features and timing take minutes: a cluster that asks to stop would kill the evaluation before they end."""
    answers = iter([False, False, True])
    context = StageContext(
        digits(), options(), {}, tmp_path, torch.device("cpu"), Console(quiet=True), stopping=lambda: next(answers)
    )
    with pytest.raises(Interrupted, match="stopped before measuring teacher; the samples are kept"):
        evaluate.measure(context, samples(tmp_path, plan()), plan(), reference)
