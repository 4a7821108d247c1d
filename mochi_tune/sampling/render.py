"""Rendering on one device or many, in little memory: what `sample` and `bench` have in common."""

from collections.abc import Callable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from mochi_tune.adapters.layers import LoraLayer
from mochi_tune.adapters.lora import apply_adapter
from mochi_tune.models.dit import AsymmDiT
from mochi_tune.models.latents import to_vae_latents
from mochi_tune.models.vae import Decoder, pixels_to_frames
from mochi_tune.models.vae_streaming import WHOLE, Tiles, decode_chunks
from mochi_tune.parallel.context import apply_context_parallel
from mochi_tune.parallel.decode import decode_share
from mochi_tune.parallel.memory import (
    DIT_PLACES,
    PRECISIONS,
    apply_block_offload,
    fold_modulation,
    known_conditions,
    quantize_block,
    shard_block,
    tabulate_modulation,
)
from mochi_tune.parallel.mesh import Mesh
from mochi_tune.sampling.sampler import (
    Guide,
    Prompt,
    SamplerSettings,
    euler_steps,
    guide_in_one_batch,
    guide_in_turn,
    guided,
)


def prepare_dit(
    load: Callable[..., AsymmDiT],
    device: torch.device,
    dtype: torch.dtype,
    place: str,
    adapters: Mapping[str, tuple[dict[str, LoraLayer], float]],
    mesh: Mesh | None,
    is_compiled: bool = False,
) -> AsymmDiT:
    """Loads the DiT for rendering; each block is made small and gets its adapters as soon as it is read.

    Args:
        load: `WeightsFolder.load_dit`, or `build_random_model` of a configuration; called
            with device, dtype and `each_block`.
        device: where it computes.
        dtype: of the matrices.
        place: one of DIT_PLACES.
        adapters: layers by their names, and the strength, by a name for each adapter.
        mesh: of the ranks; None for one process.
        is_compiled: whether the blocks' arithmetic between matrix products is fused.
    """
    assert place in DIT_PLACES, place

    def prepare_block(dit: AsymmDiT, block: nn.Module) -> None:
        fold_modulation(block, device)
        if place in PRECISIONS:
            quantize_block(block, place)
        prefix = f"blocks.{list(dit.blocks).index(block)}."
        for name, (layers, strength) in adapters.items():
            if own := {layer: change for layer, change in layers.items() if layer.startswith(prefix)}:
                apply_adapter(dit, own, name, strength)
        if place == "shard" and mesh is not None:
            shard_block(block, mesh.video_mesh)

    dit = load("cpu" if place == "offload" else device, dtype, each_block=prepare_block)
    if place == "offload":
        apply_block_offload(dit, device)
    if mesh is not None and mesh.layout.context > 1:
        apply_context_parallel(dit, mesh.context_group)
    if is_compiled:
        apply_compilation(dit)
    return dit


def apply_compilation(dit: AsymmDiT) -> None:
    """Compiles the blocks, one program for all of them, for any number of tokens; attention's core stays as it is.

    The first step takes a minute more; after it, norms, gates and rotations read and write memory once each.
    """
    for block in dit.blocks:
        block.attn.core.forward = torch.compiler.disable(block.attn.core.forward)
        block.forward = torch.compile(block.forward, dynamic=True)


def latent_states(
    dit: AsymmDiT,
    noise: Tensor,
    prompt: Tensor,
    negative_prompt: Tensor,
    settings: SamplerSettings,
    guide: Guide,
) -> Iterator[Tensor]:
    """Walks from noise to latents, yielding the state after each step, fp32 (1, C, T, h, w).

    Args:
        dit: from `prepare_dit`.
        noise: (1, C, T, h, w).
        prompt: features of the prompt's valid tokens, (n, D).
        negative_prompt: the same of the negative prompt; none (0, D) for the empty one.
        settings: steps, schedule and guidance.
        guide: from `choose_guide`.
    """
    device = dit.pos_frequencies.device
    told, untold = (_as_batch(features, device) for features in (prompt, negative_prompt))
    tabulate_modulation(dit, known_conditions(dit, settings.sigmas[:-1], [told, untold]))
    return euler_steps(dit, noise.to(device), told, untold, settings.sigmas, settings.scales, guide)


# cuDNN's attention is the fastest on Hopper; it is left out in training only, where its gradients have been wrong.
ATTENTION_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


# On fewer tokens than these a pass is over before the next one's weights have come over PCIe.
ONE_BATCH_TOKENS = 16000


def choose_guide(place: str, mesh: Mesh | None) -> Guide:
    """Returns how both prompts are evaluated: on two ranks, or in one batch where weights travel, or in turn."""
    guide: Guide = guide_in_turn
    if mesh is not None and mesh.layout.guidance > 1:
        guide = SplitGuidance(mesh.guidance_group)
    elif place == "offload":
        guide = _guide_in_one_batch_if_short

    def with_the_fastest_attention(*arguments) -> Tensor:
        with sdpa_kernel(ATTENTION_KERNELS, set_priority=True):
            return guide(*arguments)

    return with_the_fastest_attention


def _guide_in_one_batch_if_short(dit: nn.Module, z: Tensor, *arguments) -> Tensor:
    is_short = z[0, 0].numel() // dit.config.patch_size**2 < ONE_BATCH_TOKENS
    return (guide_in_one_batch if is_short else guide_in_turn)(dit, z, *arguments)


class SplitGuidance:
    """A `sampler.Guide`: one rank of a group of two evaluates the prompt, the other one the negative prompt."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(
        self, dit: nn.Module, z: Tensor, sigma: Tensor, prompt: Prompt, negative_prompt: Prompt, scale: float
    ) -> Tensor:
        """Returns the guided velocity, the same on both ranks; at scale 1 both evaluate the prompt."""
        if scale == 1:
            return dit(z, sigma, *prompt).float()
        mine = dit(z, sigma, *(prompt, negative_prompt)[dist.get_rank(self.group)]).float().contiguous()
        both = [torch.empty_like(mine) for _ in range(2)]
        dist.all_gather(both, mine, group=self.group)
        return guided(*both, scale)


def decoded_frames(decoder: Decoder, latents: Tensor, mesh: Mesh | None, tiles: Tiles = WHOLE) -> Iterator[Tensor]:
    """Decodes one video, yielding uint8 frames (F', H, W, 3) in order on the rank that writes it, none on the others.

    Ranks that make a video together share its time; one alone, or more than latent frames, decodes chunk by chunk.

    Args:
        decoder: on this rank's device.
        latents: DiT space, (1, 12, T, h, w), the same on all ranks of the video.
        mesh: of the ranks; None for one process.
        tiles: spatial ones that are decoded one by one; only WHOLE is exact.
    """
    vae_latents = to_vae_latents(latents)
    if mesh is None or not 1 < dist.get_world_size(mesh.video_group) <= latents.shape[2]:
        if mesh is None or mesh.is_writer:
            yield from (chunk[0] for chunk in decode_chunks(decoder, vae_latents, tiles=tiles))
        return
    share = decode_share(decoder, vae_latents, mesh.video_group, tiles)
    yield from mesh.gather_parts(pixels_to_frames(share)[0].cpu())


def _as_batch(features: Tensor, device: torch.device) -> Prompt:
    return features[None].to(device), torch.ones(1, features.shape[0], dtype=torch.bool)
