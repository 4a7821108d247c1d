"""Paths of a user's weights."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WeightsPaths:
    """Paths of the weights; each is a file or a folder in a layout that `weights.files` lists.

    Attributes:
        root: path of all parts without a path in the other attributes.
        transformer: path of the DiT.
        vae: path of the VAE's encoder and decoder.
        text_encoder: path of T5.
        tokenizer: folder of T5's tokenizer.
        variant: variant of diffusers' and transformers' files, "bf16" for `model.bf16.safetensors`; None for the first
            complete one.
    """

    root: Path
    transformer: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    variant: str | None = None

    def of(self, part: str) -> Path:
        """Returns the path of "dit", "encoder", "decoder" or "text_encoder"; for a ComfyUI folder, its `models`."""
        place = getattr(self, SETTINGS[part]) or self.root
        return place / "models" if (place / "comfy").is_dir() and (place / "models").is_dir() else place

    def setting(self, part: str) -> str:
        """Returns the setting that gives the path of a part."""
        return f"model.{SETTINGS[part]}" if getattr(self, SETTINGS[part]) else "model.weights"


# Setting of each part, after `model.`.
SETTINGS = {"dit": "transformer", "encoder": "vae", "decoder": "vae", "text_encoder": "text_encoder"}
# Names of the parts in messages.
PART_NAMES = {"dit": "DiT", "encoder": "VAE encoder", "decoder": "VAE decoder", "text_encoder": "T5"}
