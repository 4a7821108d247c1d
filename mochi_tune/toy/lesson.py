"""The lesson: a few clips of the new motion with its new word, and the captions that a taught model is asked for."""

import shlex
import subprocess
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from mochi_tune.errors import MochiTuneError
from mochi_tune.models.latents import FPS
from mochi_tune.sampling.video import write_video
from mochi_tune.toy.world import BACKGROUNDS, COLOURS, NEW_WORD, SHAPES, Words, all_words, draw_clips, split_words
from mochi_tune.training.draws import keyed_generator

NUM_CLIPS = 24


def lesson_words() -> tuple[list[Words], list[Words]]:
    """Returns the words of the lesson's clips and, shuffled, the other combinations with the new motion."""
    colours, shapes, backgrounds = list(COLOURS), list(SHAPES), list(BACKGROUNDS)
    taught = []
    for i in range(NUM_CLIPS):
        turn, colour = divmod(i, 6)
        background = backgrounds[(colour // 2 + turn + turn // 3) % 3]
        taught.append(Words(colours[colour], shapes[(colour + turn) % 3], NEW_WORD, background))
    others = [words for words in all_words(motions=(NEW_WORD,)) if words not in taught]
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(0)).tolist()
    return taught, [others[i] for i in order]


def asked_words(count: int) -> tuple[list[Words], list[Words]]:
    """Returns `count` words each with the new motion, not of the lesson and repeated if need be, and with old ones."""
    _, others = lesson_words()
    return [others[i % len(others)] for i in range(count)], split_words()[1][:count]


def write_lesson(folder: Path, seed: int, fps: int = FPS) -> list[Path]:
    """Draws the lesson's clips as NAME.mp4 with NAME.txt beside each, in a folder that is made; returns the videos."""
    folder.mkdir(parents=True, exist_ok=True)
    taught, _ = lesson_words()
    videos = []
    for words, frames in zip(taught, draw_clips(taught, keyed_generator(seed, "lesson"), fps), strict=True):
        videos.append(folder / f"{'_'.join((words.colour, words.shape, *words.motion.split(), words.background))}.mp4")
        write_video(videos[-1], [frames], fps=fps)
        videos[-1].with_suffix(".txt").write_text(words.caption + "\n")
    return videos


def run_verb(*arguments: str) -> None:
    """Runs one command, as a user would type it, and writes its line.

    Raises:
        MochiTuneError: the command failed.
    """
    tqdm.write(f"\n$ mochi-tune {shlex.join(arguments)}")
    done = subprocess.run([sys.executable, "-m", "mochi_tune.cli", *arguments], check=False)
    if done.returncode:
        raise MochiTuneError(f"`mochi-tune {arguments[0]}` ended with exit code {done.returncode}.")
