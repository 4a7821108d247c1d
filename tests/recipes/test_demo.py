"""The short lesson: the demo with fewer steps and samples, and what it must still show."""

import json
import re

import pytest
import torch
from PIL import Image

from mochi_tune.adapters import load_adapter
from mochi_tune.config import load_config, sampler_settings, weights_folder
from mochi_tune.lora import apply_adapter
from mochi_tune.models.text_encoder import TextEncoder
from mochi_tune.recipes.demo import FIGURES, main
from mochi_tune.toy.lesson import lesson_words
from mochi_tune.toy.samples import render_words
from mochi_tune.video import read_frames
from mochi_tune.weights import load_decoder, load_dit

STEPS, SAMPLES = 20, 4


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    out = tmp_path_factory.mktemp("lesson") / "demo"
    made = main(out, f"train.steps={STEPS}", num_samples=SAMPLES)
    return out, made, json.loads((out / "figures.json").read_text())


def test_a_lesson_lowers_the_loss_of_its_clips(lesson):
    [path] = lesson[0].glob("*/run/validation.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0]["step"] == 0 and rows[-1]["step"] == STEPS
    assert rows[-1]["validation_loss"] < 0.9 * rows[0]["validation_loss"]
    assert lesson[2]["new_before"] == 0 and lesson[2]["vae_psnr_db"] >= 26


def test_strength_0_is_the_base_bit_for_bit(lesson):
    [path] = lesson[0].glob("*/run/adapter.safetensors")
    config = load_config("toy_lora", [])
    folder, words = weights_folder(config), lesson_words()[1][:2]
    text, decoder = TextEncoder.load(folder, "cpu", torch.float32), load_decoder(folder, "cpu", torch.float32)
    clips = []
    for adapter in (None, load_adapter(path)):
        dit = load_dit(folder, "cpu", torch.float32)
        if adapter:
            apply_adapter(dit, adapter.scaled(0.0), "lesson")
        clips.append(render_words(words, dit, text, decoder, sampler_settings(config), 1))
    assert torch.equal(*clips)


def test_it_makes_a_page_and_names_what_it_made(lesson):
    out, made, figures = lesson
    assert set(made) == {*FIGURES, "figures", "report", "adapter", "picture"}
    assert figures.keys() == {*FIGURES, "by_strength"}
    page = (out / "report.html").read_text()
    assert page.count("<video") >= 30 and "wug" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    if made["picture"].endswith(".png"):
        with Image.open(made["picture"]) as picture:
            assert picture.width > 1000 and picture.height > 1500


def test_the_example_of_the_sample_verb_is_a_video(lesson):
    [path] = lesson[0].glob("*/example.mp4")
    frames = read_frames(path)
    assert len(frames) == 13 and frames[0].size == (96, 64)
