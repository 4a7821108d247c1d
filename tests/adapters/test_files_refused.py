import json
import pickle

import pytest
import torch
from helpers_adapters import random_adapter, write
from safetensors.torch import load_file, save_file

from mochi_tune.adapters import reading
from mochi_tune.adapters.files import Adapter, LoraLayer, load_adapter, save_adapter
from mochi_tune.errors import CheckpointError, ConfigError


class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (open, (str(self.marker), "w"))


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.ckpt", "a.safetensors"])
def test_pickles_are_refused_and_never_opened(tmp_path, name):
    (tmp_path / name).write_bytes(pickle.dumps(Bomb(tmp_path / "exploded")))
    with pytest.raises(CheckpointError, match=r"is not safetensors.*convert it") as error:
        load_adapter(tmp_path / name)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "exploded").exists()


def test_a_pickle_suffix_is_refused_whatever_it_holds(tmp_path):
    save_adapter(tmp_path / "a.pt", random_adapter())
    with pytest.raises(CheckpointError, match="is not safetensors"):
        load_adapter(tmp_path / "a.pt")


def test_a_missing_or_truncated_file_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="does not exist"):
        load_adapter(path)
    save_adapter(path, random_adapter())
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        load_adapter(path)
    path.write_bytes(b"")
    with pytest.raises(CheckpointError, match="is empty: fetch or export it again"):
        load_adapter(path)


