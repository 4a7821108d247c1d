"""A pickle that shows when it is opened."""

import pickle
from pathlib import Path

import torch


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


def plant(path: Path, marker: Path, num_bytes: int = 0) -> Path:
    """Puts a pickle in the place of a file, of the same size where it was larger, or as torch.save writes one."""
    if num_bytes:
        path.write_bytes(pickle.dumps(Bomb(marker)).ljust(num_bytes, b"\0"))
    else:
        torch.save({"state_dict": Bomb(marker)}, path)
    return path
