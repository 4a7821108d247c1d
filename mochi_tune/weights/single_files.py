"""Finds parts in files that hold one or several of them, each with a prefix, as those of ComfyUI.

| file                         | keys                                                       |
| ---------------------------- | ---------------------------------------------------------- |
| DiT                          | blocks.0.attn.qkv_x.weight, or model.diffusion_model.blocks… |
| VAE                          | encoder.layers.0.weight, decoder.blocks.0.0.weight         |
| T5                           | encoder.block.0.layer.0.SelfAttention.q.weight             |
| all in one                   | model.diffusion_model.…, vae.decoder.…,                    |
|                              | text_encoders.t5xxl.transformer.…                          |

One tensor that no other part has identifies each part; what precedes its name is the prefix of the part.
Source: Comfy-Org/ComfyUI comfy/supported_models.py (GenmoMochi), comfy/sd.py (VAE), comfy/model_detection.py.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal, NamedTuple

from mochi_tune.errors import CheckpointError
from mochi_tune.weights.headers import TensorHeader, read_header
from mochi_tune.weights.quantized import check_quantized, names_before_quantization

# A tensor of each part that no other part has, by naming.
_ANCHORS: dict[str, dict[Literal["official", "diffusers"], str]] = {
    "dit": {"official": "blocks.0.attn.qkv_x.weight", "diffusers": "transformer_blocks.0.attn1.to_q.weight"},
    "encoder": {"official": "output_norm.weight", "diffusers": "encoder.proj_in.weight"},
    "decoder": {"official": "blocks.0.1.stack.0.weight", "diffusers": "decoder.block_in.resnets.0.conv1.conv.weight"},
    "text_encoder": {"official": "encoder.block.0.layer.0.SelfAttention.q.weight"},
}
# ComfyUI saves this tensor with every text encoder.
_NOT_USED = ".logit_scale"
# Folders in ComfyUI's `models`, or in a repository with the same layout.
_COMFYUI_FOLDERS = {
    "dit": ("diffusion_models", "unet", "checkpoints"),
    "encoder": ("vae", "checkpoints"),
    "decoder": ("vae", "checkpoints"),
    "text_encoder": ("text_encoders", "clip", "checkpoints"),
}


class Location(NamedTuple):
    """The naming and the prefix of a part's tensors in a file."""

    naming: Literal["official", "diffusers"]
    prefix: str


def find_prefixes(names: Iterable[str]) -> dict[str, Location]:
    """Returns the locations of the parts that have tensors among these names.

    In diffusers' naming of the VAE, "encoder." and "decoder." belong to the names and not to the prefix.
    """
    names = set(names)
    found: dict[str, Location] = {}
    for part, anchors in _ANCHORS.items():
        for naming, anchor in anchors.items():
            prefixes = [name.removesuffix(anchor) for name in names if name == anchor or name.endswith(f".{anchor}")]
            if len(prefixes) == 1:
                found[part] = Location(naming, prefixes[0])
    return found


def locate_part(path: Path, part: str) -> Location | None:
    """Returns the location of a part in a file, or None if the file does not hold it.

    Raises:
        CheckpointError: as `read_header`, or the file holds the part in a quantized format that is not supported.
    """
    headers = read_header(path)
    found = find_prefixes(headers)
    # Some formats also rename the weights.
    if part not in found and part in find_prefixes(names_before_quantization(headers)):
        check_quantized(path, part, headers)
    return found.get(part)


def find_single_files(folder: Path, part: str) -> tuple[list[Path], CheckpointError | None]:
    """Returns the files in a folder, or in ComfyUI's folders in it, that hold a part by its names, in any size.

    ComfyUI's folders may have folders in them, such as diffusion_models/mochi. The second value is the error of the
    first file that is damaged or holds the part in an unsupported format, which may be the wanted one.
    """
    deep = [folder] if folder.name in _COMFYUI_FOLDERS[part] else []
    deep += [home / name for home in (folder, folder / "split_files") for name in _COMFYUI_FOLDERS[part]]
    paths = [path for each in (folder, *deep) for path in sorted(each.glob("*.safetensors"))]
    paths += [path for each in deep for path in sorted(each.glob("*/*.safetensors"))]
    holders, problem = [], None
    for path in dict.fromkeys(path for path in paths if path.is_file()):
        try:
            if locate_part(path, part) is not None:
                holders.append(path)
        except CheckpointError as error:
            problem = problem or error
    return holders, problem


def take_part(headers: Mapping[str, TensorHeader], part: str, is_shared: bool) -> dict[str, TensorHeader]:
    """Returns the headers of a part by the names of its tensors without the prefix.

    Args:
        headers: headers of all tensors, by their names in the files.
        part: "dit", "encoder", "decoder" or "text_encoder".
        is_shared: whether the files may hold other parts. Tensors of no part keep their full name, so that the
            comparison with the model refuses them.
    """
    locations = find_prefixes(headers)
    prefix = locations[part].prefix if part in locations else ""
    others = {location.prefix for location in locations.values()} - {prefix} if is_shared else set()
    found = {}
    for name, header in headers.items():
        if is_shared and name.endswith(_NOT_USED):
            continue
        owner = max((each for each in {prefix, *others} if name.startswith(each)), key=len, default=None)
        if owner == prefix:
            found[name.removeprefix(prefix)] = header
        elif owner is None:
            found[name] = header
    return found
