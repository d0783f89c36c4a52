"""The typed schema of an experiment: what a config may contain, with defaults and meaning.

Hydra composes `experiments/<name>/config.yaml` with the groups of `fewstep/lab/conf` into one `Config` (see `compose`).
A field marked `result=False` (progress, logging, saving, cluster) may change between two calls of `fewstep run`; any
other field changes what is computed, and a stage that was made with another value refuses to go on.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from fewstep.lab.cluster.config import ClusterConfig


class ConfigError(ValueError):
    """A mistake of the user's: its message is one line that names key, value and what would be right."""


def _free(default: Any) -> Any:
    """A field that changes no result: two calls of `fewstep run` may differ in it."""
    return field(default=default, metadata={"result": False})


@dataclass
class ShapesConfig:
    """What captioned shapes are made of; every image is a function of (seed, its index) alone.

    count: images of the training split, as many as one likes. held_out: combinations such as "red triangle" that no
    image of training or held-out split contains; `composition` images each contain one, and test what was never seen.
    fewest_objects, most_objects: of a scene, 1 to 3; every number of them is as likely, but for want of room.
    """

    count: int = 20000
    composition: int = 1000
    shapes: list[str] = field(default_factory=lambda: ["circle", "square", "triangle"])
    colours: list[str] = field(default_factory=lambda: ["red", "green", "blue", "yellow"])
    sizes: list[str] = field(default_factory=lambda: ["small", "large"])
    fewest_objects: int = 1
    most_objects: int = 3
    held_out: list[str] = field(default_factory=lambda: ["red triangle", "blue circle"])
    seed: int = 0


@dataclass
class FolderConfig:
    """Images of a folder and what is said of them.

    path: the folder. captions: a file in it (or an absolute path) with one JSON object per line: "file" (below `path`),
    "text", and if wanted "group" (images of one group are never on both sides of the split) and "class" (a name; what
    the judge tells apart).
    """

    path: str = MISSING
    captions: str = "captions.jsonl"


@dataclass
class FilesConfig:
    """Files of mnist, cifar10, cifar10_jpeg, image_folder, webdataset and webdataset_with_captions, and their reading.

    path: their folder. flips: half of the visits of training images are mirrored left to right, by the sample's seed.
    Of the last three, which stay in files: resize: "area", "adm" or "box", see `fewstep.lab.datasets.resizing`;
    workers: processes of each training process that read ahead, 0 for none; max_unreadable: how many different images
    a process may meet that cannot be read, before it stops.
    """

    path: str = MISSING
    flips: bool = False
    resize: str = "area"
    workers: int = _free(4)
    max_unreadable: int = _free(10)


@dataclass
class DataConfig:
    """Where images come from; `heldout` images are kept from every training stage.

    num_classes: what the judge tells apart; of captioned images only the judge sees classes. shapes: of
    captioned_shapes alone. folder: of image_folder_with_captions alone. files: of data sets in files.
    """

    name: str = "digits"
    image_size: int = 8
    channels: int = 1
    num_classes: int = 10
    heldout: int = 450
    shapes: ShapesConfig | None = None
    folder: FolderConfig | None = None
    files: FilesConfig | None = None


@dataclass
class TextConfig:
    """The text encoder of captioned data, trained together with the teacher and frozen after.

    tokenizer: "bpe", learned from the training captions, of at most `vocabulary` tokens, or "bytes"; or "pretrained":
    the encoder comes with a teacher of kind pretrained, and the other keys say nothing. length: most tokens of a
    caption with its end. width, depth, heads: of its transformer; width is the network's `text_width`.
    """

    tokenizer: str = "bpe"
    vocabulary: int = 400
    length: int = 32
    width: int = 64
    depth: int = 2
    heads: int = 4


@dataclass
class NetworkConfig:
    """A network of `fewstep.models`: type ("UNet", "DiT"), named preset, and keyword arguments that override it."""

    type: str = "UNet"
    preset: str = "digits"
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass
class StageConfig:
    """What every stage has. `name` is the key under `stages:` and is filled in by `compose`.

    needs: names of the stages whose folders this one reads; the graph of a run is made of these alone.
    """

    kind: str = MISSING
    needs: list[str] = field(default_factory=list)
    name: str = ""


