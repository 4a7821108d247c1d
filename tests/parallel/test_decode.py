"""Several ranks, each decoding one latent frame in a round, give the same clip as one, in the memory of a round."""

import pytest
import torch
import torch.distributed as dist
from helpers_golden import TOLERANCE, golden_decoder
from helpers_memory import TensorMemory
from helpers_parallel import run_ranks

from mochi_tune.errors import ParallelError
from mochi_tune.models.vae_streaming import decode_tiled
from mochi_tune.parallel.decode import check_decode_ranks, decode_rounds, share_of

# Latent frames: one for each of four ranks; rounds that not all ranks have a part of.
LENGTHS = (4, 5, 7)
# Two spatial tiles, each of which is normed by itself.
TILES = (1, 2)


def latents(num_latent_frames: int) -> torch.Tensor:
    return torch.randn(2, 12, num_latent_frames, 4, 6, generator=torch.Generator().manual_seed(num_latent_frames))


def tiled_latents() -> torch.Tensor:
    return torch.randn(1, 12, 7, 4, 16, generator=torch.Generator().manual_seed(1))


def in_a_rank():
    """Returns the parts of each clip by round, and the peak bytes of decoding 8 and 24 latent frames."""
    decoder, group, peaks = golden_decoder(), dist.group.WORLD, []
    for n in (8, 24):
        with TensorMemory() as memory:
            for part in decode_rounds(decoder, latents(n), group):
                del part
        peaks.append(memory.peak)
    rounds = [list(decode_rounds(decoder, latents(n), group)) for n in LENGTHS]
    return rounds, list(decode_rounds(decoder, tiled_latents(), group, TILES)), peaks


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
@torch.no_grad()
def test_the_parts_of_the_ranks_are_the_whole(num_ranks, tmp_path):
    def joined(parts):
        """The parts of all ranks in the order of the clip."""
        return torch.cat([part for of_round in zip(*parts, strict=True) for part in of_round], dim=2)

    decoder = golden_decoder()
    untiled, tiled, peaks = zip(*run_ranks(num_ranks, in_a_rank, tmp_path), strict=True)
    pairs = [(joined(parts), decoder(latents(n))) for n, parts in zip(LENGTHS, zip(*untiled, strict=True), strict=True)]
    for ours, whole in [*pairs, (joined(tiled), decode_tiled(decoder, tiled_latents(), TILES))]:
        assert ours.shape == whole.shape
        assert (ours - whole).abs().max() <= TOLERANCE * whole.abs().max()
    assert all(long < 1.05 * short for short, long in peaks), peaks


def test_every_latent_frame_is_in_one_share():
    assert [share_of(rank, 3, 7) for rank in range(3)] == [[0, 3, None], [1, 4, None], [2, 5, 6]]
    assert [share_of(rank, 2, 4) for rank in range(2)] == [[0, 2], [1, 3]]


def test_more_ranks_than_latent_frames_are_refused():
    check_decode_ranks(7, 7)
    with pytest.raises(ParallelError, match=r"8 ranks cannot share the decoding of 7 latent frames: use at most 7"):
        check_decode_ranks(8, 7)
