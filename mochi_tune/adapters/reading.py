"""Parses an adapter file of any layout into layers with the names of the file, metadata and the source of alpha.

`files.load_adapter` calls this and converts the names to official ones.
"""

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from mochi_tune.adapters.alphas import FASTVIDEO_CONFIG, PEFT_CONFIG, is_ours, read_alphas
from mochi_tune.adapters.header import check_header
from mochi_tune.adapters.keys import check_foreign, parse_key
from mochi_tune.adapters.layers import LoraLayer, check_layer, check_sizes, is_diffusers
from mochi_tune.adapters.modelspec import HASH_KEY
from mochi_tune.adapters.notes import BAR_DELAY, layer_bar, notify
from mochi_tune.adapters.resolve import PICKLES
from mochi_tune.errors import CheckpointError, one_line, some
from mochi_tune.files import read_json

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# safetensors' codes of the dtypes that an adapter may have.
_CODES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
_HALVES = ("lora_A", "lora_B")
# Empty tensor by which ComfyUI marks files with scaled fp8 weights.
_SCALED_MARKER = "scaled_fp8"
# First bytes of pickles, and of the zip files that hold PyTorch's.
_PICKLE_STARTS = (b"\x80", b"PK\x03\x04")
# Numbers that trainers save with the weights.
_COUNTERS = ("step", "global_step", "steps", "iteration", "epoch")


def read_layers(path: Path, alpha: float | None = None) -> tuple[dict[str, LoraLayer], dict[str, str], str, str]:
    """Reads the layers of an adapter file in fp32.

    Args:
        path: the file.
        alpha: alpha of all layers of a file that states none.

    Returns:
        The layers by the module names of the file's layout, the metadata, the source of alpha in words, and the sha256
        of the file.

    Raises:
        CheckpointError: the file does not exist, is not safetensors (pickles are never opened), is another kind of
            adapter or is damaged, keys are unknown or missing, alphas do not fit or contradict each other, or weights
            are not finite.
    """
    tensors, metadata, header, sums = _read(path)
    try:
        if is_ours(metadata) and HASH_KEY in metadata and metadata[HASH_KEY] != f"0x{sums[1]}":
            _check_rewritten(path, header)
        modules = _group_keys(tensors)
        alphas, source = read_alphas(modules, metadata, {} if is_ours(metadata) else _read_configs(path.parent), alpha)
        layers = {}
        for name in layer_bar("read", modules):
            parts = modules[name]
            magnitude = parts["magnitude"].float() if "magnitude" in parts else None
            layers[name] = LoraLayer(parts["lora_A"].float(), parts["lora_B"].float(), alphas[name], magnitude)
            check_layer(name, layers[name])
    except CheckpointError as error:
        raise CheckpointError(f"adapter {path}: {error}") from error
    return layers, metadata, source, sums[0]


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str], bytes, tuple[str, str]]:
    """Returns the tensors, the metadata, the header, and the sha256 of the file and of its bytes after the header.

    All are of one file, even if another program replaces the file at this path meanwhile.
    """
    if not path.is_file():
        problem = "is not a file" if path.exists() else "does not exist"
        raise CheckpointError(f"adapter {path} {problem}: give a .safetensors file, a folder, or hub:OWNER/NAME.")
    if path.suffix.lower() in PICKLES:
        raise CheckpointError(_pickle(path))
    try:
        with open(path, "rb") as opened:
            _check_start(path, opened.read(9))
            opened.seek(0)
            same = Path(f"/proc/self/fd/{opened.fileno()}")
            if not same.exists():  # A system without /proc.
                same = path
            check_header(same)
            with safe_open(same, "pt") as file:
                _check_sizes(path, file)
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                metadata = file.metadata() or {}
            return tensors, metadata, *_sums(opened)
    except OSError as error:
        raise CheckpointError(
            f"adapter {path} cannot be read ({one_line(error)}): check the disk and the permissions of the file."
        ) from error
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(
            f"adapter {path} is not safetensors, or is damaged ({one_line(error)}): fetch it again, or convert it."
        ) from error


