"""Renders captions with the toy model in batches, and measures what the clips show."""

import math
from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from mochi_tune.models.latents import to_vae_latents
from mochi_tune.models.text_encoder import TextEncoder
from mochi_tune.models.vae import Decoder, Encoder, frames_to_pixels, pixels_to_frames
from mochi_tune.sampling.sampler import Denoiser, SamplerSettings, draw_noise, euler_steps
from mochi_tune.toy.measure import see
from mochi_tune.toy.world import HEIGHT, NEW_WORD, NUM_FRAMES, WIDTH, Words
from mochi_tune.training.draws import key_seed

BATCH = 25


def render_words(
    words: Sequence[Words],
    dit: nn.Module,
    text_encoder: TextEncoder,
    decoder: Decoder,
    settings: SamplerSettings,
    seed: int,
) -> Tensor:
    """Renders one clip for each of `words`, uint8 frames (B, F, H, W, 3). The noise of clip i depends on seed and i."""
    parts = render_batches(words, dit, text_encoder, decoder, settings, seed)
    return torch.cat(list(tqdm(parts, "render", num_batches(len(words)), leave=False, unit="batch")))


def num_batches(num_words: int) -> int:
    """Returns the number of batches that `render_batches` yields."""
    return math.ceil(num_words / BATCH)


@torch.no_grad()
def render_batches(
    words: Sequence[Words],
    dit: nn.Module,
    text_encoder: TextEncoder,
    decoder: Decoder,
    settings: SamplerSettings,
    seed: int,
) -> Iterator[Tensor]:
    """Yields the clips of `render_words` batch by batch."""
    features = text_encoder.encode([w.caption for w in words])
    training = dit.training
    dit.eval()
    for i in range(0, len(words), BATCH):
        group = features[i : i + BATCH]
        embeds = nn.utils.rnn.pad_sequence(group, batch_first=True)
        mask = torch.arange(embeds.shape[1]) < torch.tensor([len(f) for f in group])[:, None]
        noise = torch.cat(
            [draw_noise(key_seed(seed, "toy", i + j), NUM_FRAMES, HEIGHT, WIDTH) for j in range(len(group))]
        ).to(embeds.device)
        nothing = (torch.zeros_like(embeds), torch.zeros_like(mask))
        [latents] = deque(
            euler_steps(Denoiser(dit, (embeds, mask), nothing), noise, settings.sigmas, settings.scales), maxlen=1
        )
        yield pixels_to_frames(decoder(to_vae_latents(latents))).cpu()
    dit.train(training)


@torch.no_grad()
def reconstruct(frames: Tensor, encoder: Encoder, decoder: Decoder) -> tuple[Tensor, list[float]]:
    """Encodes and decodes clips, uint8 (B, F, H, W, 3). Returns the decoded clips and their PSNRs in dB."""
    decoded = pixels_to_frames(decoder(encoder(frames_to_pixels(frames))[0]))
    errors = ((decoded.float() - frames.float()) / 255).square().mean((1, 2, 3, 4))
    return decoded, [-10 * math.log10(error) for error in errors.tolist()]


def share_shown(frames: Tensor, words: Sequence[Words]) -> float:
    """Returns the share of clips with the colour, the shape and the motion of their words."""
    return sum(see(clip).shows(w) for clip, w in zip(frames, words, strict=True)) / len(words)


def share_new(frames: Tensor) -> float:
    """Returns the share of clips that show the new motion."""
    return sum(see(clip).motion == NEW_WORD for clip in frames) / len(frames)
