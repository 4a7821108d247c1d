"""Teaches the toy model a new motion with the commands that a user would type, and measures the result."""

import contextlib
import itertools
import time
from pathlib import Path

import torch
from torch import Tensor

from mochi_tune.adapters.files import load_adapter
from mochi_tune.adapters.lora import apply_adapter
from mochi_tune.config.load import load_config, weights_paths
from mochi_tune.files import read_json_lines, write_json
from mochi_tune.sampling.requests import sampler_settings
from mochi_tune.toy.demo_report import FIGURES, Lesson, Samples, build_report, build_story
from mochi_tune.toy.lesson import asked_words, run_verb, write_lesson
from mochi_tune.toy.page import write_report
from mochi_tune.toy.picture import write_picture
from mochi_tune.toy.progress import StageBar
from mochi_tune.toy.samples import num_batches, reconstruct, render_batches, share_new, share_shown
from mochi_tune.toy.world import Words, all_words, draw_clips
from mochi_tune.training.checkpoint import find_checkpoints, published_file, step_of
from mochi_tune.training.draws import keyed_generator
from mochi_tune.training.report import RunFiles, read_files
from mochi_tune.weights.folder import WeightsFolder

NUM_SAMPLES = 50
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEED = 1
# A checkpoint for each validation; the one of the lowest loss is kept.
SETTINGS = ("train.checkpoint_every=50", "train.keep_best=true")
EXAMPLE = "a red circle wugs over a grey background"
DRAW, PREPARE, TRAIN, RENDER, SAMPLE, WRITE = STAGES = (
    "drawing clips", "preparing them", "training", "rendering samples", "sampling an example", "writing the page",
)  # fmt: skip
# Approximate share of the time of each stage, in percent.
SHARES: dict[str, float] = dict(zip(STAGES, (2, 12, 35, 44, 5, 2), strict=True))


def main(out: Path, *settings: str, num_samples: int = NUM_SAMPLES) -> dict[str, str]:
    """Draws clips, prepares, trains, renders, measures and reports. Returns figures and paths by label.

    Args:
        out: folder of all demos. Each demo has a new folder in it, `1`, `2` and so on.
        settings: `key=value` overrides of conf/toy_lora.yaml.
        num_samples: number of samples for each share.
    """
    started = time.perf_counter()
    folder = new_folder(out)
    with contextlib.closing(StageBar(SHARES)) as bar:
        lesson = teach(folder, settings, bar)
        figures, samples = measure(lesson, num_samples, bar)
        adapter = lesson.adapters[figures["taken_step"]]
        bar.begin(SAMPLE)
        example = [f"adapter={adapter}", f"prompt={EXAMPLE}", "seed=1", f"out={folder / 'example.mp4'}"]
        run_verb("sample", "conf=toy_lora", *lesson.settings, *example, log=folder / "log.txt")
        figures["train_seconds"] = round(lesson.train_seconds, 1)
        figures["total_seconds"] = round(time.perf_counter() - started, 1)
        figures = {name: figures[name] for name in (*FIGURES, "by_step", "by_strength")}
        bar.begin(WRITE)
        paths = {
            "figures": folder / "figures.json",
            "report": folder / "report.html",
            "picture": folder / "before_after.webp",
        }
        write_json(paths["figures"], figures)
        write_report(paths["report"], build_report(lesson, figures, samples))
        write_picture(paths["picture"], build_story(lesson, figures, samples))
    made = {name: f"{figures[name]:g}" for name in FIGURES} | {"adapter": str(adapter)}
    return made | {name: str(path) for name, path in paths.items()}


def new_folder(out: Path) -> Path:
    """Creates the folder of a demo, numbered after the highest existing number."""
    out.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.name) for path in out.iterdir() if path.name.isdecimal()]
    for number in itertools.count(max(numbers, default=0) + 1):
        with contextlib.suppress(FileExistsError):
            (out / str(number)).mkdir()
            break
    return out / str(number)


