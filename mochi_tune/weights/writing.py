"""Writing weights of any size."""

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mochi_tune.files import atomic_file


def stream_tensors(
    path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, Tensor]]
) -> None:
    """Writes a safetensors file of any size while one tensor is in memory at a time; complete or not there.

    Source: huggingface/safetensors@v0.8.0 README.md (Format).

    Args:
        path: the file.
        layout: dtype (fp32, bf16 or fp16) and shape of each tensor, in the file's order; those of fp32 come first, so
            that each one begins at a multiple of its elements' size.
        tensors: names and tensors in that order, of those dtypes and shapes.

    Raises:
        OSError: the disk is full, or refuses.
    """
    codes = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        assert begin % dtype.itemsize == 0, "tensors of fp32 come first"
        header[name] = {"dtype": codes[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_file(path, durable=True) as temporary, open(temporary, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        expected = iter(layout.items())
        for name, tensor in tensors:
            assert (name, (tensor.dtype, tuple(tensor.shape))) == next(expected), f"{name} is not what the header says"
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        assert next(expected, None) is None, "the header has more tensors"
