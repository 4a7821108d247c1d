"""Reads safetensors headers without the tensors, and compares them with what a model needs."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from mochi_tune.adapters.header import check_header
from mochi_tune.errors import CheckpointError, one_line, some
from mochi_tune.weights.unchanged import FileStamp

FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
_FLOAT_DTYPES = ("F32", "BF16", "F16", *FP8_DTYPES)
# Suffixes of pickles, which can run code when they are opened.
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class TensorHeader(NamedTuple):
    """Description of one tensor in a file's header.

    Attributes:
        path: the file.
        name: name of the tensor in the file.
        shape: shape of the tensor.
        dtype: code of safetensors, such as "BF16".
        stamp: stamp of the file, taken before its header was read.
        scale: tensor that scales an fp8 tensor, if any.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    stamp: FileStamp
    scale: "TensorHeader | None" = None

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in bytes."""
        size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(self.dtype, 1)
        return size * math.prod(self.shape)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Any]:
        """Opens the file for this tensor only, because the pages of a mapping count as memory until it is closed.

        Raises:
            CheckpointError: the file has changed since its header was read.
        """
        with self.stamp.unchanged(self.path), safe_open(self.path, "pt") as file:
            yield file


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Returns the header of each tensor of a file, by name; checks the length of the file.

    Raises:
        CheckpointError: the file is not a complete safetensors file, or has another format.
    """
    try:
        stamp = FileStamp.of(path)
        check_header(path)
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {
                name: TensorHeader(path, name, tuple(s.get_shape()), s.get_dtype(), stamp) for name, s in slices.items()
            }
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        if kind := _name_other_format(path):
            raise CheckpointError(
                f"{path} is {kind}, which is not supported: use the same weights as safetensors, or fetch them with "
                "`mochi-tune weights pull`."
            ) from error
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({one_line(error)}): delete it and fetch it again."
        ) from error


def _name_other_format(path: Path) -> str:
    """Returns the name of another format that a file has, with an article, or "" if it has no known one."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        return "a GGUF file"
    # Files of PyTorch are zip archives with a pickle; old ones start with the pickle.
    if start == b"PK\x03\x04" or (path.suffix in PICKLES and start[:1] == b"\x80"):
        return "a pickle of PyTorch"
    return ""


def check_tensors(
    where: Path, config: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorHeader]
) -> None:
    """Compares names, shapes and dtypes, and lists all differences in one error.

    Args:
        where: file or folder of the tensors.
        config: configuration with the expected sizes; the full size is expected if it does not exist.
        expected: shape of each tensor, by name.
        found: header of each tensor, by the same names.

    Raises:
        CheckpointError: a tensor is missing, unknown, of another shape or not floating point.
    """
    problems = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {list(found[name].shape)} for {list(shape)}"
            for name, shape in expected.items()
            if name in found and found[name].shape != shape
        ],
        "not floating point": [
            f"{name} {header.dtype}"
            for name, header in found.items()
            if name in expected and header.dtype not in _FLOAT_DTYPES
        ],
    }
    listed = [f"{len(names)} {what} ({some(names)})" for what, names in problems.items() if names]
    if listed:
        described = config.name if config.exists() else f"the full-size model (there is no {config.name})"
        raise CheckpointError(
            f"{where} does not fit {described}, which has {len(expected)} tensors: {'; '.join(listed)}. "
            "Use weights and a configuration of the same model."
        )