@dataclass
class TrainingConfig(StageConfig):
    """Options of every stage that trains with the loop of `fewstep.lab.train`.

    updates: optimiser updates, exactly that many; with `seconds`, at most. seconds: how long each training may take:
    after 60 updates their number is settled by their speed, and written to `updates.json`. batch_size: images per
    update over all processes and accumulation.
    anneal: "none", "linear" or "cosine"; the last two reach exactly 0 after the last update.
    ema_half_life: half-life of the averaged weights as a fraction of the run, at most; 0 keeps no average.
    ema_decay: the papers' fixed maximal decay (0.9999) in place of the half-life.
    precision: "fp32", "bf16" or "fp16" (autocast). weight: loss weight by its name in `fewstep.schedules`.
    accumulate: parts in which a process computes its share of the batch, at least; micro_batch: most images in a part,
    null for no limit: parts are then made as needed, so that the batch is the same on any number of GPUs. parallel:
    what several processes do: "ddp", or "fsdp" for networks too large for one GPU (FSDP2: weights, gradients,
    optimiser and averages in shards). activation_checkpointing: computes activations again instead of keeping them.
    """

    updates: int = 1000
    seconds: float | None = None
    batch_size: int = 64
    accumulate: int = 1
    lr: float = 1e-3
    warmup: int = 0  # updates
    anneal: str = "none"
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    eps: float = 1e-8
    weight_decay: float = 0.0
    grad_clip: float | None = 1.0
    ema_half_life: float = 0.0
    ema_decay: float | None = None
    precision: str = "fp32"
    compile: bool = False
    weight: str = "truncated_snr"
    targets: str | None = None  # folder of stored targets, see `fewstep targets`; None computes them
    dropout: float | None = None  # None leaves what the network has
    micro_batch: int | None = _free(None)
    parallel: str = _free("ddp")
    activation_checkpointing: bool = _free(False)
    checkpoint_updates: int = _free(0)  # save every so many updates; 0: by seconds alone
    checkpoint_seconds: float = _free(30.0)  # save every so many seconds; 0: by updates alone
    log_every: int = _free(50)  # updates

    def updates_for(self, steps: int | None) -> int:
        """Updates of the training of a student of that many steps; None: of a stage's only training."""
        at: dict[int | None, int] = getattr(self, "updates_at", {})
        return at.get(steps, self.updates)


@dataclass
class ClassifierConfig(TrainingConfig):
    """The judge: a small CNN trained on the training split; its features measure FID, IS, KID, precision and recall.

    width: channels of its first layer; its features are twice as many. max_shift (pixels) and noise (standard
    deviation): of the augmentation.
    """

    kind: str = "classifier"
    updates: int = 1200
    batch_size: int = 128
    lr: float = 2e-3
    anneal: str = "linear"
    weight_decay: float = 1e-2
    ema_half_life: float = 0.05
    width: int = 32
    max_shift: int = 1
    noise: float = 0.1

    @property
    def features(self) -> int:
        """How many features it gives of an image."""
        return 2 * self.width


@dataclass
class AutoencoderConfig(TrainingConfig):
    """The autoencoder of `space: latent`; levels after the first halve the resolution, so three make f = 4.

    latent_channels, channels, channel_mult, blocks: see `fewstep.models.Autoencoder`. error: "l1" or "l2", of pixels.
    kl: weight of the mean KL to N(0, I) per latent number. chunk: images in a file of latents.
    """

    kind: str = "autoencoder"
    updates: int = 4000
    anneal: str = "linear"
    ema_half_life: float = 0.05
    latent_channels: int = 4
    channels: int = 32
    channel_mult: list[int] = field(default_factory=lambda: [1, 2, 2])
    blocks: int = 1
    error: str = "l1"
    kl: float = 1e-3
    chunk: int = 500


