"""Teaches the toy model a new thing by the commands that a user would type, and measures what it has learnt."""

import shutil
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from mochi_tune.adapters.files import Adapter, load_adapter
from mochi_tune.adapters.lora import apply_adapter
from mochi_tune.config.load import RunConfig, config_yaml, load_config, weights_paths
from mochi_tune.files import read_json_lines, write_json
from mochi_tune.pages.html_page import write_png
from mochi_tune.sampling.requests import sampler_settings
from mochi_tune.sampling.video import write_video
from mochi_tune.toy.lesson import asked_words, run_verb, write_lesson
from mochi_tune.toy.page import Report, Row, write_report
from mochi_tune.toy.samples import reconstruct, render_words, share_new, share_shown
from mochi_tune.toy.world import Words, all_words, draw_clips
from mochi_tune.training.draws import keyed_generator
from mochi_tune.weights.folder import WeightsFolder

NUM_SAMPLES, NUM_SHOWN, NUM_CLIPS_SHOWN = 50, 6, 12
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEED = 1
EXAMPLE = "a red circle wugs over a grey background"
# name -> what a reader calls it, and what it is of.
FIGURES = {
    "new_before": ("New thing, before", "of samples of the new word that move in the new way before the lesson"),
    "new_after": ("New thing, after", "of the same samples after the lesson"),
    "new_after_all": ("… as captioned", "of them, that have the caption's colour and shape too"),
    "base_before": ("Old captions, before", "of samples of unseen captions whose colour, shape and motion are right"),
    "base_after": ("Old captions, after", "of the same samples after the lesson: how much is kept"),
    "vae_psnr_db": ("Autoencoder, dB", "PSNR of unseen clips, encoded and decoded"),
    "train_seconds": ("Training, seconds", "on this machine, starting up and validating included"),
    "total_seconds": ("In all, seconds", "from drawing the clips to the last measurement"),
}


def main(out: Path, *settings: str, num_samples: int = NUM_SAMPLES) -> dict[str, str]:
    """Draws clips, prepares, trains, renders, measures and reports; returns what it made by its label.

    Args:
        out: folder of the newest report.html, report.png and figures.json; each run goes to a new
            folder in it, with its page.
        settings: of the training, in the place of those of conf/toy_lora.yaml.
        num_samples: how many samples each share is taken of.
    """
    started = time.perf_counter()
    folder = out / time.strftime("%Y%m%d-%H%M%S")
    # Of two in the same second the later one is refused.
    folder.mkdir(parents=True)
    videos = write_lesson(folder / "videos", SEED)
    tqdm.write(f"drew {len(videos)} clips of a thing that the toy model has never seen: {folder / 'videos'}")
    paths = [f"run_dir={folder / 'run'}", f"data.videos={folder / 'videos'}", f"data.cache={folder / 'cache'}"]
    paths += settings
    run_verb("prepare", "conf=toy_lora", *paths)
    train_started = time.perf_counter()
    run_verb("train", "conf=toy_lora", *paths)
    train_seconds = time.perf_counter() - train_started
    adapter = folder / "run" / "adapter.safetensors"
    run_verb("sample", "conf=toy_lora", *paths, f"prompt={EXAMPLE}", "seed=1", f"out={folder / 'example.mp4'}")
    run_verb("export", f"adapter={adapter}", "to=diffusers", f"out={folder / 'adapter_diffusers.safetensors'}")

    config = load_config("toy_lora", paths)
    figures, samples = measure(config, load_adapter(adapter), num_samples)
    figures |= {"train_seconds": round(train_seconds, 1)}
    figures |= {"total_seconds": round(time.perf_counter() - started, 1)}
    figures = {name: figures[name] for name in (*FIGURES, "by_strength")}
    write_json(out / "figures.json", figures)
    write_report(folder / "report.html", build_report(config, folder, videos, figures, samples))
    # The newest page stands in `out` too; that of each demo stays beside its run.
    shutil.copyfile(folder / "report.html", out / "report.html")
    made = {name: f"{figures[name]:g}" for name in FIGURES}
    made |= {"figures": str(out / "figures.json"), "report": str(out / "report.html"), "adapter": str(adapter)}
    if write_png(out / "report.html", out / "report.png"):
        return made | {"picture": str(out / "report.png")}
    return made | {"picture": "none: there is no chromium here to take it"}


