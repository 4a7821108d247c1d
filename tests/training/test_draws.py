import torch

from mochi_tune.models.vae import fourier_features
from mochi_tune.sampling.sampler import draw_noise
from mochi_tune.training import draws
from mochi_tune.training.draws import KeyedDraws, key_seed, keyed_generator, step_uniforms


def test_a_key_is_a_stream_of_its_own():
    def draw(*key):
        return torch.randn(4, generator=keyed_generator(*key))

    assert torch.equal(draw(1, "train", 2, 3), draw(1, "train", 2, 3))
    others = [(2, "train", 2, 3), (1, "validation", 2, 3), (1, "train", 3, 2), (1, "train", 2), (1, "train", 23)]
    assert all(not torch.equal(draw(1, "train", 2, 3), draw(*other)) for other in others)
    assert len({key_seed(0, "train", step) for step in range(1000)}) == 1000


def test_the_numbers_are_the_same_everywhere():
    assert key_seed(0, "train", 1) == 6167778989611334222


def test_the_numbers_are_the_same_whatever_torchs_default_dtype_is():
    def numbers():
        step_uniforms.cache_clear()
        drawn = KeyedDraws(0, 2, 1, 0.1, stratified=False).draw(1, 0, (2, 3))
        pixels = torch.linspace(-1, 1, 24, dtype=torch.float32).reshape(1, 3, 2, 2, 2)
        return drawn.uniforms, drawn.posterior_noise, drawn.noise, draw_noise(0, 7, 32, 48), fourier_features(pixels)

    usual = numbers()
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            found = numbers()
        finally:
            torch.set_default_dtype(torch.float32)
        assert all(map(torch.equal, found, usual))


def test_the_numbers_of_a_step_are_drawn_once_for_all_its_micro_batches(monkeypatch):
    made, make = [], keyed_generator
    monkeypatch.setattr(draws, "keyed_generator", lambda *key: made.append(key) or make(*key))
    keyed = KeyedDraws(31, 1, 16, 0.1, stratified=True)
    drawn = [keyed.draw(1, micro_batch, (2, 3)).uniforms for micro_batch in range(16)]
    # One for each sample's number, one for the strata, and one for the rest of each micro-batch.
    assert len(made) == 16 + 1 + 16
    drawn[0].zero_()
    assert all(torch.equal(other, drawn[1]) for other in drawn[2:]) and drawn[1].any(), "each has a tensor of its own"
