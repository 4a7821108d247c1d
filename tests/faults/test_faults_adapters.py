"""Adapter files from elsewhere: hostile headers, hostile metadata, missing halves, random damage."""

import json
import math
import multiprocessing
import random
import resource
import struct
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers_adapters import ALL, ATTENTION, delta_weight, random_adapter, write
from helpers_process import PATIENCE, Program
from helpers_road import road
from safetensors import safe_open
from safetensors.torch import load_file

from mochi_tune.adapters.files import LoraLayer, load_adapter, save_adapter
from mochi_tune.adapters.layers import block_of
from mochi_tune.adapters.lora import linear_shapes
from mochi_tune.config.load import load_config, weights_folder
from mochi_tune.errors import CheckpointError
from mochi_tune.weights.folder import WeightsFolder

A, B = "blocks.0.attn.proj_x.lora_A", "blocks.0.attn.proj_x.lora_B"
# What a process may allocate beyond what it has when it starts; no file below holds more than 64 MB.
MEMORY = 256 * 2**20


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def raw(header, data=b"", length=None) -> bytes:
    """A safetensors file of any header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def pair(second=None, dtype="F32", data=b"\1" * 32, **metadata) -> bytes:
    """A file of one layer of 2x2 halves of F32, its second half as given."""
    header = {"__metadata__": metadata, A: entry([2, 2], 0, 16, dtype), B: second or entry([2, 2], 16, 32, dtype)}
    return raw(header, data)


def a_million() -> bytes:
    one = b'"blocks.0.attn.qkv_x.%d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    return raw(b"{" + b",".join(one % number for number in range(10**6)) + b"}")


HEADERS = {
    "longer than the file": lambda: raw(b"{}", length=10**6),
    "of 2^64 bytes": lambda: raw(b"{}", length=2**64 - 1),
    "of 100 MB": lambda: struct.pack("<Q", 100 * 2**20 + 1) + b"{" + bytes(1000),
    "of a million tensors": a_million,
    "deeply nested": lambda: raw(b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"),
    "a list": lambda: raw(b"[]"),
    "not UTF-8": lambda: raw(b'{"\xff": 1}'),
    "the same name twice": lambda: raw(
        b"{%s, %s, %s}"
        % tuple(
            f'"{name}": {json.dumps(value)}'.encode()
            for name, value in ((A, entry([2, 2], 0, 16)), (A, entry([2, 2], 0, 16)), (B, entry([2, 2], 16, 32)))
        ),
        b"\1" * 32,
    ),
    "halves that overlap": lambda: pair(entry([2, 2], 8, 24), data=b"\1" * 24),
    "one half as both": lambda: pair(entry([2, 2], 0, 16), data=b"\1" * 16),
    "a gap": lambda: pair(entry([2, 2], 32, 48), data=b"\1" * 48),
    "bytes of no tensor": lambda: pair(data=b"\1" * 48),
    "a shape beyond 64 bits": lambda: pair(entry([2**32, 2**32], 16, 32)),
    "a shape that wraps to 0": lambda: pair(entry([2**62, 4, 2], 16, 16), data=b"\1" * 16),
    "a negative shape": lambda: pair(entry([-2, -2], 16, 32)),
    "no elements": lambda: raw({A: entry([0, 2], 0, 0), B: entry([2, 0], 0, 0)}),
    "no elements of a huge shape": lambda: raw({A: entry([0, 2**60], 0, 0), B: entry([2**60, 0], 0, 0)}),
    "metadata that is no text": lambda: pair(rank=4),
    **{
        f"dtype {dtype}": lambda dtype=dtype, num=num: raw(
            {A: entry([4, num], 0, 16, dtype), B: entry([4, num], 16, 32, dtype)}, b"\1" * 32
        )
        for dtype, num in {"F99": 4, "F8_E8M0": 4, "F4": 8, "I32": 1, "BOOL": 4}.items()
    },
    "alphas nested deeply": lambda: pair(format="mochi-tune", alphas="[" * 10**5 + "]" * 10**5),
    "alphas of 400 digits": lambda: pair(format="mochi-tune", alphas=f'{{"{A[:-7]}": 1{"0" * 400}}}'),
    "alphas of 5000 digits": lambda: pair(format="mochi-tune", alphas=f'{{"{A[:-7]}": 1{"0" * 5000}}}'),
    "an alpha of 1e300": lambda: pair(format="mochi-tune", alphas=f'{{"{A[:-7]}": 1e300}}'),
    "an alpha of NaN": lambda: pair(format="mochi-tune", alphas=f'{{"{A[:-7]}": NaN}}'),
}


def _load_all(folder: Path) -> None:
    """Loads hostile files and randomly damaged ones in little memory; writes what became of them."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    files = {name: make() for name, make in HEADERS.items() if name != "of a million tensors"}
    (folder / "million.safetensors").write_bytes(a_million())
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    results = {"of a million tensors": _load(folder / "million.safetensors")}
    for name, content in files.items():
        (folder / "x.safetensors").write_bytes(content)
        results[name] = _load(folder / "x.safetensors")
    good, generator = (folder / "good.safetensors").read_bytes(), random.Random(0)
    header_bytes = 8 + int.from_bytes(good[:8], "little")
    for number in range(600):
        damaged = bytearray(good)
        if number % 3 == 0:
            damaged = damaged[: generator.randrange(len(good))]
        else:
            for _ in range(generator.choice((1, 1, 3, 10))):
                damaged[generator.randrange(header_bytes if number % 3 == 1 else len(good))] = generator.randrange(256)
        (folder / "x.safetensors").write_bytes(damaged)
        results[f"random {number}"] = _load(folder / "x.safetensors")
    (folder / "results.json").write_text(json.dumps(results))


