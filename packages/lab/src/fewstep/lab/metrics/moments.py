"""Mean and covariance of features: merged across processes, and kept as `.npz` reference statistics."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Moments:
    """Count, mean (D,) and scatter (D, D) = sum of centred outer products; float64."""

    count: int
    mean: FloatArray
    scatter: FloatArray

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of features (N, D); raises ValueError for fewer than two samples."""
        if features.ndim != 2 or len(features) < 2:
            raise ValueError(f"moments need features (N, D) with N >= 2, got shape {tuple(features.shape)}")
        values = features.double().numpy()
        centred = values - values.mean(axis=0)
        return cls(len(values), values.mean(axis=0), centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """Moments of the union of two disjoint sets (Chan, Golub and LeVeque 1983), e.g. from two processes."""
        count = self.count + other.count
        shift = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(shift, shift) * (self.count * other.count / count)
        return Moments(count, self.mean + shift * (other.count / count), scatter)

    @property
    def covariance(self) -> FloatArray:
        """Unbiased covariance (D, D), as numpy.cov and torch-fidelity have it."""
        return self.scatter / (self.count - 1)

    def statistics(self) -> dict[str, FloatArray]:
        """The form that torch-fidelity's FID takes."""
        return {"mu": self.mean, "sigma": self.covariance}

    def save(self, path: Path, features: str) -> None:
        """Write reference statistics `mu`, `sigma`, `count` and the name of the `features` to an `.npz`, atomically."""
        partial = path.with_name(f".{path.name}.{os.getpid()}.partial.npz")
        np.savez(partial, mu=self.mean, sigma=self.covariance, count=self.count, features=np.array(features))
        partial.replace(path)

    @classmethod
    def load(cls, path: Path, features: str) -> Moments:
        """Read statistics written by `save`.

        Raises ValueError for a file that is no such archive, or whose statistics were made in other features: families
        of FID numbers must not be mixed.
        """
        try:
            with np.load(path, allow_pickle=False) as archive:
                mean, sigma = archive["mu"], archive["sigma"]
                count, made_in = int(archive["count"]), str(archive["features"])
        except (BadZipFile, KeyError, ValueError, EOFError) as error:
            raise ValueError(f"{path} holds no reference statistics (mu, sigma, count, features): {error}") from None
        if made_in != features:
            raise ValueError(f"{path} was made in features {made_in!r}, not {features!r}")
        return cls(count, mean, sigma * (count - 1))
