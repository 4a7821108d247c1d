import json
import math

import pytest
import torch
from helpers_golden import GOLDEN, TOLERANCE, golden_decoder, golden_encoder, relative_error, vectors
from torch.utils._python_dispatch import TorchDispatchMode

from mochi_tune.models import vae, vae_layers
from mochi_tune.models.vae import (
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    FrameCache,
    FrameNorm,
    TemporalAttention,
    fourier_features,
    frames_to_pixels,
    pixels_to_frames,
)

IO = vectors("vae_io")
FRAMES = IO["video"].permute(0, 2, 3, 4, 1)


@pytest.fixture(scope="module")
def encoder():
    return golden_encoder()


@pytest.fixture(scope="module")
def decoder():
    return golden_decoder()


def to_unit(pixels):
    return ((pixels + 1) / 2).clamp(0, 1).permute(0, 2, 3, 4, 1)


@pytest.mark.parametrize(
    ("part", "model", "config", "count"),
    [("encoder", Encoder, EncoderConfig, 97_222_016), ("decoder", Decoder, DecoderConfig, 362_526_595)],
)
def test_full_size_has_the_official_names_shapes_and_count(part, model, config, count):
    with torch.device("meta"):
        full_size = model(config())
    expected = json.loads((GOLDEN / "full_size_keys.json").read_text())[part]
    assert {name: list(tensor.shape) for name, tensor in full_size.state_dict().items()} == expected
    assert sum(parameter.numel() for parameter in full_size.parameters()) == count


def test_fourier_features_are_the_official_ones_to_the_last_bits():
    """Different rounding of the pixels would cause an error of 2 pi 2^7 eps; the sines of a processor cause 2 eps."""
    pixels = frames_to_pixels(FRAMES[:, :1])
    assert (fourier_features(pixels) - IO["fourier"]).abs().max() <= 2 * torch.finfo(torch.float32).eps


class Divisors(TorchDispatchMode):
    """Records the divisors of all divisions."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.div:
            self.seen.append(args[1])
        return func(*args, **(kwargs or {}))


def test_frames_are_divided_by_a_tensor_on_their_device():
    # CUDA multiplies by the reciprocal of a number or of a CPU tensor. Without a GPU, only the divisor can be checked.
    with Divisors() as divisors:
        frames_to_pixels(torch.zeros(1, 1, 8, 8, 3, dtype=torch.uint8, device="meta"))
    assert [(d.device.type, d.ndim) for d in divisors.seen] == [("meta", 0)]
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).expand(-1, -1, -1, -1, 3)
    exact = (levels.double() / 127.5).float() - 1
    assert torch.equal(frames_to_pixels(levels), exact.permute(0, 4, 1, 2, 3))


def test_fourier_features_refuse_rounded_pixels():
    with pytest.raises(AssertionError, match="fp32"):
        fourier_features(torch.zeros(1, 3, 1, 8, 8, dtype=torch.bfloat16))


@torch.no_grad()
@pytest.mark.parametrize(("num_frames", "prefix"), [(13, ""), (1, "image_")])
def test_encoder_is_the_official_one(encoder, num_frames, prefix):
    mean, logvar = encoder(frames_to_pixels(FRAMES[:, :num_frames]))
    assert relative_error(mean, IO[f"{prefix}mean"]) <= 2e-5
    assert relative_error(logvar, IO[f"{prefix}logvar"]) <= 2e-5


@torch.no_grad()
def test_decoder_is_the_official_one(decoder):
    raw = decoder(IO["lat"])
    assert relative_error(raw, IO["decoded_raw"]) <= 2e-5
    assert relative_error(to_unit(raw), IO["decoded"]) <= 2e-5


@torch.no_grad()
def test_no_frame_sees_its_future(encoder, decoder):
    pixels = frames_to_pixels(FRAMES[:, :, :16, :16])
    changed = pixels.clone()
    changed[:, :, 7:] *= -1
    for a, b in zip(encoder(pixels), encoder(changed), strict=True):
        assert relative_error(a[:, :, :2], b[:, :, :2]) <= TOLERANCE < 1e-2 < relative_error(a[:, :, 2], b[:, :, 2])
    latents = IO["lat"][..., :2, :2]
    changed = latents.clone()
    changed[:, :, 2] *= -1
    a, b = decoder(latents), decoder(changed)
    assert relative_error(a[:, :, :7], b[:, :, :7]) <= TOLERANCE < 1e-2 < relative_error(a[:, :, 7:], b[:, :, 7:])


@torch.no_grad()
def test_bf16_stays_near_fp32():
    encoder, decoder = golden_encoder(torch.bfloat16), golden_decoder(torch.bfloat16)
    mean, logvar = encoder(frames_to_pixels(FRAMES))
    assert mean.dtype == torch.float32
    assert relative_error(mean, IO["mean"]) <= 2e-2 and relative_error(logvar, IO["logvar"]) <= 2e-2
    assert relative_error(decoder(IO["lat"]).float(), IO["decoded_raw"]) <= 2e-2


def test_frames_survive_the_way_to_pixels_and_back():
    frames = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16, 1).expand(-1, -1, -1, -1, 3)
    assert torch.equal(pixels_to_frames(frames_to_pixels(frames)), frames)


@torch.no_grad()
@pytest.mark.parametrize("silu", [True, False])
def test_norms_are_computed_in_fp32_and_rounded_once(silu):
    generator = torch.Generator().manual_seed(0)
    half = FrameNorm(64, silu=silu).bfloat16()
    for parameter in half.parameters():
        parameter.copy_(torch.randn(64, generator=generator))
    exact = FrameNorm(64, silu=silu)
    exact.load_state_dict(half.state_dict())
    x = torch.randn(2, 64, 3, 4, 5, generator=generator).bfloat16()
    got = half(x)
    assert got.dtype == torch.bfloat16 and torch.equal(got, exact(x.float()).bfloat16())


@torch.no_grad()
def test_attention_in_parts_of_its_rows_is_the_whole(monkeypatch):
    torch.manual_seed(0)
    attention, x = TemporalAttention(64), torch.randn(2, 64, 5, 3, 4)

    whole = attention(x)
    # 24 rows are split into three parts of 7 and one of 3.
    monkeypatch.setattr(vae, "MAX_ATTENTION_ROWS", 7)
    assert relative_error(attention(x), whole) <= TOLERANCE


class Clones(TorchDispatchMode):
    """Records the shapes of tensors that are copied into another layout."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket is torch.ops.aten.clone:
            self.shapes.append(tuple(args[0].shape))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_stay_channels_last(monkeypatch, dtype):
    encoder, decoder = golden_encoder(dtype), golden_decoder(dtype)
    convolve, taken = vae_layers.conv3d, []

    def noted(x, weight, *args):
        taken.extend([x, weight])
        return convolve(x, weight, *args)

    monkeypatch.setattr(vae_layers, "conv3d", noted)
    layers = (vae_layers.PointwiseConv, vae.ResBlock, vae.AttentionBlock, vae_layers.Downsample, vae.UpsampleBlock)
    for module in [*encoder.modules(), *decoder.modules()]:
        if isinstance(module, layers):
            module.register_forward_hook(lambda _module, _inputs, out: taken.append(out))
    encoder(frames_to_pixels(FRAMES))
    decoder(IO["lat"])
    decoder(IO["lat"], FrameCache())
    assert len(taken) > 100
    assert all(tensor.is_contiguous(memory_format=torch.channels_last_3d) for tensor in taken)


