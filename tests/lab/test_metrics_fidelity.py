"""The torch-fidelity wrapper against closed forms, scipy and independent computation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
import torch_fidelity
import torch_fidelity.metric_fid
from torch import Tensor
from torch.utils.data import Dataset

from fewstep.lab.metrics import (
    FewSamplesError,
    Moments,
    StreamedMoments,
    extract,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    register_judge,
    standardised,
)


def gaussian(n: int, dim: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    return torch.randn(n, dim, generator=generator, dtype=torch.float64) @ mix * scale + shift


def judge(images: Tensor) -> tuple[Tensor, Tensor]:
    flat = images.flatten(1)
    return flat[:, :6] + flat[:, 6:12].square(), 4 * flat[:, :5]


class Images(Dataset[Tensor]):
    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def test_frechet_distance_is_scipys_with_a_matrix_square_root() -> None:
    """If it fails, every FID of the report is another distance than the published one."""
    a, b = gaussian(400, 8, seed=0), gaussian(300, 8, seed=1, shift=0.5)
    mu, nu = a.mean(0).numpy(), b.mean(0).numpy()
    s, t = np.cov(a.numpy(), rowvar=False), np.cov(b.numpy(), rowvar=False)
    expected = (mu - nu) @ (mu - nu) + np.trace(s + t - 2 * np.real(scipy.linalg.sqrtm(s @ t)))
    assert frechet_distance(Moments.of(a), Moments.of(b)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_of_gaussians_with_a_shared_basis_is_the_closed_form() -> None:
    """Commuting covariances: |mu - nu|^2 + sum (sd_a - sd_b)^2, known without any square root of a matrix."""
    basis, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(5, 5)))
    sd_a, sd_b = np.array([0.5, 1.0, 2.0, 3.0, 0.1]), np.array([1.0, 1.0, 0.2, 3.5, 0.0])
    mean_a, mean_b = np.zeros(5), np.linspace(-1, 1, 5)

    def with_moments(mean: np.ndarray, sd: np.ndarray) -> Moments:
        return Moments(11, mean, 10 * basis @ np.diag(sd**2) @ basis.T)

    found = frechet_distance(with_moments(mean_a, sd_a), with_moments(mean_b, sd_b))
    assert found == pytest.approx(((mean_a - mean_b) ** 2).sum() + ((sd_a - sd_b) ** 2).sum(), abs=1e-6)


def test_inception_score_by_hand_and_at_its_ends() -> None:
    """IS is 1 for a judge that cannot tell, K for one that is sure of K balanced classes."""
    sure = 100 * torch.eye(4, dtype=torch.float64).repeat(50, 1)
    assert inception_score(torch.zeros(200, 4)) == pytest.approx(1.0)
    assert inception_score(sure, splits=1) == pytest.approx(4.0)
    logits = gaussian(60, 4, seed=2)
    p = logits.exp() / logits.exp().sum(1, keepdim=True)
    by_hand = (p * (p / p.mean(0)).log()).sum(1).mean().exp().item()
    assert inception_score(logits, splits=1) == pytest.approx(by_hand, rel=1e-9)


def test_kernel_distance_is_the_unbiased_cubic_mmd() -> None:
    """Independent double sum over the same random subsets: another kernel or estimator is another KID."""
    a, b = gaussian(40, 3, seed=3), gaussian(40, 3, seed=4, shift=1.0)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def mmd(x: Tensor, y: Tensor) -> float:
        n = len(x)
        within = sum((kernel(s, s).sum() - kernel(s, s).diagonal().sum()) / (n * (n - 1)) for s in (x, y))
        return float(within - 2 * kernel(x, y).mean())

    rng = np.random.RandomState(2020)
    expected = [mmd(a[rng.choice(40, 20, replace=False)], b[rng.choice(40, 20, replace=False)]) for _ in range(7)]
    found = kernel_distance(a, b, subsets=7)
    assert found.subset_size == 20
    assert found.mean == pytest.approx(np.mean(expected), rel=1e-9)
    assert found.std == pytest.approx(np.std(expected), rel=1e-9)


def test_inception_score_does_not_fall_with_the_number_of_samples() -> None:
    """By ten splits the same judge's answers score less on 100 samples than on 5,000: table and figure would differ."""
    logits = (
        20 * torch.eye(10, dtype=torch.float64)[torch.randint(10, (5000,), generator=torch.Generator().manual_seed(0))]
    )
    assert inception_score(logits[:100]) == pytest.approx(inception_score(logits), rel=0.06)
    assert inception_score(logits[:100], splits=10) < 0.8 * inception_score(logits)


