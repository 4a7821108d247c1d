"""Weights folders: checked by their headers alone, and loaded straight to a device and dtype.

| layout    | DiT                        | VAE                                      | T5                       |
| --------- | -------------------------- | ---------------------------------------- | ------------------------ |
| official  | dit.safetensors            | encoder.safetensors, decoder.safetensors | text_encoder/ tokenizer/ |
|           | dit_config.json            | vae_config.json                          |                          |
| diffusers | transformer/ in any shards | vae/                                     | text_encoder/ tokenizer/ |

The official configurations may be absent, which means full size. Each part may lie in either layout; where both do,
the official one is read.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mochi_tune.errors import CheckpointError
from mochi_tune.files import check_header, file_sha256
from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.models.layers import RMSNorm
from mochi_tune.models.vae import Decoder, DecoderConfig, Encoder, EncoderConfig
from mochi_tune.weights.configs import read_config, read_diffusers_config, read_official_config
from mochi_tune.weights.key_map import Pieces, diffusers_map

TEXT_ENCODER = "text_encoder"
# Of the folders that are shipped with mochi-tune: the sha256 of every file.
SUMS = "sha256.json"
FLOAT_DTYPES = ("F32", "BF16", "F16")
# A listing of keys in an error stops here.
MAX_LISTED = 8
# Larger files are sampled by `fingerprint`.
WHOLE_FILE_BYTES = 2**30
BLOCK_BYTES = 2**20
NUM_BLOCKS = 64


@dataclass(frozen=True)
class _Part:
    model: type[nn.Module]
    config_file: str
    folder: str


_PARTS = {
    "dit": _Part(AsymmDiT, "dit_config.json", "transformer"),
    "encoder": _Part(Encoder, "vae_config.json", "vae"),
    "decoder": _Part(Decoder, "vae_config.json", "vae"),
}
_CONFIGS = {AsymmDiT: DiTConfig, Encoder: EncoderConfig, Decoder: DecoderConfig}


def load_dit(
    folder: Path,
    device: torch.device | str,
    dtype: torch.dtype,
    each_block: Callable[[AsymmDiT, nn.Module], None] | None = None,
) -> AsymmDiT:
    """Loads the AsymmDiT, frozen and in eval mode; matrices in `dtype`, norms' weights and `pos_frequencies` in fp32.

    Memory holds the model and one tensor of the file, whatever the file's dtype and layout.

    Args:
        folder: a weights folder in either layout.
        device: of the weights.
        dtype: of the matrices.
        each_block: called with the model and each block as soon as the block is there, so that it can be made smaller
            before the next one is read; the embedders are there by then.

    Raises:
        CheckpointError: no such weights, not a readable safetensors file, or keys or shapes of another model.
    """
    return _load(Path(folder), "dit", device, dtype, each_block)


def load_encoder(folder: Path, device: torch.device | str, dtype: torch.dtype) -> Encoder:
    """Loads the VAE's encoder as `load_dit` does the DiT; norms' weights and biases in fp32."""
    return _load(Path(folder), "encoder", device, dtype)


def load_decoder(folder: Path, device: torch.device | str, dtype: torch.dtype) -> Decoder:
    """Loads the VAE's decoder as `load_dit` does the DiT; norms' weights and biases in fp32."""
    return _load(Path(folder), "decoder", device, dtype)


def check_weights(folder: Path, parts: Sequence[str]) -> None:
    """Refuses weights that would not load, from file headers alone: seconds, at any size.

    Args:
        folder: a weights folder in either layout.
        parts: any of "dit", "encoder", "decoder", "text_encoder".

    Raises:
        CheckpointError: as the loaders; when a shipped file is not what was shipped;
            for T5, when its configuration, a shard or the tokenizer is absent or damaged,
            or when its features do not fit the DiT, if both are asked for.
    """
    folder = Path(folder)
    if (folder / SUMS).exists():
        _check_sums(folder)
    models = {part: _plan(folder, part)[0] for part in parts if part != TEXT_ENCODER}
    if TEXT_ENCODER in parts:
        _check_text_encoder(folder)
        width = read_config(folder / TEXT_ENCODER / "config.json").get("d_model")
        if "dit" in models and width != models["dit"].config.t5_feat_dim:
            raise CheckpointError(
                f"{folder / TEXT_ENCODER} has features of width {width}, the DiT takes "
                f"{models['dit'].config.t5_feat_dim}: put the T5 there that the DiT was trained with."
            )


def has_part(folder: Path, part: str) -> bool:
    """Whether a weights folder holds a part at all, whole or not."""
    folder = Path(folder)
    if part == TEXT_ENCODER:
        return (folder / TEXT_ENCODER).exists()
    return (folder / f"{part}.safetensors").exists() or (folder / _PARTS[part].folder).exists()


def fingerprint(folder: Path, part: str) -> str:
    """Identifies a part's weights by their content: sha256 in hex, whatever the folder is called.

    Files up to 1 GiB are hashed whole. Of larger ones the size and 64 evenly spaced blocks of 1 MiB are, the first with
    the safetensors header, the last with the file's end: other weights differ there, but a few changed bytes between
    the blocks go unseen. The official and the diffusers form of the same weights have different fingerprints.

    Args:
        folder: a weights folder in either layout.
        part: "dit", "encoder", "decoder" or "text_encoder" (which covers the tokenizer).

    Raises:
        CheckpointError: the part is missing.
    """
    folder = Path(folder)
    if part == TEXT_ENCODER:
        _check_text_encoder(folder)
        roots = [folder / TEXT_ENCODER, folder / "tokenizer"]
        files = [p for root in roots for p in root.iterdir() if p.is_file() and not p.name.startswith(".")]
    else:
        found = _find(folder, part)
        files = [*found.shards, *([found.config] if found.config.exists() else [])]
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(folder).as_posix()}\0{path.stat().st_size}\0".encode())
        digest.update(_hash_file(path))
    return digest.hexdigest()


def meta_dit(folder: Path) -> AsymmDiT:
    """Builds the AsymmDiT of a weights folder on the meta device, for its names and shapes; raises as `load_dit`."""
    return _plan(Path(folder), "dit")[0]


def base_identity(folder: Path) -> str:
    """Identifies the DiT that an adapter belongs to, whatever layout and float dtype its weights lie in.

    It is the sha256 of the first row of each block's visual queries, rounded to bf16, so that no large file is read.

    Raises:
        CheckpointError: as `load_dit`.
    """
    model, mapping, files = _plan(Path(folder), "dit")
    digest = hashlib.sha256()
    for block in range(len(model.blocks)):
        name = mapping[f"blocks.{block}.attn.qkv_x.weight"].names[0]
        with safe_open(files[name], "pt") as file:
            row = file.get_slice(name)[:1].to(torch.bfloat16)
        digest.update(row.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


def held_in_fp32(model: nn.Module) -> set[str]:
    """Names the parameters that stay fp32 whatever is asked for: the norms' weights and biases, `pos_frequencies`."""
    norms = {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, RMSNorm | nn.GroupNorm)
        for leaf, _ in module.named_parameters(recurse=False)
    }
    return norms | {"pos_frequencies"}