@torch.no_grad()
def test_the_decoder_copies_features_only_where_channels_become_pixels(decoder):
    with Clones() as clones:
        decoder(IO["lat"])
    features = [shape for shape in clones.shapes if math.prod(shape) > 30_000]  # no weight is so large
    assert len(features) == len(decoder.config.spatial_expansions), features


@torch.no_grad()
def test_an_upsample_of_a_small_grid_does_not_copy_its_weight_and_is_that_of_a_large_one():
    torch.manual_seed(0)
    block, small = vae.UpsampleBlock(64, 32, 0, temporal=3, spatial=2), torch.randn(1, 64, 2, 3, 4)
    large = torch.cat([small, torch.randn(3, 64, 2, 3, 4)])
    with Clones() as clones:
        got = block(small)
    # The only copy is that of the features.
    assert [math.prod(shape) for shape in clones.shapes] == [small[:, 0].numel() * 32 * 12] and got.shape[2] == 4
    with Clones() as clones:
        expected = block(large)[:1]
    assert block.proj.weight.numel() in [math.prod(shape) for shape in clones.shapes]
    assert relative_error(got, expected) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("channels_last", [True, False])
def test_layers_without_gradients_are_those_with_them(encoder, decoder, channels_last):
    """Without gradients, layers write into padded tensors and call oneDNN. Weights may have either layout."""
    layout = torch.channels_last_3d if channels_last else torch.contiguous_format
    for model, x in ((encoder, frames_to_pixels(FRAMES)), (decoder, IO["lat"])):
        expected = model(x)
        with torch.enable_grad():
            got = model.to(memory_format=layout)(x)
        for a, b in zip(
            (got,) if model is decoder else got, (expected,) if model is decoder else expected, strict=True
        ):
            assert relative_error(a, b) <= TOLERANCE
    encoder.to(memory_format=torch.channels_last_3d), decoder.to(memory_format=torch.channels_last_3d)


@torch.no_grad()
def test_a_norm_is_groupnorm_where_the_mean_is_much_larger_than_the_variance():
    """A variance computed from the sum of squares would keep one digit."""
    x = 300 + torch.randn(2, 64, 3, 20, 30, generator=torch.Generator().manual_seed(0))
    frames = x.double().transpose(1, 2).flatten(0, 1)
    exact = torch.nn.functional.group_norm(frames, 32).unflatten(0, (2, 3)).transpose(1, 2)
    assert relative_error(FrameNorm(64, silu=False)(x), exact) <= TOLERANCE


def test_a_norm_gives_the_same_with_and_without_a_gradient():
    norm = FrameNorm(32)
    x = torch.randn(2, 32, 3, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    with torch.no_grad():
        expected = norm(x)
    out = norm(x.requires_grad_())
    assert out.dtype == torch.bfloat16 and torch.equal(out, expected)
    out.float().sum().backward()
    assert x.grad.shape == x.shape
