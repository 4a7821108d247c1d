"""`sample` in several real processes, as a user starts them: the same latents, and a clear end when a rank dies."""

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from helpers_road import run, start
from safetensors.torch import load_file

from mochi_tune.adapters import Adapter, LoraLayer, save_adapter
from mochi_tune.config import load_config, weights_folder
from mochi_tune.lora import linear_shapes
from mochi_tune.video import read_frames
from mochi_tune.weights import base_identity, meta_dit

TOY = weights_folder(load_config("toy_lora", []))
PROMPT = "a red circle moves up over a grey background"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("parallel")
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: LoraLayer(torch.randn(2, i, generator=generator) / 8, torch.randn(o, 2, generator=generator) / 16, 2.0)
        for name, (o, i) in linear_shapes(meta_dit(TOY)).items()
    }
    save_adapter(
        folder / "adapter.safetensors", Adapter(layers, {"num_blocks": "4", "base_fingerprint": base_identity(TOY)})
    )
    return folder


def arguments(folder: Path, name: str, *more: str) -> list[str]:
    common = ["sample.num_frames=37", "sample.steps=3", "save_latents=true", f"run_dir={folder}"]
    common += [f"sample.prompt_cache={folder / 'prompts'}", f"out={folder / name}.mp4", "parallel.timeout_seconds=60"]
    return ["sample", "conf=toy_lora", f"prompt={PROMPT}", *common, *more]


def latents(folder: Path, name: str, *more: str) -> torch.Tensor:
    done = run(*arguments(folder, name, *more))
    assert done.returncode == 0 and done.stdout.strip() == f"{folder / name}.mp4", done.stderr
    assert len(read_frames(folder / f"{name}.mp4")) == 37
    return load_file(folder / f"{name}.safetensors")["latents"]


@pytest.mark.parametrize("adapter", [False, True])
def test_every_layout_gives_the_latents_of_one_process(folder, adapter):
    more = [f"adapter={folder / 'adapter.safetensors'}"] if adapter else []
    one = latents(folder, f"one_{adapter}", *more)
    layouts = {
        "context": ["parallel.num_processes=3", "parallel.context=3"],
        "guidance": ["parallel.num_processes=2", "parallel.guidance=2"],
        "both": ["parallel.num_processes=4", "parallel.context=2", "parallel.guidance=2"],
        "shard": ["parallel.num_processes=2", "parallel.context=2", "memory.dit=shard"],
    }
    hashes = {json.loads((folder / f"one_{adapter}.json").read_text())["noise_sha256"]}
    for name, layout in layouts.items():
        got = latents(folder, f"{name}_{adapter}", *layout, *more)
        assert (got - one).abs().max() <= 1e-5 * one.abs().max(), name
        hashes.add(json.loads((folder / f"{name}_{adapter}.json").read_text())["noise_sha256"])
    assert len(hashes) == 1


def test_impossible_layouts_are_refused_in_one_line(folder):
    for layout, said in (
        (["parallel.num_processes=4", "parallel.context=4"], "does not divide the model's 6 heads: use 1, 2, 3, 6."),
        (["parallel.num_processes=2", "parallel.data=3"], "is not possible with 2 processes: use data=2"),
    ):
        done = run(*arguments(folder, "never", *layout))
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def children(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == parent and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def test_a_rank_that_is_killed_ends_all_and_leaves_nothing(folder):
    more = ["sample.steps=2000", "parallel.num_processes=2", "parallel.context=2", "parallel.timeout_seconds=10"]
    process = start(*arguments(folder, "dead", *more))
    ranks = []
    while len(ranks) < 2 or min(Path(f"/proc/{rank}").stat().st_ctime for rank in ranks) > time.time() - 12:
        assert process.poll() is None
        ranks = children(process.pid)
        time.sleep(0.2)
    os.kill(ranks[1], signal.SIGKILL)
    assert process.wait(timeout=40) != 0
    for rank in ranks:
        assert not Path(f"/proc/{rank}").exists() or rank not in children(1)
    assert not list(folder.glob("*dead*"))
