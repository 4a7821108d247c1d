"""Decodes a clip on several ranks in parallel; each rank decodes a range of latent frames.

Shape letters: B batch, C channels, T latent frames, F pixel frames, H W rows and columns.
"""

import math

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mochi_tune.errors import ParallelError
from mochi_tune.models.vae import Decoder, UpsampleBlock
from mochi_tune.models.vae_streaming import WHOLE, Tiles, decode_tiled
from mochi_tune.parallel.collectives import even_shares

# Number of past frames that a convolution sees.
HALO = 2


class HaloFrameCache:
    """At each layer, gets the two frames before this rank's part from the ranks that have them.

    Used instead of `FrameCache`: the parts of a clip are processed in parallel instead of one after the other.
    """

    def __init__(self, group: dist.ProcessGroup, counts: list[int]) -> None:
        self.group = group
        self.group_rank = dist.get_rank(group)
        self.counts = list(counts)  # frames of each rank's part at the current layer

    def previous_frames(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Returns the two frames before the part x (B, C, n, H, W), or its first frame twice if x begins the clip."""
        frames = x.movedim(1, -1)  # (B, n, H, W, C), the order in memory
        received, operations, kept_alive = {}, [], []
        for receiver in range(len(self.counts)):
            for owner, part, first in self._halo(receiver):
                if owner == receiver or self.group_rank not in (owner, receiver):
                    continue
                peer = dist.get_global_rank(self.group, receiver if self.group_rank == owner else owner)
                if self.group_rank == owner:
                    kept_alive.append(frames[:, part].contiguous())
                    operations.append(dist.P2POp(dist.isend, kept_alive[-1], peer, self.group))
                else:
                    received[first] = frames.new_empty(len(frames), part.stop - part.start, *frames.shape[2:])
                    operations.append(dist.P2POp(dist.irecv, received[first], peer, self.group))
        for request in dist.batch_isend_irecv(operations) if operations else []:
            request.wait()
        past = torch.cat([received[first] for first in sorted(received)], dim=1) if received else frames[:, :1]
        past = past if past.shape[1] == HALO else past[:, :1].expand(-1, HALO, -1, -1, -1)
        return past.movedim(-1, 1)

    def is_first_chunk(self, layer: nn.Module) -> bool:
        """Whether this rank's part is the first. Each upsample calls this once, which updates the parts' lengths."""
        assert isinstance(layer, UpsampleBlock), layer
        self.counts = [n * layer.temporal for n in self.counts]
        self.counts[0] -= layer.temporal - 1
        return self.group_rank == 0

    def _halo(self, receiver: int) -> list[tuple[int, slice, int]]:
        """Returns where the two frames before a rank's part are: (owner, slice of its part, number of the first)."""
        starts = [sum(self.counts[:i]) for i in range(len(self.counts))]
        wanted = range(max(0, starts[receiver] - HALO), starts[receiver])
        found = []
        for owner, (start, count) in enumerate(zip(starts, self.counts, strict=True)):
            first, last = max(wanted.start, start), min(wanted.stop, start + count)
            if first < last:
                found.append((owner, slice(first - start, last - start), first))
        return found


def check_decode_ranks(num_ranks: int, num_latent_frames: int) -> None:
    """Refuses more ranks than there are latent frames to decode.

    Raises:
        ParallelError: there are more ranks; names the maximum.
    """
    if num_ranks > num_latent_frames:
        raise ParallelError(
            f"{num_ranks} ranks cannot share the decoding of {num_latent_frames} latent frames: "
            f"use at most {num_latent_frames}, or more frames."
        )


@torch.no_grad()
def decode_share(decoder: Decoder, vae_latents: Tensor, group: dist.ProcessGroup, tiles: Tiles = WHOLE) -> Tensor:
    """Decodes this rank's part of a clip in time, exactly as in one pass over the clip.

    Args:
        decoder: the same model on all ranks, on this rank's device.
        vae_latents: of the complete clip, (B, 12, T, h, w), the same on all ranks.
        group: the ranks; their parts in order are the clip.
        tiles: as for `decode_tiled`, the same on all ranks.

    Returns:
        Pixels (B, 3, F', H, W) on the decoder's device, not clamped.

    Raises:
        ParallelError: there are more ranks than latent frames.
    """
    num_ranks = dist.get_world_size(group)
    check_decode_ranks(num_ranks, vae_latents.shape[2])
    counts = even_shares(vae_latents.shape[2], num_ranks)
    caches = [HaloFrameCache(group, counts) for _ in range(math.prod(tiles))]
    mine = vae_latents.split(counts, dim=2)[dist.get_rank(group)]
    return decode_tiled(decoder, mine.to(decoder.output_proj.weight.device), tiles, caches)
