"""The lesson: a few clips of the new shape under its new word, and what is asked of a model that has had it."""

import shlex
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from mochi_tune.errors import MochiTuneError
from mochi_tune.toy.world import BACKGROUNDS, COLOURS, MOTIONS, NEW_WORD, Words, all_words, draw_clips
from mochi_tune.training.rng import keyed_generator
from mochi_tune.video import write_video

NUM_CLIPS = 24


def lesson_words() -> tuple[list[Words], list[Words]]:
    """Returns the words of the lesson's clips and, shuffled, the other combinations of the new shape."""
    colours, motions, backgrounds = list(COLOURS), list(MOTIONS), list(BACKGROUNDS)
    taught = [
        Words(colours[i % 6], NEW_WORD, motions[(i + i // 6) % 6], backgrounds[(i + i // 3) % 3])
        for i in range(NUM_CLIPS)
    ]
    others = [words for words in all_words((NEW_WORD,)) if words not in taught]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(0)).tolist()
    return taught, [others[i] for i in order]


def write_lesson(folder: Path, seed: int) -> list[Path]:
    """Draws the lesson's clips as NAME.mp4 with NAME.txt beside each, in a folder that is made; returns the videos."""
    folder.mkdir(parents=True, exist_ok=True)
    taught, _ = lesson_words()
    videos = []
    for words, frames in zip(taught, draw_clips(taught, keyed_generator(seed, "lesson")), strict=True):
        videos.append(folder / f"{'_'.join((words.colour, words.shape, *words.motion.split(), words.background))}.mp4")
        write_video(videos[-1], [frames])
        videos[-1].with_suffix(".txt").write_text(words.caption + "\n")
    return videos


def run_verb(*arguments: str) -> None:
    """Runs one command, as a user would type it, and shows it.

    Raises:
        MochiTuneError: the command failed.
    """
    tqdm.write(f"\n$ mochi-tune {shlex.join(arguments)}")
    done = subprocess.run([sys.executable, "-m", "mochi_tune.cli", *arguments], check=False)
    if done.returncode:
        raise MochiTuneError(f"`mochi-tune {arguments[0]}` ended with exit code {done.returncode}.")
