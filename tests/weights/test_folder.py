import json
import re
import resource
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_diffusers import to_diffusers
from helpers_golden import GOLDEN
from helpers_weights import LOADERS, TINY, changes, copy_golden, official, refused
from safetensors.torch import save_file
from transformers.utils import logging

from mochi_tune import assets
from mochi_tune.errors import CheckpointError
from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.weights.folder import WeightsFolder
from mochi_tune.weights.key_map import diffusers_map
from mochi_tune.weights.t5 import t5_shapes

FP32_NAMES = re.compile(
    r"pos_frequencies|.*\.attn\.[qk]_norm_[xy]\.weight|(.*\.stack\.[03]|.*\.attn_block\.norm|output_norm)\.(weight|bias)"
)


T5 = {"d_model": 4, "d_ff": 6, "d_kv": 2, "num_heads": 2, "num_layers": 2, "vocab_size": 400}
T5 |= {"relative_attention_num_buckets": 32, "feed_forward_proj": "gated-gelu"}
# A sentencepiece model of T5's first three tokens.
PIECES = "\n\x07\n\x05<pad>\n\x06\n\x04</s>\n\x07\n\x05<unk>"


def write_text_encoder(folder):
    for path, text in {"text_encoder/config.json": json.dumps(T5), "tokenizer/spiece.model": PIECES}.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)
    tensors = {name: torch.zeros(shape) for name, shape in t5_shapes(T5).items()}
    save_file(tensors, folder / "text_encoder" / "model.safetensors")
    return folder


def write_sparse(path, shapes, dtype="BF16", size=2):
    """Writes a valid safetensors file of any size that is sparse, so that it takes no disk space."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + size * torch.Size(shape).numel()
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


@pytest.mark.parametrize("part", LOADERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_official_weights_load_whole_frozen_and_in_their_dtypes(part, dtype):
    model = LOADERS[part](WeightsFolder(GOLDEN), "cpu", dtype)
    expected = official(part)
    parameters = dict(model.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, tensor in parameters.items():
        assert tensor.dtype == (torch.float32 if FP32_NAMES.fullmatch(name) else dtype), name
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
        assert not tensor.requires_grad
    assert sum(FP32_NAMES.fullmatch(name) is not None for name in parameters) > 1
    assert not model.training


def test_a_wider_file_is_rounded_except_what_stays_fp32(tmp_path):
    copy_golden(tmp_path, "dit")
    wide = {name: torch.randn(tensor.shape) for name, tensor in official("dit").items()}
    save_file(wide, tmp_path / "dit.safetensors")
    for name, tensor in WeightsFolder(tmp_path).load_dit("cpu", torch.bfloat16).state_dict().items():
        expected = wide[name] if FP32_NAMES.fullmatch(name) else wide[name].to(torch.bfloat16)
        assert torch.equal(tensor, expected), name


def test_loaded_tensors_do_not_need_the_file(tmp_path):
    copy_golden(tmp_path, "dit")
    model = WeightsFolder(tmp_path).load_dit("cpu", torch.bfloat16)
    with (tmp_path / "dit.safetensors").open("r+b") as file:
        file.truncate(0)
    for name, tensor in official("dit").items():
        assert torch.equal(model.state_dict()[name].float(), tensor.float())


LOAD_AND_MEASURE = """
import os, sys, torch
from mochi_tune.weights.folder import WeightsFolder
torch.set_num_threads(1)

def memory(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key + ":"))

for folder in sys.argv[2:]:
    if os.fork() == 0:  # a process of its own has a peak of its own
        WeightsFolder(sys.argv[1]).load_dit("cpu", torch.bfloat16)  # brings in what torch and safetensors load late
        before = memory("VmRSS")
        model = WeightsFolder(folder).load_dit("cpu", torch.bfloat16)
        size = sum(p.nbytes for p in model.parameters())
        print(size, memory("VmHWM") - before, memory("VmRSS") - before, flush=True)
        os._exit(0)
    os.wait()
