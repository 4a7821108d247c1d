import torch

from mochi_tune.training.draws import key_seed, keyed_generator


def test_a_key_is_a_stream_of_its_own():
    def draw(*key):
        return torch.randn(4, generator=keyed_generator(*key))

    assert torch.equal(draw(1, "train", 2, 3), draw(1, "train", 2, 3))
    others = [(2, "train", 2, 3), (1, "validation", 2, 3), (1, "train", 3, 2), (1, "train", 2), (1, "train", 23)]
    assert all(not torch.equal(draw(1, "train", 2, 3), draw(*other)) for other in others)
    assert len({key_seed(0, "train", step) for step in range(1000)}) == 1000


def test_the_numbers_are_the_same_everywhere():
    assert key_seed(0, "train", 1) == 6167778989611334222