@dataclass
class TextEncoderConfig(TrainingConfig):
    """The text encoder, before a teacher that needs this stage goes on with it.

    It learns to tell from a caption how its picture looks on average, as a thumbnail of `size` x `size` pixels.
    """

    kind: str = "text_encoder"
    updates: int = 4000
    batch_size: int = 128
    anneal: str = "linear"
    size: int = 4


@dataclass
class PretrainedAutoencoderConfig(StageConfig):
    """The autoencoder of `space: latent` that is there already, and not trained.

    path: folder of an AutoencoderKL of diffusers, or of a pipeline with one. chunk: images in a file of latents.
    """

    kind: str = "pretrained_autoencoder"
    path: str = _free(MISSING)
    chunk: int = 500


@dataclass
class TeacherConfig(TrainingConfig):
    """Ordinary training of the denoiser, its condition dropped with probability `cond_drop`."""

    kind: str = "teacher"
    updates: int = 4000
    ema_half_life: float = 0.05
    weight: str = "snr_plus_one"
    cond_drop: float = 0.1


@dataclass
class PretrainedConfig(StageConfig):
    """A teacher that is there already, and not trained; what needs one may need this.

    path: folder of a UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel of diffusers, of a pipeline with one,
    or of a model that fewstep saved. Its images and classes must be those of `data`, its last class the null one; one
    of text has CLIP's text encoder and tokenizer beside it, and `text=pretrained`; one of latents needs `space: latent`
    and a stage of kind pretrained_autoencoder. It brings its network, schedule and prediction: leave out the
    experiment's. scheduler: folder of diffusers' scheduler, where `path` has none. Both may move; a folder is
    recognised by its content.
    """

    kind: str = "pretrained"
    path: str = _free(MISSING)
    scheduler: str | None = _free(None)


@dataclass
class ConvertConfig(TeacherConfig):
    """The teacher fine-tuned to another prediction, so that it can be distilled: x from eps is noise where t nears 1.

    to: "v", "x" or "flow"; the network starts from the teacher's weights. It then stands for the teacher.
    """

    kind: str = "convert"
    updates: int = 2000
    to: str = "v"


@dataclass
class StudentNetworkConfig:
    """What differs from the experiment's `network`; a type or preset of None is the experiment's own."""

    type: str | None = None
    preset: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)


@dataclass
class StudentConfig:
    """`network` as it stands is a copy of the teacher; anything set in it makes a network of its own, initialised from
    the layers that match the teacher's.
    """

    network: StudentNetworkConfig = field(default_factory=StudentNetworkConfig)


@dataclass
class GuideConfig(TrainingConfig):
    """Stage one (paper A, algorithm 1): one network that takes w in place of two guided evaluations.

    w_range: w ~ U[w_min, w_max] per sample; [w, w] is the fixed-w baseline. w = 0 is no guidance (Stable Diffusion's
    guidance scale is 1 + w). guidance_form: "normalized" or "diffusers", the embedding of w.
    """

    kind: str = "guide"
    updates: int = 4000
    anneal: str = "linear"
    ema_half_life: float = 0.05
    dropout: float | None = 0.0
    w_range: list[float] = field(default_factory=lambda: [0.0, 4.0])
    guidance_form: str = "normalized"
    student: StudentConfig = field(default_factory=StudentConfig)


@dataclass
class HalveConfig(TrainingConfig):
    """Stage two (papers C and A, algorithm 2): students of `steps`, each half of the one before.

    The first one's teacher is the stage-one model taking 2 steps[0] half-steps; where a teacher stands beside it in
    `needs`, that one under classifier-free guidance: two evaluations a half-step, without stage one's error. Fresh
    optimiser, learning rate annealed to 0, no average of weights and no dropout in every halving. students:
    "deterministic" (for ddim), "stochastic" (algorithm 3; for samplers.stochastic) or "encoder" (algorithm 4; for
    samplers.encode), each a chain of its own. updates_at: updates of the student of that many steps where they differ
    from `updates`. w_range: None takes the teacher's.
    """

    kind: str = "halve"
    students: str = "deterministic"
    steps: list[int] = field(default_factory=lambda: [16, 8, 4, 2, 1])
    updates: int = 1000
    updates_at: dict[int, int] = field(default_factory=dict)
    anneal: str = "linear"
    dropout: float | None = 0.0
    w_range: list[float] | None = None
    student: StudentConfig = field(default_factory=StudentConfig)