def test_what_a_file_is_counts_and_not_only_its_name(tmp_path):
    save_adapter(tmp_path / "blob", random_adapter())
    with pytest.raises(CheckpointError, match=r"blob is safetensors, but its name .* copy or link it to NAME\.safeten"):
        load_adapter(tmp_path / "blob")
    torch.save({"x": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"pickles .* so they are never opened: convert it"):
        load_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize("to", ["native", "comfyui"])
def test_a_file_of_ours_with_a_changed_bit_is_refused(tmp_path, to):
    path = tmp_path / "a.safetensors"
    save_adapter(path, random_adapter(), to)
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged, its weights are not those that were written: fetch or export"):
        load_adapter(path)


def save_in_order(tensors, path, metadata):
    """Writes a safetensors file as the scripts of kohya do: json.dumps writes the header, which keeps the order.

    Source: kohya-ss/sd-scripts library/utils.py (mem_eff_save_file).
    """
    header, end = {"__metadata__": metadata}, 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    content = json.dumps(header).encode()
    content += b" " * (-(len(content) + 8) % 256)
    values = b"".join(tensor.contiguous().numpy().tobytes() for tensor in tensors.values())
    path.write_bytes(len(content).to_bytes(8, "little") + content + values)


@pytest.mark.parametrize("save", [save_file, save_in_order], ids=["library", "json"])
def test_a_file_of_ours_with_weights_changed_by_another_program_is_accepted_with_a_notice(tmp_path, capsys, save):
    path, adapter = tmp_path / "a.safetensors", random_adapter()
    save_adapter(path, adapter)
    load_adapter(path)
    assert capsys.readouterr().err == ""
    content = path.read_bytes()
    # Not by the library, which reads the metadata in random order.
    metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    tensors = {key: 2 * tensor if key.endswith("lora_B") else tensor for key, tensor in load_file(path).items()}
    save(tensors, path, metadata)
    name = "blocks.0.attn.qkv_x"
    assert torch.equal(load_adapter(path).layers[name].b, 2 * adapter.layers[name].b)
    said = f"mochi-tune: adapter {path}: another program has changed its weights since mochi-tune wrote them\n"
    assert capsys.readouterr().err == said


def pair(name, rank=2, num_in=192, num_out=192, suffix=""):
    return {f"{name}.lora_A{suffix}": torch.ones(rank, num_in), f"{name}.lora_B{suffix}": torch.ones(num_out, rank)}


GOOD = pair("blocks.0.attn.proj_x")
MAGNITUDE = {"blocks.0.attn.proj_x.lora_magnitude": torch.ones(192)}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (GOOD | pair("blocks.0.attn.proj_z"), r"2 of its keys fit no layer.*blocks\.0\.attn\.proj_z\.lora_A"),
        (GOOD | pair("blocks.01.attn.proj_x"), r"blocks\.01\.attn\.proj_x\.lora_A"),
        (GOOD | {"blocks.0.attn.proj_x.dora_scale": torch.ones(1)}, "dora_scale"),
        (
            GOOD | pair("diffusion_model.blocks.0.attn.proj_x"),
            r"a layer twice, by diffusion_model\.blocks.* remove one",
        ),
        (GOOD | pair("blocks.0.attn.proj_z"), r"fit no layer of Mochi, .*: remove them from the file, or use another"),
        (
            pair("transformer_blocks.0.attn1.to_q", suffix=".weight")
            | pair("transformer_blocks.0.attn2.to_q", suffix=".weight"),
            r"an adapter of another model, such as LTX-Video.*attn2\.to_q\.lora_A",
        ),
        (GOOD | {"step": torch.ones(2)}, "1 of its keys fit no layer of Mochi, step: remove"),
        (GOOD | {"blocks.1.attn.qkv_x.lora_A": torch.ones(2, 192)}, r"lacks blocks\.1\.attn\.qkv_x\.lora_B"),
        ({"blocks.1.attn.qkv_x.lora_B": torch.ones(576, 2)}, r"lacks blocks\.1\.attn\.qkv_x\.lora_A"),
        (
            pair("transformer_blocks.0.attn1.to_q", suffix=".weight")
            | pair("transformer_blocks.0.attn1.to_k", num_out=96, suffix=".weight"),
            "q, k and v differ in size",
        ),
        (GOOD | pair("transformer_blocks.0.attn1.to_q", suffix=".weight"), "mixes official and diffusers names"),
        (pair("unet.down.0.to_q", suffix=".weight"), r"no known format.*unet\.down\.0.*blocks\.0\.attn\.qkv_x"),
        (pair("lora_unet_double_blocks_0_img_attn_qkv", suffix=".weight"), "of another model than Mochi, such as Wan"),
        ({}, "its keys are none"),
        (GOOD | pair("blocks.1.attn.proj_x") | MAGNITUDE, r"lacks blocks\.1\.attn\.proj_x\.magnitude"),
        (GOOD | {key: tensor[1:] for key, tensor in MAGNITUDE.items()}, r"magnitudes have shape \(191,\), not"),
        (GOOD | {key: tensor[:, None] for key, tensor in MAGNITUDE.items()}, r"float32 \(192, 1\): lora_A"),
        (GOOD | {key: tensor / 0 for key, tensor in MAGNITUDE.items()}, "NaN or infinity"),
        (MAGNITUDE, r"lacks blocks\.0\.attn\.proj_x\.lora_A"),
        (
            {"blocks.0.attn.proj_x.lora_A": torch.ones(2, 192), "blocks.0.attn.proj_x.lora_B": torch.ones(192, 3)},
            "do not fit each other",
        ),
        (pair("blocks.0.attn.proj_x", rank=0), "do not fit each other"),
        (pair("blocks.0.attn.qkv_x", num_out=575), "do not fit each other"),
        (pair("blocks.0.mlp_x.w1", num_out=1023), "do not fit each other"),
        ({key: tensor[0] for key, tensor in GOOD.items()}, r"lora_A is float32 \(192,\); .* have two dims"),
        ({key: tensor.int() for key, tensor in GOOD.items()}, r"lora_A is int32 \(2, 192\); .*: convert the file"),
        ({key: tensor * float("nan") for key, tensor in GOOD.items()}, "NaN or infinity"),
        ({key: tensor * 0 for key, tensor in GOOD.items()}, "nothing but zeros"),
        (GOOD | {"blocks.0.attn.proj_x.alpha": torch.tensor(float("inf"))}, "no usable alpha"),
        (GOOD | {"blocks.0.attn.proj_x.alpha": torch.ones(2)}, "no usable alpha"),
    ],
)
def test_damaged_and_foreign_files_are_refused(tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=message) as error:
        load_adapter(write(tmp_path / "a.safetensors", tensors))
    assert "\n" not in str(error.value)
    assert str(tmp_path / "a.safetensors") in str(error.value)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair("blocks.0.attn.qkv_x", num_out=575), r"qkv_x: lora_A \(2, 192\) and lora_B \(575, 2\) do not fit each"),
        (pair("unet.down.0.to_q"), "of no known format"),
    ],
)
def test_keys_and_sizes_are_refused_before_the_weights_are_read(tmp_path, monkeypatch, tensors, message):
    monkeypatch.setattr(reading, "_sums", None)
    with pytest.raises(CheckpointError, match=message):
        load_adapter(write(tmp_path / "a.safetensors", tensors))