def _check_sizes(path: Path, file: Any) -> None:
    """Refuses keys and sizes that are not those of an adapter, by the header of an open file.

    The file may be a whole model, which takes minutes to read.
    """
    slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
    if any(each.get_dtype() not in _CODES for each in slices.values()):
        # Refused when the tensors are read, unless it is that of a tensor that is ignored.
        return
    try:
        modules = _sort_keys(
            {
                key: torch.empty(each.get_shape(), dtype=_CODES[each.get_dtype()], device="meta")
                for key, each in slices.items()
            }
        )
        for name, parts in modules.items():
            if "lora_A" in parts and "lora_B" in parts:
                check_sizes(name, parts["lora_A"].shape, parts["lora_B"].shape)
    except CheckpointError as error:
        raise CheckpointError(f"adapter {path}: {error}") from error


def _check_start(path: Path, start: bytes) -> None:
    """Refuses a file that is empty, a pickle or not named .safetensors, by its first nine bytes."""
    is_named = path.suffix.lower() == ".safetensors"
    if not start:
        raise CheckpointError(f"adapter {path} is empty: fetch or export it again.")
    # The header follows eight bytes, which can be those of a pickle.
    if start[8:] == b"{":
        if not is_named:
            raise CheckpointError(
                f"adapter {path} is safetensors, but its name does not end so: copy or link it to NAME.safetensors."
            )
    elif not is_named or start.startswith(_PICKLE_STARTS):
        raise CheckpointError(_pickle(path))


def _pickle(path: Path) -> str:
    return (
        f"adapter {path} is not safetensors, and pickles (.pt, .bin, .ckpt) can run code, so they are never opened: "
        "convert it to safetensors first."
    )


def _sums(file: BinaryIO) -> tuple[bytes, tuple[str, str]]:
    """Returns the header, and the sha256 of the file and of its bytes after the header."""
    length = file.read(8)
    header = file.read(int.from_bytes(length, "little"))
    whole, weights = hashlib.sha256(length + header), hashlib.sha256()
    num_bytes = os.fstat(file.fileno()).st_size - file.tell()
    # The first reading of the weights, which takes long from a slow disk.
    with tqdm(None, "read", num_bytes, False, unit="B", unit_scale=True, delay=BAR_DELAY, disable=None) as bar:
        while block := file.read(2**20):
            whole.update(block)
            weights.update(block)
            bar.update(len(block))
    return header, (whole.hexdigest(), weights.hexdigest())


def _check_rewritten(path: Path, raw: bytes) -> None:
    """Refuses a file whose weights do not have the ModelSpec hash in its metadata, unless another program wrote it.

    Other programs copy the metadata, including the hash, into a file whose weights they have changed. Such a file is
    accepted with a notice. Only a header that is byte for byte one of `save_tensors` proves that nobody rewrote the
    file, so that its other bytes are damage: the safetensors library orders the metadata at random, and programs that
    keep the order format the JSON differently.

    Raises:
        CheckpointError: the header `raw` is one of `save_tensors`.
    """
    header = json.loads(raw)
    names = list(header["__metadata__"])
    as_we_write = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    if names == sorted(names) and raw.rstrip(b" ") == as_we_write:
        raise CheckpointError("damaged, its weights are not those that were written: fetch or export it again.")
    notify(f"adapter {path}: another program has changed its weights since mochi-tune wrote them")


