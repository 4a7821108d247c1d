"""The weights of all models: checked by their files' headers alone, and loaded straight to a device and dtype."""

import functools
import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mochi_tune.errors import CheckpointError
from mochi_tune.files import format_bytes
from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.models.text_encoder import TextEncoder
from mochi_tune.models.vae import Decoder, Encoder
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
from mochi_tune.weights.quantized import read_formats, read_scale, read_tensor, take_scales
from mochi_tune.weights.single_files import take_part
from mochi_tune.weights.t5 import build_t5, keep_encoder, read_t5_config, t5_shapes
from mochi_tune.weights.tokenizer import check_tokenizer, open_tokenizer


class WeightsFolder:
    """A user's weights in any layout. It finds each part once and reads each header once, when first needed.

    Its parts are "dit", "encoder", "decoder" and "text_encoder", which has the tokenizer too.
    """

    def __init__(self, paths: WeightsPaths | Path) -> None:
        self.paths = paths if isinstance(paths, WeightsPaths) else WeightsPaths(Path(paths))
        self.path = self.paths.root
        self._files: dict[str, PartFiles] = {}
        self._plans: dict[str, _Plan] = {}

    def check(self, parts: Sequence[str]) -> None:
        """Refuses weights that would not load, from file headers alone: seconds, at any size.

        Raises:
            CheckpointError: as the loaders; when a shipped file is not what was shipped;
                for T5, when its configuration, a shard or the tokenizer is absent or damaged,
                or when its features do not fit the DiT, if both are asked for.
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
        """Whether a part is there at all, complete or not."""
        return has_part(self.paths, part)

    def describe(self, part: str) -> str:
        """Returns in words where a part is and what it is stored as.

        Raises:
            CheckpointError: as `check`.
        """
        files, plan = self._find(part), self._plan(part)
        counts = Counter(header.dtype for header in plan.headers.values())
        stored = " and ".join(f"{count} tensors in {dtype}" for dtype, count in counts.most_common())
        scaled = ", scaled" if any(header.scale for header in plan.headers.values()) else ""
        num_bytes = sum(header.num_bytes for header in plan.headers.values())
        beside = f", tokenizer in {require_tokenizer(self.paths)}" if part == TEXT_ENCODER else ""
        return f"{files.where}: {stored}{scaled}, {format_bytes(num_bytes)}{beside}"

    def fingerprint(self, part: str) -> str:
        """Identifies a part's weights by their content, as `fingerprint_files` hashes it, wherever the folder is.

        The official and the diffusers form of the same weights have different fingerprints.

        Raises:
            CheckpointError: the part is missing; for T5, as `check`.
        """
        files = self._find(part)
        if part != TEXT_ENCODER:
            return fingerprint_files(self._root, files.existing)
        # Features of a T5 that is not the model would be noise, and go into a cache under this name.
        plan, tokenizer = self._plan(part), require_tokenizer(self.paths)
        folders = {tokenizer} if files.is_single else {files.config.parent, tokenizer}
        beside = {p for folder in folders for p in folder.iterdir() if p.is_file() and not p.name.startswith(".")}
        # Other variants, and other models in a folder of single files, are not read.
        read = {path for path in beside if path.suffix != ".safetensors" and not is_other_index(path, files.shards)}
        return fingerprint_files(self._root, sorted(read | set(files.existing)), plan.reading)

    @property
    def dit_config(self) -> DiTConfig:
        """The sizes of the DiT; raises as `load_dit`."""
        return self._plan("dit").config

    def dit_skeleton(self) -> AsymmDiT:
        """Builds the AsymmDiT on the meta device, for its names and shapes; raises as `load_dit`."""
        return build_meta_model(self.dit_config)

    def read_dit_tensor(self, name: str, out: Tensor) -> None:
        """Fills `out` with one tensor of the DiT, by its official name, whatever the files' layout and dtype.

        Raises:
            CheckpointError: as `load_dit`.
        """
        self._plan("dit").write(name, out)

    def base_identity(self) -> str:
        """Identifies the DiT that an adapter belongs to, in every layout and float dtype of its weights.

        It is the sha256 of the first row of each block's visual queries, rounded to bf16, so that no large file is
        read. What a file has rounded to fp16 or fp8 is another number, and has its dtype in front, "F8_E4M3", or
        "F8_E4M3x40" where so many blocks are: such identities are compared among themselves alone, see
        `check_adapter`.

        Raises:
            CheckpointError: as `load_dit`.
        """
        plan = self._plan("dit")
        digest, rounded = hashlib.sha256(), Counter[str]()
        for block in range(plan.config.depth):
            header = plan.headers[plan.mapping[f"blocks.{block}.attn.qkv_x.weight"].names[0]]
            rounded[header.dtype] += header.dtype not in ("F32", "BF16")
            digest.update(_first_row(header).view(torch.int16).numpy().tobytes())
        # Files of fp8 may have some blocks in bf16, and so other numbers than those that have none.
        dtypes = [name if n == plan.config.depth else f"{name}x{n}" for name, n in sorted(rounded.items()) if n]
        return ":".join(["+".join(dtypes), digest.hexdigest()] if dtypes else [digest.hexdigest()])

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

    def load_text_encoder(self, device: torch.device | str, dtype: torch.dtype) -> TextEncoder:
        """Loads T5 and its tokenizer; fp16 is not offered, as T5's activations overflow it.

        Args:
            device: of the encoder.
            dtype: torch.float32 or torch.bfloat16; torch.int8 holds the matrices in 8 bits and computes in bfloat16.

        Raises:
            CheckpointError: as `check`.
        """
        assert dtype in (torch.float32, torch.bfloat16, torch.int8), dtype
        plan = self._plan(TEXT_ENCODER)
        model = build_t5(plan.config, plan.write, device, dtype)
        return TextEncoder(self.load_tokenizer(), model)

    def load_tokenizer(self) -> Any:
        """Loads T5's tokenizer alone, for counting tokens before any weight is read.

        Raises:
            CheckpointError: it is missing, or damaged.
        """
        folder = require_tokenizer(self.paths)
        try:
            return open_tokenizer(folder)
        # The tokenizers' library raises Exception itself.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise CheckpointError(f"{folder} cannot be read as a tokenizer ({reason}): fetch it again.") from error

    def has_tokenizer(self) -> bool:
        """Whether T5's tokenizer is there, complete or not."""
        return find_tokenizer(self.paths) is not None

    def read_fp8(self, name: str) -> tuple[Tensor, Tensor] | None:
        """Reads a matrix of the DiT as its file has it in fp8; None where it has it in another dtype or in pieces.

        Returns:
            float8_e4m3fn (out, in) and the scale that it is multiplied with, fp32 () or (out, 1).
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
    """How to load a model.

    Attributes:
        config: the model's sizes.
        mapping: the pieces in the files of each tensor of the model, by the model's names.
        headers: of each piece, by the names in `mapping`.
        reading: how the files were read, where it is not name by name as they are: prefix and scales.
    """

    config: Any
    mapping: dict[str, Pieces]
    headers: dict[str, TensorHeader]
    reading: str

    def write(self, name: str, tensor: Tensor) -> None:
        """Fills the empty tensor of a parameter."""
        self.mapping[name].join(lambda piece: read_tensor(self.headers[piece]), tensor)


def _make_plan(files: PartFiles, part: str) -> _Plan:
    """Compares the headers of a part's files with the model of its configuration."""
    stored = {name: header for path in files.shards for name, header in read_header(path).items()}
    found = take_part(stored, part, files.is_single)
    prefix = next((header.name.removesuffix(name) for name, header in found.items()), "")
    formats = {layer: kind for path in files.shards for layer, kind in read_formats(path, stored).items()}
    found = take_scales(found, {layer.removeprefix(prefix): kind for layer, kind in formats.items()})
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
            # Both halves of the VAE are in one model there.
            other = "decoder." if part == "encoder" else "encoder."
            found = {name: header for name, header in found.items() if not name.startswith(other)}
    check_tensors(files.where, files.config, expected, found)
    is_scaled = any(header.scale for header in found.values())
    return _Plan(config, mapping, found, f"{prefix} scaled" if is_scaled else prefix)


def _fits(part: str, files: PartFiles) -> bool:
    """Whether a part's files are the model of their configuration, by their headers."""
    try:
        _make_plan(files, part)
    except CheckpointError:
        return False
    return True


def _first_row(header: TensorHeader) -> Tensor:
    """Reads the first row of a matrix, (1, in), in bf16."""
    with header.opened() as file:
        row = file.get_slice(header.name)[:1]
    scale = read_scale(header)
    return (row if scale is None else row.float() * scale.reshape(-1)[0]).to(torch.bfloat16)
