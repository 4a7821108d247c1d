"""`sample` in several real processes: the same latents and videos as one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers_parallel import run_ranks
from helpers_process import Program, run
from helpers_road import ENVIRONMENT
from helpers_rounding import assert_same_frames, rounding_error, rounding_share, share_of_error
from helpers_video import keeping_frames, write_video
from safetensors.torch import load_file

from mochi_tune.adapters.files import Adapter, LoraLayer, load_adapter, save_adapter
from mochi_tune.adapters.lora import all_linear_shapes, apply_adapter
from mochi_tune.config.load import load_config, weights_folder
from mochi_tune.parallel.mesh import Layout, Mesh
from mochi_tune.recipes import sample
from mochi_tune.sampling.render import decoded_frames
from mochi_tune.sampling.requests import sampler_settings
from mochi_tune.sampling.sampler import draw_noise, sample_latents
from mochi_tune.weights.folder import WeightsFolder

TOY = weights_folder(load_config("toy_lora", []))
PROMPTS = ("a red circle moves up over a grey background", "a blue square")
LAYOUTS = {
    2: ({"parallel.context": 2}, {"parallel.guidance": 2}, {"parallel.context": 2, "memory.dit": "shard"}),
    3: ({"parallel.context": 3},),
    # The model has 6 heads: 4 processes are two rows of two that form a ring.
    4: (
        {"parallel.guidance": 2, "parallel.context": 2},
        {"parallel.data": 2, "parallel.context": 2},
        {"parallel.context": 4},
    ),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds an adapter, and what one process renders of both prompts with it and without."""
    folder = tmp_path_factory.mktemp("parallel")
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: LoraLayer(torch.randn(2, i, generator=generator) / 8, torch.randn(o, 2, generator=generator) / 16, 2.0)
        for name, (o, i) in all_linear_shapes(WeightsFolder(TOY).dit_skeleton()).items()
    }
    metadata = {"num_blocks": "4", "base_fingerprint": WeightsFolder(TOY).base_identity()}
    save_adapter(folder / "adapter.safetensors", Adapter(layers, metadata))
    # Modulation and what it is made of are computed once for all steps, so that no schedule changes an adapter of them.
    steady = {name: layer for name, layer in layers.items() if ".attn." in name or ".mlp_" in name}
    save_adapter(folder / "steady.safetensors", Adapter(steady, metadata))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    for name in ("without", "with"):
        render(folder, f"one_{name}", {}, name)
    return folder


def settings(folder: Path, name: str, layout: dict, adapter: str) -> list[str]:
    given = [f"{key}={value}" for key, value in layout.items()]
    given += [f"sample.adapter={folder / 'adapter.safetensors'}"] if adapter == "with" else []
    # 25 frames are 5 latent frames, and a guidance of 1 is part of the schedule.
    given += ["sample.num_frames=25", "sample.steps=3", "sample.guidance=[6,3,1]", "sample.save_latents=true"]
    given += [f"sample.prompts={folder / 'prompts.txt'}", f"sample.prompt_cache={folder / 'cache'}"]
    return [*given, f"sample.out={folder / name}", f"run_dir={folder}"]


def render(folder: Path, name: str, layout: dict, adapter: str) -> None:
    with keeping_frames(sample, folder / f"frames_{name}"):
        list(sample.main(load_config("toy_lora", settings(folder, name, layout, adapter))))


@pytest.fixture(scope="module")
def latents_error(folder) -> float:
    """How far the latents of another layout may be from those of one process: its sums are in another order."""
    weights = WeightsFolder(TOY)
    dit, text = weights.load_dit("cpu", torch.float32), weights.load_text_encoder("cpu", torch.float32)
    apply_adapter(dit, load_adapter(folder / "adapter.safetensors").layers, "adapter")
    schedule = sampler_settings(load_config("toy_lora", settings(folder, "never", {}, "without")).sample)
    noise, features = draw_noise(0, 25, 64, 96), text.encode([PROMPTS[0], ""])
    return rounding_error(lambda: [*sample_latents(dit, noise, *features, schedule)][-1], [*dit.parameters(), noise])


def decode(latents: torch.Tensor) -> torch.Tensor:
    return torch.cat(list(decoded_frames(WeightsFolder(TOY).load_decoder("cpu", torch.float32), latents, None)))