def _load(path: Path) -> str:
    try:
        adapter = load_adapter(path)
        assert adapter.layers and all(
            layer.a.dtype == layer.b.dtype == torch.float32
            and layer.a.isfinite().all()
            and layer.b.isfinite().all()
            and math.isfinite(layer.alpha)
            and layer.a.shape[0] == layer.b.shape[1] == layer.rank > 0
            for layer in adapter.layers.values()
        )
        said = "valid"
    except CheckpointError as error:
        said = str(error)
        assert "\n" not in said, said
    except Exception as error:  # noqa: BLE001 (the test asks for its name)
        said = f"! {type(error).__name__}: {error}"
    return said


def test_hostile_headers_and_random_damage_are_refused_in_one_line_and_in_little_memory(tmp_path):
    save_adapter(tmp_path / "good.safetensors", random_adapter(ALL))
    process = multiprocessing.get_context("forkserver").Process(target=_load_all, args=(tmp_path,))
    process.start()
    process.join(PATIENCE)
    assert process.exitcode == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == len(HEADERS) + 600
    for name in HEADERS:
        assert results[name].startswith(f"adapter {tmp_path}"), (name, results[name])
    kinds = Counter("valid" if said == "valid" else said[:7] for said in results.values())
    assert kinds.keys() == {"valid", "adapter"}, [said for said in results.values() if said[0] == "!"]
    # Flips among the weights alone are no damage that a file without a checksum can show.
    assert kinds["valid"] < 250


def test_a_regular_expression_that_would_not_end_is_not_tried(tmp_path):
    names = [f"transformer.transformer_blocks.0.attn1.to_q.lora_{half}.weight" for half in "AB"]
    tensors = dict(zip(names, (torch.ones(2, 192), torch.ones(192, 2)), strict=True))
    for pattern in (r"(\\w+\\.?)+!", r"(.*)*!", "(?:a|a)*b", ".*.*.*.*.*.*.*.*.*.*.*.*!"):
        path = write(tmp_path / "a.safetensors", tensors, {
            "lora_adapter_metadata": f'{{"transformer.lora_alpha": 1, "transformer.alpha_pattern": {{"{pattern}": 2}}}}'
        })  # fmt: skip
        # Tried, it would take longer than the tests may.
        with pytest.raises(CheckpointError, match="and patterns may only have"):
            load_adapter(path)


