"""UNet and DiT denoisers with class and guidance-weight conditioning, saved with their settings."""

from fewstep.models.denoiser import GuidedDenoiser, NetworkDenoiser, with_guidance_input
from fewstep.models.dit import DiT
from fewstep.models.embedding import GuidanceEmbedding
from fewstep.models.network import Network, build_network, init_from
from fewstep.models.presets import PRESETS
from fewstep.models.storage import load, save
from fewstep.models.unet import UNet

__all__ = [
    "PRESETS",
    "DiT",
    "GuidanceEmbedding",
    "GuidedDenoiser",
    "Network",
    "NetworkDenoiser",
    "UNet",
    "build_network",
    "init_from",
    "load",
    "save",
    "with_guidance_input",
]
