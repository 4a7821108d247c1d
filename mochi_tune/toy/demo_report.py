"""Builds the contents of the demo's page and picture: their texts and the choice of clips."""

import math
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
# Name of a figure -> its label and its meaning.
FIGURES = {
    "new_before": ("New thing, before", "of samples of the new word that move in the new way before the lesson"),
    "new_after": ("New thing, after", "of the same samples after the lesson"),
    "new_after_all": ("… as captioned", "of them, that have the caption's colour and shape too"),
    "base_before": ("Old captions, before", "of samples of unseen captions whose colour, shape and motion are right"),
    "base_after": ("Old captions, after", "of the same samples after the lesson: how much is kept"),
    "vae_psnr_db": ("Autoencoder, dB", "PSNR of unseen clips, encoded and decoded"),
    "taken_step": ("Step taken", "of the lowest validation loss and the last, the one whose samples are best"),
    "train_seconds": ("Training, seconds", "on this machine, starting up and validating included"),
    "total_seconds": ("In all, seconds", "from drawing the clips to the last measurement"),
}

# Strength -> "new" or "base" -> the words of the captions, and the rendered clips (B, F, H, W, 3).
Samples = dict[float, dict[str, tuple[list[Words], Tensor]]]


@dataclass(frozen=True)
class Lesson:
    """The results of the demo's commands.

    Attributes:
        folder: folder of this demo.
        videos: clips of the lesson.
        settings: arguments of the commands besides conf=toy_lora.
        config: settings of the training.
        run: contents of the run folder's files.
        adapters: step -> file, of the lowest validation loss and of the last step, which may be the same.
        train_seconds: duration of the command `train`.
    """

    folder: Path
    videos: list[Path]
    settings: list[str]
    config: RunConfig
    run: RunFiles
    adapters: dict[int, Path]
    train_seconds: float


def build_report(lesson: Lesson, figures: Mapping[str, Any], samples: Samples) -> Report:
    """Builds the content of the page."""

    def row(kind: str, number: int, columns: dict[str, float]) -> Row:
        words = samples[0.0][kind][0][number]
        return Row(words.caption, {label: samples[s][kind][1][number] for label, s in columns.items()})

    count, run = len(samples[1.0]["new"][0]), lesson.run
    before_after, strengths = {"before": 0.0, "after": 1.0}, {f"strength {s:g}": s for s in samples}
    caption, clips = clearest_pair(samples)
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
            f"of {count} samples of new captions": (f"{before} → {after}", "move in that way, before and after"),
            "of old captions are kept": (kept, f"right in colour, shape and motion; {old_before} before"),
        },
        taught=Row(
            f"{NUM_CLIPS_SHOWN} of the lesson's clips, each with the caption that it came with. "
            "The captions of the samples are none of these.",
            {p.with_suffix(".txt").read_text().strip(): clip_of(p) for p in lesson.videos[:NUM_CLIPS_SHOWN]},
        ),
        stopping=stopping_words(lesson, figures),
        validation=[(row["step"], row["validation_loss"]) for row in run.validations],
        lowest=min(lesson.adapters, key=lambda step: loss_at(lesson, step)),
        samples=[row("new", i, before_after) for i in range(min(NUM_SHOWN, count))]
        + [row("base", i, before_after) for i in range(min(NUM_SHOWN // 2, count))],
        strengths=[row("new", i, strengths) for i in range(min(2, count // 2))],
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
    """Builds the content of the animated picture."""
    caption, (before, after) = clearest_pair(samples)
    count = len(samples[1.0]["new"][0])
    before_share, after_share = (f"{figures[name]:.0%}" for name in ("new_before", "new_after"))
    return Story(
        title=f"A small video model learns a made-up word, “{NEW_WORD}”, from {num_taught(lesson)} clips",
        taught=[clip_of(path) for path in lesson.videos],
        taught_label="it was shown",
        prompt=f"“{caption}”",
        pair={"before": before, f"after {figures['train_seconds']:.0f} seconds of training": after},
        result=(
            f"“{NEW_WORD.capitalize()}” means “{NEW_MOTION}”. Of {count} samples, {before_share} do before, "
            f"{after_share} after."
        ),
    )


def clearest_pair(samples: Samples) -> tuple[str, tuple[Tensor, Tensor]]:
    """Returns the first new caption whose samples are both clear and obey it only after the lesson, and its samples."""
    words, before = samples[0.0]["new"]
    after = samples[1.0]["new"][1]

    def is_clear(number: int) -> bool:
        was, asked = see(before[number]), words[number]
        is_seen = (was.colour, was.shape, was.background) == (asked.colour, asked.shape, asked.background)
        return is_seen and was.motion in MOTIONS and see(after[number]).shows(asked)

    number = next(filter(is_clear, range(len(words))), 0)
    return words[number].caption, (before[number], after[number])


def motion_words(clip: Tensor) -> str:
    """Returns the motion of a clip in words."""
    motion = see(clip).motion
    return NEW_MOTION if motion == NEW_WORD else motion or "no clear motion"


def loss_at(lesson: Lesson, step: int) -> float:
    """Returns the validation loss of a step, infinity if it was not validated."""
    return {row["step"]: row["validation_loss"] for row in lesson.run.validations}.get(step, math.inf)


def stopping_words(lesson: Lesson, figures: Mapping[str, Any]) -> str:
    """Returns which step was chosen, and its validation loss and samples, in words."""
    held_out, taken = lesson.config.train.validation_clips, figures["taken_step"]
    best, last = min(lesson.adapters), max(lesson.adapters)
    if best == last:
        return f"On the {held_out} clips that were kept aside the loss is lowest at the end, so step {last} is taken."
    shares = {row["step"]: f"{row['new']:.0%}" for row in figures["by_step"]}
    ends = "The samples agree" if taken == best else "The samples say otherwise"
    return (
        f"On the {held_out} clips that were kept aside the loss is lowest at step {best}, {loss_at(lesson, best):.3f}, "
        f"and {loss_at(lesson, last):.3f} at the end, as if the clips were learnt by heart. {ends}: of those of step "
        f"{best} {shares[best]} move in the new way, of those of step {last} {shares[last]}. The loss does not see "
        f"what you want, so look at both: this page shows step {taken}."
    )


def num_taught(lesson: Lesson) -> int:
    """Returns the number of training clips."""
    return len(lesson.videos) - lesson.config.train.validation_clips


def clip_of(video: Path) -> Tensor:
    """Returns the frames of a video, uint8 (F, H, W, 3)."""
    frames = read_frames(video)
    pixels = torch.frombuffer(bytearray(b"".join(frame.tobytes() for frame in frames)), dtype=torch.uint8)
    return pixels.view(len(frames), frames[0].height, frames[0].width, 3)


def percent(name: str, value: float) -> str:
    """Formats a figure for the page."""
    if name == "taken_step":
        return f"{value:.0f}"
    return f"{value:.0%}" if name.startswith(("new", "base")) else f"{value:.1f}"
