"""Finds and hashes the files of each part of a user's weights.

| layout    | DiT                        | VAE                                      | T5                       |
| --------- | -------------------------- | ---------------------------------------- | ------------------------ |
| official  | dit.safetensors            | encoder.safetensors, decoder.safetensors | text_encoder/ tokenizer/ |
|           | dit_config.json            | vae_config.json                          |                          |
| diffusers | transformer/ in any shards | vae/                                     | text_encoder/ tokenizer/ |
| ComfyUI   | single files in diffusion_models/, vae/, text_encoders/ or checkpoints/, or in a folder in one   |
|           | of these, see `single_files`                                                                     |

Each part may be in any layout; if there are several, the first one in the table is read. Single files without a
configuration next to them have the full size. A folder may also hold only the files of one part, as diffusers saves a
model.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mochi_tune.errors import CheckpointError, some
from mochi_tune.files import file_sha256, parse_object, read_json
from mochi_tune.weights.headers import PICKLES, read_header
from mochi_tune.weights.paths import PART_NAMES, SETTINGS, WeightsPaths
from mochi_tune.weights.single_files import find_prefixes, find_single_files, locate_part

TEXT_ENCODER = "text_encoder"
# File in the folders shipped with mochi-tune that has the sha256 of all others.
SUMS = "sha256.json"
# Maximum size of a file that `fingerprint_files` hashes completely; of larger ones it hashes some blocks.
_MAX_HASHED_BYTES = 2**30
_BLOCK_BYTES = 2**20
_NUM_BLOCKS = 64

_FOLDERS = {"dit": "transformer", "encoder": "vae", "decoder": "vae", TEXT_ENCODER: TEXT_ENCODER}
_STEMS = {TEXT_ENCODER: "model"}
_CLASSES = {"dit": "MochiTransformer3DModel", "encoder": "AutoencoderKLMochi", "decoder": "AutoencoderKLMochi"}
_CONFIGS = {
    "dit": "dit_config.json", "encoder": "vae_config.json", "decoder": "vae_config.json",
    TEXT_ENCODER: "text_encoder_config.json",
}  # fmt: skip
_TOKENIZER_FILES = ("spiece.model", "tokenizer.json")


@dataclass(frozen=True)
class PartFiles:
    """The files of a part.

    Attributes:
        naming: naming of the tensors and of the configuration.
        config: path of the configuration; that of a single file may not exist.
        shards: the safetensors files.
        is_single: whether the part is in a single file, which may hold other parts too.
    """

    naming: Literal["official", "diffusers"]
    config: Path
    shards: list[Path]
    is_single: bool = False

    @property
    def existing(self) -> list[Path]:
        """The files of the part that exist."""
        return [*self.shards, *([self.config] if self.config.exists() else [])]

    @property
    def where(self) -> Path:
        """The file, or the folder of the shards, for messages."""
        is_file = self.is_single or (self.naming == "official" and len(self.shards) == 1)
        return self.shards[0] if is_file else self.config.parent


def find_part(paths: WeightsPaths, part: str, fits: Callable[[PartFiles], bool]) -> PartFiles:
    """Finds the files of "dit", "encoder", "decoder" or "text_encoder".

    Args:
        paths: paths of the weights.
        part: one of these names.
        fits: whether the tensors of a single file are those of the model. It is called only if several files hold such
            a part or one is damaged, because the text encoders of other models are T5s too.

    Raises:
        CheckpointError: the part or one of its shards is missing, or several files hold the part.
    """
    place, setting = paths.of(part), paths.setting(part)
    if place.is_file():
        found = _single(place, part, paths.root)
        if found is None:
            raise CheckpointError(
                f"{setting}={place} holds no {PART_NAMES[part]} of Mochi: use a file that does, or a folder."
            )
        return found
    if setting != "model.weights" and not place.exists():
        raise CheckpointError(
            f"{setting}={place} does not exist: use the file or the folder that has the {PART_NAMES[part]}."
        )
    official, theirs = place / f"{part}.safetensors", place / _FOLDERS[part]
    if part != TEXT_ENCODER and official.exists():
        return PartFiles("official", place / _CONFIGS[part], [official])
    if theirs.exists() and not _is_comfyui_folder(theirs, part):
        return _saved_model(theirs, part, paths.variant)
    if _is_saved_model(place, part):
        return _saved_model(place, part, paths.variant)
    holders, damaged = find_single_files(place, part)
    found = [files for files in (_single(path, part, paths.root) for path in holders) if files is not None]
    if len(found) > 1 or damaged is not None:
        fitting = [files for files in found if fits(files)]
        if damaged is not None and not fitting:
            raise damaged
        found = fitting or found
    if len(found) > 1:
        own = f"{setting}=FILE" if setting != "model.weights" else f"model.{SETTINGS[part]}=FILE"
        names = ", ".join(str(files.where.relative_to(place)) for files in found)
        raise CheckpointError(f"{place} has several files with a {PART_NAMES[part]}, {names}: choose one with {own}.")
    if not found:
        # A folder `vae` may be ComfyUI's.
        folder = f"{theirs.name}/config.json" if theirs.exists() else f"{theirs.name}/"
        names = folder if part == TEXT_ENCODER else f"{official.name} or {folder}"
        raise CheckpointError(
            f"{setting}={place} has no {names} and no file with a {PART_NAMES[part]}: run `mochi-tune weights pull "
            f"to={place}`, or set {setting} to a folder or file that has it."
        )
    return found[0]


def has_part(paths: WeightsPaths, part: str) -> bool:
    """Whether a part exists, complete or not."""
    place = paths.of(part)
    if place.is_file():
        return part in find_prefixes(read_header(place))
    theirs = place / _FOLDERS[part]
    is_theirs = theirs.exists() and not _is_comfyui_folder(theirs, part)
    if (place / f"{part}.safetensors").exists() or is_theirs or _is_saved_model(place, part):
        return True
    return any(find_single_files(place, part))


def find_tokenizer(paths: WeightsPaths) -> Path | None:
    """Finds the folder of T5's tokenizer: next to the weights or T5, or in the ComfyUI folder around the files."""
    if paths.tokenizer:
        candidates = [paths.tokenizer, paths.tokenizer / "tokenizer"]
    else:
        root, text_encoder = (p.parent if p.is_file() else p for p in (paths.root, paths.of(TEXT_ENCODER)))
        candidates = [root / "tokenizer", text_encoder, text_encoder / "tokenizer", text_encoder.parent / "tokenizer"]
        homes = dict.fromkeys([root, root.parent, root.parent.parent, *text_encoder.parents[:2]])
        candidates += [home / "comfy" / "text_encoders" / "t5_tokenizer" for home in homes]
    return next((folder for folder in candidates if any((folder / name).is_file() for name in _TOKENIZER_FILES)), None)


