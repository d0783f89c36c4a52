"""The judge: a small classifier of the experiment's own, whose features and classes measure samples."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fewstep.distill import Batch
from fewstep.lab.checkpoint import write_tensors, write_text
from fewstep.lab.config import ConfigError
from fewstep.lab.data import Split
from fewstep.lab.one_network import OneNetwork
from fewstep.schedules import Cond, seeded_noise, seeded_uniform

FORMAT = 1
# Streams of the seeded draws: augmentation by noise and by shifts must not share their bits.
NOISE, SHIFT = 0, 1
BATCH = 500  # images that are judged at once


class Classifier(nn.Module):
    """A CNN for small images; its call gives what `fewstep.lab.metrics.Judge` asks for.

    Shape: images (B, C, H, W) in [-1, 1] -> features (B, 2 width) and logits (B, num_classes).
    """

    def __init__(self, channels: int, num_classes: int, width: int = 32):
        super().__init__()
        self.config = {"channels": channels, "num_classes": num_classes, "width": width}
        self.body = nn.Sequential(
            *_layer(channels, width), *_layer(width, width), nn.MaxPool2d(2),
            *_layer(width, 2 * width), *_layer(2 * width, 2 * width), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
            nn.Linear(8 * width, 2 * width), nn.SiLU(),
        )  # fmt: skip
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Features and logits."""
        features = self.body(images)
        return features, self.head(features)


def _layer(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    # No batch statistics: features of an image must not depend on the images beside it.
    return nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(8, outputs), nn.SiLU()


class ClassifierTraining(OneNetwork):
    """Cross-entropy on lightly shifted and noised images, as a method for `fewstep.lab.train`."""

    def __init__(self, classifier: Classifier, max_shift: int, noise: float):
        super().__init__("classifier", classifier)
        self._max_shift, self._noise = max_shift, noise

    def draw(self, x: Tensor, cond: Cond, seeds: Tensor, step: int) -> Batch:
        """Augmented images as z; all times are 0."""
        shifts = seeded_uniform(seeds, (2,), stream=SHIFT).mul(2 * self._max_shift + 1).long() - self._max_shift
        z = shift(x, shifts) + self._noise * seeded_noise(seeds, x.shape[1:], stream=NOISE)
        return Batch(z=z, t=torch.zeros(len(x), device=x.device), cond=cond)

    def targets(self, batch: Batch) -> Tensor:
        """The labels (B,)."""
        assert isinstance(batch.cond, Tensor)
        return batch.cond

    def loss(self, batch: Batch, step: int, targets: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean cross-entropy, and the accuracy on the augmented images as log."""
        labels = self.targets(batch) if targets is None else targets
        _, logits = self.networks["classifier"](batch.z)
        loss = F.cross_entropy(logits.float(), labels)
        return loss, {"loss": loss.detach(), "accuracy": (logits.argmax(1) == labels).float().mean()}


def shift(x: Tensor, offsets: Tensor) -> Tensor:
    """x (B, C, H, W) moved by offsets (B, 2) pixels down and right; what comes in is background (-1)."""
    size, reach = x.shape[-2:], int(offsets.abs().max())
    padded = F.pad(x, (reach,) * 4, value=-1.0)
    rows = torch.arange(size[0], device=x.device) + reach - offsets[:, :1]
    columns = torch.arange(size[1], device=x.device) + reach - offsets[:, 1:]
    samples = torch.arange(len(x), device=x.device)[:, None, None]
    return padded[samples, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


@torch.inference_mode()
def accuracy(classifier: Classifier, split: Split) -> float:
    """The share in [0, 1] of images that it takes for their labels."""
    found = [classifier(images.to(split.labels.device))[1].argmax(1) for images in split.batches(BATCH)]
    return float((torch.cat(found) == split.labels).float().mean())


def save_classifier(classifier: Classifier, folder: Path) -> None:
    """Write `folder/model.safetensors` and `folder/config.json`, each whole or not there, the weights first."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {key: value.cpu() for key, value in classifier.state_dict().items()}
    write_tensors(folder / "model.safetensors", weights)
    write_text(folder / "config.json", json.dumps({"format": FORMAT, "classifier": classifier.config}, indent=1) + "\n")


def load_classifier(folder: Path) -> Classifier:
    """The saved classifier in evaluation mode, on the CPU.

    Raises:
        ConfigError: not there, truncated, of other shapes, or a pickle; one line.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        classifier = Classifier(**config["classifier"])
        classifier.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise ConfigError(f"{folder}: not a whole classifier (model.safetensors, config.json): {reason}") from error
    return classifier.eval()
