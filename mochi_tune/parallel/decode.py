"""Decodes a clip on several ranks in parallel, in rounds of one latent frame for each rank.

Shape letters: B batch, C channels, T latent frames, F pixel frames, H W rows and columns.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mochi_tune.errors import ParallelError
from mochi_tune.models.latents import SPATIAL_FACTOR
from mochi_tune.models.vae import Decoder, UpsampleBlock
from mochi_tune.models.vae_layers import HostFrames, newest_frames
from mochi_tune.models.vae_streaming import WHOLE, Tiles, decode_tiled, frames_by_tile

# Number of past frames that a convolution sees.
HALO = 2


class HaloFrameCache:
    """At each layer, gets the two frames before this rank's part from the ranks that have them.

    Used instead of `FrameCache`. The ranks decode a clip in rounds; in each one, they decode parts that follow one
    another. The last rank keeps the last two frames of a round for the ranks that begin the next one.

    Args:
        group: the ranks.
        newest: where the last rank holds these frames.
    """

    def __init__(self, group: dist.ProcessGroup, newest: dict[nn.Module, Tensor] | HostFrames) -> None:
        self.group = group
        self.group_rank, self.last = dist.get_rank(group), dist.get_world_size(group) - 1
        self.newest = newest
        self.is_first_round = True
        self.counts: list[int] = []  # frames of each rank's part at the current layer

    def begin_round(self, counts: Sequence[int], is_first: bool) -> None:
        """Begins a round in which the ranks decode this many latent frames each; the last rank decodes some."""
        self.counts, self.is_first_round = list(counts), is_first

    def previous_frames(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Returns the two frames before the part x (B, C, n, H, W), or its first frame twice if x begins the clip."""
        frames = x.movedim(1, -1)  # (B, n, H, W, C), the order in memory
        has_newest = self.group_rank == self.last and not self.is_first_round
        newest = self.newest[layer].movedim(1, -1) if has_newest else frames
        found, operations, kept_alive = {}, [], []
        for receiver in range(len(self.counts)):
            for owner, part, first in self._halo(receiver):
                if self.group_rank not in (owner, receiver):
                    continue
                # Negative numbers are those of the previous round.
                mine = (frames if first >= 0 else newest)[:, part]
                if owner == receiver:
                    found[first] = mine
                    continue
                peer = dist.get_global_rank(self.group, receiver if self.group_rank == owner else owner)
                if self.group_rank == owner:
                    kept_alive.append(mine.contiguous())
                    operations.append(dist.P2POp(dist.isend, kept_alive[-1], peer, self.group))
                else:
                    found[first] = frames.new_empty(len(frames), part.stop - part.start, *frames.shape[2:])
                    operations.append(dist.P2POp(dist.irecv, found[first], peer, self.group))
        for request in dist.batch_isend_irecv(operations) if operations else []:
            request.wait()
        past = torch.cat([found[first] for first in sorted(found)], dim=1) if found else frames[:, :1]
        past = (past if past.shape[1] == HALO else past[:, :1].expand(-1, HALO, -1, -1, -1)).movedim(-1, 1)
        if self.group_rank == self.last:
            self.newest[layer] = newest_frames(past, x)
        return past

    def is_first_chunk(self, layer: nn.Module) -> bool:
        """Whether this rank's part begins the clip. Each upsample calls this once, which updates the parts' lengths."""
        assert isinstance(layer, UpsampleBlock), layer
        self.counts = [n * layer.temporal for n in self.counts]
        self.counts[0] -= (layer.temporal - 1) * self.is_first_round
        return self.is_first_round and self.group_rank == 0

    def _halo(self, receiver: int) -> list[tuple[int, slice, int]]:
        """Returns where the two frames before a rank's part are: (owner, slice of its frames, number of the first)."""
        if not self.counts[receiver]:
            return []
        starts = [sum(self.counts[:i]) for i in range(len(self.counts))]
        parts = list(enumerate(zip(starts, self.counts, strict=True)))
        if not self.is_first_round:
            parts.insert(0, (self.last, (-HALO, HALO)))
        found = []
        for owner, (start, count) in parts:
            first, last = max(starts[receiver] - HALO, start), min(starts[receiver], start + count)
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


def share_of(group_rank: int, num_ranks: int, num_latent_frames: int) -> list[int | None]:
    """Returns the number of the latent frame that a rank decodes in each round; None if it decodes none.

    A last round of fewer frames than ranks has those for the last ranks.
    """
    rounds = range(0, num_latent_frames, num_ranks)
    numbers = [(start, start + group_rank - max(0, start + num_ranks - num_latent_frames)) for start in rounds]
    return [number if number >= start else None for start, number in numbers]


@torch.no_grad()
def decode_rounds(
    decoder: Decoder, vae_latents: Tensor, group: dist.ProcessGroup, tiles: Tiles = WHOLE
) -> Iterator[Tensor]:
    """Decodes this rank's latent frame of each round, exactly as in one pass; peak memory is independent of T.

    Args:
        decoder: the same model on all ranks, on this rank's device.
        vae_latents: of the complete clip, (B, 12, T, h, w), the same on all ranks.
        group: the ranks; in each round, their parts in order follow one another.
        tiles: as for `decode_tiled`, the same on all ranks.

    Yields:
        Pixels (B, 3, F', H, W) on the decoder's device, not clamped, for each round; F' is 0 if it has no part.

    Raises:
        ParallelError: there are more ranks than latent frames.
    """
    num_ranks, num_latent_frames = dist.get_world_size(group), vae_latents.shape[2]
    check_decode_ranks(num_ranks, num_latent_frames)
    device = decoder.output_proj.weight.device
    caches = [HaloFrameCache(group, newest) for newest in frames_by_tile(tiles)]
    shares = [share_of(each, num_ranks, num_latent_frames) for each in range(num_ranks)]
    for number, numbers in enumerate(zip(*shares, strict=True)):
        for cache in caches:
            cache.begin_round([each is not None for each in numbers], is_first=number == 0)
        mine = numbers[dist.get_rank(group)]
        if mine is None:
            height, width = (SPATIAL_FACTOR * size for size in vae_latents.shape[3:])
            yield decoder.output_proj.weight.new_empty(len(vae_latents), 3, 0, height, width)
        else:
            yield decode_tiled(decoder, vae_latents[:, :, mine : mine + 1].to(device), tiles, caches)
