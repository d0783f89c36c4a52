"""The judge that measures samples."""

from pathlib import Path

import pytest
import torch

from fewstep.lab.classifier import Classifier, ClassifierTraining, accuracy, load_classifier, save_classifier, shift
from fewstep.lab.config import ConfigError
from fewstep.lab.data import Split
from fewstep.schedules import sample_seeds


def test_shift_moves_each_image_by_its_own_offset_over_background() -> None:
    images = torch.rand(3, 2, 4, 5)
    offsets = torch.tensor([[0, 0], [1, 0], [-1, 2]])
    moved = shift(images, offsets)
    assert torch.equal(moved[0], images[0])
    assert torch.equal(moved[1, :, 1:], images[1, :, :-1])
    assert (moved[1, :, 0] == -1).all()
    assert torch.equal(moved[2, :, :-1, 2:], images[2, :, 1:, :-2])
    assert (moved[2, :, -1] == -1).all()
    assert (moved[2, :, :, :2] == -1).all()


def test_augmentation_is_a_function_of_the_samples_seed_and_covers_its_range() -> None:
    method = ClassifierTraining(Classifier(1, 10, 8), max_shift=1, noise=0.0)
    x = torch.zeros(200, 1, 5, 5)
    x[:, :, 2, 2] = 5.0
    seeds = sample_seeds(0, 0, torch.arange(200))
    z = method.draw(x, torch.zeros(200, dtype=torch.int64), seeds, 0).z
    places = z.flatten(1).argmax(1)
    assert set(places.tolist()) == {5 * row + column for row in (1, 2, 3) for column in (1, 2, 3)}
    half = method.draw(x[100:], torch.zeros(100, dtype=torch.int64), seeds[100:], 0).z
    assert torch.equal(half, z[100:])


def test_features_of_an_image_do_not_depend_on_its_batch() -> None:
    # Broken: FID would depend on the order of the samples.
    torch.manual_seed(0)
    classifier = Classifier(1, 10, 32).eval()
    images = torch.rand(6, 1, 8, 8)
    features, logits = classifier(images)
    assert features.shape == (6, 64)
    alone = classifier(images[3:4])
    torch.testing.assert_close(features[3:4], alone[0])
    torch.testing.assert_close(logits[3:4], alone[1])


def test_saved_judge_judges_the_same(tmp_path: Path) -> None:
    classifier = Classifier(1, 10, 8).eval()
    save_classifier(classifier, tmp_path / "model")
    images = torch.rand(4, 1, 8, 8)
    for mine, theirs in zip(classifier(images), load_classifier(tmp_path / "model")(images), strict=True):
        assert torch.equal(mine, theirs)


def test_accuracy_is_the_share_of_right_answers() -> None:
    classifier = Classifier(1, 3, 8)
    with torch.no_grad():
        classifier.head.weight.zero_()
        classifier.head.bias.copy_(torch.tensor([0.0, 1.0, 0.0]))  # always answers 1
    assert accuracy(classifier, Split(torch.rand(8, 1, 8, 8), torch.tensor([1, 1, 0, 2, 1, 0, 0, 0]))) == 3 / 8


@pytest.mark.parametrize("damage", ["truncated", "pickle", "other width", "missing"])
def test_damaged_judge_is_refused_in_one_line(tmp_path: Path, damage: str) -> None:
    save_classifier(Classifier(1, 10, 8), tmp_path)
    path = tmp_path / "model.safetensors"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-8])
    elif damage == "pickle":
        torch.save({"head": torch.zeros(2)}, path)
    elif damage == "other width":
        save_classifier(Classifier(1, 10, 16), tmp_path / "other")
        path.write_bytes((tmp_path / "other/model.safetensors").read_bytes())
    else:
        path.unlink()
    with pytest.raises(ConfigError, match="not a whole classifier") as caught:
        load_classifier(tmp_path)
    assert "\n" not in str(caught.value)
