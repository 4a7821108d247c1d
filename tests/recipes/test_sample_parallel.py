"""`sample` in several real processes: the same latents and videos as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers_parallel import run_ranks
from helpers_road import ENVIRONMENT, command, run
from safetensors.torch import load_file

from mochi_tune.adapters.files import Adapter, LoraLayer, load_adapter, save_adapter
from mochi_tune.adapters.lora import linear_shapes
from mochi_tune.config.load import load_config, weights_folder
from mochi_tune.parallel.mesh import Layout, Mesh
from mochi_tune.recipes.sample import main
from mochi_tune.sampling.render import decoded_frames
from mochi_tune.sampling.video import read_frames
from mochi_tune.weights.folder import WeightsFolder

TOY = weights_folder(load_config("toy_lora", []))
PROMPTS = ("a red circle moves up over a grey background", "a blue square")
LAYOUTS = {
    2: ({"parallel.context": 2}, {"parallel.guidance": 2}, {"parallel.context": 2, "memory.dit": "shard"}),
    3: ({"parallel.context": 3},),
    4: ({"parallel.guidance": 2, "parallel.context": 2}, {"parallel.data": 2, "parallel.context": 2}),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds an adapter, and what one process renders of both prompts with it and without."""
    folder = tmp_path_factory.mktemp("parallel")
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: LoraLayer(torch.randn(2, i, generator=generator) / 8, torch.randn(o, 2, generator=generator) / 16, 2.0)
        for name, (o, i) in linear_shapes(WeightsFolder(TOY).dit_skeleton()).items()
    }
    save_adapter(
        folder / "adapter.safetensors",
        Adapter(layers, {"num_blocks": "4", "base_fingerprint": WeightsFolder(TOY).base_identity()}),
    )
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    for name in ("without", "with"):
        render(folder, f"one_{name}", {}, name)
    return folder


def settings(folder: Path, name: str, layout: dict, adapter: str) -> list[str]:
    given = [f"{key}={value}" for key, value in ({"parallel.timeout_seconds": 60} | layout).items()]
    given += [f"sample.adapter={folder / 'adapter.safetensors'}"] if adapter == "with" else []
    # 37 frames are 7 latent frames, and a guidance of 1 is part of the schedule.
    given += ["sample.num_frames=37", "sample.steps=3", "sample.guidance=[6,3,1]", "sample.save_latents=true"]
    given += [f"sample.prompts={folder / 'prompts.txt'}", f"sample.prompt_cache={folder / 'cache'}"]
    return [*given, f"sample.out={folder / name}", f"run_dir={folder}"]


def render(folder: Path, name: str, layout: dict, adapter: str) -> None:
    list(main(load_config("toy_lora", settings(folder, name, layout, adapter))))


def render_all(folder: Path, num_ranks: int) -> list[torch.Tensor]:
    """Renders by every layout; returns the frames of a video of one process that the ranks decode together."""
    for i, layout in enumerate(LAYOUTS[num_ranks]):
        for adapter in ("without", "with"):
            render(folder, f"{num_ranks}_{i}_{adapter}", layout, adapter)
    mesh = Mesh(Layout(context=num_ranks), torch.device("cpu"), 60)
    latents = load_file(next((folder / "one_with").glob("*.safetensors")))["latents"]
    return list(decoded_frames(WeightsFolder(TOY).load_decoder("cpu", torch.float32), latents, mesh))


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_every_layout_gives_the_latents_and_the_videos_of_one_process(folder, tmp_path, num_ranks):
    together, *others = run_ranks(num_ranks, render_all, tmp_path, folder, num_ranks)
    latents = load_file(next((folder / "one_with").glob("*.safetensors")))["latents"]
    alone = list(decoded_frames(WeightsFolder(TOY).load_decoder("cpu", torch.float32), latents, None))
    difference = (torch.cat(together).int() - torch.cat(alone).int()).abs()
    assert difference.max() <= 1 and difference.float().mean() < 1e-3 and not any(others)
    for i, layout in enumerate(LAYOUTS[num_ranks]):
        for adapter in ("without", "with"):
            made = sorted((folder / f"{num_ranks}_{i}_{adapter}").iterdir())
            assert len(made) == 6
            for path in made:
                one = folder / f"one_{adapter}" / path.name
                if path.suffix == ".safetensors":
                    ours, theirs = (load_file(p)["latents"] for p in (path, one))
                    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max(), layout
                elif path.suffix == ".mp4":
                    ours, theirs = (np.stack(read_frames(p)).astype(int) for p in (path, one))
                    assert ours.shape == theirs.shape == (37, 64, 96, 3)
                    # A pixel may round the other way, which the video's compression spreads.
                    assert np.abs(ours - theirs).mean() < 0.5, layout
                else:
                    ours, theirs = (json.loads(p.read_text()) for p in (path, one))
                    assert ours["noise_sha256"] == theirs["noise_sha256"]


