"""The tokenizer's files: checked without the library that reads them, which takes an empty one in silence."""

from pathlib import Path

from mochi_tune.errors import CheckpointError
from mochi_tune.files import STAND_IN_BYTES, name_stand_in, read_json


def check_tokenizer(folder: Path) -> None:
    """Refuses a tokenizer whose files are cut off, empty or not what their names say.

    Args:
        folder: tokenizer/ of a weights folder.

    Raises:
        CheckpointError: naming the file.
    """
    for path in sorted(folder.glob("*.json")):
        read_json(path)
    for path in folder.glob("*.model"):
        with open(path, "rb") as file:
            start = file.read(STAND_IN_BYTES)
        if what := name_stand_in(start) or ("" if start.strip(b"\0") else "empty"):
            raise CheckpointError(f"{path} is no tokenizer, it is {what}: delete it and fetch it again.")
