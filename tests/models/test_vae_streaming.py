import pytest
import torch
from helpers_golden import golden_decoder, golden_encoder, relative_error, vectors
from helpers_memory import TensorMemory

from mochi_tune.models import vae_streaming
from mochi_tune.models.vae import frames_to_pixels, pixels_to_frames
from mochi_tune.models.vae_streaming import decode_chunks, decode_tiled, encode

IO = vectors("vae_io")


@pytest.fixture(scope="module")
def encoder():
    return golden_encoder()


@pytest.fixture(scope="module")
def decoder():
    return golden_decoder()


def to_unit(pixels):
    return ((pixels + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_of_time_are_the_whole(encoder, decoder, chunk):
    frames = torch.randint(0, 256, (1, 25, 16, 16, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    pixels = frames_to_pixels(frames)
    mean, logvar = encoder(pixels)
    for got, whole in zip(encode(encoder, pixels, chunk), (mean, logvar), strict=True):
        assert relative_error(got, whole) <= 1e-5
    decoded = torch.cat(list(decode_chunks(decoder, mean, chunk)), dim=1)
    difference = decoded.int() - pixels_to_frames(decoder(mean)).int()
    # A value next to a rounding border may fall on its other side.
    assert decoded.shape == frames.shape and difference.abs().max() <= 1 and difference.ne(0).float().mean() < 1e-3


@torch.no_grad()
def test_tiled_decoder_is_the_official_one(decoder):
    assert relative_error(to_unit(decode_tiled(decoder, IO["lat"])), IO["decoded_tiled_spatial"]) <= 2e-5


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 7 * 8 * 3])
def test_attention_over_some_rows_at_a_time_is_the_whole(encoder, monkeypatch, tokens):
    pixels = frames_to_pixels(torch.randint(0, 256, (2, 7, 32, 48, 3), generator=torch.Generator().manual_seed(0)))
    whole = encoder(pixels)
    monkeypatch.setattr(vae_streaming, "ATTENTION_TOKENS", tokens)
    for got, expected in zip(encode(encoder, pixels, keep_on="cpu"), whole, strict=True):
        assert relative_error(got, expected) <= 1e-5


def peak(run) -> int:
    with TensorMemory() as memory:
        run()
    return memory.peak


@torch.no_grad()
def test_decoding_in_chunks_takes_no_more_memory_for_a_longer_clip(decoder):
    def decode(num_latent_frames):
        for _ in decode_chunks(decoder, torch.randn(1, 12, num_latent_frames, 4, 4)):
            pass

    short, long = peak(lambda: decode(4)), peak(lambda: decode(24))
    assert long < 1.02 * short
    assert peak(lambda: decoder(torch.randn(1, 12, 24, 4, 4))) > 4 * long


@torch.no_grad()
def test_encoding_in_chunks_holds_little_of_a_longer_clip(encoder, monkeypatch):
    monkeypatch.setattr(vae_streaming, "ATTENTION_TOKENS", 1)

    def pixels(num_frames):
        return torch.rand(1, 3, num_frames, 32, 32)

    clips = {n: pixels(n) for n in (25, 73)}
    grown = peak(lambda: encode(encoder, clips[73])) - peak(lambda: encode(encoder, clips[25]))
    whole = peak(lambda: encoder(clips[73])) - peak(lambda: encoder(clips[25]))
    assert grown < 0.25 * whole, (grown, whole)