def _load(
    folder: Path,
    part: str,
    device: torch.device | str,
    dtype: torch.dtype,
    each_block: Callable[[Any, nn.Module], None] | None = None,
) -> Any:
    model, mapping, files = _plan(folder, part)

    def read(name: str) -> Tensor:
        # Opened anew for each tensor: the pages of a mapping count as this process's memory until it is closed.
        with safe_open(files[name], "pt") as file:
            return file.get_tensor(name)

    return _fill(model, lambda name, tensor: mapping[name].join(read, tensor), device, dtype, each_block)


def random_model(
    config: DiTConfig | EncoderConfig | DecoderConfig,
    device: torch.device | str,
    dtype: torch.dtype,
    each_block: Callable[[Any, nn.Module], None] | None = None,
) -> Any:
    """Builds a model of a configuration's sizes with random weights, otherwise as the loaders do; for measuring."""
    model_class = next(model for model, known in _CONFIGS.items() if isinstance(config, known))
    with torch.device("meta"):
        model = model_class(config)
    return _fill(model, lambda _name, tensor: tensor.normal_(0, 0.02), device, dtype, each_block)


def _fill(
    model: nn.Module,
    write: Callable[[str, Tensor], object],
    device: torch.device | str,
    dtype: torch.dtype,
    each_block: Callable[[Any, nn.Module], None] | None,
) -> Any:
    """Gives a model on the meta device its weights, one tensor at a time."""
    fp32 = held_in_fp32(model)
    parameters = list(model.named_parameters())
    blocks = [_block_of(name) for name, _ in parameters]
    for i, (name, parameter) in enumerate(parameters):
        tensor = torch.empty(parameter.shape, dtype=torch.float32 if name in fp32 else dtype, device=device)
        write(name, tensor)
        module, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(module), leaf, nn.Parameter(tensor, requires_grad=False))
        if each_block and blocks[i] and blocks[i] not in blocks[i + 1 : i + 2]:
            each_block(model, model.get_submodule(blocks[i]))
    assert not any(buffer.is_meta for buffer in model.buffers()), "the model has a buffer that nothing fills"
    return model.eval()


