"""Checkpoints as another version would have saved them."""

import hashlib
from pathlib import Path

from mochi_tune.files import read_json, write_json
from mochi_tune.training.checkpoint import manifest_of


def edit_state(checkpoint: Path, **changes: object) -> None:
    """Changes entries of a checkpoint's state.json, and its manifest with it; None takes an entry out."""
    path, manifest = checkpoint / "state.json", read_json(checkpoint / "manifest.json")
    write_json(path, {key: value for key, value in (read_json(path) | changes).items() if value is not None})
    sums = manifest["sha256"] | {"state.json": hashlib.sha256(path.read_bytes()).hexdigest()}
    write_json(checkpoint / "manifest.json", manifest_of(manifest["step"], sums))
