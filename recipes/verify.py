"""Compares results on this machine with saved inputs and outputs of the official implementation."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from mochi_tune import assets
from mochi_tune.adapters.files import load_adapter
from mochi_tune.adapters.lora import apply_adapter, lora_parameters
from mochi_tune.errors import CheckpointError
from mochi_tune.files import read_json
from mochi_tune.models.device import DTYPES, find_device
from mochi_tune.models.dit import AsymmDiT, DiTConfig
from mochi_tune.models.latents import TEMPORAL_FACTOR, to_latents, to_vae_latents
from mochi_tune.models.vae import (
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    FrameCache,
    fourier_features,
    frames_to_pixels,
)
from mochi_tune.models.vae_streaming import decode_tiled, encode
from mochi_tune.parallel.context import apply_context_parallel
from mochi_tune.parallel.decode import decode_rounds, share_of
from mochi_tune.parallel.forecast_context import possible_splits
from mochi_tune.parallel.mesh import Layout, Mesh, possible_layouts
from mochi_tune.sampling.render import Setup, choose_guide, prepare_dit
from mochi_tune.sampling.sampler import (
    Denoiser,
    SamplerSettings,
    euler_steps,
    linear_quadratic_sigmas,
    sample_latents,
)
from mochi_tune.training.objective import noisy_and_target, sample_posterior, velocity_loss
from mochi_tune.weights.folder import WeightsFolder
from mochi_tune.weights.paths import WeightsPaths

FILES = ("dit_io.safetensors", "vae_io.safetensors", "lora.safetensors", "schedules.json", "full_size_keys.json")
# Maximum error relative to the largest value of the reference. In fp32, independent implementations of these formulas
# differ by less, also with the kernels of other machines. In bf16 it is what 8 bits of precision allow.
TOLERANCE = {"fp32": 2e-5, "bf16": 2e-2}
# Seconds that a process waits for another.
TIMEOUT_SECONDS = 300
# The reference gradients are fp32. Gradients in bf16 are compared with them too, which reveals broken ones.
GRADIENT_TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2}


@dataclass(frozen=True)
class Check:
    """One comparison: `error` is the largest absolute difference over the largest absolute reference value."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Whether the error is within the tolerance; a NaN is not."""
        return self.error <= self.tolerance