@dataclass
class MomentsConfig(TrainingConfig):
    """Moment matching (paper B): students of `steps` ancestral steps, each trained for itself from the teacher.

    Needs a teacher and, if students are to start from progressively distilled ones, a stage of kind halve that has the
    same steps. method: "alternating" (algorithm 2: an auxiliary denoiser and the student take turns) or "instant"
    (algorithm 3: two half-batches, no auxiliary). updates and warmup count both parities: of N alternating updates
    N / 2 are the student's, of N instant ones all are. updates_at and weight_at: those of the student of that many
    steps. schedule: p(s), as `Config.schedule`; teacher, students and their sampler all run on it, and it is saved with
    them; {} is the experiment's own. Other resolutions ask for another shift or sigma_max in it. weight, weight_at:
    w(s), a loss weight or "adaptive" (DMD's). weight_shift: taken from the log-SNR before w(s), where the schedule is
    shifted by as much for larger images. w_range: null for no guidance, [w, w] for a teacher guided by w and students
    without it, [low, high] for students that take w (w = 0 is no guidance; Stable Diffusion's guidance scale is
    1 + w). renoise (alternating alone): "posterior", or "unconditional" and "ddim" for ablations. clip (instant
    alone): bounds of the teacher's x, straight-through. preconditioner_batches (instant alone): batches on which Adam's
    second moments of the teacher are measured; 0 takes them from its training.
    """

    kind: str = "moments"
    method: str = "alternating"
    steps: list[int] = field(default_factory=lambda: [8, 4, 2, 1])
    updates: int = 4000
    updates_at: dict[int, int] = field(default_factory=dict)
    lr: float = 1e-4
    warmup: int = 100
    anneal: str = "linear"
    betas: list[float] = field(default_factory=lambda: [0.0, 0.99])
    eps: float = 1e-12
    dropout: float | None = 0.0
    schedule: dict[str, Any] = field(default_factory=dict)
    weight: str = "edm_weight"
    weight_at: dict[int, str] = field(default_factory=lambda: {2: "adaptive", 1: "adaptive"})
    weight_shift: float = 0.0
    w_range: list[float] | None = None
    renoise: str = "posterior"
    clip: list[float] | None = None
    preconditioner_batches: int = 0


@dataclass
class SweepConfig(StageConfig):
    """The teacher at its best: ancestral sampling at every pair of `noise_levels` and `weights`, and what it is worth.

    noise_levels: exponents in [0, 1] of paper C, eq. 4; 0 is the plain posterior. weights: w (w = 0 is no guidance;
    Stable Diffusion's guidance scale is 1 + w). schedule: the teacher is sampled on it, {} is its own. The rest as in
    `EvaluateConfig`.
    """

    kind: str = "sweep"
    steps: int = 128
    noise_levels: list[float] = field(default_factory=lambda: [0.0, 0.2, 0.5])
    weights: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.3])
    schedule: dict[str, Any] = field(default_factory=dict)
    num_samples: int = 1000
    chunk: int = 250
    kid_subsets: int = 50
    allow_few_samples: bool = _free(False)  # no figure changes, only whether it is refused
    workers: int = _free(0)
    seed: int = 1


@dataclass
class RatioTarget:
    """`measure` of the students of `steps` of a stage, over that of another's or of the teacher ("teacher").

    One of at_most and at_least is given. aim: reported, but not missed.
    """

    stage: str = MISSING
    steps: int = MISSING
    measure: str = "fid_heldout"
    over: str = "teacher"
    at_most: float | None = None
    at_least: float | None = None
    aim: bool = False