def _read_configs(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the configs that trainers write next to an adapter, by file name."""
    return {name: read_json(folder / name) for name in (PEFT_CONFIG, FASTVIDEO_CONFIG) if (folder / name).exists()}


def _group_keys(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Groups the tensors by module and part, and scales fp8 halves.

    Raises:
        CheckpointError: as `_sort_keys`, a module lacks a half, or only some modules have magnitudes.
    """
    modules = _sort_keys(tensors)
    needed = ["lora_A", "lora_B"] + (["magnitude"] if any("magnitude" in parts for parts in modules.values()) else [])
    if missing := [f"{name}.{part}" for name, parts in modules.items() for part in needed if part not in parts]:
        raise CheckpointError(f"incomplete, it lacks {some(missing)}: fetch the file again.")
    if len({is_diffusers(name) for name in modules}) > 1:
        raise CheckpointError(f"it mixes official and diffusers names, {min(modules)} and {max(modules)}.")
    # Files with `weight_scale` tensors have no marker.
    is_scaled = _SCALED_MARKER in tensors or any(
        part.endswith(" scale") for parts in modules.values() for part in parts
    )
    return {name: _unscaled(name, parts, is_scaled) for name, parts in modules.items()}


def _sort_keys(tensors: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Returns the tensors by module and part.

    Raises:
        CheckpointError: a key is unknown, of another kind of adapter, twice or of a second adapter, or a tensor has a
            dtype or a number of dims that is not possible.
    """
    check_foreign(list(tensors))
    modules: dict[str, dict[str, Tensor]] = {}
    unknown, misfits, twice, names = [], [], [], set()
    for text, tensor in tensors.items():
        key = parse_key(text)
        if key is None:
            is_known = text == _SCALED_MARKER or (text in _COUNTERS and tensor.ndim == 0)
            unknown += [] if is_known else [text]
            continue
        parts, tensor = modules.setdefault(key.module, {}), _without_kernel(key.part, tensor)
        names |= {key.adapter} if key.part in _HALVES else set()
        if not _fits(key.part, tensor):
            misfits.append(f"{text} is {str(tensor.dtype)[6:]} {tuple(tensor.shape)}")
        elif key.part in parts:
            twice.append(text)
        else:
            parts[key.part] = tensor
    if not modules:
        raise CheckpointError(
            f"of no known format, its keys are {some(unknown) or 'none'}: they must be like "
            "blocks.0.attn.qkv_x.lora_A or transformer.transformer_blocks.0.attn1.to_q.lora_A.weight; it may be an "
            "adapter of another model than Mochi, such as Wan, Hunyuan, Flux or SDXL."
        )
    if len(names) > 1:
        named = some(sorted(name or "one without a name" for name in names))
        raise CheckpointError(f"it holds several adapters, {named}: save one of them alone.")
    _check_unknown(unknown)
    if misfits:
        raise CheckpointError(
            f"{some(misfits, '; ')}: lora_A and lora_B have two dims and magnitudes one, in fp64, fp32, fp16 or bf16, "
            "and only lora_A and lora_B also in fp8: convert the file, or fetch it again."
        )
    if twice:
        raise CheckpointError(f"it has a layer twice, by {some(twice)}: remove one of the two from the file.")
    return modules


def _check_unknown(unknown: list[str]) -> None:
    """Refuses keys of no layer of Mochi in a file that has keys of others."""
    # The other names in the blocks of LTX-Video and PixArt are Mochi's.
    if others := [text for text in unknown if re.search(r"transformer_blocks[._]\d+[._]attn2[._]", text)]:
        raise CheckpointError(
            f"an adapter of another model, such as LTX-Video: Mochi has no second attention, {some(others, limit=2)}: "
            "use an adapter of Mochi 1."
        )
    if unknown:
        raise CheckpointError(
            f"{len(unknown)} of its keys fit no layer of Mochi, {some(unknown)}: remove them from the file, or use "
            "another file if it is an adapter of another model."
        )


def _without_kernel(part: str, tensor: Tensor) -> Tensor:
    """Returns a half without the dims of a convolution's kernel of size 1, which computes as a Linear."""
    has_kernel = part in _HALVES and tensor.ndim > 2 and set(tensor.shape[2:]) == {1}
    return tensor.flatten(1) if has_kernel else tensor


def _fits(part: str, tensor: Tensor) -> bool:
    """Whether the dtype and the number of dims of a tensor are possible for this part of a layer."""
    if part in _HALVES:
        return tensor.dtype in (*_DTYPES, *_FP8) and tensor.ndim == 2
    if part == "magnitude":
        return tensor.dtype in _DTYPES and tensor.ndim == 1
    return tensor.dtype in _DTYPES or (part == "alpha" and tensor.dtype in (torch.int32, torch.int64))


def _unscaled(name: str, parts: dict[str, Tensor], is_scaled: bool) -> dict[str, Tensor]:
    """Multiplies fp8 halves by their scales; a half has one scale or one per row.

    Source: Comfy-Org/ComfyUI@a125cd8 comfy/ops.py (scaled_fp8_ops): weight * scale_weight.
    """
    unscaled = {part: tensor for part, tensor in parts.items() if not part.endswith(" scale")}
    for half in _HALVES:
        tensor, scale = parts[half], parts.get(f"{half} scale")
        is_fp8 = tensor.dtype in _FP8
        if scale is not None and not is_fp8:
            raise CheckpointError(f"{name}.{half} has a scale but is not fp8: fetch the file again.")
        if scale is None and is_fp8 and is_scaled:
            raise CheckpointError(f"{name}.{half} is fp8 without a scale in a file with scales: fetch the file again.")
        if scale is not None:
            if scale.numel() not in (1, len(tensor)):
                raise CheckpointError(
                    f"{name}.{half} has {scale.numel()} scales, not 1 or one per row: fetch it again."
                )
            unscaled[half] = tensor.float() * scale.float().reshape(-1, 1)
    return unscaled
