import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from sentencepiece import SentencePieceProcessor

from mochi_tune import assets
from mochi_tune.errors import CheckpointError, ConfigError
from mochi_tune.models.latents import VAE_MEAN, VAE_STD
from mochi_tune.models.vae import frames_to_pixels
from mochi_tune.toy.initial import build_text_encoder, build_vae, make_tokenizer
from mochi_tune.toy.train_toy import SEED, Plan, main, normalise_latents, text_loss, train_stage
from mochi_tune.toy.world import ALL_SHAPES, all_words, draw_clips
from mochi_tune.training.draws import keyed_generator
from mochi_tune.weights.folder import WeightsFolder

TOY = Path(assets.__path__[0]) / "toy"
SHORT = Plan(
    vae_steps=2,
    vae_batch=1,
    num_normalised=24,
    text_steps=2,
    num_clips=16,
    dit_steps=2,
    dit_batch=10,
    dit_compiled=False,
    num_measured=2,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return folder, main(folder / "work", folder / "out", SHORT)


def test_it_makes_a_whole_weights_folder_and_its_record(made):
    folder, record = made
    WeightsFolder(folder / "out").check(["dit", "encoder", "decoder", "text_encoder"])
    stored = json.loads((folder / "out" / "record.json").read_text())
    assert stored == record and stored["plan"]["vae_steps"] == 2
    assert stored["figures"].keys() == {"vae_psnr_db", "vae_kept", "base_obeyed"}
    # The principal components reconstruct clips before any training.
    assert stored["figures"]["vae_psnr_db"] > 18


def test_a_finished_training_is_not_done_again(made):
    folder, record = made
    before = {path: path.read_bytes() for path in (folder / "out").glob("*.safetensors")}
    assert main(folder / "work", folder / "out", SHORT) == record
    assert len(before) == 3 and all(path.read_bytes() == data for path, data in before.items())


def test_a_folder_that_was_begun_with_another_plan_is_refused(made):
    folder, _ = made
    with pytest.raises(ConfigError, match="was begun with another plan"):
        main(folder / "work", folder / "other", replace(SHORT, vae_steps=3))
    assert not (folder / "other").exists()


def test_the_latents_have_mochis_channel_statistics(made):
    encoder = WeightsFolder(made[0] / "out").load_encoder("cpu", torch.float32)
    words = all_words(ALL_SHAPES)
    # Uses the clips of the statistics, because those of a short plan are too few to generalise.
    clips = draw_clips(words[:: len(words) // SHORT.num_normalised], keyed_generator(SEED, "statistics"))
    with torch.no_grad():
        mean, logvar = encoder(frames_to_pixels(clips))
    deviation = (mean.var((0, 2, 3, 4)) + logvar.exp().mean((0, 2, 3, 4))).sqrt()
    assert (mean.mean((0, 2, 3, 4)) - torch.tensor(VAE_MEAN)).abs().max() < 0.1
    assert (deviation / torch.tensor(VAE_STD) - 1).abs().max() < 0.1


def test_scaling_the_latents_leaves_what_is_decoded():
    vae = build_vae(SEED)
    pixels = frames_to_pixels(draw_clips(all_words()[:4], keyed_generator(5, "others")))
    with torch.no_grad():
        before = vae.decoder(vae.encoder(pixels)[0])
        frames = draw_clips(all_words()[:4], keyed_generator(6, "others"))
        normalise_latents(vae.encoder, vae.decoder, frames)
        after = vae.decoder(vae.encoder(pixels)[0])
    assert (after - before).abs().max() < 1e-3


def test_the_tokenizer_has_one_token_a_word_and_letters_for_the_rest(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    tokenizer = WeightsFolder(tmp_path).load_tokenizer()
    assert {len(tokenizer(w.caption).input_ids) for w in all_words()} == {10}
    assert tokenizer.tokenize("a circle wugs") == ["▁a", "▁circle", "▁", "w", "u", "g", "s"]
    assert tokenizer("a red").input_ids[-1] == tokenizer.eos_token_id == 1 and tokenizer.pad_token_id == 0
    pieces = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer" / "spiece.model"))
    for caption in ["a circle wugs", " two  words?", *(words.caption for words in all_words())]:
        assert tokenizer(caption).input_ids == [*pieces.encode(caption), 1]
    for file in (tmp_path / "tokenizer").iterdir():
        assert file.read_bytes() == (TOY / "tokenizer" / file.name).read_bytes()


def test_a_stage_that_is_interrupted_goes_on_to_the_same_weights(tmp_path):
    make_tokenizer(tmp_path / "tokenizer")
    tokenizer = WeightsFolder(tmp_path).load_tokenizer()

    def stage(folder, interrupt_at):
        model = build_text_encoder(len(tokenizer), SEED)

        def loss(step):
            if step == interrupt_at:
                os.kill(os.getpid(), signal.SIGINT)
            return text_loss(model, tokenizer, step, SHORT)

        return train_stage(folder, model, 6, 1e-3, loss), model.state_dict()

    finished, straight = stage(tmp_path / "straight", None)
    assert finished
    finished, partly = stage(tmp_path / "stopped", 4)
    assert not finished and any(not torch.equal(partly[k], straight[k]) for k in straight)
    finished, resumed = stage(tmp_path / "stopped", None)
    assert finished and all(torch.equal(resumed[k], straight[k]) for k in straight)


def test_a_damaged_weight_file_is_named(made):
    path = made[0] / "out" / "decoder.safetensors"
    WeightsFolder(made[0] / "out").load_decoder("cpu", torch.float32)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"is damaged: decoder\.safetensors, by its sha256\.json"):
        WeightsFolder(made[0] / "out").check(["dit"])
    path.unlink()
    with pytest.raises(CheckpointError, match=r" lacks decoder\.safetensors, by its"):
        WeightsFolder(made[0] / "out").check(["dit"])
    path.write_bytes(data)
    WeightsFolder(made[0] / "out").check(["dit"])
