"""The inception score of samples that stream by."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class InceptionScore(NamedTuple):
    """Mean and standard deviation over the parts that the samples were cut into."""

    mean: float
    std: float


@dataclass
class StreamedInceptionScore:
    """exp E KL(p(y|x) || p(y)) (Salimans 2016) of `total` samples in `splits` parts of consecutive ones.

    As the original code cuts them, without a shuffle. Holds two sums for each part: sum_i p_i and sum_i p_i . log p_i.
    """

    total: int
    splits: int = 10
    _sums: dict[int, Tensor] = field(default_factory=dict)
    _entropies: dict[int, float] = field(default_factory=dict)

    def add(self, start: int, logits: Tensor) -> None:
        """Take in logits (B, K) of samples start, ..., start + B - 1."""
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        for part, (low, high) in enumerate(self._bounds()):
            mine = slice(max(low - start, 0), max(high - start, 0))
            if len(p[mine]):
                self._sums[part] = self._sums.get(part, torch.zeros(p.shape[1]).double()) + p[mine].sum(0)
                self._entropies[part] = self._entropies.get(part, 0.0) + float((p[mine] * log_p[mine]).sum())

    def score(self) -> InceptionScore:
        """Of all samples."""
        scores = []
        for part, (low, high) in enumerate(self._bounds()):
            q = self._sums[part] / (high - low)
            scores.append(self._entropies[part] / (high - low) - float(torch.xlogy(q, q).sum()))
        found = torch.tensor(scores, dtype=torch.float64).exp()
        return InceptionScore(float(found.mean()), float(found.std(correction=0)))

    def _bounds(self) -> list[tuple[int, int]]:
        cuts = [part * self.total // self.splits for part in range(self.splits + 1)]
        return list(pairwise(cuts))