"""


def write_large_models(root):
    """Writes a DiT of 52 M parameters as fp32, as bf16, and as fp32 in diffusers' layout."""
    sizes = {"depth": 4, "num_heads": 6, "hidden_size_x": 768, "hidden_size_y": 384, "t5_feat_dim": 64}
    with torch.device("meta"):
        model = AsymmDiT(DiTConfig(**sizes))
    tensors = {name: torch.zeros(tensor.shape) for name, tensor in model.state_dict().items()}
    folders = [root / name for name in ("fp32", "bf16", "diffusers")]
    for folder in folders:
        folder.mkdir()
        (folder / "dit_config.json").write_text(json.dumps(sizes))
    save_file(tensors, folders[0] / "dit.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in tensors.items()}, folders[1] / "dit.safetensors")
    theirs = folders[2] / "transformer"
    theirs.mkdir()
    save_file(to_diffusers(tensors, diffusers_map(model)), theirs / "diffusion_pytorch_model.safetensors")
    config = {"_class_name": "MochiTransformer3DModel", "patch_size": 2, "in_channels": 12, "num_layers": 4}
    config |= {"num_attention_heads": 6, "attention_head_dim": 128, "pooled_projection_dim": 384, "text_embed_dim": 64}
    (theirs / "config.json").write_text(json.dumps(config))
    return folders, max(tensor.nbytes for tensor in tensors.values())


def test_loading_takes_the_memory_of_the_model_and_about_one_tensor(tmp_path):
    folders, largest = write_large_models(tmp_path)
    command = [sys.executable, "-c", LOAD_AND_MEASURE, GOLDEN, *folders]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    for folder, line in zip(folders, lines, strict=True):
        size, peak, kept = map(int, line.split())
        assert size > 100e6
        assert peak < size + largest + 8e6, folder.name
        assert kept < size + 8e6, folder.name
    shutil.rmtree(tmp_path)


def bytes_read() -> int:
    """Returns the number of bytes that this process has read so far, including mapped pages."""
    [line] = [line for line in Path("/proc/self/io").read_text().splitlines() if line.startswith("rchar")]
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    return int(line.split()[1]) + faults * resource.getpagesize()


def test_a_full_size_file_is_checked_by_its_header_only(tmp_path):
    shapes = json.loads((GOLDEN / "full_size_keys.json").read_text())["dit"]
    write_sparse(tmp_path / "dit.safetensors", shapes)
    before = bytes_read()
    WeightsFolder(tmp_path).check(["dit"])
    first = WeightsFolder(tmp_path).fingerprint("dit")
    write_sparse(tmp_path / "dit.safetensors", shapes | {"t5_yproj.bias": [1537]})
    with pytest.raises(CheckpointError, match=r"t5_yproj\.bias \[1537\] for \[1536\]"):
        WeightsFolder(tmp_path).load_dit("cpu", torch.bfloat16)
    assert WeightsFolder(tmp_path).fingerprint("dit") != first
    assert bytes_read() - before < 2**31, "of 20 GB; building the model without weights touches some pages, too"


def test_wrong_keys_and_shapes_are_listed_together(tmp_path):
    copy_golden(tmp_path, "dit")
    tensors = official("dit")
    missing = [name for name in tensors if name.startswith("blocks.0.")][:10]
    for name in missing:
        del tensors[name]
    tensors |= {"scaled_fp8": torch.zeros(2), "t5_yproj.bias": torch.zeros(95)}
    tensors["final_layer.mod.bias"] = torch.zeros(384).int()
    save_file(tensors, tmp_path / "dit.safetensors")
    message = refused(tmp_path, "dit")
    assert "10 missing (" in message and " and 6 more)" in message
    assert sum(name in message for name in missing) == 4
    assert "1 unknown (scaled_fp8)" in message
    assert "1 of another shape (t5_yproj.bias [95] for [96])" in message
    assert "1 not floating point (final_layer.mod.bias I32)" in message
    with pytest.raises(CheckpointError) as caught:
        WeightsFolder(tmp_path).load_dit("cpu", torch.float32)
    assert str(caught.value) == message


def test_the_tiny_weights_without_their_configuration_are_not_the_full_size_model(tmp_path):
    shutil.copy(GOLDEN / "dit.safetensors", tmp_path)
    message = refused(tmp_path, "dit")
    assert "does not fit the full-size model (there is no dit_config.json)" in message and "missing" in message


@pytest.mark.parametrize("part", [*LOADERS, "text_encoder"])
def test_missing_weights_name_the_command_that_fetches_them(tmp_path, part):
    message = refused(tmp_path, part)
    assert f"run `mochi-tune weights pull to={tmp_path}`" in message
    assert f"model.weights={tmp_path} has no {part}" in message


@pytest.mark.parametrize("damage", ["truncated", "empty", "pointer", "folder"])
def test_a_damaged_file_is_named(tmp_path, damage):
    path = copy_golden(tmp_path, "decoder") / "decoder.safetensors"
    content = path.read_bytes()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"
        path.write_bytes({"truncated": content[:-1], "empty": b"", "pointer": pointer}[damage])
    message = refused(tmp_path, "decoder")
    assert str(path) in message and "not a complete safetensors file" in message


def test_the_official_file_takes_precedence(tmp_path):
    copy_golden(tmp_path, "dit")
    (tmp_path / "transformer").mkdir()
    WeightsFolder(tmp_path).check(["dit"])
    (tmp_path / "dit.safetensors").unlink()
    assert "transformer has neither diffusion_pytorch_model.safetensors nor" in refused(tmp_path, "dit")


def test_a_t5_of_another_width_than_the_dits_is_refused(tmp_path):
    folder = tmp_path / "tiny"
    shutil.copytree(Path(assets.__path__[0]) / "tiny", folder)
    (folder / "sha256.json").unlink(missing_ok=True)
    WeightsFolder(folder).check(["dit", "text_encoder"])
    write_text_encoder(folder)
    with pytest.raises(CheckpointError, match="features of width 4, the DiT takes 64"):
        WeightsFolder(folder).check(["dit", "text_encoder"])


def test_has_part_knows_both_layouts(tmp_path):
    assert WeightsFolder(GOLDEN).has("dit") and not WeightsFolder(GOLDEN).has("text_encoder")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").touch()
    assert (
        WeightsFolder(tmp_path).has("encoder")
        and WeightsFolder(tmp_path).has("decoder")
        and not WeightsFolder(tmp_path).has("dit")
    )


def test_the_text_encoder_needs_its_configuration_weights_and_tokenizer(tmp_path):
    for i, name in enumerate(("text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer/spiece.model")):
        folder = write_text_encoder(tmp_path / str(i))
        WeightsFolder(folder).check(["text_encoder"])
        content = (folder / name).read_bytes()
        (folder / name).unlink()
        message = refused(folder, "text_encoder")
        assert Path(name).name in message and "mochi-tune weights pull" in message
        if name != "tokenizer/spiece.model":
            (folder / name).write_bytes(content[:-1])
            assert str(folder / name) in refused(folder, "text_encoder")


def test_a_fingerprint_depends_on_the_content_and_not_on_the_folder(tmp_path):
    parts = ("dit", "encoder", "decoder", "text_encoder")
    first, second = (write_text_encoder(tmp_path / name) for name in ("first", "second"))
    for folder in (first, second):
        copy_golden(folder, "dit", "encoder", "decoder")
    prints = [WeightsFolder(first).fingerprint(part) for part in parts]
    assert prints == [WeightsFolder(second).fingerprint(part) for part in parts]
    assert len(set(prints)) == 4 and all(re.fullmatch("[0-9a-f]{64}", p) for p in prints)
    assert changes(first, "dit", first / "dit.safetensors")
    assert changes(first, "dit", first / "dit_config.json")
    assert not changes(first, "dit", first / "encoder.safetensors")
    assert changes(first, "encoder", first / "vae_config.json")
    for name in ("text_encoder/model.safetensors", "tokenizer/spiece.model"):
        assert changes(second, "text_encoder", second / name)
    (second / "tokenizer" / "spiece.model").write_text("{}")
    before = WeightsFolder(second).fingerprint("text_encoder")
    (second / "text_encoder" / "config.json").write_text(json.dumps(T5 | {"layer_norm_epsilon": 1e-6}))
    assert WeightsFolder(second).fingerprint("text_encoder") != before
    before = WeightsFolder(second).fingerprint("text_encoder")
    (second / "tokenizer" / "spiece.model").rename(second / "tokenizer" / "tokenizer.json")
    assert WeightsFolder(second).fingerprint("text_encoder") != before
    with pytest.raises(CheckpointError, match="weights pull"):
        WeightsFolder(tmp_path).fingerprint("dit")


def test_a_large_file_is_sampled_from_its_first_to_its_last_byte(tmp_path):
    path = tmp_path / "dit.safetensors"
    write_sparse(path, {"a": (2**29 + 2**22,)})
    size = path.stat().st_size
    seen = [WeightsFolder(tmp_path).fingerprint("dit")]
    with path.open("r+b") as file:
        file.truncate(size + 2**20)
    seen.append(WeightsFolder(tmp_path).fingerprint("dit"))
    with path.open("r+b") as file:
        file.truncate(size)
    for position in (9, size // 63 * 30 - 2**15, size - 1):
        with path.open("r+b") as file:
            file.seek(position)
            file.write(b"!")
        seen.append(WeightsFolder(tmp_path).fingerprint("dit"))
    assert len(set(seen)) == 5


def test_the_identity_of_a_base_depends_on_its_weights_and_not_on_their_dtype(tmp_path):
    copy_golden(tmp_path, "dit")
    first = WeightsFolder(GOLDEN).base_identity()
    assert re.fullmatch("[0-9a-f]{64}", first)
    tensors = {name: tensor.float() for name, tensor in official("dit").items()}
    save_file(tensors, tmp_path / "dit.safetensors")
    assert WeightsFolder(tmp_path).base_identity() == first
    tensors["blocks.1.attn.qkv_x.weight"] *= 2
    save_file(tensors, tmp_path / "dit.safetensors")
    assert WeightsFolder(tmp_path).base_identity() != first
    assert all(
        tensor.is_meta and tensor.shape == tensors[name].shape
        for name, tensor in WeightsFolder(tmp_path).dit_skeleton().state_dict().items()
    )


def test_an_opened_folder_reads_a_header_once_and_loads_separate_models(tmp_path):
    weights = WeightsFolder(copy_golden(tmp_path, "dit"))
    weights.check(["dit"])
    skeleton, first, second = weights.dit_skeleton(), *(weights.load_dit("cpu", torch.float32) for _ in range(2))
    assert first.t5_yproj.weight.data_ptr() != second.t5_yproj.weight.data_ptr()
    assert skeleton.t5_yproj.weight.is_meta
    (tmp_path / "dit.safetensors").write_bytes(b"damaged since")
    assert weights.dit_skeleton().config == skeleton.config
    assert "not a complete safetensors file" in refused(tmp_path, "dit")


def test_loading_leaves_the_verbosity_of_transformers_as_it_was():
    before = logging.get_verbosity()
    try:
        logging.set_verbosity_info()
        WeightsFolder(TINY).load_text_encoder(torch.device("cpu"), torch.float32)
        assert logging.get_verbosity() == logging.INFO
    finally:
        logging.set_verbosity(before)
