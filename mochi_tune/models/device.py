"""Device and dtype names of the settings."""

import torch

from mochi_tune.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def find_device(name: str) -> torch.device:
    """Returns the device of a setting; "auto" is CUDA where there is one.

    Raises:
        ConfigError: CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda: this machine has no CUDA device that torch can use: use device=cpu or auto.")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