def kwargs(rank=2, alpha=2):
    return {"kwargs": json.dumps({"out_proj_lora_rank": rank, "out_proj_lora_alpha": alpha})}


SPLIT = pair("transformer.transformer_blocks.0.attn1.to_out.0", suffix=".weight")


@pytest.mark.parametrize(
    ("tensors", "metadata", "message"),
    [
        (GOOD, kwargs(rank=4), "has rank 2.*out_proj_lora_rank=4"),
        (GOOD, kwargs(alpha="8"), "no usable alpha"),
        (GOOD, kwargs(alpha=True), "no usable alpha"),
        (GOOD, {"kwargs": "{"}, "`kwargs` in its metadata is not a JSON object"),
        (GOOD, {"kwargs": "[]"}, "`kwargs` in its metadata is not a JSON object"),
        (GOOD | pair("blocks.0.mlp_x.w2"), kwargs(), r"mlp_x\.w2 has rank 2.*=None"),
        (GOOD, {"format": "mochi-tune"}, "`alphas` in its metadata is not a JSON object"),
        (GOOD, {"format": "mochi-tune", "alphas": "{}"}, r"no usable alpha for blocks\.0\.attn\.proj_x"),
        (SPLIT, {"lora_adapter_metadata": "{}"}, "no usable alpha"),
        (
            SPLIT,
            {"lora_adapter_metadata": '{"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"(": 2}}'},
            "damaged",
        ),
        (SPLIT, {"lora_adapter_metadata": '{"lora_alpha": "x", "use_rslora": true}'}, "damaged"),
    ],
)
def test_metadata_that_does_not_give_alpha_is_refused(tmp_path, tensors, metadata, message):
    with pytest.raises(CheckpointError, match=message):
        load_adapter(write(tmp_path / "a.safetensors", tensors, metadata))


def test_what_cannot_be_written_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(CheckpointError, match="its layers are none"):
        save_adapter(path, Adapter({}))
    layer = LoraLayer(torch.ones(2, 192), torch.ones(768, 2), 2.0)
    with pytest.raises(CheckpointError, match=r"blocks\.0\.norm_x"):
        save_adapter(path, Adapter({"blocks.0.norm_x": layer}))
    with pytest.raises(CheckpointError, match="NaN"):
        save_adapter(path, Adapter({"blocks.0.attn.qkv_x": LoraLayer(layer.a, layer.b * float("nan"), 2.0)}))
    with pytest.raises(CheckpointError, match="do not fit each other"):
        save_adapter(path, Adapter({"blocks.0.attn.qkv_x": LoraLayer(torch.ones(0, 192), torch.ones(768, 0), 2.0)}))
    with pytest.raises(ConfigError, match=r"to=diffuser is not an adapter format.*: use diffusers"):
        save_adapter(path, random_adapter(), "diffuser")
    with pytest.raises(ConfigError, match=r"to=foo is not .* kohya, native: use one of these\."):
        save_adapter(path, random_adapter(), "foo")
    assert list(tmp_path.iterdir()) == []
