"""Lists what `weights pull` downloads: the repositories of each source, and the files that the verbs need.

| source    | repository                         | in the weights folder                                        |
| --------- | ---------------------------------- | ------------------------------------------------------------ |
| official  | genmo/mochi-1-preview              | dit, encoder, decoder .safetensors, text_encoder/ tokenizer/ |
| diffusers | genmo/mochi-1-preview              | transformer/ vae/ text_encoder/ tokenizer/                   |
| comfyui   | Comfy-Org/mochi_preview_repackaged | diffusion_models/ vae/ text_encoders/                        |
|           | genmo/mochi-1-preview              | tokenizer/                                                   |
"""

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

from mochi_tune.errors import ConfigError

OFFICIAL_REPO, OFFICIAL_COMMIT = "genmo/mochi-1-preview", "14be5fcea23095ed330cb214647916a451e38b6e"
_COMFYUI_REPO, _COMFYUI_COMMIT = "Comfy-Org/mochi_preview_repackaged", "1a851a476303dfa02bcdedea0e536d1e3b7fed2a"
# Precisions of each source, the default first.
PRECISIONS = {"official": ("published",), "diffusers": ("bf16", "fp32"), "comfyui": ("bf16", "fp8")}

_SHARD = r"(-\d+-of-\d+)?"
_TOKENIZER = r"tokenizer/[\w-]+\.(json|model)"
# Leaves out diffusers' copy of the models in the same repository, which would double the download.
_OFFICIAL = re.compile(
    r"(dit|encoder|decoder)\.safetensors|(dit|vae)_config\.json"
    r"|text_encoder/(config\.json|model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json)"
    rf"|{_TOKENIZER}"
)
_DIFFUSERS_STEMS = {"transformer": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_DIFFUSERS_CONFIGS = tuple(f"{folder}/config.json" for folder in _DIFFUSERS_STEMS)
# Source: Comfy-Org/mochi_preview_repackaged@82b275cb20a11ec28256a1b68fc2368912cd9b8d split_files/
_COMFYUI = {
    "bf16": (
        "diffusion_models/mochi_preview_bf16.safetensors",
        "vae/mochi_vae.safetensors",
        "text_encoders/t5xxl_fp16.safetensors",
    ),
    "fp8": (
        "diffusion_models/mochi_preview_fp8_scaled.safetensors",
        "vae/mochi_vae.safetensors",
        "text_encoders/t5xxl_fp8_e4m3fn_scaled.safetensors",
    ),
}


@dataclass(frozen=True)
class RepoFiles:
    """The files of a source from one repository.

    Attributes:
        repo: OWNER/NAME on the hub.
        revision: commit, branch or tag.
        choose: function of the names of all files of the repository that returns the files to download, by their names
            in the weights folder.
        needed: patterns of required names in the weights folder.
    """

    repo: str
    revision: str
    choose: Callable[[Sequence[str]], dict[str, str]]
    needed: tuple[str, ...]


def source_files(source: str, precision: str | None, repo: str | None, revision: str | None) -> list[RepoFiles]:
    """Returns the files of a source; the first entry is its main repository.

    Args:
        source: a key of PRECISIONS.
        precision: one of PRECISIONS[source]; None for the first.
        repo: another main repository with the same layout.
        revision: revision of the main repository; None for the commit that is known to fit, or main with `repo`.

    Raises:
        ConfigError: the source or the precision is unknown.
    """
    if source not in PRECISIONS:
        near = difflib.get_close_matches(source, PRECISIONS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"use {', '.join(PRECISIONS)}."
        raise ConfigError(f"source={source} is not known: {hint}")
    allowed = PRECISIONS[source]
    precision = precision or allowed[0]
    if precision not in allowed:
        with_it = [name for name, precisions in PRECISIONS.items() if precision in precisions]
        elsewhere = f", or source={' or '.join(with_it)}" if with_it else ""
        raise ConfigError(
            f"source={source} has no precision={precision}: use precision={' or '.join(allowed)}{elsewhere}."
        )
    parts = _BUILDERS[source](precision)
    if repo is not None:
        parts[0] = replace(parts[0], repo=repo, revision="main")
    if revision is not None:
        parts[0] = replace(parts[0], revision=revision)
    return parts


def _official(_precision: str) -> list[RepoFiles]:
    needed = ("dit.safetensors", "encoder.safetensors", "decoder.safetensors", "text_encoder/config.json")
    needed += ("tokenizer/tokenizer_config.json",)
    return [RepoFiles(OFFICIAL_REPO, OFFICIAL_COMMIT, partial(_choose_by_name, _OFFICIAL), needed)]


def _diffusers(precision: str) -> list[RepoFiles]:
    needed = (*_DIFFUSERS_CONFIGS, *(f"{folder}/*.safetensors" for folder in _DIFFUSERS_STEMS))
    needed += ("tokenizer/tokenizer_config.json",)
    return [RepoFiles(OFFICIAL_REPO, OFFICIAL_COMMIT, partial(_choose_diffusers, precision), needed)]


def _comfyui(precision: str) -> list[RepoFiles]:
    named = {name: f"split_files/{name}" for name in _COMFYUI[precision]}

    def choose(names: Sequence[str]) -> dict[str, str]:
        return {target: name for target, name in named.items() if name in names}

    models = RepoFiles(_COMFYUI_REPO, _COMFYUI_COMMIT, choose, tuple(named))
    # ComfyUI has T5's tokenizer in its code and not next to the weights.
    tokenizer = partial(_choose_by_name, re.compile(_TOKENIZER))
    return [models, RepoFiles(OFFICIAL_REPO, OFFICIAL_COMMIT, tokenizer, ("tokenizer/tokenizer_config.json",))]


_BUILDERS = {"official": _official, "diffusers": _diffusers, "comfyui": _comfyui}


def _choose_by_name(pattern: re.Pattern[str], names: Sequence[str]) -> dict[str, str]:
    return {name: name for name in names if pattern.fullmatch(name)}


def _choose_diffusers(precision: str, names: Sequence[str]) -> dict[str, str]:
    """Returns the files of each model in the variant if it is complete, else without one; T5 has no bf16 variant."""
    chosen = _choose_by_name(re.compile(_TOKENIZER), names) | {n: n for n in _DIFFUSERS_CONFIGS if n in names}
    for folder, stem in _DIFFUSERS_STEMS.items():
        plain = [n for n in names if re.fullmatch(rf"{folder}/{stem}{_SHARD}\.safetensors(\.index\.json)?", n)]
        variant = [
            n
            for n in names
            if re.fullmatch(
                rf"{folder}/{stem}(\.{precision}{_SHARD}\.safetensors|\.safetensors\.index\.{precision}\.json)", n
            )
        ]
        files = next((files for files in (variant, plain) if _complete(files)), [])
        chosen |= {name: name for name in _complete(files)}
    return chosen


def _complete(files: Sequence[str]) -> list[str]:
    """Returns the single file of a model, or all shards with their index; [] if they are not complete."""
    shards = [name for name in files if "-of-" in name]
    single = [name for name in files if name.endswith(".safetensors") and name not in shards]
    if single:
        return single
    index = [name for name in files if name.endswith(".json")]
    total = int(re.findall(r"-of-(\d+)", shards[0])[0]) if shards else 0
    return [*index, *shards] if index and total == len(shards) else []