@dataclass
class CompareConfig(StageConfig):
    """Students of several stages (moments, halve) against data, beside the teacher at the best of a sweep.

    Everything is measured on `sampling_seeds` independent sets of `num_samples`, and given as mean and standard
    deviation. weights: the w of students that take it (w = 0 is no guidance; Stable Diffusion's guidance scale is
    1 + w); those without have one row. The rest as in `EvaluateConfig`.
    """

    kind: str = "compare"
    num_samples: int = 1000
    sampling_seeds: int = 3
    weights: list[float] = field(default_factory=lambda: [0.0])
    chunk: int = 250
    kid_subsets: int = 50
    allow_few_samples: bool = _free(False)  # no figure changes, only whether it is refused
    workers: int = _free(0)
    seed: int = 2
    targets: list[RatioTarget] = field(default_factory=list)


@dataclass
class ReferenceConfig:
    """The sampler and steps on the guided teacher that count as truth for the paired error."""

    sampler: str = "dpmpp_2m"
    steps: int = 64


@dataclass
class PairedTarget:
    """The paired error of the student of `steps` at `w` is to be at most `at_most` times the best undistilled one's."""

    w: float = MISSING
    steps: int = MISSING
    at_most: float = MISSING


@dataclass
class TargetsConfig:
    """Figures to reach, each with its verdict in `results.json`; null, or an empty list, asks for nothing.

    A target of a w or of steps that are not evaluated has no verdict, so that `weights` may be chosen freely.

    teacher_accuracy: class accuracy at w = 1, at least. teacher_fid: FID to held-out images at w = 0 over that of as
    many training images. reference: RMSE between the reference sampler and the many-step one. paired: see
    `PairedTarget`. distance: Frechet distance to the teacher's samples of the same w over the best undistilled
    sampler's. response: guidance response over the teacher's is to lie within 1 +- this. fid: FID to held-out images at
    w = 0 over the teacher's. stage_one: paired error of stage one alone, an aim only. overhead: time of ddim over that
    of its calls. distance, response and fid are asked of the student of `EvaluateConfig.headline` steps.
    """

    teacher_accuracy: float | None = None
    teacher_fid: float | None = None
    reference: float | None = None
    paired: list[PairedTarget] = field(default_factory=list)
    distance: float | None = None
    response: float | None = None
    fid: float | None = None
    stage_one: float | None = None
    overhead: float | None = None


@dataclass
class TimingConfig:
    """How seconds per batch are measured: `repeats` interleaved runs of every sampler, their medians.

    batches: batch sizes. teacher_steps: steps of the guided teacher that are timed, then scaled to all of its steps.
    """

    batches: list[int] = field(default_factory=lambda: [1, 64, 256])
    repeats: int = 5
    teacher_steps: int = 8


@dataclass
class EvaluateConfig(StageConfig):
    """What is measured: distances to data and to the teacher, class accuracy, paired error, time.

    The first stage of kind halve in `needs` is the one that is judged, others are rows beside it. num_samples: samples
    per w for the distances. paired_noises: noises per w for the paired error. weights: the values of w (w = 0 is no
    guidance; Stable Diffusion's guidance scale is 1 + w). steps: the students'; headline: the one that is held against
    most targets. reference: the teacher's sampler for paired errors and distances. truth: the many-step one, against
    which `reference` is first held on `check_noises` noises of each of `check_weights` (empty: `weights`), and over
    whose time speed-ups are taken. guide_steps: steps of stage one alone. curve_weights, curve_samples,
    curve_reference: w, samples per w (0: num_samples) and teacher sampler of the FID-IS curve. floor: also two sets of
    teacher samples against each other. chunk: images sampled at once. kid_subsets: subsets that KID is the mean of.
    allow_few_samples: also FID of fewer samples than the judge has features, marked in every table: to test with.
    workers: processes that sample; 0: one per core on the CPU, each of one thread, and one on a GPU.
    """

    kind: str = "evaluate"
    num_samples: int = 1000
    paired_noises: int = 128
    weights: list[float] = field(default_factory=lambda: [0.0, 1.0, 3.0])
    steps: list[int] = field(default_factory=lambda: [16, 8, 4, 2, 1])
    headline: int = 4
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    truth: ReferenceConfig = field(default_factory=lambda: ReferenceConfig("ddim", 512))
    check_noises: int = 64
    check_weights: list[float] = field(default_factory=list)
    guide_steps: int = 64
    curve_weights: list[float] = field(default_factory=lambda: [0.0, 0.3, 0.5, 1.0, 2.0, 3.0, 4.0])
    curve_samples: int = 0
    curve_reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    chunk: int = 250
    kid_subsets: int = 50
    allow_few_samples: bool = _free(False)  # no figure changes, only whether it is refused
    workers: int = _free(0)
    seed: int = 1
    floor: bool = False
    timing: TimingConfig = field(default_factory=TimingConfig)
    targets: TargetsConfig = field(default_factory=TargetsConfig)


