"""A small model with an adapter whose every part matters, and a training step of it."""

from dataclasses import replace

import torch
from helpers_adapters import settings_of

from mochi_tune.adapters.lora import apply_lora, linear_shapes, lora_parameters
from mochi_tune.models.dit import AsymmDiT, DiTConfig

CONFIG = DiTConfig(depth=3, num_heads=4, hidden_size_x=64, hidden_size_y=32, t5_feat_dim=16)


def build(dropout: float = 0.0, layers: str = "", depth: int = 3) -> AsymmDiT:
    torch.manual_seed(0)
    dit = AsymmDiT(replace(CONFIG, depth=depth))
    adapt(dit, dropout, layers)
    return dit.train()


def adapt(dit: AsymmDiT, dropout: float = 0.0, layers: str = "") -> None:
    apply_lora(dit, settings_of([name for name in linear_shapes(dit) if layers in name], 3, 6, dropout), seed=1)
    for i, parameter in enumerate(lora_parameters(dit).values()):
        parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)) * 0.1
        parameter.requires_grad_(True)


def step(dit: AsymmDiT, num_latent_frames: int = 2, text_length: int = 5, lengths=None) -> list[torch.Tensor]:
    """Returns the velocity of a step and the gradient of every adapter parameter."""
    generator, rows = torch.Generator().manual_seed(1), len(lengths or [0])
    latents = torch.randn(rows, 12, num_latent_frames, 4, 6, generator=generator)
    embeds = torch.randn(rows, text_length, 16, generator=generator)
    mask = torch.arange(text_length) < torch.tensor(lengths or [text_length])[:, None]
    torch.manual_seed(2)
    velocity = dit(latents, torch.full((rows,), 0.3), embeds, mask)
    return [velocity.detach(), *torch.autograd.grad(velocity.square().mean(), list(lora_parameters(dit).values()))]
