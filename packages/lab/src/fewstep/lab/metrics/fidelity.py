"""FID, IS, KID, precision and recall by torch-fidelity, in the features of any judge network.

The experiment's own classifier is registered with torch-fidelity as a feature extractor, so every formula is the
published one and only the features differ: **numbers made here are not Inception numbers** and must not be compared
with any. Images are float32, clamped to [-1, 1], and are not rounded to 8 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import prc_features_to_metric
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY, register_feature_extractor
from torch_fidelity.utils import create_feature_extractor

from .moments import Gaussian

Judge = Callable[[Tensor], tuple[Tensor, Tensor]]
"""images (B, C, H, W) in [-1, 1] -> (features (B, D), class logits (B, K))."""

LAYERS = ("features", "logits")


class Features(NamedTuple):
    """What a judge sees in a set of images, float64 on the CPU: features (N, D) and logits (N, K)."""

    features: Tensor
    logits: Tensor


def register_judge(name: str, judge: Judge) -> str:
    """Register `judge` with torch-fidelity under `name` and return the name; a second registration replaces the first.

    Layers "features" (FID, KID, precision and recall) and "logits" (IS) can then be used by
    `torch_fidelity.calculate_metrics(feature_extractor=name, ...)` as well as by the functions below.
    """

    class JudgeFeatures(FeatureExtractorBase):  # type: ignore[misc]  # torch-fidelity has no type information
        """The judge as torch-fidelity wants it: a class that it instantiates by name."""

        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            """Names of the layers that can be asked for."""
            return LAYERS

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            """Which of them a metric uses."""
            return "logits" if metric == "isc" else "features"

        @staticmethod
        def can_be_compiled() -> bool:
            """No: the judge decides on its own device and form."""
            return False

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            """Layers in the order in which they were requested, float64."""
            found = dict(zip(LAYERS, judge(images.clamp(-1, 1)), strict=True))
            return tuple(found[layer].double() for layer in self.features_list)

    FEATURE_EXTRACTORS_REGISTRY.pop(name, None)
    register_feature_extractor(name, JudgeFeatures)
    return name


def extract(name: str, batches: Iterable[Tensor]) -> Features:
    """Features of images that come in batches (B, C, H, W), by the extractor registered as `name`.

    Only one batch of images is held at a time. Raises ValueError for a name that is not registered, and for images that
    are not finite, with their number.
    """
    extractor = create_feature_extractor(name, list(LAYERS), cuda=False, verbose=False)
    parts, finite = [], []
    with torch.inference_mode():
        for batch in batches:
            finite.append(batch.flatten(1).isfinite().all(1).cpu())
            parts.append(extractor(batch))
    refuse_broken(torch.cat(finite))
    return Features(*(torch.cat([part[i].cpu() for part in parts]) for i in range(len(LAYERS))))


def refuse_broken(finite: Tensor) -> None:
    """Raise ValueError unless all samples are `finite` (N,), with the number of those that are not and the first."""
    broken = (~finite).nonzero().flatten().tolist()
    if broken:
        raise ValueError(
            f"{len(broken)} of {len(finite)} samples hold NaN or infinity, number {broken[0]} first: nothing can be "
            "measured of them; see to the sampler or the weights"
        )


class FewSamplesError(ValueError):
    """Fewer samples than features: their covariance is singular, and a Frechet distance mostly a matter of how few."""


def fewer_than_features(samples: int, features: int, behind: int | None) -> str | None:
    """What is fewer than the features that a Frechet distance is taken in, with both numbers; None if nothing is.

    behind: images that the reference is of, if that is known. `fewstep report` finds the mark by its first words.
    """
    fewest, what = min((samples, "samples"), (behind or samples, "samples behind the reference"))
    return f"fewer {what} ({fewest:,}) than features ({features:,})" if fewest < features else None


def frechet_distance(a: Gaussian, b: Gaussian, *, allow_few_samples: bool = False) -> float:
    """Frechet distance |mu_a - mu_b|^2 + tr(A + B - 2 (A B)^1/2) of Gaussians with these moments (FID, Heusel 2017).

    A B has the eigenvalues of A^1/2 B A^1/2, which is symmetric: at 2,048 features seconds, where torch-fidelity's
    eigenvalues of the product itself take minutes.

    Raises:
        FewSamplesError: one of them is of fewer samples than features, and `allow_few_samples` is not set.
        ValueError: their features are not equally many, or not finite.
    """
    if a.mean.shape != b.mean.shape:
        raise ValueError(f"features of one extractor are equally many, got {len(a.mean)} and {len(b.mean)}")
    for one in (a, b):
        if one.count is not None and one.count < len(one.mean) and not allow_few_samples:
            raise FewSamplesError(
                f"FID of {one.count:,} samples in {len(one.mean):,} features: must be of as many samples at least; use "
                "KID, which few samples do not bias, or allow_few_samples=true for a number to test with"
            )
    covariances = a.covariance, b.covariance
    if not all(np.isfinite(found).all() for found in (a.mean, b.mean, *covariances)):
        raise ValueError("features must be finite: statistics hold NaN or infinity")
    values, vectors = np.linalg.eigh(covariances[0])
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    shared = np.linalg.eigvalsh(root @ covariances[1] @ root)
    traces = sum(float(np.trace(found)) for found in covariances)
    return float(np.square(a.mean - b.mean).sum()) + traces - 2 * float(np.sqrt(shared.clip(min=0)).sum())


def inception_score(logits: Tensor, splits: int = 1) -> float:
    """Inception score exp E KL(p(y|x) || p(y)) (Salimans 2016) of logits (N, K), mean of `splits` parts; in [1, K].

    One part, not the ten that are usual with 50,000 samples: p(y) of a tenth of a few hundred samples is a poor
    estimate, and the score would depend on the number of samples through it more than on what they are.
    """
    return float(isc_features_to_metric(logits, splits)["inception_score_mean"])


class KernelDistance(NamedTuple):
    """KID: mean and standard deviation over subsets, and their size."""

    mean: float
    std: float
    subset_size: int


def kernel_distance(a: Tensor, b: Tensor, subsets: int = 50, subset_size: int = 1000) -> KernelDistance:
    """Kernel distance (KID, Binkowski 2018; unbiased cubic MMD) between features (N, D) and (M, D).

    The subsets have `subset_size` samples, or half the smaller set where that is less (as here: few held-out digits).
    """
    size = min(subset_size, min(len(a), len(b)) // 2)
    found = kid_features_to_metric(a, b, kid_subsets=subsets, kid_subset_size=size, verbose=False)
    return KernelDistance(
        float(found["kernel_inception_distance_mean"]), float(found["kernel_inception_distance_std"]), size
    )


def standardised(features: Tensor, reference: Tensor) -> Tensor:
    """Features (N, D) less the mean of the reference (M, D), over its standard deviation, dimension by dimension.

    The cubic kernel of KID is made for features of about unit size: (x.y / D + 1)^3 of larger ones is ruled by the few
    samples of the largest norm, and the distance is noise. Dimensions that are constant in the reference are only
    shifted.
    """
    scale = reference.std(0)
    return (features - reference.mean(0)) / torch.where(scale > 0, scale, torch.ones_like(scale))


def class_spread(features: Tensor, labels: Tensor) -> float:
    """Variance within classes: mean squared distance of features (N, D) to the mean of their class, labels (N,).

    Unbiased: over N less the number of classes. A measure of diversity beside recall; 0 for one image per class.
    """
    counts = labels.bincount()
    sums = torch.zeros(len(counts), features.shape[1], dtype=features.dtype).index_add_(0, labels, features)
    means = sums / counts.clamp(min=1)[:, None]
    classes = int((counts > 0).sum())
    return float((features - means[labels]).square().sum() / max(len(labels) - classes, 1))


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1] of samples inside the data's manifold, and of data inside the samples'."""

    precision: float
    recall: float


def precision_recall(samples: Tensor, data: Tensor, neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi 2019) of samples (N, D) against data (M, D), k neighbours."""
    found = prc_features_to_metric(samples, data, prc_neighborhood=neighbours, verbose=False)
    return PrecisionRecall(float(found["precision"]), float(found["recall"]))
