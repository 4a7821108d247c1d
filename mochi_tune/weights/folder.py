"""Weights of all models: checks them by file headers only, and loads them directly to a device and dtype."""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mochi_tune.errors import CheckpointError, format_bytes, one_line
from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.models.text_encoder import TextEncoder
from mochi_tune.models.vae import Decoder, DecoderConfig, Encoder
from mochi_tune.weights.configs import read_diffusers_config, read_official_config
from mochi_tune.weights.files import (
    SUMS,
    TEXT_ENCODER,
    PartFiles,
    check_sums,
    find_part,
    find_tokenizer,
    fingerprint_files,
    has_part,
    is_other_index,
    require_tokenizer,
)
from mochi_tune.weights.fill import build_meta_model, fill_model
from mochi_tune.weights.headers import TensorHeader, check_tensors, read_header
from mochi_tune.weights.key_map import Pieces, diffusers_map
from mochi_tune.weights.paths import WeightsPaths
from mochi_tune.weights.quantized import check_quantized, read_formats, read_scale, read_tensor, take_scales
from mochi_tune.weights.single_files import take_part
from mochi_tune.weights.t5 import build_t5, keep_encoder, read_t5_config, t5_shapes
from mochi_tune.weights.tokenizer import check_tokenizer, open_tokenizer


