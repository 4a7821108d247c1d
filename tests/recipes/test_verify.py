import json
import shutil

import torch
from helpers_golden import GOLDEN
from helpers_process import run, run_in_two
from safetensors.torch import load_file, save_file

from mochi_tune import assets
from mochi_tune.recipes.verify import GRADIENT_TOLERANCE, TOLERANCE, main
from mochi_tune.toy.make_vectors import main as make_vectors

VECTORS = assets.FOLDER / "vectors"

# What a folder of vectors is held against, one word of each kind of check.
KINDS = (
    "full size: dit", "full size: encoder", "full size: decoder", "schedule 64", "dit: out_cond", "dit: out_null",
    "dit: batch_out", "dit: long_out", "dit: out_cond_bf16", "sampling: latents", "sampling: vae latents",
    "posterior draw", "normalised latents", "sampler objective: loss", "official objective: loss",
    "sampler gradient: blocks.0.attn.qkv_x.lora_A", "official gradient: blocks.1.attn.proj_x.lora_B",
    "encoder: fourier", "encoder: clip mean", "encoder: clip in chunks logvar", "encoder: image mean",
    "rendering: resident", "rendering: offload",
    "decoder: raw", "decoder: raw in chunks", "decoder: decoded", "decoder: decoded_tiled_spatial",
)  # fmt: skip


def test_every_vector_is_checked_and_ok():
    done = run("verify", f"reference={GOLDEN}")
    assert done.returncode == 0, done.stdout
    for kind in KINDS:
        assert kind in done.stdout
    assert "FAIL" not in done.stdout and done.stdout.endswith("every check is ok\n")
    # The 28 gradients: 2 objectives x 7 layers x 2 halves.
    assert done.stdout.count(" gradient: ") == 28


def test_without_a_folder_the_packaged_vectors_are_checked():
    checks = list(main(None, "cpu", "fp32"))
    assert [check.name for check in checks if not check.ok] == []
    assert {kind for kind in KINDS if not any(check.name.startswith(kind) for check in checks)} == set()
    assert sum(path.stat().st_size for path in VECTORS.iterdir()) < 2e6


def test_the_packaged_vectors_are_what_their_recipe_makes(tmp_path):
    make_vectors(GOLDEN, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in VECTORS.iterdir()}
    for name in ("lora.safetensors", "schedules.json", "full_size_keys.json"):
        assert (tmp_path / name).read_bytes() == (VECTORS / name).read_bytes()
    for name in ("dit_io", "vae_io"):
        made, packaged = (load_file(folder / f"{name}.safetensors") for folder in (tmp_path, VECTORS))
        assert made.keys() == packaged.keys()
        for key, tensor in packaged.items():
            # Computed in fp64 of numbers that other machines draw alike to a few roundings of fp32.
            rounding = TOLERANCE["bf16" if tensor.dtype == torch.bfloat16 else "fp32"]
            assert (made[key].double() - tensor.double()).abs().max() <= rounding * tensor.double().abs().max(), key


def test_several_processes_check_every_layout_too():
    done = run_in_two("verify", f"reference={GOLDEN}", "parallel.num_processes=2")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("guidance=1 context=2, resident", "guidance=1 context=2, shard", "guidance=2 context=1, offload",
                 "context=2, 1 heads x 2 ring, official objective: output",
                 "context=2, 2 heads x 1 ring, official objective: output",
                 "decoder: split over processes"):  # fmt: skip
        assert name in done.stdout
    assert done.stdout.count(" gradient: ") == 84 and done.stdout.count("every check is ok") == 1
    done = run("verify", "reference=nowhere", "parallel.num_processes=5")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr


def test_bf16_is_ok_too():
    assert [check.name for check in main(GOLDEN, "cpu", "bf16") if not check.ok] == []


def test_the_tolerances_are_those_that_are_promised():
    assert TOLERANCE == {"fp32": 2e-5, "bf16": 2e-2} and GRADIENT_TOLERANCE["fp32"] == 1e-4


WRONG = {
    ("dit_io", "out_null"): "dit: out_null",
    ("dit_io", "sample_dit"): "sampling: latents",
    ("dit_io", "genmo_grad.blocks.1.attn.qkv_y.lora_B"): "official gradient: blocks.1.attn.qkv_y.lora_B",
    ("vae_io", "image_logvar"): "encoder: image logvar",
    ("vae_io", "decoded_tiled_spatial"): "decoder: decoded_tiled_spatial",
}


def test_wrong_numbers_and_nans_fail_their_checks_and_no_other_and_exit_with_1(tmp_path):
    """Each is off by a few times the tolerance, so that a looser one would let it pass."""
    folder = tmp_path / "reference"
    shutil.copytree(GOLDEN, folder)
    for (file, key), check in WRONG.items():
        tensors = load_file(folder / f"{file}.safetensors")
        flat = tensors[key].view(-1)
        flat[flat.numel() // 2] += (5e-4 if "gradient" in check else 1e-4) * flat.abs().max()
        save_file(tensors, folder / f"{file}.safetensors")
    tensors = load_file(folder / "dit_io.safetensors")
    tensors["out_cond"][0, 0, 0, 0, 0] = torch.nan
    save_file(tensors, folder / "dit_io.safetensors")
    schedules = json.loads((folder / "schedules.json").read_text())
    schedules["8,0.1,6"][3] += 1e-3
    (folder / "schedules.json").write_text(json.dumps(schedules))
    done = run("verify", f"reference={folder}")
    failed = [line for line in done.stdout.splitlines() if line.endswith("FAIL")]
    # The sampled latents are what every way of rendering is held against.
    expected = {*WRONG.values(), "rendering: resident", "rendering: offload", "schedule 8,0.1,6", "dit: out_cond"}
    found = {name for name in expected for line in failed if line.startswith(f"{name} ")}
    assert done.returncode == 1 and found == expected and len(failed) == len(expected), failed
    assert f"{len(expected)} checks FAILED" in done.stdout
