"""Several ranks, each decoding a part of the clip in time, give the same clip as one."""

import pytest
import torch
import torch.distributed as dist
from helpers_golden import TOLERANCE, golden_decoder
from helpers_parallel import run_ranks

from mochi_tune.errors import ParallelError
from mochi_tune.parallel.decode import check_decode_ranks, decode_share

# Latent frames: one for each rank; one rank with one and others with two; an odd number.
LENGTHS = (4, 5, 7)


def latents(num_latent_frames: int) -> torch.Tensor:
    return torch.randn(2, 12, num_latent_frames, 4, 6, generator=torch.Generator().manual_seed(num_latent_frames))


def in_a_rank():
    decoder = golden_decoder()
    return [decode_share(decoder, latents(n), dist.group.WORLD) for n in LENGTHS]


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_the_parts_of_the_ranks_are_the_whole(num_ranks, tmp_path):
    decoder = golden_decoder()
    ranks = run_ranks(num_ranks, in_a_rank, tmp_path)
    for n, parts in zip(LENGTHS, zip(*ranks, strict=True), strict=True):
        with torch.no_grad():
            whole = decoder(latents(n))
        assert (torch.cat(parts, dim=2) - whole).abs().max() <= TOLERANCE * whole.abs().max()


def test_more_ranks_than_latent_frames_are_refused():
    check_decode_ranks(7, 7)
    with pytest.raises(ParallelError, match=r"8 ranks cannot share the decoding of 7 latent frames: use at most 7"):
        check_decode_ranks(8, 7)
