"""Rendering on one or more devices, in little memory; shared by `sample`, `bench` and `verify`."""

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from mochi_tune.adapters.layers import LoraLayer, block_of
from mochi_tune.adapters.lora import apply_adapter
from mochi_tune.adapters.scaling import AdapterScaling
from mochi_tune.models.dit import AsymmDiT, AsymmetricJointBlock
from mochi_tune.models.latents import to_vae_latents
from mochi_tune.models.vae import Decoder, pixels_to_frames
from mochi_tune.models.vae_streaming import WHOLE, Tiles, decode_chunks
from mochi_tune.parallel.compilation import apply_compilation
from mochi_tune.parallel.context import apply_context_parallel
from mochi_tune.parallel.decode import decode_rounds
from mochi_tune.parallel.forecast_sampling import MAX_ONE_BATCH_TOKENS
from mochi_tune.parallel.memory import (
    PRECISIONS,
    RESIDENCIES,
    apply_block_offload,
    apply_quantization,
    apply_sharding,
)
from mochi_tune.parallel.mesh import Mesh
from mochi_tune.parallel.modulation import apply_host_modulation
from mochi_tune.sampling.sampler import (
    Denoiser,
    Guide,
    SamplerSettings,
    guide_in_one_batch,
    guide_in_turn,
    guided,
)

# Attention kernels in the order of preference: cuDNN's is the fastest on Hopper.
ATTENTION_KERNELS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@dataclass(frozen=True)
class Setup:
    """How a process renders.

    Attributes:
        device: the device that computes.
        dtype: dtype of the DiT's matrices.
        residency: where the DiT's weights are, one of RESIDENCIES.
        mesh: the mesh of the processes; None for one process.
        is_compiled: whether the blocks are compiled.
    """

    device: torch.device
    dtype: torch.dtype
    residency: str = "resident"
    mesh: Mesh | None = None
    is_compiled: bool = False

    def __post_init__(self) -> None:
        assert self.residency in RESIDENCIES, self.residency


def prepare_dit(
    load: Callable[..., AsymmDiT],
    adapters: Mapping[str, tuple[dict[str, LoraLayer], float, Mapping[int, float]]],
    setup: Setup,
    read_fp8: Callable[[str], tuple[Tensor, Tensor] | None] = lambda _: None,
) -> AsymmDiT:
    """Loads the DiT for rendering. Each block is quantized or sharded, and gets its adapters, as soon as it is read.

    Args:
        load: `WeightsFolder.load_dit`, or `build_random_model` with a configuration; called with a device, a dtype and
            `each_block`.
        adapters: for each adapter, by a unique name: its layers, its strength, and additional factors by the number of
            the block; blocks that are not listed have 1.
        setup: the setup of this process.
        read_fp8: `WeightsFolder.read_fp8` of the base.
    """
    device, residency, mesh = setup.device, setup.residency, setup.mesh

    def prepare_block(dit: AsymmDiT, block: nn.Module) -> None:
        assert isinstance(block, AsymmetricJointBlock)
        prefix = f"blocks.{list(dit.blocks).index(block)}."
        # Modulation layers get their adapters before they move to host memory, where they are no Linear for peft to
        # wrap. The other layers get them after quantization, because peft wraps 8-bit layers.
        _apply_adapters(dit, adapters, lambda layer: layer.startswith(f"{prefix}mod_"))
        apply_host_modulation(block)
        if residency in PRECISIONS:
            apply_quantization(block, residency, lambda name: read_fp8(f"{prefix}{name}"))
        _apply_adapters(dit, adapters, lambda layer: layer.startswith((f"{prefix}attn.", f"{prefix}mlp_")))
        if residency == "shard" and mesh is not None:
            apply_sharding(block, mesh.video_mesh)

    dit = load("cpu" if residency == "offload" else device, setup.dtype, each_block=prepare_block)
    _apply_adapters(dit, adapters, lambda layer: not layer.startswith("blocks."))
    if residency == "offload":
        apply_block_offload(dit, device)
    if mesh is not None and mesh.layout.context > 1:
        apply_context_parallel(dit, mesh.context_group, mesh.layout.heads, mesh.checks_inputs)
    if setup.is_compiled:
        # Results of `bench` are on stdout.
        apply_compilation(dit, functools.partial(tqdm.write, file=sys.stderr))
    return dit