def render_dora(folder: Path) -> None:
    more = ["parallel.context=2", "memory.dit=shard", f"sample.adapter={folder / 'dora.safetensors'}"]
    list(main(load_config("toy_lora", [*settings(folder, "two_dora", {}, "without"), *more])))


def test_a_dora_measures_its_rows_where_the_base_is_in_shares(folder, tmp_path):
    adapter, dit = load_adapter(folder / "adapter.safetensors"), WeightsFolder(TOY).load_dit("cpu", torch.float32)
    for name, layer in adapter.layers.items():
        layer.magnitude = 1.2 * dit.get_submodule(name).weight.detach().norm(dim=1)
    save_adapter(folder / "dora.safetensors", adapter)
    render(folder, "one_dora", {"sample.adapter": folder / "dora.safetensors"}, "without")
    run_ranks(2, render_dora, tmp_path, folder)
    for path in (folder / "one_dora").glob("*.safetensors"):
        alone, plain = (load_file(folder / name / path.name)["latents"] for name in ("one_dora", "one_with"))
        together = load_file(folder / "two_dora" / path.name)["latents"]
        assert (together - alone).abs().max() <= 1e-5 * alone.abs().max()
        assert not torch.allclose(alone, plain, atol=1e-2)


def test_the_command_starts_its_own_processes_and_tells_the_layout_and_the_noise(folder):
    more = [s for s in settings(folder, "own", {}, "with") if "sample.out" not in s and "prompts=" not in s]
    out = folder / "own.mp4"
    done = run("sample", "conf=toy_lora", *more, f"prompt={PROMPTS[0]}", f"out={out}", "parallel.num_processes=2")
    assert done.returncode == 0 and done.stdout == f"{out}\n", done.stderr
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["layout"] == {"data": 1, "guidance": 2, "context": 1}
    assert "2 processes: parallel.data=1 parallel.guidance=2 parallel.context=1" in done.stderr
    assert f"own.mp4: noise {record['noise_sha256']}" in done.stderr
    assert set(record["seconds"]) == set(record["peak_gib"]) == {"text", "sample", "decode"}


def test_impossible_layouts_are_refused_in_one_line(folder):
    for layout, said in (
        ({"parallel.num_processes": 4, "parallel.context": 4}, "does not divide the model's 6 heads: use 1, 2, 3, 6."),
        ({"parallel.num_processes": 2, "parallel.data": 3}, "is not possible with 2 processes: use parallel.data=2"),
        ({"parallel.context": 2}, "parallel.context=2 wants 2 processes: use parallel.num_processes=2."),
        ({"parallel.num_processes": 5}, "parallel.num_processes=5 is more than can share 2 videos of a model with 6"),
        ({"memory.dit": "shard"}, "use parallel.num_processes=2 parallel.context=2, or memory.dit=offload."),
    ):
        done = run("sample", "conf=toy_lora", *settings(folder, "never", layout, "without"))
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_processes_that_torchrun_or_srun_starts_just_run(folder):
    one = {p.name: load_file(p)["latents"] for p in (folder / "one_without").glob("*.safetensors")}
    arguments = {name: ["sample", "conf=toy_lora", *settings(folder, name, {}, "without")] for name in ("run", "srun")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, "-m", "mochi_tune.cli", *arguments["run"]], env=ENVIRONMENT, check=True)
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_NODELIST": "localhost"}
    tasks = [
        subprocess.Popen(
            command(*arguments["srun"]),
            env=ENVIRONMENT | step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
        )
        for rank in (0, 1)
    ]
    assert [task.wait(timeout=120) for task in tasks] == [0, 0]
    for name in arguments:
        made = {p.name: load_file(p)["latents"] for p in (folder / name).glob("*.safetensors")}
        assert made.keys() == one.keys()
        assert all((made[key] - one[key]).abs().max() <= 1e-5 * one[key].abs().max() for key in one)