@pytest.fixture(scope="module")
def decoded(folder, latents_error) -> tuple[torch.Tensor, float, float]:
    """A decoded video; the share of its numbers that rounding may change, and that other latents' rounding may."""
    latents = load_file(next((folder / "one_with").glob("*.safetensors")))["latents"]
    decoder = WeightsFolder(TOY).load_decoder("cpu", torch.float32)
    share = rounding_share(
        lambda: torch.cat(list(decoded_frames(decoder, latents, None))), [*decoder.parameters(), latents]
    )
    return decode(latents), share, share + share_of_error(decode, latents, latents_error)


def render_all(folder: Path, num_ranks: int) -> list[torch.Tensor]:
    """Renders by every layout; returns the frames of a video of one process that the ranks decode together."""
    for i, layout in enumerate(LAYOUTS[num_ranks]):
        for adapter in ("without", "with"):
            render(folder, f"{num_ranks}_{i}_{adapter}", layout, adapter)
    saved = next((folder / "one_with").glob("*.safetensors"))
    render(folder, f"{num_ranks}_saved", {"sample.latents": saved}, "with")
    mesh = Mesh(Layout(context=num_ranks), torch.device("cpu"), 600)
    latents = load_file(saved)["latents"]
    return list(decoded_frames(WeightsFolder(TOY).load_decoder("cpu", torch.float32), latents, mesh))


@pytest.mark.parametrize("num_ranks", LAYOUTS)
def test_every_layout_gives_the_latents_and_the_videos_of_one_process(
    folder, tmp_path, latents_error, decoded, num_ranks
):
    together, *others = run_ranks(num_ranks, render_all, tmp_path, folder, num_ranks)
    # Those that are decoded from latents which are not the same bits may differ by what these are apart, too.
    alone, share, share_of_others = decoded
    assert_same_frames(torch.cat(together), alone, share)
    assert not any(others)
    [saved] = (folder / f"frames_{num_ranks}_saved").iterdir()
    assert_same_frames(torch.load(saved, weights_only=True), alone, share)
    for i, layout in enumerate(LAYOUTS[num_ranks]):
        for adapter in ("without", "with"):
            made = sorted((folder / f"{num_ranks}_{i}_{adapter}").iterdir())
            assert len(made) == 6
            for path in made:
                one = folder / f"one_{adapter}" / path.name
                if path.suffix == ".safetensors":
                    ours, theirs = (load_file(p)["latents"] for p in (path, one))
                    assert (ours - theirs).abs().max() <= latents_error < 1e-3 * theirs.abs().max(), layout
                elif path.suffix == ".mp4":
                    kept = (f"frames_{p.parent.name}/{p.stem}.pt" for p in (path, one))
                    ours, theirs = (torch.load(folder / name, weights_only=True) for name in kept)
                    assert ours.shape == (25, 64, 96, 3)
                    assert_same_frames(ours, theirs, share_of_others)
                else:
                    ours, theirs = (json.loads(p.read_text()) for p in (path, one))
                    assert ours["noise_sha256"] == theirs["noise_sha256"]


def render_dora(folder: Path) -> None:
    more = ["parallel.context=2", "memory.dit=shard", f"sample.adapter={folder / 'dora.safetensors'}"]
    list(sample.main(load_config("toy_lora", [*settings(folder, "two_dora", {}, "without"), *more])))


def test_a_dora_measures_its_rows_where_the_base_is_in_shares(folder, tmp_path, latents_error):
    adapter, dit = load_adapter(folder / "adapter.safetensors"), WeightsFolder(TOY).load_dit("cpu", torch.float32)
    for name, layer in adapter.layers.items():
        layer.magnitude = 1.2 * dit.get_submodule(name).weight.detach().norm(dim=1)
    save_adapter(folder / "dora.safetensors", adapter)
    render(folder, "one_dora", {"sample.adapter": folder / "dora.safetensors"}, "without")
    run_ranks(2, render_dora, tmp_path, folder)
    for path in (folder / "one_dora").glob("*.safetensors"):
        alone, plain = (load_file(folder / name / path.name)["latents"] for name in ("one_dora", "one_with"))
        together = load_file(folder / "two_dora" / path.name)["latents"]
        # A DoRA's rows are longer by a fifth than those of the adapter that the bound is measured with.
        assert (together - alone).abs().max() <= 2 * latents_error
        assert not torch.allclose(alone, plain, atol=1e-2)


STARTED = ["sample.init_strength=0.7", "sample.strength_schedule=[1,0.5]", "sample.block_strength={1-2: 0.5}"]


def start_from_a_video(folder: Path, name: str, *layout: str) -> None:
    more = [*STARTED, f"sample.init_video={folder / 'start.mp4'}", f"sample.adapter={folder / 'steady.safetensors'}"]
    more += layout
    list(sample.main(load_config("toy_lora", [*settings(folder, name, {}, "without"), *more])))