def _apply_adapters(
    dit: AsymmDiT,
    adapters: Mapping[str, tuple[dict[str, LoraLayer], float, Mapping[int, float]]],
    is_wanted: Callable[[str], bool],
) -> None:
    """Applies the layers of each adapter for whose names `is_wanted` is true."""
    for name, (layers, strength, by_block) in adapters.items():
        for block, wanted in itertools.groupby(filter(is_wanted, sorted(layers, key=block_of)), block_of):
            own = {layer: layers[layer] for layer in wanted}
            apply_adapter(dit, own, name, strength * by_block.get(block, 1.0))


def choose_guide(setup: Setup) -> Guide:
    """Returns the guide of a setup: two processes, one batch for short videos with offloaded weights, or in turn."""
    guide: Guide = guide_in_turn
    if setup.mesh is not None and setup.mesh.layout.guidance > 1:
        guide = SplitGuidance(setup.mesh.guidance_group)
    elif setup.residency == "offload":
        guide = _guide_in_one_batch_if_short

    def guide_with_fastest_attention(denoiser: Denoiser, latents: Tensor, sigma: float, scale: float) -> Tensor:
        with sdpa_kernel(ATTENTION_KERNELS, set_priority=True):
            return guide(denoiser, latents, sigma, scale)

    return guide_with_fastest_attention


def follow_schedules(
    guide: Guide, scaling: AdapterScaling, settings: SamplerSettings, schedules: Mapping[str, Sequence[float]]
) -> Guide:
    """Returns a guide that sets the strengths of the adapters before each step.

    Args:
        guide: computes the step.
        scaling: sets the strengths of the model's adapters.
        settings: settings of the sampler.
        schedules: for each adapter, by name, the factors that `settings.spread` spreads over the steps.
    """
    by_step = {name: settings.spread(values) for name, values in schedules.items()}
    # Each step begins at a different noise level.
    by_sigma = {sigma: {n: v[i] for n, v in by_step.items()} for i, sigma in enumerate(settings.sigmas[:-1])}

    def guide_with_strengths(denoiser: Denoiser, latents: Tensor, sigma: float, scale: float) -> Tensor:
        scaling.set(by_sigma[sigma])
        return guide(denoiser, latents, sigma, scale)

    return guide_with_strengths


def _guide_in_one_batch_if_short(denoiser: Denoiser, latents: Tensor, sigma: float, scale: float) -> Tensor:
    # A token has four latents of each channel.
    is_short = latents[0, 0].numel() < 4 * MAX_ONE_BATCH_TOKENS
    guide = guide_in_one_batch if is_short else guide_in_turn
    return guide(denoiser, latents, sigma, scale)


class SplitGuidance:
    """A `sampler.Guide` for two processes: one evaluates the prompt, the other the negative prompt."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, denoiser: Denoiser, latents: Tensor, sigma: float, scale: float) -> Tensor:
        """Returns the guided velocity, the same on both processes; at scale 1 both evaluate the prompt."""
        if scale == 1:
            return denoiser(latents, sigma, ["cond"])
        mine = denoiser(latents, sigma, [("cond", "uncond")[dist.get_rank(self.group)]]).contiguous()
        cond, uncond = torch.empty_like(mine), torch.empty_like(mine)
        dist.all_gather([cond, uncond], mine, group=self.group)
        return guided(cond, uncond, scale)


def decoded_frames(decoder: Decoder, latents: Tensor, mesh: Mesh | None, tiles: Tiles = WHOLE) -> Iterator[Tensor]:
    """Decodes one video; yields uint8 frames (F', H, W, 3) in order in the process that writes it, else nothing.

    The processes of a video decode it in rounds of one latent frame each. If there is one process, or if there are
    more processes than latent frames, one process decodes chunk by chunk.

    Args:
        decoder: the decoder on this process's device.
        latents: DiT space, (1, 12, T, h, w), equal in all processes of the video.
        mesh: the mesh of the processes; None for one process.
        tiles: number of spatial tiles, as for `decode_tiled`; only WHOLE is exact.
    """
    vae_latents = to_vae_latents(latents)
    if mesh is None or not 1 < dist.get_world_size(mesh.video_group) <= latents.shape[2]:
        if mesh is None or mesh.is_writer:
            yield from (chunk[0] for chunk in decode_chunks(decoder, vae_latents, tiles=tiles))
        return
    for part in decode_rounds(decoder, vae_latents, mesh.video_group, tiles):
        yield from mesh.gather_parts(pixels_to_frames(part)[0].cpu())