def test_kernel_distance_of_standardised_features_tells_a_shift_from_noise() -> None:
    """Judges have features of any size: as they come, a few of large norm make all of KID noise, often negative."""
    a, b = gaussian(1000, 16, seed=3), gaussian(450, 16, seed=3)
    a, b = (x * torch.logspace(0, 2, 16, dtype=torch.float64) + 50 for x in (a, b))
    moved = a + 0.5 * b.std(0) * (torch.arange(16) < 8)
    raw, found = (kernel_distance(moved, b), kernel_distance(standardised(moved, b), standardised(b, b)))
    assert raw.mean < raw.std  # what is to be avoided: half the dimensions are off, and it is lost
    assert found.mean > 3 * found.std
    own = kernel_distance(standardised(a, b), standardised(b, b))
    assert abs(own.mean) < 2 * own.std


def test_standardised_features_have_the_references_moments_and_keep_dead_dimensions() -> None:
    """A unit of the judge that is always 0 on data must not turn every KID into NaN."""
    reference = gaussian(50, 3, seed=4)
    reference[:, 1] = 0.0
    found = standardised(reference, reference)
    assert torch.allclose(found.mean(0), torch.zeros(3, dtype=torch.float64), atol=1e-12)
    assert found.std(0).tolist() == pytest.approx([1.0, 0.0, 1.0])
    assert standardised(reference + 2.0, reference)[:, 1].tolist() == [2.0] * 50


def test_precision_and_recall_are_not_swapped() -> None:
    """Samples in one of the data's two clusters: all precise, half recalled (torch-fidelity < 0.4 had them swapped)."""
    cluster = gaussian(50, 2, seed=5, scale=0.1)
    data = torch.cat([cluster, cluster + 100])
    found = precision_recall(cluster + 1e-9, data)
    assert found.precision == 1.0
    assert found.recall == pytest.approx(0.5)


def test_precision_by_brute_force() -> None:
    """The radius is the distance to the third neighbour, itself not counted."""
    samples, data = gaussian(30, 3, seed=6), gaussian(40, 3, seed=6, shift=0.7)
    radius = torch.cdist(data, data).sort(1).values[:, 3]
    inside = (torch.cdist(samples, data) <= radius).any(1).double().mean().item()
    assert precision_recall(samples, data).precision == pytest.approx(inside)


def test_registered_judge_gives_what_torch_fidelity_itself_computes() -> None:
    """The wrapper's parts and torch_fidelity.calculate_metrics on the registered extractor must be the same numbers."""
    generator = torch.Generator().manual_seed(7)
    a, b = (torch.rand(n, 1, 4, 4, generator=generator) * 2.4 - 1.2 for n in (90, 70))
    name = register_judge("test-judge", judge)
    outside = torch_fidelity.calculate_metrics(
        input1=Images(a), input2=Images(b), cuda=False, isc=True, fid=True, kid=True, prc=True, feature_extractor=name,
        cache=False, save_cpu_ram=True, verbose=False, batch_size=32, isc_splits=1, kid_subsets=5, kid_subset_size=35,
    )  # fmt: skip
    ours_a, ours_b = extract(name, a.split(17)), extract(name, b.split(64))
    kid = kernel_distance(ours_a.features, ours_b.features, subsets=5)
    precision, recall = precision_recall(ours_a.features, ours_b.features)
    assert frechet_distance(Moments.of(ours_a.features), Moments.of(ours_b.features)) == pytest.approx(
        outside["frechet_inception_distance"], rel=1e-9
    )
    assert inception_score(ours_a.logits) == pytest.approx(outside["inception_score_mean"], rel=1e-9)
    assert kid.mean == pytest.approx(outside["kernel_inception_distance_mean"], rel=1e-9)
    assert (precision, recall) == pytest.approx((outside["precision"], outside["recall"]))


