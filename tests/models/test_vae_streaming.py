from pathlib import Path

import pytest
import torch
from helpers_golden import TOLERANCE, golden_decoder, golden_encoder, relative_error, vectors
from helpers_memory import TensorMemory
from helpers_rounding import assert_same_frames, rounding_share

import mochi_tune
from mochi_tune.errors import ConfigError
from mochi_tune.models import vae_streaming
from mochi_tune.models.vae import frames_to_pixels, pixels_to_frames
from mochi_tune.models.vae_layers import HostFrames
from mochi_tune.models.vae_streaming import WHOLE, check_tiles, decode_chunks, decode_tiled, encode, frames_by_tile
from mochi_tune.toy.world import draw_clips, split_words
from mochi_tune.training.draws import keyed_generator
from mochi_tune.weights.folder import WeightsFolder

IO = vectors("vae_io")
TOY = Path(mochi_tune.__file__).parent / "assets" / "toy"


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
        assert relative_error(got, whole) <= TOLERANCE
    decoded = torch.cat(list(decode_chunks(decoder, mean, chunk)), dim=1)
    # A value close to a rounding boundary may be rounded to the other side.
    share = rounding_share(lambda: pixels_to_frames(decoder(mean)), list(decoder.parameters()))
    assert decoded.shape == frames.shape
    assert_same_frames(decoded, pixels_to_frames(decoder(mean)), share)


@torch.no_grad()
def test_tiled_decoder_is_the_official_one(decoder):
    assert (
        relative_error(to_unit(decode_tiled(decoder, IO["lat"], (2, 2), overlap=4)), IO["decoded_tiled_spatial"])
        <= 2e-5
    )


@torch.no_grad()
@pytest.mark.parametrize("tiles", [(1, 2), (2, 3)])
def test_tiles_in_chunks_are_the_tiles_of_the_whole_clip(decoder, tiles):
    """Includes sizes that do not split evenly."""
    latents = torch.randn(1, 12, 2, 13, 22, generator=torch.Generator().manual_seed(1))
    pixels = decode_tiled(decoder, latents, tiles)
    assert pixels.shape == (1, 3, 7, 104, 176)
    # The tile that is decoded does not share the device with the frames that the others wait for.
    assert all(isinstance(frames, HostFrames) for frames in frames_by_tile(tiles))
    decoded = torch.cat(list(decode_chunks(decoder, latents, tiles=tiles)), dim=1)
    # TOLERANCE, in levels (127.5 per unit), is the share of values that are this close to a boundary on either side.
    share = 2 * 127.5 * TOLERANCE * pixels.abs().max().item()
    assert_same_frames(decoded, pixels_to_frames(pixels), share)


@torch.no_grad()
def test_tiles_of_a_trained_decoder_are_off_by_what_the_docs_say():
    """Measures the trained decoder of the toy model on six of its clips, placed side by side."""
    clips = draw_clips(split_words()[1][:6], keyed_generator(5, "seam"))
    frames = torch.cat([torch.cat(list(clips[i : i + 3]), dim=2) for i in (0, 3)], dim=1)[None]  # 128 x 288
    mean, _ = encode(WeightsFolder(TOY).load_encoder("cpu", torch.float32), frames_to_pixels(frames))
    decoder = WeightsFolder(TOY).load_decoder("cpu", torch.float32)
    whole, tiled = (decode_tiled(decoder, mean, tiles).clamp(-1, 1) for tiles in ((1, 1), (2, 2)))
    error = (tiled - whole) * 127.5
    assert 1.4 < error.square().mean().sqrt() < 1.8 and 15 < error.abs().max() < 25


@torch.no_grad()
def test_frames_in_host_memory_are_those_that_were_put_there():
    layer, frames = torch.nn.Identity(), torch.randn(1, 2, 3, 4, 5).movedim(-1, 1)
    held, [whole] = HostFrames(), frames_by_tile(WHOLE)
    assert layer not in held and whole == {}
    held[layer] = frames
    read = held[layer]
    assert read.stride() == frames.stride()
    held[layer] = frames + 1
    assert torch.equal(read, frames) and torch.equal(held[layer], frames + 1), "what is read is a copy"


def test_tiles_that_do_not_fit_are_refused():
    check_tiles([2, 2], 480, 848)
    for tiles in ([14, 1], [2], [0, 1]):
        with pytest.raises(ConfigError, match=r"does not fit 480x848 pixels: give .* at most \[13, 24\]"):
            check_tiles(tiles, 480, 848)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 7 * 8 * 3])
def test_attention_over_some_rows_at_a_time_is_the_whole(encoder, monkeypatch, tokens):
    pixels = frames_to_pixels(torch.randint(0, 256, (2, 7, 32, 48, 3), generator=torch.Generator().manual_seed(0)))
    whole = encoder(pixels)
    monkeypatch.setattr(vae_streaming, "ATTENTION_TOKENS", tokens)
    for got, expected in zip(encode(encoder, pixels), whole, strict=True):
        assert relative_error(got, expected) <= TOLERANCE


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