def _block_of(name: str) -> str:
    """The block that a parameter of the DiT belongs to, "blocks.3", or "" if it belongs to none."""
    return ".".join(name.split(".")[:2]) if name.startswith("blocks.") else ""


@dataclass(frozen=True)
class _Files:
    diffusers: bool
    config: Path
    shards: list[Path]


def _find(folder: Path, part: str) -> _Files:
    spec = _PARTS[part]
    official, theirs = folder / f"{part}.safetensors", folder / spec.folder
    _require_one(folder, official.name, f"{theirs.name}/")
    if official.exists():
        return _Files(False, folder / spec.config_file, [official])
    return _Files(True, theirs / "config.json", _shards(theirs, "diffusion_pytorch_model"))


def _plan(folder: Path, part: str) -> tuple[Any, dict[str, Pieces], dict[str, Path]]:
    """Builds the model on the meta device and finds each of its tensors: name -> pieces, piece -> file."""
    files = _find(folder, part)
    spec = _PARTS[part]
    config = (read_diffusers_config if files.diffusers else read_official_config)(files.config, part)
    with torch.device("meta"):
        model = spec.model(config)
    mapping = diffusers_map(model) if files.diffusers else {name: Pieces((name,)) for name in model.state_dict()}
    expected = {}
    for name, tensor in model.state_dict().items():
        pieces = mapping[name].names
        expected |= dict.fromkeys(pieces, (tensor.shape[0] // len(pieces), *tensor.shape[1:]))
    found = {name: header for path in files.shards for name, header in _read_header(path).items()}
    if files.diffusers and spec.folder == "vae":
        other = "decoder." if part == "encoder" else "encoder."
        found = {name: header for name, header in found.items() if not name.startswith(other)}
    _check_tensors(files, expected, found)
    return model, mapping, {name: path for name, (path, _, _) in found.items()}


def _shards(folder: Path, stem: str) -> list[Path]:
    """Returns the files of a model saved by diffusers or transformers: the single one, or those of its index."""
    variants = [path for path in sorted(folder.glob(f"{stem}.*.safetensors")) if "-of-" not in path.name]
    variants += sorted(folder.glob(f"{stem}.safetensors.index.*.json"))
    candidates = [folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json", *variants]
    head = next((path for path in candidates if path.exists()), None)
    if head is None:
        raise CheckpointError(f"{folder} has neither {stem}.safetensors nor its shards' index: fetch it again.")
    if head.suffix != ".json":
        return [head]
    weight_map = read_config(head).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{head} has no weight_map: fetch it again.")
    if alien := [name for name in weight_map.values() if not re.fullmatch(r"[\w.-]+\.safetensors", str(name))]:
        raise CheckpointError(f"{head} names files that are not beside it ({alien[0]!a}): fetch it again.")
    shards = [folder / name for name in sorted(set(weight_map.values()))]
    absent = [path.name for path in shards if not path.exists()]
    if absent:
        raise CheckpointError(f"{folder} lacks {_some(absent)}, which {head.name} names: fetch them again.")
    return shards


def _read_header(path: Path) -> dict[str, tuple[Path, tuple[int, ...], str]]:
    """Returns name -> (path, shape, dtype); opening checks that the file is as long as its header says."""
    try:
        check_header(path)
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return {name: (path, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} is not a complete safetensors file ({reason}): delete it and fetch it again."
        ) from error


def _check_tensors(
    files: _Files, expected: dict[str, tuple], found: dict[str, tuple[Path, tuple[int, ...], str]]
) -> None:
    """Compares names, shapes and dtypes, and lists everything that is wrong in one error."""
    shapes = {name: shape for name, (_, shape, _) in found.items()}
    problems = {
        "missing": [name for name in expected if name not in found],
        "unknown": [name for name in found if name not in expected],
        "of another shape": [
            f"{name} {list(shapes[name])} for {list(shape)}"
            for name, shape in expected.items()
            if name in found and shapes[name] != shape
        ],
        "not floating point": [
            f"{name} {dtype}" for name, (_, _, dtype) in found.items() if name in expected and dtype not in FLOAT_DTYPES
        ],
    }
    listed = [f"{len(names)} {what} ({_some(names)})" for what, names in problems.items() if names]
    if listed:
        where = files.config.parent if files.diffusers else files.shards[0]
        config = (
            files.config.name if files.config.exists() else f"the full-size model (there is no {files.config.name})"
        )
        raise CheckpointError(
            f"{where} does not fit {config}, which has {len(expected)} tensors: {'; '.join(listed)}. "
            "Use weights and a configuration of the same model."
        )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more


def _check_sums(folder: Path) -> None:
    sums = read_config(folder / SUMS)
    problems = {
        "lacks": [name for name in sums if not (folder / name).is_file()],
        "is damaged:": [
            n for n, expected in sums.items() if (folder / n).is_file() and file_sha256(folder / n) != expected
        ],
    }
    listed = " and ".join(f"{what} {_some(names)}" for what, names in problems.items() if names)
    if listed:
        raise CheckpointError(
            f"{folder} {listed}, by its {SUMS}: install mochi-tune again, or make or copy these weights again."
        )


def _check_text_encoder(folder: Path) -> None:
    _require_one(folder, "text_encoder/config.json")
    _require_one(folder, "text_encoder/model.safetensors", "text_encoder/model.safetensors.index.json")
    _require_one(folder, "tokenizer/spiece.model", "tokenizer/tokenizer.json")
    read_config(folder / TEXT_ENCODER / "config.json")
    for path in _shards(folder / TEXT_ENCODER, "model"):
        _read_header(path)


def _require_one(folder: Path, *names: str) -> None:
    if not any((folder / name).exists() for name in names):
        raise CheckpointError(
            f"model.weights={folder} has no {' or '.join(names)}: run `mochi-tune weights pull to={folder}`, "
            "or set model.weights to a folder that has it."
        )


def _hash_file(path: Path) -> bytes:
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= WHOLE_FILE_BYTES:
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
            return digest.digest()
        for i in range(NUM_BLOCKS):
            file.seek(i * (size - BLOCK_BYTES) // (NUM_BLOCKS - 1))
            digest.update(file.read(BLOCK_BYTES))
    return digest.digest()
