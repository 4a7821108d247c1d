"""The fingerprint of a base in which only some blocks are fp8, as in mixed files."""

import pytest
import torch
from helpers_weights import copy_golden, official
from safetensors.torch import save_file

from mochi_tune.adapters.files import Adapter, LoraLayer, check_adapter
from mochi_tune.errors import CheckpointError
from mochi_tune.weights.folder import WeightsFolder


def identity(folder, *blocks, dtype=torch.float8_e4m3fn):
    tensors = official("dit")
    for block in blocks:
        name = f"blocks.{block}.attn.qkv_x.weight"
        tensors[name] = tensors[name].to(dtype)
    save_file(tensors, copy_golden(folder, "dit") / "dit.safetensors")
    return WeightsFolder(folder).base_identity()


def test_a_base_with_some_fp8_blocks_is_not_compared_with_fp8_or_exact_files(tmp_path):
    full, mixed, half, exact = (
        identity(tmp_path, 0, 1), identity(tmp_path, 1), identity(tmp_path, 1, dtype=torch.float16), identity(tmp_path)
    )  # fmt: skip
    kinds = [each.rpartition(":")[0] for each in (full, mixed, half, exact)]
    assert kinds == ["F8_E4M3", "F8_E4M3x1", "F16x1", ""]
    layer, shapes = LoraLayer(torch.ones(1, 192), torch.ones(192, 1), 1.0), {"blocks.0.attn.proj_x": (192, 192)}
    for trained_on in (full, mixed, half, exact):
        check_adapter(Adapter({"blocks.0.attn.proj_x": layer}, {"base_fingerprint": trained_on}), shapes, mixed)
    other = mixed[:-64] + "0" * 64
    with pytest.raises(CheckpointError, match="trained on another base: base_fingerprint is F8_E4M3x1:"):
        check_adapter(Adapter({"blocks.0.attn.proj_x": layer}, {"base_fingerprint": mixed}), shapes, other)
