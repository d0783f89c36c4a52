"""A diffusers network behind the signature of UNet and DiT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fewstep.models.embedding import DIFFUSERS_FEATURES, GuidanceEmbedding, sinusoidal
from fewstep.models.inputs import class_labels, guidance_weight
from fewstep.models.interchange.library import DIT, TEXT_UNET, diffusers, known_class
from fewstep.models.network import Network

# what a network may ask for that nobody here would give it
UNSUPPORTED = {"class_embed_type": (None,), "addition_embed_type": (None,), "encoder_hid_dim_type": (None,),
               "time_embedding_type": ("positional", "learned")}  # fmt: skip


class DiffusersNetwork(Network):
    """UNet2DModel, UNet2DConditionModel or DiTTransformer2DModel, called as ``network(z, time, cond, w)``.

    `cond` is labels or a dict: "y" where it has classes, of which the last index is the null class; "text" (B, L, D)
    and, if padding is to be masked, "text_mask" (B, L), as `encoder_hidden_states` and its mask; "mask" and
    "masked_image" where it is for inpainting (2 C + 1 input channels). Output channels beyond those of z, a learned
    variance, are dropped. Its own dropping of labels is off: what is dropped is the trainer's to say.

    w (w = 0 is no guidance; Stable Diffusion's guidance scale is 1 + w) enters UNet2DConditionModel in the form
    "diffusers" as its own `time_cond_proj_dim`; elsewhere, through hooks on its embeddings, as `GuidanceEmbedding`.

    Args:
        model_class: name of the diffusers class.
        settings: its arguments, as its `config` has them; sample_size must be one number.
        null: shape of each tensor that stands for no text, by its key of `cond`; their values are among the weights.
        guidance: {"form": ..., "w_range": [low, high]} if w is an input.
        model: taken over as it is, instead of a new one of these settings.

    Raises:
        ValueError: an unknown class, or a setting that asks for inputs which are not known here.
        ImportError: diffusers is not installed.
    """

    def __init__(
        self,
        model_class: str,
        settings: Mapping[str, Any],
        *,
        null: Mapping[str, Sequence[int]] | None = None,
        guidance: Mapping[str, Any] | None = None,
        model: nn.Module | None = None,
    ) -> None:
        library = diffusers("a network of diffusers")
        config = {"model_class": known_class(model_class), "settings": dict(settings), "null": dict(null or {})}
        super().__init__(config, input_shape=_input_shape(settings))
        for key, known in UNSUPPORTED.items():
            if settings.get(key, known[0]) not in known:
                right = " or ".join(map(repr, known))
                raise ValueError(f"{model_class} with {key}={settings[key]!r} is not supported: it must be {right}")
        if model is None:
            with torch.device("cpu"):  # whatever surrounds: its tables are not among the weights that loading fills in
                model = getattr(library, model_class)(**settings)
        self.model: Any = model
        for module in self.model.modules():
            if type(module).__name__ == "LabelEmbedding":
                module.dropout_prob = 0.0
        for key, shape in self.config["null"].items():
            self.register_buffer(f"null_{key}", torch.zeros(list(shape)))
        self.guidance: GuidanceEmbedding | None = None
        self._weight: Tensor | None = None  # of the call that is going on, for the hooks
        self._class: Tensor | None = None
        self._guidance_from_config(guidance)

    @property
    def num_classes(self) -> int | None:
        """Number of classes K (index K is the null class), or None if it has no classes."""
        settings = self.config["settings"]
        if self.config["model_class"] == DIT:
            classes: int = settings.get("num_embeds_ada_norm", 1000)
            return classes
        embeddings: int | None = settings.get("num_class_embeds")
        return None if embeddings is None else embeddings - 1

    @property
    def takes_text(self) -> bool:
        """Whether "text" of cond is an input."""
        return bool(self.config["model_class"] == TEXT_UNET)

    @property
    def takes_mask(self) -> bool:
        """Whether it is for inpainting: "mask" and "masked_image" of cond are inputs beside z."""
        return bool(self.config["settings"]["in_channels"] != self.input_shape[0])

    @property
    def takes_guidance(self) -> bool:
        """Whether w is an input."""
        return self.config["guidance"] is not None

    @property
    def guidance_form(self) -> str:
        """The form of guidance embedding that suits it."""
        return "diffusers" if self.takes_text else "normalized"

    @property
    def null_cond(self) -> Tensor | dict[str, Tensor] | None:
        """What stands for no condition: the last class, the text that it was wrapped with; None if that is missing."""
        null = {key: self.get_buffer(f"null_{key}") for key in self.config["null"]}
        if self.takes_text and "text" not in null:
            return None
        if self.num_classes is not None:
            null["y"] = torch.tensor(self.num_classes, device=next(self.parameters()).device)
        return null["y"] if list(null) == ["y"] and not self.takes_mask else null or None

    def add_guidance(self, form: str, w_range: tuple[float, float]) -> None:
        """Accept w from now on; the output stays exactly what it was, at every w, until the new parameters are trained.

        Raises:
            ValueError: it already does, or form or w_range is wrong.
        """
        if self.takes_guidance:
            raise ValueError(f"this {self.config['model_class']} already has a guidance input")
        embeddings = self._embeddings(form)
        first = getattr(embeddings[0], "timestep_embedder", embeddings[0]).linear_1
        with first.weight.device:
            added = GuidanceEmbedding(form, first.in_features, first.out_features, w_range).to(first.weight)
        self.config["guidance"] = {"form": form, "w_range": [float(end) for end in w_range]}
        if not self._has_own_guidance():
            self.guidance = added
            for module in embeddings:
                if form == "diffusers":
                    module.register_forward_pre_hook(self._before_time_embedding)
                else:
                    module.register_forward_hook(self._after_embedding)
        elif self.model.time_embedding.cond_proj is None:  # else it came with one, which is kept
            self.model.time_embedding.cond_proj = added.project
            self.model.register_to_config(time_cond_proj_dim=DIFFUSERS_FEATURES)

    def _has_own_guidance(self) -> bool:
        return self.takes_text and self.config["guidance"]["form"] == "diffusers"

    def _embeddings(self, form: str) -> list[Any]:
        """The modules that w is added before ("diffusers") or after; a DiT has one in every block."""
        if self.config["model_class"] != DIT:
            return [self.model.time_embedding]
        embeddings = [block.norm1.emb for block in self.model.transformer_blocks]
        return [each.timestep_embedder for each in embeddings] if form == "diffusers" else embeddings

    def _guide(self, target: Tensor, context: Tensor) -> Tensor:
        if self.guidance is None or self._weight is None:
            raise RuntimeError("w is known in forward alone: gradient checkpointing of a DiT and guidance do not mix")
        return target + self.guidance.added(context, self._weight).to(target.dtype)

    def _before_time_embedding(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (self._guide(args[0], args[0]), *args[1:])

    def _after_embedding(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        return self._guide(output, output + self._class if self._class is not None else output)

    def forward(self, z: Tensor, time: Tensor, cond: object = None, w: Tensor | float | None = None) -> Tensor:
        """The network's prediction for noisy images. w = 0 is no guidance (Stable Diffusion's guidance scale is 1 + w).

        Shape: z (B, C, H, W), time (B,) indices, cond as the class says, w (B,) -> (B, C, H, W).

        Raises:
            ValueError: an input is missing, superfluous or misshaped, or a label is out of range.
        """
        self._check(z, time)
        weight = guidance_weight(w, time, self.takes_guidance)
        inputs = self._inputs(cond, time)
        if weight is not None and self._has_own_guidance():
            projection = self.model.time_embedding.cond_proj
            inputs["timestep_cond"] = sinusoidal(1000.0 * weight, projection.in_features).to(projection.weight.dtype)
        if self.config["settings"].get("time_embedding_type") == "learned":
            time = time.round().long().clamp(min=0)  # at t = 0 the index is -1
        labels = inputs.get("class_labels")
        embedding = getattr(self.model, "class_embedding", None)  # a DiT's classes are in its embeddings' outputs
        self._weight, self._class = weight, None if embedding is None or labels is None else embedding(labels)
        try:
            output: Tensor = self.model(self._input(z, cond).to(self.model.dtype), timestep=time, **inputs).sample
        finally:
            self._weight = self._class = None
        return output[:, : z.shape[1]].contiguous()

    def _inputs(self, cond: object, time: Tensor) -> dict[str, Any]:
        """What the model takes of cond, under diffusers' names."""
        given = cond if isinstance(cond, Mapping) else {}
        inputs: dict[str, Any] = {}
        if self.num_classes is not None or not (self.takes_text or self.takes_mask):
            inputs["class_labels"] = class_labels(cond, time, self.num_classes)
        if self.takes_text:
            text, width = given.get("text"), self.config["settings"].get("cross_attention_dim", 1280)
            if not isinstance(text, Tensor) or text.ndim != 3 or len(text) != len(time):
                found = tuple(text.shape) if isinstance(text, Tensor) else "nothing"
                raise ValueError(f"cond['text'] must have shape ({len(time)}, length, {width}), got {found}")
            inputs["encoder_hidden_states"] = text.to(self.model.dtype)
            inputs["encoder_attention_mask"] = given.get("text_mask")
        return inputs


def _input_shape(settings: Mapping[str, Any]) -> tuple[int, int, int]:
    """Shape (C, H, W) of z.

    Raises:
        ValueError: no size, or channels that are neither those of z (with a learned variance) nor those of inpainting.
    """
    size, taken = settings.get("sample_size"), settings["in_channels"]
    if not isinstance(size, int):
        raise ValueError(f"sample_size={size!r}: give image_size, the side of the square images in pixels")
    given = taken if settings.get("out_channels") is None else settings["out_channels"]
    if given in (taken, 2 * taken):
        return taken, size, size
    if taken == 2 * given + 1:
        return given, size, size
    raise ValueError(
        f"in_channels={taken} and out_channels={given}: the output must have as many channels as z or, with a learned "
        "variance, twice as many; for inpainting the input has 2 C + 1"
    )