@dataclass
class GridTarget:
    """`measure` of the students of `steps` of a stage at `w`, over that of another stage's, is to be at most `at_most`.

    w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w). measure: "fid_heldout" or "paired_error".
    """

    stage: str = MISSING
    over: str = MISSING
    w: float = MISSING
    steps: int = MISSING
    measure: str = "fid_heldout"
    at_most: float = 1.0


@dataclass
class AlignmentTarget:
    """The share of captions of which `measure` holds, for the students of `steps` of a stage at `w`.

    steps: 0 for the guided teacher itself. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w). measure:
    "all" or a part of what captions say ("objects", "sizes", "relation", "place"), or "unseen" (of combinations that
    training never met). at_least: a share in [0, 1]. below: points in [0, 1] that the students may be below the
    teacher. One of the two is given.
    """

    stage: str = MISSING
    w: float = MISSING
    steps: int = 0
    measure: str = "all"
    at_least: float | None = None
    below: float | None = None


@dataclass
class GridConfig(StageConfig):
    """FID, IS, class accuracy and paired error over w x steps: every student of the stages of kind halve in `needs`,
    and undistilled samplers at equal cost.

    sampling_seeds: independent sets of `num_samples` that a figure is the mean of; the paired error is of the first
    set's first `paired_noises`. weights: w, where the students know it (w = 0 is no guidance; Stable Diffusion's
    guidance scale is 1 + w). steps: those of the columns. reference: the teacher's sampler, of its column and of paired
    errors. truth: a slower one, measured at `truth_weights` alone, and what captions are held against there. features:
    name of a published extractor (inception-v3-compat, ...) or folder of a classifier, with its weights in
    `extractor_weights` (default: in torch's cache); without it, the classifier in `needs`. statistics: an .npz that FID
    is held against in place of the held-out images (ours, ADM's, EDM's). keep_samples: false deletes the samples that
    no paired error needs once their features are there. The rest as in `EvaluateConfig`.
    """

    kind: str = "grid"
    num_samples: int = 1000
    sampling_seeds: int = 3
    paired_noises: int = 128
    weights: list[float] = field(default_factory=lambda: [0.0, 0.3, 1.0, 3.0])
    steps: list[int] = field(default_factory=lambda: [16, 8, 4, 2, 1])
    reference: ReferenceConfig = field(default_factory=ReferenceConfig)
    truth: ReferenceConfig = field(default_factory=lambda: ReferenceConfig("ddim", 256))
    truth_weights: list[float] = field(default_factory=list)
    chunk: int = 250
    allow_few_samples: bool = _free(False)  # no figure changes, only whether it is refused
    workers: int = _free(0)
    seed: int = 3
    targets: list[GridTarget] = field(default_factory=list)
    alignment: list[AlignmentTarget] = field(default_factory=list)  # of captioned shapes alone
    features: str = ""
    extractor_weights: str = ""
    statistics: str = ""
    keep_samples: bool = _free(True)


@dataclass
class InvertConfig(StageConfig):
    """Distilled encoders against reverse DDIM on the guided teacher: latents, round trips, style transfer.

    Needs the classifier, the teacher, and two stages of kind halve: one of encoders, one of deterministic students.
    images: held-out images that are encoded. weights: w of encoder and decoder (w = 0 is no guidance; Stable
    Diffusion's guidance scale is 1 + w). steps: those of encoders and decoders, and of DDIM beside them. truth_steps:
    of the DDIM inversion that latents are held against. headline: steps that `at_most` is about, the limit of an
    encoder's latent and round-trip error over those of DDIM; null asks for nothing. chunk: images at once.
    """

    kind: str = "invert"
    images: int = 200
    weights: list[float] = field(default_factory=lambda: [0.0, 1.0])
    steps: list[int] = field(default_factory=lambda: [16, 8, 4])
    truth_steps: int = 512
    headline: int = 8
    at_most: float | None = None
    chunk: int = 250


