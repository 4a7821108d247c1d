"""Checks the header of a safetensors file from elsewhere, before the library parses it.

It is in this room because this is the lowest one that reads such files.
"""

import json
from pathlib import Path
from typing import Any

from mochi_tune.errors import STAND_IN_BYTES, name_stand_in

# The headers of the full-size models and adapters are 20 times smaller.
_MAX_HEADER_BYTES = 4 * 2**20


def check_header(path: Path) -> None:
    """Refuses a safetensors header that is too long, is not JSON or has a name twice, before the library parses it.

    The library checks offsets, sizes and dtypes, but would read a header of a million tensors for half a minute.

    Raises:
        ValueError: the header is one of these, or the file is a web page or a Git LFS pointer.
    """
    with open(path, "rb") as file:
        if kind := name_stand_in(file.read(STAND_IN_BYTES)):
            raise ValueError(f"it is {kind}")
        file.seek(0)
        num_bytes = int.from_bytes(file.read(8), "little")
        if num_bytes > _MAX_HEADER_BYTES:
            raise ValueError(f"its header is {num_bytes} bytes long by its length, the maximum is {_MAX_HEADER_BYTES}")
        header = file.read(num_bytes)
    try:
        json.loads(header, object_pairs_hook=_refuse_twice)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError):
        raise ValueError("its header is not JSON, or is cut off") from None


def _refuse_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("its header has a name twice")
    return entries