def test_processes_start_from_one_video_with_the_strengths_of_one_process(folder, tmp_path, latents_error):
    write_video(folder / "start.mp4", 25, width=96, height=64)
    start_from_a_video(folder, "one_start")
    run_ranks(2, start_from_a_video, tmp_path, folder, "two_start", "parallel.context=2", "memory.dit=shard")
    for path in (folder / "one_start").glob("*.safetensors"):
        alone, together, plain = (
            load_file(folder / name / path.name)["latents"] for name in ("one_start", "two_start", "one_with")
        )
        assert (together - alone).abs().max() <= latents_error
        assert not torch.allclose(alone, plain, atol=1e-2)
        records = (
            json.loads((folder / f"{name}_start" / path.name).with_suffix(".json").read_text())
            for name in ("one", "two")
        )
        alone, together = ({key: record[key] for key in ("init_video", "adapters", "sampler")} for record in records)
        assert alone == together


def test_the_command_starts_its_own_processes_and_prints_the_layout(folder):
    more = [s for s in settings(folder, "own", {}, "with") if "sample.out" not in s and "prompts=" not in s]
    out = folder / "own.mp4"
    done = run("sample", "conf=toy_lora", *more, f"prompt={PROMPTS[0]}", f"out={out}", "parallel.num_processes=2")
    assert done.returncode == 0 and done.stdout == f"video: {out}\n", done.stderr
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["layout"] == {"data": 1, "guidance": 2, "context": 1, "heads": 1}
    assert "2 processes: parallel.data=1 parallel.guidance=2 parallel.context=1" in done.stderr
    assert len(record["noise_sha256"]) == 64 and record["noise_sha256"] not in done.stderr
    assert set(record["seconds"]) == set(record["peak_gib"]) == {"text", "sample", "decode"}


def test_impossible_layouts_are_refused_in_one_line(folder):
    for layout, said in (
        ({"parallel.num_processes": 4, "parallel.context": 3}, "is not possible with 4 processes: use parallel.data=2"),
        ({"parallel.num_processes": 2, "parallel.data": 3}, "is not possible with 2 processes: use parallel.data=2"),
        ({"parallel.context": 2}, "parallel.context=2 needs 2 processes: use parallel.num_processes=2."),
        ({"memory.dit": "shard"}, "use parallel.num_processes=2 parallel.context=2, or memory.dit=offload."),
    ):
        done = run("sample", "conf=toy_lora", *settings(folder, "never", layout, "without"))
        assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_processes_that_torchrun_or_srun_starts_just_run(folder, latents_error):
    one = {p.name: load_file(p)["latents"] for p in (folder / "one_without").glob("*.safetensors")}
    arguments = {name: ["sample", "conf=toy_lora", *settings(folder, name, {}, "without")] for name in ("run", "srun")}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, "-m", "mochi_tune.cli", *arguments["run"]], env=ENVIRONMENT, check=True)
    step = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_STEP_NODELIST": "localhost"}
    ranks = [step | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in (0, 1)]
    tasks = [Program(arguments["srun"], folder / f"task_{i}", env=env) for i, env in enumerate(ranks)]
    assert [task.wait() for task in tasks] == [0, 0], tasks[0].text()
    for name in arguments:
        made = {p.name: load_file(p)["latents"] for p in (folder / name).glob("*.safetensors")}
        assert made.keys() == one.keys()
        assert all((made[key] - one[key]).abs().max() <= latents_error for key in one)


def render_side_by_side(folder: Path, name: str) -> None:
    """Renders base and adapter as one video."""
    more = ["sample.compare=base", "sample.num_frames=13", "sample.steps=1", "sample.guidance=1"]
    given = [*settings(folder, name, {}, "with"), *more]
    with keeping_frames(sample, folder / f"frames_{name}"):
        list(sample.main(load_config("toy_lora", given)))


def test_a_comparison_by_two_processes_is_that_of_one(folder, tmp_path, decoded):
    """Both share one prompt's video, and each has the base's parts and the adapter's to give to the other."""
    (folder / "prompts.txt").write_text(PROMPTS[0])
    render_side_by_side(folder, "compared_one")
    run_ranks(2, render_side_by_side, tmp_path, folder, "compared_two")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    ours, theirs = (
        [torch.load(path, weights_only=True) for path in sorted((folder / f"frames_compared_{each}").iterdir())]
        for each in ("two", "one")
    )
    [ours], [theirs] = ours, theirs
    assert_same_frames(ours, theirs, decoded[2])
