"""Finds the files of each part of a weights folder, and hashes them.

| layout    | DiT                        | VAE                                      | T5                       |
| --------- | -------------------------- | ---------------------------------------- | ------------------------ |
| official  | dit.safetensors            | encoder.safetensors, decoder.safetensors | text_encoder/ tokenizer/ |
|           | dit_config.json            | vae_config.json                          |                          |
| diffusers | transformer/ in any shards | vae/                                     | text_encoder/ tokenizer/ |

The official configurations may be absent, which means full size. Each part may be in either layout; where both
exist, the official one is read.
"""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mochi_tune.errors import CheckpointError
from mochi_tune.files import file_sha256
from mochi_tune.weights.configs import read_json

TEXT_ENCODER = "text_encoder"
# Of the folders that are shipped with mochi-tune: the sha256 of every file.
SUMS = "sha256.json"
# A listing of names in an error stops here.
MAX_LISTED = 8
# `fingerprint_files` samples larger files.
MAX_HASHED_BYTES = 2**30
BLOCK_BYTES = 2**20
NUM_BLOCKS = 64

_DIFFUSERS_FOLDERS = {"dit": "transformer", "encoder": "vae", "decoder": "vae"}
_OFFICIAL_CONFIGS = {"dit": "dit_config.json", "encoder": "vae_config.json", "decoder": "vae_config.json"}


@dataclass(frozen=True)
class PartFiles:
    """The files of the DiT, the VAE's encoder or its decoder.

    Attributes:
        is_diffusers: whether they are in diffusers' layout.
        config: the configuration's path; an official one may not exist.
        shards: the safetensors files.
    """

    is_diffusers: bool
    config: Path
    shards: list[Path]

    @property
    def existing(self) -> list[Path]:
        """All files that exist."""
        return [*self.shards, *([self.config] if self.config.exists() else [])]


def find_part(folder: Path, part: str) -> PartFiles:
    """Finds the files of "dit", "encoder" or "decoder".

    Raises:
        CheckpointError: the folder lacks the part, or one of its shards.
    """
    official, theirs = folder / f"{part}.safetensors", folder / _DIFFUSERS_FOLDERS[part]
    require_one(folder, official.name, f"{theirs.name}/")
    if official.exists():
        return PartFiles(False, folder / _OFFICIAL_CONFIGS[part], [official])
    return PartFiles(True, theirs / "config.json", find_shards(theirs, "diffusion_pytorch_model"))


def has_part(folder: Path, part: str) -> bool:
    """Whether the folder has a part at all, complete or not."""
    if part == TEXT_ENCODER:
        return (folder / TEXT_ENCODER).exists()
    return (folder / f"{part}.safetensors").exists() or (folder / _DIFFUSERS_FOLDERS[part]).exists()


def find_shards(folder: Path, stem: str) -> list[Path]:
    """Returns the files of a model saved by diffusers or transformers: the single one, or those of its index.

    Raises:
        CheckpointError: there is neither, or the index is damaged or names a file that is not there.
    """
    variants = [path for path in sorted(folder.glob(f"{stem}.*.safetensors")) if "-of-" not in path.name]
    variants += sorted(folder.glob(f"{stem}.safetensors.index.*.json"))
    candidates = [folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json", *variants]
    head = next((path for path in candidates if path.exists()), None)
    if head is None:
        raise CheckpointError(f"{folder} has neither {stem}.safetensors nor its shards' index: fetch it again.")
    if head.suffix != ".json":
        return [head]
    weight_map = read_json(head).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{head} has no weight_map: fetch it again.")
    if alien := [name for name in weight_map.values() if not re.fullmatch(r"[\w.-]+\.safetensors", str(name))]:
        raise CheckpointError(f"{head} names files that are not beside it ({alien[0]!a}): fetch it again.")
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    absent = [path.name for path in shards if not path.exists()]
    if absent:
        raise CheckpointError(f"{folder} lacks {list_some(absent)}, which {head.name} names: fetch them again.")
    return shards


def require_one(folder: Path, *names: str) -> None:
    """Refuses a weights folder that has none of some files.

    Raises:
        CheckpointError: naming the command that fetches them.
    """
    if not any((folder / name).exists() for name in names):
        raise CheckpointError(
            f"model.weights={folder} has no {' or '.join(names)}: run `mochi-tune weights pull to={folder}`, "
            "or set model.weights to a folder that has it."
        )


def check_sums(folder: Path) -> None:
    """Compares a shipped folder's files with its sha256.json.

    Raises:
        CheckpointError: a file is absent or has another hash.
    """
    sums = read_json(folder / SUMS)
    problems = {
        "lacks": [name for name in sums if not (folder / name).is_file()],
        "is damaged:": [
            name for name, sha256 in sums.items() if (folder / name).is_file() and file_sha256(folder / name) != sha256
        ],
    }
    listed = " and ".join(f"{what} {list_some(names)}" for what, names in problems.items() if names)
    if listed:
        raise CheckpointError(
            f"{folder} {listed}, by its {SUMS}: install mochi-tune again, or make or copy these weights again."
        )


def fingerprint_files(folder: Path, files: Sequence[Path]) -> str:
    """Returns a sha256 in hex of files' content and of their names in a folder.

    Files up to 1 GiB are hashed completely. Of larger ones the size and 64 evenly spaced blocks of 1 MiB are, the first
    with the safetensors header, the last with the file's end: other weights differ there, but a few changed bytes
    between the blocks go unseen.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(_sampled_sha256(path))
    return digest.hexdigest()


def list_some(names: Sequence[str]) -> str:
    """Joins the first names by commas and counts the others."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _sampled_sha256(path: Path) -> bytes:
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= MAX_HASHED_BYTES:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
            return digest.digest()
        for i in range(NUM_BLOCKS):
            file.seek(i * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.digest()