class WeightsFolder:
    """A user's weights in any layout. Each part is found, and each header is read, once when it is first needed.

    The parts are "dit", "encoder", "decoder" and "text_encoder", which includes the tokenizer.
    """

    def __init__(self, paths: WeightsPaths | Path) -> None:
        self.paths = paths if isinstance(paths, WeightsPaths) else WeightsPaths(Path(paths))
        self.path = self.paths.root
        self._files: dict[str, PartFiles] = {}
        self._plans: dict[str, _Plan] = {}

    def check(self, parts: Sequence[str]) -> None:
        """Refuses weights that would not load; reads only file headers, which takes seconds at any size.

        Raises:
            CheckpointError: as the loaders, or a shipped file has changed, or T5's configuration, a shard or the
                tokenizer is missing or damaged, or T5's features do not fit the DiT if both are in `parts`.
        """
        if (self.path / SUMS).exists():
            check_sums(self.path)
        plans = {part: self._plan(part) for part in parts}
        if TEXT_ENCODER in parts:
            check_tokenizer(require_tokenizer(self.paths), plans[TEXT_ENCODER].config["vocab_size"])
            width = plans[TEXT_ENCODER].config["d_model"]
            if "dit" in plans and width != plans["dit"].config.t5_feat_dim:
                raise CheckpointError(
                    f"{self._find(TEXT_ENCODER).where} has features of width {width}, the DiT takes "
                    f"{plans['dit'].config.t5_feat_dim}: use the T5 that the DiT was trained with."
                )

    def has(self, part: str) -> bool:
        """Whether a part exists, complete or not."""
        return has_part(self.paths, part)

    def describe(self, part: str) -> str:
        """Returns a description of a part: its path, dtypes and size.

        Raises:
            CheckpointError: as `check`.
        """
        files, plan = self._find(part), self._plan(part)
        counts = Counter(header.dtype for header in plan.headers.values())
        stored = " and ".join(f"{count} tensors in {dtype}" for dtype, count in counts.most_common())
        scaled = ", scaled" if any(header.scale for header in plan.headers.values()) else ""
        num_bytes = sum(header.num_bytes for header in plan.headers.values())
        tokenizer = f", tokenizer in {require_tokenizer(self.paths)}" if part == TEXT_ENCODER else ""
        return f"{files.where}: {stored}{scaled}, {format_bytes(num_bytes)}{tokenizer}"

    def fingerprint(self, part: str) -> str:
        """Returns a hash of a part's files by `fingerprint_files`, which does not depend on the folder's path.

        The same weights in the official and in the diffusers layout have different fingerprints.

        Raises:
            CheckpointError: the part is missing; for T5, as `check`.
        """
        files = self._find(part)
        if part != TEXT_ENCODER:
            return fingerprint_files(self._root, files.existing)
        # Checks T5 first, because features of another model would go into a cache under this fingerprint.
        plan, tokenizer = self._plan(part), require_tokenizer(self.paths)
        folders = {tokenizer} if files.is_single else {files.config.parent, tokenizer}
        present = {p for folder in folders for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")}
        # Leaves out other variants, and other models in a folder of single files.
        read = {path for path in present if path.suffix != ".safetensors" and not is_other_index(path, files.shards)}
        return fingerprint_files(self._root, sorted(read | set(files.existing)), plan.reading)

    @property
    def dit_config(self) -> DiTConfig:
        """The configuration of the DiT; raises as `load_dit`."""
        return self._plan("dit").config

    @property
    def decoder_config(self) -> DecoderConfig:
        """The configuration of the decoder; raises as `load_decoder`."""
        return self._plan("decoder").config

    def dit_skeleton(self) -> AsymmDiT:
        """Builds the AsymmDiT on the meta device, without weights; raises as `load_dit`."""
        return build_meta_model(self.dit_config)

    def read_dit_tensor(self, name: str, out: Tensor) -> None:
        """Fills `out` with one tensor of the DiT by its official name, from any layout and dtype.

        Raises:
            CheckpointError: as `load_dit`.
        """
        self._plan("dit").write(name, out)

    def base_identity(self) -> str:
        """Returns the fingerprint of the DiT that an adapter belongs to; it does not depend on the layout.

        It is the sha256 of the first row of each block's visual queries, rounded to bf16, so that little is read. The
        values in an fp16 or fp8 file are rounded, so its fingerprint starts with the dtype, as "F8_E4M3:", or as
        "F8_E4M3x40:" if 40 blocks have it. `check_adapter` compares only fingerprints with the same start.

        Raises:
            CheckpointError: as `load_dit`.
        """
        plan = self._plan("dit")
        digest, rounded = hashlib.sha256(), Counter[str]()
        for block in range(plan.config.depth):
            header = plan.headers[plan.mapping[f"blocks.{block}.attn.qkv_x.weight"].names[0]]
            rounded[header.dtype] += header.dtype not in ("F32", "BF16")
            digest.update(_first_row(header).view(torch.int16).numpy().tobytes())
        # fp8 files may have some blocks in bf16, whose values differ from those of files with all blocks in fp8.
        dtypes = [name if n == plan.config.depth else f"{name}x{n}" for name, n in sorted(rounded.items()) if n]
        return ":".join(["+".join(dtypes), digest.hexdigest()] if dtypes else [digest.hexdigest()])

    def load_dit(
        self,
        device: torch.device | str,
        dtype: torch.dtype,
        each_block: Callable[[AsymmDiT, nn.Module], None] | None = None,
    ) -> AsymmDiT:
        """Loads the AsymmDiT, frozen and in eval mode; norms' weights and `pos_frequencies` are fp32.

        Memory holds the model and one tensor of the file, whatever the dtype and the layout of the file.

        Args:
            device: device of the weights.
            dtype: dtype of the matrices.
            each_block: called with the model and each block as soon as the block is loaded, so that it can quantize or
                offload the block before the next one is read. The embedders are loaded before.

        Raises:
            CheckpointError: the weights are missing, not readable as safetensors, or those of another model.
        """
        return self._load("dit", device, dtype, each_block)

    def load_encoder(self, device: torch.device | str, dtype: torch.dtype) -> Encoder:
        """Loads the VAE's encoder as `load_dit`; norms' weights and biases are fp32."""
        return self._load("encoder", device, dtype)

    def load_decoder(self, device: torch.device | str, dtype: torch.dtype) -> Decoder:
        """Loads the VAE's decoder as `load_dit`; norms' weights and biases are fp32."""
        return self._load("decoder", device, dtype)

    def load_text_encoder(self, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
        """Loads T5 and its tokenizer.

        Args:
            device: device of the encoder.
            dtype: torch.float32 or torch.bfloat16; torch.int8 holds the matrices in 8 bits and computes in bfloat16.
                torch.float16 is not supported, because T5's activations overflow it.

        Raises:
            CheckpointError: as `check`.
        """
        assert dtype in (torch.float32, torch.bfloat16, torch.int8), dtype
        plan = self._plan(TEXT_ENCODER)
        model = build_t5(plan.config, plan.write, device, dtype)
        return TextEncoder(self.load_tokenizer(), model)

    def load_tokenizer(self) -> Any:
        """Loads T5's tokenizer without the encoder, for counting tokens before any weights are read.

        Raises:
            CheckpointError: the tokenizer is missing or damaged.
        """
        folder = require_tokenizer(self.paths)
        try:
            return open_tokenizer(folder)
        # The tokenizers library raises plain Exception.
        except Exception as error:
            reason = one_line(error)
            raise CheckpointError(f"{folder} cannot be read as a tokenizer ({reason}): fetch it again.") from error

    def has_tokenizer(self) -> bool:
        """Whether T5's tokenizer exists, complete or not."""
        return find_tokenizer(self.paths) is not None

    def read_fp8(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Reads a matrix of the DiT without conversion, if the file has it in fp8 and in one piece.

        Returns:
            The matrix, float8_e4m3fn (out, in), and its scale, fp32 () or (out, 1). None if the file has it otherwise.
        """
        plan = self._plan("dit")
        pieces = plan.mapping[name]
        header = plan.headers[pieces.names[0]]
        if header.dtype != "F8_E4M3" or len(pieces.names) > 1 or pieces.swap_halves:
            return None
        scale = read_scale(header)
        with header.opened() as file:
            return file.get_tensor(header.name), torch.ones(()) if scale is None else scale

    def _load(
        self,
        part: str,
        device: torch.device | str,
        dtype: torch.dtype,
        each_block: Callable[[AsymmDiT, nn.Module], None] | None = None,
    ) -> Any:
        plan = self._plan(part)
        model = build_meta_model(plan.config)
        fill_model(model, plan.write, device, dtype, each_block)
        return model

    @property
    def _root(self) -> Path:
        return self.path.parent if self.path.is_file() else self.path

    def _find(self, part: str) -> PartFiles:
        if part not in self._files:
            self._files[part] = find_part(self.paths, part, functools.partial(_fits, part))
        return self._files[part]

    def _plan(self, part: str) -> "_Plan":
        if part not in self._plans:
            self._plans[part] = _make_plan(self._find(part), part)
        return self._plans[part]


@dataclass(frozen=True)
class _Plan:
    """A plan for loading a model.

    Attributes:
        config: configuration of the model.
        mapping: pieces in the files of each tensor of the model, by its name in the model.
        headers: header of each piece, by the names in `mapping`.
        reading: prefix of the names in the files and whether scales are applied; "" for neither.
    """

    config: Any
    mapping: dict[str, Pieces]
    headers: dict[str, TensorHeader]
    reading: str

    def write(self, name: str, tensor: Tensor) -> None:
        """Fills the empty tensor of a parameter."""
        self.mapping[name].join(lambda piece: read_tensor(self.headers[piece]), tensor)


def _make_plan(files: PartFiles, part: str) -> _Plan:
    """Compares the headers of a part's files with the model of its configuration, and plans its loading."""
    stored = {name: header for path in files.shards for name, header in read_header(path).items()}
    found = take_part(stored, part, files.is_single)
    prefix = next((header.name.removesuffix(name) for name, header in found.items()), "")
    formats = {layer: kind for path in files.shards for layer, kind in read_formats(path, stored).items()}
    found = take_scales(found, {layer.removeprefix(prefix): kind for layer, kind in formats.items()})
    check_quantized(files.where, part, found)
    if part == TEXT_ENCODER:
        config = read_t5_config(files.config)
        mapping = {name: Pieces((name,)) for name in t5_shapes(config)}
        expected, found = t5_shapes(config), keep_encoder(found)
    else:
        read = read_official_config if files.is_single or files.naming == "official" else read_diffusers_config
        config = read(files.config, part)
        try:
            model = build_meta_model(config)
        except (ValueError, IndexError, TypeError, RuntimeError, ZeroDivisionError) as error:
            raise CheckpointError(f"{files.config}: its numbers do not fit each other ({error}).") from error
        is_official = files.naming == "official"
        mapping = {name: Pieces((name,)) for name in model.state_dict()} if is_official else diffusers_map(model)
        expected = {}
        for name, tensor in model.state_dict().items():
            pieces = mapping[name].names
            expected |= dict.fromkeys(pieces, (tensor.shape[0] // len(pieces), *tensor.shape[1:]))
        if not is_official and part != "dit":
            # In diffusers, one model holds both halves of the VAE.
            other = "decoder." if part == "encoder" else "encoder."
            found = {name: header for name, header in found.items() if not name.startswith(other)}
    check_tensors(files.where, files.config, expected, found)
    is_scaled = any(header.scale for header in found.values())
    return _Plan(config, mapping, found, f"{prefix} scaled" if is_scaled else prefix)


def _fits(part: str, files: PartFiles) -> bool:
    """Whether the headers of a part's files fit the model of their configuration."""
    try:
        _make_plan(files, part)
    except CheckpointError:
        return False
    return True


def _first_row(header: TensorHeader) -> Tensor:
    """Reads the first row of a matrix, (1, in), as bf16."""
    with header.opened() as file:
        row = file.get_slice(header.name)[:1]
    scale = read_scale(header)
    return (row if scale is None else row.float() * scale.reshape(-1)[0]).to(torch.bfloat16)
