"""A cache of prompt features on disk, so that T5 is loaded only for new prompts."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mochi_tune.files import save_tensors


class PromptCache:
    """A folder of features, keyed by the fingerprint of T5's weights, their dtype and the prompt."""

    def __init__(self, folder: Path, text_encoder: str, dtype: torch.dtype) -> None:
        """Initializes the cache without reading or creating the folder.

        Args:
            folder: the folder of the cache; runs and processes can share it.
            text_encoder: fingerprint of T5's weights.
            dtype: dtype of T5.
        """
        self.folder = folder
        self.kind = f"{text_encoder} {dtype}"

    def path(self, prompt: str) -> Path:
        """Returns the path of a prompt's features, whether or not they are cached."""
        return self.folder / f"{hashlib.sha256(f'{self.kind} {prompt}'.encode()).hexdigest()}.safetensors"

    def get(self, prompt: str) -> Tensor | None:
        """Returns the features (n, D) of a prompt on the CPU, or None if they are not cached or are damaged."""
        try:
            # A copy with aligned memory: the rounding of CPU kernels depends on the alignment of their input, which is
            # arbitrary in the file.
            features = load_file(self.path(prompt))["features"].clone()
        except (FileNotFoundError, SafetensorError, KeyError):
            return None
        return features if bool(features.isfinite().all()) else None

    def put(self, prompt: str, features: Tensor) -> None:
        """Saves the features of a prompt; the file appears only when it is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.path(prompt), {"features": features.cpu()}, {"prompt": prompt})
