import torch

from mochi_tune.config.load import load_config, weights_folder
from mochi_tune.toy.samples import reconstruct, share_shown
from mochi_tune.toy.world import ALL_SHAPES, all_words, draw_clips
from mochi_tune.training.draws import keyed_generator
from mochi_tune.weights.folder import WeightsFolder


def test_the_shipped_autoencoder_keeps_what_is_read_in_unseen_clips():
    folder, words = weights_folder(load_config("toy_lora", [])), all_words(ALL_SHAPES)[::32]
    frames = draw_clips(words, keyed_generator(0, "unseen by anyone"))
    weights = WeightsFolder(folder)
    encoder, decoder = weights.load_encoder("cpu", torch.float32), weights.load_decoder("cpu", torch.float32)
    decoded, decibels = reconstruct(frames, encoder, decoder)
    assert min(decibels) >= 26 and share_shown(decoded, words) >= 0.98
