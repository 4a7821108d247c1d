"""The demo with fewer steps and samples: minimum results that it must reach."""

import json
import re
from pathlib import Path

import pytest
import torch
from helpers_golden import TOLERANCE
from PIL import Image

from mochi_tune.adapters.files import load_adapter
from mochi_tune.adapters.lora import apply_adapter
from mochi_tune.config.load import load_config, weights_folder
from mochi_tune.config.sources import buckets_by_source
from mochi_tune.data.cache import open_cache
from mochi_tune.data.dataset import LatentDataset
from mochi_tune.models.latents import VAE_MEAN, VAE_STD
from mochi_tune.models.vae import frames_to_pixels
from mochi_tune.sampling.requests import sampler_settings
from mochi_tune.sampling.video import read_frames
from mochi_tune.toy.demo import main, new_folder
from mochi_tune.toy.demo_report import FIGURES
from mochi_tune.toy.lesson import lesson_words
from mochi_tune.toy.progress import StageBar
from mochi_tune.toy.samples import render_words
from mochi_tune.toy.world import draw_clips, split_words
from mochi_tune.training.draws import keyed_generator
from mochi_tune.training.evaluate import ValidationClips, validation_losses
from mochi_tune.training.objective import noisy_and_target
from mochi_tune.training.preflight import check
from mochi_tune.weights.folder import WeightsFolder

STEPS, SAMPLES = 80, 6


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    out = tmp_path_factory.mktemp("lesson") / "demo"
    (out / "1").mkdir(parents=True)
    (out / "1" / "report.html").write_text("of the demo before")
    settings = [f"train.steps={STEPS}", f"train.validate_every={STEPS}", "sample.steps=8"]
    made = main(out, *settings, num_samples=SAMPLES)
    return out / "2", made, json.loads((out / "2" / "figures.json").read_text())


def validation_rows(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "run" / "validation.jsonl").read_text().splitlines()]


def test_the_new_motion_is_learnt_and_the_old_ones_are_kept(lesson):
    out, _, figures = lesson
    assert figures["new_before"] <= 0.1 and figures["base_before"] >= 0.9
    assert figures["new_after"] >= 0.6 and figures["new_after_all"] >= 0.6, figures
    assert figures["base_after"] >= 0.85, figures
    assert figures["vae_psnr_db"] >= 26
    rows = validation_rows(out)
    assert [row["step"] for row in rows] == [0, STEPS]
    assert rows[1]["validation_loss"] < 0.9 * rows[0]["validation_loss"]


def test_the_adapter_file_is_what_was_trained(lesson):
    out, made, _ = lesson
    config = load_config(str(out / "run" / "config.yaml"), [])
    dataset = LatentDataset(open_cache(Path(config.data.cache), buckets_by_source(config.data)))
    plan = check(config, 1)
    assert len(plan.held_out) == config.train.validation_clips

    def validation_loss(dit):
        clips = ValidationClips(dataset, plan.validation_clips, config.seed, config.train.objective)
        losses, _ = validation_losses(dit, clips, torch.device("cpu"))
        return sum(losses.values()) / len(losses)

    dit = WeightsFolder(weights_folder(config)).load_dit("cpu", torch.float32)
    # Applies the adapter by the formula, independently of the code that samples with it.
    adapter = load_adapter(Path(made["adapter"]))
    for name, layer in adapter.layers.items():
        weight = dit.get_submodule(name).weight
        weight.data += config.lora.alpha / config.lora.rank * layer.b @ layer.a
    merged = validation_loss(dit)
    assert merged == pytest.approx(validation_rows(out)[-1]["validation_loss"], rel=1e-4)
    live = WeightsFolder(weights_folder(config)).load_dit("cpu", torch.float32)
    apply_adapter(live, adapter.layers, "lesson")
    read = validation_loss(live)
    assert read == pytest.approx(merged, rel=1e-4)