def test_judge_sees_clamped_images_and_the_last_registration() -> None:
    """Samples are made with clip=None: unclamped pixels would be judged outside the range it was trained on."""
    register_judge("test-judge", lambda images: (images.flatten(1), images.flatten(1)))
    found = extract(register_judge("test-judge", judge), [torch.full((2, 1, 4, 4), 3.0)])
    assert found.features[0, 0] == 2.0  # 1 + 1^2, not 3 + 3^2
    assert found.features.dtype == torch.float64


def test_streamed_and_merged_moments_are_those_of_the_union() -> None:
    """Features extracted in batches by several processes must give one process's FID."""
    features = gaussian(5003, 5, seed=8, shift=10.0)
    parts = []
    for rank in range(3):
        streamed = StreamedMoments()
        for batch in features[rank::3].split(37):
            streamed.add(batch)
        parts.append(streamed.moments())
    merged = parts[0].merge(parts[1]).merge(parts[2])
    assert merged.count == 5003
    np.testing.assert_allclose(merged.mean, features.mean(0).numpy(), rtol=1e-12)
    np.testing.assert_allclose(merged.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-10)
    other = Moments.of(gaussian(900, 5, seed=9, shift=9.0))
    found = [frechet_distance(one, other) for one in (merged, Moments.of(features))]
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def test_float32_features_far_from_zero_keep_their_covariance() -> None:
    """Sums of squares in float32, or uncentred, lose a small variance beside a large mean."""
    streamed = StreamedMoments()
    features = (gaussian(4000, 2, seed=1) * 1e-2 + 100).float()
    for batch in features.split(1000):
        streamed.add(batch)
    expected = np.cov(features.double().numpy(), rowvar=False)
    np.testing.assert_allclose(streamed.moments().covariance, expected, rtol=1e-9)


def test_no_moments_of_nothing() -> None:
    """A covariance of one sample would be a division by zero, and NaN in a table."""
    with pytest.raises(ValueError, match="one sample or more"):
        StreamedMoments().moments()
    with pytest.raises(ValueError, match="two samples or more"):
        _ = Moments.of(torch.zeros(1, 3)).covariance
    with pytest.raises(ValueError, match=r"N >= 1, got shape \(0, 3\)"):
        Moments.of(torch.zeros(0, 3))


def test_fid_of_fewer_samples_than_features_is_refused_and_kid_offered() -> None:
    """With a singular covariance FID is ruled by the number of samples: such a figure beside a paper's misleads."""
    few, many = Moments.of(gaussian(5, 6, seed=0)), Moments.of(gaussian(6, 6, seed=1))
    for pair in ((few, many), (many, few)):
        with pytest.raises(FewSamplesError, match=r"5 samples in 6 features.*KID.*allow_few_samples=true"):
            frechet_distance(*pair)
    expected = torch_fidelity.metric_fid.fid_statistics_to_metric(
        *({"mu": one.mean, "sigma": one.covariance} for one in (few, many)), False
    )["frechet_inception_distance"]
    assert frechet_distance(few, many, allow_few_samples=True) == pytest.approx(expected, rel=1e-5)


def test_samples_that_are_not_finite_are_counted_and_refused() -> None:
    """One NaN makes every figure NaN; without a count nobody knows whether one image or the sampler is broken."""
    images = torch.zeros(20, 1, 4, 4)
    images[7, 0, 1, 1], images[13] = torch.inf, torch.nan
    with pytest.raises(ValueError, match=r"2 of 20 samples hold NaN or infinity, number 7 first"):
        extract(register_judge("test-judge", judge), images.split(6))
    broken = Moments(9, np.full(2, np.nan), np.eye(2))
    with pytest.raises(ValueError, match="must be finite"):
        frechet_distance(broken, broken)
