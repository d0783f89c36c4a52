"""UNet and DiT denoisers with class and guidance-weight conditioning, saved with their settings."""

from fewstep.models.autoencoder import Autoencoder, Posterior
from fewstep.models.clip_encoder import ClipTextEncoder
from fewstep.models.denoiser import GuidedDenoiser, NetworkDenoiser, with_guidance_input
from fewstep.models.dit import DiT
from fewstep.models.embedding import GuidanceEmbedding
from fewstep.models.interchange.autoencoder import DiffusersAutoencoder, load_autoencoder
from fewstep.models.interchange.exporting import to_diffusers
from fewstep.models.interchange.importing import from_diffusers
from fewstep.models.interchange.network import DiffusersNetwork
from fewstep.models.network import Network, build_network, init_from
from fewstep.models.presets import PRESETS
from fewstep.models.storage import load, save
from fewstep.models.text_encoder import TextEncoder
from fewstep.models.tokenizer import BPETokenizer, ByteTokenizer
from fewstep.models.unet import UNet

__all__ = [
    "PRESETS",
    "Autoencoder",
    "BPETokenizer",
    "ByteTokenizer",
    "ClipTextEncoder",
    "DiT",
    "DiffusersAutoencoder",
    "DiffusersNetwork",
    "GuidanceEmbedding",
    "GuidedDenoiser",
    "Network",
    "NetworkDenoiser",
    "Posterior",
    "TextEncoder",
    "UNet",
    "build_network",
    "from_diffusers",
    "init_from",
    "load",
    "load_autoencoder",
    "save",
    "to_diffusers",
    "with_guidance_input",
]
