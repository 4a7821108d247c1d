"""Features of prompts that were encoded before, kept on disk: T5 is loaded only for a prompt that is new."""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mochi_tune.files import save_tensors


class PromptCache:
    """A folder of features, by the content of T5's weights, their dtype and the prompt."""

    def __init__(self, folder: Path, text_encoder: str, dtype: torch.dtype) -> None:
        """Opens a folder, which need not exist.

        Args:
            folder: of the cache; may be shared by runs and processes.
            text_encoder: the fingerprint of T5's weights.
            dtype: that T5 runs in.
        """
        self.folder = folder
        self.kind = f"{text_encoder} {dtype}"

    def path(self, prompt: str) -> Path:
        """Returns the file of a prompt's features, which need not exist."""
        return self.folder / f"{hashlib.sha256(f'{self.kind} {prompt}'.encode()).hexdigest()}.safetensors"

    def get(self, prompt: str) -> Tensor | None:
        """Returns the features (n, D) of a prompt on the CPU; None if they are not there, or damaged."""
        try:
            # In the file they begin at any address, and a CPU's kernels round by where their input begins.
            features = load_file(self.path(prompt))["features"].clone()
        except (FileNotFoundError, SafetensorError, KeyError):
            return None
        return features if bool(features.isfinite().all()) else None

    def put(self, prompt: str, features: Tensor) -> None:
        """Saves the features of a prompt; the file appears only when it is complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        save_tensors(self.path(prompt), {"features": features.cpu()}, {"prompt": prompt})