@torch.no_grad()
def test_the_objective_is_the_one_that_the_base_was_trained_on():
    folder, words = weights_folder(load_config("toy_lora", [])), split_words()[1][:24]
    weights = WeightsFolder(folder)
    dit, text = weights.load_dit("cpu", torch.float32), weights.load_text_encoder("cpu", torch.float32)
    encoder = weights.load_encoder("cpu", torch.float32)
    z, _ = encoder(frames_to_pixels(draw_clips(words, keyed_generator(0, "clips"))))
    noise = torch.randn(z.shape, generator=keyed_generator(0, "noise"))
    sigma = (torch.arange(len(words)) + 0.5) / len(words)
    embeds = torch.stack(text.encode([w.caption for w in words]))
    mask = torch.ones(embeds.shape[:2], dtype=torch.bool)

    def loss(noisy, target, level=sigma, prompt_mask=mask):
        return (dit(noisy, level, embeds, prompt_mask) - target).square().mean().item()

    mean, std = (torch.tensor(values).view(12, 1, 1, 1) for values in (VAE_MEAN, VAE_STD))
    latents, s = (z - mean) / std, sigma.view(-1, 1, 1, 1, 1)
    right = loss((1 - s) * latents + s * noise, latents - noise)
    wrong = {
        "sign": loss((1 - s) * latents + s * noise, noise - latents),
        "sigma": loss((1 - s) * latents + s * noise, latents - noise, 1 - sigma),
        "space": loss((1 - s) * z + s * noise, z - noise),
        "space of the input": loss((1 - s) * z + s * noise, (z - noise) / std),
        "caption": loss((1 - s) * latents + s * noise, latents - noise, prompt_mask=mask & False),
    }
    assert all(value > 1.05 * right for value in wrong.values()), (right, wrong)
    assert loss(*noisy_and_target("sampler", z, noise, sigma)) == pytest.approx(right, rel=TOLERANCE)


def test_strength_0_is_the_base_bit_for_bit_and_a_half_lies_between(lesson):
    _, made, figures = lesson
    config = load_config("toy_lora", [])
    folder, words = weights_folder(config), lesson_words()[1][:2]
    text, decoder = (
        WeightsFolder(folder).load_text_encoder("cpu", torch.float32),
        WeightsFolder(folder).load_decoder("cpu", torch.float32),
    )
    clips = []
    for adapter in (None, load_adapter(Path(made["adapter"]))):
        dit = WeightsFolder(folder).load_dit("cpu", torch.float32)
        if adapter:
            apply_adapter(dit, adapter.layers, "lesson", 0.0)
        clips.append(render_words(words, dit, text, decoder, sampler_settings(config.sample), 1))
    assert torch.equal(*clips)
    successes = {row["strength"]: row["new"] for row in figures["by_strength"]}
    assert successes[0.0] <= successes[0.5] <= successes[1.0], successes


def test_it_makes_a_page_and_names_what_it_made(lesson):
    out, made, figures = lesson
    assert set(made) == {*FIGURES, "figures", "report", "adapter", "picture"}
    assert figures.keys() == {*FIGURES, "by_step", "by_strength"}
    assert [row["step"] for row in figures["by_step"]] == [STEPS] and figures["taken_step"] == STEPS
    assert [made[name] for name in ("report", "figures")] == [str(out / "report.html"), str(out / "figures.json")]
    page = (out / "report.html").read_text()
    assert page.count('class="clip"') >= 30 and "wugs" in page and f"step {STEPS} is taken" in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)
    assert f"mochi-tune train conf=toy_lora run_dir={out / 'run'}" in page
    with Image.open(made["picture"]) as picture:
        assert picture.format == "WEBP" and getattr(picture, "n_frames", 1) == 13


def test_the_page_of_the_demo_before_stays(lesson):
    out = lesson[0]
    assert (out.parent / "1" / "report.html").read_text() == "of the demo before"
    assert sorted(path.name for path in out.parent.iterdir()) == ["1", "2"]
    assert [new_folder(out.parent).name, new_folder(out.parent).name] == ["3", "4"]


def test_where_no_terminal_is_each_stage_is_a_line(capfd):
    bar = StageBar({"one": 1, "two": 3})
    for stage in ("one", "two"):
        bar.begin(stage)
        for done in range(1000):
            bar.reach(done, 1000, "step")
    bar.close()
    written = capfd.readouterr()
    assert written.out.splitlines() == ["one ...", "two ..."] and not written.err


def test_the_example_of_the_sample_verb_is_a_video(lesson):
    frames = read_frames(lesson[0] / "example.mp4")
    assert len(frames) == 13 and frames[0].size == (96, 64)
