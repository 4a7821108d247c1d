"""Safetensors headers: read without the tensors, and compared with what a model needs."""

import contextlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from mochi_tune.adapters.header import check_header
from mochi_tune.errors import CheckpointError, some
from mochi_tune.weights.unchanged import FileStamp

FP8_DTYPES = ("F8_E4M3", "F8_E5M2")
FLOAT_DTYPES = ("F32", "BF16", "F16", *FP8_DTYPES)
# How files that can run code when they are opened are named.
PICKLES = (".bin", ".pt", ".pth", ".ckpt")


class TensorHeader(NamedTuple):
    """What a file's header says of one tensor.

    Attributes:
        path: the file.
        name: in the file.
        shape: of the tensor.
        dtype: as safetensors writes it, "BF16".
        stamp: of the file, taken before its header was read.
        scale: the tensor that an fp8 tensor is multiplied with.
    """

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: str
    stamp: FileStamp
    scale: "TensorHeader | None" = None

    @property
    def num_bytes(self) -> int:
        """Of its numbers."""
        size = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}.get(self.dtype, 1)
        return size * math.prod(self.shape)

    @contextlib.contextmanager
    def opened(self) -> Iterator[Any]:
        """Opens the file to read this tensor alone: the pages of a mapping count as memory until it is closed.

        Raises:
            CheckpointError: it is not the file any more whose header was read.
        """
        with self.stamp.unchanged(self.path), safe_open(self.path, "pt") as file:
            yield file


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Returns a file's tensors by name; opening it checks that it is as long as its header says.

    Raises:
        CheckpointError: not a complete safetensors file, or one of another format.
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
                f"{path} is {kind}, which is not read: name the same weights as safetensors, or fetch them by "
                "`mochi-tune weights pull`."
            ) from error
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({reason}): delete it and fetch it again."
        ) from error


def _name_other_format(path: Path) -> str:
    """Says what a good file of another format is, with an article; "" where it is none that is known."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        return "a GGUF file"
    # PyTorch's are zip archives of a pickle, its old ones begin with the pickle itself.
    if start == b"PK\x03\x04" or (path.suffix in PICKLES and start[:1] == b"\x80"):
        return "a pickle of PyTorch"
    return ""


def check_tensors(
    where: Path, config: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorHeader]
) -> None:
    """Compares names, shapes and dtypes, and lists everything that is wrong in one error.

    Args:
        where: the file or the folder of the tensors.
        config: the configuration that tells what is expected; where it does not exist, the full size is.
        expected: the shape of each tensor, by its name.
        found: in the files, by the same names.

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
            if name in expected and header.dtype not in FLOAT_DTYPES
        ],
    }
    listed = [f"{len(names)} {what} ({some(names)})" for what, names in problems.items() if names]
    if listed:
        told = config.name if config.exists() else f"the full-size model (there is no {config.name})"
        raise CheckpointError(
            f"{where} does not fit {told}, which has {len(expected)} tensors: {'; '.join(listed)}. "
            "Use weights and a configuration of the same model."
        )