def official(tmp_path, **more) -> Path:
    """An official file whose `kwargs` say more than they should."""
    path = tmp_path / "official.safetensors"
    save_adapter(path, random_adapter(ATTENTION), "official")
    kwargs = {f"{group}_proj_lora_rank": 16 for group in ("qkv", "out")}
    kwargs |= {f"{group}_proj_lora_alpha": 16.0 for group in ("qkv", "out")}
    return write(path, load_file(path), {"kwargs": json.dumps(kwargs | more)})


def test_of_kwargs_nothing_but_ranks_and_alphas_is_read(tmp_path):
    plain = load_adapter(official(tmp_path))
    hostile = load_adapter(official(tmp_path, depth=10**9, hidden_size_x="__import__('os')", attention_mode={"a": []}))
    assert hostile.layers.keys() == plain.layers.keys() and hostile.metadata == plain.metadata
    for name, layer in plain.layers.items():
        assert torch.equal(delta_weight(hostile.layers[name]), delta_weight(layer))


@pytest.mark.parametrize(
    "more",
    [
        {"qkv_proj_lora_rank": 10**9},
        {"qkv_proj_lora_rank": -16},
        {"qkv_proj_lora_rank": "16"},
        {"qkv_proj_lora_rank": None},
        {"qkv_proj_lora_alpha": "16"},
        {"qkv_proj_lora_alpha": [16]},
        {"qkv_proj_lora_alpha": 1e300},
        {"qkv_proj_lora_alpha": float("nan")},
        {"qkv_proj_lora_alpha": 10**400},
        {"out_proj_lora_alpha": True},
    ],
)
def test_kwargs_that_are_out_of_bounds_are_refused(tmp_path, more):
    with pytest.raises(CheckpointError, match=r"its metadata|no usable alpha") as error:
        load_adapter(official(tmp_path, **more))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("to", ["native", "official"])
@pytest.mark.parametrize("keep", ["first", "even", "qkv"])
def test_half_the_layers_are_not_taken_for_all(tmp_path, to, keep):
    path = tmp_path / "a.safetensors"
    save_adapter(path, random_adapter(ATTENTION), to)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    last, modules = max(map(block_of, tensors)), sorted({name.rpartition(".")[0] for name in tensors})
    chosen = {
        "first": lambda name: block_of(name) < last,
        "even": lambda name: modules.index(name.rpartition(".")[0]) % 2 == 0,
        "qkv": lambda name: "qkv" in name,
    }[keep]
    half = {name: tensor for name, tensor in tensors.items() if chosen(name)}
    assert 0 < len(half) < len(tensors)
    with pytest.raises(CheckpointError, match=r"incomplete, it lacks \d+ of \d+ layers, blocks\.") as error:
        load_adapter(write(path, half, metadata))
    assert "\n" not in str(error.value)


def test_sample_refuses_another_bases_adapter_and_half_of_one(tmp_path):
    shapes = linear_shapes(WeightsFolder(weights_folder(load_config("my_lora", ["model=tiny"]))).dit_skeleton())
    whole = random_adapter()
    whole.layers = {n: LoraLayer(torch.ones(2, i), torch.ones(o, 2), 2.0) for n, (o, i) in shapes.items()}
    save_adapter(tmp_path / "whole.safetensors", whole)
    half = dict(list(load_file(tmp_path / "whole.safetensors").items())[::2])
    write(tmp_path / "half.safetensors", half)
    whole.layers = {n: LoraLayer(torch.ones(2, i + 1), torch.ones(o, 2), 2.0) for n, (o, i) in shapes.items()}
    save_adapter(tmp_path / "wider.safetensors", whole)
    whole.layers = {n.replace("blocks.0", "blocks.7"): layer for n, layer in whole.layers.items() if "blocks.0" in n}
    save_adapter(tmp_path / "deeper.safetensors", whole)
    expected = {"half": "incomplete, it lacks", "wider": "was trained on another base: blocks.0",
                "deeper": "was trained on another base: the base has no blocks.7"}  # fmt: skip
    for name, text in expected.items():
        adapter = f"adapter={tmp_path / name}.safetensors"
        asked = Program(["sample", "conf=my_lora", *road(tmp_path), "prompt=x", adapter], tmp_path / name)
        assert text in asked.refusal
    assert not list(tmp_path.rglob("*.mp4"))
