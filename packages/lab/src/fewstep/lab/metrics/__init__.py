"""Metrics on sets of images, and on images paired by their noise."""

from .clip_score import ClipScore
from .extractors import Extractor, load_extractor
from .fidelity import (
    Features,
    FewSamplesError,
    Judge,
    KernelDistance,
    PrecisionRecall,
    class_spread,
    extract,
    fewer_than_features,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    refuse_broken,
    register_judge,
    standardised,
)
from .interval import wilson
from .moments import Gaussian, Moments, StreamedMoments
from .paired import PairedError, class_accuracy, guidance_response, paired_error, squared_errors
from .statistics import Statistics
from .streamed_score import InceptionScore, StreamedInceptionScore
from .targets import Target

__all__ = [
    "ClipScore",
    "Extractor",
    "Features",
    "FewSamplesError",
    "Gaussian",
    "InceptionScore",
    "Judge",
    "KernelDistance",
    "Moments",
    "PairedError",
    "PrecisionRecall",
    "Statistics",
    "StreamedInceptionScore",
    "StreamedMoments",
    "Target",
    "class_accuracy",
    "class_spread",
    "extract",
    "fewer_than_features",
    "frechet_distance",
    "guidance_response",
    "inception_score",
    "kernel_distance",
    "load_extractor",
    "paired_error",
    "precision_recall",
    "refuse_broken",
    "register_judge",
    "squared_errors",
    "standardised",
    "wilson",
]
