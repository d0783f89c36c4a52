"""Paired error, guidance response, accuracy and targets by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fewstep.lab.metrics import Target, class_accuracy, guidance_response, paired_error, squared_errors


def test_paired_error_by_hand_with_clamping() -> None:
    """Pixels beyond [-1, 1] are clamped on both sides before they are compared; one root over all pairs and pixels."""
    a = torch.tensor([[3.0, 0.0], [0.5, -7.0]]).view(2, 1, 1, 2)
    b = torch.tensor([[1.2, 0.4], [-0.5, -1.0]]).view(2, 1, 1, 2)
    squared = squared_errors(a, b)  # image 0: (1 - 1)^2, 0.4^2; image 1: 1^2, (-1 - -1)^2
    assert squared.tolist() == pytest.approx([0.08, 0.5])
    found = paired_error(squared)
    assert found.rmse == pytest.approx(math.sqrt(0.29))
    spread = math.sqrt(((0.08 - 0.29) ** 2 + (0.5 - 0.29) ** 2) / 1)
    assert found.stderr == pytest.approx(spread / (2 * math.sqrt(0.29) * math.sqrt(2)))
    assert found.pairs == 2


def test_standard_error_covers_the_truth() -> None:
    """The stated standard error is the spread of the paired error over repetitions (to 15 %, 400 of them)."""
    errors = torch.randn(400, 50, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64).square().mean(2)
    found = [paired_error(row) for row in errors]
    spread = torch.tensor([error.rmse for error in found]).std().item()
    assert sum(error.stderr for error in found) / 400 == pytest.approx(spread, rel=0.15)


def test_equal_images_have_no_error_and_shapes_must_agree() -> None:
    """A broadcast between (B, 1, H, W) and (1, 1, H, W) would compare the wrong pairs in silence."""
    images = torch.rand(4, 1, 2, 2)
    assert paired_error(squared_errors(images, images)) == (0.0, 0.0, 4)
    with pytest.raises(ValueError, match=r"one shape, got \(4, 1, 2, 2\) and \(1, 1, 2, 2\)"):
        squared_errors(images, images[:1])


def test_guidance_response_is_a_mean_of_distances_not_a_root_of_a_mean() -> None:
    """Per-image distances 0.2 and 0.6: mean 0.4, while the RMSE would be 0.447; 0 for a student that ignores w."""
    unguided = torch.zeros(2, 1, 2, 2)
    guided = torch.stack([torch.full((1, 2, 2), 0.2), torch.full((1, 2, 2), -0.6)])
    assert guidance_response(guided, unguided) == pytest.approx(0.4)
    assert guidance_response(unguided, unguided) == 0.0


def test_class_accuracy_counts() -> None:
    logits = torch.eye(4)[[0, 1, 2, 2]]
    assert class_accuracy(logits, torch.tensor([0, 1, 2, 3])) == 0.75


@pytest.mark.parametrize(
    ("value", "limit", "kind", "reached"),
    [
        (0.45, 0.45, "at_most", True),
        (0.46, 0.45, "at_most", False),
        (0.99, 0.99, "at_least", True),
        (0.98, 0.99, "at_least", False),
        (0.86, 0.15, "within", True),
        (1.16, 0.15, "within", False),
        (math.nan, 1.0, "at_most", False),
        (math.nan, 1.0, "at_least", False),
    ],
)
def test_targets(value: float, limit: float, kind: str, reached: bool) -> None:
    """A target read the wrong way round, or passed by NaN, would hide a failure."""
    assert Target("name", value, limit, kind).to_json()["pass"] is reached  # type: ignore[arg-type]  # parametrised
