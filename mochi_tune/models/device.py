"""Device and dtype names of the settings, and giving memory back."""

import gc

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
    # cuDNN rounds fp32 convolutions to TF32 by default: a thousandth of error where fp32 was asked for.
    torch.backends.cudnn.allow_tf32 = False
    return torch.device(name)


def free_memory() -> None:
    """Gives back what deleted models held: some have reference cycles, so that `del` alone does not free them."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