def measure(
    config: RunConfig, adapter: Adapter, num_samples: int
) -> tuple[dict, dict[float, dict[str, tuple[list[Words], Tensor]]]]:
    """Renders new and old captions at several strengths, always from the same noise, and counts what is seen.

    Returns the figures, and for each strength the words and frames (B, F, H, W, 3) of "new" and "base".
    """
    weights, settings = WeightsFolder(weights_paths(config)), sampler_settings(config.sample)
    text = weights.load_text_encoder("cpu", torch.float32)
    decoder = weights.load_decoder("cpu", torch.float32)
    asked = dict(zip(("new", "base"), asked_words(num_samples), strict=True))
    samples: dict[float, dict[str, tuple[list[Words], Tensor]]] = {}
    for strength in STRENGTHS:
        dit = weights.load_dit("cpu", torch.float32)
        if strength:
            apply_adapter(dit, adapter.layers, "lesson", strength)
        tqdm.write(f"rendering at strength {strength:g}")
        # The strengths between, of half as many.
        count = num_samples if strength in (0, 1) else num_samples // 2
        samples[strength] = {
            kind: (words[:count], render_words(words[:count], dit, text, decoder, settings, SEED))
            for kind, words in asked.items()
        }
    unseen = draw_clips(all_words()[::12][:num_samples], keyed_generator(SEED, "demo"))
    _, psnr = reconstruct(unseen, weights.load_encoder("cpu", torch.float32), decoder)
    half = num_samples // 2
    new, base = (lambda strength: samples[strength]["new"]), (lambda strength: samples[strength]["base"])
    figures = {
        "new_before": share_new(new(0.0)[1]),
        "new_after": share_new(new(1.0)[1]),
        "new_after_all": share_shown(new(1.0)[1], new(1.0)[0]),
        "base_before": share_shown(base(0.0)[1], base(0.0)[0]),
        "base_after": share_shown(base(1.0)[1], base(1.0)[0]),
        "vae_psnr_db": round(sum(psnr) / len(psnr), 2),
        "by_strength": [
            {
                "strength": strength,
                "new": share_new(new(strength)[1][:half]),
                "base": share_shown(base(strength)[1][:half], base(strength)[0][:half]),
            }
            for strength in STRENGTHS
        ],
    }
    return figures, samples


def build_report(config: RunConfig, folder: Path, videos: list[Path], figures: dict, samples: dict) -> Report:
    """Writes some samples as videos and gathers what the page shows."""
    (folder / "samples").mkdir()

    def video(kind: str, number: int, strength: float) -> Path:
        path = folder / "samples" / f"{kind}_{number}_strength_{strength:g}.mp4"
        if not path.exists():
            write_video(path, [samples[strength][kind][1][number]])
        return path

    def rows(kind: str, count: int, columns: dict[str, float]) -> list[Row]:
        words = samples[0.0][kind][0][:count]
        return [
            Row(w.caption, {label: video(kind, i, strength) for label, strength in columns.items()})
            for i, w in enumerate(words)
        ]

    def curve(name: str, value: str) -> list[tuple[int, float]]:
        return [(row["step"], row[value]) for row in read_json_lines(Path(config.run_dir) / name)]

    before_after = {"before": 0.0, "after": 1.0}
    return Report(
        title="A new motion, taught to a small Mochi",
        summary=(
            "The toy model knows shapes that move left, right, up and down, grow and shrink. None ever moved aslant. "
            f"By {len(videos)} clips that do, captioned with the new word “wugs”, it was taught in "
            f"{figures['train_seconds']:.0f} seconds, by the code that trains Mochi 1. "
            "Each row below is rendered from one seed."
        ),
        figures={label: (percent(name, figures[name]), meaning) for name, (label, meaning) in FIGURES.items()},
        losses=curve("metrics.jsonl", "loss"),
        validation=curve("validation.jsonl", "validation_loss"),
        clips=Row(
            "Some of the lesson’s clips.",
            {p.with_suffix(".txt").read_text().strip(): p for p in videos[:NUM_CLIPS_SHOWN]},
        ),
        before_after=rows("new", NUM_SHOWN, before_after) + rows("base", NUM_SHOWN // 2, before_after),
        strengths=rows("new", 2, {f"{s:g}": s for s in STRENGTHS}),
        success_by_strength=[(row["strength"], row["new"], row["base"]) for row in figures["by_strength"]],
        settings=config_yaml(config),
    )


def percent(name: str, value: float) -> str:
    """Returns a figure as a reader wants it."""
    return f"{value:.0%}" if name.startswith(("new", "base")) else f"{value:.1f}"