def require_tokenizer(paths: WeightsPaths) -> Path:
    """Finds the folder of T5's tokenizer as `find_tokenizer` does.

    Raises:
        CheckpointError: there is no tokenizer.
    """
    if (folder := find_tokenizer(paths)) is not None:
        return folder
    if paths.tokenizer:
        names = " or ".join(_TOKENIZER_FILES)
        raise CheckpointError(f"model.tokenizer={paths.tokenizer} has no {names}: name the folder that has one.")
    names = " or ".join(f"tokenizer/{name}" for name in _TOKENIZER_FILES)
    raise CheckpointError(
        f"model.weights={paths.root} has no {names}: run `mochi-tune weights pull to={paths.root}`, or set "
        "model.tokenizer to the folder of T5's tokenizer."
    )


def find_shards(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """Returns the files of a model saved by diffusers or transformers: a single file or the shards of an index.

    Args:
        folder: folder of the model.
        stem: stem of the file names.
        variant: variant to use, "bf16" for `STEM.bf16.safetensors`; None for the first complete one.

    Raises:
        CheckpointError: there are no such files, or the index is damaged or names missing files.
    """
    if variant is None:
        variants = [path for path in sorted(folder.glob(f"{stem}.*.safetensors")) if "-of-" not in path.name]
        variants += sorted(folder.glob(f"{stem}.safetensors.index.*.json"))
        candidates = [folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json", *variants]
    else:
        candidates = [folder / f"{stem}.{variant}.safetensors", folder / f"{stem}.safetensors.index.{variant}.json"]
    heads = [path for path in candidates if path.exists()]
    if not heads:
        names = f"{stem}.safetensors" if variant is None else candidates[0].name
        advice = "run `mochi-tune weights pull`, or copy it again" if variant is None else "leave model.variant out"
        others = sorted(path.name for path in folder.glob("*") if path.suffix in (*PICKLES, ".gguf", ".h5", ".msgpack"))
        if others and variant is None:
            advice = "use the same model as safetensors, or run `mochi-tune weights pull`"
            raise CheckpointError(f"{folder} has {some(others)}, and only safetensors files are supported: {advice}.")
        raise CheckpointError(f"{folder} has neither {names} nor its shards' index: {advice}.")
    problem = None
    for head in heads:
        try:
            return [head] if head.suffix != ".json" else _shards_of(head)
        except CheckpointError as error:
            problem = problem or error
    assert problem is not None, "each head was incomplete"
    raise problem


def is_other_index(path: Path, shards: Sequence[Path]) -> bool:
    """Whether a file is the index of other shards than these."""
    if ".safetensors.index." not in path.name:
        return False
    weight_map = (parse_object(path.read_bytes()) or {}).get("weight_map")
    names = {str(name) for name in weight_map.values()} if isinstance(weight_map, dict) else set()
    return not names & {shard.name for shard in shards}


def _shards_of(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: fetch it again.")
    if alien := [name for name in weight_map.values() if not re.fullmatch(r"[\w.-]+\.safetensors", str(name))]:
        raise CheckpointError(f"{index} names files that are not next to it ({alien[0]!a}): fetch it again.")
    shards = [index.parent / name for name in sorted(set(weight_map.values()))]
    if absent := [path.name for path in shards if not path.exists()]:
        raise CheckpointError(f"{index.parent} lacks {some(absent)}, which {index.name} names: fetch them again.")
    return shards


def _saved_model(folder: Path, part: str, variant: str | None) -> PartFiles:
    """Returns the files of a model saved by diffusers or transformers; T5 has the names of transformers everywhere."""
    shards = find_shards(folder, _STEMS.get(part, "diffusion_pytorch_model"), variant)
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder / 'config.json'} is missing: run `mochi-tune weights pull`, or copy it again.")
    return PartFiles("official" if part == TEXT_ENCODER else "diffusers", folder / "config.json", shards)


def _is_saved_model(folder: Path, part: str) -> bool:
    """Whether a folder is that of the part itself, by its configuration."""
    config = folder / "config.json"
    values = (parse_object(config.read_bytes()) or {}) if config.is_file() else {}
    return values.get("model_type") == "t5" if part == TEXT_ENCODER else values.get("_class_name") == _CLASSES[part]


def _is_comfyui_folder(folder: Path, part: str) -> bool:
    """Whether the folder `vae` is that of ComfyUI, with VAEs of many models in single files or in folders."""
    if part not in ("encoder", "decoder") or (folder / "config.json").exists():
        return False
    saved = "diffusion_pytorch_model"
    has_others = any(not path.name.startswith(saved) for path in folder.glob("*.safetensors"))
    return has_others or not any(folder.glob(f"{saved}*"))


def _single(path: Path, part: str, root: Path) -> PartFiles | None:
    if (location := locate_part(path, part)) is None:
        return None
    folders = [path.parent, path.parent.parent, root if root.is_dir() else root.parent]
    configs = [folder / _CONFIGS[part] for folder in folders]
    config = next((path for path in configs if path.exists()), configs[0])
    return PartFiles(location.naming, config, [path], is_single=True)


def check_sums(folder: Path) -> None:
    """Compares the files of a shipped folder with its sha256.json.

    Raises:
        CheckpointError: a file is missing or has another hash.
    """
    sums = read_json(folder / SUMS)
    problems = {
        "lacks": [name for name in sums if not (folder / name).is_file()],
        "is damaged:": [
            name for name, sha256 in sums.items() if (folder / name).is_file() and file_sha256(folder / name) != sha256
        ],
    }
    listed = " and ".join(f"{what} {some(names)}" for what, names in problems.items() if names)
    if listed:
        raise CheckpointError(
            f"{folder} {listed}, by its {SUMS}: install mochi-tune again, or make or copy these weights again."
        )


def fingerprint_files(root: Path, files: Sequence[Path], reading: str = "") -> str:
    """Returns a sha256 in hex of the names and the content of files.

    Files up to 1 GiB are hashed completely. Of larger files, the size and 64 evenly spaced blocks of 1 MiB are hashed,
    including the safetensors header and the end. Other weights differ there, but a few changed bytes between the blocks
    go unnoticed.

    Args:
        root: folder that the names are relative to; files elsewhere have the name of their folder.
        files: files to hash.
        reading: description of a special way of reading the files, which is hashed too.
    """
    digest = hashlib.sha256(reading.encode())
    for path in sorted(files):
        name = path.relative_to(root if path.is_relative_to(root) else path.parent.parent).as_posix()
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        digest.update(_sampled_sha256(path))
    return digest.hexdigest()


def _sampled_sha256(path: Path) -> bytes:
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _MAX_HASHED_BYTES:
            while block := file.read(_BLOCK_BYTES):
                digest.update(block)
            return digest.digest()
        for i in range(_NUM_BLOCKS):
            file.seek(i * (size - _BLOCK_BYTES) // (_NUM_BLOCKS - 1))
            digest.update(file.read(_BLOCK_BYTES))
    return digest.digest()