@dataclass
class EditsConfig(StageConfig):
    """Editing and inpainting of captioned shapes by prompt: one object is to get another colour or shape.

    Needs a teacher and a stage of kind halve whose students sample. prompts: held-out scenes, each with one change. w:
    of all models (w = 0 is no guidance; Stable Diffusion's guidance scale is 1 + w). strengths: of editing, each
    measured where it is a whole number of steps. steps: the students'. reference: the teacher's sampler and steps.
    margin: pixels hidden around an object's bounding box. reach: pixels by which an object may lie off its place.
    headline, headline_strength: steps and strength that are held against the teacher: `points` in [0, 1] is how far
    their share of successes may lie below its own; null asks for nothing. The rest as in `EvaluateConfig`.
    """

    kind: str = "edits"
    prompts: int = 1000
    w: float = 2.0
    strengths: list[float] = field(default_factory=lambda: [0.5, 0.75])
    steps: list[int] = field(default_factory=lambda: [4, 2])
    headline: int = 4
    headline_strength: float = 0.75
    reference: ReferenceConfig = field(default_factory=lambda: ReferenceConfig("ddim", 64))
    margin: float = 2.0
    reach: float = 3.0
    points: float | None = None
    chunk: int = 250
    workers: int = _free(0)
    seed: int = 4


@dataclass
class ReportConfig(StageConfig):
    """The HTML page and its pictures."""

    kind: str = "report"
    title: str = ""


STAGES: dict[str, type[StageConfig]] = {
    "classifier": ClassifierConfig,
    "autoencoder": AutoencoderConfig,
    "pretrained_autoencoder": PretrainedAutoencoderConfig,
    "text_encoder": TextEncoderConfig,
    "teacher": TeacherConfig,
    "pretrained": PretrainedConfig,
    "convert": ConvertConfig,
    "guide": GuideConfig,
    "halve": HalveConfig,
    "moments": MomentsConfig,
    "sweep": SweepConfig,
    "evaluate": EvaluateConfig,
    "grid": GridConfig,
    "invert": InvertConfig,
    "edits": EditsConfig,
    "compare": CompareConfig,
    "report": ReportConfig,
}


@dataclass
class Config:
    """One experiment.

    out: the run's folder. device: "auto", "cpu", "cuda", "cuda:1". threads: of torch, on the CPU; None: its choice.
    weights: "bf16" saves models with weights rounded to bfloat16 (in files of float32: half of one holds them exactly).
    schedule: type and arguments, as `fewstep.schedules.schedule_from_config` reads them. prediction: "x", "eps", "v" or
    "flow". These and `network` are left out where the teacher is of kind pretrained and brings its own. text: of
    captioned data alone. stages: name -> one of the dataclasses above, in the order in which they run.
    cluster: see `ClusterConfig`.
    """

    name: str = _free(MISSING)
    out: str = _free("runs/${name}")
    seed: int = 0
    device: str = "auto"
    threads: int | None = None
    weights: str | None = None
    deterministic: bool = False  # on GPUs: the same bits every time, slower; the CPU always gives them
    progress: bool = _free(True)
    tensorboard: bool = _free(True)
    data: DataConfig = field(default_factory=DataConfig)
    schedule: dict[str, Any] = field(default_factory=lambda: {"type": "Cosine"})
    prediction: str = "v"
    network: NetworkConfig = field(default_factory=NetworkConfig)
    space: str | None = None  # "latent": denoisers work on the latents of a stage of kind (pretrained_)autoencoder
    text: TextConfig | None = None
    stages: dict[str, Any] = field(default_factory=dict)
    cluster: ClusterConfig = field(default_factory=ClusterConfig, metadata={"result": False})