def teach(folder: Path, settings: tuple[str, ...], bar: StageBar) -> Lesson:
    """Draws the lesson's clips, prepares them and trains. The output of the commands goes to log.txt."""
    log, run_dir = folder / "log.txt", folder / "run"
    bar.begin(DRAW)
    videos = write_lesson(folder / "videos", SEED)
    paths = [f"run_dir={run_dir}", f"data.videos={folder / 'videos'}", f"data.cache={folder / 'cache'}"]
    paths += [*SETTINGS, *settings]
    config = load_config("toy_lora", paths)
    bar.begin(PREPARE)
    run_verb("prepare", "conf=toy_lora", *paths, log=log)

    def show_step() -> None:
        bar.reach(len(read_json_lines(run_dir / "metrics.jsonl")), config.train.steps, "step")

    bar.begin(TRAIN)
    started = time.perf_counter()
    run_verb("train", "conf=toy_lora", *paths, log=log, meanwhile=show_step)
    train_seconds = time.perf_counter() - started
    run = read_files(run_dir)
    return Lesson(folder, videos, paths, config, run, best_and_last(run), train_seconds)


def best_and_last(run: RunFiles) -> dict[int, Path]:
    """Returns the adapters of the lowest validation loss (among the kept checkpoints) and of the last step, by step."""
    losses = {row["step"]: row["validation_loss"] for row in run.validations}
    kept = {step_of(path): path for path in find_checkpoints(run.run_dir / "checkpoints")}
    last = max(kept)
    best = min(kept.keys() & losses.keys() or {last}, key=lambda step: losses.get(step, 0))
    return {step: published_file(kept[step]) for step in (best, last)}


def measure(lesson: Lesson, num_samples: int, bar: StageBar) -> tuple[dict, Samples]:
    """Renders new and old captions, always from the same noise, and measures the samples.

    Renders the new captions with each of the lesson's adapters, then all captions at several strengths of the best
    adapter, which is the first one if they are equal.
    """
    config, half = lesson.config, num_samples // 2
    weights, settings = WeightsFolder(weights_paths(config)), sampler_settings(config.sample)
    text = weights.load_text_encoder("cpu", torch.float32)
    decoder = weights.load_decoder("cpu", torch.float32)
    asked = dict(zip(("new", "base"), asked_words(num_samples), strict=True))
    # Half as many samples at the strengths between 0 and 1.
    counts = {strength: num_samples if strength in (0, 1) else half for strength in STRENGTHS}
    total = sum(len(asked) * num_batches(count) for count in counts.values())
    total += (len(lesson.adapters) - 1) * num_batches(num_samples)
    done = itertools.count(1)
    bar.begin(RENDER)

    def render(words: list[Words], adapter: Path, strength: float) -> Tensor:
        dit = weights.load_dit("cpu", torch.float32)
        if strength:
            apply_adapter(dit, load_adapter(adapter).layers, "lesson", strength)
        parts = []
        for part in render_batches(words, dit, text, decoder, settings, SEED):
            parts.append(part)
            bar.reach(next(done), total, "batch")
        return torch.cat(parts)

    by_step = {step: render(asked["new"], adapter, 1.0) for step, adapter in lesson.adapters.items()}
    shares = {step: share_new(frames) for step, frames in by_step.items()}
    taken = max(shares, key=shares.__getitem__)
    samples: Samples = {strength: {} for strength in STRENGTHS}
    for strength, kind in itertools.product(STRENGTHS, asked):
        words = asked[kind][: counts[strength]]
        is_done = (strength, kind) == (1.0, "new")
        frames = by_step[taken] if is_done else render(words, lesson.adapters[taken], strength)
        samples[strength][kind] = words, frames
    unseen = draw_clips(all_words()[::12][:num_samples], keyed_generator(SEED, "demo"))
    _, psnr = reconstruct(unseen, weights.load_encoder("cpu", torch.float32), decoder)
    new, base = (lambda strength: samples[strength]["new"]), (lambda strength: samples[strength]["base"])
    figures = {
        "new_before": share_new(new(0.0)[1]),
        "new_after": share_new(new(1.0)[1]),
        "new_after_all": share_shown(new(1.0)[1], new(1.0)[0]),
        "base_before": share_shown(base(0.0)[1], base(0.0)[0]),
        "base_after": share_shown(base(1.0)[1], base(1.0)[0]),
        "vae_psnr_db": round(sum(psnr) / len(psnr), 2),
        "taken_step": taken,
        "by_step": [{"step": step, "new": share} for step, share in shares.items()],
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
