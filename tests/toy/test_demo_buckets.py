"""The lesson of the demo with clips of two sizes in one run."""

import torch
from helpers_road import read_rows

from mochi_tune.adapters.files import load_adapter
from mochi_tune.adapters.lora import apply_adapter
from mochi_tune.config.load import load_config, weights_folder
from mochi_tune.data_prep.clips import Cut, decode_clip
from mochi_tune.data_prep.prepare import main as prepare
from mochi_tune.recipes.train_lora import main as train
from mochi_tune.sampling.requests import sampler_settings
from mochi_tune.sampling.video import write_video
from mochi_tune.toy.lesson import asked_words, write_lesson
from mochi_tune.toy.samples import render_words, share_new, share_shown
from mochi_tune.weights.folder import WeightsFolder

SAMPLES = 6


def test_the_lesson_is_learnt_from_clips_of_two_sizes(tmp_path, capsys):
    # Half of the clips are cut in the middle of their motion.
    for video in write_lesson(tmp_path / "videos", 1)[::2]:
        write_video(video, [decode_clip(video, Cut(7, 64, 96)).frames])
    paths = [f"data.videos={tmp_path / 'videos'}", f"data.cache={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"]
    sizes = ["data.buckets=[[13,64,96],[7,64,96]]", "train.steps=80", "train.validate_every=0", "sample.steps=8"]
    config = load_config("toy_lora", [*paths, *sizes])
    assert prepare(config) == 0
    assert "12 in [7, 64, 96]; 12 in [13, 64, 96]" in capsys.readouterr().out
    assert train(config) == 0
    assert len(read_rows(tmp_path / "run" / "metrics.jsonl")) == 80

    weights = WeightsFolder(weights_folder(config))
    dit, decoder = weights.load_dit("cpu", torch.float32), weights.load_decoder("cpu", torch.float32)
    apply_adapter(dit, load_adapter(tmp_path / "run" / "adapter.safetensors").layers, "lesson")
    text, settings = weights.load_text_encoder("cpu", torch.float32), sampler_settings(config.sample)
    new, base = asked_words(SAMPLES)
    assert share_new(render_words(new, dit, text, decoder, settings, 1)) >= 0.6
    assert share_shown(render_words(base, dit, text, decoder, settings, 1), base) >= 0.85
