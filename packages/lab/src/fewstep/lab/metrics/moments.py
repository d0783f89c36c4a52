"""Mean and covariance of features: as they stream by, and merged across processes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

FloatArray = NDArray[np.float64]
FOLD = 2048  # rows that are folded into a scatter at once: a product of matrices, not one of vectors


class Gaussian(Protocol):
    """What a Frechet distance is of: mean (D,), covariance (D, D), and the samples behind them, None if unknown."""

    @property
    def count(self) -> int | None:
        """How many samples."""

    @property
    def mean(self) -> FloatArray:
        """Their mean."""

    @property
    def covariance(self) -> FloatArray:
        """Their unbiased covariance."""


@dataclass(frozen=True)
class Moments:
    """Count, mean (D,) and scatter (D, D) = sum of centred outer products; float64."""

    count: int
    mean: FloatArray
    scatter: FloatArray

    @classmethod
    def of(cls, features: Tensor) -> Moments:
        """Moments of features (N, D); raises ValueError for none."""
        if features.ndim != 2 or len(features) < 1:
            raise ValueError(f"moments need features (N, D) with N >= 1, got shape {tuple(features.shape)}")
        values = features.double().numpy()
        mean = values.mean(axis=0)
        centred = values - mean
        return cls(len(values), mean, centred.T @ centred)

    def merge(self, other: Moments) -> Moments:
        """Moments of the union of two disjoint sets (Chan, Golub and LeVeque 1983), e.g. from two processes."""
        count = self.count + other.count
        shift = other.mean - self.mean
        scatter = np.outer(shift, shift) * (self.count * other.count / count)
        scatter += self.scatter
        scatter += other.scatter
        return Moments(count, self.mean + shift * (other.count / count), scatter)

    @property
    def covariance(self) -> FloatArray:
        """Unbiased covariance (D, D), as numpy.cov and torch-fidelity have it; ValueError for a single sample."""
        if self.count < 2:
            raise ValueError("a covariance needs two samples or more, got 1")
        return self.scatter / (self.count - 1)


@dataclass
class StreamedMoments:
    """Moments of features that come in batches; holds the last few rows and one scatter, however many there were."""

    _folded: Moments | None = None
    _rows: list[Tensor] = field(default_factory=list)

    def add(self, features: Tensor) -> None:
        """Take in features (B, D), of any floating type."""
        self._rows.append(features)
        if sum(map(len, self._rows)) >= FOLD:
            self._fold()

    def moments(self) -> Moments:
        """Those of all rows so far; raises ValueError for none."""
        if self._rows:
            self._fold()
        if self._folded is None:
            raise ValueError("no features: moments need one sample or more")
        return self._folded

    def _fold(self) -> None:
        found = Moments.of(torch.cat(self._rows))
        self._rows = []
        self._folded = found if self._folded is None else self._folded.merge(found)
