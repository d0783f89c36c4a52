"""`fewstep stats` and `fewstep measure`: the figures by other ways, whatever the shards; what is wrong is refused."""

from __future__ import annotations

import io
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lab_configs import DIGITS, digits
from PIL import Image
from rich.console import Console
from scipy.linalg import sqrtm
from torch import Tensor
from torch_fidelity.metric_isc import isc_features_to_metric

from fewstep.lab.checkpoint import write_tensors
from fewstep.lab.classifier import Classifier, load_classifier, save_classifier
from fewstep.lab.cli import main
from fewstep.lab.config import ConfigError
from fewstep.lab.data import load_data
from fewstep.lab.measuring import job
from fewstep.lab.measuring.images import TrainingImages, open_images
from fewstep.lab.measuring.job import Extraction, spread, summarise
from fewstep.lab.measuring.measure import Collecting, Extracting, Measurement
from fewstep.lab.metrics import Statistics, StreamedInceptionScore, precision_recall
from fewstep.lab.progress import unheard
from fewstep.lab.shards import FeatureCache
from fewstep.models import NetworkDenoiser, UNet, save
from fewstep.schedules import Cosine


def images(count: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    """Of whole levels, so that files of bytes hold the same."""
    levels = torch.randint(40, 200, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    return (levels + shift) / 127.5 - 1


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A classifier of 16 features, 60 PNGs, and 45 samples in one file."""
    torch.manual_seed(0)
    save_classifier(Classifier(3, 4, width=8), tmp_path / "judge")
    (tmp_path / "png").mkdir()
    for i, image in enumerate(images(60)):
        pixels = ((image + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(tmp_path / "png" / f"{i:03d}.png")
    write_tensors(tmp_path / "samples.safetensors", {"images": images(45, seed=1, shift=30)})
    return tmp_path


def judged(place: Path, x: Tensor) -> tuple[np.ndarray, Tensor]:
    with torch.inference_mode():
        features, logits = load_classifier(place / "judge")(x)
    return features.double().numpy(), logits


def stats(place: Path, *options: str) -> int:
    return main(["stats", str(place / "png"), "--out", str(place / "ref.npz"), "--features", str(place / "judge"),
                 "--chunk", "25", *options])  # fmt: skip


def measure(place: Path, *options: str, samples: str = "samples.safetensors", out: str = "out") -> dict[str, Any]:
    arguments = ["measure", "--samples", str(place / samples), "--out", str(place / out)]
    code = main([*arguments, "--features", str(place / "judge"), "--chunk", "20", *options])
    assert code == 0
    return dict(json.loads((place / out / "results.json").read_text()))


def scipy_fid(a: np.ndarray, b: np.ndarray) -> float:
    s, t = (np.cov(each, rowvar=False) for each in (a, b))
    distance = np.square(a.mean(0) - b.mean(0)).sum()
    return float(distance + np.trace(s + t - 2 * np.real(sqrtm(s @ t))))


def test_fid_against_files_is_scipys_whatever_the_processes_and_the_reference(place: Path) -> None:
    """The whole path, from PNGs to a figure, by another computation; three jobs must give one process's bits."""
    reference, samples = images(60), images(45, seed=1, shift=30)
    expected = scipy_fid(judged(place, samples)[0], judged(place, reference)[0])
    assert stats(place) == 0
    assert sorted(path.name for path in place.iterdir()) == ["judge", "png", "ref.npz", "samples.safetensors"]
    (by_file,) = measure(place, "--reference", str(place / "ref.npz"))["rows"]
    (by_images,) = measure(place, "--reference", str(place / "png"), "--splits", "2", out="out2")["rows"]
    for row in (by_file, by_images):
        assert row["fid"] == pytest.approx(expected, rel=1e-4)
        assert (row["samples"], row["few_samples"]) == (45, None)
    found = precision_recall(*(torch.tensor(judged(place, x)[0]) for x in (samples, reference)))
    assert (by_images["precision"], by_images["recall"]) == pytest.approx(tuple(found))
    origin = json.loads((place / "out" / "results.json").read_text())["reference"]
    assert origin["digest"] == Statistics.load(place / "ref.npz").digest
    assert (by_file["kid"], by_file["precision"]) == (None, None)
    theirs = isc_features_to_metric(judged(place, samples)[1], splits=2, shuffle=False)
    assert by_images["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)

    work = Extraction(open_images(str(place / "samples.safetensors")), str(place / "judge"), str(place / "three"), 20)
    measurement = Measurement(work, str(place / "ref.npz"))
    console = Console(file=io.StringIO())
    with pytest.raises(ConfigError, match="missing or damaged; run the same command again"):
        Collecting(measurement)(place, 0, 1, lambda: False, console, unheard)
    for shard in (2, 0, 1):
        assert Extracting(measurement)(place, shard, 3, lambda: False, console, unheard)
    Collecting(measurement)(place, 0, 1, lambda: False, console, unheard)
    (of_three,) = json.loads((place / "three" / "results.json").read_text())["rows"]
    assert of_three["fid"] == by_file["fid"]
    assert of_three["is"] == by_file["is"]


def test_only_what_is_missing_is_extracted_again(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A job that was killed, or a shard that a disk damaged, must cost one chunk; other images none of the features."""
    assert stats(place) == 0
    first = measure(place, "--reference", str(place / "ref.npz"))
    assert "45 images" in capsys.readouterr().out
    measure(place, "--reference", str(place / "ref.npz"))
    assert "all features were there" in capsys.readouterr().out
    path = next((place / "out" / "features").rglob("0000020-*"))
    damaged = bytearray(path.read_bytes())
    damaged[-5] ^= 1
    path.write_bytes(bytes(damaged))
    assert FeatureCache(place).read(path) is None
    again = measure(place, "--reference", str(place / "ref.npz"))
    assert "20 images" in capsys.readouterr().out
    assert again["rows"][0]["fid"] == first["rows"][0]["fid"]
    write_tensors(place / "samples.safetensors", {"images": images(45, seed=2)})
    other = measure(place, "--reference", str(place / "ref.npz"))
    assert other["rows"][0]["fid"] != first["rows"][0]["fid"]


def test_what_cannot_be_compared_is_refused_before_any_compute(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each of these would give a number that looks like any other."""
    assert stats(place) == 0
    common = ["measure", "--out", str(place / "out"), "--reference", str(place / "ref.npz"), "--splits", "1"]
    judge, samples = ["--features", str(place / "judge")], ["--samples", str(place / "samples.safetensors")]
    torch.manual_seed(1)
    save_classifier(Classifier(3, 4, width=8), place / "other")
    write_tensors(place / "large.safetensors", {"images": torch.zeros(20, 3, 16, 16)})
    write_tensors(place / "few.safetensors", {"images": images(15)})
    replace(Statistics.load(place / "ref.npz"), count=7).save(place / "few.npz")
    for options, said in [
        ([*samples, "--features", str(place / "other")], r"weights=\w+: must be \w+, that of the samples"),
        (["--samples", str(place / "large.safetensors"), *judge], "resolution=8: must be 16"),
        (["--samples", str(place / "few.safetensors"), *judge], r"\(15\) than \S+ \(16\).*KID is not.*--allow-few"),
        ([*samples, *judge, "--shards", "2"], "--shards 2: must be 1 with cluster=local"),
        ([*samples, *judge, "--clip", "clip"], "--clip clip: must be left out: what these images are to show"),
        ([*samples, *judge, "--splits", "46"], "--splits 46: must be 45 or less"),
        ([*samples, *judge, "--model", "x"], "exactly one of them must be given"),
        (judge, "exactly one of them must be given"),
        ([*samples, *judge, "--reference", str(place / "few.npz")], r"behind the reference \(7\) than .*few.npz"),
        ([*samples, *judge, "--reference", str(place / "gone.npz")], r"gone.npz holds no .* No such file"),
    ]:
        assert main([*common, *options]) == 2
        assert re.search(said, capsys.readouterr().err)
    assert not (place / "out").exists()


def test_fid_of_few_samples_is_refused_beside_kid_or_marked(place: Path) -> None:
    """Against images KID still stands; allowed by hand, the figure carries a mark to every table."""
    write_tensors(place / "few.safetensors", {"images": images(15)})
    few = {"samples": "few.safetensors"}
    (row,) = measure(place, "--reference", str(place / "png"), **few)["rows"]
    assert row["fid"] is None
    assert row["few_samples"].startswith("fewer samples (15) than features (16); refused")
    assert np.isfinite(row["kid"])
    allowed = measure(place, "--reference", str(place / "png"), "--allow-few-samples", **few)
    assert np.isfinite(allowed["rows"][0]["fid"])
    assert allowed["rows"][0]["few_samples"] == "fewer samples (15) than features (16)"


def test_broken_samples_are_counted_over_all_shards(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A NaN would be a level of 0 in bytes, and pass for a black image."""
    assert stats(place) == 0
    broken = images(45)
    broken[19, 0, 0, 0], broken[44] = torch.nan, torch.inf
    write_tensors(place / "samples.safetensors", {"images": broken})
    arguments = ["--features", str(place / "judge"), "--chunk", "20", "--reference", str(place / "ref.npz")]
    out = ["--out", str(place / "out")]
    assert main(["measure", "--samples", str(place / "samples.safetensors"), *out, *arguments]) == 2
    assert "2 of 45 samples hold NaN or infinity, number 19 first" in capsys.readouterr().err


def test_files_that_are_no_images_are_named(place: Path) -> None:
    """One odd file among thousands must not end in a stack of PIL, nor be stretched without a word."""
    Image.fromarray(np.zeros((9, 8, 3), np.uint8)).save(place / "png" / "030.png")
    with pytest.raises(ConfigError, match=r"030.png: 9 x 8: must be 8 x 8, as the first"):
        open_images(str(place / "png")).read(0, 60)
    (place / "png" / "031.png").write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"031.png: not an image that can be read"):
        open_images(str(place / "png")).read(31, 32)
    (place / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"must be an experiment, samples.safetensors, or a folder with images"):
        open_images(str(place / "empty"))


def test_samples_drawn_while_they_are_measured_are_those_of_fewstep_sample(place: Path) -> None:
    """Kept or not, the figure is that of the files; and NFE and speed stand beside it for the report."""
    torch.manual_seed(3)
    network = UNet.from_preset("debug", in_channels=3)
    save(NetworkDenoiser(network, Cosine(), "v"), place / "model")
    draw = ["--model", str(place / "model"), "--steps", "2", "--w", "1", "--num", "30", "--chunk", "20"]
    assert main(["sample", *draw, "--out", str(place / "drawn")]) == 0
    assert stats(place) == 0
    shared = ["--reference", str(place / "ref.npz"), "--features", str(place / "judge")]
    (on_disk,) = measure(place, *shared, samples="drawn")["rows"]
    assert main(["measure", *draw, *shared, "--out", str(place / "drawing"), "--keep-samples"]) == 0
    (drawn,) = json.loads((place / "drawing" / "results.json").read_text())["rows"]
    assert drawn["fid"] == pytest.approx(on_disk["fid"], rel=1e-5)
    assert (drawn["sampler"], drawn["steps"], drawn["w"], drawn["nfe"], drawn["samples"]) == ("ddim", 2, 1.0, 4, 30)
    assert drawn["images_per_second"] > 0
    assert 0 < drawn["extractor_share"] < 1
    kept = open_images(str(place / "drawing" / "shards"))
    assert kept.count == 30
    assert torch.equal(kept.read(15, 25).clamp(-1, 1), open_images(str(place / "drawn")).read(15, 25))

    first, second = sorted((place / "drawing" / "shards").rglob("*.safetensors"))
    damaged = bytearray(second.read_bytes())
    damaged[-5] ^= 1
    second.write_bytes(bytes(damaged))
    with pytest.raises(ConfigError, match=r"0000020-0000030.safetensors: damaged"):
        kept.read(15, 25)
    first.unlink()  # as a set that is still being drawn
    with pytest.raises(ConfigError, match="samples 0 to 19 are missing"):
        open_images(str(place / "drawing" / "shards"))


def test_statistics_of_an_experiments_training_images() -> None:
    """Of the training split alone: held-out images are what samples are held against."""
    found = open_images(str(DIGITS), ["preset=debug"])
    train = load_data(digits().data).train
    assert (found.count, found.resolution) == (len(train), 8)
    assert torch.equal(found.read(5, 9), train.take(torch.arange(5, 9))[0])


def test_statistics_are_of_images_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data that training mirrors at random has statistics too: no visit, so no seed to mirror by."""
    train = load_data(digits().data).train
    monkeypatch.setattr(TrainingImages, "split", replace(train, flips=True))
    assert torch.equal(open_images(str(DIGITS), ["preset=debug"]).read(5, 9), train.images[5:9])


def test_training_images_are_read_by_all_workers_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them at a time would take hours for a million photographs."""
    train, said = load_data(digits().data).train, []

    class Files:
        ahead, unreadable = 4, ()

        def __len__(self) -> int:
            return len(train)

        def expect(self, indices: Tensor) -> None:
            said.append(("expect", indices.tolist()))

        def read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
            said.append(("read", indices.tolist()))
            return train.images[indices], indices

    monkeypatch.setattr(TrainingImages, "split", replace(train, images=Files()))
    assert torch.equal(open_images(str(DIGITS), ["preset=debug"]).read(5, 8), train.images[5:8])
    assert said == [(what, [i]) for what in ("expect", "read") for i in (5, 6, 7)]


def test_clip_score_is_of_each_sample_and_its_own_prompt(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts are taken in turn over all samples, not anew in every chunk: else most pictures meet others' prompts."""

    class Score:
        weights = "of a CLIP"

        def __call__(self, x: Tensor, prompts: list[str]) -> Tensor:
            return x.mean((1, 2, 3)) * torch.tensor([float(each) for each in prompts])

    monkeypatch.setattr(job.ClipScore, "load", lambda folder, device: Score())
    x = images(45, seed=1, shift=30)
    said = {"sample": json.dumps({"prompts": ["1", "2", "4"]})}
    write_tensors(place / "samples.safetensors", {"images": x}, said)
    (row,) = measure(place, "--reference", str(place / "png"), "--clip", "folder")["rows"]
    expected = (x.mean((1, 2, 3)) * torch.tensor([1.0, 2.0, 4.0]).repeat(15)).mean()
    assert row["clip_score"] == pytest.approx(float(expected), rel=1e-5)


def test_streamed_inception_score_is_torch_fidelitys() -> None:
    """Parts must be cut where the original code cuts them, whatever batches the samples come in."""
    logits = 3 * torch.randn(103, 7, generator=torch.Generator().manual_seed(0))
    streamed = StreamedInceptionScore(103, splits=4)
    for start in range(0, 103, 17):
        streamed.add(start, logits[start : start + 17])
    theirs = isc_features_to_metric(logits, splits=4, shuffle=False)
    assert streamed.score() == pytest.approx((theirs["inception_score_mean"], theirs["inception_score_std"]))


def test_what_kid_keeps_is_spread_evenly_and_bounded(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first samples alone would be of the first classes; all of them do not fit into memory."""
    monkeypatch.setattr(job, "KEPT", 10)
    kept = torch.cat([spread(start, min(start + 20, 45), 45) for start in range(0, 45, 20)])
    places = kept.nonzero().flatten()
    assert len(places) == 10
    assert set(places.diff().tolist()) <= {4, 5}
    assert spread(0, 7, 7).all()
    work = Extraction(open_images(str(place / "samples.safetensors")), str(place / "judge"), str(place / "out"), 20)
    assert work.make(0, 1, lambda: False, Console(file=io.StringIO()))
    expected = judged(place, images(45, seed=1, shift=30))[0][places]
    np.testing.assert_allclose(summarise(work, 1).kept.numpy(), expected, atol=1e-5)
    assert os.listdir(place / "out") == ["features"]
