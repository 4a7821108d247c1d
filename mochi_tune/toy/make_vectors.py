"""Makes the reference vectors of `verify`: outputs of the embedded tiny model in fp64.

`python -m mochi_tune.toy.make_vectors tests/golden mochi_tune/assets/vectors` writes them. The adapter, the schedules
and the parameter names at full size are copied from the first folder, and come from the official implementation. This
program computes the rest; the tests compare it with the official vectors.
"""

import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mochi_tune import assets
from mochi_tune.adapters.files import load_adapter
from mochi_tune.adapters.lora import apply_adapter, lora_parameters
from mochi_tune.models.latents import to_latents, to_vae_latents
from mochi_tune.models.vae import fourier_features, frames_to_pixels
from mochi_tune.models.vae_streaming import decode_tiled
from mochi_tune.sampling.sampler import Denoiser, euler_steps, linear_quadratic_sigmas
from mochi_tune.training.objective import noisy_and_target, sample_posterior, velocity_loss
from mochi_tune.weights.folder import WeightsFolder

OFFICIAL = ("lora.safetensors", "schedules.json", "full_size_keys.json")
LATENTS, GUIDANCE, NUM_TOKENS, FEATURES = (1, 12, 2, 4, 6), (4.0, 3.0, 1.0), 32, 64


def main(official: Path, out: Path) -> None:
    """Writes the vectors to `out`; `official` contains the files OFFICIAL."""
    out.mkdir(parents=True, exist_ok=True)
    for name in OFFICIAL:
        shutil.copyfile(official / name, out / name)
    tiny = WeightsFolder(assets.FOLDER / "tiny")
    save_file(_dit_vectors(tiny, out / "lora.safetensors"), out / "dit_io.safetensors")
    save_file(_vae_vectors(tiny), out / "vae_io.safetensors")


def _dit_vectors(tiny: WeightsFolder, lora: Path) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        # fp32 numbers are exact in fp64.
        return torch.randn(shape, generator=generator).double()

    mask = torch.ones(1, NUM_TOKENS, dtype=torch.uint8)
    mask[:, 20:] = 0
    short = mask.clone()
    short[:, 5:] = 0
    io = {
        "z": draw(*LATENTS),
        "sigma": torch.tensor([0.7]).double(),
        "y_feat": draw(1, NUM_TOKENS, FEATURES),
        "y_mask": mask,
        "null_feat": torch.zeros(1, NUM_TOKENS, FEATURES).double(),
        "batch_z": draw(2, *LATENTS[1:]),
        "batch_sigma": torch.tensor([0.3, 0.9]).double(),
        "batch_y_feat": draw(2, NUM_TOKENS, FEATURES),
        "batch_y_mask": torch.cat([mask, short]),
        "long_z": draw(1, 12, 28, 4, 6),
        "cfg_schedule": torch.tensor(GUIDANCE).double(),
    }
    io |= {f"train_{name}": draw(*LATENTS) for name in ("mean", "posterior_noise", "eps")}
    io["train_logvar"] = draw(*LATENTS) - 2
    dit, empty = tiny.load_dit("cpu", torch.float32).double(), torch.zeros_like(mask)
    with torch.no_grad():
        io["out_cond"] = dit(io["z"], io["sigma"], io["y_feat"], mask)
        io["out_null"] = dit(io["z"], io["sigma"], io["null_feat"], empty)
        io["batch_out"] = dit(io["batch_z"], io["batch_sigma"], io["batch_y_feat"], io["batch_y_mask"])
        io["long_out"] = dit(io["long_z"], io["sigma"], io["y_feat"], mask)
        io["out_cond_bf16"] = io["out_cond"].bfloat16()
        denoiser = Denoiser(dit, (io["y_feat"], mask), (io["null_feat"], empty))
        sigmas = linear_quadratic_sigmas(len(GUIDANCE), 0.025)
        *_, io["sample_dit"] = euler_steps(denoiser, io["z"], sigmas, list(GUIDANCE))
        io["sample_vae"] = to_vae_latents(io["sample_dit"])
    io["train_z"] = sample_posterior(io["train_mean"], io["train_logvar"], io["train_posterior_noise"])
    io["train_z_dit"] = to_latents(io["train_z"])
    for objective, noisy_key, output_key, loss_key, gradient_key in (
        ("sampler", "train_z_dit_sigma", "lora_out_dit", "train_loss_dit", "dit_grad."),
        ("official", "train_z_sigma", "lora_out_vae_space", "train_loss_genmo", "genmo_grad."),
    ):
        adapted = tiny.load_dit("cpu", torch.float32)
        apply_adapter(adapted, load_adapter(lora).layers, "default")
        adapted.double()
        parameters = lora_parameters(adapted)
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        io[noisy_key], target = noisy_and_target(objective, io["train_z"], io["train_eps"], io["sigma"])
        io[output_key] = adapted(io[noisy_key], io["sigma"], io["y_feat"], mask)
        io[loss_key] = velocity_loss(io[output_key], target)
        io[loss_key].mean().backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None, name
            io[gradient_key + name] = parameter.grad
    return {name: _stored(tensor) for name, tensor in io.items()}


@torch.no_grad()
def _vae_vectors(tiny: WeightsFolder) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    # Smooth like pictures.
    coarse = torch.rand(1, 3, 3, 4, 6, generator=generator)
    video = torch.nn.functional.interpolate(coarse, (13, 32, 48), mode="trilinear").mul(255).round().to(torch.uint8)
    encoder = tiny.load_encoder("cpu", torch.float32).double()
    decoder = tiny.load_decoder("cpu", torch.float32).double()
    # The Fourier features are computed in fp32 by definition.
    pixels = frames_to_pixels(video.permute(0, 2, 3, 4, 1))
    io = {"video": video, "fourier": fourier_features(pixels[:, :, :1])}
    io["mean"], io["logvar"] = encoder(pixels)
    io["image_mean"], io["image_logvar"] = encoder(pixels[:, :, :1])
    io["lat"] = torch.randn(1, 12, 2, 6, 8, generator=generator).double()
    io["decoded_raw"] = decoder(io["lat"])
    tiled = decode_tiled(decoder, io["lat"], (2, 2), overlap=4)
    for name, decoded in (("decoded", io["decoded_raw"]), ("decoded_tiled_spatial", tiled)):
        io[name] = ((decoded + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1)
    return {name: _stored(tensor) for name, tensor in io.items()}


def _stored(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().contiguous()
    return tensor.float() if tensor.dtype == torch.float64 else tensor


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
