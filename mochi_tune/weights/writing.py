"""Writes weights of any size."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from mochi_tune.files import atomic_file, safetensors_header


def stream_tensors(
    path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Writes a safetensors file atomically while memory holds one tensor at a time.

    Args:
        path: the file.
        layout: dtype (fp32, bf16 or fp16) and shape of each tensor, in the order of the file. The fp32 tensors come
            first, so that each tensor starts at a multiple of its element size.
        tensors: names and tensors in that order, with those dtypes and shapes.

    Raises:
        OSError: the disk is full or refuses.
    """
    sizes = [dtype.itemsize for dtype, _ in layout.values()]
    assert sizes == sorted(sizes, reverse=True), "tensors of fp32 come first"
    with atomic_file(path, durable=True) as temporary, open(temporary, "wb") as file:
        file.write(safetensors_header(layout, {"format": "pt"}))
        expected = iter(layout.items())
        for name, tensor in tensors:
            assert (name, (tensor.dtype, tuple(tensor.shape))) == next(expected), f"{name} is not what the header says"
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        assert next(expected, None) is None, "the header has more tensors"
