import pytest
import torch
from helpers_golden import relative_error, vectors

from mochi_tune.errors import ConfigError
from mochi_tune.models.latents import (
    check_geometry,
    latent_shape,
    num_latent_frames,
    num_visual_tokens,
    to_latents,
    to_vae_latents,
)


@pytest.mark.parametrize(("frames", "latent"), [(1, 1), (7, 2), (37, 7), (85, 15), (163, 28)])
def test_the_first_frame_is_a_latent_frame_and_so_is_each_group_of_six(frames, latent):
    assert num_latent_frames(frames) == latent
    check_geometry(frames, 480, 848)


def test_the_shape_and_the_number_of_tokens():
    assert latent_shape(163, 480, 848) == (12, 28, 60, 106)
    assert num_visual_tokens(163, 480, 848) == 28 * 30 * 53


@pytest.mark.parametrize(
    ("size", "text"),
    [
        ((40, 480, 848), "num_frames=40 does not fit the VAE, which takes 6k+1: use 37 or 43."),
        ((0, 480, 848), "num_frames=0 does not fit the VAE, which takes 6k+1: use 1."),
        ((-9, 480, 848), "num_frames=-9 does not fit the VAE, which takes 6k+1: use 1."),
        ((37, 490, 848), "height=490 does not fit the model, which takes multiples of 16 pixels: use 480 or 496."),
        ((37, 480, 8), "width=8 does not fit the model, which takes multiples of 16 pixels: use 16."),
        ((37, -32, 848), "height=-32 does not fit the model, which takes multiples of 16 pixels: use 16."),
        ((37, 480, -5), "width=-5 does not fit the model, which takes multiples of 16 pixels: use 16."),
    ],
)
def test_impossible_sizes_name_the_nearest_possible_ones(size, text):
    with pytest.raises(ConfigError) as error:
        check_geometry(*size)
    assert str(error.value) == text


def test_the_two_latent_spaces_are_the_official_ones():
    io = vectors("dit_io")
    assert relative_error(to_latents(io["train_z"]), io["train_z_dit"]) <= 2e-5
    assert relative_error(to_vae_latents(io["sample_dit"]), io["sample_vae"]) <= 2e-5
    assert torch.allclose(to_vae_latents(to_latents(io["train_z"])), io["train_z"], atol=1e-6)
