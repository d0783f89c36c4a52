"""Reference statistics in `.npz` files: our own, and those that others publish; never a pickle."""

from __future__ import annotations

import hashlib
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from .moments import FloatArray

INCEPTION, INCEPTION_FEATURES = "inception-v3-compat", 2048


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of the features of a set of images, and what makes them comparable.

    features: the extractor's name. weights: digest of its weights. resolution: height and width of the images. count:
    of images. None: the file does not say.
    """

    mean: FloatArray
    covariance: FloatArray
    features: str
    weights: str | None = None
    resolution: int | None = None
    count: int | None = None

    @property
    def digest(self) -> str:
        """Of mean and covariance: files of one name may hold others."""
        return hashlib.sha256(self.mean.tobytes() + self.covariance.tobytes()).hexdigest()

    def save(self, path: Path) -> None:
        """Write an `.npz` of `mu`, `sigma` (which others read too), `features` and what else is known, atomically."""
        known = {"weights": self.weights, "resolution": self.resolution, "count": self.count}
        arrays: dict[str, Any] = {name: np.array(value) for name, value in known.items() if value is not None}
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial.npz")
        try:
            np.savez(partial, mu=self.mean, sigma=self.covariance, features=np.array(self.features), **arrays)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> Statistics:
        """Read statistics that `save` wrote, or of the layouts of ADM (mu, sigma, mu_s, sigma_s, arr_0) and EDM.

        Those of ADM and EDM are Inception's by their origin; they do not say of how many images, and of which size only
        where ADM's file holds images.

        Raises:
            ValueError: no such file, statistics that cannot be, or a pickle.
        """
        if path.suffix == ".pkl":
            raise ValueError(f"{path}: must be an .npz with mu and sigma: no pickle is read")
        try:
            with np.load(path, allow_pickle=False) as archive:
                mean, covariance = (np.asarray(archive[key], np.float64) for key in ("mu", "sigma"))
                said = {key: archive[key].item() for key in ("features", "weights", "resolution", "count")
                        if key in archive.files}  # fmt: skip
        except (OSError, zipfile.BadZipFile, KeyError, ValueError, TypeError, EOFError) as error:
            raise ValueError(f"{path} holds no reference statistics (mu, sigma): {error}") from None
        fits = mean.ndim == 1 and covariance.shape == (len(mean), len(mean))
        if not fits or not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
            shapes = f"{mean.shape} and {covariance.shape}"
            raise ValueError(f"{path}: mu and sigma of shapes {shapes} must be (D,) and (D, D), and finite")
        return cls(mean, covariance, **(said if "features" in said else _foreign(path, len(mean))))

    def refuse_other(self, path: Path, features: str, weights: str, resolution: int) -> None:
        """Raise ValueError if these statistics are of another extractor, of other weights or of another resolution.

        path: where they come from, for the message.
        """
        asked: Mapping[str, Any] = {"features": features, "weights": weights, "resolution": resolution}
        for key, value in asked.items():
            found = getattr(self, key)
            if found is not None and found != value:
                shown = (found[:10], value[:10]) if key == "weights" else (found, value)
                raise ValueError(f"{path}: {key}={shown[0]}: must be {shown[1]}, that of the samples")


def _foreign(path: Path, features: int) -> dict[str, Any]:
    """What is known of statistics that do not name their extractor."""
    if features != INCEPTION_FEATURES:
        raise ValueError(
            f"{path}: mu of {features} features without the name of its extractor: must be {INCEPTION_FEATURES}, "
            "Inception's, as ADM and EDM publish; make others with `fewstep stats`"
        )
    shape = _shape_of(path, "arr_0")
    return {"features": INCEPTION, "resolution": shape[1] if len(shape) == 4 else None}


def _shape_of(path: Path, name: str) -> tuple[int, ...]:
    """Shape of an array by its header alone, as ADM's archives hold gigabytes of images; () if it is not there."""
    with zipfile.ZipFile(path) as archive:
        if f"{name}.npy" not in archive.namelist():
            return ()
        with archive.open(f"{name}.npy") as file:
            read = npy.read_array_header_1_0 if npy.read_magic(file) == (1, 0) else npy.read_array_header_2_0
            return tuple(read(file)[0])
