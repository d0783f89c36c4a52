"""Experiments as jobs of a real SLURM cluster, and what most often happens to them there."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from slurm_cluster import (
    ROOT,
    SITE,
    TEACHER,
    Cluster,
    assert_same_bits,
    finished,
    job_of,
    kill_process,
    reached,
    settled,
    steps_told,
    submit,
    until,
    weights,
)
from torch import Tensor

from fewstep.lab.classifier import Classifier, save_classifier
from fewstep.lab.cli import main
from fewstep.lab.cluster import slurm
from fewstep.lab.cluster.monitor import Part, at_work, look

pytestmark = pytest.mark.slurm

# Two stages in a row.
GRAPH = [word for word in TEACHER if word != "~stages.guide"]
SHORT = ["stages.teacher.updates=8", "stages.guide.updates=8", "stages.teacher.log_every=1"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose teacher is done."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    assert main(["run", str(ROOT / "experiments" / "digits"), *GRAPH, *SHORT, f"out={out}", "--until", "teacher"]) == 0
    return out


def live() -> list[slurm.Row]:
    return [row for row in slurm.queue() or [] if row.state in slurm.LIVE]


def test_a_signal_is_answered_by_saving_and_requeueing_to_the_same_bits(
    cluster: Cluster, tmp_path: Path, undisturbed: dict[str, Tensor]
) -> None:
    # Broken: a preempted job loses what it computed, ends as failed, or ends in other weights than it would have.
    out = tmp_path / "run"
    assert submit(out) == 0
    until(reached(out, 40), "no checkpoint")
    subprocess.run(["scancel", "--signal=USR2", job_of(out)], check=True)
    finished(out, "teacher")
    attempt = json.loads((out / "teacher" / "attempt.json").read_text())
    assert attempt["restart"] == 1
    assert_same_bits(weights(out / "teacher"), undisturbed)
    assert steps_told(out / "teacher") == list(range(20, 241, 20))


def test_a_killed_process_is_started_again_and_a_cancelled_job_is_not(
    cluster: Cluster, tmp_path: Path, undisturbed: dict[str, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    # Broken: one dead process ends a run of days, or a job that was cancelled puts itself back into the queue.
    out = tmp_path / "run"
    assert submit(out) == 0
    until(reached(out, 40), "no checkpoint")
    kill_process(job_of(out))
    until(lambda: '"restart": 1' in (out / "teacher" / "attempt.json").read_text(), "not started again")
    assert main(["cancel", str(out)]) == 0
    assert settled(out)["teacher"].state == "cancelled"
    assert main(["resume", str(out)]) == 0
    finished(out, "teacher")
    assert_same_bits(weights(out / "teacher"), undisturbed)
    capsys.readouterr()
    assert main(["status", str(out)]) == 0
    assert "240/240 (100%)" in capsys.readouterr().out


def test_a_failed_stage_cancels_what_hangs_on_it_and_status_says_why(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Broken: the next stage waits for ever, or starts without its input; or nobody learns what went wrong.
    out = tmp_path / "run"
    assert submit(out, *SHORT, "stages.teacher.lr=1e30", stages=GRAPH) == 0
    parts = settled(out)
    assert (parts["teacher"].state, parts["guide"].state) == ("failed", "cancelled")
    assert "not finite" in parts["teacher"].error
    assert parts["guide"].error == "teacher: failed"
    assert not (out / "guide").exists()
    capsys.readouterr()
    assert main(["logs", str(out), "teacher"]) == 0
    assert "TrainingError" in capsys.readouterr().out


def test_four_processes_on_two_nodes_train_as_one_does_and_the_next_stage_follows(
    cluster: Cluster, tmp_path: Path
) -> None:
    # Broken: processes of several nodes do not find each other, or train on the same share of the batch.
    out, alone = tmp_path / "run", tmp_path / "alone"
    nodes = ["cluster.nodes=2", "cluster.tasks_per_node=2", "cluster.cpus_per_node=2"]
    assert submit(out, *SHORT, *nodes, stages=GRAPH) == 0
    assert main(["run", str(ROOT / "experiments" / "digits"), *GRAPH, *SHORT, f"out={alone}"]) == 0
    finished(out, "teacher", "guide")
    assert json.loads((out / "guide" / "run.json").read_text())[0]["world_size"] == 4
    assert losses(out / "teacher") == pytest.approx(losses(alone / "teacher"), rel=2e-4)
    ours, theirs = weights(out / "guide"), weights(alone / "guide")
    for name, weight in theirs.items():
        assert (ours[name] - weight).abs().max() < 5e-4, name


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_second_submission_joins_another_config_is_refused_and_the_code_is_that_of_the_submission(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Broken: two jobs write into one folder; two experiments of one name are mixed before either has begun; or a job
    # that waited runs code that was changed in the meantime.
    out, held = tmp_path / "my runs", "+cluster.sbatch={hold: true}"
    assert submit(out, *SHORT[:1], held) == 0
    sent = {row.id for row in live()}
    capsys.readouterr()
    assert submit(out, *SHORT[:1], held) == 0
    assert "nothing new was sent" in capsys.readouterr().out
    assert submit(out, *SHORT[:1], held, "stages.teacher.lr=0.5") == 2
    said = capsys.readouterr().err
    assert "stages.teacher.lr=0.5" in said
    assert "0.001" in said
    assert job_of(out) in {row.id for row in live()} <= sent  # the probe may have ended
    (copy,) = out.glob(".cluster/0001/code/fewstep/lab/stages/teacher.py")
    copy.write_text(f"{copy.read_text()}\nprint('as it was copied')\n")
    subprocess.run(["scontrol", "release", job_of(out)], check=True)
    finished(out, "teacher")
    (log,) = out.glob(".cluster/0001/jobs/*_log.out")
    assert "as it was copied" in log.read_text()


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("cluster.partition=gpux", "invalid partition"),
        ("cluster.cpus_per_node=99", "more processors requested than permitted"),
        ("cluster.gpus_per_node=7 cluster.cpus_per_node=7", "node configuration is not available"),
    ],
)
def test_what_the_site_refuses_is_said_in_its_own_words_and_leaves_nothing_queued(
    cluster: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str, words: str
) -> None:
    # Broken: a traceback of submitit's, or half of a graph that waits for ever.
    assert submit(tmp_path / "run", *wrong.split(), stages=GRAPH) == 1
    said = capsys.readouterr().err
    assert words in said.lower()
    assert said.count("\n") == 1
    assert [row for row in live() if row.state != "COMPLETING"] == []  # the probe may still be ending


def test_a_folder_that_the_nodes_do_not_share_fails_the_probe(cluster: Cluster, tmp_path: Path, teacher: Path) -> None:
    # Broken: every job fails without a word, since it cannot even write its log.
    private = tmp_path / "private"
    private.mkdir()
    arguments = [*TEACHER, *SITE, f"out={private / 'run'}"]
    program = (
        "import json, sys; sys.path.insert(0, sys.argv[1])\n"
        "from slurm_cluster import settled\nfrom fewstep.lab.cli import main\nfrom pathlib import Path\n"
        "assert main(['submit', *sys.argv[4:]]) == 0\n"
        "array, site = Path(sys.argv[2]) / 'array', [word for word in sys.argv if word.startswith('cluster')]\n"
        "sample = ['sample', '--model', sys.argv[3], '--steps', '1', '--num', '9', '--out', str(array)]\n"
        "assert main([*sample, '--shards', '2', *site]) == 0\n"
        "parts = [settled(out) for out in (Path(sys.argv[2]), array)]\n"
        "print(json.dumps([{part.stage: [part.state, part.error] for part in each.values()} for each in parts]))\n"
    )
    script = f'mount -t tmpfs none "{private}" && exec "$@"'
    model = str(teacher / "teacher" / "model")
    places = [str(ROOT / "tests"), str(private / "run"), model, str(ROOT / "experiments" / "digits")]
    command = ["unshare", "--mount", "sh", "-c", script, "sh", sys.executable, "-c", program, *places, *arguments]
    done = subprocess.run(command, text=True, capture_output=True)
    if "unshare" in done.stderr:
        pytest.skip(f"no mount namespaces here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stdout + done.stderr
    for states in json.loads(done.stdout.splitlines()[-1]):
        state, error = states.pop("probe")
        assert state == "failed"
        assert "cannot be read" in error
        assert {state for state, _ in states.values()} == {"cancelled"}
        assert next(iter(states.values()))[1] == "probe: failed"


def test_shards_of_targets_are_those_of_one_process_whoever_is_killed_and_a_stage_trains_on_them(
    cluster: Cluster, tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Broken: an array repeats what is there, leaves holes, or its files depend on how many share the work; or a job
    # looks for them below another folder than the one in which it was submitted.
    common = ["targets", str(ROOT / "experiments" / "digits"), *GRAPH, *SHORT, f"out={teacher}"]
    common += ["--stage", "guide", "--chunk", "100"]
    one, many = tmp_path / "one", tmp_path / "many"
    assert main([*common, "--out", str(one)]) == 0
    assert main([*common, *SITE, "--shards", "3", "--out", str(many)]) == 0
    until(lambda: bool(list(many.glob("*/*.safetensors"))), "no file")
    element = next(row.id for row in live() if row.state == "RUNNING")
    subprocess.run(["scontrol", "requeue", element], check=True)
    parts = settled_shards(many)
    assert [part.state for part in parts] == ["done"] * 4, parts  # the probe and three shards
    first, second = ({path.name: load_file(path) for path in out.glob("*/*.safetensors")} for out in (one, many))
    assert first.keys() == second.keys()
    assert len(first) == 14
    for name, tensors in first.items():
        assert torch.equal(tensors["images"], second[name]["images"]), name
    monkeypatch.chdir(tmp_path)
    assert submit(teacher, *SHORT, "stages.guide.targets=many", stages=GRAPH) == 0
    finished(teacher, "guide")


def test_shards_of_samples_are_the_images_of_one_process(cluster: Cluster, tmp_path: Path, teacher: Path) -> None:
    # Broken: the figures of a paper depend on how many jobs sampled.
    common = ["sample", "--model", str(teacher / "teacher" / "model"), "--steps", "4", "--num", "50", "--chunk", "8"]
    one, many = tmp_path / "one", tmp_path / "many"
    assert main([*common, "--out", str(one)]) == 0
    assert main([*common, "--out", str(many), "--shards", "2", *SITE]) == 0
    parts = settled_shards(many)
    assert [part.state for part in parts] == ["done"] * 4, parts
    first, second = (load_file(out / "samples.safetensors") for out in (one, many))
    assert torch.equal(first["images"], second["images"])
    assert torch.equal(first["seeds"], second["seeds"])


def test_a_sharded_measurement_gives_the_figures_of_one_process_and_goes_on(
    cluster: Cluster, tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Broken: the figures of 50k samples depend on how many jobs measured; jobs look for relative paths elsewhere than
    # the command would; a shard cut short counts; or `resume` makes anew what is there.
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    save_classifier(Classifier(1, 10, width=8), tmp_path / "judge")
    drawing = ["--model", str(teacher / "teacher" / "model"), "--steps", "2", "--chunk", "8"]
    assert main(["sample", *drawing, "--num", "30", "--seed", "1", "--out", "reference"]) == 0
    common = ["measure", *drawing, "--num", "60", "--features", "judge", "--reference", "reference/samples.safetensors"]
    assert main([*common, "--out", "one"]) == 0
    many = tmp_path / "many"
    assert main([*common, "--out", "many", "--shards", "2", *SITE]) == 0
    parts = settled_shards(many)
    assert [part.state for part in parts] == ["done"] * 4, parts  # the probe, two shards, what collects them
    assert [part.progress.total for part in parts[1:3]] == [48, 42]  # of 30 reference images and 60 samples, by 8
    row = measured(tmp_path / "one")
    assert row["fid"] > 0
    assert measured(many) == row
    cut, *rest = sorted(many.glob("features/*/*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-10])
    (many / "results.json").unlink()
    before = {path: path.stat().st_mtime_ns for path in rest}
    until(lambda: at_work(many) is None, "jobs that are done do not leave the queue")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["resume", str(many), "cluster.time=30"]) == 0
    parts = settled_shards(many)
    assert [part.state for part in parts] == ["done"] * 3, parts  # no probe: nodes have written there
    assert measured(many) == row
    assert {path: path.stat().st_mtime_ns for path in rest} == before


def test_a_sharded_grid_gives_the_figures_of_one_process(cluster: Cluster, tmp_path: Path) -> None:
    # Broken: sets that no job made are made by the last one alone, or the figures depend on how many jobs there were.
    save_classifier(Classifier(1, 10, width=8), tmp_path / "judge")
    one, many = tmp_path / "one", tmp_path / "many"
    experiment = [str(ROOT / "experiments" / "imagenet64"), "preset=debug"]
    sizes = ["num_samples=24", "paired_noises=8", "chunk=8", "sampling_seeds=1", "weights=[0]", "steps=[2]"]
    grid = ["--grid", *(f"stages.grid.{size}" for size in sizes), f"stages.grid.features={tmp_path / 'judge'}"]
    assert main(["run", *experiment, f"out={one}"]) == 0
    shutil.copytree(one, many)
    assert main(["evaluate", *experiment, *grid, f"out={one}"]) == 0
    assert main(["evaluate", *experiment, *grid, f"out={many}", "--shards", "2", *SITE]) == 0
    parts = settled_shards(many / "grid")
    assert [part.state for part in parts] == ["done"] * 4, parts  # the probe, two shards, what measures them
    found = [json.loads((out / "grid" / "results.json").read_text())["rows"] for out in (one, many)]
    assert len(found[0]) == 5
    assert [row["seeds"] for row in found[0]] == [row["seeds"] for row in found[1]]


def measured(out: Path) -> dict[str, float]:
    (row,) = json.loads((out / "results.json").read_text())["rows"]
    return {name: row[name] for name in ("fid", "is", "kid", "precision", "recall")}


def settled_shards(out: Path) -> list[Part]:
    settled(out)
    return look(out)
