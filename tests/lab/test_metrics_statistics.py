"""Reference statistics go out and come in, in three layouts, and those of other features are refused."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fewstep.lab.metrics import Statistics


def statistics(dim: int = 3, **changes: object) -> Statistics:
    values = np.random.default_rng(0).normal(size=(9 * dim, dim)) + 3
    found = Statistics(values.mean(0), np.cov(values, rowvar=False), "digits", "ab" * 32, 8, len(values))
    return replace(found, **changes)  # type: ignore[arg-type]  # keywords of a test


def test_what_is_written_is_read_and_numpy_alone_reads_it(tmp_path: Path) -> None:
    """If it fails, published statistics differ from the ones that were computed, or lose what they were made in."""
    path, one = tmp_path / "reference.npz", statistics()
    one.save(path)
    found = Statistics.load(path)
    for name in ("features", "weights", "resolution", "count"):
        assert getattr(found, name) == getattr(one, name)
    with np.load(path, allow_pickle=False) as archive:  # the two keys that every other implementation reads
        np.testing.assert_array_equal(archive["mu"], found.mean)
        np.testing.assert_array_equal(archive["sigma"], found.covariance)
    assert [each.name for each in tmp_path.iterdir()] == ["reference.npz"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"features": "inception-v3-compat"}, "features=inception-v3-compat: must be digits"),
        ({"weights": "cd" * 32}, "weights=cdcdcdcdcd: must be ababababab"),
        ({"resolution": 16}, "resolution=16: must be 8"),
    ],
)
def test_statistics_of_another_extractor_or_resolution_are_refused(
    tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    """Families of FID numbers must not be mixed: such a number looks like any other."""
    statistics(**changes).save(tmp_path / "other.npz")
    other = Statistics.load(tmp_path / "other.npz")
    with pytest.raises(ValueError, match=re.escape(said)):
        other.refuse_other(tmp_path / "other.npz", "digits", "ab" * 32, 8)
    statistics(weights=None, resolution=None).refuse_other(tmp_path, "digits", "ab" * 32, 8)  # not said: not refused


def test_layouts_of_adm_and_edm(tmp_path: Path) -> None:
    """Papers are compared through the files that these two publish; they are Inception's and say so nowhere."""
    mean, sigma = np.arange(2048, dtype=np.float32), np.eye(2048, dtype=np.float32)
    np.savez(tmp_path / "edm.npz", mu=mean, sigma=sigma)
    images = np.zeros((3, 64, 64, 3), np.uint8)
    spatial = {"mu_s": np.zeros(2023), "sigma_s": np.zeros((2, 2))}
    np.savez(tmp_path / "adm.npz", mu=mean, sigma=sigma, arr_0=images, **spatial)
    for name, resolution in (("edm", None), ("adm", 64)):
        found = Statistics.load(tmp_path / f"{name}.npz")
        assert (found.features, found.weights, found.resolution) == ("inception-v3-compat", None, resolution)
        assert found.count is None
        assert found.mean.dtype == found.covariance.dtype == np.float64
        np.testing.assert_array_equal(found.mean, mean)
        with pytest.raises(ValueError, match=r"inception-v3-compat: must be dinov2-vit-l-14"):
            found.refuse_other(tmp_path, "dinov2-vit-l-14", "", 64)
    with pytest.raises(ValueError, match="resolution=64: must be 32"):
        found.refuse_other(tmp_path, "inception-v3-compat", "", 32)


def test_what_is_no_statistics_is_refused_in_a_line(tmp_path: Path) -> None:
    """A broken file must not crash half-way through an evaluation of hours, and a pickle may run anything."""
    path = tmp_path / "reference.npz"
    np.savez(path, mu=np.zeros(7), sigma=np.eye(7))
    with pytest.raises(ValueError, match=r"7 features without the name.*must be 2048"):
        Statistics.load(path)
    np.savez(path, mu=np.zeros(7), sigma=np.eye(6), features=np.array("digits"))
    with pytest.raises(ValueError, match=r"shapes \(7,\) and \(6, 6\) must be"):
        Statistics.load(path)
    np.savez(path, mu=np.full(7, np.nan), sigma=np.eye(7), features=np.array("digits"))
    with pytest.raises(ValueError, match="and finite"):
        Statistics.load(path)
    np.savez(path, mu=np.array([object()]), sigma=np.eye(1))
    with pytest.raises(ValueError, match="holds no reference statistics"):
        Statistics.load(path)
    statistics().save(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="holds no reference statistics"):
        Statistics.load(path)
    with pytest.raises(ValueError, match="no pickle is read"):
        Statistics.load(tmp_path / "img512.pkl")