def main(reference: Path | None, device: str, dtype: str) -> Iterator[Check]:
    """Runs all checks on a folder with the layout of the reference vectors, of any sizes; yields each result.

    Args:
        reference: folder with dit, encoder and decoder.safetensors, their configs, and FILES; None for the packaged
            vectors of the embedded tiny model.
        device: "cpu", "cuda" or "auto".
        dtype: "fp32" or "bf16".

    As one of several processes it also checks what they compute together, and reports the largest error of all.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    weights = _reference_weights(reference)
    missing = [name for name in FILES if not (weights.path / name).is_file()]
    if missing:
        raise CheckpointError(f"reference={reference} lacks {', '.join(missing)}: name the folder of the vectors.")
    weights.check(["dit", "encoder", "decoder"])
    return _checks(weights, find_device(device), dtype)


def _reference_weights(reference: Path | None) -> WeightsFolder:
    """Returns the weights of the vectors; their `path` is the folder of the vectors."""
    if reference is not None:
        return WeightsFolder(reference)
    tiny = assets.FOLDER / "tiny"
    return WeightsFolder(WeightsPaths(assets.FOLDER / "vectors", transformer=tiny / "dit.safetensors", vae=tiny))


def _checks(reference: WeightsFolder, device: torch.device, dtype: str) -> Iterator[Check]:
    yield from check_full_size(reference.path)
    yield from check_schedules(reference.path)
    yield from check_dit(reference, device, dtype)
    yield from check_sampling(reference, device, dtype)
    yield from check_rendering(reference, device, dtype, None)
    yield from check_training(reference, device, dtype)
    yield from check_encoder(reference, device, dtype)
    yield from check_decoder(reference, device, dtype)
    if dist.is_initialized():
        yield from check_processes(reference, device, dtype)


def relative_error(got: Tensor, expected: Tensor, scale: float | None = None) -> float:
    """Returns the largest absolute difference over the largest absolute reference value, or over `scale`.

    It is infinite if the shapes differ.
    """
    if got.shape != expected.shape:
        return float("inf")
    expected = expected.double()
    scale = scale or max(expected.abs().max().item(), 1e-12)
    return (got.detach().cpu().double() - expected).abs().max().item() / scale


def check_full_size(reference: Path) -> Iterator[Check]:
    """Checks the names and shapes of all tensors at full size: the error is the number of differences."""
    keys = read_json(reference / "full_size_keys.json")
    models = {"dit": (AsymmDiT, DiTConfig), "encoder": (Encoder, EncoderConfig), "decoder": (Decoder, DecoderConfig)}
    for part, (model, config) in models.items():
        with torch.device("meta"):
            ours = {name: list(tensor.shape) for name, tensor in model(config()).state_dict().items()}
        differing = [name for name in ours.keys() | keys[part].keys() if ours.get(name) != keys[part].get(name)]
        yield Check(f"full size: {part}", len(differing), 0)


def check_schedules(reference: Path) -> Iterator[Check]:
    """Checks the linear-quadratic sigma schedules."""
    for key, sigmas in read_json(reference / "schedules.json").items():
        steps, threshold, linear = key.split(",")
        ours = linear_quadratic_sigmas(int(steps), float(threshold), None if linear == "None" else int(linear))
        yield Check(f"schedule {key}", relative_error(torch.tensor(ours), torch.tensor(sigmas)), 1e-6)


def check_dit(reference: WeightsFolder, device: torch.device, dtype: str) -> Iterator[Check]:
    """Checks the forward pass of the AsymmDiT: prompt, empty prompt, batch of different prompts, many frames, bf16."""
    dit = reference.load_dit(device, DTYPES[dtype])
    io = load_file(reference.path / "dit_io.safetensors", device=str(device))
    empty = torch.zeros_like(io["y_mask"])
    inputs = {
        "out_cond": (io["z"], io["sigma"], io["y_feat"], io["y_mask"]),
        "out_null": (io["z"], io["sigma"], io["null_feat"], empty),
        "batch_out": (io["batch_z"], io["batch_sigma"], io["batch_y_feat"], io["batch_y_mask"]),
        "long_out": (io["long_z"], io["sigma"], io["y_feat"], io["y_mask"]),
    }
    with torch.no_grad():
        for name, arguments in inputs.items():
            yield Check(f"dit: {name}", relative_error(dit(*arguments), io[name].cpu()), TOLERANCE[dtype])
        half = reference.load_dit(device, torch.bfloat16)
        error = relative_error(half(*inputs["out_cond"]), io["out_cond_bf16"].cpu())
        yield Check("dit: out_cond_bf16", error, TOLERANCE["bf16"])


def check_sampling(reference: WeightsFolder, device: torch.device, dtype: str) -> Iterator[Check]:
    """Checks six Euler steps with guidance, in the space of the DiT and converted to that of the VAE."""
    dit = reference.load_dit(device, DTYPES[dtype])
    io = load_file(reference.path / "dit_io.safetensors", device=str(device))
    prompt, negative = (io["y_feat"], io["y_mask"]), (io["null_feat"], torch.zeros_like(io["y_mask"]))
    guidance = io["cfg_schedule"].tolist()
    sigmas = linear_quadratic_sigmas(len(guidance), 0.025)
    *_, latents = euler_steps(Denoiser(dit, prompt, negative), io["z"], sigmas, guidance)
    yield Check("sampling: latents", relative_error(latents, io["sample_dit"].cpu()), TOLERANCE[dtype])
    vae_latents = to_vae_latents(latents)
    yield Check("sampling: vae latents", relative_error(vae_latents, io["sample_vae"].cpu()), TOLERANCE[dtype])


def check_rendering(reference: WeightsFolder, device: torch.device, dtype: str, mesh: Mesh | None) -> Iterator[Check]:
    """Checks the same steps as `sample` runs them: with precomputed modulation, and each lossless residency."""
    io = load_file(reference.path / "dit_io.safetensors")
    guidance = io["cfg_schedule"].tolist()
    settings = SamplerSettings(len(guidance), tuple(guidance), threshold=0.025)
    prompt, negative = io["y_feat"][0, io["y_mask"][0].bool()], io["null_feat"][0, :0]
    for residency in ("resident", "offload") if mesh is None else ("resident", "offload", "shard"):
        setup = Setup(device, DTYPES[dtype], residency, mesh)
        dit = prepare_dit(reference.load_dit, {}, setup)
        *_, latents = sample_latents(dit, io["z"], prompt, negative, settings, choose_guide(setup))
        axes = "" if mesh is None else f"guidance={mesh.layout.guidance} context={mesh.layout.context}, "
        error = over_ranks(relative_error(latents, io["sample_dit"]))
        yield Check(f"rendering: {axes}{residency}", error, TOLERANCE[dtype])


def check_processes(reference: WeightsFolder, device: torch.device, dtype: str) -> Iterator[Check]:
    """Checks what several processes compute together: rendering in every layout, gradients, split decoding."""
    num_ranks, num_heads = dist.get_world_size(), reference.dit_skeleton().config.num_heads
    for layout in possible_layouts(num_ranks, is_guided=True):
        if layout.data == 1:
            heads = possible_splits(layout.context, num_heads)[-1][0]
            mesh = Mesh(replace(layout, heads=heads), device, TIMEOUT_SECONDS)
            yield from check_rendering(reference, device, dtype, mesh)
    for heads, _ in possible_splits(num_ranks, num_heads):
        mesh = Mesh(Layout(context=num_ranks, heads=heads), device, TIMEOUT_SECONDS)
        yield from check_training(reference, device, dtype, mesh)
    io = load_file(reference.path / "vae_io.safetensors")
    if num_ranks <= io["lat"].shape[2]:
        assert dist.group.WORLD is not None, "called as one of several processes"
        rounds = decode_rounds(reference.load_decoder(device, DTYPES[dtype]), io["lat"], dist.group.WORLD)
        mine, num_latent_frames = torch.cat(list(rounds), dim=2), io["lat"].shape[2]
        parts = io["decoded_raw"].split([1, *[TEMPORAL_FACTOR] * (num_latent_frames - 1)], dim=2)
        numbers = share_of(dist.get_rank(), num_ranks, num_latent_frames)
        expected = torch.cat([parts[number] for number in numbers if number is not None], dim=2)
        error = relative_error(mine, expected, io["decoded_raw"].abs().max().item())
        yield Check("decoder: split over processes", over_ranks(error), TOLERANCE[dtype])


def check_reference(reference: Path | None) -> None:
    """Refuses a folder without a model before processes are started for it.

    Raises:
        CheckpointError: as `main`.
    """
    _reference_weights(reference).check(["dit"])


def over_ranks(error: float) -> float:
    """Returns the largest error of all processes."""
    if not dist.is_initialized():
        return error
    joined = torch.tensor(error, dtype=torch.float64)
    dist.all_reduce(joined, op=dist.ReduceOp.MAX)
    return joined.item()


def check_training(
    reference: WeightsFolder, device: torch.device, dtype: str, mesh: Mesh | None = None
) -> Iterator[Check]:
    """Checks a training step with a LoRA: inputs, predictions, losses and all gradients, for two objectives."""
    io = load_file(reference.path / "dit_io.safetensors", device=str(device))
    vae_latents = sample_posterior(io["train_mean"], io["train_logvar"], io["train_posterior_noise"])
    tolerance = TOLERANCE[dtype]
    yield Check("posterior draw", relative_error(vae_latents, io["train_z"].cpu()), TOLERANCE["fp32"])
    latents = to_latents(vae_latents)
    yield Check("normalised latents", relative_error(latents, io["train_z_dit"].cpu()), TOLERANCE["fp32"])
    layers = load_adapter(reference.path / "lora.safetensors").layers
    vectors = {
        "sampler": ("train_z_dit_sigma", "lora_out_dit", "train_loss_dit", "dit_grad."),
        "official": ("train_z_sigma", "lora_out_vae_space", "train_loss_genmo", "genmo_grad."),
    }
    for objective, (noisy_key, output_key, loss_key, gradient_key) in vectors.items():
        noisy, target = noisy_and_target(objective, vae_latents, io["train_eps"], io["sigma"])
        yield Check(f"{objective} objective: input", relative_error(noisy, io[noisy_key].cpu()), TOLERANCE["fp32"])
        dit = reference.load_dit(device, DTYPES[dtype])
        apply_adapter(dit, layers, "default")
        parameters = lora_parameters(dit)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        if mesh is not None:
            apply_context_parallel(dit, mesh.context_group, mesh.layout.heads)
            objective = f"context={mesh.layout.context}{mesh.layout.split_in_words}, {objective}"
        prediction = dit(noisy, io["sigma"], io["y_feat"], io["y_mask"])
        error = over_ranks(relative_error(prediction, io[output_key].cpu()))
        yield Check(f"{objective} objective: output", error, tolerance)
        loss = velocity_loss(prediction, target)
        yield Check(f"{objective} objective: loss", over_ranks(relative_error(loss, io[loss_key].cpu())), tolerance)
        (loss.mean() / (1 if mesh is None else mesh.layout.context)).backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None, name
            if mesh is not None:
                dist.all_reduce(parameter.grad, group=mesh.context_group)
            error = over_ranks(relative_error(parameter.grad, io[gradient_key + name].cpu()))
            yield Check(f"{objective} gradient: {name}", error, GRADIENT_TOLERANCE[dtype])


@torch.no_grad()
def check_encoder(reference: WeightsFolder, device: torch.device, dtype: str) -> Iterator[Check]:
    """Checks the encoder of the VAE: Fourier features, a clip at once and in temporal chunks, a single image."""
    encoder = reference.load_encoder(device, DTYPES[dtype])
    io = load_file(reference.path / "vae_io.safetensors", device=str(device))
    pixels = frames_to_pixels(io["video"].permute(0, 2, 3, 4, 1))
    features = fourier_features(pixels[:, :, :1])
    yield Check("encoder: fourier", relative_error(features, io["fourier"].cpu()), TOLERANCE["fp32"])
    for label, (mean, logvar), prefix in (
        ("clip", encoder(pixels), ""),
        ("clip in chunks", encode(encoder, pixels), ""),
        ("image", encoder(pixels[:, :, :1]), "image_"),
    ):
        yield Check(f"encoder: {label} mean", relative_error(mean, io[f"{prefix}mean"].cpu()), TOLERANCE[dtype])
        yield Check(f"encoder: {label} logvar", relative_error(logvar, io[f"{prefix}logvar"].cpu()), TOLERANCE[dtype])


@torch.no_grad()
def check_decoder(reference: WeightsFolder, device: torch.device, dtype: str) -> Iterator[Check]:
    """Checks the decoder of the VAE: raw, raw in temporal chunks, clamped, and in spatial tiles."""
    decoder = reference.load_decoder(device, DTYPES[dtype])
    io = load_file(reference.path / "vae_io.safetensors", device=str(device))
    raw, cache = decoder(io["lat"]), FrameCache()
    yield Check("decoder: raw", relative_error(raw, io["decoded_raw"].cpu()), TOLERANCE[dtype])
    chunks = torch.cat([decoder(part, cache) for part in io["lat"].split(1, dim=2)], dim=2)
    yield Check("decoder: raw in chunks", relative_error(chunks, io["decoded_raw"].cpu()), TOLERANCE[dtype])
    # bf16 rounds in proportion to the raw values, which are larger than the clamped ones: errors are relative to those.
    scale = io["decoded_raw"].abs().max().item() / 2 if dtype == "bf16" else None
    for name, pixels in (
        ("decoded", raw),
        ("decoded_tiled_spatial", decode_tiled(decoder, io["lat"], (2, 2), overlap=4)),
    ):
        unit = ((pixels.float() + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1)
        yield Check(f"decoder: {name}", relative_error(unit, io[name].cpu(), scale), TOLERANCE[dtype])
