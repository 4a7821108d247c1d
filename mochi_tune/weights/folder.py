"""A weights folder: checked by its files' headers alone, and loaded straight to a device and dtype."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from mochi_tune.errors import CheckpointError
from mochi_tune.models.dit import AsymmDiT
from mochi_tune.models.vae import Decoder, Encoder
from mochi_tune.weights.configs import read_diffusers_config, read_json, read_official_config
from mochi_tune.weights.files import (
    SUMS,
    TEXT_ENCODER,
    PartFiles,
    check_sums,
    find_part,
    find_shards,
    fingerprint_files,
    has_part,
    require_one,
)
from mochi_tune.weights.fill import build_meta_model, fill_model
from mochi_tune.weights.headers import check_tensors, read_header
from mochi_tune.weights.key_map import Pieces, diffusers_map
from mochi_tune.weights.tokenizer import check_tokenizer
from mochi_tune.weights.unchanged import FileStamp


class WeightsFolder:
    """A weights folder in either layout. It finds each part once and reads each header once, when first needed.

    Its parts are "dit", "encoder", "decoder" and "text_encoder", which has the tokenizer too.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._files: dict[str, PartFiles] = {}
        self._plans: dict[str, _Plan] = {}
        self._text_encoder_config: dict[str, Any] | None = None

    def check(self, parts: Sequence[str]) -> None:
        """Refuses weights that would not load, from file headers alone: seconds, at any size.

        Raises:
            CheckpointError: as the loaders; when a shipped file is not what was shipped;
                for T5, when its configuration, a shard or the tokenizer is absent or damaged,
                or when its features do not fit the DiT, if both are asked for.
        """
        if (self.path / SUMS).exists():
            check_sums(self.path)
        plans = {part: self._plan(part) for part in parts if part != TEXT_ENCODER}
        if TEXT_ENCODER in parts:
            width = self._checked_text_encoder().get("d_model")
            if "dit" in plans and width != plans["dit"].config.t5_feat_dim:
                raise CheckpointError(
                    f"{self.path / TEXT_ENCODER} has features of width {width}, the DiT takes "
                    f"{plans['dit'].config.t5_feat_dim}: put the T5 there that the DiT was trained with."
                )

    def has(self, part: str) -> bool:
        """Whether the folder has a part at all, complete or not."""
        return has_part(self.path, part)

    def fingerprint(self, part: str) -> str:
        """Identifies a part's weights by their content, as `fingerprint_files` hashes it, wherever the folder is.

        The official and the diffusers form of the same weights have different fingerprints.

        Raises:
            CheckpointError: the part is missing.
        """
        if part == TEXT_ENCODER:
            self._checked_text_encoder()
            roots = [self.path / TEXT_ENCODER, self.path / "tokenizer"]
            files = [p for root in roots for p in root.iterdir() if p.is_file() and not p.name.startswith(".")]
        else:
            files = self._find(part).existing
        return fingerprint_files(self.path, files)

    def dit_skeleton(self) -> AsymmDiT:
        """Builds the AsymmDiT on the meta device, for its names and shapes; raises as `load_dit`."""
        return build_meta_model(self._plan("dit").config)

    def base_identity(self) -> str:
        """Identifies the DiT that an adapter belongs to, in every layout and float dtype of its weights.

        It is the sha256 of the first row of each block's visual queries, rounded to bf16, so that no large file is
        read.

        Raises:
            CheckpointError: as `load_dit`.
        """
        plan = self._plan("dit")
        digest = hashlib.sha256()
        for block in range(plan.config.depth):
            name = plan.mapping[f"blocks.{block}.attn.qkv_x.weight"].names[0]
            with safe_open(plan.paths[name], "pt") as file:
                row = file.get_slice(name)[:1].to(torch.bfloat16)
            digest.update(row.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()

    def load_dit(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        each_block: Callable[[AsymmDiT, nn.Module], None] | None = None,
    ) -> AsymmDiT:
        """Loads the AsymmDiT, frozen and in eval mode; norms' weights and `pos_frequencies` are fp32.

        Memory holds the model and one tensor of the file, whatever the file's dtype and layout.

        Args:
            device: of the weights.
            dtype: of the matrices.
            each_block: called with the model and each block as soon as the block is loaded, so that it can be made
                smaller before the next one is read; the embedders are loaded by then.

        Raises:
            CheckpointError: no such weights, not a readable safetensors file, or keys or shapes of another model.
        """
        return self._load("dit", device, dtype, each_block)

    def load_encoder(self, device: torch.device | str, dtype: torch.dtype) -> Encoder:
        """Loads the VAE's encoder as `load_dit` does the DiT; norms' weights and biases are fp32."""
        return self._load("encoder", device, dtype)

    def load_decoder(self, device: torch.device | str, dtype: torch.dtype) -> Decoder:
        """Loads the VAE's decoder as `load_dit` does the DiT; norms' weights and biases are fp32."""
        return self._load("decoder", device, dtype)

    def _load(
        self,
        part: str,
        device: torch.device | str,
        dtype: torch.dtype,
        each_block: Callable[[AsymmDiT, nn.Module], None] | None = None,
    ) -> Any:
        plan = self._plan(part)
        model = build_meta_model(plan.config)

        def read(name: str) -> Tensor:
            # Opened anew for each tensor: the pages of a mapping count as this process's memory until it is closed.
            path = plan.paths[name]
            with plan.stamps[path].unchanged(path), safe_open(path, "pt") as file:
                return file.get_tensor(name)

        fill_model(model, lambda name, tensor: plan.mapping[name].join(read, tensor), device, dtype, each_block)
        return model

    def _find(self, part: str) -> PartFiles:
        if part not in self._files:
            self._files[part] = find_part(self.path, part)
        return self._files[part]

    def _plan(self, part: str) -> "_Plan":
        if part not in self._plans:
            self._plans[part] = _make_plan(self._find(part), part)
        return self._plans[part]

    def _checked_text_encoder(self) -> dict[str, Any]:
        """Checks the files of T5 and its tokenizer, once, and returns T5's configuration."""
        if self._text_encoder_config is None:
            require_one(self.path, "text_encoder/config.json")
            require_one(self.path, "text_encoder/model.safetensors", "text_encoder/model.safetensors.index.json")
            require_one(self.path, "tokenizer/spiece.model", "tokenizer/tokenizer.json")
            check_tokenizer(self.path / "tokenizer")
            config = read_json(self.path / TEXT_ENCODER / "config.json")
            for path in find_shards(self.path / TEXT_ENCODER, "model"):
                read_header(path)
            self._text_encoder_config = config
        return self._text_encoder_config


@dataclass(frozen=True)
class _Plan:
    """How to load a model.

    Attributes:
        config: the model's sizes.
        mapping: the pieces in the files of each tensor of the model, by the model's names.
        paths: the file of each piece, by the files' names.
        stamps: of each file, taken before its header was read.
    """

    config: Any
    mapping: dict[str, Pieces]
    paths: dict[str, Path]
    stamps: dict[Path, FileStamp]


def _make_plan(files: PartFiles, part: str) -> _Plan:
    """Compares the headers of a part's files with the model of its configuration."""
    config = (read_diffusers_config if files.is_diffusers else read_official_config)(files.config, part)
    model = build_meta_model(config)
    mapping = diffusers_map(model) if files.is_diffusers else {name: Pieces((name,)) for name in model.state_dict()}
    expected = {}
    for name, tensor in model.state_dict().items():
        pieces = mapping[name].names
        expected |= dict.fromkeys(pieces, (tensor.shape[0] // len(pieces), *tensor.shape[1:]))
    stamps = {path: FileStamp.of(path) for path in files.shards}
    found = {name: header for path in files.shards for name, header in read_header(path).items()}
    if files.is_diffusers and part != "dit":
        # Both halves of the VAE are in one model there.
        other = "decoder." if part == "encoder" else "encoder."
        found = {name: header for name, header in found.items() if not name.startswith(other)}
    check_tensors(files, expected, found)
    return _Plan(config, mapping, {name: header.path for name, header in found.items()}, stamps)
