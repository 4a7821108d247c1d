"""Where a user's weights are."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class WeightsPaths:
    """The places of the weights; each is a file or a folder, of any layout that `weights.files` knows.

    Attributes:
        root: of all parts that have no path of their own.
        transformer: of the DiT.
        vae: of the VAE's encoder and decoder.
        text_encoder: of T5.
        tokenizer: the folder of T5's tokenizer.
        variant: of diffusers' and transformers' files, "bf16" for `model.bf16.safetensors`; None: the first one that
            is complete.
    """

    root: Path
    transformer: Path | None = None
    vae: Path | None = None
    text_encoder: Path | None = None
    tokenizer: Path | None = None
    variant: str | None = None

    def of(self, part: str) -> Path:
        """Returns where "dit", "encoder", "decoder" or "text_encoder" is looked for: in a ComfyUI, its `models`."""
        place = getattr(self, SETTINGS[part]) or self.root
        return place / "models" if (place / "comfy").is_dir() and (place / "models").is_dir() else place

    def setting(self, part: str) -> str:
        """Returns the setting that says so."""
        return f"model.{SETTINGS[part]}" if getattr(self, SETTINGS[part]) else "model.weights"


# The setting of each part, behind `model.`.
SETTINGS = {"dit": "transformer", "encoder": "vae", "decoder": "vae", "text_encoder": "text_encoder"}
# The parts as an error names them.
PART_NAMES = {"dit": "DiT", "encoder": "VAE encoder", "decoder": "VAE decoder", "text_encoder": "T5"}
