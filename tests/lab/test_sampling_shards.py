"""Sampling is a function of the sample index alone, and cached shards are whole or made anew."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import Tensor

from fewstep.lab.config import ConfigError
from fewstep.lab.sampling import SampleSpec, calls_of, misuse, nfe_of, sample_chunk, sample_shards
from fewstep.lab.shards import Shard, ShardCache, read_shard
from fewstep.schedules import Cosine, Denoiser, Trained

CPU = torch.device("cpu")


class GaussianDenoiser:
    """The exact denoiser of N(class / 10, 0.25): alpha z + ... in closed form. Counts its calls."""

    def __init__(self, trained: Trained | None = None) -> None:
        self.schedule = Cosine()
        self.trained = trained
        self.calls = 0

    def __call__(self, z: Tensor, t: Tensor, cond: Tensor, w: float | Tensor | None = None) -> Tensor:
        self.calls += 1
        alpha, sigma = (a[:, None, None, None] for a in self.schedule.alpha_sigma(t))
        mean = cond[:, None, None, None] / 10
        return mean + 0.25 * alpha / (0.25 * alpha**2 + sigma**2) * (z - alpha * mean)


def spec(chunk: int = 5, **changes: object) -> SampleSpec:
    settings = {"sampler": "ddim", "steps": 3, "w": 0.0, "seed": 7, "noises": 0, "shape": (1, 4, 4)}
    return SampleSpec(**{**settings, "classes": (0, 1, 2), "chunk": chunk, **changes})  # type: ignore[arg-type]  # keywords of a test


def draw(
    chosen: SampleSpec, count: int, cache: ShardCache, denoiser: Denoiser | None = None
) -> tuple[Tensor, list[bool]]:
    model = denoiser or GaussianDenoiser()
    pairs = list(sample_shards(lambda: model, chosen, count, CPU, cache, "digest"))
    return torch.cat([shard.images for shard, _ in pairs]), [cached for _, cached in pairs]


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp_2m", "ancestral"])
def test_chunk_size_and_order_do_not_change_a_sample(tmp_path: Path, sampler: str) -> None:
    """Shards made by another process must be bitwise the same; those of another chunk size to rounding."""
    whole, _ = draw(spec(12, sampler=sampler), 12, ShardCache(tmp_path / "a"))
    parts, _ = draw(spec(5, sampler=sampler), 12, ShardCache(tmp_path / "b"))
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)
    alone = sample_chunk(GaussianDenoiser(), spec(5, sampler=sampler), 5, 10, CPU)
    assert torch.equal(alone, parts[5:10])


def test_classes_are_balanced_and_noise_sets_independent(tmp_path: Path) -> None:
    """Sample i has class i mod K in every set; `noises` and `seed` each choose other noise, so the floor is a floor."""
    assert spec().labels(4, 9).tolist() == [1, 2, 0, 1, 2]
    assert spec(classes=()).labels(0, 3) is None
    one = {"chunk": 100, "classes": (0,)}  # with more, the classes correlate
    first, _ = draw(spec(**one), 100, ShardCache(tmp_path))
    for other in (spec(**one, noises=1), spec(**one, seed=8)):
        second, _ = draw(other, 100, ShardCache(tmp_path))
        assert abs(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1]) < 0.1


def test_only_a_damaged_shard_is_made_again(tmp_path: Path) -> None:
    """After SIGKILL or disk damage the work lost is one shard, and the images are bitwise what they would have been."""
    cache = ShardCache(tmp_path)
    images, cached = draw(spec(), 13, cache)
    assert cached == [False] * 3
    path = cache.path(spec().key("digest", CPU), 5, 10)
    path.write_bytes(path.read_bytes()[:-7])
    assert read_shard(path) is None
    denoiser = GaussianDenoiser()
    again, cached = draw(spec(), 13, cache, denoiser)
    assert (cached, denoiser.calls) == ([True, False, True], 3)
    assert torch.equal(again, images)


def test_a_shard_whose_bytes_changed_counts_as_absent(tmp_path: Path) -> None:
    """A flipped bit of an image is no shorter file: only the checksum can tell."""
    cache = ShardCache(tmp_path)
    draw(spec(), 5, cache)
    path = cache.path(spec().key("digest", CPU), 0, 5)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    assert cache.get(spec().key("digest", CPU), 0, 5) is None


def test_an_interrupted_write_leaves_no_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill between writing and renaming must not leave a file under the shard's name."""
    monkeypatch.setattr("fewstep.lab.checkpoint.replace_durably", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ShardCache(tmp_path).put({}, 0, 1, Shard(torch.zeros(1, 1, 2, 2), 0.0))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_another_model_sampler_steps_or_w_is_another_key() -> None:
    """Cached samples of one model or setting must never be taken for another's."""
    changed = [{"sampler": "heun"}, {"steps": 4}, {"w": 1.0}, {"seed": 8}, {"noises": 1}, {"classes": (0,)}]
    folders = {ShardCache(Path()).folder(spec(**change).key("digest", CPU)) for change in changed}
    folders |= {ShardCache(Path()).folder(spec().key(digest, CPU)) for digest in ("digest", "other")}
    assert len(folders) == len(changed) + 2


def test_network_evaluations() -> None:
    """A guided call of a teacher counts two evaluations, one at w = 0 or of a student one; heun makes 2 steps - 1."""
    assert [calls_of("ddim", 4), calls_of("dpmpp_2m", 4), calls_of("heun", 4)] == [4, 4, 7]
    assert nfe_of("ddim", 512, 3.0, two_branches=True) == 1024
    assert nfe_of("ddim", 512, 0.0, two_branches=True) == 512
    assert nfe_of("ddim", 4, 3.0, two_branches=False) == 4


def test_misuse_is_a_line_or_with_strict_an_error() -> None:
    """Steps that a student was not trained for: a warning that names them; --strict refuses before a call is made."""
    console = Console(record=True, width=200, file=io.StringIO())
    denoiser = GaussianDenoiser(Trained("deterministic", 4, (0.0, 2.0)))
    with misuse(console, strict=False):
        sample_chunk(denoiser, spec(steps=4, w=3.0), 0, 2, CPU)
    assert "[0, 2]" in console.export_text()
    calls = denoiser.calls
    with pytest.raises(ConfigError, match=r"4 steps.*\(--strict\)"), misuse(console, strict=True):
        sample_chunk(denoiser, spec(steps=3), 0, 2, CPU)
    assert denoiser.calls == calls
