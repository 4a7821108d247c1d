"""What the demo tells of its lesson: the words and the choice of clips of its page and of its picture."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mochi_tune.config.load import RunConfig, config_yaml
from mochi_tune.sampling.video import read_frames
from mochi_tune.toy.lesson import PROMPT
from mochi_tune.toy.measure import see
from mochi_tune.toy.page import Report, Row
from mochi_tune.toy.picture import Story
from mochi_tune.toy.world import MOTIONS, NEW_MOTION, NEW_WORD, Words
from mochi_tune.training.report import RunFiles

NUM_SHOWN, NUM_CLIPS_SHOWN = 6, 12
# name -> what a reader calls it, and what it is of.
FIGURES = {
    "new_before": ("New thing, before", "of samples of the new word that move in the new way before the lesson"),
    "new_after": ("New thing, after", "of the same samples after the lesson"),
    "new_after_all": ("… as captioned", "of them, that have the caption's colour and shape too"),
    "base_before": ("Old captions, before", "of samples of unseen captions whose colour, shape and motion are right"),
    "base_after": ("Old captions, after", "of the same samples after the lesson: how much is kept"),
    "vae_psnr_db": ("Autoencoder, dB", "PSNR of unseen clips, encoded and decoded"),
    "best_step": ("Step taken", "the one of the lowest validation loss, of those that were kept"),
    "train_seconds": ("Training, seconds", "on this machine, starting up and validating included"),
    "total_seconds": ("In all, seconds", "from drawing the clips to the last measurement"),
}

# By strength, and then by "new" and "base": the words that were asked for, and what was rendered (B, F, H, W, 3).
Samples = dict[float, dict[str, tuple[list[Words], Tensor]]]


@dataclass(frozen=True)
class Lesson:
    """What the demo's commands made.

    Attributes:
        folder: of this demo.
        videos: the clips of the lesson.
        config: the settings of the training.
        run: what the files of its run folder hold.
        best_step: of the checkpoint that is taken.
        adapter: its file.
        train_seconds: how long the command took.
    """

    folder: Path
    videos: list[Path]
    config: RunConfig
    run: RunFiles
    best_step: int
    adapter: Path
    train_seconds: float


def build_report(lesson: Lesson, figures: Mapping[str, Any], samples: Samples) -> Report:
    """Gathers what the page shows."""

    def row(kind: str, number: int, columns: dict[str, float]) -> Row:
        words = samples[0.0][kind][0][number]
        return Row(words.caption, {label: samples[s][kind][1][number] for label, s in columns.items()})

    count, run = len(samples[1.0]["new"][0]), lesson.run
    before_after, strengths = {"before": 0.0, "after": 1.0}, {f"strength {s:g}": s for s in samples}
    caption, clips = telling_pair(samples)
    labels = (f"{when}: {motion_words(clip)}" for when, clip in zip(before_after, clips, strict=True))
    before, after = (f"{figures[name]:.0%}" for name in ("new_before", "new_after"))
    old_before, kept = (f"{figures[name]:.0%}" for name in ("base_before", "base_after"))
    return Report(
        title="A small Mochi learns a new word",
        summary=(
            f"“{NEW_WORD.capitalize()}” is a made-up word for “{NEW_MOTION}”, a motion that the toy model had never "
            f"seen: {num_taught(lesson)} clips and {figures['train_seconds']:.0f} seconds of training on this computer "
            "taught it."
        ),
        pair=Row(f"“{caption}”", dict(zip(labels, clips, strict=True))),
        results={
            f"of {count} new captions with the word": (f"{before} → {after}", "move in that way, before and after"),
            "of old captions are kept": (kept, f"still right in colour, shape and motion; {old_before} before"),
        },
        taught=Row(
            f"{NUM_CLIPS_SHOWN} of the lesson's clips, each with the caption that it came with. "
            "The captions of the samples are none of these.",
            {p.with_suffix(".txt").read_text().strip(): clip_of(p) for p in lesson.videos[:NUM_CLIPS_SHOWN]},
        ),
        stopping=stopping_words(lesson),
        validation=[(row["step"], row["validation_loss"]) for row in run.validations],
        taken=lesson.best_step,
        samples=[row("new", i, before_after) for i in range(min(NUM_SHOWN, count))]
        + [row("base", i, before_after) for i in range(min(NUM_SHOWN // 2, count))],
        strengths=[row("new", i, strengths) for i in range(2)],
        success_by_strength=[(row["strength"], row["new"], row["base"]) for row in figures["by_strength"]],
        losses=run.curve("loss"),
        figures={label: (percent(name, figures[name]), meaning) for name, (label, meaning) in FIGURES.items()},
        commands="\n".join(
            line.removeprefix(PROMPT)
            for line in (lesson.folder / "log.txt").read_text(errors="replace").splitlines()
            if line.startswith(f"{PROMPT}mochi-tune ")
        ),
        settings=config_yaml(lesson.config),
    )


def build_story(lesson: Lesson, figures: Mapping[str, Any], samples: Samples) -> Story:
    """Gathers what the moving picture shows."""
    caption, (before, after) = telling_pair(samples)
    count = len(samples[1.0]["new"][0])
    before_share, after_share = (f"{figures[name]:.0%}" for name in ("new_before", "new_after"))
    return Story(
        title=f"{num_taught(lesson)} clips teach a small text-to-video model a made-up word",
        taught=[clip_of(path) for path in lesson.videos],
        taught_label=f"“{NEW_WORD}”",
        prompt=f"“{caption}”",
        pair={"before": before, f"after {figures['train_seconds']:.0f} seconds of training": after},
        result=f"Of {count} new captions, this many samples move that way: {before_share} before, {after_share} after.",
    )


def telling_pair(samples: Samples) -> tuple[str, tuple[Tensor, Tensor]]:
    """Returns the first new caption that is read well in both its samples, which are right only after the lesson."""
    words, before = samples[0.0]["new"]
    after = samples[1.0]["new"][1]

    def tells(number: int) -> bool:
        was, asked = see(before[number]), words[number]
        is_seen = (was.colour, was.shape, was.background) == (asked.colour, asked.shape, asked.background)
        return is_seen and was.motion in MOTIONS and see(after[number]).shows(asked)

    number = next(filter(tells, range(len(words))), 0)
    return words[number].caption, (before[number], after[number])


def motion_words(clip: Tensor) -> str:
    """Returns what moves how in a clip, in words."""
    motion = see(clip).motion
    return NEW_MOTION if motion == NEW_WORD else motion or "no clear motion"


def stopping_words(lesson: Lesson) -> str:
    """Returns which step was taken, and what the validation loss says of it."""
    held_out, best = lesson.config.train.validation_clips, lesson.best_step
    last = lesson.run.step
    if best == last:
        return f"On the {held_out} clips that were kept aside the loss falls to the end, so the last step is taken."
    return (
        f"On the {held_out} clips that were kept aside the loss falls until step {best} and rises after it: from there "
        f"on the model learns its clips by heart. All that this page shows is rendered with step {best} of {last}."
    )


def num_taught(lesson: Lesson) -> int:
    """Returns how many clips were trained on."""
    return len(lesson.videos) - lesson.config.train.validation_clips


def clip_of(video: Path) -> Tensor:
    """Returns the frames of a video, uint8 (F, H, W, 3)."""
    frames = read_frames(video)
    pixels = torch.frombuffer(bytearray(b"".join(frame.tobytes() for frame in frames)), dtype=torch.uint8)
    return pixels.view(len(frames), frames[0].height, frames[0].width, 3)


def percent(name: str, value: float) -> str:
    """Returns a figure as a reader wants it."""
    if name == "best_step":
        return f"{value:.0f}"
    return f"{value:.0%}" if name.startswith(("new", "base")) else f"{value:.1f}"
